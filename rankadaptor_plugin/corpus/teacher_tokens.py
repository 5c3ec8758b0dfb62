"""What the unpruned model predicts for the trained tokens of a sequence, cut to the likeliest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, eq=False)
class TeacherTokens:
    """Predictions at one temperature, for n trained tokens in their order.

    Attributes:
        indices: The k likeliest tokens, shape (n, k), int32.
        log_probabilities: Theirs, in nats, shape (n, k), float32 or float16.
        rest: Log of the probability of all other tokens together, shape (n,), float32.
    """

    indices: torch.Tensor
    log_probabilities: torch.Tensor
    rest: torch.Tensor

    def to(self, device: torch.device) -> TeacherTokens:
        """Returns the same on a device."""
        return TeacherTokens(
            self.indices.to(device), self.log_probabilities.to(device), self.rest.to(device)
        )

    @classmethod
    def joined(cls, parts: Sequence[TeacherTokens]) -> TeacherTokens:
        """Returns the predictions of several sequences, one after the other."""
        return cls(
            torch.cat([part.indices for part in parts]),
            torch.cat([part.log_probabilities for part in parts]),
            torch.cat([part.rest for part in parts]),
        )
