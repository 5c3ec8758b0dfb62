"""The paper's performance model: a small fully connected network (paper, section 3.2).

It is trained twice: on all tasks before the target is looked at (offline meta-learning), and then
on the target itself (online incremental learning). Ranks and scores are standardized unless the
literal reading is asked for; on raw numbers the network predicts worse than their mean.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from rankadaptor_plugin.search.performance.performance_model import Prediction, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from rankadaptor_plugin.config.tables import PerformanceModelConfig
    from rankadaptor_plugin.core.ranks import Allocations, RankSpace
    from rankadaptor_plugin.search.performance.performance_model import PerformanceModel, Values

    State = dict[str, torch.Tensor]

_BATCH = 4096  # Rows per forward pass; their activations stay in the processor's cache.
_INNER_STEPS = 8  # Reptile: gradient steps on one task before the weights move toward it.
_MATCHED = 1e-4  # Squared error, in variances of the target, below which a point is learned.


class MLPPerformanceModel:
    """The paper's network: fully connected layers c-32-32-32-1, ReLU between, a linear output.

    Trained by Adam on the squared error (Eq. 5 of arXiv 2406.15734), all data in one batch. The
    paper gives neither optimizer nor learning rate nor epochs. What it leaves open else is set by
    the ``[performance_model]`` table:

    * ``meta``: ``joint`` standardizes the scores per task and learns all tasks together; ``raw``,
      the literal reading, takes ranks and scores as they are, in the fit as well; ``reptile``
      moves the weights toward those of one standardized task after another (Nichol et al.,
      arXiv 1803.02999); ``none`` starts from random weights.
    * ``replay``: every fit learns all target data. Without it, the points are learned one after
      the other in the order of the rows, each until it is matched or for `epochs` steps, so that
      what is predicted depends on the data alone and not on how many models saw them.

    A single network does not know what it does not know: it predicts a standard deviation of 0,
    and as noise the standard deviation of its residuals, which is too low where it overfits.

    Args:
        space: The rank space; the levels of its columns standardize the inputs.
        config: The ``[performance_model]`` table.
        seed: Seed of the initial weights; nothing else is random.
    """

    def __init__(self, space: RankSpace, config: PerformanceModelConfig, seed: int) -> None:
        self._config = config
        self._raw = config.meta == "raw"
        levels = [np.asarray(values, dtype=np.float64) for values in space.levels()]
        # A column that is never searched is a constant: with scale 1 it enters the network as 0.
        self._center, self._scale = np.array([v.mean() for v in levels]), _spreads(levels)
        if self._raw:
            self._center, self._scale = np.zeros(space.columns), np.ones(space.columns)
        self._target = (0.0, 1.0)  # center and scale of the values of the last fit
        self._noise = 0.0
        generator = torch.Generator().manual_seed(seed)
        widths = (space.columns, *config.hidden, 1)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [_linear(inputs, outputs, generator), nn.ReLU()]
        self._network = nn.Sequential(*layers[:-1])
        self._pretrained = self._state()

    def pretrain(self, ranks: Allocations, task_values: Values) -> None:
        """Learns all tasks, in the way that ``meta`` names; see `MetaLearner`."""
        if not task_values.size or self._config.meta == "none":
            return
        values = task_values
        if not self._raw:
            values = (values - values.mean(axis=0)) / _spreads(values.T)
        inputs = self._inputs(ranks)
        with one_thread():
            if self._config.meta == "reptile":
                self._reptile(inputs, values)
            else:
                # Since the network is not told the task, the squared error over all T * n pairs
                # differs from that to the mean over tasks by a constant only: same gradient, a
                # T-th of the work.
                self._train(inputs, values.mean(axis=1), self._config.meta_epochs)
        self._pretrained = self._state()

    def fit(self, ranks: Allocations, values: Values) -> None:
        """Continues from the pretrained weights; see `PerformanceModel` and the class."""
        self._network.load_state_dict(self._pretrained)
        center, scale = (0.0, 1.0) if self._raw else (float(values.mean()), spread(values))
        inputs, targets = self._inputs(ranks), (values - center) / scale
        self._target = center, scale
        with one_thread():
            if self._config.replay:
                self._train(inputs, targets, self._config.epochs)
            else:
                variance = float(spread(targets)) ** 2
                for row in range(len(ranks)):
                    newest = slice(row, row + 1)
                    self._train(
                        inputs[newest],
                        targets[newest],
                        self._config.epochs,
                        enough=_MATCHED * variance,
                    )
        self._noise = float(np.std(values - self._mean(ranks)))

    def predict(self, ranks: Allocations) -> Prediction:
        """Predicts the target's values; in standard deviations as long as nothing was fitted."""
        return Prediction(mean=self._mean(ranks), stddev=np.zeros(len(ranks)), noise=self._noise)

    def fast_scores(
        self, start: Values, step: Values
    ) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        """Returns what gives the rows ``start + step * index`` scores in the order of their means.

        It takes indices of shape (c, n). Start, step and the standardization of the inputs are
        folded into the first layer, so that nothing but the network's matrix products is left.
        """
        linear = [layer for layer in self._network if isinstance(layer, nn.Linear)]
        layers = [(m.weight.detach().double(), m.bias.detach().double()) for m in linear]
        first, bias = layers[0]
        shift = torch.as_tensor((start - self._center) / self._scale)
        layers[0] = (first * torch.as_tensor(step / self._scale), bias + first @ shift)
        *hidden, (last, _) = [(weight.float(), bias.float()[:, None]) for weight, bias in layers]
        flows = [torch.empty(0)] * len(hidden)  # kept, since to allocate takes as long as to add

        def scores(index: NDArray[np.float32]) -> NDArray[np.float32]:
            flow = torch.from_numpy(index)  # (c, n)
            for layer, (weight, bias) in enumerate(hidden):
                if flows[layer].shape[-1] != flow.shape[1]:
                    flows[layer] = torch.empty(len(bias), flow.shape[1])
                flow = torch.addmm(bias, weight, flow, out=flows[layer]).relu_()
            return torch.mv(flow.T, last[0]).numpy()

        return scores

    def _inputs(self, ranks: Allocations) -> torch.Tensor:
        return torch.as_tensor((ranks - self._center) / self._scale, dtype=torch.float32)  # (n, c)

    def _mean(self, ranks: Allocations) -> Values:
        center, scale = self._target
        with one_thread(), torch.inference_mode():
            outputs = [self._network(batch) for batch in torch.split(self._inputs(ranks), _BATCH)]
        return center + scale * torch.cat(outputs).squeeze(1).numpy().astype(np.float64)

    def _train(
        self, inputs: torch.Tensor, values: Values, epochs: int, *, enough: float = 0.0
    ) -> None:
        """Trains until the mean squared error is below `enough`, or for so many epochs."""
        targets = torch.as_tensor(values, dtype=torch.float32).unsqueeze(1)  # (n, 1)
        optimizer = torch.optim.Adam(
            self._network.parameters(), lr=self._config.learning_rate, fused=True
        )
        with torch.enable_grad():
            for _ in range(epochs):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(self._network(inputs), targets)
                if enough and float(loss.detach()) < enough:
                    break
                torch.autograd.backward(loss)
                optimizer.step()

    def _reptile(self, inputs: torch.Tensor, values: Values) -> None:
        """Takes as many gradient steps as joint learning does, task after task."""
        rounds = math.ceil(self._config.meta_epochs / _INNER_STEPS)
        for number in range(rounds):
            before = self._state()
            self._train(inputs, values[:, number % values.shape[1]], _INNER_STEPS)
            step = 1 - number / rounds  # falls to 0, so that the last tasks do not weigh most
            after = self._network.state_dict()
            self._network.load_state_dict(
                {name: torch.lerp(old, after[name], step) for name, old in before.items()}
            )

    def _state(self) -> State:
        return {name: tensor.clone() for name, tensor in self._network.state_dict().items()}


def mlp(space: RankSpace, config: PerformanceModelConfig, seed: int) -> PerformanceModel:
    """Builds the paper's performance model with the widths of the run file."""
    return MLPPerformanceModel(space, config, seed)


def mlp_1(space: RankSpace, config: PerformanceModelConfig, seed: int) -> PerformanceModel:
    """Builds setting 1 of the paper's ablation: 32-32-32."""
    return mlp(space, dataclasses.replace(config, hidden=(32, 32, 32)), seed)


def mlp_2(space: RankSpace, config: PerformanceModelConfig, seed: int) -> PerformanceModel:
    """Builds setting 2 of the paper's ablation: 32-64-32."""
    return mlp(space, dataclasses.replace(config, hidden=(32, 64, 32)), seed)


def mlp_3(space: RankSpace, config: PerformanceModelConfig, seed: int) -> PerformanceModel:
    """Builds setting 3 of the paper's ablation: 32-16-32."""
    return mlp(space, dataclasses.replace(config, hidden=(32, 16, 32)), seed)


def _spreads(arrays: Iterable[Values]) -> Values:
    return np.array([spread(values) for values in arrays])


@contextmanager
def one_thread() -> Iterator[None]:
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
