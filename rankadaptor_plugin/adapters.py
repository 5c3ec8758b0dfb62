"""From a rank allocation to a PEFT adapter on the resident pruned model.

One base model stays in memory; adapters are swapped under it. The initial weights are drawn per
module from a seed and its name, and nested: rank r takes the first r rows of one draw. So two
allocations that agree on a layer start from the same weights there, whatever the others' ranks
(common random numbers), and what their scores differ by owes less to chance.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
import zlib
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from rankadaptor_plugin.errors import ArtifactError, RankSpaceError
from rankadaptor_plugin.ranks import RankSpace, allocation_of
from rankadaptor_plugin.structures import decoder_layers, structure_of
from rankadaptor_plugin.units import is_transposed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from rankadaptor_plugin.config import RankSpaceConfig
    from rankadaptor_plugin.ranks import RankAllocation

ADAPTER = "default"
_LISTED = 1000  # rank spaces up to this size are listed to see whether there is a choice
_BLOCK = 32  # rows drawn at a time; fixed, or a higher rank would change the rows before it


def rank_costs(model: PreTrainedModel) -> tuple[int, ...]:
    """Returns the trainable parameters that one unit of rank adds, one number per layer.

    All matrices of a layer are adapted: in Llama the seven projections that LLM-Pruner and the
    paper name. A LoRA pair on a matrix of shape (out, in) has r * (in + out) parameters, so the
    costs of an unevenly pruned model differ from layer to layer.
    """
    names = structure_of(model).matrices
    return tuple(
        sum(sum(layer.get_parameter(f"{name}.weight").shape) for name in names)
        for layer in decoder_layers(model)
    )


def rank_space(
    model: PreTrainedModel, pruned_layers: Sequence[bool], config: RankSpaceConfig
) -> RankSpace:
    """Returns the rank space S of a pruned model as the run file describes it.

    Args:
        model: The pruned model.
        pruned_layers: Whether a layer was pruned, one flag per layer.
        config: The ``[rank_space]`` table.

    Raises:
        RankSpaceError: If a rank is larger than the model, or there is nothing to search.
    """
    costs = rank_costs(model)
    everywhere = config.search == "all"
    size = model.config.hidden_size
    if config.candidates[-1] > size:
        raise RankSpaceError(
            f"Rank {config.candidates[-1]} is more than the model's hidden size {size}, where LoRA "
            "has full rank already. Lower [rank_space] candidates."
        )
    space = RankSpace(
        candidates=config.candidates,
        searchable=tuple(everywhere or cut for cut in pruned_layers),
        default_rank=config.default_rank,
        costs=costs,
        budget=config.default_rank * sum(costs) if config.budget == "uniform" else None,
    )
    if space.size <= _LISTED and len(space.every()) == 1:
        raise RankSpaceError(
            f"The rank space holds a single allocation ({allocation_of(space.every()[0])}), so "
            "there is nothing to search. Add [rank_space] candidates, search more layers, or set "
            'budget = "free".'
        )
    return space


def lora_config(
    model: PreTrainedModel,
    allocation: RankAllocation,
    *,
    alpha_over_rank: float,
    dropout: float = 0.0,
) -> LoraConfig:
    """Returns PEFT's description of an allocation on a model.

    PEFT matches a pattern against the whole module name, so each key spells out its layer up to
    the dot: ``layers.1`` would match nothing, ``layers.1.*`` the layers 10 to 19 as well.
    """
    structure = structure_of(model)
    matrix = model.get_submodule(f"{structure.layers}.0.{structure.output}")
    ranks = {f"{structure.layers}.{i}": r for i, r in enumerate(allocation.ranks)}
    patterns = {rf"{re.escape(layer)}\..*": r for layer, r in ranks.items()}
    return LoraConfig(
        r=max(ranks.values()),
        lora_alpha=alpha_over_rank * max(ranks.values()),
        rank_pattern=patterns,
        alpha_pattern={pattern: alpha_over_rank * r for pattern, r in patterns.items()},
        target_modules=[f"{layer}.{name}" for layer in ranks for name in structure.matrices],
        fan_in_fan_out=is_transposed(getattr(matrix, "base_layer", matrix)),
        lora_dropout=dropout,
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
) -> PeftModel:
    """Puts a fresh adapter on the base model, in the place of the one before.

    Args:
        base: The pruned model, or what this function returned for it.
        allocation: One rank per decoder layer.
        seed: Seed of the initial weights.
        alpha_over_rank: LoRA scaling alpha / r, the same in every layer.
        dropout: LoRA dropout.

    Raises:
        RankSpaceError: If the allocation has not one rank per layer.
    """
    bare = base.get_base_model() if isinstance(base, PeftModel) else base
    layers = len(decoder_layers(bare))
    if len(allocation.ranks) != layers:
        raise RankSpaceError(
            f"The allocation {allocation} has {len(allocation.ranks)} ranks for {layers} layers. "
            "Give one rank per decoder layer."
        )
    config = lora_config(bare, allocation, alpha_over_rank=alpha_over_rank, dropout=dropout)
    if isinstance(base, PeftModel):
        base.delete_adapter(ADAPTER)
        base.add_adapter(ADAPTER, config)
        base.set_adapter(ADAPTER)  # after delete and add nothing would be trainable otherwise
        model = base
    else:
        with _without_old_name():
            model = get_peft_model(base, config)
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


def load(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Puts a saved adapter on its model."""
    with _without_old_name():
        return PeftModel.from_pretrained(model, folder)


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Adds a saved adapter to the weights of its model, in place; they keep their type.

    Args:
        model: The model that the adapter was trained on.
        folder: The adapter, a PEFT folder with safetensors.

    Returns:
        The model, without adapter layers.

    Raises:
        ArtifactError: If the adapter is torn, pickled, or does not fit the model.
    """
    try:
        with warnings.catch_warnings():
            # Without its weights PEFT would merge a fresh adapter, that is none.
            warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
            if not (folder / "adapter_model.safetensors").is_file():
                raise ValueError("adapter_model.safetensors is missing")
            wrapped = load(model, folder)
            whole: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
    except Exception as error:  # PEFT and the readers of a torn file raise all kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ArtifactError(
            f"The adapter in {folder} cannot be merged: {' '.join(lines[:2]).rstrip('.')}. Give "
            "the adapter that was trained on this model."
        ) from error
    return whole


@contextlib.contextmanager
def _without_old_name() -> Iterator[None]:
    """Hides that PEFT 0.21 asks for an attribute that transformers 5.23 has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield
