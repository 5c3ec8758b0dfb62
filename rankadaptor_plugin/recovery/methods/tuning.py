"""A fine-tune in the making, as most methods need it: AdamW on an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from peft import PeftModel
    from torch import nn


@dataclass(eq=False, kw_only=True)
class Tuning:
    """An adapter that is trained by AdamW.

    Attributes:
        model: The model with the adapter.
        trained: The parameters that are trained.
        before_step: Called right before each step of the optimizer; None for nothing.
        end: Returns the model with its final adapter; None where it has that already.
    """

    model: PeftModel
    trained: list[nn.Parameter]
    before_step: Callable[[], None] | None = None
    end: Callable[[], PeftModel] | None = None

    @property
    def is_settled(self) -> bool:
        """True: `finish` keeps every rank that is trained."""
        return True

    def parameters(self) -> list[nn.Parameter]:
        """Returns what is trained."""
        return self.trained

    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """Returns AdamW over it."""
        optimizer = adamw(self.trained, learning_rate, weight_decay)
        before = self.before_step
        if before:
            optimizer.register_step_pre_hook(lambda *_: before())
        return optimizer

    def extra_loss(self) -> torch.Tensor | None:
        """Returns None: the loss of the tokens is all."""
        return None

    def after_step(self, step: int) -> None:
        """Does nothing."""

    def finish(self) -> PeftModel:
        """Returns the model with its final adapter, in evaluation mode."""
        model = self.end() if self.end else self.model
        return model.eval()


def adamw(
    parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """Returns the optimizer of all methods; no parameters are fine."""
    group = {"params": list(parameters)}
    return torch.optim.AdamW([group], lr=learning_rate, weight_decay=weight_decay, fused=True)
