"""Rows of tokens that begin alike: which of them to compute behind one shared prefix.

The rows are the leaves of the tree of their prefixes. From the leaves up, each branching point
compares two costs: of its rows behind the prefix up to this point, and of the best choices below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

CARRY = 0.1
"""Cost of a cached token that a row carries along, in computed tokens: its keys are copied."""

PASS = 200
"""Cost of one more forward pass, in computed tokens: what it takes however short it is."""


class Limits(NamedTuple):
    """What one forward pass may hold; the number of rows is not limited if it is 0."""

    tokens: int
    rows: int

    def rows_of(self, length: int) -> int:
        """Returns how many rows of a length in tokens go into one pass, at least 1."""
        return max(1, min(self.tokens // length, self.rows or self.tokens))


class Group(NamedTuple):
    """Rows that are computed together.

    Attributes:
        prefix: Tokens that all rows share and that are computed once; for a single row, all.
        suffix: Tokens of the longest row behind them.
        rows: Numbers of the rows.
    """

    prefix: int
    suffix: int
    rows: list[int]


@dataclass
class _Branch:
    """A point of the tree: how deep it is, its rows, and the best groups so far and their cost."""

    depth: int
    rows: list[int]
    cost: float
    groups: list[Group]


def group(rows: Sequence[NDArray[np.int64]], limits: Limits) -> list[Group]:
    """Chooses the groups that cost least; a row that shares nothing is a group of its own.

    Args:
        rows: Token ids in lexicographic order, none of them the beginning of another.
        limits: Of one pass. A group that does not fit computes its prefix several times.
    """
    lengths = [len(row) for row in rows]
    branches: list[_Branch] = []
    for i, row in enumerate(rows):
        shared = _common(rows[i - 1], row) if i else 0
        _close(branches, shared, lengths, limits)
        cost = lengths[i] + PASS / limits.rows_of(lengths[i])
        branches.append(_Branch(lengths[i], [i], cost, [Group(lengths[i], 0, [i])]))
    _close(branches, -1, lengths, limits)
    return [item for branch in branches for item in branch.groups]


def pack(groups: Sequence[Group], limits: Limits) -> list[list[Group]]:
    """Fills passes with groups of about the same lengths, the longest prefixes first.

    Prefixes within a range of lengths are ordered by their suffixes. A wide range pads prefixes, a
    narrow one suffixes: of some widths the one is taken that costs least.

    Returns:
        Per pass its groups, whose rows, padded to the longest prefix and the longest suffix, keep
        within the limits; larger groups are split.
    """
    pieces = [piece for item in groups for piece in _split(item, limits)]
    packed = [list(_filled(pieces, limits, width)) for width in (1, 4, 16, 32, 64, 128)]
    return min(packed, key=lambda batches: sum(PASS + padded_tokens(batch) for batch in batches))


def padded_tokens(batch: Sequence[Group]) -> int:
    """Returns how many tokens the passes over prefixes and suffixes compute, with padding."""
    count = sum(len(item.rows) for item in batch)
    prefixes = len(batch) * max(item.prefix for item in batch)
    return prefixes + count * max(item.suffix for item in batch)


def _filled(pieces: list[Group], limits: Limits, width: int) -> Iterator[list[Group]]:
    batch: list[Group] = []
    count = prefix = suffix = 0
    for piece in sorted(pieces, key=lambda p: (-(p.prefix // width), -p.suffix, p.rows)):
        prefix, suffix = max(prefix, piece.prefix), max(suffix, piece.suffix)
        count += len(piece.rows)
        if batch and count > limits.rows_of(prefix + suffix):
            yield batch
            batch, (prefix, suffix, _), count = [], piece, len(piece.rows)
        batch.append(piece)
    if batch:
        yield batch


def _split(item: Group, limits: Limits) -> Iterator[Group]:
    parts = -(-len(item.rows) // limits.rows_of(item.prefix + item.suffix))
    for rows in np.array_split(item.rows, parts):
        yield item._replace(rows=rows.tolist())


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Returns how many tokens two rows share at their beginning; one of them differs then."""
    length = min(len(one), len(other))
    return int(np.argmin(np.append(one[:length] == other[:length], False)))


def _close(branches: list[_Branch], depth: int, lengths: list[int], limits: Limits) -> None:
    """Folds the branches deeper than `depth` into the point there, which is then the last."""
    while branches and branches[-1].depth > depth:
        closed = branches.pop()
        if len(closed.rows) > 1 and closed.depth:
            longest = max(lengths[i] for i in closed.rows)
            together = Group(closed.depth, longest - closed.depth, list(closed.rows))
            cost = _cost(together, limits)
            if cost < closed.cost:
                closed.cost, closed.groups = cost, [together]
        if branches and branches[-1].depth >= depth:
            above = branches[-1]
            above.rows += closed.rows
            above.cost += closed.cost
            above.groups += closed.groups
        else:
            closed.depth = depth
            branches.append(closed)
            return


def _cost(item: Group, limits: Limits) -> float:
    """Returns what a group costs in tokens, of its two passes those shares that it fills."""
    count, length = len(item.rows), item.prefix + item.suffix
    passes = count / limits.rows_of(length)
    prefixes = item.prefix * np.ceil(passes)
    return float(prefixes + count * (item.suffix + CARRY * item.prefix) + 2 * PASS * passes)
