"""From a rank allocation to a PEFT adapter on the resident pruned model.

One base model stays in memory; adapters are swapped under it. The initial weights are drawn per
module from a seed and its name, and nested: rank r takes the first r rows of one draw. So two
allocations that agree on a layer start from the same weights there, whatever the others' ranks
(common random numbers), and what their scores differ by owes less to chance.
"""

from __future__ import annotations

import math
import re
import zlib
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from rankadaptor_plugin.models.structures import decoder_layers, structure_of
from rankadaptor_plugin.models.units import is_transposed
from rankadaptor_plugin.recovery.files import load, merged, save_adapter, without_old_name
from rankadaptor_plugin.recovery.slots import matrix_ranks, module_ranks, rank_costs, rank_space

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from transformers import PreTrainedModel

    from rankadaptor_plugin.core.ranks import RankAllocation

__all__ = [
    "ADAPTER",
    "attach",
    "cut",
    "initialize",
    "load",
    "lora_config",
    "merged",
    "module_ranks",
    "nested_rows",
    "rank_costs",
    "rank_space",
    "save_adapter",
    "trainable_parameters",
    "whole_adapter",
]

ADAPTER = "default"
_BLOCK = 32  # rows drawn at a time; fixed, or a higher rank would change the rows before it


def lora_config(
    model: PreTrainedModel,
    allocation: RankAllocation,
    *,
    alpha_over_rank: float,
    dropout: float = 0.0,
    alpha: float = 0.0,
    dora: bool = False,
    rslora: bool = False,
    targets: Collection[str] = (),
) -> LoraConfig:
    """Returns PEFT's description of an allocation on a model.

    PEFT matches a pattern against the whole module name, so each key spells out its layer up to
    the dot: ``layers.1`` would match nothing, ``layers.1.*`` the layers 10 to 19 as well.

    See `attach` for the arguments.

    Raises:
        RankSpaceError: If the allocation does not fit the model.
        ConfigError: If a target is no matrix of this model.
    """
    structure = structure_of(model)
    matrix = model.get_submodule(f"{structure.layers}.0.{structure.output}")
    ranks = module_ranks(model, allocation, targets)
    layers = len(decoder_layers(model))
    if len(allocation.ranks) == layers:  # one short pattern per layer
        named = enumerate(allocation.ranks)
        patterns = {rf"{re.escape(f'{structure.layers}.{i}')}\..*": r for i, r in named if r}
    else:
        patterns = {re.escape(name): rank for name, rank in ranks.items()}
    alphas = {} if alpha else {pattern: alpha_over_rank * r for pattern, r in patterns.items()}
    return LoraConfig(
        r=max(ranks.values()),
        lora_alpha=alpha or alpha_over_rank * max(ranks.values()),
        rank_pattern=patterns,
        alpha_pattern=alphas,
        target_modules=list(ranks),
        fan_in_fan_out=is_transposed(getattr(matrix, "base_layer", matrix)),
        lora_dropout=dropout,
        use_dora=dora,
        use_rslora=rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def attach(
    base: PreTrainedModel | PeftModel,
    allocation: RankAllocation,
    *,
    seed: int,
    alpha_over_rank: float,
    dropout: float = 0.0,
    alpha: float = 0.0,
    dora: bool = False,
    rslora: bool = False,
    targets: Collection[str] = (),
) -> PeftModel:
    """Puts a fresh adapter on the base model, in the place of the one before.

    Args:
        base: The pruned model, or what PEFT made of it, with any adapter.
        allocation: One rank per decoder layer, group or projection.
        seed: Seed of the initial weights.
        alpha_over_rank: LoRA alpha / r, the same for every rank. What an adapter adds is scaled by
            it, or, with `rslora`, by alpha_over_rank * sqrt(r).
        dropout: LoRA dropout.
        alpha: LoRA alpha, the same for every rank, in place of `alpha_over_rank` * r; 0: none.
            The scaling is then alpha / r, or, with `rslora`, alpha / sqrt(r).
        dora: Whether a magnitude per output is trained too (DoRA, arXiv 2402.09353). It starts
            from that of the base weights.
        rslora: Whether alpha is divided by sqrt(r) instead of r (arXiv 2312.03732).
        targets: The matrices of a layer that get an adapter, by name or its last part; empty: all.

    Returns:
        `base` itself if it has been a LoRA model, else a new one.

    Raises:
        RankSpaceError: If the allocation does not fit the model.
        ConfigError: If a target is no matrix of this model.
    """
    bare = base.get_base_model() if isinstance(base, PeftModel) else base
    config = lora_config(
        bare,
        allocation,
        alpha_over_rank=alpha_over_rank,
        dropout=dropout,
        alpha=alpha,
        dora=dora,
        rslora=rslora,
        targets=targets,
    )
    if isinstance(base, PeftModel):
        base.unload()  # deleting an adapter would leave its layers, now without use, and its DoRA
    if isinstance(base, PeftModel) and base.peft_type == PeftType.LORA:
        for name in list(base.peft_config):
            base.delete_adapter(name)
        base.add_adapter(ADAPTER, config)
        base.set_adapter(ADAPTER)  # after delete and add nothing would be trainable otherwise
        model = base
    else:
        with without_old_name():
            model = get_peft_model(bare, config)
    initialize(model, seed)
    return model


@torch.no_grad()
def initialize(model: PeftModel, seed: int) -> None:
    """Sets the adapter's weights: A uniform in +-1/sqrt(in) as in PEFT, B zero."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            down: nn.Linear = module.lora_A[ADAPTER]
            rank, features = down.weight.shape
            rows = nested_rows(rank, features, seed, name)
            down.weight.copy_(rows / math.sqrt(features))
            nn.init.zeros_(module.lora_B[ADAPTER].weight)


def nested_rows(rank: int, features: int, seed: int, name: str) -> torch.Tensor:
    """Draws rows uniform in [-1, 1); a smaller rank gets the first of the same rows.

    Returns:
        Shape (rank, features), float32.
    """
    # Seed and name are mixed into 32 bits: torch's generator ignores all bits above them.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    blocks: Sequence[torch.Tensor] = [
        torch.rand(_BLOCK, features, generator=generator) for _ in range(0, rank, _BLOCK)
    ]
    return torch.cat(list(blocks))[:rank] * 2 - 1


def trainable_parameters(model: PeftModel) -> list[nn.Parameter]:
    """Returns the adapter's parameters."""
    return [p for p in model.parameters() if p.requires_grad]


def whole_adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    """Returns a copy of the adapter's weights by parameter name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}


@torch.no_grad()
def cut(model: PeftModel, whole: Mapping[str, torch.Tensor], allocation: RankAllocation) -> None:
    """Cuts an adapter to an allocation: each module keeps its first rows and columns.

    What is cut off is zero rather than removed. What is kept adds as much as before: the scaling
    stays that of the whole, also where alpha is the same for every rank, and so do DoRA's
    magnitudes.

    Args:
        model: A model with the adapter, of no smaller rank anywhere.
        whole: Its weights as `whole_adapter` returned them.
        allocation: The ranks to keep.
    """
    ranks = {
        f"{layer}.{name}": rank
        for layer, name, rank in matrix_ranks(model.get_base_model(), allocation)
    }
    for name, weight in whole.items():
        module, is_up = name.removeprefix("base_model.model."), ".lora_B." in name
        kept = weight.clone()
        if is_up:
            kept[:, ranks.get(module.partition(".lora_B.")[0], 0) :] = 0
        model.get_parameter(name).copy_(kept)
