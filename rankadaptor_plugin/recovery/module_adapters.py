"""Adapters whose ranks, scalings and weights are given module by module.

What a fine-tuning method leaves behind is brought into this one form, so that saving, merging,
scoring and swapping know plain LoRA alone.
"""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from rankadaptor_plugin.models.structures import structure_of
from rankadaptor_plugin.models.units import is_transposed
from rankadaptor_plugin.recovery import adapters
from rankadaptor_plugin.recovery.files import without_old_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn
    from transformers import PreTrainedModel

_WRAPPER = "base_model.model."  # what PEFT puts before the names of the model below


@dataclass(frozen=True, eq=False)
class Pair:
    """What an adapter adds to one matrix: scaling * up @ down.

    Attributes:
        down: A, shape (rank, in).
        up: B, shape (out, rank).
        scaling: Any factor.
    """

    down: torch.Tensor
    up: torch.Tensor
    scaling: float


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How what an adapter adds is scaled; the arguments of `adapters.attach`."""

    alpha_over_rank: float
    alpha: float = 0.0
    rslora: bool = False

    def alpha_of(self, rank: int) -> float:
        """Returns LoRA's alpha of a module."""
        return self.alpha or self.alpha_over_rank * rank

    def of(self, rank: int) -> float:
        """Returns the factor itself."""
        return self.alpha_of(rank) / (math.sqrt(rank) if self.rslora else rank)


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Returns the model below; adapter layers inside it stay."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def has_adapters(model: PreTrainedModel) -> bool:
    """Tells whether a bare model has adapter layers inside it."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@contextlib.contextmanager
def restored_on_failure(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Leaves the model below as it was, and without adapter layers, if the block fails."""
    bare = base_of(model)
    modes = [(module, module.training) for module in bare.modules()]
    flags = [(p, p.requires_grad) for p in bare.parameters()]
    try:
        yield
    except BaseException:
        adapted = {n: m for n, m in bare.named_modules() if isinstance(m, BaseTunerLayer)}
        for name, layer in adapted.items():
            bare.set_submodule(name, layer.get_base_layer())
        vars(bare).pop("peft_config", None)  # or PEFT would warn of adapters that are gone
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def bare_model(base: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Returns the model below, with all adapter layers taken off it."""
    if isinstance(base, PeftModel):
        base.unload()
    return base_of(base)


def adapted_modules(model: PeftModel) -> dict[str, LoraLayer]:
    """Returns the modules that have the adapter, by their name in the model below."""
    return {
        name.removeprefix(_WRAPPER): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapters.ADAPTER in module.r
    }


def adapter_ranks(model: PeftModel) -> dict[str, int]:
    """Returns the rank of every module that has the adapter, by its name in the model below."""
    return {name: module.r[adapters.ADAPTER] for name, module in adapted_modules(model).items()}


def adapter_weights(model: PeftModel) -> list[nn.Parameter]:
    """Returns the A matrices of the adapter."""
    return [weight_of(module, "lora_A") for module in adapted_modules(model).values()]


def weight_of(module: LoraLayer, kind: str, adapter: str = adapters.ADAPTER) -> nn.Parameter:
    """Returns a weight of an adapted module; `kind` is ``"lora_A"`` or ``"lora_B"``."""
    found: Any = getattr(module, kind)[adapter]
    weight: nn.Parameter = found.weight
    return weight


def transposed_matrices(model: PreTrainedModel) -> bool:
    """Returns whether the matrices of a model are kept as (in, out)."""
    structure = structure_of(model)
    matrix = model.get_submodule(f"{structure.layers}.0.{structure.output}")
    return is_transposed(getattr(matrix, "base_layer", matrix))


def attach_ranks(
    bare: PreTrainedModel,
    ranks: Mapping[str, int],
    scaling: Scaling,
    *,
    seed: int,
    dropout: float = 0.0,
    dora: bool = False,
) -> PeftModel:
    """Puts a fresh adapter with a rank per module on a model without adapter layers.

    Args:
        bare: The model.
        ranks: At least 1 each; modules that are not named get no adapter.
        scaling: How to scale it.
        seed: Seed of the initial weights, which are those of `adapters.attach`.
        dropout: LoRA dropout.
        dora: Whether it is a DoRA adapter.
    """
    alphas = {re.escape(name): scaling.alpha_of(rank) for name, rank in ranks.items()}
    model = _attach(bare, ranks, alphas, dropout=dropout, dora=dora, rslora=scaling.rslora)
    adapters.initialize(model, seed)
    return model


@torch.no_grad()
def attach_pairs(
    bare: PreTrainedModel, pairs: Mapping[str, Pair], *, dropout: float = 0.0
) -> PeftModel:
    """Puts a plain LoRA adapter with the given weights on a model without adapter layers.

    Args:
        bare: The model.
        pairs: By module name, of rank 1 or more each.
        dropout: LoRA dropout, for further training.

    Returns:
        The model with its adapter, in evaluation mode.
    """
    ranks = {name: len(pair.down) for name, pair in pairs.items()}
    alphas = {re.escape(name): pair.scaling * ranks[name] for name, pair in pairs.items()}
    model = _attach(bare, ranks, alphas, dropout=dropout)
    for name, module in adapted_modules(model).items():
        weight_of(module, "lora_A").copy_(pairs[name].down)
        weight_of(module, "lora_B").copy_(pairs[name].up)
    return model.eval()


def _attach(
    bare: PreTrainedModel,
    ranks: Mapping[str, int],
    alphas: dict[str, float],
    *,
    dropout: float,
    dora: bool = False,
    rslora: bool = False,
) -> PeftModel:
    most = max(ranks.values())
    config = LoraConfig(
        r=most,
        lora_alpha=max(alphas.values()),
        rank_pattern={re.escape(name): rank for name, rank in ranks.items()},
        alpha_pattern=alphas,
        target_modules=list(ranks),
        fan_in_fan_out=transposed_matrices(bare),
        lora_dropout=dropout,
        use_dora=dora,
        use_rslora=rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    # PEFT draws first weights that are replaced; the caller's random numbers stay as they are.
    with without_old_name(), torch.random.fork_rng(devices=[]):
        model: PeftModel = get_peft_model(bare, config)
    return model
