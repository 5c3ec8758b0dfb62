"""Conformance suites: what every performance model and every sampler must do.

A plugin inherits a suite, says how its object is made, and lets pytest collect the class:

    from rankadaptor_plugin.testing.search import SamplerConformance

    class TestMySampler(SamplerConformance):
        def sampler(self, settings):
            return MySampler(settings.space, seed=settings.seed)
"""
# ruff: noqa: S101 - asserting is what a test suite does.

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import optuna
import scipy.stats
import torch

from rankadaptor_plugin.config.tables import PerformanceModelConfig
from rankadaptor_plugin.core.ranks import RankSpace, Setting
from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.core.trials import Outcome
from rankadaptor_plugin.search.performance.mlp import mlp
from rankadaptor_plugin.search.performance.performance_model import MetaLearner, ProposingModel
from rankadaptor_plugin.search.samplers import SamplerSettings
from rankadaptor_plugin.search.space import allocation_from, distributions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

    from rankadaptor_plugin.core.ranks import Allocations, RankAllocation
    from rankadaptor_plugin.search.performance.performance_model import PerformanceModel, Values

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
_N_STARTUP_TRIALS = 4


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
            values={"accuracy": v / 4, "choice_logprob": v, "margin": 2 * v, "gold_logprob": v / 8},
            stderr={"accuracy": 0.1, "choice_logprob": 0.1, "margin": 0.1},
            documents=10,
        )
        for name, v in (("exact", value), ("noisy", value + noise))
    }
    return Outcome(
        search=Score(tasks=scores),
        objective=value,
        train_loss=3.0 - value,
        seconds={"recovery": 0.0},
    )


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """Suggests a value of one of our distributions, as an objective of a user would."""
    if isinstance(distribution, optuna.distributions.IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step or 1
        )
    assert isinstance(distribution, optuna.distributions.CategoricalDistribution)
    return trial.suggest_categorical(name, distribution.choices)


