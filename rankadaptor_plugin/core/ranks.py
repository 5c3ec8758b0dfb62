"""The rank space S and its members, the rank allocations R_H (paper, sections 3.1 and 4.1).

An allocation gives every slot one LoRA rank. A slot is a decoder layer, index 0 = bottom, or, where
ranks are searched per module group, a group of a layer: layer 0's groups first, then layer 1's.
Searchable slots draw their rank from the candidates, all others keep the default rank. Settings of
the fine-tune such as its learning rate may be searched along with the ranks.

A budget, where given, holds the number of trainable parameters at or just below that of a uniform
allocation, so that what is compared is *where* the parameters go and not how many there are. Limits
on parameters and on the sum of ranks are only kept to, not filled.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rankadaptor_plugin.core.errors import RankSpaceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Allocations = NDArray[np.int64]
"""Rows of a rank space, (n, c): a rank per slot, then the index of a value per setting."""

WHOLE_LAYER = ("",)
"""The module groups of a space whose slots are layers."""


@dataclass(frozen=True)
class RankAllocation:
    """One LoRA rank per slot (R_H in the paper).

    Attributes:
        ranks: Index 0 = bottom; rank 0 leaves a slot without adapter.
        settings: Searched settings of the fine-tune, ``(name, value)``; empty takes those of the
            run file.
        method: Name of the recovery method; empty is LoRA of these ranks. Never searched.
    """

    ranks: tuple[int, ...]
    settings: tuple[tuple[str, float], ...] = ()
    method: str = ""

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 0 or max(self.ranks) == 0:
            raise RankSpaceError(
                f"The allocation {self} has a rank below 0, or none above 0. Give ranks of 0 or "
                "more, at least one of them above 0."
            )

    def __str__(self) -> str:
        ranks = "-".join(str(rank) for rank in self.ranks)
        named = f"{self.method} {ranks}" if self.method else ranks
        return ", ".join([named, *(f"{name} {value:g}" for name, value in self.settings)])

    def to_json(self) -> dict[str, Any]:
        """Returns plain values: ``ranks``, ``settings``, and ``method`` unless it is LoRA."""
        method = {"method": self.method} if self.method else {}
        return {"ranks": list(self.ranks), "settings": dict(self.settings), **method}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RankAllocation:
        """Builds an allocation from what `to_json` returned, other keys left aside."""
        return cls(
            tuple(data["ranks"]),
            tuple(data.get("settings", {}).items()),
            data.get("method", ""),
        )


@dataclass(frozen=True)
class Setting:
    """A setting of the fine-tune that is searched along with the ranks.

    Attributes:
        name: A key of ``[recovery]``.
        values: Values to choose from, ascending.
        default: The value that uniform LoRA takes.
    """

    name: str
    values: tuple[float, ...]
    default: float

    @property
    def default_index(self) -> int:
        """Index of the value next to the default."""
        return min(range(len(self.values)), key=lambda i: abs(self.values[i] - self.default))


@dataclass(frozen=True, kw_only=True)
class RankSpace:
    """The solution space S: which ranks each slot may take.

    Attributes:
        candidates: Ranks to choose from, ascending; 0 leaves a slot without adapter.
        searchable: Whether the rank of a slot is searched, one flag per slot.
        default_rank: Rank of the slots that are not searched, and of uniform LoRA.
        costs: Trainable parameters that one unit of rank adds, one number per slot.
        budget: Most trainable parameters of an allocation; proposals are filled up to it. None
            for no budget.
        max_parameters: Most trainable parameters, without filling up; None for no limit.
        max_rank_sum: Most that the ranks of all slots may add up to; None for no limit.
        groups: Names of the slots of one layer; one empty name if slots are layers.
        settings: Settings that are searched too.
    """

    candidates: tuple[int, ...]
    searchable: tuple[bool, ...]
    default_rank: int
    costs: tuple[int, ...]
    budget: int | None = None
    max_parameters: int | None = None
    max_rank_sum: int | None = None
    groups: tuple[str, ...] = WHOLE_LAYER
    settings: tuple[Setting, ...] = ()

    def __post_init__(self) -> None:
        if not self.candidates or min(self.candidates) < 0 or max(self.candidates) == 0:
            raise RankSpaceError(
                f"The rank candidates {list(self.candidates)} are not all at least 0 with one "
                "above 0. Change [rank_space] candidates."
            )
        if tuple(sorted(set(self.candidates))) != self.candidates:
            raise RankSpaceError(
                f"The rank candidates {list(self.candidates)} are not ascending and distinct. "
                "Sort [rank_space] candidates and remove repetitions."
            )
        if self.default_rank < 1:
            raise RankSpaceError(
                f"The default rank {self.default_rank} is below 1. "
                "Change [rank_space] default_rank."
            )
        if not any(self.searchable):
            raise RankSpaceError(
                f"None of the {len(self.searchable)} layers is searchable. Lower [prune] "
                'keep_first or keep_last, or set [rank_space] search = "all".'
            )
        if len(self.costs) != len(self.searchable):
            raise RankSpaceError(
                f"{len(self.costs)} layer costs were given for {len(self.searchable)} layers. "
                "Give one cost per layer."
            )
        if min(c for c, s in zip(self.costs, self.searchable, strict=True) if s) < 1:
            raise RankSpaceError(
                f"The layer costs {list(self.costs)} are below 1 in a searchable layer. Give the "
                "trainable parameters that one unit of rank adds, or do not search that layer."
            )
        if len(self.searchable) % len(self.groups):
            raise RankSpaceError(
                f"{len(self.searchable)} slots cannot be whole layers of {len(self.groups)} "
                f"module groups {list(self.groups)}. Give one slot per layer and group."
            )
        self._check_limits()

    def _check_limits(self) -> None:
        least = self._least()
        parameters = sum(r * c for r, c in zip(least, self.costs, strict=True))
        if self.budget is not None and parameters > self.budget:
            raise RankSpaceError(
                f"The budget of {self.budget} trainable parameters is below {parameters}, the "
                f"least with rank {self.candidates[0]} in all searchable layers. Add a smaller "
                'rank to [rank_space] candidates, raise default_rank, or set budget = "free".'
            )
        if self.max_parameters is not None and parameters > self.max_parameters:
            raise RankSpaceError(
                f"[rank_space] max_parameters {self.max_parameters} is below {parameters}, the "
                "trainable parameters of the smallest allocation. Raise it, or add a smaller rank "
                "to candidates (0 leaves a layer without adapter)."
            )
        if self.max_rank_sum is not None and sum(least) > self.max_rank_sum:
            raise RankSpaceError(
                f"[rank_space] max_rank_sum {self.max_rank_sum} is below {sum(least)}, the sum of "
                "ranks of the smallest allocation. Raise it, or add a smaller rank to candidates "
                "(0 leaves a layer without adapter)."
            )

    def _least(self) -> tuple[int, ...]:
        """Returns the ranks of the allocation with the fewest parameters."""
        ranks = [self.candidates[0] if s else self.default_rank for s in self.searchable]
        if not any(ranks):  # no adapter at all is no fine-tune
            ranks[int(np.argmin(self.costs))] = self.candidates[1]
        return tuple(ranks)

    @property
    def slots(self) -> int:
        """Number of ranks in an allocation: layers times module groups."""
        return len(self.searchable)

    @property
    def layers(self) -> int:
        """Number of decoder layers, l."""
        return self.slots // len(self.groups)

    @property
    def columns(self) -> int:
        """Number of columns of a row: slots and settings."""
        return self.slots + len(self.settings)

    @property
    def size(self) -> int:
        """Number of allocations, budget and limits aside."""
        settings = math.prod(len(setting.values) for setting in self.settings)
        return int(len(self.candidates) ** sum(self.searchable) * settings)

    @property
    def limit(self) -> int | None:
        """Most trainable parameters by budget and limit together."""
        limits = [n for n in (self.budget, self.max_parameters) if n is not None]
        return min(limits, default=None)

    @property
    def is_limited(self) -> bool:
        """True if not every combination of levels is allowed."""
        return self.limit is not None or self.max_rank_sum is not None

    def row(self, allocation: RankAllocation) -> list[int]:
        """Returns an allocation as a row of `Allocations`; absent settings take their default."""
        chosen = dict(allocation.settings)
        indices = [
            s.values.index(chosen[s.name]) if chosen.get(s.name) in s.values else s.default_index
            for s in self.settings
        ]
        return [*allocation.ranks, *indices]

    def allocation(self, row: Iterable[int]) -> RankAllocation:
        """Returns the allocation of a row of `Allocations`."""
        values = [int(value) for value in row]
        chosen = zip(self.settings, values[self.slots :], strict=True)
        return RankAllocation(
            tuple(values[: self.slots]), tuple((s.name, s.values[i]) for s, i in chosen)
        )

    def levels(self) -> list[tuple[int, ...]]:
        """Returns the values that each column of a row may take, ascending."""
        ranks = [self.candidates if s else (self.default_rank,) for s in self.searchable]
        return [*ranks, *(tuple(range(len(s.values))) for s in self.settings)]

    def uniform(self) -> RankAllocation:
        """Returns standard LoRA: the default rank in every slot, the default settings."""
        return self.with_defaults(RankAllocation((self.default_rank,) * self.slots))

    def with_defaults(self, allocation: RankAllocation) -> RankAllocation:
        """Returns an allocation with the searched settings that it leaves to their default."""
        chosen = dict(allocation.settings)
        settings = ((s.name, chosen.get(s.name, s.values[s.default_index])) for s in self.settings)
        return replace(allocation, settings=tuple(settings))

    def within_limits(self, allocation: RankAllocation) -> bool:
        """True if an allocation keeps the limits, whatever its ranks are."""
        parameters, ranks = self.parameters(allocation), sum(allocation.ranks)
        return (self.limit is None or parameters <= self.limit) and (
            self.max_rank_sum is None or ranks <= self.max_rank_sum
        )

    def check_limits(self, allocation: RankAllocation, what: str) -> None:
        """Checks the limits, but not the budget, on an allocation of the run file.

        Raises:
            RankSpaceError: If it exceeds one; `what` names it.
        """
        if not replace(self, budget=None).within_limits(allocation):
            raise RankSpaceError(
                f"{what} has {self.parameters(allocation)} trainable parameters and ranks that add "
                f"up to {sum(allocation.ranks)}; [rank_space] max_parameters is "
                f"{self.max_parameters or 'no limit'} and max_rank_sum "
                f"{self.max_rank_sum or 'no limit'}. Lower some ranks or raise the limit."
            )

    def limited_uniform(self) -> RankAllocation:
        """Returns standard LoRA, or, if it exceeds the limits, the most even allocation within."""
        uniform = self.uniform()
        if self.within_limits(uniform):
            return uniform
        return self.evenly(self.parameters(uniform) if self.limit is None else self.limit)

    def lowest(self) -> RankAllocation:
        """Returns the allocation with the fewest parameters."""
        return self.with_defaults(RankAllocation(self._least()))

    def parameters(self, allocation: RankAllocation) -> int:
        """Returns the number of trainable parameters of an allocation."""
        return sum(r * c for r, c in zip(allocation.ranks, self.costs, strict=True))

    def check(self, allocation: RankAllocation) -> RankAllocation:
        """Returns the allocation if it lies in the space.

        Raises:
            RankSpaceError: If its length, a rank, a setting, its parameters or the sum of its
                ranks are outside.
        """
        if len(allocation.ranks) != self.slots:
            raise RankSpaceError(
                f"The allocation {allocation} has {len(allocation.ranks)} ranks for {self.slots} "
                f"{'layers' if self.groups == WHOLE_LAYER else 'slots'}. Give one rank each."
            )
        for slot, rank in enumerate(allocation.ranks):
            allowed = self.candidates if self.searchable[slot] else (self.default_rank,)
            if rank not in allowed:
                layer, group = divmod(slot, len(self.groups))
                raise RankSpaceError(
                    f"Rank {rank} of layer {layer}{self.groups[group] and f' {self.groups[group]}'}"
                    f" is not among {list(allowed)}. Choose one of these or change [rank_space]."
                )
        values = {setting.name: setting.values for setting in self.settings}
        for name, value in allocation.settings:
            if value not in values.get(name, ()):
                raise RankSpaceError(
                    f"The setting {name} {value:g} is not among {list(values.get(name, ()))}. "
                    "Choose one of these or change [rank_space]."
                )
        parameters, limit = self.parameters(allocation), self.limit
        if limit is not None and parameters > limit:
            raise RankSpaceError(
                f"The allocation {allocation} has {parameters} trainable parameters; the budget "
                f"is {limit}. Lower some ranks."
            )
        if self.max_rank_sum is not None and sum(allocation.ranks) > self.max_rank_sum:
            raise RankSpaceError(
                f"The ranks of the allocation {allocation} add up to {sum(allocation.ranks)}; the "
                f"limit is {self.max_rank_sum}. Lower some ranks."
            )
        return allocation

    def contains(self, allocation: RankAllocation) -> bool:
        """True if an allocation lies in the space; uniform LoRA need not."""
        try:
            self.check(allocation)
        except RankSpaceError:
            return False
        return True

    def sample(self, count: int, rng: np.random.Generator) -> Allocations:
        """Draws random allocations.

        Without budget and limits every allocation is equally likely. With a limit, uniform draws
        above it are moved down at random, one candidate step at a time; with a budget, all are
        then moved up until they use it as far as it goes.

        Returns:
            Rows, shape (count, c).
        """
        index = rng.integers(0, len(self.candidates), size=(count, self.slots))
        drawn = [rng.integers(0, len(s.values), size=(count, 1)) for s in self.settings]
        return np.hstack([self._ranks(self._to_budget(index, rng)), *drawn])

    def every(self) -> Allocations:
        """Lists what `sample` can draw, shape (n, c). For small spaces: time grows with `size`."""
        choices = [range(len(self.candidates)) if s else (0,) for s in self.searchable]
        index = np.array(list(itertools.product(*choices)))
        moved = self._to_budget(index, np.random.default_rng(0))
        ranks = self._ranks(index[(moved == index).all(axis=1)])
        values = list(itertools.product(*(range(len(s.values)) for s in self.settings)))
        settings = np.array(values, dtype=np.int64).reshape(len(values), len(self.settings))
        return np.hstack(
            [np.repeat(ranks, len(settings), axis=0), np.tile(settings, (len(ranks), 1))]
        )

    def within_budget(self, allocation: RankAllocation, seed: int) -> RankAllocation:
        """Moves an allocation to budget and limits by as few random steps as it takes.

        For proposals of samplers that know nothing of budgets. Unchanged if nothing is to move.
        """
        index = np.searchsorted(self.candidates, np.array([allocation.ranks]))
        index = np.minimum(index, len(self.candidates) - 1)
        moved = self._to_budget(index, np.random.default_rng(seed))
        if (moved == index).all():
            return allocation
        return RankAllocation(tuple(self._ranks(moved)[0].tolist()), allocation.settings)

    def evenly(self, parameters: int, *, everywhere: bool = False) -> RankAllocation:
        """Returns the most even allocation that uses no more than a number of parameters.

        This is uniform LoRA at an equal parameter budget. Its ranks need not be candidates, but
        keep the limit on their sum.

        Args:
            parameters: Most trainable parameters.
            everywhere: Whether slots that are not searched are evened out too, in place of keeping
                the default rank.

        Raises:
            RankSpaceError: If no adapter at all fits.
        """
        searched = [slot for slot, s in enumerate(self.searchable) if s or everywhere]
        unit = sum(self.costs[slot] for slot in searched)
        fixed = self.default_rank * (sum(self.costs) - unit)
        base = max(0, (parameters - fixed) // unit)
        spare = float("inf")
        if self.max_rank_sum is not None:
            spare = self.max_rank_sum - self.default_rank * (self.slots - len(searched))
            base = min(base, int(max(0, spare)) // len(searched))
        ranks = [base if slot in searched else self.default_rank for slot in range(self.slots)]
        left, spare = parameters - fixed - base * unit, spare - base * len(searched)
        # Spread what is left over depth: every slot is visited once, in steps of the golden ratio.
        order = sorted(range(len(searched)), key=lambda i: (i * 0.6180339887) % 1.0)
        for i in order:
            slot = searched[i]
            if self.costs[slot] <= left and spare >= 1:
                ranks[slot] += 1
                left, spare = left - self.costs[slot], spare - 1
        if left < 0 or not any(ranks):
            raise RankSpaceError(
                f"{parameters} trainable parameters are too few for rank 1 in a single layer. "
                "Raise the budget."
            )
        return self.with_defaults(RankAllocation(tuple(ranks)))

    def _ranks(self, index: Allocations) -> Allocations:
        """Returns the ranks of candidate indices (n, slots)."""
        ranks = np.asarray(self.candidates, dtype=np.int64)[index]
        ranks[:, ~np.asarray(self.searchable)] = self.default_rank
        return ranks

    def _to_budget(self, index: Allocations, rng: np.random.Generator) -> Allocations:
        """Moves candidate indices (n, slots) to budget and limits, and gives all an adapter."""
        rank_sum, moved = self.max_rank_sum, index
        given = [(self.costs, self.limit), ((1,) * self.slots, rank_sum)]
        limits = [(price, most) for price, most in given if most is not None]
        if limits and len(self.candidates) > 1:
            prices = np.array([price for price, _ in limits])
            moved = _to_limits(
                index,
                self._ranks(index) @ prices.T,
                self.candidates,
                np.asarray(self.searchable),
                prices,
                np.array([most for _, most in limits]),
                fill=self.budget is not None,
                rng=rng,
            )
        if self.candidates[0] == 0 and all(self.searchable):
            bare = np.flatnonzero(~moved.any(axis=1))
            if len(bare):
                rank = self.candidates[1]
                affordable = [
                    slot
                    for slot in range(self.slots)
                    if (self.limit is None or rank * self.costs[slot] <= self.limit)
                    and (rank_sum is None or rank <= rank_sum)
                ]
                moved = moved.copy()
                moved[bare, rng.choice(affordable, len(bare))] = 1
        return moved


def _to_limits(
    index: Allocations,
    spent: Allocations,
    candidates: Sequence[int],
    movable: NDArray[np.bool_],
    prices: Allocations,
    most: Allocations,
    *,
    fill: bool,
    rng: np.random.Generator,
) -> Allocations:
    """Moves allocations by random steps of one candidate, all of them step by step together.

    Args:
        index: Candidate indices, shape (n, s).
        spent: What each allocation spends under each limit, shape (n, k).
        candidates: Ranks, ascending, at least two.
        movable: Which slots may be moved, shape (s,).
        prices: What one unit of rank of a slot spends under each limit, shape (k, s).
        most: The limits, shape (k,).
        fill: Whether to move up until no further step fits.
        rng: Draws the steps.

    Returns:
        Candidate indices within the limits, shape (n, s).
    """
    index, spent = index.copy(), spent.copy()
    steps = np.diff(candidates)

    def pick(allowed: NDArray[np.bool_]) -> Allocations:
        # One allowed slot per row, all equally likely.
        nth = (rng.random(len(allowed)) * allowed.sum(axis=1)).astype(np.int64)
        return np.asarray((allowed.cumsum(axis=1) > nth[:, None]).argmax(axis=1))

    rows = np.flatnonzero((spent > most).any(axis=1))
    while len(rows):
        slot = pick(movable & (index[rows] > 0))
        index[rows, slot] -= 1
        spent[rows] -= (prices[:, slot] * steps[index[rows, slot]]).T
        rows = rows[(spent[rows] > most).any(axis=1)]
    rows = np.arange(len(index) if fill else 0)
    while len(rows):
        at = index[rows]
        rise = steps[np.minimum(at, len(steps) - 1)]  # (n, s)
        fits = movable & (at < len(steps))
        for price, left in zip(prices, (most - spent[rows]).T, strict=True):
            fits &= price * rise <= left[:, None]
        able = fits.any(axis=1)
        rows = rows[able]
        slot = pick(fits[able])
        spent[rows] += (prices[:, slot] * steps[index[rows, slot]]).T
        index[rows, slot] += 1
    return index
