"""Compensation beyond what the conformance suite of families shows: exactness, depth, bad input."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from rankadaptor_plugin.core.errors import CorpusError, RankAdaptorError, UnsupportedModelError
from rankadaptor_plugin.models.pruned_model import PrunedModel
from rankadaptor_plugin.models.structures import decoder_layers, layer_units
from rankadaptor_plugin.pruning import compensation
from rankadaptor_plugin.pruning.calibration import (
    hidden_states,
    mixed_text,
    padded,
    written_text,
)
from rankadaptor_plugin.pruning.compensation import compensate
from rankadaptor_plugin.pruning.cutting import remove
from rankadaptor_plugin.pruning.depth import keep_layers


def drawn(count: int, length: int = 9, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, 40, (count, length), generator=generator))


@torch.no_grad()
def distance(one, other) -> float:
    batch = padded(drawn(16, seed=1))
    return float((hidden_states(one, batch) - hidden_states(other, batch)).norm())


def without_channels(model, channels: dict[int, list[int]]):
    pruned = copy.deepcopy(model)
    units = layer_units(pruned)
    for layer, numbers in channels.items():
        remove(units[layer].mlp, numbers)
    return pruned


@pytest.fixture
def base(make_llama):
    return make_llama(num_hidden_layers=4)


@torch.no_grad()
def test_a_channel_that_another_one_doubles_is_made_up_for(base, make_tokenizer):
    """Channel 0 of layer 1 computes what channel 1 does, so the fit can be exact."""
    mlp = decoder_layers(base)[1].mlp
    for matrix in (mlp.gate_proj, mlp.up_proj):
        matrix.weight[0] = matrix.weight[1]
    pruned = PrunedModel.of(without_channels(base, {1: [0]}), make_tokenizer()).model
    before = distance(base, pruned)
    found = compensate(base, pruned, drawn(200))
    with found.applied(pruned):
        assert distance(base, pruned) < 0.01 * before
    assert distance(base, pruned) == before
    assert set(found.weights) >= {"model.layers.1.mlp.down_proj.weight"}
    assert not any(name.startswith("model.layers.0.") for name in found.weights)


def test_the_record_says_what_was_fitted(base, make_tokenizer):
    pruned = PrunedModel.of(without_channels(base, {1: [0, 5], 2: [3]}), make_tokenizer()).model
    record = compensate(base, pruned, drawn(100)).record
    assert record["method"] == "least-squares"
    assert [point["sequences"] for point in record["by_sequences"]][:2] == [32, 64]
    assert record["sequences"] in [point["sequences"] for point in record["by_sequences"]]
    assert record["tokens"] == 9 * record["sequences"]
    entry = record["matrices"][1]
    assert (entry["layer"], entry["matrix"], entry["features"]) == (1, "mlp.down_proj", 22)
    assert 0 < entry["held_out_error"] <= 1


@pytest.mark.parametrize("kept", [[0, 3], [1, 2, 3], [0, 1]])
def test_removed_blocks_are_made_up_for(base, make_tokenizer, kept):
    model = copy.deepcopy(base)
    keep_layers(model, kept)
    before = distance(base, model)
    with compensate(base, model, drawn(200), kept_layers=kept).applied(model):
        assert distance(base, model) < 0.9 * before


def test_padding_counts_for_nothing(base, make_tokenizer, monkeypatch):
    """Sequences of several lengths give the same weights one by one and in padded passes."""
    pruned = PrunedModel.of(without_channels(base, {1: [0, 1, 2]}), make_tokenizer()).model
    text = [s[: 4 + i % 6] for i, s in enumerate(drawn(32))]
    together = compensate(base, pruned, text).weights
    monkeypatch.setattr(compensation, "_TOKENS", 1)
    alone = compensate(base, pruned, text).weights
    for name, weight in together.items():
        torch.testing.assert_close(weight, alone[name], rtol=1e-3, atol=1e-4)


def test_one_layer_at_a_time_is_on_the_device(base, make_tokenizer):
    """Counted where the layers lie when a layer runs: on the meta device nothing could."""
    pruned = PrunedModel.of(without_channels(base, {1: [0]}), make_tokenizer()).model
    moved: list[torch.nn.Module] = []
    for model in (base, pruned):
        for layer in decoder_layers(model):
            plain = layer.to

            def noted(device, layer=layer, plain=plain):
                moved.append(layer)
                return plain(device)

            layer.to = noted
    compensate(base, pruned, drawn(40), device=torch.device("cpu"))
    pairs = list(zip(moved[::2], moved[1::2], strict=True))
    assert pairs
    assert all(there is back for there, back in pairs)


def test_few_tokens_are_told(base, make_tokenizer, caplog):
    pruned = PrunedModel.of(without_channels(base, {1: [0]}), make_tokenizer()).model
    with caplog.at_level(logging.WARNING):
        compensate(base, pruned, drawn(2, length=3))
    assert "has 6 calibration tokens for matrices of up to 24 features" in caplog.text


def test_activations_that_are_not_finite_name_the_layer(base, make_tokenizer):
    pruned = PrunedModel.of(without_channels(base, {2: [0]}), make_tokenizer()).model
    with torch.no_grad():
        decoder_layers(pruned)[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(RankAdaptorError, match=r"Layer 2: activations at mlp\.down_proj"):
        compensate(base, pruned, drawn(40))
    with torch.no_grad():
        decoder_layers(base)[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(RankAdaptorError, match="Layer 1 of the unpruned model"):
        compensate(base, pruned, drawn(40))


def test_what_cannot_be_fitted_is_refused(base, make_llama):
    with pytest.raises(CorpusError, match="has 1 calibration sequences; it takes at least 2"):
        compensate(base, copy.deepcopy(base), drawn(1))
    other = make_llama(hidden_size=32, num_hidden_layers=4)
    with pytest.raises(UnsupportedModelError, match="hidden size of 32, the unpruned one of 16"):
        compensate(base, other, drawn(4))


# ------------------------------------------------------------------------------ calibration text


def test_the_text_is_half_corpus_and_half_general():
    corpus, general = drawn(100, length=8), [torch.arange(3, 39)] * 60
    text = mixed_text(corpus, general, tokens=12, most=50, seed=0)
    assert len(text) == 50
    general_tokens = sum(len(s) for s in text if len(s) == 12)
    assert abs(2 * general_tokens - sum(map(len, text))) <= 24
    again = mixed_text(corpus, general, tokens=12, most=50, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(text, again, strict=True))


def test_without_general_text_the_corpus_is_all():
    assert len(mixed_text(drawn(30), [], tokens=6, most=50, seed=0)) == 30


def test_a_model_writes_the_same_texts_and_is_left_as_it_was(base, make_tokenizer):
    state = torch.get_rng_state()
    one, other = (
        written_text(base, make_tokenizer(), count=40, tokens=7, seed=3) for _ in range(2)
    )
    assert torch.get_rng_state().equal(state)
    assert len(one) == 40
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert {int(text[0]) for text in one} == {0}  # begins with the first token of every text
    assert all(2 <= len(text) <= 7 for text in one)
    assert any(int(text[-1]) == 1 for text in one)  # ends where the model ends
