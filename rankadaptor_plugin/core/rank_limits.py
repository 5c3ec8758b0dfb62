"""Moving allocations to a budget and below limits, many at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

Indices = NDArray[np.int64]


def to_limits(
    index: Indices,
    spent: Indices,
    candidates: Sequence[int],
    movable: NDArray[np.bool_],
    prices: Indices,
    most: Indices,
    *,
    fill: bool,
    rng: np.random.Generator,
) -> Indices:
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

    def pick(allowed: NDArray[np.bool_]) -> Indices:
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
