"""First weights of LoRA from the gradient of the full weights, as in LoRA-GA and LoRA-One.

With G the gradient of the loss by a weight matrix (out, in) on the sequences of one optimizer
step, the rows of A are the first right singular vectors of G, at the row norm that A has by
default, and B stays zero: the model is as it was, and its first steps go where full fine-tuning
would go (LoRA-GA, arXiv 2407.05000; LoRA-One, arXiv 2502.01235, section 3). PEFT's own LoRA-GA is
not used, as it changes the base weights, which other adapters share, and keeps the gradients of the
whole model.
"""

from __future__ import annotations

import zlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rankadaptor_plugin.recovery.adapters import adapted_modules, evaluated, weight_of
from rankadaptor_plugin.recovery.batches import pass_loss, passes
from rankadaptor_plugin.recovery.memory import MicroBatch, mixed_precision, within_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel

    from rankadaptor_plugin.config.tables import RecoveryConfig
    from rankadaptor_plugin.corpus.sequences import TrainingSequence
    from rankadaptor_plugin.recovery.teacher import LiveTeacher

_ROW_NORM = 3**-0.5
"""Norm of a row of A as PEFT draws it, uniform within 1 / sqrt(in)."""
_MORE, _SPARE = 4, 8
"""Rows of a sketch, per rank and beyond: random combinations of the gradient's rows are kept."""
_LEAST = 1e-5
"""Singular values below this share of the first are rounding; their rows stay random."""


def start_from_gradient(
    model: PeftModel,
    sequences: Sequence[TrainingSequence],
    config: RecoveryConfig,
    *,
    seed: int,
    teacher: LiveTeacher | None = None,
) -> None:
    """Sets the A matrices of a fresh LoRA adapter to the directions of the gradient.

    The memory holds one pass of training, and per matrix a sketch of (4 r + 8, in) numbers.

    Args:
        model: The model with the adapter, whose B matrices are zero.
        sequences: Those of one optimizer step.
        config: The ``[recovery]`` table.
        seed: Seed of the sketches; torch's own random state stays as it is.
        teacher: The unpruned model, where it predicts on the way.

    Raises:
        RecoveryError: If memory runs out with one sequence.
    """
    modules = adapted_modules(model)
    sketches: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(partial(_watch, name, _mixing(name, module, seed), sketches))
        for name, module in modules.items()
    ]
    micro = MicroBatch(config.per_device_train_batch_size)
    bare = model.get_base_model()

    def clear() -> None:
        sketches.clear()
        for parameter in model.parameters():
            parameter.grad = None

    def add_up() -> float:
        for part in passes(sequences, micro.size, bare.device):
            with mixed_precision(bare):
                loss = pass_loss(
                    bare,
                    part.to(bare.device),
                    weight=config.distill_weight,
                    temperature=config.distill_temperature,
                    teacher=teacher,
                )
            loss.backward()  # type: ignore[no-untyped-call]
        return 0.0

    try:
        with evaluated(bare):
            within_memory(add_up, clear, bare.device, micro)
        for name, module in modules.items():
            if name in sketches:
                _point(weight_of(module, "lora_A"), sketches[name])
    finally:
        for handle in handles:
            handle.remove()
        clear()


def _mixing(name: str, module: Any, seed: int) -> torch.Tensor:
    """Returns the random combinations of a matrix's rows that are kept, (k, out)."""
    down, up = weight_of(module, "lora_A"), weight_of(module, "lora_B")
    rank, out = len(down), len(up)
    count = _MORE * rank + _SPARE
    if count >= out:
        return torch.eye(out, device=down.device)
    generator = torch.Generator().manual_seed(zlib.crc32(f"gradient {seed} {name}".encode()))
    return torch.randn(count, out, generator=generator).to(down.device)


def _watch(
    name: str,
    mixing: torch.Tensor,
    sketches: dict[str, torch.Tensor],
    _: Any,
    given: tuple[torch.Tensor, ...],
    result: torch.Tensor,
) -> None:
    """Adds to a sketch of the gradient once that of the matrix's result is known."""
    if not result.requires_grad:  # the first of the two passes under checkpointing
        return
    states = given[0].detach()

    def add(gradient: torch.Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1]).float() @ mixing.T
        part = rows.T @ states.reshape(-1, states.shape[-1]).float()
        sketches[name] = sketches[name] + part if name in sketches else part

    result.register_hook(add)  # type: ignore[no-untyped-call]


@torch.no_grad()
def _point(down: torch.Tensor, sketch: torch.Tensor) -> None:
    """Turns the rows of A to the first right singular vectors of a sketch."""
    if not sketch.isfinite().all():
        return
    _, values, right = torch.linalg.svd(sketch, full_matrices=False)
    count = min(len(down), int((values > _LEAST * values[0]).sum()))
    down[:count] = right[:count] * _ROW_NORM
