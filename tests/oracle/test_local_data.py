"""Local copies: found under every name, read in every layout, refused where they are wrong."""

from __future__ import annotations

import contextlib
import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import csv, parquet

from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.oracle.local_data import (
    BENCHMARKS,
    LAYOUTS,
    check_copies,
    convert,
    find_copy,
    load_split,
    read_rows,
)

CHOICES = {"text": ["red", "a blue one", "green"], "label": ["A", "B", "C"]}
LISTED = [{"text": t, "label": name} for t, name in zip(*CHOICES.values(), strict=True)]

HUB = {
    "boolq": {"question": "is it", "passage": "Sky -- It is.", "label": 1},
    "piqa": {"goal": "boil", "sol1": "heat it ", "sol2": "cool it", "label": 1},
    "hellaswag": {
        "activity_label": "Running",
        "ctx_a": "A man runs.",
        "ctx_b": "he",
        "endings": ["stops.", "flies.", "sings.", "melts."],
        "label": "2",
    },
    "winogrande": {"sentence": "A saw B, _ hid.", "option1": "A", "option2": "B", "answer": "2"},
    "arc_easy": {"question": "What?", "choices": CHOICES, "answerKey": "B"},
    "arc_challenge": {"question": "What?", "choices": CHOICES, "answerKey": "B"},
    "openbookqa": {"question_stem": "It is", "choices": CHOICES, "answerKey": "B"},
}
"""One document of each benchmark with the fields that lm-eval reads."""


def flat(head: str, word: str, question: str, choices: list[str], gold: int) -> dict[str, str]:
    """A row of LLM-Adapters; see its dataset folder."""
    gap, end = {"Solution": ("\n\n", "\n\n"), "Answer": (" ", "\n\n"), "Option": (" ", " ")}[word]
    listed = gap.join(f"{word}{i}: {choice}" for i, choice in enumerate(choices, start=1))
    names = [f"{word.lower()}{i}" for i in range(1, len(choices) + 1)]
    form = f"{end}Answer format: {'/'.join(names)}"
    return {
        "instruction": f"{head}{question}\n\n{listed}{form}",
        "input": "",
        "output": f"the correct answer is {names[gold]}",
        "answer": names[gold],
    }


PICK = "Please choose the correct answer to the question: "
SOLVE = "Please choose the correct solution to the question: "
FILL = "Please choose the correct answer to fill in the blank to complete the given sentence: "
TEXTS = CHOICES["text"]
NUMBERED = "\n\nAnswer1: a Answer2: b\n\nAnswer format"

OTHERS = [
    ("boolq", HUB["boolq"] | {"idx": 7}),
    ("boolq", HUB["boolq"] | {"label": True}),
    ("boolq", HUB["boolq"] | {"label": "1"}),
    ("boolq", {"question": "is it", "title": "Sky", "passage": "It is.", "answer": True}),
    ("boolq", {"question": "is it", "passage": "Sky -- It is.", "answer": "true"}),
    ("piqa", HUB["piqa"] | {"label": "1", "id": "x"}),
    ("piqa", {"query": "Question: boil\n", "choices": ["heat it ", "cool it"], "gold": 1}),
    ("piqa", flat(SOLVE, "Solution", "boil", ["heat it ", "cool it"], 1)),
    ("hellaswag", HUB["hellaswag"] | {"label": 2, "ind": 4, "source_id": "x"}),
    ("winogrande", HUB["winogrande"] | {"answer": 2, "qID": "x"}),
    ("winogrande", flat(FILL, "Option", "A saw B, _ hid.", ["A", "B"], 1)),
    *((name, flat(PICK, "Answer", "What?", TEXTS, 1)) for name in ("arc_easy", "arc_challenge")),
    ("openbookqa", flat(PICK, "Answer", "It is", TEXTS, 1)),
    ("openbookqa", {"query": "It is", "choices": TEXTS, "gold": 1}),
    ("arc_easy", {"query": "Question: What?\n", "choices": TEXTS, "gold": 1}),
    ("arc_challenge", {"query": "Question: What?\nAnswer:", "choices": TEXTS, "gold": "1"}),
    ("arc_easy", HUB["arc_easy"] | {"choices": LISTED, "id": "x"}),
    ("arc_easy", {"id": "x", "question": {"stem": "What?", "choices": LISTED}, "answerKey": "B"}),
    ("openbookqa", {"question": {"stem": "It is", "choices": LISTED}, "answerKey": " B"}),
]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


# ---------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(("benchmark", "row"), OTHERS)
def test_every_layout_gives_the_fields_that_lm_eval_reads(benchmark, row):
    assert convert([row], benchmark) == [HUB[benchmark]]


words = st.text(min_size=1, max_size=20)


