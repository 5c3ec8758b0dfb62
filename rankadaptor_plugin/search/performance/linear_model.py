"""Bayesian linear regression on effects of columns, of total parameters, and of pairs of columns.

Its hyper-parameters are averaged over (`rankadaptor_plugin.search.performance.linear_posterior`),
which with few data does better than taking the likeliest. Proposals are Thompson samples: a
function drawn from the posterior, and the highest row of that function
(`rankadaptor_plugin.search.performance.ascent`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.special

from rankadaptor_plugin.search.performance.ascent import Ascent
from rankadaptor_plugin.search.performance.landscape import Codes, take
from rankadaptor_plugin.search.performance.linear_posterior import Posterior
from rankadaptor_plugin.search.performance.linear_prior import Prior, Rows
from rankadaptor_plugin.search.performance.performance_model import Prediction

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from rankadaptor_plugin.config.tables import PerformanceModelConfig
    from rankadaptor_plugin.core.ranks import Allocations, RankSpace
    from rankadaptor_plugin.search.performance.landscape import Floats, Ints, Landscape
    from rankadaptor_plugin.search.performance.linear_prior import Effects
    from rankadaptor_plugin.search.performance.performance_model import (
        PerformanceModel,
        PriorEffects,
        Values,
    )

_TEMPERATURE = 0.7
_RANDOM_STARTS = 3
_BATCH = 4096  # Rows predicted at once; bounds the memory.


class BayesianRegression:
    """Predicts and proposes rows; before the first `fit`, by what is expected beforehand.

    Args:
        space: The rank space.
        priors: What is expected beforehand. Each has a weight in [0, 1] that the data choose; the
            work grows fourfold with each.
        temperature: Factor on the deviation of a Thompson sample from the mean; 1 draws from the
            posterior, 0 exploits it.
    """

    def __init__(
        self,
        space: RankSpace,
        priors: Sequence[PriorEffects] = (),
        *,
        temperature: float = _TEMPERATURE,
    ) -> None:
        self._codes = Codes(space)
        self._prior = Prior(self._codes)
        self._names = tuple(prior.name for prior in priors)
        self._tables = np.zeros((len(priors), *self._codes.valid.shape))  # (p, c, h)
        for table, prior in zip(self._tables, priors, strict=True):
            for column, effect in enumerate(prior.effects):
                table[column, : len(effect)] = effect
        self._temperature = temperature
        self.fit(np.zeros((0, space.columns), dtype=np.int64), np.zeros(0))

    def fit(self, ranks: Allocations, values: Values) -> None:
        """Conditions on all measurements; see `PerformanceModel`."""
        self._center = float(np.mean(values)) if len(values) else 0.0
        self._scale = _scale(values)
        self._index = self._codes.index(ranks)
        self._posterior = Posterior(
            self._prior,
            Rows(self._prior, self._index),
            (values - self._center) / self._scale,
            self._expected(self._index),
        )

    @property
    def evidence(self) -> float:
        """Log marginal likelihood of the standardised values, averaged over all cells, in nats."""
        return _log_mean(self._posterior.log_evidence)

    @property
    def evidence_without_priors(self) -> float:
        """The same with all priors at weight 0."""
        unused = ~self._posterior.choices.any(axis=1)
        return _log_mean(self._posterior.log_evidence[:, unused])

    @property
    def prior_weights(self) -> dict[str, float]:
        """Posterior mean of the weight of each prior, in [0, 1]."""
        expected = self._posterior.weights.sum(axis=0) @ self._posterior.choices
        return dict(zip(self._names, expected.tolist(), strict=True))

    def predict(self, ranks: Allocations) -> Prediction:
        """Predicts; in standard deviations about 0 as long as nothing was fitted."""
        parts = [np.zeros((2, 0))]
        for start in range(0, len(ranks), _BATCH):
            index = self._codes.index(ranks[start : start + _BATCH])
            rows = Rows(self._prior, index)
            parts.append(self._posterior.moments(rows, self._expected(index)))
        mean, variance = np.concatenate(parts, axis=1)
        noise = sum(cell.weight * cell.noise for cell in self._posterior.cells)
        return Prediction(
            mean=self._center + self._scale * mean,
            stddev=self._scale * np.sqrt(variance),
            noise=self._scale * noise**0.5,
        )

    def propose(
        self,
        rng: np.random.Generator,
        *,
        tried: Collection[tuple[int, ...]] = (),
        most_parameters: int | None = None,
    ) -> list[int]:
        """Returns the highest row of a Thompson sample; see `ProposingModel`.

        Raises:
            RankSpaceError: If no allocation is as small as `most_parameters`.
        """
        drawn = self._posterior.draw(rng, self._temperature)
        return self._highest(drawn, rng, set(tried), most_parameters)

    def best(self, rng: np.random.Generator, *, most_parameters: int | None = None) -> list[int]:
        """Returns the row with the highest mean that ascent finds; see `ProposingModel`.

        Raises:
            RankSpaceError: If no allocation is as small as `most_parameters`.
        """
        return self._highest(self._posterior.mean(), rng, set(), most_parameters)

    def drawn(self, ranks: Allocations, rng: np.random.Generator) -> Values:
        """Returns the values of rows of shape (n, c) under one Thompson sample, shape (n,)."""
        landscape = self._landscape(self._posterior.draw(rng, self._temperature))
        return self._center + self._scale * landscape.values(self._codes.index(ranks))

    def _landscape(self, function: tuple[Effects, Floats]) -> Landscape:
        effects, weights = function
        return self._prior.landscape(effects, np.tensordot(weights, self._tables, 1))

    def _highest(
        self,
        function: tuple[Effects, Floats],
        rng: np.random.Generator,
        tried: set[tuple[int, ...]],
        most_parameters: int | None,
    ) -> list[int]:
        landscape = self._landscape(function)
        ascent = Ascent(landscape, rng, most_parameters)
        starts = [landscape.without_pairs()]
        if len(self._index):
            starts.append(self._index[landscape.values(self._index).argmax()])
        highest = ascent.highest(np.array(starts), random=_RANDOM_STARTS)
        highest = ascent.next_highest(highest, tried)
        return [int(value) for value in self._codes.rows(highest[None])[0]]

    def _expected(self, index: Ints) -> Floats:
        """Returns what each prior expects of n rows, shape (p, n)."""
        expected = [take(table, index).sum(axis=1) for table in self._tables]
        return np.array(expected).reshape(len(expected), len(index))


def linear(space: RankSpace, config: PerformanceModelConfig, seed: int) -> PerformanceModel:
    """Builds the regression; it has no settings to read and draws nothing by itself."""
    return BayesianRegression(space)


def _log_mean(logs: Floats) -> float:
    return float(scipy.special.logsumexp(logs) - np.log(logs.size))


def _scale(values: Values) -> float:
    """The standard deviation, or 1 where it is 0 up to rounding, or unknown."""
    if len(values) < 2:  # noqa: PLR2004
        return 1.0
    stddev = float(np.std(values))
    return stddev if stddev > 1e-12 * float(np.abs(values).max()) else 1.0
