"""Calibration text: documents of a file, and the windows that are drawn from them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankadaptor_plugin.core.errors import CorpusError
from rankadaptor_plugin.pruning.calibration import calibration_documents, calibration_samples


def documents(*lengths):
    return [torch.arange(n) + 100 * i for i, n in enumerate(lengths)]


def test_calibration_samples_are_fixed_by_the_seed():
    def drawn(count, tokens, seed):
        return [
            tuple(t.tolist())
            for t in calibration_samples(documents(*[6] * 20), count, tokens, seed)
        ]

    assert drawn(8, 3, 0) == drawn(8, 3, 0) != drawn(8, 3, 1)
    assert len(set(drawn(8, 3, 0))) == 8  # without repetition


@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    count=st.integers(1, 9),
    tokens=st.integers(2, 12),
    seed=st.integers(0, 99),
)
def test_calibration_samples_are_windows_of_one_document_without_overlap(
    lengths, count, tokens, seed
):
    available = sum(n // tokens for n in lengths)
    if not available:
        with pytest.raises(CorpusError, match=f"longest document has {max(lengths, default=0)} t"):
            calibration_samples(documents(*lengths), count, tokens, seed)
        return
    samples = calibration_samples(documents(*lengths), count, tokens, seed)
    assert len(samples) == min(count, available)
    seen = [token for sample in samples for token in sample.tolist()]
    assert len(seen) == len(set(seen)) == tokens * len(samples)
    for sample in samples:
        assert torch.equal(sample, torch.arange(tokens) + sample[0])
        assert sample[0] // 100 == sample[-1] // 100


def test_too_little_calibration_text_is_said(caplog):
    assert len(calibration_samples(documents(9, 3), 8, 3, 0)) == 4
    assert "gives 4 sequences of 3 tokens, not 8" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "lengths"),
    [
        ("c.txt", "w1 w2 w3 w4 w5", [5]),
        ("c.jsonl", '{"text": "w1 w2"}\n{"text": "w3 w4 w5"}', [2, 3]),
        ("c.json", json.dumps([{"instruction": "w1 w2", "output": "w3"}]), [3]),
    ],
)
def test_calibration_documents_are_rows_or_the_whole_text(
    tmp_path, make_tokenizer, name, content, lengths
):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    found = calibration_documents(path, make_tokenizer(), template="plain")
    assert [len(tokens) for tokens in found] == lengths
    assert torch.cat(found).tolist() == [3 + i for i in range(1, sum(lengths) + 1)]
