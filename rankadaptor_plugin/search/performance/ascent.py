"""Finds the highest row of a landscape, within the limits of its rank space.

Without limits each column in turn takes its best level, which is exact, until nothing changes.
Where limits bind, a column can often rise only if another falls: then each column in turn changes
along with another one, the best of all such pairs of changes. Several starts guard against local
optima; a small space is listed instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rankadaptor_plugin.search.performance.landscape import Limits, take

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from rankadaptor_plugin.search.performance.landscape import Floats, Ints, Landscape

_SWEEPS = 30  # Over all columns; a handful is enough in practice.
_ROUNDS = 4  # Of exchanging and filling up; the second seldom changes anything.
_DRAWN = 256  # Random rows to choose from once all that is near has been tried.
_LEAST = 1e-12  # Gains below this share of the values are rounding.


class Ascent:
    """Climbs one landscape.

    Args:
        landscape: What to maximize.
        rng: Order of the columns, and random starts.
        most_parameters: Most trainable parameters of a row; None for the limits of the space.

    Raises:
        RankSpaceError: If no allocation is as small as `most_parameters`.
    """

    def __init__(
        self, landscape: Landscape, rng: np.random.Generator, most_parameters: int | None = None
    ) -> None:
        self._landscape, self._codes, self._rng = landscape, landscape.codes, rng
        self._limits = Limits(self._codes, most_parameters)

    def highest(self, starts: Ints, *, random: int) -> Ints:
        """Climbs from several starts.

        Args:
            starts: Positions of levels, shape (n, c); those outside the limits are moved inside.
            random: Number of random starts besides.

        Returns:
            Positions of levels of the highest row found, shape (c,).
        """
        listed = self._listed()
        if listed is not None:
            return self._best_of(listed)
        drawn = self._codes.index(self._codes.space.sample(random, self._rng))
        index = np.concatenate([starts, drawn])
        if not len(self._limits):
            return self._best_of(self._climb_columns(self._limits.with_adapter(index)))
        index = self._limits.fit(index, self._landscape)
        for _ in range(_ROUNDS):
            climbed = self._climb_pairs(index)
            index = self._limits.fit(climbed, self._landscape)
            if (index == climbed).all():
                break
        return self._best_of(index)

    def next_highest(self, index: Ints, tried: Collection[tuple[int, ...]]) -> Ints:
        """Returns the highest row near another one that was not tried.

        Args:
            index: Positions of levels, shape (c,).
            tried: Rows to avoid.

        Returns:
            Positions of levels: `index` itself if it was not tried, else the best change of one
            column, other columns moved as the limits demand; else the best of a small space or
            of random rows; and `index` if all of these were tried.
        """
        nearer: list[Callable[[], Ints]] = [
            lambda: index[None],
            lambda: self._near(index),
            self._far,
        ]
        for near in nearer:
            rows = near()
            tuples = [tuple(row) for row in self._codes.rows(rows).tolist()]
            new = rows[[row not in tried for row in tuples]]
            if len(new):
                return self._best_of(new)
        return index

    def _best_of(self, index: Ints) -> Ints:
        return np.asarray(index[self._landscape.values(index).argmax()])

    def _near(self, index: Ints) -> Ints:
        """Lists the changes of one column, shape (n, c)."""
        column, level = np.nonzero(self._codes.valid)
        changed = index[column] != level
        column, level = column[changed], level[changed]
        rows = np.repeat(index[None], len(column), axis=0)
        rows[np.arange(len(column)), column] = level
        if not len(self._limits):
            return np.asarray(rows[~self._limits.is_bare(rows)])
        fixed = np.zeros(rows.shape, dtype=bool)
        fixed[np.arange(len(column)), column] = True
        # A second time for what only the changed column could use of a budget.
        return self._limits.fit(self._limits.fit(rows, self._landscape, fixed), self._landscape)

    def _far(self) -> Ints:
        """Lists a small space, or random rows of a large one, shape (n, c)."""
        listed = self._listed()
        if listed is not None:
            return listed
        index = self._codes.index(self._codes.space.sample(_DRAWN, self._rng))
        return self._limits.fit(index, self._landscape)

    def _listed(self) -> Ints | None:
        """Lists a small space within the limits, shape (n, c); None for a large one."""
        index = self._codes.listed
        if index is None or not (self._limits.spent(index) > self._limits.most[:, None]).any():
            return index
        return np.unique(self._limits.fit(index, self._landscape), axis=0)

    def _climb_columns(self, index: Ints) -> Ints:
        """Lets one column at a time take its best level, n rows side by side."""
        codes, landscape = self._codes, self._landscape
        index, n = index.copy(), np.arange(len(index))
        monotone, total = take(codes.monotone, index), take(codes.total, index).sum(axis=1)
        tables = np.where(codes.valid, landscape.tables, -np.inf) + landscape.linear * codes.total
        least = self._least(index)
        for _ in range(_SWEEPS):
            before = index.copy()
            for column in self._rng.permutation(codes.searched):
                at = index[:, column].copy()
                rest = total - codes.total[column, at]
                # Shape (n, h). Both entries of a pair count; the column's own weight is 0.
                slope = 2 * (monotone @ landscape.pairs[column])
                value = tables[column] + slope[:, None] * codes.monotone[column]
                value += landscape.quadratic * (rest[:, None] + codes.total[column]) ** 2
                index[:, column] = 0
                value[self._limits.is_bare(index), 0] = -np.inf
                best = value.argmax(axis=1)
                # A flat landscape is left as it is.
                best = np.where(value[n, best] > value[n, at] + least, best, at)
                index[:, column] = best
                total = rest + codes.total[column, best]
                monotone[:, column] = codes.monotone[column, best]
            if (index == before).all():
                break
        return index

    def _climb_pairs(self, index: Ints) -> Ints:
        """Lets one column at a time change along with another one, within the limits."""
        index, least = index.copy(), self._least(index)
        floor = self._limits.floor(index)
        active = np.arange(len(index))
        for _ in range(_SWEEPS):
            moving = np.zeros(len(index), dtype=bool)
            pairs = None
            for column in self._rng.permutation(self._codes.searched):
                if pairs is None:
                    pairs = _Pairs(self._landscape, self._limits, index[active], floor[:, active])
                gain, level, other, other_level = pairs.best(column)
                better = gain > least
                if better.any():
                    rows = active[better]
                    index[rows, other[better]] = other_level[better]
                    index[rows, column] = level[better]
                    moving[rows] = True
                    pairs = None
            active = np.flatnonzero(moving)
            if not len(active):
                break
        return index

    def _least(self, index: Ints) -> float:
        return _LEAST * max(1.0, float(np.abs(self._landscape.values(index)).max()))


class _Pairs:
    """All changes of two columns of n rows, with what they gain and spend.

    Args:
        landscape: What to maximize.
        limits: What rows may spend.
        index: Positions of levels, shape (n, c).
        floor: The least that each row must go on spending of each limit, shape (k, n).
    """

    def __init__(self, landscape: Landscape, limits: Limits, index: Ints, floor: Ints) -> None:
        self._landscape, self._index = landscape, index
        self._gain, self._code_step, self._total_step = landscape.gains(index)
        self._ranges = limits.ranges(index, floor)

    def best(self, column: int) -> tuple[Floats, Ints, Ints, Ints]:
        """Returns the best change of one column along with another one, or of either alone.

        Returns:
            The gain, the new level of the column, the other column, and its new level, each of
            shape (n,).
        """
        rows, landscape = np.arange(len(self._index)), self._landscape
        own = (slice(None), column, slice(None), None, None)  # (n, h, 1, 1), others (n, 1, c, h)
        others = self._gain.copy()
        # The column as its own partner stands for no partner.
        others[:, column] = -np.inf
        others[rows, column, self._index[:, column]] = 0.0
        value = self._gain[own] + others[:, None]
        weights = 2 * landscape.pairs[column][:, None]
        value += self._code_step[own] * (weights * self._code_step)[:, None]
        value += self._total_step[own] * (2 * landscape.quadratic * self._total_step)[:, None]
        for step, low, high in self._ranges:
            spent = step[own] + step[:, None]
            value[
                (spent < low[:, None, None, None]) | (spent > high[:, None, None, None])
            ] = -np.inf
        flat = value.reshape(len(rows), -1)
        best = flat.argmax(axis=1)
        level, other, other_level = np.unravel_index(best, value.shape[1:])
        # Where there is no partner, its level is set first and that of the column last.
        return flat[rows, best], level, other, other_level
