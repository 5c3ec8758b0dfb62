"""The recovery corpus: forms, borders of the loss, and what is refused."""

from __future__ import annotations

import json
import logging

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.run_file import is_hub_name
from rankadaptor_plugin.config.tables import CorpusConfig
from rankadaptor_plugin.core.errors import ConfigError, CorpusError
from rankadaptor_plugin.corpus.corpus import check, load_corpus, split_rows
from rankadaptor_plugin.corpus.rows import ALPACA, read_rows
from rankadaptor_plugin.corpus.sequences import IGNORED

BOS, EOS, UNK = 0, 1, 2
FRAMES = ["$A", "<s> $A", "<s> $A </s>", "$A </s>"]
ROW = {"instruction": "w1 w2", "input": "w3", "output": "w4 w5"}


def ids(*numbers: int) -> list[int]:
    return [n + 3 for n in numbers]  # w0 is token 3


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            lines = [json.dumps(row) for row in content]
            text = "[" + ",\n".join(lines) + "]" if name.endswith(".json") else "\n".join(lines)
        else:
            text = content
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize("frame", FRAMES)
def test_a_response_is_trained_from_its_first_token_to_one_end(written, make_tokenizer, frame):
    corpus = load_corpus(
        written("c.jsonl", [ROW]), make_tokenizer(frame), CorpusConfig(template="plain")
    )
    begin = [BOS] if "<s>" in frame else []
    prompt = begin + ids(1, 2, 3)
    (sequence,) = corpus.sequences
    assert sequence.tokens.tolist() == [*prompt, *ids(4, 5), EOS]
    assert sequence.labels.tolist() == [IGNORED] * len(prompt) + [*ids(4, 5), EOS]
    assert corpus.dropped == 0


@pytest.mark.parametrize("name", ["c.json", "c.jsonl", "C.JSON"])
def test_json_and_jsonl_hold_the_same_rows(written, name):
    rows = [ROW, {"instruction": "a", "output": "b"}, {"text": "c"}]
    path = written(name, json.dumps(rows, indent=1) if name == "C.JSON" else rows)
    assert read_rows(path) == [ROW, {"instruction": "a", "input": "", "output": "b"}, {"text": "c"}]


def test_blank_lines_between_rows_are_skipped(written):
    assert read_rows(written("c.jsonl", '\n{"text": "a"}\r\n\n  \n{"text": "b"}\n')) == [
        {"text": "a"},
        {"text": "b"},
    ]


@settings(max_examples=50)
@given(texts=st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=3))
def test_any_text_survives_jsonl(tmp_path_factory, texts):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes("\n".join(lines).encode())
    assert read_rows(path) == [{"text": text} for text in texts]


def test_a_row_with_instruction_and_text_is_an_instruction(written):
    assert read_rows(written("c.jsonl", [{**ROW, "text": "all of it"}])) == [ROW]


def test_running_text_is_joined_with_ends_and_cut_into_blocks(written, make_tokenizer):
    rows = [{"text": "w1 w2 w3"}, {"text": "w4 w5"}]
    corpus = load_corpus(
        written("c.jsonl", rows), make_tokenizer("<s> $A </s>"), CorpusConfig(max_length=4)
    )
    blocks = [[BOS, *ids(1, 2, 3)], [EOS, BOS, *ids(4, 5)]]  # an end of one token is no block
    assert [s.tokens.tolist() for s in corpus.sequences] == blocks
    assert all(s.labels.equal(s.tokens) for s in corpus.sequences)


def test_a_plain_text_file_is_running_text(written, make_tokenizer):
    corpus = load_corpus(written("c.txt", "w1 w2\nw3"), make_tokenizer())
    assert [s.tokens.tolist() for s in corpus.sequences] == [[*ids(1, 2, 3), EOS]]


def test_instructions_and_text_may_be_mixed(written, make_tokenizer):
    path = written("c.jsonl", [{"text": "w1 w2"}, ROW, {"text": "w3"}])
    corpus = load_corpus(path, make_tokenizer(), CorpusConfig(template="plain"))
    tokens = [s.tokens.tolist() for s in corpus.sequences]
    assert tokens == [[*ids(1, 2, 3, 4, 5), EOS], [*ids(1, 2), EOS, *ids(3), EOS]]


@pytest.mark.parametrize("extra", ["", "w3"])
def test_the_alpaca_prompt_is_the_published_one(written, make_tokenizer, extra):
    row = {**ROW, "input": extra}
    (sequence,) = load_corpus(written("c.jsonl", [row]), make_tokenizer()).sequences
    prompt = ALPACA[bool(extra)].format(**row)
    assert ("### Input:" in prompt) == bool(extra)
    head = len(prompt.split())
    assert sequence.tokens.tolist()[:head] == [
        ids(int(w[1:]))[0] if w in ("w1", "w2", "w3") else UNK for w in prompt.split()
    ]
    assert sequence.labels.tolist() == [IGNORED] * head + [*ids(4, 5), EOS]


def test_braces_in_a_row_are_no_placeholders(written, make_tokenizer):
    path = written("c.jsonl", [{"instruction": "{output} {0}", "output": "w1"}])
    assert len(load_corpus(path, make_tokenizer()).sequences) == 1


