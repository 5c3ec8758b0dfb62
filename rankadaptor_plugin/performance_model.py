"""The performance model Q, which predicts the score of a rank allocation (paper, section 3.2).

It is trained twice: on all tasks before the target is looked at (offline meta-learning), and then
on the target itself (online incremental learning). Ranks and scores are standardised; on raw
numbers the network predicts worse than their mean.
"""

from __future__ import annotations

import itertools
import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rankadaptor_plugin.config import PerformanceModelConfig
    from rankadaptor_plugin.ranks import Allocations, RankSpace

Values = NDArray[np.float64]

_BATCH = 4096  # Allocations per forward pass; their activations stay in the processor's cache.


@dataclass(frozen=True)
class Prediction:
    """What a performance model expects of n allocations.

    Attributes:
        mean: Expected value, shape (n,), float64, in the units of the values of the last `fit`.
        stddev: Standard deviation of that expectation, shape (n,), or None if not estimated.
    """

    mean: Values
    stddev: Values | None = None


class PerformanceModel(Protocol):
    """Q of the paper. Higher values are better."""

    def pretrain(self, ranks: Allocations, task_values: Values) -> None:
        """Learns what tasks have in common: offline meta-learning.

        Args:
            ranks: Allocations, shape (n, l), int64.
            task_values: Their values per task, shape (n, T), float64, each task in its own units.
        """
        ...

    def fit(self, ranks: Allocations, values: Values) -> None:
        """Learns the target: online incremental learning.

        Starts from the pretrained state on every call and replays all data, so that the order of
        calls does not matter.

        Args:
            ranks: All allocations measured so far, shape (n, l), int64, n >= 1.
            values: Their values on the target, shape (n,), float64.
        """
        ...

    def predict(self, ranks: Allocations) -> Prediction:
        """Predicts the target's values of allocations of shape (n, l), int64."""
        ...


class MLPPerformanceModel:
    """The paper's network: fully connected layers l-32-32-32-1, ReLU between, a linear output.

    Trained by Adam on the squared error (Eq. 5 of arXiv 2406.15734), all data in one batch. The
    paper gives neither optimizer nor learning rate nor epochs.

    Args:
        space: The rank space; its candidates standardise the inputs.
        config: The ``[performance_model]`` table.
        seed: Seed of the initial weights; nothing else is random.
    """

    def __init__(self, space: RankSpace, config: PerformanceModelConfig, seed: int) -> None:
        self._config = config
        searchable = np.asarray(space.searchable)
        # A rank that is never searched is a constant; it enters the network as 0.
        self._center = np.where(searchable, np.mean(space.candidates), space.default_rank)
        self._scale = np.where(searchable, _scale(np.asarray(space.candidates)), 1.0)
        self._target = (0.0, 1.0)  # center and scale of the values of the last fit
        generator = torch.Generator().manual_seed(seed)
        widths = (space.layers, *config.hidden, 1)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [_linear(inputs, outputs, generator), nn.ReLU()]
        self._network = nn.Sequential(*layers[:-1])
        self._keep()

    def pretrain(self, ranks: Allocations, task_values: Values) -> None:
        """Trains on the standardised values of all tasks jointly; see `PerformanceModel`."""
        if not task_values.size:
            return
        centers = task_values.mean(axis=0)
        scales = np.apply_along_axis(_scale, 0, task_values)
        # Since the network is not told the task, the squared error over all T * n pairs differs
        # from that to the mean over tasks by a constant only: same gradient, a T-th of the work.
        mean = ((task_values - centers) / scales).mean(axis=1)
        self._train(ranks, mean, self._config.meta_epochs)
        self._keep()

    def fit(self, ranks: Allocations, values: Values) -> None:
        """Continues from the pretrained weights on all target data; see `PerformanceModel`."""
        self._network.load_state_dict(self._pretrained)
        center, scale = self._target = float(values.mean()), _scale(values)
        self._train(ranks, (values - center) / scale, self._config.epochs)

    def predict(self, ranks: Allocations) -> Prediction:
        """Predicts the target's values; in standard deviations as long as nothing was fitted."""
        center, scale = self._target
        with _one_thread(), torch.inference_mode():
            outputs = [self._network(batch) for batch in torch.split(self._inputs(ranks), _BATCH)]
        standardised = torch.cat(outputs).squeeze(1).numpy().astype(np.float64)
        return Prediction(mean=center + scale * standardised)

    def _inputs(self, ranks: Allocations) -> torch.Tensor:
        return torch.as_tensor((ranks - self._center) / self._scale, dtype=torch.float32)  # (n, l)

    def _train(self, ranks: Allocations, values: Values, epochs: int) -> None:
        inputs = self._inputs(ranks)
        targets = torch.as_tensor(values, dtype=torch.float32).unsqueeze(1)  # (n, 1)
        optimizer = torch.optim.Adam(
            self._network.parameters(), lr=self._config.learning_rate, fused=True
        )
        with _one_thread(), torch.enable_grad():
            for _ in range(epochs):
                optimizer.zero_grad()
                torch.autograd.backward(nn.functional.mse_loss(self._network(inputs), targets))
                optimizer.step()

    def _keep(self) -> None:
        self._pretrained = {k: v.clone() for k, v in self._network.state_dict().items()}


def mlp(space: RankSpace, config: PerformanceModelConfig, seed: int) -> PerformanceModel:
    """Builds the paper's performance model."""
    return MLPPerformanceModel(space, config, seed)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch to one thread: on so small a network, threads wait more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """PyTorch's default initial weights, but drawn from the given generator."""
    layer: nn.Linear = nn.Linear(inputs, outputs, device="meta", dtype=torch.float32)
    layer = layer.to_empty(device="cpu")
    bound = 1 / math.sqrt(inputs)
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer


def _scale(values: NDArray[np.number]) -> float:
    """The standard deviation, or 1 where it is 0 up to rounding."""
    stddev = float(np.std(values))
    return stddev if stddev > 1e-12 * float(np.abs(values).max()) else 1.0