@given(st.data(), st.sampled_from([(name, n) for name in LAYOUTS for n in (2, 4)]))
def test_a_converted_row_is_a_fixed_point(data, case):
    benchmark, count = case
    a, b, c = (data.draw(words) for _ in range(3))
    options = [data.draw(words) for _ in range(count)]
    gold = data.draw(st.integers(0, count - 1))
    listed = [{"text": option, "label": str(i)} for i, option in enumerate(options)]
    row = {
        "boolq": {"question": a, "title": b, "passage": c, "answer": bool(gold % 2)},
        "piqa": {"goal": a, "sol1": b, "sol2": c, "label": str(gold % 2)},
        "hellaswag": {
            **{"activity_label": a, "ctx_a": b, "ctx_b": c},
            **{"endings": options, "label": gold},
        },
        "winogrande": {"sentence": f"{a}_{b}", "option1": a, "option2": c, "answer": 1 + gold % 2},
        "openbookqa": {"question": {"stem": a, "choices": listed}, "answerKey": str(gold)},
    }.get(benchmark, {"query": a, "choices": options, "gold": gold})
    once = convert([row], benchmark)
    assert convert(once, benchmark) == once


tricky = st.lists(
    st.sampled_from(
        ["word", " ", "\n", "\n\n", "Answer1: ", "Answer2:", "Answer10:", "Answer format: ", "a/b"]
    ),
    min_size=1,
    max_size=5,
).map("".join)


@given(tricky, st.lists(tricky, min_size=2, max_size=4), st.data())
def test_a_flattened_row_is_taken_apart_exactly_or_refused(question, choices, data):
    gold = data.draw(st.integers(0, len(choices) - 1))
    row = flat(PICK, "Answer", question, choices, gold)
    labels = ["A", "B", "C", "D"][: len(choices)]
    original = {
        "question": question,
        "choices": {"text": choices, "label": labels},
        "answerKey": labels[gold],
    }
    with contextlib.suppress(OracleError):
        assert convert([row], "arc_easy") == [original]


# ------------------------------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    ("benchmark", "row", "message"),
    [
        ("piqa", {"a": 1, "b": 2}, r"row 1 is in no known layout of piqa: .* fields a, b; allowed"),
        ("piqa", {}, r"fields -; allowed are goal, sol1, sol2, label \| query, choices, gold"),
        ("piqa", {"goal": "a", "sol1": "b", "sol2": "c"}, "row 1 has no 'label'"),
        ("piqa", HUB["piqa"] | {"label": -1}, "label -1: a document without an answer"),
        ("hellaswag", HUB["hellaswag"] | {"label": ""}, "label '': a document without an answer"),
        ("winogrande", HUB["winogrande"] | {"answer": ""}, "without an answer"),
        ("arc_easy", HUB["arc_easy"] | {"answerKey": None}, "without an answer"),
        ("boolq", HUB["boolq"] | {"label": 2}, "label 2, which is not among .* allowed are 0, 1"),
        ("piqa", HUB["piqa"] | {"label": True}, "label True, which is not among"),
        ("winogrande", HUB["winogrande"] | {"answer": "0"}, "allowed are 1, 2"),
        ("hellaswag", HUB["hellaswag"] | {"label": 4}, "allowed are 0, 1, 2, 3"),
        ("openbookqa", HUB["openbookqa"] | {"answerKey": "D"}, "allowed are A, B, C"),
        ("arc_easy", flat(PICK, "Answer", "x", TEXTS, 0) | {"answer": "answer4"}, "answer3. Corr"),
        ("arc_easy", {"query": "x", "choices": TEXTS, "gold": 3}, "gold 3, which is not among"),
        ("piqa", {"query": "x", "choices": TEXTS, "gold": 0}, "3 choices; piqa has 2"),
        ("piqa", HUB["piqa"] | {"sol1": 3}, "sol1 3, which is not text"),
        ("hellaswag", HUB["hellaswag"] | {"endings": "a"}, "endings 'a', which is not a list"),
        ("winogrande", HUB["winogrande"] | {"sentence": "A hid."}, "without a blank _"),
        ("arc_easy", HUB["arc_easy"] | {"choices": ["a", "b"]}, "they need text and label"),
        (
            "arc_easy",
            HUB["arc_easy"] | {"choices": {"text": ["a"], "label": []}},
            "not a list of",
        ),
        (
            "arc_easy",
            HUB["arc_easy"] | {"choices": {"text": ["a"], "label": ["A", "B"]}},
            "1 choices but 2 labels",
        ),
        ("arc_easy", {"instruction": "What?", "answer": "answer1"}, "without guessing"),
        ("arc_easy", flat(PICK, "Option", "x", ["a", "b"], 0), "without guessing"),
        ("arc_easy", flat(PICK, "Answer", "x", ["a", ""], 0), "without guessing"),
        (
            "arc_easy",
            {"instruction": f"{PICK}x{NUMBERED}: answer1/answer3", "answer": "answer1"},
            "without guessing",
        ),
        ("arc_easy", "text", "row 1 is 'text', not an object"),
        # Layouts that lost the original fields.
        ("boolq", {"instruction": "...: is it?", "answer": "true"}, "in no known layout"),
        ("hellaswag", {"query": "A man", "choices": ["stops."], "gold": 0}, "in no known layout"),
        ("winogrande", {"context_options": ["A", "B"], "gold": 1}, "in no known layout"),
    ],
)
def test_a_bad_row_is_refused_in_one_line(benchmark, row, message):
    with pytest.raises(OracleError, match=message) as caught:
        convert([row], benchmark)
    assert "\n" not in str(caught.value)