def test_long_sequences_lose_their_end_and_long_prompts_their_row(written, make_tokenizer, caplog):
    rows = [
        ROW,
        {"instruction": "w1 w2 w3 w4", "output": "w5"},  # the prompt fills all
        {"instruction": "w1", "output": "  "},  # no response
        {"instruction": "w1", "output": "w2"},
    ]
    with caplog.at_level(logging.WARNING):
        corpus = load_corpus(
            written("c.jsonl", rows), make_tokenizer(), CorpusConfig(template="plain", max_length=4)
        )
    assert [s.tokens.tolist() for s in corpus.sequences] == [ids(1, 2, 3, 4), [*ids(1, 2), EOS]]
    assert corpus.sequences[0].labels.tolist() == [IGNORED] * 3 + ids(4)
    assert corpus.dropped == 2
    assert "2 of 4 rows" in caplog.text


def test_a_lone_token_has_nothing_to_be_predicted_from(written, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    rows = [{"instruction": "", "output": "w1"}, {"instruction": "", "output": "w1 w2"}]
    corpus = load_corpus(written("c.jsonl", rows), tokenizer, CorpusConfig(template="plain"))
    assert [s.tokens.tolist() for s in corpus.sequences] == [ids(1, 2)]
    assert corpus.dropped == 1


def test_the_limit_takes_the_first_rows(written, make_tokenizer):
    rows = [{"instruction": f"w{i}", "output": "w9"} for i in range(5)]
    corpus = load_corpus(
        written("c.jsonl", rows),
        make_tokenizer(),
        CorpusConfig(template="plain", max_train_samples=2),
    )
    assert [s.tokens.tolist()[0] for s in corpus.sequences] == ids(0, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", "", r"is empty\. Give a file with at least one row"),
        ("c.txt", " \n\n", "is empty"),
        ("c.jsonl", '{"text": "a"}\n\n{"text": \n', r"is not valid JSON in line 3: .*Correct it"),
        ("c.json", '[{"text": "a"},\n{"text" 1}]', "is not valid JSON in line 2"),
        ("c.json", '{"text": "a"}', r"is not a JSON list of rows\. Wrap it in \[ \]"),
        ("c.jsonl", '\n{"prompt": "a"}', r"row 2 is {'prompt': 'a'}; a row needs the texts inst"),
        ("c.jsonl", '["a"]', r"row 1 is \['a'\]; a row needs"),
        ("c.jsonl", '{"text": 5}', r"row 1 is {'text': 5}"),
        ("c.json", '[{"instruction": "a", "output": null}]', "row 1 is .*'output': None"),
        ("c.json", '[{"instruction": "a", "input": 5, "output": "b"}]', "row 1 is .*'input': 5"),
        ("c.jsonl", b'{"text": "\xff"}', r"is not UTF-8 text: .*Convert it"),
    ],
)
def test_each_error_says_what_is_wrong(written, name, content, message):
    with pytest.raises(CorpusError, match=message):
        read_rows(written(name, content))


def test_a_missing_file_or_a_folder_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: No such file.*Correct \[corpus\] path"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_rows(tmp_path)


def test_a_file_that_cannot_be_read_is_said_before_anything_is_loaded(written):
    def of(path):
        return run_file.from_dict({"oracle": {"tasks": ["a"]}, "corpus": {"path": str(path)}})

    for fine in ("embedded", "owner/name", written("c.txt", "")):
        check(of(fine))
    with pytest.raises(ConfigError, match=r"cannot be read: No such file.*Correct \[corpus\] path"):
        check(of("none.jsonl"))


@pytest.mark.parametrize("content", ["[]", json.dumps([{"instruction": "w1", "output": ""}])])
def test_a_corpus_without_a_sequence_is_refused(written, make_tokenizer, content):
    with pytest.raises(CorpusError, match=r"gives no training sequence \([01] rows, [01] longer"):
        load_corpus(written("c.json", content), make_tokenizer())


@given(count=st.integers(2, 60), seed=st.integers(0, 2**32), data=st.data())
def test_rows_are_held_out_as_datasets_does(count, seed, data):
    held_out = data.draw(st.integers(1, count - 1))
    rows = datasets.Dataset.from_dict({"row": list(range(count))})
    theirs = rows.train_test_split(test_size=held_out, shuffle=True, seed=seed)
    train, test = split_rows(range(count), held_out, seed)
    assert (train, test) == (theirs["train"]["row"][:], theirs["test"]["row"][:])


@given(rows=st.lists(st.integers()), seed=st.integers(0, 99), data=st.data())
def test_a_split_loses_and_doubles_no_row(rows, seed, data):
    count = data.draw(st.integers(0, len(rows)))
    train, test = split_rows(rows, count, seed)
    assert len(test) == count
    assert sorted(train + test) == sorted(rows)


