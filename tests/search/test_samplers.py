"""All built-in samplers pass the conformance suite; the paper's does what the paper says."""

from __future__ import annotations

import doctest

import numpy as np
import optuna
import pytest

from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.core.ranks import RankSpace
from rankadaptor_plugin.search import paper as samplers
from rankadaptor_plugin.search import samplers as optuna_samplers
from rankadaptor_plugin.search.bayes import bayes
from rankadaptor_plugin.search.performance.performance_model import Prediction
from rankadaptor_plugin.search.space import allocation_from, distributions, untried
from rankadaptor_plugin.testing.search import (
    SPACE,
    SamplerConformance,
    additive_value,
)


@pytest.fixture(autouse=True)
def quiet_optuna():
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(verbosity)


class TestPaper(SamplerConformance):
    def sampler(self, settings):
        return samplers.paper(settings)


class TestRandom(SamplerConformance):
    def sampler(self, settings):
        return optuna_samplers.random(settings)


class TestTPE(SamplerConformance):
    def sampler(self, settings):
        return optuna_samplers.tpe(settings)


class TestGP(SamplerConformance):
    def sampler(self, settings):
        return optuna_samplers.gp(settings)


class TestBayes(SamplerConformance):
    def sampler(self, settings):
        return bayes(settings)


class Recorder:
    """A performance model that keeps what it was given and predicts the planted function."""

    def __init__(self, sign: int = 1) -> None:
        self.sign = sign
        self.calls: list[tuple[str, np.ndarray, np.ndarray]] = []

    def pretrain(self, ranks, task_values):
        self.calls.append(("pretrain", ranks, task_values))

    def fit(self, ranks, values):
        self.calls.append(("fit", ranks, values))

    def predict(self, ranks):
        mean = self.sign * additive_value(ranks)
        return Prediction(mean=mean, stddev=np.zeros(len(ranks)))


def run(space, model, trials, *, direction="maximize", initial=3, tasks=("b", "a"), fail=()):
    sampler = samplers.PerformanceModelSampler(
        space, lambda: model, seed=0, n_startup_trials=initial, candidates=5000
    )

    def objective(trial):
        for name, distribution in distributions(space).items():
            trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step)
        if trial.number in fail:
            raise ArithmeticError
        trial.set_user_attr("task_values", {t: trial.number * 10 + i for i, t in enumerate(tasks)})
        return float(trial.number)

    study = optuna.create_study(direction=direction, sampler=sampler)
    study.optimize(objective, n_trials=trials, catch=ArithmeticError)
    return study, sampler


def ranks_of(space, study):
    return [allocation_from(space, trial.params).ranks for trial in study.trials]


def test_docstring_example_runs():
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(samplers.PerformanceModelSampler, globs={}, module=samplers)
    assert len(example.examples) > 5
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_trains_offline_then_online_then_takes_the_best_untried(direction):
    sign = 1 if direction == "maximize" else -1
    model = Recorder()
    study, sampler = run(SPACE, model, 5, direction=direction)
    ranks = ranks_of(SPACE, study)
    names = [name for name, _, _ in model.calls]
    assert names == ["pretrain", "fit"] * 2
    # Trial 4: offline on the initial trials' tasks in order of name, online on all four trials.
    _, offline, task_values = model.calls[2]
    np.testing.assert_array_equal(offline, ranks[:3])
    np.testing.assert_array_equal(task_values, sign * np.array([[1, 0], [11, 10], [21, 20]]))
    _, online, values = model.calls[3]
    np.testing.assert_array_equal(online, ranks[:4])
    np.testing.assert_array_equal(values, sign * np.arange(4))
    # The space has 1024 allocations, so 5000 candidates are all of them.
    every = sorted(map(tuple, SPACE.every().tolist()), key=lambda r: additive_value(np.array([r])))
    left = [row for row in every if row not in ranks[:3]]
    assert ranks[3:] == left[-2:][::-1]
    assert [sampler.predicted(n) for n in range(3)] == [None] * 3
    for number in (3, 4):
        best = additive_value(np.array([ranks[number]]))[0]
        assert sampler.predicted(number) == pytest.approx(sign * best)


def test_failed_trials_are_not_learned_from_but_not_repeated():
    model = Recorder()
    study, _ = run(SPACE, model, 6, fail=(1, 4))
    ranks = ranks_of(SPACE, study)
    assert len(set(ranks)) == 6
    _, online, values = model.calls[-1]
    np.testing.assert_array_equal(online, [ranks[0], ranks[2], ranks[3]])
    np.testing.assert_array_equal(values, [0, 2, 3])


def test_stays_random_until_two_trials_are_complete():
    model = Recorder()
    _, sampler = run(SPACE, model, 6, fail=(0, 1, 2, 3))
    assert not model.calls
    assert sampler.predicted(5) is None


def test_without_values_per_task_there_is_no_offline_training():
    model = Recorder()
    run(SPACE, model, 4, tasks=())
    assert [name for name, _, _ in model.calls] == ["fit"]


def test_exhausted_space_is_an_error():
    space = RankSpace(candidates=(2, 4), searchable=(True, True), default_rank=4, costs=(1, 1))
    with pytest.raises(RankSpaceError, match="All allocations of the rank space were tried, 4"):
        run(space, Recorder(), 5)


def test_several_objectives_are_refused():
    sampler = samplers.PerformanceModelSampler(SPACE, Recorder, seed=0)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    with pytest.raises(RuntimeError, match="single direction"):
        study.ask(distributions(SPACE))


def test_untried_draws_from_large_spaces_within_the_budget():
    space = RankSpace(
        candidates=(2, 4, 6, 8),
        searchable=(True,) * 10,
        default_rank=4,
        costs=(3,) * 10,
        budget=150,
    )
    rng = np.random.default_rng(0)
    rows = untried(space, set(), 50, rng)
    assert rows.shape == (50, 10)
    tried = {tuple(row) for row in rows.tolist()}
    again = untried(space, tried, 50, np.random.default_rng(0))
    assert len(again)
    for row in again:
        assert space.check(space.allocation(row)).ranks not in tried
