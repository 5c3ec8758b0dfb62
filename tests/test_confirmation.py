"""Confirmation: fresh seeds, chosen on search documents, the same after a break."""

from __future__ import annotations

import pytest
from optuna.storages import InMemoryStorage

from rankadaptor_plugin.confirmation import ConfirmationRun, confirm, fresh_seeds, run_name
from rankadaptor_plugin.errors import RecoveryError
from rankadaptor_plugin.ranks import RankAllocation
from rankadaptor_plugin.run_folder import RunFolder
from rankadaptor_plugin.scores import Score, TaskScore
from rankadaptor_plugin.study import TrialStore
from rankadaptor_plugin.trials import Phase, TrialState

A, B, C = (RankAllocation(ranks) for ranks in ((2, 12), (12, 2), (4, 10)))
UNIFORM = RankAllocation((7, 7))
SEEDS = fresh_seeds(5, 3)


def score(value: float) -> Score:
    task = TaskScore(
        values={"accuracy": value, "clp": value},
        stderr={"accuracy": 0.1, "clp": 0.1},
        documents=2,
        per_document={"accuracy": [value, value], "clp": [value / 3, value * 3]},
    )
    return Score(tasks={"toy": task})


class ToyRuns:
    """Fine-tunes that cost nothing; `objectives` holds the value on the search documents."""

    def __init__(self, objectives, fails_at=None):
        self.objectives, self.fails_at = objectives, fails_at
        self.calls = []

    def __call__(self, allocation, seed):
        if len(self.calls) == self.fails_at:
            raise RecoveryError("broken off")
        self.calls.append((allocation, seed))
        value = self.objectives[allocation] + (seed - SEEDS[0]) / 7
        # On the report documents the order is the other way round: it must not matter.
        return ConfirmationRun(
            search=score(value),
            report=score(-value),
            objective=value,
            train_loss=1 / 3,
            seconds={"recovery": 0.1, "oracle": 0.2},
        )


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


@pytest.fixture
def store():
    return TrialStore(InMemoryStorage(), "confirm")


def confirmed(folder, store, run, finalists=(A, B), baseline=UNIFORM, on_run=lambda *_: None):
    def baseline_for(allocation):
        return baseline[allocation] if isinstance(baseline, dict) else baseline

    return confirm(finalists, baseline_for, run, folder, store, SEEDS, on_run)


OBJECTIVES = {A: 0.1, B: 0.3, C: 0.2, UNIFORM: 0.2}


def test_seeds_are_fresh_and_distinct():
    assert len({*SEEDS}) == 3
    assert 5 not in SEEDS
    assert set(fresh_seeds(0, 100)).isdisjoint(range(10_000))
    assert fresh_seeds(5, 4)[:3] == SEEDS


def test_every_finalist_and_the_baseline_run_with_the_same_seeds(folder, store):
    run, told = ToyRuns(OBJECTIVES), []
    result = confirmed(folder, store, run, on_run=lambda *args: told.append(args))
    assert run.calls == [(a, seed) for a in (A, B, UNIFORM) for seed in SEEDS]
    assert told == [(done, 9) for done in range(1, 10)]
    assert result.seeds == SEEDS
    assert list(result.runs) == [A, B, UNIFORM]
    assert result.mean_objective(A) == pytest.approx(0.1 + 1 / 7)


def test_the_search_documents_choose(folder, store):
    asked = []

    def baseline_for(allocation):
        asked.append(allocation)
        return UNIFORM

    run = ToyRuns(OBJECTIVES)
    result = confirm((A, B), baseline_for, run, folder, store, SEEDS, lambda *_: None)
    assert (result.searched, result.baseline) == (B, UNIFORM)
    assert asked[-1] == B  # the budget of the one that goes on


def test_of_equal_finalists_the_better_one_in_the_search_goes_on(folder, store):
    run = ToyRuns(dict.fromkeys(OBJECTIVES, 0.5))
    assert confirmed(folder, store, run, finalists=(C, A, B)).searched == C


def test_a_baseline_among_the_finalists_runs_once(folder, store):
    run = ToyRuns(OBJECTIVES)
    result = confirmed(folder, store, run, finalists=(A, UNIFORM))
    assert len(run.calls) == 6
    assert (result.searched, result.baseline) == (None, UNIFORM)  # UNIFORM was better


def test_a_baseline_alone_leaves_nothing_to_compare(folder, store):
    result = confirmed(folder, store, ToyRuns(OBJECTIVES), finalists=(UNIFORM,))
    assert result.searched is None
    assert list(result.runs) == [UNIFORM]


def test_finished_runs_are_not_repeated(folder, store):
    first = confirmed(folder, store, ToyRuns(OBJECTIVES))
    run = ToyRuns(OBJECTIVES)
    assert confirmed(folder, store, run) == first
    assert run.calls == []
    assert len(store.trials()) == 9


@pytest.mark.parametrize("finished", range(9))
def test_a_broken_confirmation_goes_on_to_the_same_result(tmp_path, finished):
    whole_store, store = (TrialStore(InMemoryStorage(), "confirm") for _ in range(2))
    whole = confirmed(RunFolder(tmp_path / "whole"), whole_store, ToyRuns(OBJECTIVES))
    folder = RunFolder(tmp_path / "broken")
    with pytest.raises(RecoveryError, match="broken off"):
        confirmed(folder, store, ToyRuns(OBJECTIVES, fails_at=finished))
    rest = ToyRuns(OBJECTIVES)
    assert confirmed(folder, store, rest) == whole
    assert len(rest.calls) == 9 - finished
    assert store.trials() == whole_store.trials()


def test_a_run_whose_trial_was_not_stored_is_stored_later(folder, store):
    confirmed(folder, TrialStore(InMemoryStorage(), "lost"), ToyRuns(OBJECTIVES))
    run = ToyRuns(OBJECTIVES)
    confirmed(folder, store, run)
    assert run.calls == []
    trials = store.trials()
    assert [t.position for t in trials] == list(range(9))
    assert {(t.phase, t.state) for t in trials} == {(Phase.CONFIRMATION, TrialState.COMPLETE)}
    assert {(t.allocation, t.seed) for t in trials} == {
        (a, seed) for a in (A, B, UNIFORM) for seed in SEEDS
    }


def test_the_report_keeps_its_documents_and_comes_back_equal(folder, store):
    result = confirmed(folder, store, ToyRuns(OBJECTIVES))
    (first, *_) = result.runs[A]
    kept = folder.read_json(f"evaluations/{run_name(A, SEEDS[0])}.json")
    assert ConfirmationRun.from_json(kept) == first
    assert first.report == score(-first.objective)
    assert first.search.tasks["toy"].values == score(first.objective).tasks["toy"].values


def test_names_of_runs_are_short_and_distinct():
    deep = RankAllocation((8,) * 200)
    seen = {run_name(a, s) for a in (A, B, C, UNIFORM, deep) for s in SEEDS}
    assert len(seen) == 15
    assert max(map(len, seen)) < 40
