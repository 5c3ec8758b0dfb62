"""PiSSA (arXiv 2404.02948): LoRA that starts from the principal singular vectors of the weights.

With W = U S V^T cut after the r greatest singular values, A starts as sqrt(S / s) V^T and B as
U sqrt(S / s), s being LoRA's scaling. The paper trains them above the residual W - s B0 A0. Here W
stays as it is, for other adapters live on it: a second, frozen adapter -s B0 A0 stands for the
residual while training, and the two end as one ordinary adapter of rank 2 r, as after PiSSA's own
conversion to LoRA.
"""

from __future__ import annotations

import copy
import zlib
from typing import TYPE_CHECKING, Any

import torch

from rankadaptor_plugin.models.structures import is_transposed
from rankadaptor_plugin.recovery.adapters import (
    ADAPTER,
    Pair,
    adapted_modules,
    attach_pairs,
    bare_model,
    trainable_parameters,
    weight_of,
)
from rankadaptor_plugin.recovery.methods.tuning import Tuning
from rankadaptor_plugin.recovery.peft_internals import dequantize_module_weight

if TYPE_CHECKING:
    from peft import PeftModel

_START = "pissa_start"
_EXACT = 1024  # matrices up to this size are decomposed exactly
_SPARE = 8  # singular values beyond those that are asked for, which make these more exact
_ITERATIONS = 16  # of the approximate decomposition, as many as the paper takes at most


def start_from_principal(model: PeftModel, seed: int) -> Tuning:
    """Makes a PiSSA adapter of a fresh LoRA adapter and returns how it is trained.

    Args:
        model: The model with the LoRA adapter.
        seed: Seed of the approximate decomposition of large matrices.
    """
    config: Any = copy.deepcopy(model.peft_config[ADAPTER])
    dropout: float = config.lora_dropout
    config.lora_dropout = 0.0  # the residual is part of the base, all of it
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(_START, config)
    tuner: Any = model.base_model
    tuner.set_adapter([ADAPTER, _START])  # both are part of every forward pass
    for name, module in adapted_modules(model).items():
        _start(module, name, seed)
    return Tuning(
        model=model, trained=trainable_parameters(model), end=lambda: _joined(model, dropout)
    )


@torch.no_grad()
def _joined(model: PeftModel, dropout: float) -> PeftModel:
    """Returns the model with one ordinary adapter of rank 2 r in the place of the two."""
    pairs = {}
    for name, module in adapted_modules(model).items():
        downs, ups = (
            [weight_of(module, kind, adapter).detach() for adapter in (ADAPTER, _START)]
            for kind in ("lora_A", "lora_B")
        )
        pairs[name] = Pair(torch.cat(downs), torch.cat(ups, dim=1), module.scaling[ADAPTER])
    return attach_pairs(bare_model(model), pairs, dropout=dropout)


@torch.no_grad()
def _start(module: Any, name: str, seed: int) -> None:
    """Sets the first weights of a module, and those of what is taken off again."""
    base = module.get_base_layer()
    weight = dequantize_module_weight(base)
    matrix = (weight.T if is_transposed(base) else weight).detach().float()
    down, up = weight_of(module, "lora_A"), weight_of(module, "lora_B")
    left, values, right = principal(matrix, module.r[ADAPTER], seed, name)
    root = (values / module.scaling[ADAPTER]).sqrt()
    down.copy_(root[:, None] * right)
    up.copy_(left * root)
    weight_of(module, "lora_A", _START).copy_(down).requires_grad_(False)
    weight_of(module, "lora_B", _START).copy_(-up).requires_grad_(False)


def principal(
    matrix: torch.Tensor, rank: int, seed: int, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the first singular vectors and values of a matrix of shape (out, in).

    Large matrices are decomposed approximately, with random numbers of their own.

    Returns:
        Shapes (out, rank), (rank,) and (rank, in); the values descend.
    """
    if min(matrix.shape) <= _EXACT:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    devices = [matrix.device] if matrix.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        width = min(rank + _SPARE, *matrix.shape)
        left, values, right = torch.svd_lowrank(matrix, q=width, niter=_ITERATIONS)
    return left[:, :rank], values[:rank], right[:, :rank].T
