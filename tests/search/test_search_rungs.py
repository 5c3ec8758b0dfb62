"""Trials that are ended half way, and trials that are proposed together."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState as OptunaState

from rankadaptor_plugin.config.tables import PerformanceModelConfig, SearchConfig
from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace, Setting
from rankadaptor_plugin.core.trials import Outcome, Phase, Trial, TrialState
from rankadaptor_plugin.search import adaptive as adaptive_sampler
from rankadaptor_plugin.search import optuna_samplers
from rankadaptor_plugin.search import paper as samplers
from rankadaptor_plugin.search.contract import SamplerSettings
from rankadaptor_plugin.search.performance.performance_model import Prediction
from rankadaptor_plugin.search.search import StopReason, search
from rankadaptor_plugin.search.study import TrialStore
from rankadaptor_plugin.testing.search import SPACE, additive_value, planted_outcome

RUNG = 0.5
LEAST = 4  # values at the rung before one is ended there
GAIN = 10.0  # what the second half adds, so that halves and wholes cannot be taken for each other
CONFIG = SearchConfig(method="random", initial_trials=3, max_trials=14, rung=RUNG)
METHODS = {
    "paper": samplers.paper,
    "linear": adaptive_sampler.linear,
    "random": optuna_samplers.random,
    "tpe": optuna_samplers.tpe,
    "cmaes": optuna_samplers.cmaes,
}


class Nearest:
    """A quick performance model: the value of the nearest allocation measured so far."""

    def __init__(self, notes=None):
        self.notes = [] if notes is None else notes

    def pretrain(self, ranks, task_values):
        self.notes.append((ranks, task_values))

    def fit(self, ranks, values):
        self.ranks, self.values = ranks, values

    def predict(self, ranks):
        distance = np.abs(ranks[:, None] - self.ranks[None]).sum(axis=2)
        mean = self.values[distance.argmin(axis=1)]
        return Prediction(mean=mean, stddev=np.zeros(len(ranks)))


class Killed(BaseException):
    """Ends the process, as far as the search can tell."""


def objective(score):
    return score.tasks["exact"].values["clp"]


def shifted(outcome, by):
    task = outcome.score.tasks["exact"]
    tasks = {**outcome.score.tasks, "exact": replace(task, values={**task.values})}
    tasks["exact"].values["clp"] += by
    return replace(outcome, score=replace(outcome.score, tasks=tasks))


def evaluate(allocation, fidelity, seed, goes_on=None):
    """The planted function at the rung, and `GAIN` more at the end."""
    half = planted_outcome(allocation.ranks)
    value = objective(half.score)
    if goes_on is None:
        return shifted(half, GAIN)
    rungs = {RUNG: value}
    if goes_on(value):
        return replace(shifted(half, GAIN), rungs=rungs)
    return replace(half, fidelity=RUNG, rungs=rungs)


def factory(space, method, model=Nearest):
    def sampler_for(seed):
        return METHODS[method](
            SamplerSettings(
                space=space,
                seed=seed,
                search_seed=5,
                initial_trials=3,
                candidates=50,
                performance_model=model,
                model_config=PerformanceModelConfig(meta_epochs=5, epochs=5),
            )
        )

    return sampler_for


def new_store():
    return TrialStore(InMemoryStorage(), "study")


def run(*, method="random", store=None, config=CONFIG, measure=evaluate, space=SPACE, **more):
    sampler_for = more.pop("sampler_for", None) or factory(
        space, method, more.pop("model", Nearest)
    )
    store = new_store() if store is None else store
    return search(space, measure, store, sampler_for, config, objective, 2, **more)


def records(result):
    return [{**trial.to_json(), "seconds": None} for trial in result.trials]


# ----------------------------------------------------------------------------------------- rungs


@pytest.fixture(scope="module", params=["random", "linear"])
def searched(request):
    store = new_store()
    return run(method=request.param, store=store), store


def test_trials_end_below_the_median_of_those_before_and_only_there(searched):
    result, _ = searched
    before = []
    for trial in result.trials:
        value = trial.rungs[RUNG]
        assert value == pytest.approx(additive_value(np.array([trial.allocation.ranks]))[0])
        below = len(before) >= LEAST and value < np.median(before)
        assert trial.state is (TrialState.STOPPED if below else TrialState.COMPLETE)
        before.append(value)
    states = [trial.state for trial in result.trials]
    assert states[:LEAST] == [TrialState.COMPLETE] * LEAST
    assert 1 <= states.count(TrialState.STOPPED) < len(states) - LEAST
    assert result.stop is StopReason.MAX_TRIALS


def test_a_stopped_trial_has_no_objective_and_half_the_steps(searched):
    result, _ = searched
    for trial in result.trials:
        stopped = trial.state is TrialState.STOPPED
        assert trial.fidelity == (RUNG if stopped else 1.0)
        assert (trial.objective is None) == stopped
        assert objective(trial.score) == pytest.approx(
            trial.rungs[RUNG] + (0.0 if stopped else GAIN)
        )
        assert trial.reason is None


def test_stopped_trials_are_neither_the_best_nor_finalists_by_their_score(searched):
    result, _ = searched
    values = [t.objective for t in result.trials if t.state is TrialState.COMPLETE]
    assert result.best.objective == max(values)
    if not result.recommended:
        assert len(result.finalists(99)) == len(values)


def test_optuna_has_them_pruned_with_their_value_at_the_rung(searched):
    result, store = searched
    for trial, stored in zip(result.trials, store._study.trials, strict=True):
        stopped = trial.state is TrialState.STOPPED
        assert stored.state is (OptunaState.PRUNED if stopped else OptunaState.COMPLETE)
        assert stored.intermediate_values == {50: trial.rungs[RUNG]}
        if not stopped:
            assert stored.value == trial.objective


def test_a_stopped_trial_is_not_repeated_and_not_a_failure(searched):
    result, _ = searched
    assert len({trial.allocation for trial in result.trials}) == len(result.trials)
    falling = iter(sorted(SPACE.every().tolist(), key=lambda r: -additive_value(np.array([r]))[0]))

    class Falling(optuna.samplers.RandomSampler):
        """Proposes worse and worse, so that all but the first four are stopped."""

        def infer_relative_search_space(self, study, trial):
            return {}

    def place(allocation, fidelity, seed, goes_on=None):
        row = next(falling)
        return evaluate(RankAllocation(tuple(row)), fidelity, seed, goes_on)

    result = run(measure=place, sampler_for=lambda seed: Falling(seed=seed))
    states = [trial.state for trial in result.trials]
    assert states == [TrialState.COMPLETE] * LEAST + [TrialState.STOPPED] * 10


def test_without_a_rung_nobody_looks():
    def measure(*words):
        assert len(words) == 3
        return evaluate(*words)

    result = run(measure=measure, config=replace(CONFIG, rung=0.0, max_trials=6))
    assert {trial.state for trial in result.trials} == {TrialState.COMPLETE}
    assert not any(trial.rungs for trial in result.trials)


def test_trials_of_before_without_a_look_are_not_compared_with():
    store = new_store()
    run(store=store, config=replace(CONFIG, rung=0.0, max_trials=5))
    result = run(store=store)
    assert {t.state for t in result.trials[: 5 + LEAST]} == {TrialState.COMPLETE}
    assert TrialState.STOPPED in {t.state for t in result.trials}


def test_a_value_at_the_rung_that_is_no_number_ends_nothing_else():
    calls = []

    def measure(allocation, fidelity, seed, goes_on=None):
        calls.append(allocation)
        if len(calls) == 2:  # not a number half way, but at the end
            return replace(evaluate(allocation, fidelity, seed), rungs={RUNG: math.nan})
        return evaluate(allocation, fidelity, seed, goes_on)

    result = run(measure=measure)
    values = [t.rungs[RUNG] for t in result.trials if math.isfinite(t.rungs[RUNG])]
    best = [t for t in result.trials if t.rungs[RUNG] == max(values)]
    assert best[0].state is TrialState.COMPLETE
    assert sum(t.state is TrialState.COMPLETE for t in result.trials) > LEAST + 1


def test_a_failure_half_way_is_a_failed_trial():
    calls = []

    def measure(allocation, fidelity, seed, goes_on=None):
        calls.append(allocation)
        outcome = evaluate(allocation, fidelity, seed, goes_on)
        return shifted(outcome, math.nan) if len(calls) == 6 else outcome

    result = run(measure=measure)
    assert result.trials[5].state is TrialState.FAILED
    assert result.trials[5].rungs == {}
    assert len(result.trials) == 14


def test_the_models_learn_what_a_rung_lets_expect():
    fitted = []

    class Noting(Nearest):
        def fit(self, ranks, values):
            super().fit(ranks, values)
            fitted.append((ranks, values))

    result = run(
        method="paper", config=replace(CONFIG, method="paper", tolerance=0.0), model=Noting
    )
    assert TrialState.STOPPED in {t.state for t in result.trials}
    for ranks, values in fitted:
        # The planted halves and ends differ by the same everywhere, so the guess is exact.
        np.testing.assert_allclose(values, additive_value(ranks) + GAIN, atol=1e-9)


def test_offline_learning_mixes_no_halves_with_wholes():
    notes = []
    config = replace(CONFIG, method="paper", tolerance=0.0)

    def sampler_for(seed):
        return samplers.paper(
            SamplerSettings(
                space=SPACE,
                seed=seed,
                search_seed=5,
                initial_trials=10,
                candidates=50,
                performance_model=lambda: Nearest(notes),
                model_config=PerformanceModelConfig(),
            )
        )

    result = run(config=replace(config, initial_trials=10), sampler_for=sampler_for)
    assert TrialState.STOPPED in {t.state for t in result.trials[:10]}
    assert notes
    for ranks, values in notes:
        # Metrics in order of name, "exact" first: accuracy, clp, gold_ll, margin.
        np.testing.assert_allclose(values[:, 1], additive_value(ranks) + GAIN)


# ------------------------------------------------------------------------------- rungs and batches


@pytest.mark.parametrize("rung", [0.0, RUNG])
@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("method", ["paper", "linear", "tpe", "cmaes"])
def test_resumed_equals_uninterrupted(method, batch, rung):
    config = replace(CONFIG, method=method, tolerance=0.0, rung=rung, batch=batch, max_trials=9)
    whole = records(run(method=method, config=config))
    for break_at in (1, 5, 6, 8):
        store, calls = new_store(), []

        def measure(*words, calls=calls, break_at=break_at):
            calls.append(words)
            if len(calls) - 1 in (break_at, break_at + 1):  # killed twice in the same trial
                raise Killed
            return evaluate(*words)

        for _ in range(2):
            with pytest.raises(Killed):
                run(method=method, config=config, store=store, measure=measure)
        resumed = run(method=method, config=config, store=store, measure=measure)
        assert records(resumed) == whole
        assert resumed.interrupted == 2


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_a_sampler_does_not_see_the_values_of_its_own_batch(batch):
    seen = []

    class Spy(optuna.samplers.RandomSampler):
        def sample_relative(self, study, trial, search_space):
            others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
            running = [t for t in others if t.state is OptunaState.RUNNING]
            assert all(t.params and not t.user_attrs for t in running)
            assert not any(t.values or t.intermediate_values for t in running)
            seen.append((len(others) - len(running), len(running)))
            return {}

    run(config=replace(CONFIG, max_trials=9, batch=batch), sampler_for=lambda seed: Spy(seed=seed))
    assert seen == [(n - n % batch, n % batch) for n in range(9)]


@pytest.mark.parametrize("method", ["paper", "linear"])
def test_a_batch_proposes_distinct_allocations(method):
    config = replace(CONFIG, method=method, tolerance=0.0, batch=4, rung=0.0)
    result = run(method=method, config=config)
    assert len({trial.allocation for trial in result.trials}) == 14
    predicted = [t.predicted for t in result.trials]
    assert predicted[:4] != predicted[4:8]


def test_proposals_of_a_batch_do_not_depend_on_its_own_values():
    config = replace(CONFIG, method="linear", batch=4, max_trials=8, rung=0.0)

    def otherwise(allocation, fidelity, seed):
        outcome = evaluate(allocation, fidelity, seed)
        return shifted(outcome, -3.0) if len(calls) >= 4 else outcome

    calls = []

    def measure(*words):
        outcome = otherwise(*words)
        calls.append(words)
        return outcome

    one = run(method="linear", config=config)
    other = run(method="linear", config=config, measure=measure)
    assert [t.allocation for t in one.trials] == [t.allocation for t in other.trials]
    assert [t.objective for t in one.trials[4:]] != [t.objective for t in other.trials[4:]]


# ------------------------------------------------------------------------------ what the race gets


RATED = RankSpace(
    candidates=(2, 4, 8),
    searchable=(True,) * 3,
    default_rank=8,
    costs=(1, 1, 1),
    settings=(Setting("learning_rate", (1e-4, 1e-3), 1e-3),),
)


def test_uniform_lora_of_the_noise_floor_is_no_other_finalist_than_the_same_of_the_search():
    """The floor's allocations have no settings, those of the search always do."""
    store, uniform = new_store(), RATED.uniform()
    outcome = evaluate(uniform, 1.0, 2)
    first = Trial(
        position=0,
        phase=Phase.INITIALIZATION,
        allocation=uniform,
        seed=2,
        fidelity=1.0,
        state=TrialState.COMPLETE,
        score=outcome.score,
        objective=objective(outcome.score) + 1,
    )
    store.add(first, RATED)
    config = replace(CONFIG, method="linear", max_trials=6, rung=0.0)
    result = run(
        method="linear",
        store=store,
        config=config,
        space=RATED,
        finalists=9,
    )
    rows = [tuple(RATED.row(allocation)) for allocation in result.finalists(9)]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("method", ["linear", "ensemble", "auto"])
def test_a_pareto_search_ends_when_the_space_is_exhausted(method):
    space = replace(RATED, settings=())
    config = SearchConfig(method=method, max_trials=40)

    def sampler_for(seed):
        return getattr(adaptive_sampler, method)(
            SamplerSettings(
                space=space,
                seed=seed,
                search_seed=0,
                initial_trials=3,
                candidates=1,
                performance_model=Nearest,
                model_config=PerformanceModelConfig(meta_epochs=5, epochs=5),
                pareto=True,
            )
        )

    result = run(config=config, space=space, sampler_for=sampler_for)
    assert result.stop is StopReason.EXHAUSTED
    assert len(result.trials) == 27


def test_outcomes_are_whole_unless_they_say_otherwise():
    outcome = Outcome(score=evaluate(SPACE.uniform(), 1.0, 0).score, train_loss=1.0, seconds={})
    assert (outcome.fidelity, outcome.rungs) == (1.0, {})
