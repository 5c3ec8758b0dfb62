"""The trial store: records survive, killed processes leave nothing that counts."""

from __future__ import annotations

import contextlib
import sqlite3

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.exceptions import StorageInternalError
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState as OptunaState

from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.core.trials import Phase, Trial, TrialState
from rankadaptor_plugin.search.space import allocation_from
from rankadaptor_plugin.search.study import TrialStore, stored_trials
from rankadaptor_plugin.testing.search import SPACE

numbers = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(min_size=1, max_size=5)
tasks = st.builds(
    TaskScore,
    values=st.dictionaries(names, numbers, max_size=3),
    stderr=st.dictionaries(names, numbers, max_size=3),
    documents=st.integers(1, 999),
    accuracy_metric=st.sampled_from(["acc", "acc_norm"]),
)
trials = st.builds(
    Trial,
    position=st.integers(0, 99),
    phase=st.sampled_from(Phase),
    allocation=st.lists(st.integers(1, 99), min_size=1, max_size=8).map(
        lambda ranks: RankAllocation(tuple(ranks))
    ),
    seed=st.integers(0, 2**32),
    state=st.sampled_from(TrialState),
    score=st.none() | st.builds(Score, tasks=st.dictionaries(names, tasks, max_size=3)),
    objective=numbers,
    predicted=st.none() | numbers,
    train_loss=st.none() | numbers,
    seconds=st.dictionaries(names, numbers, max_size=3),
    reason=st.none() | st.text(),
    parameters=st.none() | st.integers(1, 10**12),
)

COMPLETE = Trial(
    position=0,
    phase=Phase.INITIALIZATION,
    allocation=RankAllocation((8, 2, 2, 2, 2, 2)),
    seed=1,
    state=TrialState.COMPLETE,
    objective=0.25,
)


def url(folder) -> str:
    return f"sqlite:///{folder}/trials.db"


def sampler() -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=0)


@settings(max_examples=40)
@given(trial=trials)
def test_any_record_comes_back_equal(trial):
    store = TrialStore(InMemoryStorage(), "study")
    store.finish(store.begin(sampler(), SPACE), trial)
    assert store.trials() == [trial]


def test_records_survive_in_a_file_in_order_of_position(tmp_path):
    failed = Trial(**{**vars(COMPLETE), "position": 1, "state": TrialState.FAILED, "reason": "x"})
    with TrialStore.open(url(tmp_path), "study") as store:
        for trial in (failed, COMPLETE):
            store.finish(store.begin(sampler(), SPACE), trial)
    with TrialStore.open(url(tmp_path), "study") as store:
        assert store.trials() == [COMPLETE, failed]
        store.settle()
        assert store.interrupted() == 0


def test_optuna_users_can_read_the_study(tmp_path):
    with TrialStore.open(url(tmp_path), "study") as store:
        pending = store.begin(sampler(), SPACE)
        store.finish(pending, COMPLETE)
        (trial,) = optuna.load_study(study_name="study", storage=url(tmp_path)).trials
        assert trial.state == OptunaState.COMPLETE
        assert trial.value == COMPLETE.objective
        assert allocation_from(SPACE, trial.params) == pending.allocation
        assert Trial.from_json(trial.user_attrs["rankadaptor_trial"]) == COMPLETE


def test_interrupted_trials_are_marked_and_do_not_count(tmp_path):
    with TrialStore.open(url(tmp_path), "study") as store:
        store.begin(sampler(), SPACE)
    with TrialStore.open(url(tmp_path), "study") as store:
        assert store.interrupted() == 1  # a reader sees it and changes nothing
        assert store._study.trials[0].state == OptunaState.RUNNING
        store.settle()
        assert store._study.trials[0].state == OptunaState.FAIL
        assert store._study.trials[0].user_attrs == {"reason": "interrupted"}
        assert store.interrupted() == 1
        assert store.trials() == []
        pending = store.begin(sampler(), SPACE)
        assert pending.number == 1
        store.finish(pending, COMPLETE)
        assert store.trials() == [COMPLETE]


@pytest.mark.parametrize("state", TrialState)
def test_a_trial_killed_after_its_record_was_written_is_finished(monkeypatch, state):
    trial = Trial(**{**vars(COMPLETE), "state": state})
    store = TrialStore(InMemoryStorage(), "study")
    with monkeypatch.context() as patch:
        patch.setattr(store, "_tell", lambda *_: None)
        store.finish(store.begin(sampler(), SPACE), trial)
    assert store.trials() == []
    store.settle()
    assert store.trials() == [trial]
    assert store.interrupted() == 0


