"""Recovery methods that race beside the searched ranks: what enters, and what each trains."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rankadaptor_plugin.config.tables import SEARCHED_RANKS, UNIFORM_LORA
from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.recovery.files import adapter_parameters
from rankadaptor_plugin.recovery.methods.methods import (
    Method,
    parse_method,
    pattern_allocation,
)
from rankadaptor_plugin.verdict.race import Entrant

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rankadaptor_plugin.config.tables import RecoveryConfig
    from rankadaptor_plugin.core.ranks import RankSpace


def given_entrants(methods: Sequence[str], space: RankSpace) -> list[Entrant]:
    """Returns what is fine-tuned for each recovery method, and what it is compared with.

    A method has the ranks of uniform LoRA and is compared with it; one that gives the ranks by
    layer is compared with the most even allocation of as many parameters. The searched ranks,
    what takes them, and uniform LoRA itself are left out (`found_entrants`).

    Raises:
        ConfigError: If a method is unknown.
        RankSpaceError: If ranks do not fit the model, or exceed a limit.
    """
    parsed = map(parse_method, methods)
    plain = parse_method(UNIFORM_LORA)
    return [
        _entrant(method, space)
        for method in parsed
        if method.name != SEARCHED_RANKS and method != plain
    ]


def found_entrants(
    methods: Sequence[str], best: Entrant, reference: RankAllocation
) -> list[Entrant]:
    """Returns the same for the methods that depend on the best finalist.

    Those such as ``rankadaptor+dora`` take its ranks. ``lora`` is LoRA of the default rank; where
    it is another allocation than the finalist's baseline, it is compared with that.

    Args:
        methods: The recovery methods.
        best: The best finalist.
        reference: LoRA of the default rank.

    Raises:
        ConfigError: If a method is unknown.
    """
    entrants = []
    for method in map(parse_method, methods):
        allocation = best.allocation if method.name == SEARCHED_RANKS else reference
        if method == parse_method(UNIFORM_LORA):
            if reference == best.baseline:
                continue
        elif method.name != SEARCHED_RANKS or method == parse_method(SEARCHED_RANKS):
            continue
        entrants.append(
            Entrant(label=str(method), allocation=_with(allocation, method), baseline=best.baseline)
        )
    return entrants


def _with(allocation: RankAllocation, method: Method) -> RankAllocation:
    """Returns ranks with what is left of a method beside its ranks."""
    rest = str(replace(method, name=UNIFORM_LORA, ranks=()))
    return replace(allocation, method="" if rest == UNIFORM_LORA else rest)


def _entrant(method: Method, space: RankSpace) -> Entrant:
    text, uniform = str(method), space.limited_uniform()
    if not method.ranks:
        return Entrant(label=text, allocation=replace(uniform, method=text), baseline=uniform)
    by_layer = pattern_allocation(method.ranks, space.layers).ranks
    ranks = tuple(rank for rank in by_layer for _ in space.groups)
    plain = space.with_defaults(RankAllocation(ranks))
    # The run file says how many parameters it has.
    if not replace(space, budget=None).within_limits(plain):
        raise RankSpaceError(
            f'[recovery] methods: "{text}" has {space.parameters(plain)} trainable parameters and '
            f"ranks that add up to {sum(ranks)}; [rank_space] max_parameters is "
            f"{space.max_parameters or 'no limit'} and max_rank_sum "
            f"{space.max_rank_sum or 'no limit'}. Lower some ranks or raise the limit."
        )
    return Entrant(
        label=text,
        allocation=_with(plain, method),
        baseline=space.evenly(space.parameters(plain), everywhere=True),
    )


def trained_parameters(
    allocation: RankAllocation, space: RankSpace, config: RecoveryConfig, adapter: Path
) -> int:
    """Returns the number of parameters that the fine-tune of an allocation trains.

    Of AdaLoRA, those that are left in the end; it begins with half as many again.

    Args:
        allocation: The ranks, and the method.
        space: The rank space.
        config: The ``[recovery]`` table.
        adapter: Folder of its adapter: some methods choose the ranks themselves.
    """
    method = parse_method(allocation.method or UNIFORM_LORA)
    if method.name == "none":
        return 0
    if method.name == "lora-fa":  # the other half keeps its first weights
        return adapter_parameters(adapter, "lora_B")
    if method.name != UNIFORM_LORA:
        return adapter_parameters(adapter)
    # PiSSA is saved with twice the ranks, as what it adds to the unchanged weights.
    if not (method.dora or config.use_dora):
        return space.parameters(allocation)
    return space.parameters(allocation) + adapter_parameters(adapter, "lora_magnitude_vector")
