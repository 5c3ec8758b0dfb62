"""Tokenized training sequences: what a recovery corpus is once it is read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

IGNORED = -100
"""Label of a token without loss, as torch's cross-entropy takes it."""


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor on a device; the copy to a GPU runs beside the computation there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True, eq=False)
class TeacherTokens:
    """Predictions of the unpruned model at one temperature, for n trained tokens in their order.

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
            moved(self.indices, device),
            moved(self.log_probabilities, device),
            moved(self.rest, device),
        )

    def __getitem__(self, rows: slice) -> TeacherTokens:
        """Returns those for some of the tokens."""
        return TeacherTokens(self.indices[rows], self.log_probabilities[rows], self.rest[rows])

    @classmethod
    def joined(cls, parts: Sequence[TeacherTokens]) -> TeacherTokens:
        """Returns the predictions of several sequences, one after the other."""
        return cls(
            torch.cat([part.indices for part in parts]),
            torch.cat([part.log_probabilities for part in parts]),
            torch.cat([part.rest for part in parts]),
        )


@dataclass(frozen=True)
class TrainingSequence:
    """One training sequence.

    Attributes:
        tokens: Token ids, shape (t,), int64.
        labels: The same ids, `IGNORED` where no loss is taken, shape (t,), int64.
        teacher: Predictions of the unpruned model for the trained tokens; None without
            distillation.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    teacher: TeacherTokens | None = None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokenized training sequences.

    Attributes:
        sequences: At least one.
        dropped: Rows without a single trainable token within the length limit.
        validation: Sequences that are held out from training.
        rows: Rows that were read, dropped and held-out ones included.
    """

    sequences: Sequence[TrainingSequence]
    dropped: int
    validation: Sequence[TrainingSequence] = ()
    rows: int = 0

    def digest(self) -> str:
        """Returns a hash of all tokens and labels, for a corpus that is not a file to be hashed."""
        sha = hashlib.sha256(f"{len(self.sequences)} {len(self.validation)}".encode())
        for sequence in (*self.sequences, *self.validation):
            sha.update(len(sequence.tokens).to_bytes(8, "little"))
            for ids in (sequence.tokens, sequence.labels):
                sha.update(ids.to(torch.int64).contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]
