"""Conformance suites: what every performance model and every sampler must do.

A plugin inherits a suite, says how its object is made, and lets pytest collect the class:

    from rankadaptor_plugin.testing import SamplerConformance

    class TestMySampler(SamplerConformance):
        def sampler(self, settings):
            return MySampler(settings.space, seed=settings.seed)
"""
# ruff: noqa: S101 - asserting is what a test suite does.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import optuna
import scipy.stats
import torch

from rankadaptor_plugin.config import PerformanceModelConfig
from rankadaptor_plugin.context import SamplerSettings
from rankadaptor_plugin.performance_model import mlp
from rankadaptor_plugin.ranks import RankSpace
from rankadaptor_plugin.samplers import allocation_from, distributions
from rankadaptor_plugin.scores import Score, TaskScore
from rankadaptor_plugin.trials import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

    from rankadaptor_plugin.performance_model import PerformanceModel, Values
    from rankadaptor_plugin.ranks import Allocations, RankAllocation

SPACE = RankSpace(
    candidates=(2, 4, 6, 8),
    searchable=(False, True, True, True, True, True),
    default_rank=8,
    costs=(3, 3, 4, 5, 3, 3),
)
"""Six layers, the lowest fixed; 1024 allocations."""

UNEVEN_SPACE = RankSpace(
    candidates=(1, 2, 8), searchable=(True, True, False, True), default_rank=4, costs=(1, 2, 1, 1)
)
"""Candidates that are not evenly spaced: categorical parameters in Optuna."""

_TRIALS = 8
_INITIAL_TRIALS = 4


def additive_value(ranks: Allocations) -> Values:
    """A planted function: higher layers gain more from rank. Shape (n, l) -> (n,), float64."""
    weights = np.arange(1, ranks.shape[1] + 1)
    return np.asarray(np.log(ranks) @ weights / weights.sum(), dtype=np.float64)


def planted_outcome(ranks: Sequence[int]) -> Outcome:
    """An oracle without a model: `additive_value` on two tasks, the second one noisy."""
    value = float(additive_value(np.array([ranks]))[0])
    noise = float(np.random.default_rng(list(ranks)).normal(scale=0.05))
    scores = {
        name: TaskScore(
            values={"accuracy": v / 4, "clp": v, "margin": 2 * v, "gold_ll": v / 8},
            stderr={"accuracy": 0.1, "clp": 0.1, "margin": 0.1},
            documents=10,
        )
        for name, v in (("exact", value), ("noisy", value + noise))
    }
    return Outcome(score=Score(tasks=scores), train_loss=3.0 - value, seconds={"recovery": 0.0})


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """Suggests a value of one of our distributions, as an objective of a user would."""
    if isinstance(distribution, optuna.distributions.IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step or 1
        )
    assert isinstance(distribution, optuna.distributions.CategoricalDistribution)
    return trial.suggest_categorical(name, distribution.choices)


