"""Our own search step: limits and directions are kept, and it serves studies of one's own."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.core.ranks import RankSpace
from rankadaptor_plugin.search.bayes import N_STARTUP_TRIALS, BayesSampler, bayes, rank_sampler
from rankadaptor_plugin.search.performance.performance_model import Prediction, PriorEffects
from rankadaptor_plugin.search.samplers import SamplerSettings
from rankadaptor_plugin.search.space import allocation_from, distributions
from rankadaptor_plugin.testing.search import SPACE, additive_value, suggest

TINY = RankSpace(candidates=(2, 4), searchable=(True, True), default_rank=4, costs=(1, 1))
SMALL = RankSpace(candidates=(2, 4, 8), searchable=(True,) * 3, default_rank=4, costs=(1, 2, 3))


@pytest.fixture(autouse=True)
def quiet_optuna():
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(verbosity)


class Planned:
    """Expects the planted values up to an error; notes what it was asked."""

    def __init__(self, error=0.0, stddev=0.1, noise=0.0, space=SPACE, sign=1):
        self.error, self.stddev, self.noise = error, stddev, noise
        self.space, self.sign, self.limits, self.fits = space, sign, [], []

    def fit(self, ranks, values):
        self.fits.append((ranks, values))

    def predict(self, ranks):
        mean = self.sign * additive_value(ranks) + self.error
        return Prediction(mean=mean, stddev=np.full(len(ranks), self.stddev), noise=self.noise)

    def propose(self, rng, *, tried=(), most_parameters=None):
        self.limits.append(most_parameters)
        rows = self.space.sample(200, rng)
        return next(row for row in rows.tolist() if tuple(row) not in tried)

    def best(self, rng, *, most_parameters=None):
        rows = self.space.every()
        return rows[self.predict(rows).mean.argmax()].tolist()


def value_of(trial, space=SPACE):
    params = {n: suggest(trial, n, d) for n, d in distributions(space).items()}
    return float(additive_value(np.array([allocation_from(space, params).ranks]))[0])


def studied(model, trials, *, space=SPACE, direction="maximize", initial=3, pareto=False):
    sampler = BayesSampler(space, lambda: model, seed=0, n_startup_trials=initial, pareto=pareto)
    study = optuna.create_study(direction=direction, sampler=sampler)
    study.optimize(lambda trial: value_of(trial, space), n_trials=trials)
    return study, sampler


def settings(space, **changes):
    given = {
        "space": space,
        "seed": 0,
        "n_startup_trials": 3,
        "candidates": 1,
        "performance_model": lambda: pytest.fail("not this one's"),
    }
    return SamplerSettings(**{**given, **changes})


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_predictions_are_in_the_units_of_the_study(direction):
    sign = 1 if direction == "maximize" else -1
    study, sampler = studied(Planned(error=3.0, sign=sign), 5, direction=direction)
    assert [sampler.predicted(n) for n in range(3)] == [None] * 3
    for trial in study.trials[3:]:
        assert sampler.predicted(trial.number) == pytest.approx(trial.value + sign * 3.0)


# -------------------------------------------------------------------------------- recommending


def test_recommends_what_the_model_expects_most_of():
    study, sampler = studied(Planned(), 8)
    rows = sampler.recommend(study, 4)
    best = SPACE.every()[additive_value(SPACE.every()).argmax()].tolist()
    assert rows[0] == best
    measured = sorted((t.value for t in study.trials), reverse=True)
    kept = [v for v in measured if v != pytest.approx(additive_value(np.array([best]))[0])]
    np.testing.assert_allclose(additive_value(np.array(rows[1:])), kept[:3])
    assert sampler.recommend(study, 1) == rows[:1]
    assert len({tuple(row) for row in sampler.recommend(study, 99)}) == len(
        sampler.recommend(study, 99)
    )


def test_minimizing_recommends_the_lowest():
    study, sampler = studied(Planned(sign=-1), 5, direction="minimize")
    lowest = SPACE.every()[additive_value(SPACE.every()).argmin()].tolist()
    assert sampler.recommend(study, 1) == [lowest]


def test_without_measurements_nothing_is_recommended():
    sampler = BayesSampler(SPACE, Planned, seed=0)
    assert sampler.recommend(optuna.create_study(sampler=sampler), 3) == []


def test_recommendations_lie_in_the_space_and_do_not_wear_out():
    space = replace(SPACE, budget=100)
    sampler = bayes(settings(space))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: value_of(trial, space), n_trials=5)
    rows = sampler.recommend(study, 3)
    assert rows == sampler.recommend(study, 3)
    for row in rows:
        space.check(space.allocation(row))


# ------------------------------------------------------------------------------------- proposals


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_either_direction_is_searched(direction):
    space = RankSpace(
        candidates=(2, 4, 6, 8), searchable=(True,) * 6, default_rank=4, costs=(1,) * 6
    )
    sampler = rank_sampler(layers=6, candidates=(2, 4, 6, 8), seed=1)
    study = optuna.create_study(direction=direction, sampler=sampler)
    study.optimize(lambda trial: value_of(trial, space), n_trials=14)
    every = np.sort(additive_value(space.every()))
    if direction == "minimize":
        assert study.best_value < np.quantile(every, 0.01)
    else:
        assert study.best_value > np.quantile(every, 0.99)


def test_the_first_proposals_are_random_and_as_many_as_asked_for():
    model = Planned()
    studied(model, 4, initial=4)
    assert not model.limits
    assert bayes(settings(SPACE, n_startup_trials=0)).n_startup_trials == N_STARTUP_TRIALS
    assert bayes(settings(SPACE, n_startup_trials=7)).n_startup_trials == 7


def test_with_a_prior_nothing_is_random():
    effects = tuple(np.linspace(-1.0, 1.0, len(levels)) for levels in SPACE.levels())
    prior = PriorEffects("earlier", effects)
    sampler = bayes(settings(SPACE, n_startup_trials=0, priors=(prior,)))
    assert sampler.n_startup_trials == 0
    study = optuna.create_study(direction="maximize", sampler=sampler)
    value_of(trial := study.ask())
    assert sampler.predicted(0) is None  # in which units could it be
    allocation = SPACE.check(allocation_from(SPACE, trial.params))
    random = SPACE.sample(200, np.random.default_rng(0))
    row = np.array([SPACE.row(allocation)])
    assert prior(SPACE, row)[0] > np.median(prior(SPACE, random))
    assert sampler.recommend(study, 1) == []


def test_pareto_draws_a_limit_for_every_proposal():
    model = Planned(space=SMALL)
    studied(model, 20, space=SMALL, pareto=True, initial=1)
    least, most = SMALL.parameters(SMALL.lowest()), 8 * sum(SMALL.costs)
    assert all(least <= limit <= most for limit in model.limits)
    assert len(set(model.limits)) > 8
    assert min(model.limits) < (least + most) / 2 < max(model.limits)
    model = Planned(space=SMALL)
    studied(model, 5, space=SMALL)
    assert model.limits == [None, None]


def test_pareto_finds_both_ends_of_the_front():
    sampler = bayes(settings(SPACE, pareto=True))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(value_of, n_trials=14)
    sizes = [SPACE.parameters(allocation_from(SPACE, t.params)) for t in study.trials[3:]]
    least, most = SPACE.parameters(SPACE.lowest()), SPACE.parameters(SPACE.uniform())
    assert min(sizes) < least + 0.4 * (most - least)
    assert max(sizes) > least + 0.6 * (most - least)


def test_trials_that_run_side_by_side_differ():
    sampler = rank_sampler(layers=3, candidates=(2, 4, 8))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    kinds = distributions(replace(SMALL, costs=(1, 1, 1)))
    for value in range(4):
        study.tell(study.ask(kinds), float(value))
    asked = [study.ask(kinds) for _ in range(8)]
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 12
    for trial in asked:
        study.tell(trial, 1.0)


def test_a_study_with_several_threads():
    space = RankSpace(
        candidates=(2, 4, 6, 8), searchable=(True,) * 6, default_rank=4, costs=(1,) * 6
    )
    sampler = rank_sampler(layers=6, candidates=(2, 4, 6, 8))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: value_of(trial, space), n_trials=8, n_jobs=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 8


def test_an_exhausted_space_is_an_error():
    sampler = rank_sampler(layers=2, candidates=(2, 4))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: value_of(trial, TINY), n_trials=4)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 4
    with pytest.raises(RankSpaceError, match="All allocations of the rank space were tried, 4"):
        study.ask(distributions(TINY))


def test_pareto_tries_the_whole_of_a_small_space():
    sampler = bayes(settings(TINY, pareto=True, n_startup_trials=1))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: value_of(trial, TINY), n_trials=4)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 4


# --------------------------------------------------------------------------------- one's own study


def test_the_example_of_the_page_runs(monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "search.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert code.count("\n") <= 20
    measured = []

    def fine_tune_and_score(ranks):
        measured.append(ranks)
        return float(np.log(ranks).sum())

    names = {"fine_tune_and_score": fine_tune_and_score}
    exec(code, names)  # noqa: S102 - the page's own code
    assert len(measured) == 20 == len({tuple(ranks) for ranks in measured})
    assert all(sum(ranks) <= 96 for ranks in measured)
    study = names["study"]
    (row,) = names["sampler"].recommend(study, 1)
    assert sum(row) <= 96
    # The best random of twenty is far behind: nearly all of the sum is spent.
    assert study.best_value > 12 * np.log(7)


def test_ranks_that_are_not_evenly_spaced_are_categorical():
    sampler = rank_sampler(layers=3, candidates=(1, 2, 8), max_rank_sum=11)
    study = optuna.create_study(direction="maximize", sampler=sampler)

    def objective(trial):
        ranks = [trial.suggest_categorical(f"layer_{i:02d}", (1, 2, 8)) for i in range(3)]
        assert sum(ranks) <= 11
        return float(sum(ranks))

    study.optimize(objective, n_trials=8)
    assert study.best_value == 11


def test_further_parameters_are_drawn_at_random_and_again_the_same():
    found = []
    for _ in range(2):
        sampler = rank_sampler(layers=2, candidates=(2, 4, 6, 8))
        study = optuna.create_study(direction="maximize", sampler=sampler)

        def objective(trial):
            ranks = [trial.suggest_int(f"layer_{i:02d}", 2, 8, step=2) for i in range(2)]
            return (
                sum(ranks) + trial.suggest_float("dropout", 0, 1) + trial.suggest_float("x", 0, 1)
            )

        study.optimize(objective, n_trials=5)
        found.append([trial.params for trial in study.trials])
    assert found[0] == found[1]
    assert len({p["dropout"] for p in found[0]} | {p["x"] for p in found[0]}) == 10


@pytest.mark.parametrize("candidates", [(), (0,), (4, 2), (2, 2, 4), (-1, 2)])
def test_candidates_that_make_no_space_are_refused(candidates):
    with pytest.raises(RankSpaceError) as error:
        rank_sampler(layers=3, candidates=candidates)
    assert "\n" not in str(error.value)


def test_a_sum_below_the_smallest_allocation_is_refused():
    with pytest.raises(RankSpaceError, match="max_rank_sum 5 is below 6"):
        rank_sampler(layers=3, candidates=(2, 4), max_rank_sum=5)
