"""Forward passes that answer a list of multiple-choice requests: planned once, run many times.

Equal inputs are one row, and an input that begins another is read off the longer one. Rows with a
long beginning in common, such as the choices of one question, may be computed in two passes: over
the prefixes, and behind the cache of these. The rows are the leaves of the tree of their prefixes:
from the leaves up, each branching point compares the cost of its rows behind the prefix up to this
point with that of the best choices below.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from rankadaptor_plugin.core.errors import ConfigError, OracleError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Requests = Sequence[tuple[Sequence[int], Sequence[int]]]


CARRY = 0.1
"""Cost of a cached token that a row carries along, in computed tokens: its keys are copied."""

PASS = 200
"""Cost of one more forward pass, in computed tokens: what it takes however short it is."""


def rows_of(length: int, batch_tokens: int) -> int:
    """Returns the number of rows of a length in tokens that fit into one pass, at least 1."""
    return max(1, batch_tokens // length)


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


def group(rows: Sequence[NDArray[np.int64]], batch_tokens: int) -> list[Group]:
    """Chooses the groups that cost least; a row that shares nothing is a group of its own.

    Args:
        rows: Token ids in lexicographic order, none of them the beginning of another.
        batch_tokens: Most tokens of one pass. A group that does not fit computes its prefix
            several times.
    """
    lengths = [len(row) for row in rows]
    branches: list[_Branch] = []
    for i, row in enumerate(rows):
        shared = _common(rows[i - 1], row) if i else 0
        _close(branches, shared, lengths, batch_tokens)
        cost = lengths[i] + PASS / rows_of(lengths[i], batch_tokens)
        branches.append(_Branch(lengths[i], [i], cost, [Group(lengths[i], 0, [i])]))
    _close(branches, -1, lengths, batch_tokens)
    return [item for branch in branches for item in branch.groups]


def pack(groups: Sequence[Group], batch_tokens: int) -> list[list[Group]]:
    """Fills passes with groups of about the same lengths, the longest prefixes first.

    Prefixes within a range of lengths are ordered by their suffixes. A wide range pads prefixes, a
    narrow one suffixes: of some widths the one is taken that costs least.

    Returns:
        Per pass its groups, whose rows, padded to the longest prefix and the longest suffix, keep
        within `batch_tokens`; larger groups are split.
    """
    pieces = [piece for item in groups for piece in _split(item, batch_tokens)]
    packed = [list(_filled(pieces, batch_tokens, width)) for width in (1, 4, 16, 32, 64, 128)]
    return min(packed, key=lambda batches: sum(PASS + padded_tokens(batch) for batch in batches))


def padded_tokens(batch: Sequence[Group]) -> int:
    """Returns the tokens that the passes over prefixes and suffixes compute, with padding."""
    count = sum(len(item.rows) for item in batch)
    prefixes = len(batch) * max(item.prefix for item in batch)
    return prefixes + count * max(item.suffix for item in batch)


def _filled(pieces: list[Group], batch_tokens: int, width: int) -> Iterator[list[Group]]:
    batch: list[Group] = []
    count = prefix = suffix = 0
    for piece in sorted(pieces, key=lambda p: (-(p.prefix // width), -p.suffix, p.rows)):
        prefix, suffix = max(prefix, piece.prefix), max(suffix, piece.suffix)
        count += len(piece.rows)
        if batch and count > rows_of(prefix + suffix, batch_tokens):
            yield batch
            batch, (prefix, suffix, _), count = [], piece, len(piece.rows)
        batch.append(piece)
    if batch:
        yield batch


def _split(item: Group, batch_tokens: int) -> Iterator[Group]:
    parts = -(-len(item.rows) // rows_of(item.prefix + item.suffix, batch_tokens))
    for rows in np.array_split(item.rows, parts):
        yield item._replace(rows=rows.tolist())


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Returns the number of leading tokens that two different rows share."""
    length = min(len(one), len(other))
    return int(np.argmin(np.append(one[:length] == other[:length], False)))


def _close(branches: list[_Branch], depth: int, lengths: list[int], batch_tokens: int) -> None:
    """Folds the branches deeper than `depth` into the point there, which is then the last."""
    while branches and branches[-1].depth > depth:
        closed = branches.pop()
        if len(closed.rows) > 1 and closed.depth:
            longest = max(lengths[i] for i in closed.rows)
            together = Group(closed.depth, longest - closed.depth, list(closed.rows))
            cost = _cost(together, batch_tokens)
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