class PerformanceModelConformance:
    """Inherit and override `performance_model`."""

    least_correlation = 0.5
    """Rank correlation with the planted function that 40 noiseless values must give."""

    def performance_model(self, space: RankSpace, seed: int) -> PerformanceModel:
        """Returns a fresh, untrained model."""
        raise NotImplementedError

    def _data(self, count: int = 40) -> tuple[Allocations, Values]:
        ranks = SPACE.sample(count, np.random.default_rng(0))
        return ranks, additive_value(ranks)

    def test_predictions_have_one_finite_value_per_allocation(self) -> None:
        """Predictions have shape (n,), before and after any training, also for n = 0 and 1."""
        ranks, values = self._data()
        model = self.performance_model(SPACE, 0)
        model.pretrain(ranks[:9], np.stack([values[:9], -values[:9]], axis=1))
        model.fit(ranks, values)
        for count in (0, 1, len(ranks)):
            prediction = model.predict(ranks[:count])
            for array in (prediction.mean, prediction.stddev):
                assert array is None or array.shape == (count,)
                assert array is None or np.isfinite(array).all()

    def test_the_same_seed_gives_the_same_predictions(self) -> None:
        """Nothing but the seed and the data decides."""
        ranks, values = self._data()
        means = []
        for _ in range(2):
            model = self.performance_model(SPACE, 7)
            model.fit(ranks, values)
            means.append(model.predict(ranks).mean)
        np.testing.assert_array_equal(means[0], means[1])

    def test_a_fit_forgets_earlier_fits(self) -> None:
        """`fit` starts from the pretrained state, so the order of calls does not matter."""
        ranks, values = self._data()
        once, twice = self.performance_model(SPACE, 0), self.performance_model(SPACE, 0)
        for model in (once, twice):
            model.pretrain(ranks[:9], values[:9, None])
        twice.fit(ranks[:5], -values[:5])
        for model in (once, twice):
            model.fit(ranks, values)
        np.testing.assert_array_equal(once.predict(ranks).mean, twice.predict(ranks).mean)

    def test_predictions_are_in_the_units_of_the_target(self) -> None:
        """Their mean is near that of the data, whatever its offset and scale."""
        ranks, values = self._data()
        for offset, scale in ((0.0, 1e-3), (-50.0, 1.0), (1e4, 100.0)):
            model = self.performance_model(SPACE, 0)
            model.fit(ranks, offset + scale * values)
            error = abs(model.predict(ranks).mean.mean() - (offset + scale * values).mean())
            assert error < scale * values.std()

    def test_constant_values(self) -> None:
        """Equal values, or one only, give finite predictions near that value."""
        ranks, _ = self._data()
        for count in (1, len(ranks)):
            model = self.performance_model(SPACE, 0)
            model.pretrain(ranks[:count], np.full((count, 2), 0.3))
            model.fit(ranks[:count], np.full(count, 0.7))
            np.testing.assert_allclose(model.predict(ranks[:count]).mean, 0.7, atol=0.1)

    def test_learns_a_planted_function(self) -> None:
        """Unseen allocations are ranked better than by chance."""
        ranks, values = self._data()
        unseen = SPACE.sample(300, np.random.default_rng(1))
        model = self.performance_model(SPACE, 0)
        model.fit(ranks, values)
        predicted, planted = model.predict(unseen).mean, additive_value(unseen)
        correlation = scipy.stats.spearmanr(predicted, planted).statistic
        assert correlation > self.least_correlation

    def test_leaves_global_random_states_alone(self) -> None:
        """No global seeding, and no draws from global generators."""
        ranks, values = self._data()
        # Draws after fixed global seeds must be the same with and without a model between them.
        torch.manual_seed(5)
        np.random.seed(5)
        expected = float(torch.rand(1)), np.random.random()
        torch.manual_seed(5)
        np.random.seed(5)
        model = self.performance_model(SPACE, 0)
        model.pretrain(ranks[:9], values[:9, None])
        model.fit(ranks, values)
        model.predict(ranks)
        assert (float(torch.rand(1)), np.random.random()) == expected


class SamplerConformance:
    """Inherit and override `sampler`."""

    def sampler(self, settings: SamplerSettings) -> BaseSampler:
        """Returns a fresh sampler."""
        raise NotImplementedError

    def settings(self, space: RankSpace, seed: int) -> SamplerSettings:
        """Returns the settings that `sampler` is called with."""
        config = PerformanceModelConfig(meta_epochs=5, epochs=5)
        return SamplerSettings(
            space=space,
            seed=seed,
            initial_trials=_INITIAL_TRIALS,
            candidates=50,
            performance_model=lambda: mlp(space, config, 0),
        )

    def _asked(
        self, space: RankSpace, seed: int, *, direction: Literal["minimize", "maximize"]
    ) -> list[RankAllocation]:
        """Asks and tells as the search does, with a fresh sampler for every trial."""
        study = optuna.create_study(direction=direction)
        allocations = []
        for number in range(_TRIALS):
            study.sampler = self.sampler(self.settings(space, seed + number))
            trial = study.ask(distributions(space))
            allocations.append(allocation_from(space, trial.params))
            study.tell(trial, additive_value(np.array([allocations[-1].ranks]))[0])
        return allocations

    def test_proposals_lie_in_the_space(self) -> None:
        """Ranks are candidates and fixed layers stay fixed, in either direction."""
        for space in (SPACE, UNEVEN_SPACE):
            for allocation in [
                *self._asked(space, 0, direction="maximize"),
                *self._asked(space, 0, direction="minimize"),
            ]:
                space.check(allocation)

    def test_proposals_depend_on_seed_and_study_alone(self) -> None:
        """A fresh sampler proposes the same; otherwise resumed searches would differ."""
        one, two = (self._asked(SPACE, 3, direction="maximize") for _ in range(2))
        assert one == two
        assert one != self._asked(SPACE, 4, direction="maximize")

    def test_runs_inside_a_plain_study(self) -> None:
        """One sampler serves `Study.optimize`, failed trials and foreign parameters included."""
        parameters = distributions(SPACE)

        def objective(trial: optuna.Trial) -> float:
            rate = trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True)
            params = {name: suggest(trial, name, d) for name, d in parameters.items()}
            if trial.number == 1:
                raise ArithmeticError
            allocation = SPACE.check(allocation_from(SPACE, params))
            return float(additive_value(np.array([allocation.ranks]))[0]) + rate

        study = optuna.create_study(sampler=self.sampler(self.settings(SPACE, 0)))
        study.optimize(objective, n_trials=_TRIALS, catch=ArithmeticError)
        assert len({tuple(trial.params.values()) for trial in study.trials}) > 1
