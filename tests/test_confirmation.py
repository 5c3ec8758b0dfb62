"""Confirmation: fresh seeds, chosen on search documents, the same after a break."""

from __future__ import annotations

import dataclasses

import pytest
from optuna.storages import InMemoryStorage

from rankadaptor_plugin.confirmation import (
    Confirmation,
    ConfirmationRun,
    fine_tunes,
    fresh_seeds,
    mean_objective,
    run_name,
)
from rankadaptor_plugin.errors import RecoveryError
from rankadaptor_plugin.ranks import RankAllocation
from rankadaptor_plugin.run_folder import RunFolder
from rankadaptor_plugin.scores import Score, TaskScore
from rankadaptor_plugin.study import TrialStore
from rankadaptor_plugin.trials import Phase, TrialState

A, B, C = (RankAllocation(ranks) for ranks in ((2, 12), (12, 2), (4, 10)))
UNIFORM = RankAllocation((7, 7))
SEEDS = fresh_seeds(5, choosing=2, comparing=3)


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

    def choose(self, allocation, seed):
        if len(self.calls) == self.fails_at:
            raise RecoveryError("broken off")
        self.calls.append((allocation, seed))
        value = self.objectives[allocation] + seed % 1000 / 7
        return ConfirmationRun(
            search=score(value),
            report=None,
            objective=value,
            train_loss=1 / 3,
            seconds={"recovery": 0.1, "oracle": 0.2},
        )

    def compare(self, allocation, seed):
        run = self.choose(allocation, seed)
        # On the report documents the order is the other way round: it must not matter.
        return dataclasses.replace(run, report=score(-run.objective))


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


@pytest.fixture
def store():
    return TrialStore(InMemoryStorage(), "confirm")


def confirmed(folder, store, run, finalists=(A, B), baseline_for=lambda _: UNIFORM, **more):
    more = {"on_run": lambda *_: None, **more}
    confirmation = Confirmation(
        choose=run.choose, compare=run.compare, folder=folder, store=store, seeds=SEEDS, **more
    )
    return confirmation.confirm(finalists, baseline_for)


OBJECTIVES = {A: 0.1, B: 0.3, C: 0.2, UNIFORM: 0.2}
WHOLE = [(a, s) for a in (A, B) for s in SEEDS.choosing]
WHOLE += [(a, s) for a in (B, UNIFORM) for s in SEEDS.comparing]


def test_seeds_are_fresh_and_those_that_compare_did_not_choose():
    many = fresh_seeds(0, 100, 100)
    assert len({*many.choosing, *many.comparing}) == 200
    assert {*many.choosing, *many.comparing}.isdisjoint(range(10_000))
    assert fresh_seeds(5, 2, 9).comparing[:3] == SEEDS.comparing


def test_the_better_finalist_on_the_search_documents_is_compared_on_other_seeds(folder, store):
    run, told, asked = ToyRuns(OBJECTIVES), [], []

    def baseline_for(allocation):
        asked.append(allocation)
        return UNIFORM

    result = confirmed(
        folder, store, run, baseline_for=baseline_for, on_run=lambda *args: told.append(args)
    )
    assert run.calls == WHOLE
    assert told == [(done, 10) for done in range(1, 11)]
    assert fine_tunes(2, SEEDS) == 10
    assert (result.searched, result.baseline, asked) == (B, UNIFORM, [B])
    assert (list(result.choosing), list(result.comparing)) == ([A, B], [B, UNIFORM])
    assert len(result.reports(B)) == 3
    assert mean_objective(result.choosing[B]) == pytest.approx(0.3 + 0.5 * 1 / 7 + 5 / 7)


def test_of_equal_finalists_the_better_one_in_the_search_goes_on(folder, store):
    run = ToyRuns(dict.fromkeys(OBJECTIVES, 0.5))
    assert confirmed(folder, store, run, finalists=(C, A, B)).searched == C