def test_samplers_see_no_interrupted_trials():
    seen = []

    class Spy(optuna.samplers.RandomSampler):
        def sample_independent(self, study, trial, name, distribution):
            seen.append([t.number for t in study.get_trials(deepcopy=False)])
            return super().sample_independent(study, trial, name, distribution)

    store = TrialStore(InMemoryStorage(), "study")
    store.begin(sampler(), SPACE)
    store.settle()
    store.finish(store.begin(Spy(), SPACE), COMPLETE)
    store.begin(Spy(), SPACE)
    assert seen[0] == [0]
    assert seen[-1] == [0, 1]


@pytest.mark.parametrize(
    "bad", ["sqlite:////nonexistent/folder/trials.db", "not a url", "nosuchdb://user:secret@host/x"]
)
def test_storage_that_cannot_be_opened(bad):
    with pytest.raises(ArtifactError, match="cannot be opened") as error:
        TrialStore.open(bad, "study")
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_torn_file(tmp_path):
    (tmp_path / "trials.db").write_bytes(b"no database" * 100)
    with pytest.raises(ArtifactError, match="cannot be opened"):
        TrialStore.open(url(tmp_path), "study")


def test_foreign_study():
    storage = InMemoryStorage()
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    optuna.create_study(storage=storage, study_name="study", direction="minimize")
    optuna.logging.set_verbosity(verbosity)
    with pytest.raises(ArtifactError, match=r"\['minimize'\], not maximize"):
        TrialStore(storage, "study")


def test_a_database_that_fails_meanwhile_is_one_line_with_a_remedy(tmp_path):
    full = StorageInternalError("An exception is raised during the commit")
    full.__cause__ = OSError("database or disk is full")
    with (
        pytest.raises(ArtifactError, match=r"written: database or disk is full\. Free some space"),
        TrialStore.open(url(tmp_path), "study"),
    ):
        raise full


def test_what_is_stored_as_parameters_is_what_was_fine_tuned(tmp_path):
    ends = RankAllocation(tuple(SPACE.candidates[-1] for _ in range(SPACE.layers)))
    with TrialStore.open(url(tmp_path), "study") as store:
        pending = store.begin(sampler(), SPACE, place=lambda proposal: ends)
        store.finish(pending, COMPLETE)
    assert pending.allocation == ends
    assert pending.predicted is None
    (trial,) = optuna.load_study(study_name="study", storage=url(tmp_path)).trials
    assert set(trial.params.values()) == {SPACE.candidates[-1]}


@pytest.fixture
def talkative():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    yield optuna.logging.INFO
    optuna.logging.set_verbosity(before)


def test_is_quiet_and_leaves_the_verbosity_alone(tmp_path, capfd, talkative):
    with TrialStore.open(url(tmp_path), "study") as store:
        store.finish(store.begin(sampler(), SPACE), COMPLETE)
    assert optuna.logging.get_verbosity() == talkative
    assert capfd.readouterr() == ("", "")


def test_the_trials_of_a_study_can_be_read_while_somebody_writes_to_it(tmp_path, monkeypatch):
    database = tmp_path / "study.db"
    assert stored_trials(database, "search") == []
    with TrialStore.open(f"sqlite:///{database}", "search") as store:
        store.add(COMPLETE)
        assert stored_trials(database, "search") == [COMPLETE]
        assert stored_trials(database, "other") == []
    before = database.read_bytes()
    monkeypatch.setattr("rankadaptor_plugin.search.study._PATIENCE", 0.01)
    with contextlib.closing(sqlite3.connect(database)) as writer:
        writer.execute("BEGIN EXCLUSIVE")  # as of a process that was stopped in a write
        writer.execute("DELETE FROM trials")
        assert stored_trials(database, "search") == [COMPLETE]
        writer.rollback()
    assert database.read_bytes() == before


def test_a_torn_study_is_an_error_of_one_line(tmp_path):
    (tmp_path / "study.db").write_bytes(b"SQLite format 3" + bytes(100))
    with pytest.raises(ArtifactError, match="cannot be opened"):
        stored_trials(tmp_path / "study.db", "search")
