"""Reading finished studies: what is taken, and what is said where nothing can be learned."""

from __future__ import annotations

import shutil
import sqlite3

import numpy as np
import optuna
import pytest

from rankadaptor_plugin.core.errors import ArtifactError, ConfigError
from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace, Setting
from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.core.trials import RECORD, Phase, Trial, TrialState
from rankadaptor_plugin.search.space import LAYERS, SPACE, LayerFeatures, space_to_json
from rankadaptor_plugin.search.transfer.studies import read_source

STUDY = RankSpace(
    candidates=(2, 4, 8),
    searchable=(False, True, True),
    default_rank=4,
    costs=(10, 10, 10),
    settings=(Setting("learning_rate", (1e-4, 3e-4), 1e-4),),
)
FEATURES = LayerFeatures(("relative_depth",), np.array([[0.0], [0.5], [np.nan]]))


def trial(position, ranks=(4, 2, 8), **changes):
    value = changes.pop("value", 0.5 + position / 100)
    score = Score(
        tasks={
            "boolq": TaskScore(
                values={"accuracy": value, "choice_logprob": value - 1}, stderr={}, documents=10
            ),
            "piqa": TaskScore(values={"accuracy": 0.5}, stderr={}, documents=10),
        }
    )
    state = changes.pop("state", TrialState.COMPLETE)
    complete = state is TrialState.COMPLETE
    return Trial(
        **{
            "position": position,
            "phase": Phase.INITIALIZATION,
            "allocation": RankAllocation(ranks, (("learning_rate", 3e-4),)),
            "seed": 0,
            "state": state,
            "score": score if complete else None,
            "objective": value if complete else None,
            **changes,
        }
    )


def write(path, trials, name="search", space=STUDY, features=FEATURES):
    study = optuna.create_study(
        storage=f"sqlite:///{path}", study_name=name, direction="maximize", load_if_exists=True
    )
    if space is not None:
        study.set_user_attr(SPACE, space_to_json(space))
    if features is not None:
        study.set_user_attr(LAYERS, features.to_json())
    for one in trials:
        complete = one.state is TrialState.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[one.state.name if complete else "FAIL"],
                value=one.objective,
                user_attrs={RECORD: one.to_json()},
            )
        )
    return path


@pytest.fixture
def run(tmp_path):
    write(tmp_path / "study.db", [trial(0), trial(1, (4, 8, 2)), trial(2, (4, 4, 4))])
    return tmp_path


@pytest.mark.parametrize("form", ["{}", "{}/study.db", "sqlite:///{}/study.db", "{}#search"])
def test_a_study_is_read_by_folder_file_or_url(run, form, caplog):
    (found,) = read_source(form.format(run))
    assert found.name == form.format(run).removesuffix("#search")
    assert found.space == STUDY
    assert found.features.names == FEATURES.names
    np.testing.assert_array_equal(found.features.values, FEATURES.values)
    assert found.rows.tolist() == [[4, 2, 8, 1], [4, 8, 2, 1], [4, 4, 4, 1]]
    assert found.columns == ("objective", "boolq/accuracy", "boolq/choice_logprob")
    assert found.tasks == ("boolq",)
    np.testing.assert_allclose(found.values[:, 0], [0.5, 0.51, 0.52])
    np.testing.assert_allclose(found.values[:, 2], [-0.5, -0.49, -0.48])
    assert caplog.messages == [
        f"{found.name}: piqa/accuracy is the same in all trials and is ignored."
    ]


def test_only_complete_trials_are_taken(tmp_path):
    failed = trial(1, state=TrialState.FAILED)
    infinite = [trial(0), failed, trial(4, value=float("inf")), trial(5, (4, 12, 1))]
    write(tmp_path / "study.db", infinite)
    with pytest.raises(ArtifactError, match="same scores"):
        read_source(str(tmp_path))  # one of them is infinite in every task that differs
    write(tmp_path / "b.db", [trial(0), failed, trial(5, (4, 12, 1))])
    (source,) = read_source(str(tmp_path / "b.db"))
    assert source.rows[:, :3].tolist() == [[4, 2, 8], [4, 12, 1]]


