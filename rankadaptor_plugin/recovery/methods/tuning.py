"""A fine-tune in the making, as most methods need it: AdamW on an adapter.

LoRA-FA (arXiv 2308.03303): A keeps its first weights, and only B is trained.

A's gradients, their moments, and the inputs that A's gradient would need take no memory. The
gradient g of B is turned into the one that brings the change of the weights nearest to that of full
fine-tuning: g (A A^T)^-1 / s^2 with the module's own scaling s. AdamW does the rest. PEFT's
optimizer does the same, but in bfloat16, and inverts anew at each step what never changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rankadaptor_plugin.recovery.adapters import ADAPTER, adapted_modules, weight_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from peft import PeftModel
    from torch import nn

_RIDGE = 1e-8  # keeps A A^T invertible, as in PEFT


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
        """Returns the trainable parameters."""
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


def train_up_only(model: PeftModel) -> Tuning:
    """Freezes the A matrices of a fresh LoRA adapter and returns how its B matrices are trained."""
    inverses: list[tuple[nn.Parameter, torch.Tensor]] = []
    for module in adapted_modules(model).values():
        down = weight_of(module, "lora_A").requires_grad_(False)
        inverse = _inverse(down, module.scaling[ADAPTER])
        inverses.append((weight_of(module, "lora_B"), inverse))

    def turn() -> None:
        for up, inverse in inverses:
            if up.grad is not None:
                up.grad = (up.grad.float() @ inverse).to(up.dtype)

    return Tuning(model=model, trained=[up for up, _ in inverses], before_step=turn)


@torch.no_grad()
def _inverse(down: torch.Tensor, scaling: float) -> torch.Tensor:
    """Returns (A A^T)^-1 / s^2, shape (rank, rank), float32."""
    exact = down.double()
    ridge = _RIDGE * torch.eye(len(down), dtype=exact.dtype, device=down.device)
    inverse: torch.Tensor = torch.linalg.pinv(exact @ exact.T + ridge, hermitian=True)
    return (inverse / scaling**2).float()
