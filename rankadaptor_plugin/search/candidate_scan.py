"""The best of very many random allocations by a performance model's account (paper, section 3.3).

Candidates are drawn, scored and forgotten in batches that stay in the processor's cache, so that
memory does not grow with their number. For the paper's network in a space without limits, nothing
but matrix products and a few passes over small arrays is left to do.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.search.performance.mlp import MLPPerformanceModel, one_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from rankadaptor_plugin.core.ranks import Allocations, RankSpace
    from rankadaptor_plugin.search.performance.performance_model import PerformanceModel, Values

BATCH = 4096
"""Candidates that are drawn and scored at once."""

_CHUNK = 1 << 18  # Candidates from one seed; which thread draws them does not matter.
_BITS = 16  # Random bits per column of a candidate.


def best_of_random(
    space: RankSpace,
    model: PerformanceModel,
    count: int,
    rng: np.random.Generator,
    tried: Collection[tuple[int, ...]] = (),
    *,
    threads: int = 0,
    batch: int = BATCH,
) -> tuple[list[int], float]:
    """Returns the untried row with the highest predicted mean among random ones, and that mean.

    The result depends on the state of `rng`, of which one number is drawn, and not on the number
    of threads. In a space without budget and limits the network's candidates are drawn from 16
    random bits per column: k values of a column are equally likely to within k in 65536.

    Args:
        space: The rank space.
        model: A fitted model.
        count: Number of random rows, at least 1.
        rng: Seeds the draws.
        tried: Rows not to return.
        threads: Threads to use; 0 takes one per core. Models other than the network use one.
        batch: Candidates drawn and scored at once; other sizes may draw other rows.

    Raises:
        RankSpaceError: If all rows drawn were tried.
    """
    seed = int(rng.integers(2**63))
    draws: Callable[[], _Draws]
    if isinstance(model, MLPPerformanceModel) and space.limit is None and not space.max_rank_sum:
        draws = partial(_NetworkDraws, space, model, min(batch, count))
        workers = threads or os.cpu_count() or 1
    else:
        draws, workers = partial(_ModelDraws, space, model), 1
    chunks = range(-(-count // _CHUNK))
    workers = min(workers, len(chunks))
    known = frozenset(tried)

    def work(worker: int) -> _Best:
        own = draws()
        best = _NOTHING
        for chunk in chunks[worker::workers]:
            own.start(np.random.SeedSequence(seed, spawn_key=(chunk,)))
            size = min(_CHUNK, count - chunk * _CHUNK)
            best = max(best, _best_of_chunk(own, -chunk, size, batch, known, space.slots))
        return best

    with one_thread():
        if workers == 1:
            best = work(0)
        else:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as p:
                best = max(p.map(work, range(workers)))
    if not best.row:
        raise RankSpaceError(
            f"All {count} random allocations drawn were tried before; {len(known)} were tried. "
            "Stop here or add candidates."
        )
    return best.row, float(model.predict(np.array([best.row])).mean[0])


class _Best(NamedTuple):
    """The best row of a chunk. They compare by score; ties go to the first chunk."""

    score: float
    minus_chunk: int
    row: list[int]


_NOTHING = _Best(-np.inf, 0, [])


class _Draws(Protocol):
    """Draws candidates and scores them, in buffers of its own."""

    def start(self, seed: np.random.SeedSequence) -> None:
        """Starts the random sequence of a chunk."""
        ...

    def scores(self, count: int) -> Values | torch.Tensor:
        """Draws so many candidates and returns their scores, shape (count,)."""
        ...

    def row(self, index: int) -> list[int]:
        """Returns a candidate of the last draw."""
        ...


def _best_of_chunk(
    draws: _Draws,
    minus_chunk: int,
    size: int,
    batch: int,
    tried: frozenset[tuple[int, ...]],
    slots: int,
) -> _Best:
    best = _Best(-np.inf, minus_chunk, [])
    with torch.inference_mode():
        for start in range(0, size, batch):
            scores = draws.scores(min(batch, size - start))
            while (highest := float(scores.max())) > best.score:
                found = int(scores.argmax())
                row = draws.row(found)
                if tuple(row) not in tried and any(row[:slots]):  # one without adapter is none
                    best = _Best(highest, minus_chunk, row)
                scores[found] = -np.inf
    return best


class _ModelDraws:
    """Any model in any space."""

    def __init__(self, space: RankSpace, model: PerformanceModel) -> None:
        self._space, self._model = space, model
        self._rows: Allocations = np.empty((0, space.columns), dtype=np.int64)
        self.start(np.random.SeedSequence(0))

    def start(self, seed: np.random.SeedSequence) -> None:
        self._rng = np.random.default_rng(seed)

    def scores(self, count: int) -> Values:
        self._rows = self._space.sample(count, self._rng)
        return self._model.predict(self._rows).mean.copy()

    def row(self, index: int) -> list[int]:
        found: list[int] = self._rows[index].tolist()
        return found


class _NetworkDraws:
    """The paper's network in a space without limits.

    Candidates are drawn as indices of levels. Where the levels are evenly spaced, the way from
    index to rank is folded into the first layer, as are the columns that are not searched.
    """

    def __init__(self, space: RankSpace, model: MLPPerformanceModel, batch: int) -> None:
        levels = [np.asarray(values, dtype=np.float32) for values in space.levels()]
        self._levels = levels
        self._free = [column for column, values in enumerate(levels) if len(values) > 1]
        free = [levels[column] for column in self._free]
        self._counts = np.array([len(values) for values in free], dtype=np.float32)
        self._factors = self._counts / np.float32(1 << _BITS)
        first = np.array([values[0] for values in levels])
        (whole, start), *others = model.matrices()
        weight, bias = whole[self._free], np.asarray(start + first @ whole, dtype=np.float32)
        self._table = self._offsets = None
        if all(np.ptp(np.diff(values)) == 0 for values in free):
            steps = np.array([values[1] - values[0] for values in free], dtype=np.float32)
            weight = weight * steps[:, None]
        else:
            self._table = np.concatenate([values - values[0] for values in free])
            self._offsets = np.cumsum(self._counts) - self._counts
        layers = [(weight, bias), *others]
        self._hidden = [
            (torch.tensor(w), torch.tensor(b), torch.empty(batch, len(b))) for w, b in layers[:-1]
        ]
        self._last = torch.tensor(layers[-1][0][:, 0])
        self._index = np.empty((batch, len(free)), dtype=np.float32)
        self.start(np.random.SeedSequence(0))

    def start(self, seed: np.random.SeedSequence) -> None:
        self._bits = np.random.SFC64(seed)

    def scores(self, count: int) -> torch.Tensor:
        index = self._index[:count]
        words = -(-index.size * _BITS // 64)
        drawn = self._bits.random_raw(words).view(np.uint16)[: index.size].reshape(index.shape)
        # Both factors and their product are exact in float32.
        np.floor(np.multiply(drawn, self._factors, out=index), out=index)
        inputs = index
        if self._table is not None and self._offsets is not None:
            inputs = self._table[(index + self._offsets).astype(np.intp)]
        flow = torch.from_numpy(inputs)
        for weight, bias, out in self._hidden:
            flow = torch.addmm(bias, flow, weight, out=out[:count]).relu_()
        return torch.mv(flow, self._last)

    def row(self, index: int) -> list[int]:
        row = [int(values[0]) for values in self._levels]
        for column, level in zip(self._free, self._index[index].tolist(), strict=True):
            row[column] = int(self._levels[column][int(level)])
        return row