def test_without_a_study_named_search_all_that_say_their_space_are_read(tmp_path):
    path = tmp_path / "team.db"
    write(path, [trial(0), trial(1)], name="one")
    write(path, [trial(0), trial(1), trial(2)], name="two", features=None)
    write(path, [trial(0), trial(1)], name="other", space=None)
    one, two = read_source(str(path))
    assert [one.name, two.name] == [f"{path}#one", f"{path}#two"]
    assert two.features.values.shape == (3, 0)
    (chosen,) = read_source(f"{path}#two")
    assert len(chosen.rows) == 3
    write(path, [trial(0), trial(1)])
    assert [found.name for found in read_source(str(path))] == [str(path)]


def test_a_path_may_hold_a_number_sign_or_blanks(run):
    odd = run / "a #1 ?x=1&100%20{y}"
    odd.mkdir()
    shutil.move(run / "study.db", odd / "study.db")
    assert read_source(str(odd))[0].name == str(odd)
    assert len(read_source(f"{odd}#search")) == 1
    assert sorted(path.name for path in run.rglob("*")) == [odd.name, "study.db"]


def test_reading_changes_nothing(run):
    before = (run / "study.db").read_bytes()
    read_source(str(run))
    assert (run / "study.db").read_bytes() == before
    assert [path.name for path in run.iterdir()] == ["study.db"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/none", "There is no study .*none. Give a run folder"),
        ("{}/empty", "empty has no study.db"),
        ("sqlite:///{}/none.db", "There is no study .*none.db"),
        ("{}#mine", "There is no study 'mine' in .*. It has: search."),
        ("nonsense://", "cannot be read|is no storage URL"),
        ("", "There is no study|has no study.db"),
    ],
)
def test_what_is_not_there_is_named_and_not_made(run, spec, message, monkeypatch):
    (run / "empty").mkdir()
    monkeypatch.chdir(run / "empty")
    with pytest.raises((ConfigError, ArtifactError), match=message) as caught:
        read_source(spec.format(run))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in run.rglob("*")) == ["empty", "study.db"]


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        ([], "has 0 complete trials; it takes 2"),
        ([trial(0)], "has 1 complete trials; it takes 2"),
        ([trial(i, state=TrialState.FAILED) for i in range(3)], "all 3 trials failed"),
        ([trial(i, value=0.5) for i in range(3)], "all 3 trials have the same scores"),
        ([trial(0), trial(1, (4, 4))], "a trial does not have the 3 ranks of its rank space"),
    ],
)
def test_trials_that_nothing_can_be_learned_from_are_refused(tmp_path, trials, message):
    write(tmp_path / "study.db", trials)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_source(str(tmp_path))
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_study_of_an_earlier_version_is_refused(tmp_path):
    write(tmp_path / "study.db", [trial(0), trial(1)], space=None)
    with pytest.raises(ArtifactError, match=r"'search' in .* says not what its rank space was"):
        read_source(str(tmp_path))
    write(tmp_path / "b.db", [trial(0)], name="other", space=None)
    with pytest.raises(ArtifactError, match=r"No study in .* says what its rank space was"):
        read_source(str(tmp_path / "b.db"))


def test_torn_files_and_records_are_refused(tmp_path):
    path = tmp_path / "study.db"
    path.write_bytes(b"no database at all, but long enough to be one" * 10)
    with pytest.raises(ArtifactError, match=r"cannot be read: .*not a database"):
        read_source(str(tmp_path))
    path.unlink()
    sqlite3.connect(path).close()
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_source(str(tmp_path))
    path.unlink()
    write(path, [trial(0), trial(1)], features=LayerFeatures(("a",), np.zeros((2, 1))))
    with pytest.raises(ArtifactError, match="Features are stored for 2 slots"):
        read_source(str(tmp_path))
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{path}")
    study.set_user_attr(LAYERS, FEATURES.to_json())
    torn = optuna.trial.create_trial(value=1.0, user_attrs={RECORD: {"position": 3}})
    study.add_trial(torn)
    with pytest.raises(ArtifactError, match="the record of a trial cannot be read"):
        read_source(str(tmp_path))
