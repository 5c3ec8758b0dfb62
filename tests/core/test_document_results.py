from __future__ import annotations

import os
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankadaptor_plugin.core.document_results import read_documents, with_documents, write_documents
from rankadaptor_plugin.core.errors import ArtifactError, OracleError
from rankadaptor_plugin.core.scores import METRICS, Score, TaskScore


def task(per_document: dict[str, list[float]], keys: list[str] | None = None) -> TaskScore:
    documents = len(next(iter(per_document.values())))
    return TaskScore(
        values=dict.fromkeys(per_document, 0.5),
        stderr=dict.fromkeys(per_document, 0.1),
        documents=documents,
        per_document=per_document,
        keys=keys or [],
    )


SCORE = Score(
    tasks={
        "tiny_piqa": task({"accuracy": [1.0, 0.0], "choice_logprob": [-0.1, -2.5]}, ["b", "a"]),
        "text": task({"log_likelihood": [-3.0, -2.0, -1.0]}),
        "arc": task({"accuracy": [0.0], "choice_logprob": [-7.0]}, ["b"]),
    }
)


def bits(values) -> list[bytes]:
    return [struct.pack("<d", value) for value in values]


floats = st.one_of(
    st.floats(),
    st.sampled_from([0.0, -0.0, 1.0, float("nan"), -float("nan"), float("inf")]),
    st.integers(0x7FF0000000000001, 0x7FFFFFFFFFFFFFFF).map(  # not-a-numbers with a payload
        lambda i: struct.unpack("<d", struct.pack("<Q", i))[0]
    ),
)


# Arrow compares names up to the first NUL; no task can be called so.
NAMES = st.text(st.characters(exclude_characters="\x00", codec="utf-8"), max_size=8)


@st.composite
def scores(draw):
    tasks = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True)):
        size = draw(st.integers(1, 30))
        metrics = draw(st.lists(st.sampled_from(METRICS), min_size=1, max_size=4, unique=True))
        row = st.lists(floats, min_size=size, max_size=size)
        keys = draw(st.lists(st.text(max_size=4), min_size=size, max_size=size))
        tasks[name] = task({m: draw(row) for m in metrics}, keys)
    return Score(tasks=tasks)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scores())
def test_all_comes_back_bit_for_bit(tmp_path, score):
    path = tmp_path / "score.parquet"
    write_documents(path, score)
    found = with_documents(score, path)
    assert list(found.tasks) == list(score.tasks)
    for name, expected in score.tasks.items():
        got = found.tasks[name]
        assert got.keys == expected.keys
        assert got.per_document.keys() == expected.per_document.keys()
        for metric, values in expected.per_document.items():
            assert bits(got.per_document[metric]) == bits(values)
        assert (got.values, got.stderr, got.documents) == (
            expected.values,
            expected.stderr,
            expected.documents,
        )


def test_a_task_has_only_its_own_metrics(tmp_path):
    write_documents(tmp_path / "s.parquet", SCORE)
    read = read_documents(tmp_path / "s.parquet")
    assert {name: list(found.values) for name, found in read.items()} == {
        "tiny_piqa": ["accuracy", "choice_logprob"],
        "text": ["log_likelihood"],
        "arc": ["accuracy", "choice_logprob"],
    }
    assert all(v.dtype == np.float64 for found in read.values() for v in found.values.values())


def test_documents_without_names_are_named_by_their_position(tmp_path):
    write_documents(tmp_path / "s.parquet", SCORE)
    assert read_documents(tmp_path / "s.parquet")["text"].keys == ["0", "1", "2"]


def test_the_file_is_a_plain_table_for_other_tools(tmp_path):
    write_documents(tmp_path / "s.parquet", SCORE)
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.column_names == [
        "task",
        "document",
        "accuracy",
        "choice_logprob",
        "log_likelihood",
    ]
    assert table["task"].to_pylist() == ["tiny_piqa"] * 2 + ["text"] * 3 + ["arc"]
    assert table["accuracy"].to_pylist() == [1.0, 0.0, None, None, None, 0.0]
    about = pq.ParquetFile(tmp_path / "s.parquet").metadata.row_group(0).column(2)
    assert about.compression == "ZSTD"
    assert about.has_dictionary_page


def test_an_accuracy_takes_less_than_a_byte(tmp_path):
    answers = np.random.default_rng(0).integers(2, size=20_000).astype(float).tolist()
    write_documents(tmp_path / "s.parquet", Score(tasks={"t": task({"accuracy": answers})}))
    column = pq.ParquetFile(tmp_path / "s.parquet").metadata.row_group(0).column(2)
    assert column.total_compressed_size < len(answers) / 4


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "evaluations" / "s.parquet"
    write_documents(path, SCORE)
    write_documents(path, Score(tasks={"t": task({"choice_logprob": [-1.0]})}))
    assert list(read_documents(path)) == ["t"]
    assert os.listdir(path.parent) == ["s.parquet"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written") as caught:
        write_documents(tmp_path / "file" / "s.parquet", SCORE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "broken",
    [
        TaskScore(values={}, stderr={}, documents=2),
        TaskScore(values={}, stderr={}, documents=2, per_document={"choice_logprob": [-1.0]}),
        TaskScore(
            values={},
            stderr={},
            documents=1,
            per_document={"choice_logprob": [-1.0]},
            keys=["a", "b"],
        ),
    ],
)
def test_a_score_without_a_value_for_each_document_is_refused(broken, tmp_path):
    with pytest.raises(OracleError, match="Task t has"):
        write_documents(tmp_path / "s.parquet", Score(tasks={"t": broken}))
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ArtifactError, match=r"s\.parquet is missing") as caught:
        read_documents(tmp_path / "s.parquet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 3, 0.5, 0.99])
def test_a_torn_file_is_one_line(kept, tmp_path):
    path = tmp_path / "s.parquet"
    write_documents(path, SCORE)
    os.truncate(path, int(kept if kept > 1 else kept * path.stat().st_size))
    with pytest.raises(ArtifactError, match="cannot be read") as caught:
        read_documents(path)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_the_values_is_found(tmp_path):
    path = tmp_path / "s.parquet"
    write_documents(path, SCORE)
    about = pq.ParquetFile(path).metadata.row_group(0).column(3)
    content = bytearray(path.read_bytes())
    content[about.dictionary_page_offset + about.total_compressed_size - 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_documents(path)


@pytest.mark.parametrize(
    "table",
    [
        {"task": ["t"], "choice_logprob": [-1.0]},
        {"document": ["0"], "choice_logprob": [-1.0]},
        {"task": ["t"], "document": ["0"], "choice_logprob": ["bad"]},
        {"task": ["t", "t"], "document": ["0", "1"], "choice_logprob": [-1.0, None]},
        {"task": ["t", "t"], "document": ["0", None], "choice_logprob": [-1.0, -2.0]},
    ],
)
def test_another_table_is_refused(table, tmp_path):
    pq.write_table(pa.table(table), tmp_path / "s.parquet")
    with pytest.raises(ArtifactError, match="cannot be read") as caught:
        read_documents(tmp_path / "s.parquet")
    assert "\n" not in str(caught.value)


def test_a_file_of_another_score_is_refused(tmp_path):
    write_documents(tmp_path / "s.parquet", SCORE)
    other = Score(tasks={"tiny_piqa": SCORE.tasks["tiny_piqa"]})
    with pytest.raises(ArtifactError, match="by task, but the score is of"):
        with_documents(other, tmp_path / "s.parquet")
