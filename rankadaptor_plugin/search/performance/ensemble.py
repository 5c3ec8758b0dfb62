"""An ensemble of the paper's network, which knows what it does not know.

The members start from different weights and leave different points out. Where they disagree, the
value is unknown; how much disagreement means how much error is learned from the points left out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from rankadaptor_plugin.search.performance.local_search import highest
from rankadaptor_plugin.search.performance.mlp import input_scales, one_thread, spread, standardised
from rankadaptor_plugin.search.performance.network_batch import NetworkBatch
from rankadaptor_plugin.search.performance.performance_model import Prediction
from rankadaptor_plugin.search.performance.prior_weights import prior_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from numpy.typing import NDArray

    from rankadaptor_plugin.config.tables import PerformanceModelConfig
    from rankadaptor_plugin.core.ranks import Allocations, RankSpace
    from rankadaptor_plugin.search.performance.performance_model import PriorEffects, Values

_BATCH = 4096  # Rows per forward pass; their activations stay in the processor's cache.
_DECAY = 0.1  # Weight decay, as in AdamW.
_OPTIMISM = 1.0  # Standard deviations that a proposal may count on.
_PROBE = 64  # Random rows on which disagreement is measured.
_LEAST = 3  # Points below which none is left out.
_MOST_NOISE = 0.9  # Share of the error that may be noise.
_MOST_STRETCH = 5.0


class MLPEnsemble:
    """Small networks trained side by side (Lakshminarayanan et al., arXiv 1612.01474).

    Predicts the mean of the members, and as standard deviation theirs times a factor. Factor and
    noise follow from the errors on the points that each member left out. What priors
    expect is subtracted from the values before the networks learn them, and added to what they
    predict, each prior with a weight by the evidence for it.

    `propose` maximises mean plus standard deviation, `best` the mean, both by local search.

    Args:
        space: The rank space.
        config: The ``[performance_model]`` table: `hidden`, `learning_rate`, and a third of
            `epochs` and of `meta_epochs` at most, since more of them fit noise and take time.
        seed: Seed of the initial weights.
        priors: What is expected of the ranks beforehand.
        members: Number of networks, at least 2.
    """

    def __init__(
        self,
        space: RankSpace,
        config: PerformanceModelConfig,
        seed: int,
        priors: Sequence[PriorEffects] = (),
        members: int = 5,
    ) -> None:
        self._space, self._config, self._priors = space, config, tuple(priors)
        self._members = members
        self._center, self._scale = input_scales(space)
        self._networks = NetworkBatch(members, space.columns, config.hidden, seed)
        self._pretrained = self._networks.state()
        self._weights = prior_weights(
            np.empty((0, space.columns)), np.empty(0), np.empty((0, len(self._priors)))
        )
        self._target = (0.0, 1.0)  # center and scale of the values of the last fit
        self._stretch, self._noise, self._usual = 1.0, 0.0, 0.0  # in units of that scale
        self._probe = space.sample(_PROBE, np.random.default_rng(seed))
        self._known: Allocations = np.empty((0, space.columns), dtype=np.int64)

    @property
    def weights(self) -> dict[str, float]:
        """What each prior counts after the last fit, from 0 to 1."""
        names = [prior.name for prior in self._priors]
        return dict(zip(names, self._weights.tolist(), strict=True))

    def pretrain(self, ranks: Allocations, task_values: Values) -> None:
        """Learns the mean over tasks of their standardised values; see `MetaLearner`."""
        if not task_values.size or self._config.meta == "none":
            return
        none = np.zeros((self._members, len(ranks)), dtype=np.bool_)
        self._train(ranks, standardised(task_values).mean(axis=1), none, self._config.meta_epochs)
        self._pretrained = self._networks.state()

    def fit(self, ranks: Allocations, values: Values) -> None:
        """Continues from the pretrained weights on all target data; see `PerformanceModel`."""
        self._networks.load(self._pretrained)
        self._known = ranks
        center, scale = self._target = float(values.mean()), spread(values)
        targets = (values - center) / scale
        expected = self._expected(ranks)  # (n, priors)
        self._weights = prior_weights(self._inputs(ranks).numpy(), targets, expected)
        left = targets - expected @ self._weights
        # Every point is left out by one member; too few points are not left out at all.
        out = np.arange(len(ranks)) % self._members == np.arange(self._members)[:, None]
        if len(ranks) < _LEAST:
            out[:] = False
        self._train(ranks, left, out, self._config.epochs)
        outputs = self._outputs(ranks)
        learned = np.average(outputs, axis=0, weights=~out)
        self._usual = float(self._outputs(self._probe).var(axis=0).mean())
        outside = (left - outputs)[out]
        self._stretch, self._noise = _calibration(left - learned, outside, self._usual)

    def predict(self, ranks: Allocations) -> Prediction:
        """Predicts the target's values; in standard deviations as long as nothing was fitted."""
        center, scale = self._target
        mean, stddev = self._standardised(ranks)
        return Prediction(center + scale * mean, scale * stddev, scale * self._noise)

    def propose(
        self,
        rng: np.random.Generator,
        *,
        tried: Collection[tuple[int, ...]] = (),
        most_parameters: int | None = None,
    ) -> Sequence[int]:
        """Returns the row with the highest upper confidence bound; see `ProposingModel`.

        Raises:
            RankSpaceError: If all rows were tried.
        """

        def bound(rows: Allocations) -> Values:
            mean, stddev = self._standardised(rows)
            return mean + _OPTIMISM * stddev

        return self._highest(bound, rng, tried=tried, most_parameters=most_parameters)

    def best(
        self, rng: np.random.Generator, *, most_parameters: int | None = None
    ) -> Sequence[int]:
        """Returns the row with the highest mean that a thorough search finds."""
        return self._highest(
            lambda rows: self._standardised(rows)[0],
            rng,
            most_parameters=most_parameters,
            drawn=1000,
            starts=12,
        )

    def _highest(
        self,
        score: Callable[[Allocations], Values],
        rng: np.random.Generator,
        *,
        tried: Collection[tuple[int, ...]] = (),
        most_parameters: int | None,
        drawn: int = 100,
        starts: int = 4,
    ) -> list[int]:
        with one_thread():
            return highest(
                self._space,
                score,
                rng,
                known=self._known,
                tried=tried,
                most_parameters=most_parameters,
                drawn=drawn,
                starts=starts,
            )

    def _standardised(self, rows: Allocations) -> tuple[Values, Values]:
        """Returns mean and standard deviation in units of the target, shape (n,) each."""
        outputs = self._outputs(rows)
        mean = outputs.mean(axis=0) + self._expected(rows) @ self._weights
        # The variance of a few members is itself a rough guess; the usual one steadies it.
        variance = (outputs.var(axis=0) + self._usual) / 2
        return mean, self._stretch * np.sqrt(variance)

    def _outputs(self, rows: Allocations) -> Values:
        """Returns what each member predicts, shape (B, n)."""
        with one_thread(), torch.inference_mode():
            split = torch.split(self._inputs(rows), _BATCH)
            batches = [self._networks.outputs(inputs) for inputs in split]
        return torch.cat(batches, dim=1).numpy().astype(np.float64)

    def _expected(self, rows: Allocations) -> Values:
        """Returns what each prior expects, shape (n, priors)."""
        found = np.empty((len(rows), len(self._priors)))
        for column, prior in enumerate(self._priors):
            found[:, column] = prior(self._space, rows)
        return found

    def _inputs(self, rows: Allocations) -> torch.Tensor:
        return torch.as_tensor((rows - self._center) / self._scale, dtype=torch.float32)  # (n, c)

    def _train(
        self, rows: Allocations, targets: Values, out: NDArray[np.bool_], epochs: int
    ) -> None:
        """Trains on targets (n,), each member without the points that it leaves out, (B, n)."""
        shares = ~out / (~out).sum(axis=1, keepdims=True)
        with one_thread(), torch.inference_mode():
            self._networks.train(
                self._inputs(rows),
                torch.as_tensor(targets, dtype=torch.float32),
                torch.as_tensor(shares, dtype=torch.float32),
                steps=math.ceil(epochs / 3),
                learning_rate=self._config.learning_rate,
                decay=_DECAY,
                left_out=torch.as_tensor(out) if out.any() else None,
            )


