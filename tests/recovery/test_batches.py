"""Passes cut an optimizer step: loss and gradients are the same however it is cut."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from rankadaptor_plugin.core.errors import CorpusError
from rankadaptor_plugin.corpus.sequences import IGNORED, TeacherTokens, TrainingSequence
from rankadaptor_plugin.recovery.batches import (
    batches,
    check_sequences,
    padded,
    pass_loss,
    passes,
    trained_tokens,
)

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
GQA = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = {**GQA, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 5}
SHORT_NAMES = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
FAMILIES = {
    "Llama": GQA,
    "Mistral": {**GQA, "sliding_window": 5},
    "Qwen2": GQA,
    "Qwen3": {**GQA, "head_dim": 4},
    "Gemma": {**GQA, "head_dim": 4},
    "Gemma2": GEMMA,
    "Gemma3Text": GEMMA,
    "Phi3": {**GQA, "pad_token_id": 0},
    "GPTNeoX": SIZES,
    "GPT2": {**SHORT_NAMES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "OPT": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0},
    "Bloom": {**SIZES, "n_layer": 2, "n_head": 2},
    "Falcon": {**SIZES, "ffn_hidden_size": 24},
}


def tiny(name, noise=0.1, **changes):
    config = getattr(transformers, f"{name}Config")(**FAMILIES[name], **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=noise)
    return model.train()


def sequence(length, masked=0, seed=0, top_k=3):
    generator = torch.Generator().manual_seed(seed + 100 * length)
    tokens = torch.randint(1, 60, (length,), generator=generator)
    labels = torch.where(torch.arange(length) < masked, IGNORED, tokens)
    n = trained_tokens([TrainingSequence(tokens, labels)])
    scores = torch.randn(n, 60, generator=generator).log_softmax(-1)
    best, indices = scores.topk(top_k)
    rest = scores.scatter(1, indices, -torch.inf).logsumexp(1)
    return TrainingSequence(tokens, labels, TeacherTokens(indices.int(), best, rest))


BATCH = [sequence(5), sequence(9, 4), sequence(2), sequence(8, 7), sequence(6, 1)]


def loss_and_gradients(model, size):
    model.zero_grad()
    loss = 0.0
    for given_ in passes(BATCH, size):
        part = pass_loss(model, given_, weight=0.5, temperature=2.0)
        part.backward()
        loss += part.item()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_do_not_depend_on_the_passes(name, attention):
    if attention == "sdpa" and name in ("Bloom", "Gemma2"):
        pytest.skip("the family takes eager attention alone, or by choice")
    model = tiny(name, attn_implementation=attention)
    loss, gradients = loss_and_gradients(model, 1)
    for size in (2, 5):
        other_loss, others = loss_and_gradients(model, size)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert others.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(others[key], gradient, rtol=1e-3, atol=2e-5)


@given(lengths=st.lists(st.integers(2, 12), min_size=1, max_size=12), size=st.integers(1, 5))
def test_every_trained_token_is_in_one_pass(lengths, size):
    batch = [sequence(n, seed=i) for i, n in enumerate(lengths)]
    expected, found = [], []
    for s in batch:
        expected += zip(s.tokens[:-1].tolist(), s.labels[1:].tolist(), s.teacher.rest, strict=True)
    for given_ in passes(batch, size):
        before = given_.input_ids.flatten()[given_.positions]
        found += zip(before.tolist(), given_.targets.tolist(), given_.teacher.rest, strict=True)
        assert len(given_.input_ids) == len(given_.lengths) <= size
    assert sorted(found) == sorted(expected)


def test_padding_repeats_a_token_of_its_row():
    batch = [sequence(n, seed=n) for n in (3, 7, 5)]
    given_ = padded(batch)
    assert given_.lengths.tolist() == [3, 7, 5]
    for row, own in zip(given_.input_ids, batch, strict=True):
        length = len(own.tokens)
        assert torch.equal(row[:length], own.tokens)
        assert (row[length:] == row[length - 1]).all()


def test_a_pass_stays_as_it_is_on_the_cpu():
    given_ = padded(BATCH)
    here = given_.to(torch.device("cpu"))
    assert here.input_ids is given_.input_ids
    assert here.teacher.rest is given_.teacher.rest


def test_passes_are_sorted_by_length():
    batch = [sequence(n) for n in (2, 12, 3, 11)]
    assert [given_.lengths.tolist() for given_ in passes(batch, 2)] == [[12, 11], [3, 2]]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([128] * 5 + [100, 60], [[128] * 5, [100, 60]]),  # 512 tokens are enough
        ([128] * 4 + [113, 111], [[128] * 4 + [113], [111]]),  # rows that are nearly alike stay
        ([16] * 30 + [5] * 2, [[16] * 30 + [5] * 2]),  # a small pass is not cut
    ],
)
def test_on_a_cpu_a_pass_with_work_enough_ends_before_much_padding(lengths, expected):
    batch = [sequence(length) for length in lengths]
    assert [one.lengths.tolist() for one in passes(batch, 32)] == expected
    (whole,) = passes(batch, 32, torch.device("cuda"))
    assert whole.lengths.tolist() == lengths


def test_batches_are_a_new_order_of_all_sequences_in_every_pass_over_them():
    sequences = [sequence(3, seed=i) for i in range(6)]
    number = {id(s): i for i, s in enumerate(sequences)}
    drawn = [number[id(s)] for batch in islice(batches(sequences, 4, seed=1), 6) for s in batch]
    epochs = [drawn[:6], drawn[6:12], drawn[12:18], drawn[18:]]
    assert [sorted(e) for e in epochs] == [list(range(6))] * 4
    assert len({tuple(e) for e in epochs}) > 1
    again = [number[id(s)] for batch in islice(batches(sequences, 4, seed=1), 6) for s in batch]
    assert again == drawn


def test_a_sequence_without_trained_tokens_is_refused_by_its_number():
    """The label of the first token counts for nothing: nothing comes before it."""
    masked = sequence(4, masked=4)
    labels = masked.labels.clone()
    labels[0] = 5
    with pytest.raises(CorpusError, match="sequence 2 of 2 has no token to train on"):
        check_sequences([sequence(4), TrainingSequence(masked.tokens, labels)])
