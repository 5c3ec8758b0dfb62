"""The row that a scoring function likes best, by steepest ascent in a rank space.

A step changes one column, or the best several of them at once, or, where a limit binds, raises one
rank and lowers another one.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from rankadaptor_plugin.core.errors import RankSpaceError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from numpy.typing import NDArray

    from rankadaptor_plugin.core.ranks import Allocations, RankSpace
    from rankadaptor_plugin.search.performance.performance_model import Values

    Score = Callable[[Allocations], Values]

_LISTED = 2000  # Spaces up to this size are listed in full.
_PARTNERS = 12  # Exchanges pair the best so many raises with the best so many cuts.
_KEPT = 16  # Rows that are remembered, and how many of them are filled up to a budget:
_FILLED = 6
_STEPS = 200  # Far more than an ascent takes; ends one that goes round in circles by rounding.


def highest(
    space: RankSpace,
    score: Score,
    rng: np.random.Generator,
    *,
    known: Allocations,
    tried: Collection[tuple[int, ...]] = (),
    most_parameters: int | None = None,
    drawn: int = 100,
    starts: int = 4,
) -> list[int]:
    """Returns the row with the highest score found that was not tried.

    Half of the ascents start from the best of `drawn` random rows, half from the best of `known`.
    Spaces of a few rows are listed instead.

    Args:
        space: The rank space; its budget is filled, its limits are kept to.
        score: Gives rows (n, c) a value each, shape (n,).
        rng: Draws the random rows.
        known: Rows to start from, shape (k, c), those outside the limits are left out.
        tried: Rows not to return.
        most_parameters: A further limit on trainable parameters; None for none.
        drawn: Number of random rows.
        starts: Number of ascents.

    Raises:
        RankSpaceError: If all rows found were tried.
    """
    if most_parameters is not None:
        limits = (most_parameters, space.max_parameters or most_parameters)
        space = dataclasses.replace(space, max_parameters=min(limits))
    ascent = _Ascent(space, score, tried)
    if space.size <= _LISTED:
        ascent.look_at(space.every())
    else:
        random = space.sample(drawn, rng)
        inside = known[ascent.within(known)]
        chosen = []
        for rows, count in ((random, starts - starts // 2), (inside, starts // 2)):
            order = np.argsort(-ascent.look_at(rows), kind="stable")
            chosen.append(rows[order[:count]])
        ascent.climb(np.vstack(chosen))
        ascent.fall_back_on(random)
    return ascent.result()


class _Ascent:
    """Remembers the best rows that were looked at and not tried."""

    def __init__(self, space: RankSpace, score: Score, tried: Collection[tuple[int, ...]]) -> None:
        self._space, self._score, self._tried = space, score, tried
        self._best: dict[tuple[int, ...], float] = {}
        self._spare: list[list[int]] = []
        levels = space.levels()
        moves = [(c, v) for c, values in enumerate(levels) if len(values) > 1 for v in values]
        self._columns, self._values = np.array(moves, dtype=np.int64).reshape(-1, 2).T  # (m,)
        settings = (0,) * len(space.settings)
        limits = [((*space.costs, *settings), space.limit)]
        limits.append(((1,) * space.slots + settings, space.max_rank_sum))
        given = [(price, most) for price, most in limits if most is not None]
        self._prices = np.array([p for p, _ in given], dtype=np.int64).reshape(-1, space.columns)
        self._most = np.array([most for _, most in given], dtype=np.int64)

    def within(self, rows: Allocations) -> NDArray[np.bool_]:
        """Tells which rows keep to the limits and have an adapter at all, shape (n,)."""
        kept = (rows @ self._prices.T <= self._most).all(axis=1)
        return np.asarray(kept & rows[:, : self._space.slots].any(axis=1))

    def look_at(self, rows: Allocations) -> Values:
        """Returns the scores of rows inside the limits, and remembers the best one."""
        scores = self._score(rows) if len(rows) else np.empty(0)
        self._remember(rows, scores)
        return scores

    def climb(self, rows: Allocations) -> None:
        """Steps up from every row until no step leads higher."""
        scores = self._score(rows) if len(rows) else np.empty(0)
        for _ in range(_STEPS):
            if not len(rows):
                return
            rows, found = self._steps(rows)
            higher = found > scores
            rows, scores = rows[higher], found[higher]

    def result(self) -> list[int]:
        """Returns the best row; where there is a budget, the best of those that use it.

        Raises:
            RankSpaceError: If all rows that were looked at were tried.
        """
        rows = [list(row) for row in sorted(self._best, key=lambda row: -self._best[row])]
        if self._space.budget is not None:
            filled = [self._filled(row) for row in rows[:_FILLED]]
            rows = [row for row in filled if tuple(row) not in self._tried] or self._spare
            scores = self._score(np.array(rows)) if rows else np.empty(0)
            rows = [rows[i] for i in np.argsort(-scores, kind="stable")]
        if not rows:
            raise RankSpaceError(
                f"All allocations of the rank space that were looked at were tried, "
                f"{len(self._tried)} in number. Stop here or add candidates."
            )
        return rows[0]

    def fall_back_on(self, rows: Allocations) -> None:
        """Sets the rows for when all that use the budget near the best ones were tried."""
        self._spare = [row for row in rows.tolist() if tuple(row) not in self._tried]

    def _filled(self, row: list[int]) -> list[int]:
        """Raises a row, each time by what scores best, until no further step fits."""
        candidates, slots = np.asarray(self._space.candidates), self._space.slots
        filled = np.array(row)
        while True:
            at = np.searchsorted(candidates, filled[:slots])
            open_ = np.flatnonzero(self._space.searchable & (at < len(candidates) - 1))
            raised = np.repeat(filled[None], len(open_), axis=0)
            raised[np.arange(len(open_)), open_] = candidates[at[open_] + 1]
            raised = raised[self.within(raised)]
            if not len(raised):
                return [int(value) for value in filled]
            filled = raised[self._score(raised).argmax()]

    def _remember(self, rows: Allocations, scores: Values) -> None:
        """Keeps the best few untried rows of all that were looked at."""
        least = min(self._best.values()) if len(self._best) == _KEPT else -np.inf
        for found in np.argsort(-scores, kind="stable"):
            if not scores[found] > least or len(self._best) > 2 * _KEPT:
                break
            row = tuple(rows[found].tolist())
            if row not in self._tried:
                self._best[row] = float(scores[found])
        kept = sorted(self._best, key=lambda row: -self._best[row])[:_KEPT]
        self._best = {row: self._best[row] for row in kept}

    def _steps(self, rows: Allocations) -> tuple[Allocations, Values]:
        """Returns the best neighbour of each of s rows and its score, -inf where there is none."""
        count, moves = len(rows), len(self._columns)
        near = np.repeat(rows[:, None], moves, axis=1)  # (s, m, c)
        near[:, np.arange(moves), self._columns] = self._values
        flat = near.reshape(-1, rows.shape[1])
        scores = self._score(flat)
        rise = self._values - rows[:, self._columns]  # (s, m)
        is_rank = self._columns < self._space.slots
        allowed = (rise != 0) & self.within(flat).reshape(rise.shape)
        if self._space.budget is not None:
            allowed &= (rise > 0) | ~is_rank  # what a budget allows is used
        origin, chosen = np.repeat(np.arange(count), moves), allowed.ravel()
        options, reached, origin = flat[chosen], scores[chosen], origin[chosen]
        single = scores.reshape(rise.shape)
        further = [self._together(rows, np.where(allowed, single, -np.inf))]
        if len(self._most):
            further.append(self._exchanges(rows, rise * is_rank, single))
        more = np.vstack([found for found, _ in further])
        more_origin = np.concatenate([number for _, number in further])
        inside = self.within(more)
        more, more_origin = more[inside], more_origin[inside]
        options, origin = np.vstack([options, more]), np.append(origin, more_origin)
        if len(more):
            reached = np.append(reached, self._score(more))
        self._remember(options, reached)
        order = np.lexsort((-reached, origin))
        with_options, first = np.unique(origin[order], return_index=True)
        best, values = rows.copy(), np.full(count, -np.inf)
        best[with_options], values[with_options] = options[order[first]], reached[order[first]]
        return best, values

    def _together(self, rows: Allocations, scores: Values) -> tuple[Allocations, NDArray[np.int64]]:
        """Changes 2, 4, 8 and so on columns at once, those that gain most alone.

        Args:
            rows: Shape (s, c).
            scores: What each single change would score, shape (s, m).

        Returns:
            Rows, (k, c), and from which of `rows` each one comes, (k,).
        """
        found, origin = [rows[:0]], []
        for number, row in enumerate(rows):
            order = np.argsort(-scores[number], kind="stable")
            _, first = np.unique(self._columns[order], return_index=True)
            best = order[np.sort(first)]  # the best change of each column, best column first
            count = 2
            while count <= len(best):
                changed = row.copy()
                changed[self._columns[best[:count]]] = self._values[best[:count]]
                found.append(changed[None])
                origin.append(number)
                count *= 2
        return np.vstack(found), np.array(origin, dtype=np.int64)

    def _exchanges(
        self, rows: Allocations, rise: NDArray[np.int64], scores: Values
    ) -> tuple[Allocations, NDArray[np.int64]]:
        """Raises one rank and lowers another one, in the most promising pairs of columns.

        Args:
            rows: Shape (s, c).
            rise: What each single change adds to a rank, shape (s, m); 0 for settings.
            scores: What each single change would score, limits aside, shape (s, m).

        Returns:
            Rows, (k, c), and from which of `rows` each one comes, (k,).
        """
        found, origin = [rows[:0]], [np.empty(0, dtype=np.int64)]
        for number, row in enumerate(rows):
            up, down = (
                moves[np.argsort(-scores[number, moves], kind="stable")[:_PARTNERS]]
                for moves in (np.flatnonzero(rise[number] > 0), np.flatnonzero(rise[number] < 0))
            )
            one, other = (array.ravel() for array in np.meshgrid(up, down))
            pairs = np.repeat(row[None], len(one), axis=0)
            for move in (one, other):
                pairs[np.arange(len(one)), self._columns[move]] = self._values[move]
            several = self._several(row, scores[number], rise[number])
            found += [pairs, several]
            origin.append(np.full(len(pairs) + len(several), number))
        return np.vstack(found), np.concatenate(origin)

    def _several(self, row: Allocations, scores: Values, rise: NDArray[np.int64]) -> Allocations:
        """Makes the best 2, 4, 8 and so on cuts at once, and then all raises that fit.

        Args:
            row: Shape (c,).
            scores: What each single change would score, shape (m,).
            rise: What each single change adds to a rank, shape (m,).

        Returns:
            Rows, shape (k, c).
        """
        order = np.argsort(-scores, kind="stable")
        cuts, raises = (
            kind[np.sort(np.unique(self._columns[kind], return_index=True)[1])]
            for kind in (order[rise[order] < 0], order[rise[order] > 0])
        )
        prices = self._prices[:, self._columns] * rise  # (limits, m)
        found, count = [row[None][:0]], 2
        while count <= len(cuts):
            changed, made = row.copy(), cuts[:count]
            changed[self._columns[made]] = self._values[made]
            left = self._most - self._prices @ changed
            cut = set(self._columns[made].tolist())
            for move in raises.tolist():
                if self._columns[move] not in cut and (prices[:, move] <= left).all():
                    changed[self._columns[move]] = self._values[move]
                    left = left - prices[:, move]
            found.append(changed[None])
            count *= 2
        return np.vstack(found)
