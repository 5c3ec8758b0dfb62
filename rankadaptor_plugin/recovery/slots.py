"""Slots of a model: which matrices share a rank, which get an adapter, and what a rank costs.

A slot has one rank of its own: a layer, a module group or a projection. Slots follow from
the family alone; targets say which of their matrices get an adapter. A slot without any stays, and
costs nothing.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from rankadaptor_plugin.config.tables import RecoveryConfig
from rankadaptor_plugin.core.errors import ConfigError, RankSpaceError
from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace, Setting
from rankadaptor_plugin.core.registry import suggestion
from rankadaptor_plugin.models.structures import (
    decoder_layers,
    group_matrices,
    matrix_shape,
    place,
    structure_of,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from transformers import PreTrainedModel

    from rankadaptor_plugin.config.tables import RankSpaceConfig
    from rankadaptor_plugin.models.modeling_rankadaptor import Structure

_LISTED = 1000  # rank spaces up to this size are listed, to see if there is a choice


def target_matrices(structure: Structure, targets: Collection[str] = ()) -> tuple[str, ...]:
    """Returns the matrices of a layer that get an adapter, by name within the layer.

    Args:
        structure: The map of the family.
        targets: Names within the layer, or their last parts, which may stand for several matrices;
            empty: all.

    Raises:
        ConfigError: If a target is not a matrix of this family.
    """
    matrices = structure.matrices
    known = {name: {name, name.rpartition(".")[2]} for name in matrices}
    for target in targets:
        if not any(target in names for names in known.values()):
            every = sorted(set().union(*known.values()))
            raise ConfigError(
                f'[recovery] target_modules names "{target}", which no layer of a model of type '
                f'"{structure.model_type}" has.{suggestion(target, every)} '
                f"There are: {', '.join(group_matrices(structure)['projection'])}."
            )
    return tuple(name for name in matrices if not targets or known[name] & set(targets))


def rank_costs(
    model: PreTrainedModel, per: str = "layer", targets: Collection[str] = ()
) -> tuple[int, ...]:
    """Returns the trainable parameters that one unit of rank adds, one number per slot.

    A LoRA pair on a matrix of shape (out, in) has r * (in + out) parameters, so the costs of an
    unevenly pruned model differ from layer to layer. What DoRA adds is the same for every rank and
    left out. A slot without targets costs 0.

    Args:
        model: The pruned model.
        per: What has a rank of its own: ``layer``, ``group`` or ``projection``.
        targets: The matrices that get an adapter, see `target_matrices`; empty: all of a layer, in
            Llama the seven projections that LLM-Pruner and the paper name.

    Raises:
        ConfigError: If a target is not a matrix of this model.
    """
    structure = structure_of(model)
    adapted = set(target_matrices(structure, targets))
    return tuple(
        sum(sum(matrix_shape(layer.get_submodule(name))) for name in names if name in adapted)
        for layer in decoder_layers(model)
        for names in group_matrices(structure)[per].values()
    )


def rank_space(
    model: PreTrainedModel,
    pruned_layers: Sequence[bool],
    config: RankSpaceConfig,
    recovery: RecoveryConfig | None = None,
) -> RankSpace:
    """Returns the rank space S of a pruned model as the run file describes it.

    Slots without targets are not searched.

    Args:
        model: The pruned model.
        pruned_layers: One flag per layer, True if it was pruned.
        config: The ``[rank_space]`` table.
        recovery: The ``[recovery]`` table, with the targets, and with what uniform LoRA takes of
            searched settings.

    Raises:
        RankSpaceError: If a rank is larger than a matrix, or there is nothing to search.
        ConfigError: If a target is not a matrix of this model.
    """
    recovery = recovery or RecoveryConfig()
    structure = structure_of(model)
    groups = group_matrices(structure)[config.per]
    costs = rank_costs(model, config.per, recovery.target_modules)
    everywhere = config.search == "all"
    searchable = [everywhere or cut for cut in pruned_layers for _ in groups]
    adapted = set(target_matrices(structure, recovery.target_modules))
    slots = ((i, names) for i in range(len(pruned_layers)) for names in groups.values())
    greatest = {
        f"{structure.layers}.{i}.{name}": max(
            config.default_rank, config.candidates[-1] if searched else 0
        )
        for (i, names), searched in zip(slots, searchable, strict=True)
        for name in names
        if name in adapted
    }
    _check_ranks(model, greatest)
    space = RankSpace(
        candidates=config.candidates,
        searchable=tuple(s and cost > 0 for s, cost in zip(searchable, costs, strict=True)),
        default_rank=config.default_rank,
        costs=costs,
        budget=config.default_rank * sum(costs) if config.budget == "uniform" else None,
        max_parameters=config.max_parameters or None,
        max_rank_sum=config.max_rank_sum or None,
        groups=tuple(groups),
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


def nearest_allocation(
    model: PreTrainedModel, ranks: Mapping[str, int], space: RankSpace, seed: int
) -> RankAllocation:
    """Returns the allocation of a space nearest to ranks by module, such as those of ``squeeze``.

    A slot has the mean of its modules' ranks, rounded to a candidate; random steps then meet budget
    and limits.

    Args:
        model: The pruned model.
        ranks: The rank of each module; those that are absent have none.
        space: Its rank space.
        seed: Seed of the steps.
    """
    numbered = RankAllocation(tuple(range(1, space.slots + 1)))
    values: dict[int, list[int]] = {slot: [] for slot in numbered.ranks}
    for layer, name, slot in matrix_ranks(model, numbered):
        values[slot].append(ranks.get(f"{layer}.{name}", 0))
    nearest = tuple(
        min(space.candidates, key=lambda rank: abs(rank - fmean(values[slot])))
        if space.searchable[slot - 1]
        else space.default_rank
        for slot in numbered.ranks
    )
    return space.within_budget(space.with_defaults(RankAllocation(nearest)), seed)


def module_ranks(
    model: PreTrainedModel, allocation: RankAllocation, targets: Collection[str] = ()
) -> dict[str, int]:
    """Returns the rank of each module, those without adapter left out.

    Which modules share a rank follows from the number of ranks.

    Args:
        model: The pruned model, with or without an adapter on it.
        allocation: One rank per decoder layer, group or projection.
        targets: The matrices that get an adapter, see `target_matrices`; empty: all.

    Raises:
        RankSpaceError: If there is not one rank per layer, per group, or per projection, a rank is
            larger than its matrix, or no matrix is left with an adapter.
        ConfigError: If a target is not a matrix of this model.
    """
    adapted = set(target_matrices(structure_of(model), targets))
    ranks = {
        f"{layer}.{name}": rank
        for layer, name, rank in matrix_ranks(model, allocation)
        if rank and name in adapted
    }
    if not ranks:
        raise RankSpaceError(
            f"The allocation {allocation} gives none of [recovery] target_modules {list(targets)} "
            "an adapter. Add modules, or give these a rank above 0."
        )
    _check_ranks(model, ranks)
    return ranks


def matrix_ranks(model: PreTrainedModel, allocation: RankAllocation) -> list[tuple[str, str, int]]:
    """Returns layer, name within it and rank of every matrix."""
    structure, layers = structure_of(model), len(decoder_layers(model))
    for groups in group_matrices(structure).values():
        if len(groups) * layers == len(allocation.ranks):
            slots = ((f"{structure.layers}.{i}", g) for i in range(layers) for g in groups.values())
            return [
                (layer, name, rank)
                for (layer, names), rank in zip(slots, allocation.ranks, strict=True)
                for name in names
            ]
    raise RankSpaceError(
        f"The allocation {allocation} has {len(allocation.ranks)} ranks for {layers} layers. "
        "Give one rank per decoder layer, or per group or projection of each."
    )


def _check_ranks(model: PreTrainedModel, ranks: Mapping[str, int]) -> None:
    """Raises RankSpaceError if a module has a higher rank than its matrix can have."""
    shapes = {name: matrix_shape(model.get_submodule(name)) for name in ranks}
    too_high = [name for name, rank in ranks.items() if rank > min(shapes[name])]
    if too_high:
        name = min(too_high, key=lambda name: min(shapes[name]))
        raise RankSpaceError(
            f"Rank {ranks[name]} is too high for {place(model, name)}, which has shape "
            f"{shapes[name]} and full rank at {min(shapes[name])}. Lower [rank_space] candidates "
            "and default_rank, or the allocation, or leave that matrix out of [recovery] "
            "target_modules."
        )
