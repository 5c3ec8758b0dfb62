"""LoRA-FA (arXiv 2308.03303): A keeps its first weights, and only B is trained.

A's gradients, their moments, and the inputs that A's gradient would need take no memory. The
gradient g of B is turned into the one that brings the change of the weights nearest to that of full
fine-tuning: g (A A^T)^-1 / s^2 with the module's own scaling s. AdamW does the rest. PEFT's
optimizer does the same, but in bfloat16, and inverts anew at each step what never changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rankadaptor_plugin.recovery.adapters import ADAPTER, adapted_modules, weight_of
from rankadaptor_plugin.recovery.methods.tuning import Tuning

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

_RIDGE = 1e-8  # keeps A A^T invertible, as in PEFT


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
