"""Our own search step: forecasts decide which model is asked, limits and directions are kept."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

from rankadaptor_plugin.config.tables import PerformanceModelConfig
from rankadaptor_plugin.core.errors import RankSpaceError, UnknownNameError
from rankadaptor_plugin.core.ranks import RankSpace
from rankadaptor_plugin.core.trials import RECORD
from rankadaptor_plugin.search.adaptive import (
    FORECAST,
    INITIAL_TRIALS,
    AdaptiveSampler,
    auto,
    ensemble,
    linear,
    rank_sampler,
)
from rankadaptor_plugin.search.contract import SamplerSettings
from rankadaptor_plugin.search.parameters import allocation_from, distributions
from rankadaptor_plugin.search.performance.performance_model import Prediction, PriorEffects
from rankadaptor_plugin.testing.search import SPACE, UNEVEN_SPACE, additive_value, suggest

TINY = RankSpace(candidates=(2, 4), searchable=(True, True), default_rank=4, costs=(1, 1))
SMALL = RankSpace(candidates=(2, 4, 8), searchable=(True,) * 3, default_rank=4, costs=(1, 2, 3))
LEAST = 5  # forecasts before the second model may be asked


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


def studied(models, trials, *, space=SPACE, direction="maximize", initial=3, pareto=False):
    sampler = AdaptiveSampler(
        space,
        {name: lambda model=model: model for name, model in models.items()},
        seed=0,
        initial_trials=initial,
        pareto=pareto,
    )
    study = optuna.create_study(direction=direction, sampler=sampler)
    study.optimize(lambda trial: value_of(trial, space), n_trials=trials)
    return study, sampler


def settings(space, **changes):
    given = {
        "space": space,
        "seed": 0,
        "search_seed": 0,
        "initial_trials": 3,
        "candidates": 1,
        "performance_model": lambda: pytest.fail("not this one's"),
        "model_config": PerformanceModelConfig(epochs=5, meta_epochs=5),
    }
    return SamplerSettings(**{**given, **changes})


# ----------------------------------------------------------------------------------- forecasts


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_every_proposal_stores_what_each_model_expects(direction):
    sign = 1 if direction == "maximize" else -1
    models = {
        "far": Planned(error=3.0, stddev=0.3, noise=0.4, sign=sign),
        "near": Planned(sign=sign),
    }
    study, sampler = studied(models, 5, direction=direction)
    for trial in study.trials[:3]:
        assert FORECAST not in trial.system_attrs
        assert sampler.predicted(trial.number) is None
    for trial in study.trials[3:]:
        forecast = trial.system_attrs[FORECAST]
        row = SPACE.row(allocation_from(SPACE, trial.params))
        assert forecast["row"] == row
        assert forecast["near"] == pytest.approx([trial.value, 0.1])
        # In the units of the study, with the noise of one measurement.
        assert forecast["far"] == pytest.approx([trial.value + sign * 3.0, 0.5])
        assert json.loads(json.dumps(forecast)) == forecast
        assert sampler.predicted(trial.number) == forecast["far"][0]  # it was the one asked


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_model_that_forecasts_better_is_asked_from_the_fifth_forecast_on(direction):
    sign = 1 if direction == "maximize" else -1
    models = {"far": Planned(error=3.0, sign=sign), "near": Planned(sign=sign)}
    _, sampler = studied(models, 3 + LEAST + 4, direction=direction)
    assert (len(models["far"].limits), len(models["near"].limits)) == (LEAST, 4)
    assert all(sampler.predicted(n) is not None for n in range(3, 3 + LEAST + 4))


def test_the_first_model_stays_where_it_forecasts_better():
    models = {"near": Planned(), "far": Planned(error=3.0)}
    studied(models, 3 + LEAST + 4)
    assert not models["far"].limits


def test_a_model_that_is_too_sure_of_itself_loses():
    models = {"sure": Planned(error=0.5, stddev=0.001), "humble": Planned(error=0.5, stddev=0.5)}
    studied(models, 3 + LEAST + 2)
    assert len(models["humble"].limits) == 2


def test_scores_are_mean_log_densities_of_what_was_measured():
    models = {"far": Planned(error=0.3, stddev=0.1), "near": Planned(stddev=0.1)}
    study, sampler = studied(models, 3 + LEAST - 1)
    assert sampler.scores(study) == {}
    study.optimize(value_of, n_trials=1)
    at_mean = -np.log(0.1) - 0.5 * np.log(2 * np.pi)
    assert sampler.scores(study) == pytest.approx({"far": at_mean - 4.5, "near": at_mean})
    study.optimize(value_of, n_trials=3)
    assert sampler.scores(study) == pytest.approx({"far": at_mean - 4.5, "near": at_mean})


def test_a_trial_that_was_moved_elsewhere_was_not_forecast():
    models = {"far": Planned(error=3.0), "near": Planned()}
    study, sampler = studied(models, 3 + LEAST - 1)
    trial = study.ask()
    value = value_of(trial)
    moved = next(
        r for r in SPACE.every().tolist() if r != SPACE.row(allocation_from(SPACE, trial.params))
    )
    trial.set_user_attr(RECORD, {"ranks": moved})
    study.tell(trial, value)
    assert sampler.scores(study) == {}


def test_failed_and_stopped_trials_are_no_forecasts_that_came_true():
    models = {"far": Planned(error=3.0), "near": Planned()}
    study, sampler = studied(models, 3 + LEAST - 1)
    for state in (optuna.trial.TrialState.FAIL, optuna.trial.TrialState.PRUNED):
        trial = study.ask()
        value_of(trial)
        study.tell(trial, state=state)
    assert sampler.scores(study) == {}


def test_a_model_without_doubt_leaves_finite_scores():
    models = {"certain": Planned(stddev=0.0), "wrong": Planned(error=1.0, stddev=0.0)}
    study, sampler = studied(models, 3 + LEAST)
    scores = sampler.scores(study)
    assert np.isfinite(list(scores.values())).all()
    assert scores["certain"] > scores["wrong"]


def test_a_fresh_sampler_finds_the_same_forecasts_in_the_study():
    models = {"far": Planned(error=3.0), "near": Planned()}
    study, sampler = studied(models, 3 + LEAST + 2)
    again = AdaptiveSampler(SPACE, {n: lambda m=m: m for n, m in models.items()}, seed=9)
    assert again.scores(study) == sampler.scores(study) != {}


# -------------------------------------------------------------------------------- recommending


def test_recommends_what_the_better_model_expects_most_of():
    models = {"far": Planned(error=3.0, sign=-1), "near": Planned()}
    study, sampler = studied(models, 3 + LEAST)
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
    study, sampler = studied({"near": Planned(sign=-1)}, 5, direction="minimize")
    lowest = SPACE.every()[additive_value(SPACE.every()).argmin()].tolist()
    assert sampler.recommend(study, 1) == [lowest]


def test_without_measurements_nothing_is_recommended():
    sampler = AdaptiveSampler(SPACE, {"near": Planned}, seed=0)
    assert sampler.recommend(optuna.create_study(sampler=sampler), 3) == []


@pytest.mark.parametrize("make", [linear, ensemble, auto])
def test_recommendations_lie_in_the_space_and_do_not_wear_out(make):
    space = replace(SPACE, budget=100)
    sampler = make(settings(space))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: value_of(trial, space), n_trials=5)
    rows = sampler.recommend(study, 3)
    assert rows == sampler.recommend(study, 3)
    for row in rows:
        space.check(space.allocation(row))


# ------------------------------------------------------------------------------------- proposals


@pytest.mark.parametrize("method", ["auto", "linear", "ensemble"])
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_either_direction_is_searched(method, direction):
    space = RankSpace(
        candidates=(2, 4, 6, 8), searchable=(True,) * 6, default_rank=4, costs=(1,) * 6
    )
    sampler = rank_sampler(layers=6, candidates=(2, 4, 6, 8), method=method, seed=1)
    study = optuna.create_study(direction=direction, sampler=sampler)
    study.optimize(lambda trial: value_of(trial, space), n_trials=14)
    every = np.sort(additive_value(space.every()))
    if direction == "minimize":
        assert study.best_value < np.quantile(every, 0.01)
    else:
        assert study.best_value > np.quantile(every, 0.99)


def test_the_first_proposals_are_random_and_as_many_as_asked_for():
    model = Planned()
    studied({"near": model}, 4, initial=4)
    assert not model.limits
    assert linear(settings(SPACE, initial_trials=0)).initial_trials == INITIAL_TRIALS
    assert linear(settings(SPACE, initial_trials=7)).initial_trials == 7


def test_with_a_prior_nothing_is_random():
    effects = tuple(np.linspace(-1.0, 1.0, len(levels)) for levels in SPACE.levels())
    prior = PriorEffects("earlier", effects)
    for make in (linear, ensemble, auto):
        sampler = make(settings(SPACE, initial_trials=0, priors=(prior,)))
        assert sampler.initial_trials == 0
        study = optuna.create_study(direction="maximize", sampler=sampler)
        value_of(trial := study.ask())
        assert FORECAST not in study.trials[0].system_attrs  # in which units could it be
        allocation = SPACE.check(allocation_from(SPACE, trial.params))
        random = SPACE.sample(200, np.random.default_rng(0))
        row = np.array([SPACE.row(allocation)])
        assert prior(SPACE, row)[0] > np.median(prior(SPACE, random))
        assert sampler.recommend(study, 1) == []


def test_pareto_draws_a_limit_for_every_proposal():
    model = Planned(space=SMALL)
    studied({"near": model}, 20, space=SMALL, pareto=True, initial=1)
    least, most = SMALL.parameters(SMALL.lowest()), 8 * sum(SMALL.costs)
    assert all(least <= limit <= most for limit in model.limits)
    assert len(set(model.limits)) > 8
    assert min(model.limits) < (least + most) / 2 < max(model.limits)
    model = Planned(space=SMALL)
    studied({"near": model}, 5, space=SMALL)
    assert model.limits == [None, None]


def test_pareto_keeps_to_max_parameters():
    space = replace(SMALL, max_parameters=30)
    model = Planned(space=space)
    studied({"near": model}, 15, space=space, pareto=True, initial=1)
    assert max(model.limits) <= 30


@pytest.mark.parametrize("make", [linear, ensemble])
def test_pareto_finds_both_ends_of_the_front(make):
    sampler = make(settings(SPACE, pareto=True))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(value_of, n_trials=14)
    sizes = [SPACE.parameters(allocation_from(SPACE, t.params)) for t in study.trials[3:]]
    least, most = SPACE.parameters(SPACE.lowest()), SPACE.parameters(SPACE.uniform())
    assert min(sizes) < least + 0.4 * (most - least)
    assert max(sizes) > least + 0.6 * (most - least)


@pytest.mark.parametrize("method", ["auto", "linear", "ensemble"])
def test_trials_that_run_side_by_side_differ(method):
    sampler = rank_sampler(layers=3, candidates=(2, 4, 8), method=method)
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
    sampler = rank_sampler(layers=6, candidates=(2, 4, 6, 8), method="linear")
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: value_of(trial, space), n_trials=8, n_jobs=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 8


@pytest.mark.parametrize("method", ["auto", "linear", "ensemble"])
def test_an_exhausted_space_is_an_error(method):
    sampler = rank_sampler(layers=2, candidates=(2, 4), method=method)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: value_of(trial, TINY), n_trials=4)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 4
    with pytest.raises(RankSpaceError, match="All allocations of the rank space were tried, 4"):
        study.ask(distributions(TINY))


@pytest.mark.parametrize("make", [linear, ensemble, auto])
def test_pareto_tries_the_whole_of_a_small_space(make):
    sampler = make(settings(TINY, pareto=True, initial_trials=1))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: value_of(trial, TINY), n_trials=4)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 4


@pytest.mark.parametrize("method", ["auto", "linear", "ensemble"])
def test_equal_values_are_survived(method):
    sampler = rank_sampler(layers=4, candidates=(2, 4, 8), method=method)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    space = replace(SMALL, searchable=(True,) * 4, costs=(1,) * 4)

    def objective(trial):
        value_of(trial, space)
        return 0.25

    study.optimize(objective, n_trials=3 + LEAST + 2)
    scores = sampler.scores(study)
    assert set(scores) == ({"linear", "ensemble"} if method == "auto" else {method})
    assert np.isfinite(list(scores.values())).all()
    assert len(sampler.recommend(study, 2)) == 2


def test_uniform_lora_beyond_the_candidates_is_learned_from():
    space = UNEVEN_SPACE  # candidates 1, 2, 8 and default rank 4
    study = optuna.create_study(direction="maximize", sampler=auto(settings(space)))
    record = {RECORD: {"ranks": [4, 4, 4, 4]}}
    study.add_trial(optuna.trial.create_trial(value=1.3, user_attrs=record))
    study.optimize(lambda trial: value_of(trial, space), n_trials=5)
    for trial in study.trials[1:]:
        space.check(allocation_from(space, trial.params))


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
    sampler = rank_sampler(layers=3, candidates=(1, 2, 8), max_rank_sum=11, method="linear")
    study = optuna.create_study(direction="maximize", sampler=sampler)

    def objective(trial):
        ranks = [trial.suggest_categorical(f"layer_{i:02d}", (1, 2, 8)) for i in range(3)]
        assert sum(ranks) <= 11
        return float(sum(ranks))

    study.optimize(objective, n_trials=8)
    assert study.best_value == 11


def test_rank_0_may_be_a_candidate():
    sampler = rank_sampler(layers=3, candidates=(0, 4), method="linear")
    study = optuna.create_study(direction="maximize", sampler=sampler)

    def objective(trial):
        return float(sum(trial.suggest_int(f"layer_{i:02d}", 0, 4, step=4) for i in range(3)))

    study.optimize(objective, n_trials=7)
    assert min(trial.value for trial in study.trials) > 0


def test_further_parameters_are_drawn_at_random_and_again_the_same():
    found = []
    for _ in range(2):
        sampler = rank_sampler(layers=2, candidates=(2, 4, 6, 8), method="linear")
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


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(UnknownNameError, match="Did you mean 'linear'"):
        rank_sampler(layers=3, candidates=(2, 4), method="linaer")