def test_held_out_rows_are_no_training_sequences(written, make_tokenizer):
    rows = [{"instruction": f"w{i}", "output": "w36"} for i in range(20)]
    corpus = load_corpus(
        written("c.jsonl", rows),
        make_tokenizer(),
        CorpusConfig(template="plain", val_set_size=5, max_train_samples=15),
    )
    order = torch.tensor([s.tokens[0] for s in (*corpus.validation, *corpus.sequences)]) - 3
    assert (len(corpus.validation), len(corpus.sequences)) == (5, 10)
    assert sorted(order.tolist()) == list(range(15))
    assert order[:5].tolist() == split_rows(range(15), 5, 42)[1]


def test_held_out_text_is_joined_on_its_own(written, make_tokenizer):
    rows = [{"text": f"w{i} w{i}"} for i in range(4)]
    corpus = load_corpus(written("c.jsonl", rows), make_tokenizer(), CorpusConfig(val_set_size=1))
    (training,), (validation,) = corpus.sequences, corpus.validation
    assert (len(training.tokens), len(validation.tokens)) == (9, 3)


@pytest.mark.parametrize("validation", [2, 3])
def test_nothing_left_to_train_on_is_refused(written, make_tokenizer, validation):
    with pytest.raises(CorpusError, match=rf"holds out {validation} rows, but the .* has 2, which"):
        load_corpus(
            written("c.jsonl", [ROW, ROW]), make_tokenizer(), CorpusConfig(val_set_size=validation)
        )


def test_held_out_rows_that_give_nothing_are_refused(make_tokenizer):
    outputs = [""] * 3
    outputs[split_rows(range(3), 1, 42)[0][0]] = "w2"  # the seed is LLM-Pruner's
    rows = [{"instruction": "w1", "output": text} for text in outputs]
    with pytest.raises(CorpusError, match="The 1 rows of the corpus in memory that"):
        load_corpus(rows, make_tokenizer(), CorpusConfig(val_set_size=1))


def test_the_digest_is_that_of_tokens_labels_and_what_is_held_out(make_tokenizer):
    rows = [{"instruction": f"w{i}", "output": "w9"} for i in range(6)]

    def digest(*rows, **changes):
        return load_corpus(
            rows, make_tokenizer(), CorpusConfig(template="plain", **changes)
        ).digest()

    whole = digest(*rows)
    assert whole == digest(*rows)
    others = {
        digest(*rows[:-1]),
        digest(*rows, max_length=2),
        digest(*rows, val_set_size=1),
        digest({"text": "w1 w9"}),
    }
    assert len({whole, *others}) == 5


def test_rows_in_memory_are_those_of_a_file(written, make_tokenizer):
    rows = [{**ROW, "text": None}, {"text": "w1 w2"}]
    read = load_corpus(written("c.jsonl", rows), make_tokenizer())
    for given_rows in (rows, datasets.Dataset.from_list(rows)):
        made = load_corpus(given_rows, make_tokenizer())
        assert [s.tokens.tolist() for s in made.sequences] == [
            s.tokens.tolist() for s in read.sequences
        ]
    with pytest.raises(CorpusError, match=r"in memory, row 2 is \{'a': 1\}; a row needs the texts"):
        load_corpus([ROW, {"a": 1}], make_tokenizer())


@pytest.mark.parametrize(
    ("path", "is_name"),
    [
        ("yahma/alpaca-cleaned", True),
        ("OpenAssistant/oasst_top1_2023-08-25", True),
        ("org/data.v1.5", True),
        ("data/corpus.jsonl", False),
        ("data/corpus.TXT", False),
        ("../corpus", False),
        ("/data/corpus", False),
        ("a/b/c", False),
        ("corpus", False),
        ("embedded", False),
    ],
)
def test_names_on_the_hub_are_told_from_files(path, is_name):
    assert is_hub_name(path) == is_name


def test_a_dataset_of_the_hub_is_read_by_its_rows(make_tokenizer, monkeypatch, tmp_path):
    asked = []

    def give(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([ROW, {**ROW, "output": "w9"}])

    monkeypatch.setattr(datasets, "load_dataset", give)
    monkeypatch.chdir(tmp_path)
    corpus = load_corpus("owner/name", make_tokenizer(), CorpusConfig(max_train_samples=1))
    assert [s.tokens.tolist()[-3:] for s in corpus.sequences] == [[*ids(4, 5), EOS]]
    assert asked == [("owner/name", "train")]


def test_a_file_goes_before_the_hub(make_tokenizer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("w1 w2")
    assert len(load_corpus("owner/name", make_tokenizer()).sequences) == 1


def test_a_download_that_fails_is_one_line(make_tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError) as error:
        load_corpus("no-such-owner/no-such-name", make_tokenizer())
    message = str(error.value)
    assert message == (
        "[corpus] path: The dataset no-such-owner/no-such-name is not on this machine, and the Hub "
        "cannot be reached. Correct the path, or download it where there is a network: hf download "
        "no-such-owner/no-such-name --repo-type dataset"
    )


def test_a_name_on_the_hub_survives_the_run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[oracle]\ntasks = ["a"]\n[corpus]\npath = "owner/name"\n')
    assert run_file.load(path).corpus.path == "owner/name"
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("w1")
    assert run_file.load(path).corpus.path == str(tmp_path / "owner" / "name")