def _cost(item: Group, batch_tokens: int) -> float:
    """Returns the cost of a group in tokens: the parts of its two passes that it fills."""
    count, length = len(item.rows), item.prefix + item.suffix
    passes = count / rows_of(length, batch_tokens)
    prefixes = item.prefix * np.ceil(passes)
    return float(prefixes + count * (item.suffix + CARRY * item.prefix) + 2 * PASS * passes)


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward pass of b rows of t tokens, and the q log-probabilities that are read off it.

    The tensors are int32 and on the CPU, in pinned memory where there are GPUs.

    Attributes:
        tokens: Token ids, shape (b, t).
        mask: 1 for tokens and 0 for padding, those in the cache included, shape (b, cached + t);
            None where there is no cache and all padding is on the right.
        positions: Number of each token in its row, shape (b, t); None along with the mask.
        places: Where logits are needed, as row * t + column, ascending, shape (p,).
        reads: Place of each log-probability, as an index into `places`, shape (q,).
        targets: Token of each log-probability, shape (q,).
        owners: Distinct request that each log-probability belongs to, shape (q,); an array.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    places: torch.Tensor
    reads: torch.Tensor
    targets: torch.Tensor
    owners: Ints

    @property
    def size(self) -> int:
        """Tokens, padding counted."""
        return self.tokens.numel()


@dataclass(frozen=True, eq=False)
class Shared:
    """Rows in two passes.

    Attributes:
        prefix: Pass over the prefixes of g groups, padded on the left.
        parents: Group of each of the b rows, int32, shape (b,).
        suffix: Pass over the rest of the rows, behind the cache, padded on the right.
    """

    prefix: Forward
    parents: torch.Tensor
    suffix: Forward

    @property
    def size(self) -> int:
        """Tokens of both passes, padding counted."""
        return self.prefix.size + self.suffix.size


@dataclass(frozen=True, eq=False)
class Plan:
    """The forward passes for n requests, u of them distinct.

    Attributes:
        plain: All rows as a whole, the longest first.
        single: The rows as a whole that share no prefix.
        shared: The other rows.
        probes: Some of `shared`, and the same rows as a whole, that show whether a model may share:
            the longest, and those with the most padding on the left.
        inverse: Distinct request of each request, shape (n,).
        distinct: u.
    """

    plain: tuple[Forward, ...] = field(repr=False)
    single: tuple[Forward, ...] = field(repr=False)
    shared: tuple[Shared, ...] = field(repr=False)
    probes: tuple[tuple[Shared, Forward], ...] = field(repr=False)
    inverse: Ints = field(repr=False)
    distinct: int

    @property
    def tokens(self) -> int:
        """Tokens computed in one run, padding counted."""
        return sum(p.size for p in self.single) + sum(p.size for p in self.shared)

    @property
    def plain_tokens(self) -> int:
        """Tokens computed in one run of a model that cannot share prefixes, padding counted."""
        return sum(part.size for part in self.plain)


def plan(requests: Requests, *, max_length: int, batch_tokens: int) -> Plan:
    """Plans the forward passes of requests.

    Args:
        requests: Context ids and continuation ids, neither of them empty.
        max_length: Most tokens of an input; a longer one loses tokens on the left.
        batch_tokens: Most tokens of one pass, counting padding and cached tokens. A longer row
            has a pass of its own.

    Raises:
        ConfigError: If a limit is too small.
        OracleError: If a context or continuation is empty, or a continuation is too long.
    """
    for name, value in (("max_length", max_length), ("batch_tokens", batch_tokens)):
        if value < 1:
            raise ConfigError(f"{name} is {value}. Allowed: at least 1.")
    distinct: dict[tuple[bytes, int], int] = {}
    inverse = np.zeros(len(requests), np.int64)
    for i, (context, continuation) in enumerate(requests):
        _check(i, context, continuation, max_length)
        # Big-endian, so that the bytes sort as the tokens do.
        whole = np.array((*context, *continuation)[-max_length - 1 :], ">u4").tobytes()
        inverse[i] = distinct.setdefault((whole, len(continuation)), len(distinct))
    rows = _rows(list(distinct))
    groups = group([row.tokens for row in rows], batch_tokens)
    shared = pack([g for g in groups if len(g.rows) > 1], batch_tokens)
    passes = tuple(_behind_prefixes(rows, batch) for batch in shared)
    padding = [_padding(batch) for batch in shared]
    probes = {0, int(np.argmax(padding))} if shared else set()
    apart = [Group(len(row.tokens), 0, [i]) for i, row in enumerate(rows)]
    return Plan(
        plain=_whole(rows, apart, batch_tokens),
        single=_whole(rows, [g for g in groups if len(g.rows) == 1], batch_tokens),
        shared=passes,
        probes=tuple((passes[i], _forward(_members(rows, shared[i]))) for i in sorted(probes)),
        inverse=inverse,
        distinct=len(distinct),
    )


def _check(number: int, context: Sequence[int], continuation: Sequence[int], most: int) -> None:
    if not context or not continuation:
        raise OracleError(
            f"Request {number} has an empty {'continuation' if context else 'context'}. "
            "Leave its task out of [oracle] tasks."
        )
    if len(continuation) > most:
        raise OracleError(
            f"The continuation of request {number} has {len(continuation)} tokens; at most "
            f"{most} are allowed. Raise [oracle] max_length or leave its task out."
        )


