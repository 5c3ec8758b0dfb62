"""What is maximised over a rank space: effects of columns, pairwise products, total parameters.

The value of a row is the sum over its columns of the effect of the level taken, plus the products
of the standardised codes of two columns, plus a parabola in the total of trainable parameters. What
any change of one column or of two gains is therefore known exactly.
`rankadaptor_plugin.search.performance.ascent` finds the highest row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rankadaptor_plugin.core.ranks import Allocations, RankSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_Entry = TypeVar("_Entry", bound=np.generic)

_LISTED = 4096  # Size of the largest space that is worth listing.


class Codes:
    """The levels of all columns as numbers, each array of shape (c, h), h the most levels of any.

    Args:
        space: The rank space.

    Attributes:
        valid: Which levels exist; other entries of the arrays mean nothing, or are 0.
        monotone: log(1 + rank), or the index of a setting's value, standardised over the levels
            of the column; 0 in a column of one level.
        curvature: What the rank, or the squared index, has beyond `monotone`, standardised too.
        total: What the level adds to the standardised total of trainable parameters.
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
        centred = np.where(self.valid, self.parameters - mean, 0.0)
        variance = float((centred**2 / count).sum())
        self.total = centred / (variance**0.5 if variance > 0 else 1.0)

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
        linear: Weight of the standardised total of trainable parameters.
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
        """Returns what every change of one column adds.

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
        """Returns what each column adds if it alone moves to a new level, all of shape (n, c)."""
        codes, total = take(self.codes.monotone, index), take(self.codes.total, index)
        code_step = take(self.codes.monotone, to) - codes
        total_step = take(self.codes.total, to) - total
        slope = self.linear + 2 * self.quadratic * total.sum(axis=1, keepdims=True)
        gain = take(self.tables, to) - take(self.tables, index)
        gain = gain + 2 * (codes @ self.pairs) * code_step
        return np.asarray(gain + slope * total_step + self.quadratic * total_step**2)


def take(table: NDArray[_Entry], index: Ints) -> NDArray[_Entry]:
    """Returns the entry of each column's level: from (c, h) at (n, c), shape (n, c)."""
    return table[np.arange(len(table)), index]


def _orthonormal(first: NDArray[np.number], second: NDArray[np.number]) -> tuple[Floats, Floats]:
    """Standardises one function of the levels, and what another has beyond it, or gives 0."""
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
