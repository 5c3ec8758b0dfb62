"""The search on an oracle without a model: stops, failures, resuming, and what it finds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from optuna.storages import InMemoryStorage

from rankadaptor_plugin.config.tables import PerformanceModelConfig, SearchConfig
from rankadaptor_plugin.core.errors import ArtifactError, OracleError, RecoveryError
from rankadaptor_plugin.core.ranks import RankSpace, Setting
from rankadaptor_plugin.core.trials import Phase, Trial, TrialState
from rankadaptor_plugin.search import paper as samplers
from rankadaptor_plugin.search import samplers as optuna_samplers
from rankadaptor_plugin.search.bayes import bayes
from rankadaptor_plugin.search.performance.mlp import mlp
from rankadaptor_plugin.search.performance.performance_model import Prediction
from rankadaptor_plugin.search.samplers import SamplerSettings
from rankadaptor_plugin.search.search import StopReason, search
from rankadaptor_plugin.search.study import TrialStore
from rankadaptor_plugin.testing.search import SPACE, additive_value, planted_outcome

BUDGET_SPACE = replace(SPACE, budget=100)
TINY = RankSpace(candidates=(2, 4), searchable=(True, True), default_rank=4, costs=(1, 1))
CONFIG = SearchConfig(method="paper", n_startup_trials=3, n_trials=7, candidates=50)


METHODS = {
    "paper": samplers.paper,
    "bayes": bayes,
    "random": optuna_samplers.random,
    "tpe": optuna_samplers.tpe,
}
PREDICTING = {"paper", "bayes"}


class Nearest:
    """A quick performance model: the value of the nearest allocation measured so far."""

    def pretrain(self, ranks, task_values):
        pass

    def fit(self, ranks, values):
        self.ranks, self.values = ranks, values

    def predict(self, ranks):
        distance = np.abs(ranks[:, None] - self.ranks[None]).sum(axis=2)
        mean = self.values[distance.argmin(axis=1)]
        return Prediction(mean=mean, stddev=np.zeros(len(ranks)))


class Truth(Nearest):
    """Predicts what will be measured, up to an error."""

    def __init__(self, error=0.0):
        self.error = error

    def predict(self, ranks):
        return Prediction(mean=additive_value(ranks) + self.error, stddev=np.zeros(len(ranks)))


class Killed(BaseException):
    """Ends the process, as far as the search can tell."""


def factory(space, name="paper", config=CONFIG, model=Nearest):
    def sampler_for(seed):
        return METHODS[name](
            SamplerSettings(
                space=space,
                seed=seed,
                n_startup_trials=config.n_startup_trials,
                candidates=config.candidates,
                performance_model=model,
            )
        )

    return sampler_for


def new_store():
    return TrialStore(InMemoryStorage(), "study")


def objective(score):
    return score.tasks["exact"].values["choice_logprob"]


def run(space=SPACE, *, evaluate=None, store=None, name="paper", config=CONFIG, seed=0, **more):
    model = more.pop("model", Nearest)
    return search(
        space,
        evaluate or (lambda allocation, seed: planted_outcome(allocation.ranks)),
        store or new_store(),
        factory(space, name, config, model),
        config,
        seed,
        **more,
    )


def records(result):
    return [{**trial.to_json(), "seconds": None} for trial in result.trials]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("space", [SPACE, BUDGET_SPACE])
def test_trials_are_numbered_distinct_and_in_the_space(space, name):
    calls, seen = [], []

    def evaluate(allocation, seed):
        calls.append((space.check(allocation), seed))
        return planted_outcome(allocation.ranks)

    result = run(space, evaluate=evaluate, name=name, seed=3, on_trial=seen.append)
    assert result.stop is StopReason.N_TRIALS
    assert tuple(seen) == result.trials
    assert [trial.position for trial in result.trials] == list(range(7))
    phases = [trial.phase for trial in result.trials]
    assert phases == [Phase.INITIALIZATION] * 3 + [Phase.ITERATION] * 4
    assert len({trial.allocation for trial in result.trials}) == 7
    # Every allocation is fine-tuned with the same seed: common random numbers.
    assert calls == [(trial.allocation, 3) for trial in result.trials]
    for trial in result.trials:
        assert trial.state is TrialState.COMPLETE
        assert trial.objective == objective(trial.score)
        assert trial.seconds.keys() == {"search", "recovery"}
        assert (trial.predicted is not None) == (name in PREDICTING and trial.position >= 3)
        assert trial.parameters == space.parameters(trial.allocation)


def test_best_and_finalists():
    result = run()
    values = sorted((trial.objective for trial in result.trials), reverse=True)
    assert result.best.objective == values[0]
    best = result.finalists(3)
    assert best[0] == result.best.allocation
    np.testing.assert_allclose(additive_value(np.array([a.ranks for a in best])), values[:3])
    assert len(result.finalists(99)) == 7


def test_seeds_decide():
    assert records(run(seed=1)) == records(run(seed=1))
    assert records(run(seed=1)) != records(run(seed=2))


@pytest.mark.parametrize("patience", [1, 2])
def test_stops_when_predictions_come_true(patience):
    config = replace(CONFIG, tolerance=0.01, patience=patience)
    result = run(config=config, model=lambda: Truth(error=0.009))
    assert result.stop is StopReason.CONVERGED
    assert len(result.trials) == 3 + patience
    assert len(run(config=config, model=lambda: Truth(error=0.011)).trials) == 7
    assert len(run(config=replace(config, tolerance=0.0), model=Truth).trials) == 7


@pytest.mark.parametrize("name", METHODS)
def test_stops_when_the_space_is_exhausted(name):
    result = run(TINY, name=name)
    assert result.stop is StopReason.EXHAUSTED
    assert {trial.allocation.ranks for trial in result.trials} == {(2, 2), (2, 4), (4, 2), (4, 4)}


def test_a_finished_search_is_not_run_again():
    for space, config in ((SPACE, CONFIG), (TINY, CONFIG)):
        store = new_store()
        first = run(space, store=store, config=config)
        again = run(space, store=store, config=config, evaluate=lambda *_: pytest.fail("evaluated"))
        assert again == first


def test_a_larger_budget_continues_the_search():
    store = new_store()
    run(store=store, config=replace(CONFIG, n_trials=5))
    assert records(run(store=store)) == records(run())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("space", [SPACE, BUDGET_SPACE])
def test_resumed_equals_uninterrupted_at_every_break_point(space, name):
    whole = records(run(space, name=name))
    for break_at in range(CONFIG.n_trials):
        store = new_store()
        calls = []

        def evaluate(allocation, seed, calls=calls, break_at=break_at):
            calls.append(allocation)
            if len(calls) in (break_at + 1, break_at + 2):  # killed twice in the same trial
                raise Killed
            return planted_outcome(allocation.ranks)

        for _ in range(2):
            with pytest.raises(Killed):
                run(space, evaluate=evaluate, store=store, name=name)
        resumed = run(space, evaluate=evaluate, store=store, name=name)
        assert records(resumed) == whole
        assert resumed.interrupted == 2


def failing(positions, error=None):
    calls = []

    def evaluate(allocation, seed):
        calls.append(allocation)
        if len(calls) - 1 in positions:
            if error is not None:
                raise error
            outcome = planted_outcome(allocation.ranks)
            outcome.search.tasks["noisy"].values["choice_logprob"] = math.nan
            return outcome
        return planted_outcome(allocation.ranks)

    return evaluate


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RecoveryError("The loss is nan."), "The loss is nan."),
        (OracleError("No task."), "No task."),
        (None, "A score is not a finite number"),
    ],
)
def test_failed_trials_are_survived(error, reason):
    result = run(evaluate=failing({1, 4, 5}, error))
    assert len(result.trials) == 7
    assert len({trial.allocation for trial in result.trials}) == 7
    for trial in result.trials:
        failed = trial.position in {1, 4, 5}
        assert trial.state is (TrialState.FAILED if failed else TrialState.COMPLETE)
        assert (trial.objective is None) == (trial.score is None) == failed
        assert (trial.reason or "").startswith(reason if failed else "")
        assert (trial.reason is None) != failed
    assert len(result.finalists(9)) == 4


def test_a_failed_trial_interrupts_convergence():
    config = replace(CONFIG, tolerance=0.01, n_trials=9)
    result = run(evaluate=failing({4}, OracleError("x")), config=config, model=Truth)
    assert result.stop is StopReason.CONVERGED
    assert len(result.trials) == 7  # 3 initial, close, failed, close, close


def test_three_failures_in_a_row_end_the_search_and_it_can_go_on():
    store = new_store()
    with pytest.raises(
        RecoveryError, match=r"3 trials in a row failed.*trial 5.*No task\."
    ) as error:
        run(evaluate=failing({2, 3, 4}, OracleError("No task.")), store=store)
    assert "run the same command again" in str(error.value)
    result = run(store=store)  # earlier failures are not held against this call
    assert len(result.trials) == 7
    assert [t.position for t in result.trials if t.state is TrialState.FAILED] == [2, 3, 4]


def test_too_few_complete_trials():
    config = replace(CONFIG, n_trials=3, max_failures=9)
    with pytest.raises(RecoveryError, match=r"Only 1 of 3 trials.*The last failure: No task\."):
        run(evaluate=failing({0, 2}, OracleError("No task.")), config=config)


def test_other_exceptions_propagate_and_leave_the_trial_interrupted():
    store = new_store()
    with pytest.raises(ZeroDivisionError):
        run(evaluate=failing({1}, ZeroDivisionError()), store=store)
    result = run(store=store)
    assert result.interrupted == 1
    assert records(result) == records(run())


def test_a_store_of_another_space_is_refused():
    store = new_store()
    run(store=store)
    with pytest.raises(
        ArtifactError, match="different rank space: it has 6 layers, now there are 2"
    ):
        run(TINY, store=store)


def test_the_papers_search_beats_random_search_on_a_planted_function():
    space = RankSpace(
        candidates=(2, 4, 6, 8, 10, 12),
        searchable=(True,) * 12,
        default_rank=8,
        costs=(1,) * 12,
        budget=96,
    )
    config = SearchConfig(method="paper", n_startup_trials=6, n_trials=20, candidates=2000)

    def network():
        return mlp(space, PerformanceModelConfig(meta_epochs=100, epochs=100), 0)

    gains = []
    for seed in range(3):
        paper, random = (
            run(space, name=name, config=config, model=network, seed=seed)
            for name in ("paper", "random")
        )
        gains.append(paper.best.objective - random.best.objective)
    assert np.mean(gains) > 0


def test_one_candidate_per_step_does_not_end_the_papers_search():
    space = replace(TINY, candidates=(2, 4, 6), searchable=(True,) * 3, costs=(1,) * 3)
    config = replace(CONFIG, candidates=1, n_trials=27)
    result = run(space, config=config)
    assert len({trial.allocation for trial in result.trials}) == 27


def test_a_front_is_searched_until_the_space_is_exhausted():
    space = replace(TINY, candidates=(2, 4, 8), searchable=(True,) * 3, costs=(1, 2, 3))

    def sampler_for(seed):
        settings = SamplerSettings(
            space=space,
            seed=seed,
            n_startup_trials=2,
            candidates=1,
            performance_model=Nearest,
            pareto=True,
        )
        return bayes(settings)

    def evaluate(allocation, seed):
        return planted_outcome(allocation.ranks)

    config = replace(CONFIG, method="bayes", n_trials=30)
    result = search(space, evaluate, new_store(), sampler_for, config, 0)
    assert (result.stop, len(result.trials)) == (StopReason.EXHAUSTED, 27)


@pytest.mark.parametrize("name", ["paper", "bayes"])
def test_what_failed_is_no_finalist(name):
    """The highest ranks diverge, which a model can only guess to be good."""

    def evaluate(allocation, seed):
        if sum(allocation.ranks) > 36:
            raise RecoveryError("The loss is nan.")
        return planted_outcome(allocation.ranks)

    config = replace(CONFIG, n_trials=14, max_failures=99)
    result = run(evaluate=evaluate, name=name, config=config)
    failed = {t.allocation for t in result.trials if t.state is TrialState.FAILED}
    assert failed
    assert failed.isdisjoint(result.finalists(3))


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
    outcome = planted_outcome(uniform.ranks)
    first = Trial(
        position=0,
        phase=Phase.INITIALIZATION,
        allocation=uniform,
        seed=2,
        state=TrialState.COMPLETE,
        score=outcome.search,
        objective=outcome.objective + 1,
    )
    store.add(first, RATED)
    result = run(RATED, name="bayes", store=store)
    rows = [tuple(RATED.row(allocation)) for allocation in result.finalists(9)]
    assert len(set(rows)) == len(rows)
