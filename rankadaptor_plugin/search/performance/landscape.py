"""Functions to maximize over a rank space: effects of columns, pairwise products, parameters.

The value of a row is the sum over its columns of the effect of the level taken, plus the products
of the standardized codes of two columns, plus a parabola in the total of trainable parameters. What
any change of one column or of two gains is therefore known exactly. A budget and a limit on
parameters bound what the levels of a row spend together, and so does a limit on the sum of ranks.

`Ascent` finds the highest row within the limits of the rank space. Without limits each column in
turn takes its best level, which is exact, until nothing changes.
Where limits bind, a column can often rise only if another falls: then each column in turn changes
along with another one, the best of all such pairs of changes. Several starts guard against local
optima; a small space is listed instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from rankadaptor_plugin.core.errors import RankSpaceError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from rankadaptor_plugin.core.ranks import Allocations, RankSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_Entry = TypeVar("_Entry", bound=np.generic)

_LISTED = 4096  # Size of the largest space that is worth listing.
_NEVER = np.iinfo(np.int64).max


class Codes:
    """The levels of all columns as numbers, each array of shape (c, h), h the most levels of any.

    Args:
        space: The rank space.

    Attributes:
        valid: Which levels exist; other entries of the arrays mean nothing, or are 0.
        monotone: log(1 + rank), or the index of a setting's value, standardized over the levels
            of the column; 0 in a column of one level.
        curvature: What the rank, or the squared index, has beyond `monotone`, standardized too.
        total: What the level adds to the standardized total of trainable parameters.
        ranks: The rank; 0 for settings.
        parameters: Trainable parameters of the level; 0 for settings.
        searched: Positions of the columns with more than one level.
    """

    def __init__(self, space: RankSpace) -> None:
        self.space = space
        columns = space.levels()
        shape = (len(columns), max(len(levels) for levels in columns))
        # A value above all others, so that a search in a padded row works as in a short one.
        self._values = np.full(shape, np.iinfo(np.int64).max)
        self.monotone, self.curvature = np.zeros(shape), np.zeros(shape)
        self.ranks = np.zeros(shape, dtype=np.int64)
        for column, levels in enumerate(columns):
            taken, values = slice(len(levels)), np.array(levels)
            self._values[column, taken] = values
            is_rank = column < space.slots
            first, second = (np.log1p(values), values) if is_rank else (values, values**2)
            self.monotone[column, taken], self.curvature[column, taken] = _orthonormal(
                first, second
            )
            if is_rank:
                self.ranks[column, taken] = values
        self.valid = self._values < np.iinfo(np.int64).max
        self.searched = np.flatnonzero(self.valid.sum(axis=1) > 1)
        costs = np.array([*space.costs, *(0 for _ in space.settings)])
        self.parameters = self.ranks * costs[:, None]
        count = self.valid.sum(axis=1, keepdims=True)
        mean = self.parameters.sum(axis=1, keepdims=True) / count
        centered = np.where(self.valid, self.parameters - mean, 0.0)
        variance = float((centered**2 / count).sum())
        self.total = centered / (variance**0.5 if variance > 0 else 1.0)

    @cached_property
    def listed(self) -> Ints | None:
        """Positions of levels of all rows, shape (n, c), if the space is small, else None."""
        return self.index(self.space.every()) if self.space.size <= _LISTED else None

    def index(self, rows: Allocations) -> Ints:
        """Returns the positions of levels of rows, both (n, c)."""
        return np.asarray((self._values < np.asarray(rows)[:, :, None]).sum(axis=2))

    def rows(self, index: Ints) -> Allocations:
        """Returns the rows of positions of levels, both (n, c)."""
        return take(self._values, index)


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """A function of rows.

    Attributes:
        codes: The levels of the space.
        tables: Effect of each level of each column, shape (c, h).
        pairs: Weights of the products of two columns' `Codes.monotone`, shape (c, c), symmetric
            with 0 on the diagonal; the weight of a pair is the sum of its two entries.
        linear: Weight of the standardized total of trainable parameters.
        quadratic: Weight of its square.
    """

    codes: Codes
    tables: Floats
    pairs: Floats
    linear: float = 0.0
    quadratic: float = 0.0

    def values(self, index: Ints) -> Floats:
        """Returns the values of n rows, shape (n,).

        Args:
            index: Positions of levels as of `Codes.index`, shape (n, c).
        """
        codes = take(self.codes.monotone, index)
        total = take(self.codes.total, index).sum(axis=1)
        value = take(self.tables, index).sum(axis=1) + ((codes @ self.pairs) * codes).sum(axis=1)
        return np.asarray(value + self.linear * total + self.quadratic * total**2)

    def gains(self, index: Ints) -> tuple[Floats, Floats, Floats]:
        """Returns the gain of every change of one column.

        Two columns that change together add ``2 * pairs * step * step`` of their steps in code
        and ``2 * quadratic * step * step`` of their steps in total to the sum of both gains.

        Args:
            index: Positions of levels, shape (n, c).

        Returns:
            The gain in value, -inf where there is no such level, the step in `Codes.monotone`, and
            the step in `Codes.total`, each of shape (n, c, h).
        """
        codes, total = take(self.codes.monotone, index), take(self.codes.total, index)
        code_step = self.codes.monotone - codes[..., None]
        total_step = self.codes.total - total[..., None]
        slope = self.linear + 2 * self.quadratic * total.sum(axis=1)[:, None, None]
        gain = self.tables - take(self.tables, index)[..., None]
        gain = gain + 2 * (codes @ self.pairs)[..., None] * code_step
        gain += slope * total_step + self.quadratic * total_step**2
        gain[:, ~self.codes.valid] = -np.inf
        return gain, code_step, total_step

    def without_pairs(self) -> Ints:
        """Returns the best level of each column by its own effect, shape (c,)."""
        own = self.tables + self.linear * self.codes.total
        return np.asarray(np.where(self.codes.valid, own, -np.inf).argmax(axis=1))

    def step_gains(self, index: Ints, to: Ints) -> Floats:
        """Returns the gain of moving each column alone to a new level, all of shape (n, c)."""
        codes, total = take(self.codes.monotone, index), take(self.codes.total, index)
        code_step = take(self.codes.monotone, to) - codes
        total_step = take(self.codes.total, to) - total
        slope = self.linear + 2 * self.quadratic * total.sum(axis=1, keepdims=True)
        gain = take(self.tables, to) - take(self.tables, index)
        gain = gain + 2 * (codes @ self.pairs) * code_step
        return np.asarray(gain + slope * total_step + self.quadratic * total_step**2)


class Limits:
    """Limits on what the levels of a row spend together, k in all.

    Rows outside are moved inside by the steps that lose least for what they save; with a budget,
    rows are then filled up by the steps that gain most for what they spend.

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
        """Returns the spending of n rows, shape (k, n)."""
        spent = [take(spend, index).sum(axis=1) for spend in self.spend]
        return np.array(spent, dtype=np.int64).reshape(len(spent), len(index))

    def is_bare(self, index: Ints) -> NDArray[np.bool_]:
        """Returns a mask of the rows without any adapter, shape (n,)."""
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
        """Returns the spending limits of changes to n rows.

        Args:
            index: Positions of levels, shape (n, c).
            floor: The least that each row must go on spending, shape (k, n).

        Returns:
            For each limit what the change of each column to each level spends, shape (n, c, h), and
            the least and the most that all changes may spend together, each of shape (n,).
        """
        ranges = []
        limits = list(zip(self.spend, floor, self.most, strict=True))
        if self._may_be_bare:
            one = np.ones(len(index), dtype=np.int64)
            limits.append((self._codes.ranks, one, self._codes.ranks.sum()))
        for spend, least, most in limits:
            now = take(spend, index)
            spent = now.sum(axis=1)
            ranges.append((spend - now[..., None], least - spent, most - spent))
        return ranges

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


def take(table: NDArray[_Entry], index: Ints) -> NDArray[_Entry]:
    """Returns the entry of each column's level: from (c, h) at (n, c), shape (n, c)."""
    return table[np.arange(len(table)), index]


def _orthonormal(first: NDArray[np.number], second: NDArray[np.number]) -> tuple[Floats, Floats]:
    """Standardizes one function of the levels, and what another has beyond it, or gives 0."""
    codes: list[Floats] = []
    for function in (first, second):
        code = function - function.mean()
        for earlier in codes:
            code = code - (code * earlier).mean() * earlier
        scale = code.std()
        # Relative to the function itself, since what is left of a dependent one is rounding.
        known = scale > 1e-9 * max(float(np.abs(function).max()), 1.0)
        codes.append(code / scale if known else np.zeros(len(code)))
    return codes[0], codes[1]


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