def test_a_single_finalist_is_compared_at_once(folder, store):
    run = ToyRuns(OBJECTIVES)
    result = confirmed(folder, store, run, finalists=(A,))
    assert run.calls == [(a, s) for a in (A, UNIFORM) for s in SEEDS.comparing]
    assert fine_tunes(1, SEEDS) == 6
    assert (result.searched, result.choosing) == (A, {})


def test_a_chosen_baseline_leaves_nothing_to_compare(folder, store):
    run, told = ToyRuns(OBJECTIVES), []
    finalists = (A, UNIFORM)
    result = confirmed(
        folder, store, run, finalists=finalists, on_run=lambda *args: told.append(args)
    )
    assert result.searched is None
    assert list(result.comparing) == [UNIFORM]
    assert told[-1] == (7, 7)


def test_finished_runs_are_not_repeated(folder, store):
    first = confirmed(folder, store, ToyRuns(OBJECTIVES))
    run = ToyRuns(OBJECTIVES)
    assert confirmed(folder, store, run) == first
    assert run.calls == []
    assert len(store.trials()) == 10


def test_a_run_that_lost_its_adapter_is_made_again(folder, store):
    first = confirmed(folder, store, ToyRuns(OBJECTIVES))
    run = ToyRuns(OBJECTIVES)
    lost = (UNIFORM, SEEDS.comparing[0])
    again = confirmed(folder, store, run, is_whole=lambda *args: args != lost)
    assert again == first
    assert run.calls == [lost]
    assert len(store.trials()) == 10


@pytest.mark.parametrize("finished", range(10))
def test_a_broken_confirmation_goes_on_to_the_same_result(tmp_path, finished):
    whole_store, store = (TrialStore(InMemoryStorage(), "confirm") for _ in range(2))
    whole = confirmed(RunFolder(tmp_path / "whole"), whole_store, ToyRuns(OBJECTIVES))
    folder = RunFolder(tmp_path / "broken")
    with pytest.raises(RecoveryError, match="broken off"):
        confirmed(folder, store, ToyRuns(OBJECTIVES, fails_at=finished))
    rest = ToyRuns(OBJECTIVES)
    assert confirmed(folder, store, rest) == whole
    assert rest.calls == WHOLE[finished:]
    assert store.trials() == whole_store.trials()


def test_a_run_whose_trial_was_not_stored_is_stored_later(folder, store):
    confirmed(folder, TrialStore(InMemoryStorage(), "lost"), ToyRuns(OBJECTIVES))
    run = ToyRuns(OBJECTIVES)
    confirmed(folder, store, run)
    assert run.calls == []
    trials = store.trials()
    assert [(t.allocation, t.seed) for t in trials] == WHOLE
    assert [t.position for t in trials] == list(range(10))
    assert {(t.phase, t.state) for t in trials} == {(Phase.CONFIRMATION, TrialState.COMPLETE)}


def test_the_report_keeps_its_documents_and_comes_back_equal(folder, store):
    result = confirmed(folder, store, ToyRuns(OBJECTIVES))
    (first, *_) = result.comparing[B]
    kept = folder.read_json(f"evaluations/{run_name(B, SEEDS.comparing[0])}.json")
    parquet = f"evaluations/{run_name(B, SEEDS.comparing[0])}.parquet"
    again = ConfirmationRun.from_json(kept)
    assert again.report.tasks["toy"].per_document == {}
    assert folder.with_documents(parquet, again.report) == first.report
    assert (
        first.report.tasks["toy"].per_document == score(-first.objective).tasks["toy"].per_document
    )
    assert first.search.tasks["toy"].values == score(first.objective).tasks["toy"].values


def test_names_of_runs_are_short_and_distinct():
    deep = RankAllocation((8,) * 200)
    seen = {run_name(a, s) for a in (A, B, C, UNIFORM, deep) for s in SEEDS.comparing}
    assert len(seen) == 15
    assert max(map(len, seen)) < 40
