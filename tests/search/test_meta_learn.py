"""The command ``meta-learn``: studies in, one file out, one line for what is wrong."""

from __future__ import annotations

import numpy as np
import optuna
import pytest

from rankadaptor_plugin.core.ranks import RankSpace
from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.core.trials import RECORD, Phase, Trial, TrialState
from rankadaptor_plugin.search.space import LAYERS, SPACE, LayerFeatures, space_to_json
from rankadaptor_plugin.search.transfer.studies import MetaKnowledge


@pytest.fixture
def make_study(tmp_path):
    def make(name, layers=4, trials=5, tasks=("boolq", "piqa")):
        space = RankSpace(
            candidates=(2, 4, 8),
            searchable=(True,) * layers,
            default_rank=4,
            costs=(9,) * layers,
        )
        (tmp_path / name).mkdir()
        study = optuna.create_study(
            storage=f"sqlite:///{tmp_path / name / 'study.db'}",
            study_name="search",
            direction="maximize",
        )
        study.set_user_attr(SPACE, space_to_json(space))
        depth = np.linspace(0, 1, layers)[:, None]
        study.set_user_attr(LAYERS, LayerFeatures(("relative_depth",), depth).to_json())
        rng = np.random.default_rng(0)
        for position, row in enumerate(space.sample(trials, rng)):
            scores = {
                task: TaskScore(values={"choice_logprob": rng.normal()}, stderr={}, documents=9)
                for task in tasks
            }
            record = Trial(
                position=position,
                phase=Phase.INITIALIZATION,
                allocation=space.allocation(row),
                seed=0,
                state=TrialState.COMPLETE,
                score=Score(tasks=scores),
                objective=float(row.sum()),
            )
            study.add_trial(
                optuna.trial.create_trial(
                    value=record.objective, user_attrs={RECORD: record.to_json()}
                )
            )
        return tmp_path / name

    return make


def test_studies_are_collected_and_counted(make_study, tmp_path, command):
    one, two = make_study("one"), make_study("two", layers=6, trials=3, tasks=())
    out = tmp_path / "meta.safetensors"
    done = command("meta-learn", one, two / "study.db", "--out", out)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{one}: 5 trials of 4 layers, 2 tasks (boolq, piqa)",
        f"{two}/study.db: 3 trials of 6 layers, 0 tasks (none, the objective alone)",
        f"Wrote {out}. Use it with [search] meta.",
    ]
    first, second = MetaKnowledge.load(out).sources
    assert (first.space.layers, second.space.layers) == (4, 6)
    assert command("meta-learn", one, "--out", out).exit_code == 0  # replaced
    assert len(MetaKnowledge.load(out).sources) == 1


def test_a_study_that_is_named_twice_would_count_double(make_study, tmp_path, command):
    one, out = make_study("one"), tmp_path / "meta.safetensors"
    done = command("meta-learn", one, one / "study.db", "--out", out)
    assert done.exit_code == 2
    assert done.stderr == (
        f"Error: {one}/study.db holds the same trials as {one} and would count double. "
        "Name one of the two.\n"
    )
    assert not out.exists()


def test_bad_input_is_said_in_one_line_and_leaves_files_alone(make_study, tmp_path, command):
    one, note = make_study("one"), tmp_path / "note"
    note.write_text("mine")
    for words in (
        (one, "--out", note),
        (one, tmp_path / "none", "--out", tmp_path / "new"),
        (make_study("short", trials=1), "--out", tmp_path / "new"),
    ):
        done = command("meta-learn", *words)
        assert done.exit_code in {1, 2}
        assert done.stderr.startswith("Error: ")
        assert len(done.stderr.splitlines()) == 1
    assert note.read_text() == "mine"
    assert not (tmp_path / "new").exists()
