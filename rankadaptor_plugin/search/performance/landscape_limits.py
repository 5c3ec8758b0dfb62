"""The limits of a rank space, as ascent on a landscape meets them.

A budget and a limit on parameters bound what the levels of a row spend together, and so does a
limit on the sum of ranks. Rows outside are moved inside by the steps that lose least for what they
save; with a budget, rows are then filled up by the steps that gain most for what they spend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.search.performance.landscape import take

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rankadaptor_plugin.search.performance.landscape import Codes, Ints, Landscape

_NEVER = np.iinfo(np.int64).max


class Limits:
    """What rows may spend, k limits in all.

    Args:
        codes: The levels of the space.
        most_parameters: Most trainable parameters of a row; None for the limits of the space.

    Attributes:
        spend: What each level spends of each limit, shape (k, c, h).
        most: The limits, shape (k,).

    Raises:
        RankSpaceError: If no allocation is as small as `most_parameters`.
    """

    def __init__(self, codes: Codes, most_parameters: int | None) -> None:
        space = codes.space
        lowest = space.lowest()
        if most_parameters is not None and space.parameters(lowest) > most_parameters:
            raise RankSpaceError(
                f"most_parameters is {most_parameters}; the smallest allocation has "
                f"{space.parameters(lowest)} trainable parameters. Allow at least as many."
            )
        self._codes = codes
        self._fills = space.budget is not None
        self._lowest = codes.index(np.array([space.row(lowest)]))[0, : space.slots]
        # All ranks 0 is no allocation; in most spaces that cannot happen.
        self._may_be_bare = space.candidates[0] == 0 and all(space.searchable)
        most = [n for n in (space.limit, most_parameters) if n is not None]
        limits = [(codes.parameters, min(most))] if most else []
        if space.max_rank_sum is not None:
            limits.append((codes.ranks, space.max_rank_sum))
        self.spend = np.array([spend for spend, _ in limits], dtype=np.int64).reshape(
            len(limits), *codes.ranks.shape
        )
        self.most = np.array([most for _, most in limits], dtype=np.int64)
        step = np.where(codes.valid[:, 1:], np.diff(self.spend, axis=2), 0)
        step = np.where(step > 0, step, _NEVER)
        self._least_step: Ints = step.min(axis=(1, 2), initial=_NEVER)

    def __len__(self) -> int:
        return len(self.most)

    def spent(self, index: Ints) -> Ints:
        """Returns what n rows spend, shape (k, n)."""
        spent = [take(spend, index).sum(axis=1) for spend in self.spend]
        return np.array(spent, dtype=np.int64).reshape(len(spent), len(index))

    def is_bare(self, index: Ints) -> NDArray[np.bool_]:
        """Tells which rows have no adapter at all, shape (n,)."""
        if not self._may_be_bare:
            return np.zeros(len(index), dtype=bool)
        return np.asarray(take(self._codes.ranks, index).sum(axis=1) == 0, dtype=bool)

    def floor(self, index: Ints) -> Ints:
        """Returns the least that each row must go on spending, shape (k, n).

        With a budget, a row that has used it up may only change to rows that do so too, or the
        ascent would save parameters that filling up then spends.
        """
        spent = self.spent(index)
        if not self._fills:
            return np.zeros_like(spent)
        full = (self.most - self._least_step)[:, None]  # what is spent above that leaves no step
        tight = spent > full
        return np.where(tight, full + 1, np.where(tight.any(axis=0), 0, spent))

    def ranges(self, index: Ints, floor: Ints) -> list[tuple[Ints, Ints, Ints]]:
        """Returns what changes of n rows may spend.

        Args:
            index: Positions of levels, shape (n, c).
            floor: The least that each row must go on spending, shape (k, n).

        Returns:
            For each limit what the change of each column to each level spends, shape (n, c, h), and
            the least and the most that all changes may spend together, each of shape (n,).
        """
        found = []
        given = list(zip(self.spend, floor, self.most, strict=True))
        if self._may_be_bare:
            one = np.ones(len(index), dtype=np.int64)
            given.append((self._codes.ranks, one, self._codes.ranks.sum()))
        for spend, least, most in given:
            now = take(spend, index)
            spent = now.sum(axis=1)
            found.append((spend - now[..., None], least - spent, most - spent))
        return found

    def with_adapter(self, index: Ints) -> Ints:
        """Gives rows without any adapter the smallest one, shape (n, c)."""
        index = index.copy()
        bare = np.flatnonzero(self.is_bare(index))
        index[bare[:, None], np.arange(len(self._lowest))] = self._lowest
        return index

    def fit(
        self, index: Ints, landscape: Landscape, fixed: NDArray[np.bool_] | None = None
    ) -> Ints:
        """Moves rows inside the limits and up to a budget.

        Args:
            index: Positions of levels, shape (n, c).
            landscape: What to lose little of, or to gain much of, for what a step spends.
            fixed: Entries not to move, shape (n, c); None for none.

        Returns:
            Positions of levels, shape (n, c); rows that cannot be moved inside become the
            smallest allocation, their settings kept.
        """
        index = self.with_adapter(index)
        free = np.ones(index.shape, dtype=bool) if fixed is None else ~fixed
        rows = np.arange(len(index))
        while True:
            over = self.spent(index[rows]) > self.most[:, None]
            rows, over = rows[over.any(axis=0)], over[:, over.any(axis=0)]
            if not len(rows):
                break
            stuck = self._step(index, rows, -1, landscape, free, over)
            index[rows[stuck, None], np.arange(len(self._lowest))] = self._lowest
        rows = np.arange(len(index) if self._fills else 0)
        while len(rows):
            limited = np.ones((len(self.most), len(rows)), dtype=bool)
            rows = rows[~self._step(index, rows, 1, landscape, free, limited)]
        return index

    def _step(
        self,
        index: Ints,
        rows: Ints,
        direction: int,
        landscape: Landscape,
        free: NDArray[np.bool_],
        limited: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """Moves one column of each of m rows by one level, in place.

        Args:
            index: Positions of levels, shape (n, c).
            rows: The rows to move, shape (m,).
            direction: 1 or -1.
            landscape: Decides on the column.
            free: Entries that may move, shape (n, c).
            limited: The limits that count for the price of a step, shape (k, m).

        Returns:
            The rows without any possible step, shape (m,).
        """
        at = index[rows]
        to = np.clip(at + direction, 0, self._codes.valid.sum(axis=1) - 1)
        steps = np.array([take(s, to) - take(s, at) for s in self.spend])  # (k, m, c)
        price = (limited[..., None] * steps / np.maximum(self.most, 1)[:, None, None]).sum(axis=0)
        allowed = free[rows] & (price * direction > 0)
        if direction > 0:
            allowed &= (steps <= (self.most[:, None] - self.spent(at))[..., None]).all(axis=0)
        elif self._may_be_bare:
            now, then = take(self._codes.ranks, at), take(self._codes.ranks, to)
            allowed &= now.sum(axis=1, keepdims=True) - now + then > 0
        gain = landscape.step_gains(at, to)
        worth = np.where(allowed, gain / np.where(allowed, np.abs(price), 1.0), -np.inf)
        able = allowed.any(axis=1)
        index[rows[able], worth.argmax(axis=1)[able]] += direction
        return np.asarray(~able)
