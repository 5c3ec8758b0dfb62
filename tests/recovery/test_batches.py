"""Layouts say how sequences lie in memory: loss and gradients are the same in all of them."""

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
    LAYOUTS,
    batches,
    check_sequences,
    passes,
    trained_tokens,
)
from rankadaptor_plugin.recovery.losses import forward_logits, token_loss
from rankadaptor_plugin.recovery.packing import supports_packing

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
PACKED = {
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
}
PADDED = {
    "OPT": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0},
    "Bloom": {**SIZES, "n_layer": 2, "n_head": 2},
    "Falcon": {**SIZES, "ffn_hidden_size": 24},
}
FAMILIES = {**PACKED, **PADDED}


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


def loss_and_gradients(model, layout, size):
    model.zero_grad()
    loss = 0.0
    for given_ in passes(BATCH, layout, size):
        part = token_loss(forward_logits(model, given_), given_, weight=0.5, temperature=2.0)
        part.backward()
        loss += part.item()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_layouts_give_the_same_loss_and_gradients(name, attention):
    if attention == "sdpa" and name in ("Bloom", "Gemma2"):
        pytest.skip("the family takes eager attention alone, or by choice")
    model = tiny(name, attn_implementation=attention)
    loss, gradients = loss_and_gradients(model, "padded", 1)
    for layout in LAYOUTS:
        for size in (2, 5):
            if layout == "packed" and name in PADDED:
                continue
            other_loss, others = loss_and_gradients(model, layout, size)
            assert other_loss == pytest.approx(loss, rel=1e-5)
            assert others.keys() == gradients.keys()
            for key, gradient in gradients.items():
                torch.testing.assert_close(others[key], gradient, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("name", FAMILIES)
def test_packing_is_found_out_to_keep_sequences_apart_or_not(name, noise, dtype):
    model = tiny(name, noise).to(dtype)
    assert supports_packing(model) == (name in PACKED)
    assert model.training


def test_a_model_without_position_ids_is_not_packed(make_llama, monkeypatch):
    model = make_llama()
    forward = model.forward

    def refusing(input_ids, use_cache):
        return forward(input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", refusing)
    assert not supports_packing(model)
    assert not model.training


def test_positions_that_are_not_counted_anew_are_noticed(make_llama, monkeypatch):
    """Attention within the sequences alone is not enough."""
    model = make_llama()
    rotary = model.model.rotary_emb
    forward = rotary.forward

    def stretched(x, position_ids):
        return forward(x, position_ids * torch.arange(1, 1 + position_ids.shape[1]))

    monkeypatch.setattr(rotary, "forward", stretched)
    assert not supports_packing(model)


@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=12),
    size=st.integers(1, 5),
    layout=st.sampled_from(LAYOUTS),
)
def test_every_trained_token_is_in_one_pass(lengths, size, layout):
    batch = [sequence(n, seed=i) for i, n in enumerate(lengths)]
    expected, found = [], []
    for s in batch:
        expected += zip(s.tokens[:-1].tolist(), s.labels[1:].tolist(), s.teacher.rest, strict=True)
    for given_ in passes(batch, layout, size):
        before = given_.inputs["input_ids"].flatten()[given_.positions]
        found += zip(before.tolist(), given_.targets.tolist(), given_.teacher.rest, strict=True)
        if layout == "packed":
            assert given_.is_packed
            assert given_.inputs["input_ids"].numel() <= size * max(lengths)
        else:
            assert len(given_.inputs["input_ids"]) <= size
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("layout", ["padded", "sorted"])
def test_padding_is_marked_and_repeats_a_token_of_its_row(layout):
    batch = [sequence(n, seed=n) for n in (3, 7, 5)]
    (given_,) = passes(batch, layout, 3)
    rows, real = given_.inputs["input_ids"], given_.places.view(3, 7) >= 0
    assert given_.inputs.keys() == {"input_ids"}  # no mask: attention is causal
    lengths = {n: sequence(n, seed=n) for n in (3, 7, 5)}
    for row, own in zip(rows, real, strict=True):
        length = int(own.sum())
        assert torch.equal(row[:length], lengths[length].tokens)
        assert own[:length].all()
        assert (row[length:] == row[length - 1]).all()


def test_sorting_pads_no_more_than_the_order_that_was_drawn():
    batch = [sequence(n) for n in (2, 12, 3, 11)]
    padded, in_order = (
        sum(p.inputs["input_ids"].numel() for p in passes(batch, layout, 2))
        for layout in ("padded", "sorted")
    )
    assert (padded, in_order) == (46, 30)


def test_batches_are_a_new_order_of_all_sequences_in_every_pass_over_them():
    sequences = [sequence(3, seed=i) for i in range(6)]
    number = {id(s): i for i, s in enumerate(sequences)}
    drawn = [number[id(s)] for batch in islice(batches(sequences, 4, seed=1), 6) for s in batch]
    epochs = [drawn[:6], drawn[6:12], drawn[12:18], drawn[18:]]
    assert [sorted(e) for e in epochs] == [list(range(6))] * 4
    assert len({tuple(e) for e in epochs}) > 1
    again = [number[id(s)] for batch in islice(batches(sequences, 4, seed=1), 6) for s in batch]
    assert again == drawn


def test_a_corpus_without_sequences_is_refused():
    with pytest.raises(CorpusError, match="no training sequence"):
        check_sequences([])


def test_a_sequence_without_trained_tokens_is_refused_by_its_number():
    """The label of the first token counts for nothing: nothing comes before it."""
    masked = sequence(4, masked=4)
    labels = masked.labels.clone()
    labels[0] = 5
    with pytest.raises(CorpusError, match="sequence 2 of 2 has no token to train on"):
        check_sequences([sequence(4), TrainingSequence(masked.tokens, labels)])
