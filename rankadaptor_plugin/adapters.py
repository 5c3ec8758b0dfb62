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

from rankadaptor_plugin.config import RecoveryConfig
from rankadaptor_plugin.errors import ArtifactError, RankSpaceError
from rankadaptor_plugin.ranks import RankSpace, Setting
from rankadaptor_plugin.structures import decoder_layers, group_matrices, structure_of
from rankadaptor_plugin.units import is_transposed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from rankadaptor_plugin.config import RankSpaceConfig
    from rankadaptor_plugin.ranks import RankAllocation

ADAPTER = "default"
_LISTED = 1000  # rank spaces up to this size are listed to see whether there is a choice
_BLOCK = 32  # rows drawn at a time; fixed, or a higher rank would change the rows before it


def rank_costs(model: PreTrainedModel, per: str = "layer") -> tuple[int, ...]:
    """Returns the trainable parameters that one unit of rank adds, one number per slot.

    All matrices of a layer are adapted: in Llama the seven projections that LLM-Pruner and the
    paper name. A LoRA pair on a matrix of shape (out, in) has r * (in + out) parameters, so the
    costs of an unevenly pruned model differ from layer to layer.

    Args:
        model: The pruned model.
        per: What has a rank of its own: ``layer``, ``group`` or ``projection``.
    """
    groups = group_matrices(structure_of(model))[per].values()
    return tuple(
        sum(sum(layer.get_parameter(f"{name}.weight").shape) for name in names)
        for layer in decoder_layers(model)
        for names in groups
    )


def rank_space(
    model: PreTrainedModel,
    pruned_layers: Sequence[bool],
    config: RankSpaceConfig,
    recovery: RecoveryConfig | None = None,
) -> RankSpace:
    """Returns the rank space S of a pruned model as the run file describes it.

    Args:
        model: The pruned model.
        pruned_layers: Whether a layer was pruned, one flag per layer.
        config: The ``[rank_space]`` table.
        recovery: The ``[recovery]`` table, with what uniform LoRA takes of searched settings.

    Raises:
        RankSpaceError: If a rank is larger than the model, or there is nothing to search.
    """
    groups = tuple(group_matrices(structure_of(model))[config.per])
    costs = rank_costs(model, config.per)
    everywhere = config.search == "all"
    size = model.config.hidden_size
    if config.candidates[-1] > size:
        raise RankSpaceError(
            f"Rank {config.candidates[-1]} is more than the model's hidden size {size}, where LoRA "
            "has full rank already. Lower [rank_space] candidates."
        )
    recovery = recovery or RecoveryConfig()
    space = RankSpace(
        candidates=config.candidates,
        searchable=tuple(everywhere or cut for cut in pruned_layers for _ in groups),
        default_rank=config.default_rank,
        costs=costs,
        budget=config.default_rank * sum(costs) if config.budget == "uniform" else None,
        max_parameters=config.max_parameters or None,
        max_rank_sum=config.max_rank_sum or None,
        groups=groups,
        settings=tuple(
            _setting(name, getattr(config, name), getattr(recovery, name))
            for name in ("alpha_over_rank", "learning_rate")
            if getattr(config, name)
        ),
    )
    if space.size <= _LISTED and len(space.every()) == 1:
        raise RankSpaceError(
            f"The rank space holds a single allocation ({space.allocation(space.every()[0])}), so "
            "there is nothing to search. Add [rank_space] candidates, search more layers, or set "
            'budget = "free".'
        )
    return space


def _setting(name: str, values: tuple[float, ...], default: float) -> Setting:
    # Uniform LoRA has the default, and is measured in the same study.
    return Setting(name, tuple(sorted({*values, default})), default)


def module_ranks(model: PreTrainedModel, allocation: RankAllocation) -> dict[str, int]:
    """Returns the rank of each module, those without adapter left out.

    Which modules share a rank follows from the number of ranks.

    Raises:
        RankSpaceError: If that is not one per layer, per group, or per projection.
    """
    structure, layers = structure_of(model), len(decoder_layers(model))
    for groups in group_matrices(structure).values():
        if len(groups) * layers == len(allocation.ranks):
            slots = ((f"{structure.layers}.{i}", g) for i in range(layers) for g in groups.values())
            return {
                f"{layer}.{name}": rank
                for (layer, names), rank in zip(slots, allocation.ranks, strict=True)
                for name in names
                if rank
            }
    raise RankSpaceError(
        f"The allocation {allocation} has {len(allocation.ranks)} ranks for {layers} layers. "
        "Give one rank per decoder layer, or per group or projection of each."
    )


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

    Raises:
        RankSpaceError: If the allocation does not fit the model.
    """
    structure = structure_of(model)
    matrix = model.get_submodule(f"{structure.layers}.0.{structure.output}")
    ranks = module_ranks(model, allocation)
    layers = len(decoder_layers(model))
    if len(allocation.ranks) == layers:  # one short pattern per layer
        named = enumerate(allocation.ranks)
        patterns = {rf"{re.escape(f'{structure.layers}.{i}')}\..*": r for i, r in named if r}
    else:
        patterns = {re.escape(name): rank for name, rank in ranks.items()}
    return LoraConfig(
        r=max(ranks.values()),
        lora_alpha=alpha_over_rank * max(ranks.values()),
        rank_pattern=patterns,
        alpha_pattern={pattern: alpha_over_rank * r for pattern, r in patterns.items()},
        target_modules=list(ranks),
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
        allocation: One rank per decoder layer, group or projection.
        seed: Seed of the initial weights.
        alpha_over_rank: LoRA scaling alpha / r, the same in every layer.
        dropout: LoRA dropout.

    Raises:
        RankSpaceError: If the allocation does not fit the model.
    """
    bare = base.get_base_model() if isinstance(base, PeftModel) else base
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


def whole_adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    """Returns a copy of the adapter's weights by parameter name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}


@torch.no_grad()
def cut(model: PeftModel, whole: Mapping[str, torch.Tensor], allocation: RankAllocation) -> None:
    """Cuts an adapter to an allocation: each module keeps its first rows and columns.

    What is cut off is zero rather than removed, which gives the same outputs, since alpha / r is
    the same for every rank.

    Args:
        model: A model with the adapter, of no smaller rank anywhere.
        whole: Its weights as `whole_adapter` returned them.
        allocation: The ranks to keep.
    """
    ranks = module_ranks(model.get_base_model(), allocation)
    for name, weight in whole.items():
        module, is_up = name.removeprefix("base_model.model."), ".lora_B." in name
        kept = weight.clone()
        if is_up:
            kept[:, ranks.get(module.partition(".lora_B.")[0], 0) :] = 0
        model.get_parameter(name).copy_(kept)


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
