"""Tokenized corpora on disk: equal in every bit, found again, and never in the way."""

from __future__ import annotations

import json
import logging
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.corpus import corpus as corpus_module
from rankadaptor_plugin.corpus.cache import read_corpus, tokens_digest, write_corpus
from rankadaptor_plugin.corpus.corpus import IGNORED, Corpus, TrainingSequence, load_corpus

ROWS = [{"instruction": f"w{i}", "output": f"w{i + 1} w{i + 2}"} for i in range(12)]


def bits(corpus):
    sequences = [*corpus.sequences, *corpus.validation]
    assert all(
        s.tokens.dtype == s.labels.dtype == torch.int64 and s.teacher is None for s in sequences
    )
    return (
        [(s.tokens.tolist(), s.labels.tolist()) for s in corpus.sequences],
        [(s.tokens.tolist(), s.labels.tolist()) for s in corpus.validation],
        corpus.dropped,
        corpus.rows,
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def no_rows_read(monkeypatch):
    def refuse(path):
        pytest.fail(f"{path} was read again")

    return lambda: monkeypatch.setattr(corpus_module, "read_rows", refuse)


@st.composite
def corpora(draw):
    def sequence():
        tokens = torch.tensor(
            draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)), dtype=torch.int64
        )
        trained = torch.tensor([draw(st.booleans()) for _ in tokens])
        return TrainingSequence(tokens, torch.where(trained, tokens, IGNORED))

    return Corpus(
        sequences=[sequence() for _ in range(draw(st.integers(1, 4)))],
        validation=[sequence() for _ in range(draw(st.integers(0, 3)))],
        dropped=draw(st.integers(0, 9)),
        rows=draw(st.integers(0, 99)),
    )


@settings(max_examples=50)
@given(corpus=corpora())
def test_any_corpus_comes_back_equal_in_every_bit(tmp_path_factory, corpus):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    write_corpus(path, corpus)
    back = read_corpus(path)
    assert bits(back) == bits(corpus)
    assert tokens_digest(back) == tokens_digest(corpus)


@settings(max_examples=50)
@given(corpus=corpora(), cut=st.floats(0, 1, exclude_max=True), flip=st.booleans())
def test_a_torn_file_is_never_taken_for_a_corpus(tmp_path_factory, corpus, cut, flip):
    path = tmp_path_factory.getbasetemp() / "torn.safetensors"
    write_corpus(path, corpus)
    content = bytearray(path.read_bytes())
    place = int(cut * len(content))
    if flip:
        content[place] ^= 0x04
    path.write_bytes(content if flip else content[:place])
    back = read_corpus(path)
    assert back is None or bits(back) == bits(corpus)  # a bit in the padding of the header


def test_the_second_time_no_row_is_read(file, tmp_path, make_tokenizer, no_rows_read):
    asked = {"template": "plain", "validation": 3, "cache": tmp_path / "cache"}
    first = load_corpus(file, make_tokenizer(), **asked)
    no_rows_read()
    assert bits(load_corpus(file, make_tokenizer(), **asked)) == bits(first)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_dropped_rows_are_told_of_the_second_time_as_well(file, tmp_path, make_tokenizer, caplog):
    file.write_text(json.dumps(ROWS[0]) + '\n{"instruction": "w1", "output": ""}')
    for _ in range(2):
        caplog.clear()
        load_corpus(file, make_tokenizer(), cache=tmp_path / "cache")
        assert "1 of 2 rows" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"template": "alpaca"},
        {"max_tokens": 4},
        {"limit": 7},
        {"validation": 2},
        {"validation": 3, "validation_seed": 1},
        {"frame": "<s> $A"},
        {"chat_template": "x"},
        {"eos_token": "w9"},
    ],
    ids=str,
)
def test_whatever_changes_the_tokens_changes_the_file(file, tmp_path, make_tokenizer, change):
    plain = {"template": "plain", "validation": 3, "cache": tmp_path}
    load_corpus(file, make_tokenizer(), **plain)
    tokenizer = make_tokenizer(change.pop("frame", "$A"))
    for key in ("chat_template", "eos_token"):
        if key in change:
            setattr(tokenizer, key, change.pop(key))
    changed = load_corpus(file, tokenizer, **{**plain, **change})
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert bits(changed) == bits(load_corpus(file, tokenizer, **{**plain, **change, "cache": None}))


def test_other_content_is_another_file_and_another_name_is_not(file, tmp_path, make_tokenizer):
    cache = tmp_path / "cache"
    load_corpus(file, make_tokenizer(), cache=cache)
    load_corpus(file.rename(tmp_path / "moved.jsonl"), make_tokenizer(), cache=cache)
    assert len(list(cache.iterdir())) == 1
    (tmp_path / "moved.jsonl").write_text(json.dumps(ROWS[0]))
    assert len(load_corpus(tmp_path / "moved.jsonl", make_tokenizer(), cache=cache).sequences) == 1
    assert len(list(cache.iterdir())) == 2


def test_a_tokenizer_that_padded_before_finds_the_same_file(file, tmp_path, make_tokenizer):
    tokenizer = make_tokenizer()
    load_corpus(file, tokenizer, cache=tmp_path / "cache")
    tokenizer(["w1", "w2 w3"], padding=True, truncation=True, max_length=2)
    load_corpus(file, tokenizer, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_torn_file_is_made_anew(file, tmp_path, make_tokenizer, caplog):
    whole = load_corpus(file, make_tokenizer(), cache=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-5])
    with caplog.at_level(logging.INFO):
        assert bits(load_corpus(file, make_tokenizer(), cache=tmp_path / "cache")) == bits(whole)
    assert "it is made anew" in caplog.text
    assert bits(read_corpus(kept)) == bits(whole)


def test_a_missing_file_is_said_with_a_cache_as_well(tmp_path, make_tokenizer):
    with pytest.raises(ConfigError, match=r"cannot be read: No such file.*Correct \[corpus\] path"):
        load_corpus(tmp_path / "none.jsonl", make_tokenizer(), cache=tmp_path)


def test_a_cache_that_cannot_be_written_only_warns(file, make_tokenizer, caplog):
    found = load_corpus(file, make_tokenizer(), cache=file / "below")
    assert len(found.sequences) == len(ROWS)
    assert "is not kept, and tokenized again next time" in caplog.text


def test_a_disk_that_fills_up_leaves_nothing_behind(file, tmp_path, make_tokenizer, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        found = load_corpus(file, make_tokenizer(), cache=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(found.sequences) == len(ROWS)
    assert "cannot be written: File too large" in caplog.text
    assert not list((tmp_path / "cache").iterdir())