def test_rows_are_counted_from_one_and_the_file_is_named(tmp_path):
    file = write_lines(tmp_path / "piqa" / "train.jsonl", [HUB["piqa"], HUB["piqa"], {"goal": ""}])
    with pytest.raises(OracleError, match=rf"^{file}, row 3 is in no known layout"):
        load_split(tmp_path, "piqa", "train")


# ---------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("benchmark", "split", "name"),
    [
        *((name, "train", f"{name}/train.jsonl") for name in BENCHMARKS),
        *((name, "test", f"{name}_test.json") for name in BENCHMARKS),
        ("boolq", "validation", "boolq/dev.jsonl"),
        ("boolq", "validation", "BoolQ/val.jsonl"),
        ("piqa", "validation", "piqa/valid.jsonl"),
        ("piqa", "validation", "physicaliqa-train-dev/dev.jsonl"),
        ("hellaswag", "validation", "hellaswag_val.jsonl"),
        ("hellaswag", "train", "hellaswag/hellaswag_train.jsonl"),
        ("winogrande", "validation", "winogrande_1.1/dev.jsonl"),
        ("winogrande", "train", "winogrande/train_xl.jsonl"),
        ("arc_easy", "test", "ARC-Easy-Test.jsonl"),
        ("arc_easy", "train", "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Train.jsonl"),
        ("arc_challenge", "test", "arc_challenge/ARC-Challenge-Test.jsonl"),
        ("openbookqa", "test", "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl"),
    ],
)
def test_a_copy_is_found_under_its_names(tmp_path, benchmark, split, name):
    write_lines(tmp_path / name, [HUB[benchmark]])
    assert load_split(tmp_path, benchmark, split) == [HUB[benchmark]]


@pytest.mark.parametrize("name", ["dev.jsonl", "train.jsonl", "boolq/test.jsonl", "piqa/dev.jsonl"])
def test_a_file_that_may_be_another_benchmark_or_split_is_not_taken(tmp_path, name):
    write_lines(tmp_path / name, [HUB["boolq"]])
    assert find_copy(tmp_path, "boolq", "validation") == []


def test_parquet_shards_of_the_hub_are_joined_in_order(tmp_path):
    rows = [HUB["arc_easy"] | {"question": str(i)} for i in range(5)]
    folder = tmp_path / "ai2_arc" / "ARC-Easy"
    for number in (3, 1, 0, 4, 2):
        write_parquet(folder / f"test-0000{number}-of-00005.parquet", rows[number : number + 1])
    assert load_split(tmp_path, "arc_easy", "test") == rows


def test_a_missing_shard_is_refused(tmp_path):
    write_parquet(tmp_path / "piqa" / "train-00000-of-00002.parquet", [HUB["piqa"]])
    with pytest.raises(OracleError, match=r"not complete: there are train-00000-of-00002\.parquet"):
        load_split(tmp_path, "piqa", "train")


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_format_gives_the_same_rows(tmp_path, benchmark):
    rows = [HUB[benchmark]] * 2
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / f"{benchmark}_train.parquet")
    (tmp_path / f"{benchmark}_test.json").write_text(json.dumps(rows, indent=1))
    with pa.ipc.new_stream(tmp_path / f"{benchmark}_validation.arrow", table.schema) as file:
        file.write_table(table)
    for split in ("train", "validation", "test"):
        assert load_split(tmp_path, benchmark, split) == rows
    if benchmark in ("piqa", "winogrande"):  # without lists
        (tmp_path / f"{benchmark}_train.parquet").unlink()
        csv.write_csv(table, tmp_path / f"{benchmark}_train.csv")
        assert load_split(tmp_path, benchmark, "train") == rows


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_list_and_lines_are_told_apart_by_content(tmp_path, suffix):
    file = tmp_path / f"rows{suffix}"
    rows = [{"text": "a\u2028b"}, {"text": "[c"}]
    for content in (json.dumps(rows, indent=2), "\n\n".join(json.dumps(row) for row in rows)):
        file.write_text("\ufeff" + content.replace("\\u2028", "\u2028"), encoding="utf-8")
        assert read_rows(file) == rows


