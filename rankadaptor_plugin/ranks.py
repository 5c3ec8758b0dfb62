"""The rank space S and its members, the rank allocations R_H (paper, sections 3.1 and 4.1).

An allocation gives every decoder layer one LoRA rank, index 0 = bottom. Searchable layers draw
their rank from the candidates, all others keep the default rank. A budget, where given, holds the
number of trainable parameters at or just below that of a uniform allocation, so that what is
compared is *where* the parameters go and not how many there are.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rankadaptor_plugin.errors import RankSpaceError

if TYPE_CHECKING:
    from collections.abc import Iterable

Allocations = NDArray[np.int64]  # (n, l): n allocations of l layers


@dataclass(frozen=True)
class RankAllocation:
    """One LoRA rank per decoder layer, index 0 = bottom (R_H in the paper)."""

    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1:
            raise RankSpaceError(
                f"The allocation {self} has a rank below 1. Give every layer a rank of at least 1."
            )

    def __str__(self) -> str:
        return "-".join(str(rank) for rank in self.ranks)


@dataclass(frozen=True, kw_only=True)
class RankSpace:
    """The solution space S: which ranks each layer may take.

    Attributes:
        candidates: Ranks to choose from, ascending.
        searchable: Whether the rank of a layer is searched, one flag per decoder layer.
        default_rank: Rank of the layers that are not searched, and of uniform LoRA.
        costs: Trainable parameters that one unit of rank adds, one number per layer.
        budget: Most trainable parameters of an allocation, or None for no limit.
    """

    candidates: tuple[int, ...]
    searchable: tuple[bool, ...]
    default_rank: int
    costs: tuple[int, ...]
    budget: int | None = None

    def __post_init__(self) -> None:
        if not self.candidates or min(self.candidates) < 1:
            raise RankSpaceError(
                f"The rank candidates {list(self.candidates)} are not all at least 1. "
                "Change [rank_space] candidates."
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
        lowest = self.parameters(self.lowest())
        if self.budget is not None and lowest > self.budget:
            raise RankSpaceError(
                f"The budget of {self.budget} trainable parameters is below {lowest}, the least "
                f"with rank {self.candidates[0]} in all searchable layers. Add a smaller rank to "
                '[rank_space] candidates, raise default_rank, or set budget = "free".'
            )

    @property
    def layers(self) -> int:
        """Number of decoder layers, l."""
        return len(self.searchable)

    @property
    def size(self) -> int:
        """Number of allocations, budget aside: candidates ** searchable layers."""
        return int(len(self.candidates) ** sum(self.searchable))

    def uniform(self) -> RankAllocation:
        """Returns standard LoRA: the default rank in every layer."""
        return RankAllocation((self.default_rank,) * self.layers)

    def lowest(self) -> RankAllocation:
        """Returns the allocation with the smallest candidate in every searchable layer."""
        return RankAllocation(
            tuple(self.candidates[0] if s else self.default_rank for s in self.searchable)
        )

    def parameters(self, allocation: RankAllocation) -> int:
        """Returns the number of trainable parameters of an allocation."""
        return sum(r * c for r, c in zip(allocation.ranks, self.costs, strict=True))

    def check(self, allocation: RankAllocation) -> RankAllocation:
        """Returns the allocation if it lies in the space.

        Raises:
            RankSpaceError: If its length, a rank or its parameters are outside.
        """
        if len(allocation.ranks) != self.layers:
            raise RankSpaceError(
                f"The allocation {allocation} has {len(allocation.ranks)} ranks for {self.layers} "
                "layers. Give one rank per decoder layer."
            )
        for layer, rank in enumerate(allocation.ranks):
            allowed = self.candidates if self.searchable[layer] else (self.default_rank,)
            if rank not in allowed:
                raise RankSpaceError(
                    f"Rank {rank} of layer {layer} is not among {list(allowed)}. "
                    "Choose one of these or change [rank_space]."
                )
        if self.budget is not None and self.parameters(allocation) > self.budget:
            raise RankSpaceError(
                f"The allocation {allocation} has {self.parameters(allocation)} trainable "
                f"parameters; the budget is {self.budget}. Lower some ranks."
            )
        return allocation

    def contains(self, allocation: RankAllocation) -> bool:
        """Tells whether an allocation lies in the space; uniform LoRA need not."""
        try:
            self.check(allocation)
        except RankSpaceError:
            return False
        return True

    def sample(self, count: int, rng: np.random.Generator) -> Allocations:
        """Draws random allocations.

        Without a budget every allocation is equally likely. With one, uniform draws are moved at
        random, one candidate step at a time, until they use the budget as far as it goes.

        Returns:
            Ranks, shape (count, l).
        """
        index = rng.integers(0, len(self.candidates), size=(count, self.layers))
        return self._ranks(self._to_budget(index, rng))

    def every(self) -> Allocations:
        """Lists what `sample` can draw, shape (n, l). For small spaces: time grows with `size`."""
        choices = [range(len(self.candidates)) if s else (0,) for s in self.searchable]
        index = np.array(list(itertools.product(*choices)))
        moved = self._to_budget(index, np.random.default_rng(0))
        return self._ranks(index[(moved == index).all(axis=1)])

    def within_budget(self, allocation: RankAllocation, seed: int) -> RankAllocation:
        """Moves an allocation to the budget, up or down, by as few random steps as it takes.

        For proposals of samplers that know nothing of budgets. Unchanged without a budget.
        """
        if self.budget is None:
            return allocation
        index = np.searchsorted(self.candidates, np.array([allocation.ranks]))
        index = np.minimum(index, len(self.candidates) - 1)
        rng = np.random.default_rng(seed)
        return allocation_of(self._ranks(self._to_budget(index, rng))[0])

    def evenly(self, parameters: int) -> RankAllocation:
        """Returns the most even allocation that uses no more than a number of parameters.

        This is uniform LoRA at an equal parameter budget. Its ranks need not be candidates;
        layers that are not searched keep the default rank.

        Raises:
            RankSpaceError: If not even rank 1 fits.
        """
        searched = [layer for layer, s in enumerate(self.searchable) if s]
        unit = sum(self.costs[layer] for layer in searched)
        fixed = self.default_rank * (sum(self.costs) - unit)
        base = (parameters - fixed) // unit
        if base < 1:
            raise RankSpaceError(
                f"{parameters} trainable parameters are too few for rank 1 in every layer. "
                "Raise the budget."
            )
        ranks = [base if s else self.default_rank for s in self.searchable]
        left = parameters - fixed - base * unit
        # Spread what is left over depth: every layer is visited once, in steps of the golden ratio.
        order = sorted(range(len(searched)), key=lambda i: (i * 0.6180339887) % 1.0)
        for i in order:
            layer = searched[i]
            if self.costs[layer] <= left:
                ranks[layer] += 1
                left -= self.costs[layer]
        return RankAllocation(tuple(ranks))

    def _ranks(self, index: Allocations) -> Allocations:
        ranks = np.asarray(self.candidates, dtype=np.int64)[index]
        ranks[:, ~np.asarray(self.searchable)] = self.default_rank
        return ranks

    def _to_budget(self, index: Allocations, rng: np.random.Generator) -> Allocations:
        """Moves candidate indices (n, l) to the budget; all rows take their steps together."""
        if self.budget is None:
            return index
        index = index.copy()
        costs = np.asarray(self.costs)
        steps = np.diff(np.asarray(self.candidates))
        movable = np.asarray(self.searchable)
        spent = (self._ranks(index) * costs).sum(axis=1)

        def pick(allowed: NDArray[np.bool_]) -> NDArray[np.int64]:
            # One allowed layer per row, all equally likely.
            nth = (rng.random(len(allowed)) * allowed.sum(axis=1)).astype(np.int64)
            return np.asarray((allowed.cumsum(axis=1) > nth[:, None]).argmax(axis=1))

        rows = np.flatnonzero(spent > self.budget)
        while len(rows):
            layer = pick(movable & (index[rows] > 0))
            index[rows, layer] -= 1
            spent[rows] -= costs[layer] * steps[index[rows, layer]]
            rows = rows[spent[rows] > self.budget]
        rows = np.arange(len(index))
        while len(steps) and len(rows):
            at = index[rows]
            price = costs * steps[np.minimum(at, len(steps) - 1)]
            left = self.budget - spent[rows]
            fits = movable & (at < len(steps)) & (price <= left[:, None])
            able = fits.any(axis=1)
            rows = rows[able]
            layer = pick(fits[able])
            spent[rows] += costs[layer] * steps[index[rows, layer]]
            index[rows, layer] += 1
        return index


def allocation_of(row: Iterable[int]) -> RankAllocation:
    """Returns the allocation of one row of an array of ranks."""
    return RankAllocation(tuple(int(rank) for rank in row))