@dataclass(frozen=True)
class _Row:
    """An input, shape (t,), and what is read off it: columns, targets and owners, shape (q,)."""

    tokens: Ints
    columns: Ints
    targets: Ints
    owners: Ints

    def part(self, start: int, stop: int) -> _Row:
        """Returns the row from `start` to `stop`, with what is read off this part."""
        kept = (self.columns >= start) & (self.columns < stop)
        return _Row(
            tokens=self.tokens[start:stop],
            columns=self.columns[kept] - start,
            targets=self.targets[kept],
            owners=self.owners[kept],
        )


def _joined(rows: Sequence[_Row]) -> _Row:
    """Returns the first row with the reads of all."""
    columns, targets, owners = (
        np.concatenate([getattr(row, name) for row in rows])
        for name in ("columns", "targets", "owners")
    )
    return _Row(rows[0].tokens, columns, targets, owners)


def _rows(distinct: list[tuple[bytes, int]]) -> list[_Row]:
    """Makes rows, in lexicographic order, of requests given as tokens and continuation length."""
    order = sorted(range(len(distinct)), key=lambda i: distinct[i][0][:-4], reverse=True)
    rows: list[list[_Row]] = []
    last = b""
    for i in order:
        whole, count = distinct[i]
        tokens = np.frombuffer(whole, ">u4").astype(np.int64)
        columns = np.arange(len(tokens) - 1 - count, len(tokens) - 1)
        row = _Row(tokens[:-1], columns, tokens[-count:], np.full(count, i))
        if last.startswith(whole[:-4]):  # whatever it begins comes right before it in this order
            rows[-1].append(row)
        else:
            rows.append([row])
            last = whole[:-4]
    return [_joined(row) for row in reversed(rows)]


def _whole(rows: Sequence[_Row], groups: Sequence[Group], batch_tokens: int) -> tuple[Forward, ...]:
    return tuple(_forward(_members(rows, batch)) for batch in pack(groups, batch_tokens))


def _members(rows: Sequence[_Row], groups: Sequence[Group]) -> list[_Row]:
    return [rows[i] for g in groups for i in g.rows]


def _padding(groups: Sequence[Group]) -> int:
    """Returns by how many tokens the shortest prefix is padded."""
    lengths = [g.prefix for g in groups]
    return max(lengths) - min(lengths)


def _behind_prefixes(rows: Sequence[_Row], groups: Sequence[Group]) -> Shared:
    members = _members(rows, groups)
    starts = np.array([g.prefix for g in groups])
    parents = np.repeat(np.arange(len(groups)), [len(g.rows) for g in groups])
    heads = [_joined([rows[i].part(0, g.prefix) for i in g.rows]) for g in groups]
    tails = [row.part(starts[g], len(row.tokens)) for row, g in zip(members, parents, strict=True)]
    padding = starts.max() - starts
    columns = np.arange(starts.max()) - padding[:, None]  # negative in the padding
    known = columns >= 0
    beyond = np.arange(max(len(row.tokens) for row in tails))
    mask = np.concatenate([known[parents], np.ones((len(tails), len(beyond)), bool)], axis=1)
    return Shared(
        prefix=_forward(heads, padding, known, columns.clip(0)),
        parents=_tensor(parents),
        suffix=_forward(tails, None, mask, starts[parents, None] + beyond),
    )


def _forward(
    rows: Sequence[_Row],
    padding: Ints | None = None,
    mask: NDArray[np.bool_] | None = None,
    positions: Ints | None = None,
) -> Forward:
    """Makes a pass; `padding` is how many tokens of padding are on the left, shape (b,)."""
    lefts = [0] * len(rows) if padding is None else padding.tolist()
    length = max(left + len(row.tokens) for row, left in zip(rows, lefts, strict=True))
    tokens, read = np.zeros((len(rows), length), np.int64), []
    for i, (row, left) in enumerate(zip(rows, lefts, strict=True)):
        right = length - left - len(row.tokens)
        # Repeats a token of the row: some models warn of their padding token without a mask.
        tokens[i] = np.pad(row.tokens, (left, right), mode="edge")
        read.append(replace(row, columns=row.columns + i * length + left))
    every = _joined(read)
    places, reads = np.unique(every.columns, return_inverse=True)
    return Forward(
        tokens=_tensor(tokens),
        mask=None if mask is None else _tensor(mask),
        positions=None if positions is None else _tensor(positions),
        places=_tensor(places),
        reads=_tensor(reads),
        targets=_tensor(every.targets),
        owners=every.owners,
    )


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    tensor = torch.from_numpy(array.astype(np.int32))
    # Only where a model is on a GPU already: pinning would take up memory of the first one.
    return tensor.pin_memory() if torch.cuda.is_initialized() else tensor  # type: ignore[no-untyped-call]