def test_the_first_of_several_copies_counts(tmp_path):
    first = write_lines(tmp_path / "boolq" / "train.jsonl", [HUB["boolq"]])
    write_lines(tmp_path / "boolq_train.jsonl", [])
    assert find_copy(tmp_path, "boolq", "train") == [first]


# ----------------------------------------------------------------------------------- label files


def unlabeled(benchmark, field):
    return {key: value for key, value in HUB[benchmark].items() if key != field}


@pytest.mark.parametrize(
    ("benchmark", "field", "stem", "label"),
    [("piqa", "label", "valid", "1"), ("winogrande", "answer", "dev", "2")],
)
def test_labels_in_a_file_of_their_own_are_filled_in(tmp_path, benchmark, field, stem, label):
    write_lines(tmp_path / benchmark / f"{stem}.jsonl", [unlabeled(benchmark, field)] * 2)
    (tmp_path / benchmark / f"{stem}-labels.lst").write_text(f"{label}\n{label}\n")
    assert load_split(tmp_path, benchmark, "validation") == [HUB[benchmark]] * 2


def test_more_labels_than_rows_are_refused(tmp_path):
    write_lines(tmp_path / "piqa" / "train.jsonl", [unlabeled("piqa", "label")])
    (tmp_path / "piqa" / "train-labels.lst").write_text("0\n1\n")
    with pytest.raises(OracleError, match=r"train-labels\.lst has 2 labels for the 1 rows"):
        load_split(tmp_path, "piqa", "train")


def test_labels_that_contradict_the_rows_are_refused(tmp_path):
    write_lines(tmp_path / "winogrande" / "dev.jsonl", [HUB["winogrande"]] * 2)
    (tmp_path / "winogrande" / "dev-labels.lst").write_text("2\n1\n")
    with pytest.raises(OracleError, match=r"row 2 has answer '2', but dev-labels\.lst says '1'"):
        load_split(tmp_path, "winogrande", "validation")


# ------------------------------------------------------------------------------- missing, broken


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match=rf"data_dir {tmp_path / 'no'} is not a folder.*the hub"):
        load_split(tmp_path / "no", "boolq", "train")


def test_a_missing_file_is_named_in_its_preferred_form(tmp_path):
    path = tmp_path / "boolq" / "train.jsonl"
    with pytest.raises(ConfigError, match=rf"missing: {path} \(or .json, .parquet, .+\)\. Put"):
        load_split(tmp_path, "boolq", "train")


def test_all_missing_files_are_named_at_once(tmp_path):
    write_lines(tmp_path / "boolq_train.jsonl", [HUB["boolq"]])
    with pytest.raises(ConfigError) as caught:
        check_copies(tmp_path, [(name, "train") for name in BENCHMARKS])
    for name in BENCHMARKS:
        assert (f"{tmp_path / name / 'train.jsonl'}" in str(caught.value)) == (name != "boolq")


@pytest.mark.parametrize(("benchmark", "split"), [("bool", "train"), ("boolq", "dev")])
def test_an_unknown_name_is_refused(tmp_path, benchmark, split):
    with pytest.raises(ConfigError, match=r"Unknown (benchmark 'bool'|split 'dev'). Allowed are"):
        load_split(tmp_path, benchmark, split)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"\n", "has no rows"),
        ("rows.json", b"[]", "has no rows"),
        ("rows.jsonl", b'{"a": 1}\n\n{"a": 1\n', "cannot be read: JSON parse error"),
        ("rows.json", b'[{"a": 1},\n{"a" 1}]', "cannot be read: No ':' found"),
        ("rows.jsonl", b"\xff", "cannot be read: JSON parse error"),
        ("rows.parquet", b"no parquet at all", "cannot be read: Parquet magic bytes not found"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OracleError, match=message) as caught:
        read_rows(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_part_of_a_split_may_carry_its_number_of_rows(tmp_path):
    row = {"goal": "boil water", "sol1": "heat it", "sol2": "cool it", "label": 0}
    part = tmp_path / "piqa_validation1000.jsonl"
    part.write_text(json.dumps(row), encoding="utf-8")
    (tmp_path / "piqa_validation_notes.jsonl").write_text("no copy", encoding="utf-8")
    assert find_copy(tmp_path, "piqa", "validation") == [part]
    assert load_split(tmp_path, "piqa", "validation") == [row]
    (tmp_path / "piqa_validation20.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(OracleError, match=r"several parts .*1000\.jsonl, piqa_validation20"):
        load_split(tmp_path, "piqa", "validation")
    whole = tmp_path / "piqa_validation.json"
    whole.write_text(json.dumps(row), encoding="utf-8")
    assert find_copy(tmp_path, "piqa", "validation") == [whole]