def ensemble(space: RankSpace, config: PerformanceModelConfig, seed: int) -> MLPEnsemble:
    """Builds the ensemble without priors."""
    return MLPEnsemble(space, config, seed)


def _calibration(inside: Values, outside: Values, disagreement: float) -> tuple[float, float]:
    """Returns the factor of the standard deviations, and the noise.

    In a linear fit without bias that uses up a share h of the data, squared errors are 1 - h times
    the noise variance on points that were learned, and 1 / (1 - h) times it on those left out, so
    that their geometric mean is the noise variance. What is left of the error outside is ignorance.

    Args:
        inside: Errors of the members that learned the point, shape (n,), in standard deviations of
            the values.
        outside: Error of the one member that left the point out, shape (n,); empty if none was.
        disagreement: Mean variance of the members on random rows.
    """
    if not len(outside):
        return 1.0, math.sqrt(0.5)  # half of what there is to explain
    # One more error, as large as that of a model that knows nothing, keeps a few lucky ones from
    # being trusted.
    total = (float(np.sum(outside**2)) + 1) / (len(outside) + 1)
    noise = min(math.sqrt(float(np.mean(inside**2) * np.mean(outside**2))), _MOST_NOISE * total)
    stretch = math.sqrt((total - noise) / disagreement) if disagreement > 0 else 1.0
    return min(max(stretch, 1 / _MOST_STRETCH), _MOST_STRETCH), math.sqrt(noise)
