"""Ways to score random rank allocations, to be compared with `candidate_speed`."""

from __future__ import annotations

import itertools
import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from rankadaptor_plugin.core.ranks import RankSpace
    from rankadaptor_plugin.search.performance.mlp import MLPPerformanceModel

LAYERS = 26
OPERATIONS = 2 * sum(i * o for i, o in itertools.pairwise((LAYERS, 32, 32, 32, 1)))
"""Of one allocation in the paper's network."""

_MATRIX = 2048


class Rate:
    """Allocations per second of a way to score them, measured again and again."""

    def __init__(self, name: str, count: int, run: Callable[[], object]) -> None:
        self.name, self._count, self._run = name, count, run
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def measure(self) -> None:
        """Runs once."""
        cpu, wall = time.process_time(), time.perf_counter()
        self._run()
        self.cpu.append(self._count / (time.process_time() - cpu))
        self.wall.append(self._count / (time.perf_counter() - wall))


def limits() -> list[Rate]:
    """The matrix products of numpy and torch, in allocations of the network."""
    one = np.random.default_rng(0).random((_MATRIX, _MATRIX), dtype=np.float32)
    other, out = torch.tensor(one), torch.empty(_MATRIX, _MATRIX)
    into = np.empty_like(one)
    count = 2 * _MATRIX**3 // OPERATIONS
    return [
        Rate("limit: numpy matmul", count, lambda: np.matmul(one, one, out=into)),
        Rate("limit: torch mm", count, lambda: torch.mm(other, other, out=out)),
    ]


def alternatives(free: RankSpace, model: MLPPerformanceModel, count: int) -> list[Rate]:
    """Other ways to find the best of `count` random allocations, generation included."""
    rng = np.random.default_rng(0)
    layers = model.matrices()
    tensors = [(torch.tensor(w), torch.tensor(b)) for w, b in layers]
    candidates = np.array(free.candidates, dtype=np.float32)

    def ranks(size: int) -> NDArray[np.float32]:
        return candidates[rng.integers(0, len(candidates), (size, LAYERS), dtype=np.uint8)]

    def by_numpy(size: int) -> None:
        for _ in range(count // size):
            flow = ranks(size)
            for weight, bias in layers[:-1]:
                flow = np.maximum(flow @ weight + bias, 0)
            (flow @ layers[-1][0]).argmax()

    @torch.inference_mode()
    def by_torch(size: int, dtype: torch.dtype) -> None:
        typed = [(w.to(dtype), b.to(dtype)) for w, b in tensors]
        for _ in range(count // size):
            flow = torch.from_numpy(ranks(size)).to(dtype)
            for weight, bias in typed[:-1]:
                flow = torch.addmm(bias, flow, weight).relu()
            torch.mm(flow, typed[-1][0]).argmax()

    def one_by_one(number: int) -> None:
        max(float(model.predict(free.sample(1, rng)).mean[0]) for _ in range(number))

    def by_protocol(size: int) -> None:
        for _ in range(count // size):
            model.predict(free.sample(size, rng)).mean.argmax()

    found = [Rate("one at a time", 300, partial(one_by_one, 300))]
    for size in (4096, count):
        found += [
            Rate(f"numpy, batch {size}", count, partial(by_numpy, size)),
            Rate(f"torch, batch {size}", count, partial(by_torch, size, torch.float32)),
        ]
    half = partial(by_torch, 4096, torch.bfloat16)
    found.append(Rate("torch bfloat16, batch 4096", count, half))
    found.append(Rate("sample and predict, batch 4096", count, partial(by_protocol, 4096)))
    return found