class PerformanceModelConformance:
    """Inherit and override `performance_model`.

    What a `MetaLearner` and a `ProposingModel` can do besides is checked of those alone.
    """

    least_correlation = 0.5
    """Rank correlation with the planted function that 40 noiseless values must give."""

    any_units = True
    """True if offset and scale of the values make no difference."""

    spaces = (
        SPACE,
        UNEVEN_SPACE,
        RankSpace(  # two module groups, rank 0, a setting, a limit on the sum of ranks
            candidates=(0, 2, 4, 8),
            searchable=(True,) * 8,
            default_rank=4,
            costs=(1, 2) * 4,
            groups=("attention", "mlp"),
            settings=(Setting("learning_rate", (1e-4, 3e-4, 1e-3), 3e-4),),
            max_rank_sum=40,
        ),
        RankSpace(  # a budget, and too many allocations to list
            candidates=(2, 4, 6, 8, 12),
            searchable=(False,) + (True,) * 11,
            default_rank=8,
            costs=tuple(range(3, 15)),
            budget=8 * sum(range(3, 15)),
        ),
    )
    """Spaces that proposals are asked for."""

    def performance_model(self, space: RankSpace, seed: int) -> PerformanceModel:
        """Returns a fresh, untrained model."""
        raise NotImplementedError

    def _data(
        self, count: int = 40, space: RankSpace = SPACE, seed: int = 0
    ) -> tuple[Allocations, Values]:
        """Rows and a planted value, rising with every column and most with the last one."""
        rows = space.sample(count, np.random.default_rng(seed))
        weights = np.arange(1, space.columns + 1)
        return rows, np.asarray(np.log1p(rows) @ weights / weights.sum(), dtype=np.float64)

    def _fitted(self, space: RankSpace) -> tuple[ProposingModel | None, Allocations]:
        """A model with data of a space, None if it makes no proposals, and the data's rows."""
        rows, values = self._data(20, space)
        model = self.performance_model(space, 0)
        model.fit(rows, values)
        return model if isinstance(model, ProposingModel) else None, rows

    def test_predictions_have_one_finite_value_per_row(self) -> None:
        """Shapes are (n,) in every kind of space, before and after any training, n = 0 too."""
        for space in self.spaces:
            rows, values = self._data(space=space)
            model = self.performance_model(space, 0)
            if isinstance(model, MetaLearner):
                model.pretrain(rows[:9], np.stack([values[:9], -values[:9]], axis=1))
            for trained in (False, True):
                if trained:
                    model.fit(rows, values)
                for count in (0, 1, len(rows)):
                    prediction = model.predict(rows[:count])
                    for array in (prediction.mean, prediction.stddev):
                        assert array.shape == (count,)
                        assert array.dtype == np.float64
                        assert np.isfinite(array).all()
                    assert (prediction.stddev >= 0).all()
                    assert math.isfinite(prediction.noise)
                    assert prediction.noise >= 0

    def test_the_same_seed_gives_the_same_predictions(self) -> None:
        """Nothing but the seed and the data decides."""
        ranks, values = self._data()
        predictions = []
        for _ in range(2):
            model = self.performance_model(SPACE, 7)
            model.fit(ranks, values)
            predictions.append(model.predict(ranks))
        np.testing.assert_array_equal(predictions[0].mean, predictions[1].mean)
        np.testing.assert_array_equal(predictions[0].stddev, predictions[1].stddev)
        assert predictions[0].noise == predictions[1].noise

    def test_a_fit_forgets_earlier_fits(self) -> None:
        """`fit` starts from the pretrained state, so the order of calls does not matter."""
        ranks, values = self._data()
        once, twice = self.performance_model(SPACE, 0), self.performance_model(SPACE, 0)
        for model in (once, twice):
            if isinstance(model, MetaLearner):
                model.pretrain(ranks[:9], values[:9, None])
        twice.fit(ranks[:5], -values[:5])
        for model in (once, twice):
            model.fit(ranks, values)
        np.testing.assert_array_equal(once.predict(ranks).mean, twice.predict(ranks).mean)

    def test_predictions_are_in_the_units_of_the_target(self) -> None:
        """Their mean is near that of the data; offset and scale carry over, unless they matter."""
        ranks, values = self._data()
        units = ((0.0, 1e-3), (-50.0, 1.0), (1e4, 100.0)) if self.any_units else ((0.0, 1.0),)
        for offset, scale in units:
            model = self.performance_model(SPACE, 0)
            model.fit(ranks, offset + scale * values)
            prediction = model.predict(ranks)
            error = abs(prediction.mean.mean() - (offset + scale * values).mean())
            assert error < scale * values.std()
            assert prediction.stddev.max() < 10 * scale * values.std()
            assert prediction.noise < 2 * scale * values.std()

    def test_constant_values(self) -> None:
        """Equal values, or one only, give finite predictions near that value, and proposals."""
        ranks, _ = self._data()
        for count in (1, 2, len(ranks)):
            model = self.performance_model(SPACE, 0)
            if isinstance(model, MetaLearner):
                model.pretrain(ranks[:count], np.full((count, 2), 0.3))
            model.fit(ranks[:count], np.full(count, 0.7))
            prediction = model.predict(ranks[:count])
            np.testing.assert_allclose(prediction.mean, 0.7, atol=0.1)
            assert np.isfinite(prediction.stddev).all()
            assert math.isfinite(prediction.noise)
            if isinstance(model, ProposingModel):
                SPACE.check(SPACE.allocation(model.propose(np.random.default_rng(0))))

    def test_learns_a_planted_function(self) -> None:
        """Unseen allocations are ranked better than by chance."""
        ranks, values = self._data()
        unseen, planted = self._data(300, seed=1)
        model = self.performance_model(SPACE, 0)
        model.fit(ranks, values)
        correlation = scipy.stats.spearmanr(model.predict(unseen).mean, planted).statistic
        assert correlation > self.least_correlation

    def test_nothing_is_learned_from_no_tasks(self) -> None:
        """Pretraining on tasks of no number leaves predictions as they are."""
        ranks, values = self._data()
        means = []
        for pretrained in (False, True):
            model = self.performance_model(SPACE, 0)
            if pretrained and isinstance(model, MetaLearner):
                model.pretrain(ranks, np.empty((len(ranks), 0)))
            model.fit(ranks, values)
            means.append(model.predict(ranks).mean)
        np.testing.assert_array_equal(means[0], means[1])

    def test_proposals_lie_in_the_space_and_are_new(self) -> None:
        """Limits are kept to, and what was tried is not proposed."""
        for space in self.spaces:
            model, rows = self._fitted(space)
            if model is None:
                return
            tried = {tuple(row) for row in rows.tolist()}
            row = model.propose(np.random.default_rng(0), tried=tried)
            assert tuple(row) not in tried
            space.check(space.allocation(row))

    def test_proposals_keep_to_a_number_of_parameters(self) -> None:
        """Down to the smallest allocation of the space, which alone has so few."""
        for space in self.spaces:
            model, _ = self._fitted(space)
            if model is None:
                return
            least = space.parameters(space.lowest())
            for most in (least, (least + space.parameters(space.uniform())) // 2):
                for row in (
                    model.propose(np.random.default_rng(0), most_parameters=most),
                    model.best(np.random.default_rng(0), most_parameters=most),
                ):
                    allocation = space.check(space.allocation(row))
                    assert space.parameters(allocation) <= most

    def test_the_best_is_better_than_random_rows(self) -> None:
        """It lies in the space, and no random row has a higher mean."""
        for space in self.spaces:
            model, _ = self._fitted(space)
            if model is None:
                return
            row = np.array([model.best(np.random.default_rng(0))])
            space.check(space.allocation(row[0]))
            random = space.sample(50, np.random.default_rng(1))
            mean = model.predict(row).mean[0]
            assert mean >= model.predict(random).mean.max() - 1e-3 * abs(mean)

    def test_the_same_generator_gives_the_same_proposals(self) -> None:
        """Proposals depend on data and generator alone, not on calls before."""
        (one, rows), (other, _) = self._fitted(SPACE), self._fitted(SPACE)
        if one is None or other is None:
            return
        other.predict(rows)
        other.propose(np.random.default_rng(5))
        first, second = (list(model.propose(np.random.default_rng(3))) for model in (one, other))
        assert first == second

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
        if isinstance(model, MetaLearner):
            model.pretrain(ranks[:9], values[:9, None])
        model.fit(ranks, values)
        model.predict(ranks)
        if isinstance(model, ProposingModel):
            model.propose(np.random.default_rng(0))
        assert (float(torch.rand(1)), np.random.random()) == expected


class SamplerConformance:
    """Inherit and override `sampler`."""

    spaces: tuple[RankSpace, ...] = (SPACE, UNEVEN_SPACE)
    """Spaces that the sampler serves, each of more than 20 allocations."""

    def sampler(self, settings: SamplerSettings) -> BaseSampler:
        """Returns a fresh sampler."""
        raise NotImplementedError

    def settings(self, space: RankSpace, seed: int) -> SamplerSettings:
        """Returns the settings that `sampler` is called with."""
        config = PerformanceModelConfig(meta_epochs=5, epochs=5)
        return SamplerSettings(
            space=space,
            seed=seed,
            n_startup_trials=_N_STARTUP_TRIALS,
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
        for space in self.spaces:
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
