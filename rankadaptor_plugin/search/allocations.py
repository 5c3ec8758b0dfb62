"""Allocations that a run file names, and what of it can be checked before a weight is loaded.

An allocation is one of the rank lists of the paper, or ranks written out.

Table 7 of arXiv 2406.15734: the lists that its search found for LLaMA-7B, pruned by LLM-Pruner at
four rates, for each of seven tasks. A list has 32 ranks, index 0 = bottom. Layers 0 to 3 and 30 and
31 are not pruned and keep rank 8.

The table is kept as printed. What is odd about it:

* 28 lists are 12 different ones. One list serves five tasks at 20 %, one all seven at 50 %, and one
  four tasks at 30 %; some serve two rates (25 and 30 %: BoolQ; HellaSwag at 25 % is ARC-c at 30 %).
* OBQA at 25 % has a rank of 1 in layer 9, outside the paper's candidates {2, 4, ..., 12}. The list
  that it shares with 20 % in all but four layers has 10 there: most likely a lost digit.
* Its heading says "1~32/40", but lists of 40 layers (LLaMA-13B) are not given.
* The lists are no equal-parameter comparison with uniform rank 8: their ranks add up to 194 to 256,
  and only the list of WinoGrande at 20 % reaches the 256 of rank 8 throughout.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from rankadaptor_plugin.core.errors import ConfigError, RankSpaceError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.registry import suggestion
from rankadaptor_plugin.search.transfer.studies import MetaKnowledge

if TYPE_CHECKING:
    from rankadaptor_plugin.config.tables import RunConfig

TABLE_7 = {
    20: {
        "boolq": "8-8-8-8-4-12-12-12-12-10-8-10-6-2-8-6-8-2-8-2-8-10-12-10-6-4-4-4-2-12-8-8",
        "piqa": "8-8-8-8-4-12-12-12-12-10-8-10-6-2-8-6-8-2-8-2-8-10-12-10-6-4-4-4-2-12-8-8",
        "hella": "8-8-8-8-2-2-4-10-10-6-10-10-10-6-6-2-2-10-2-4-2-10-10-10-4-10-10-6-6-2-8-8",
        "wino": "8-8-8-8-8-10-4-10-4-6-6-2-10-8-12-12-10-12-12-10-6-6-8-8-10-6-6-12-2-8-8-8",
        "arc-e": "8-8-8-8-4-12-12-12-12-10-8-10-6-2-8-6-8-2-8-2-8-10-12-10-6-4-4-4-2-12-8-8",
        "arc-c": "8-8-8-8-4-12-12-12-12-10-8-10-6-2-8-6-8-2-8-2-8-10-12-10-6-4-4-4-2-12-8-8",
        "obqa": "8-8-8-8-4-12-12-12-12-10-8-10-6-2-8-6-8-2-8-2-8-10-12-10-6-4-4-4-2-12-8-8",
    },
    25: {
        "boolq": "8-8-8-8-12-2-8-2-8-12-4-2-10-12-10-4-2-2-12-8-10-2-12-12-8-4-4-2-2-12-8-8",
        "piqa": "8-8-8-8-4-2-2-10-10-2-10-10-10-2-2-2-4-10-4-6-10-2-2-6-10-2-2-10-10-2-8-8",
        "hella": "8-8-8-8-4-10-12-12-6-10-6-6-8-2-2-12-2-12-12-6-4-10-6-2-2-8-4-2-2-8-8-8",
        "wino": "8-8-8-8-8-4-12-8-2-2-12-2-10-12-2-12-12-10-8-12-4-6-6-4-10-4-2-10-10-12-8-8",
        "arc-e": "8-8-8-8-2-12-2-6-12-6-12-10-6-4-8-8-12-2-2-6-8-4-12-12-2-4-2-6-6-2-8-8",
        "arc-c": "8-8-8-8-2-12-2-6-12-6-12-10-6-4-8-8-12-2-2-6-8-4-12-12-2-4-2-6-6-2-8-8",
        "obqa": "8-8-8-8-4-12-12-12-12-1-8-10-6-2-8-6-8-2-8-2-8-10-12-12-10-4-4-6-2-12-8-8",
    },
    30: {
        "boolq": "8-8-8-8-12-2-8-2-8-12-4-2-10-12-10-4-2-2-12-8-10-2-12-12-8-4-4-2-2-12-8-8",
        "piqa": "8-8-8-8-12-6-10-4-2-4-2-4-12-8-2-2-2-12-12-12-12-2-12-4-4-2-10-2-2-8-8-8",
        "hella": "8-8-8-8-12-6-8-4-2-12-10-4-4-2-6-4-6-10-4-2-8-6-12-10-4-6-6-6-8-2-8-8",
        "wino": "8-8-8-8-12-6-8-4-2-12-10-4-4-2-6-4-6-10-4-2-8-6-12-10-4-6-6-6-8-2-8-8",
        "arc-e": "8-8-8-8-12-6-8-4-2-12-10-4-4-2-6-4-6-10-4-2-8-6-12-10-4-6-6-6-8-2-8-8",
        "arc-c": "8-8-8-8-4-10-12-12-6-10-6-6-8-2-2-12-2-12-12-6-4-10-6-2-2-8-4-2-2-8-8-8",
        "obqa": "8-8-8-8-12-6-8-4-2-12-10-4-4-2-6-4-6-10-4-2-8-6-12-10-4-6-6-6-8-2-8-8",
    },
    50: {
        "boolq": "8-8-8-8-12-4-6-2-2-10-4-6-12-12-2-2-12-6-4-2-6-2-4-2-6-10-10-4-2-2-8-8",
        "piqa": "8-8-8-8-12-4-6-2-2-10-4-6-12-12-2-2-12-6-4-2-6-2-4-2-6-10-10-4-2-2-8-8",
        "hella": "8-8-8-8-12-4-6-2-2-10-4-6-12-12-2-2-12-6-4-2-6-2-4-2-6-10-10-4-2-2-8-8",
        "wino": "8-8-8-8-12-4-6-2-2-10-4-6-12-12-2-2-12-6-4-2-6-2-4-2-6-10-10-4-2-2-8-8",
        "arc-e": "8-8-8-8-12-4-6-2-2-10-4-6-12-12-2-2-12-6-4-2-6-2-4-2-6-10-10-4-2-2-8-8",
        "arc-c": "8-8-8-8-12-4-6-2-2-10-4-6-12-12-2-2-12-6-4-2-6-2-4-2-6-10-10-4-2-2-8-8",
        "obqa": "8-8-8-8-12-4-6-2-2-10-4-6-12-12-2-2-12-6-4-2-6-2-4-2-6-10-10-4-2-2-8-8",
    },
}
"""Ranks by pruning rate in percent and by task, as the paper calls it."""

_MODEL = "llama-7b"
_TASKS = {
    "boolq": "boolq",
    "piqa": "piqa",
    "hella": "hellaswag",
    "wino": "winogrande",
    "arc-e": "arc_easy",
    "arc-c": "arc_challenge",
    "obqa": "openbookqa",
}
_UNITS = {"layer": "layers", "group": "module groups", "projection": "projections"}
_GROUPS = {"layer": 1, "group": 2}  # of a layer; of projections, it depends on the family
_RANKS = re.compile(r"[0-9]{1,6}(\s*[-,]\s*[0-9]{1,6})*")


def paper_allocations() -> dict[str, RankAllocation]:
    """Returns every list by its name, such as ``paper:llama-7b:20:boolq``."""
    return {
        f"paper:{_MODEL}:{rate}:{_TASKS[task]}": RankAllocation(tuple(map(int, ranks.split("-"))))
        for rate, lists in TABLE_7.items()
        for task, ranks in lists.items()
    }


def named_allocation(text: str) -> RankAllocation:
    """Returns the allocation that a text names or writes out.

    Args:
        text: A name as in `paper_allocations`, where tasks may also be called as in the paper's
            table (hella, wino, arc-e, arc-c, obqa), or ranks such as ``4-6-8-8`` or ``4,6,8,8``.

    Raises:
        ConfigError: If it is neither, or the ranks make no allocation.
    """
    name = text.strip().lower()
    if _RANKS.fullmatch(name):
        return RankAllocation(tuple(int(rank) for rank in re.split("[-,]", name)))
    lists = paper_allocations()
    rest, _, task = name.rpartition(":")
    full = f"{rest}:{_TASKS.get(task, task)}"
    if full not in lists:
        raise ConfigError(
            f"Unknown allocation {text!r}.{suggestion(full, list(lists))} Give ranks such as "
            f'"4-6-8-8", or "paper:{_MODEL}:RATE:TASK" with RATE one of '
            f"{', '.join(map(str, TABLE_7))} and TASK one of "
            f"{', '.join(_TASKS.values())}."
        )
    return lists[full]


def given_allocation(
    config: RunConfig, slots: int | None, hidden_size: int | None
) -> RankAllocation:
    """Returns the allocation that the run file names in place of a search.

    Args:
        config: The run file.
        slots: Ranks that an allocation of the model has; None if that is not known yet.
        hidden_size: Width of the model; None if that is not known yet.

    Raises:
        ConfigError: If there is no such allocation.
        RankSpaceError: If it does not fit the model.
    """
    allocation = named_allocation(config.search.allocation)
    if slots is not None and len(allocation.ranks) != slots:
        raise RankSpaceError(
            f"[search] allocation has {len(allocation.ranks)} ranks, but the model has {slots} "
            f"{_UNITS[config.rank_space.per]}. Give one rank each, or change [rank_space] per."
        )
    if hidden_size is not None and max(allocation.ranks) > hidden_size:
        raise RankSpaceError(
            f"[search] allocation has rank {max(allocation.ranks)}, more than the model's hidden "
            f"size {hidden_size}, where LoRA has full rank already. Lower it."
        )
    return allocation


def check(config: RunConfig, layers: int | None, hidden_size: int | None) -> None:
    """Checks the tables ``[search]`` and ``[rank_space]``.

    Args:
        config: The run file.
        layers: Decoder layers of the pruned model; None if pruning decides on that.
        hidden_size: Its width; None if pruning decides on that.

    Raises:
        ConfigError: If there is no such allocation.
        RankSpaceError: If the named allocation or a limit does not fit the model.
        ArtifactError: If the file of meta-knowledge cannot be used.
    """
    table, groups = config.rank_space, _GROUPS.get(config.rank_space.per)
    slots = layers * groups if layers and groups else None
    if config.search.allocation:
        given_allocation(config, slots, hidden_size)
    if config.search.meta:
        MetaKnowledge.load(Path(config.search.meta))
    if slots is None or not table.max_rank_sum:
        return
    least = max(1, slots * min(table.candidates[0], table.default_rank))
    if config.searches and table.max_rank_sum < least:
        raise RankSpaceError(
            f"[rank_space] max_rank_sum {table.max_rank_sum} is below {least}, the sum of ranks of "
            f"the smallest allocation of {layers} layers. Raise it, or add a smaller rank to "
            "candidates (0 leaves a layer without adapter)."
        )
