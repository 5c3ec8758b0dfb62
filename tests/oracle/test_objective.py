"""The objective that the search maximizes, and what is checked of its table."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.tables import OracleConfig
from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.oracle.oracle import Objective, check, objective_metric

numbers = st.floats(-100, 100)


def score(**values):
    return Score(
        tasks={name: TaskScore.of({"choice_logprob": list(v)}) for name, v in values.items()}
    )


def oracle(*metrics, tasks=("a", "b")):
    return SimpleNamespace(
        metrics=lambda documents: metrics, weights=lambda documents: dict.fromkeys(tasks, 1.0)
    )


@given(numbers, numbers, st.floats(0.1, 5))
def test_the_mean_follows_the_weights(first, second, weight):
    weights = {"a": 1.0, "b": weight}
    found = Objective(metric="choice_logprob", weights=weights)(score(a=[first], b=[second]))
    assert found == pytest.approx((first + weight * second) / (1 + weight))
    assert found == pytest.approx(score(a=[first], b=[second]).mean("choice_logprob", weights))


def test_a_target_counts_alone():
    objective = Objective(metric="choice_logprob", target="b", weights={"a": 1.0, "b": 0.0})
    assert objective(score(a=[1.0], b=[2.0])) == 2.0


def test_the_metric_is_gold_logprob_or_what_the_oracle_has():
    config = OracleConfig(tasks=("a",))
    assert objective_metric(config, oracle("accuracy", "gold_logprob")) == "gold_logprob"
    assert objective_metric(config, oracle("log_likelihood")) == "log_likelihood"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective": "marign"},
            "'marign'. Did you mean 'margin'.* Allowed .* choice_logprob, margin",
        ),
        ({"target": "c"}, "'c', which has no search documents.* a, b"),
    ],
)
def test_an_objective_that_the_oracle_lacks_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        objective_metric(OracleConfig(tasks=("a",), **changes), oracle("choice_logprob", "margin"))


def test_a_score_needs_one_value_per_document_and_metric():
    with pytest.raises(OracleError, match="one per document"):
        TaskScore.of({"choice_logprob": [1.0], "margin": [1.0, 2.0]})
    with pytest.raises(OracleError, match="at least one document"):
        TaskScore.of({"choice_logprob": []})


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("task_path", "include_path"),
        ("num_fewshot", "include_path"),
        ("batch_size", "batch_tokens"),
    ],
)
def test_a_former_or_foreign_setting_is_answered_with_the_present_one(key, hint):
    with pytest.raises(ConfigError, match=f"oracle.{key} .*Did you mean '{hint}'"):
        run_file.from_dict({"oracle": {"tasks": ["a"], key: 1}})


@pytest.mark.parametrize("key", ["include_path", "data_dir"])
def test_a_missing_folder_is_refused(tmp_path, key):
    config = run_file.from_dict({"oracle": {"tasks": ["a"], key: str(tmp_path / "no")}})
    with pytest.raises(
        ConfigError, match=rf"\[oracle\] {key} .*no is not a folder. Name the folder"
    ):
        check(config)


def test_a_text_that_is_trained_on_is_refused(tmp_path):
    text = tmp_path / "corpus.jsonl"
    text.write_text('{"text": "a"}', encoding="utf-8")
    tables = {"corpus": {"path": str(text)}, "oracle": {"tasks": ["a"], "text": str(text)}}
    with pytest.raises(ConfigError, match="is the recovery corpus"):
        check(run_file.from_dict(tables))
    check(run_file.from_dict({**tables, "corpus": {}}))
