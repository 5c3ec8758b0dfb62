"""What a fine-tune leaves on the model, and what of an earlier one is still there to be had."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rankadaptor_plugin.config.tables import RecoveryConfig
from rankadaptor_plugin.core.errors import (
    ArtifactError,
    ConfigError,
    CorpusError,
    RankSpaceError,
    RecoveryError,
)
from rankadaptor_plugin.corpus.sequences import Corpus, TrainingSequence
from rankadaptor_plugin.recovery import training
from rankadaptor_plugin.recovery.fine_tune import recover
from rankadaptor_plugin.recovery.memory import MicroBatch

CONFIG = RecoveryConfig(
    max_steps=4,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    learning_rate=0.02,
    warmup_steps=1,
)


@pytest.fixture(scope="module")
def corpus():
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 5, 6, 8, 4, 7, 5, 6, 9, 4)
    tokens = [torch.randint(3, 40, (length,), generator=generator) for length in lengths]
    sequences = [TrainingSequence(one, one) for one in tokens]
    return Corpus(sequences=sequences[:8], dropped=0, validation=sequences[8:])


@pytest.mark.parametrize("method", ["lora", "adalora", "eva"])
def test_a_model_with_an_earlier_adapter_inside_is_refused(make_llama, corpus, method):
    model = make_llama()
    first = recover(model, None, [4, 4], corpus, CONFIG)
    with pytest.raises(RecoveryError, match=r"earlier fine-tune on it. Give RecoveredAdapter"):
        recover(model, None, [2, 0], corpus, CONFIG, method=method)
    assert first.model.unload() is model


def test_an_adapter_that_was_replaced_can_no_longer_be_saved(make_llama, corpus, tmp_path):
    first = recover(make_llama(), None, [4, 4], corpus, CONFIG)
    assert set(first.ranks.values()) == {4}
    second = recover(first.model, None, [2, 6], corpus, CONFIG)
    with pytest.raises(RecoveryError, match="Save an adapter before the next fine-tune"):
        first.save(tmp_path / "first")
    assert not (tmp_path / "first").exists()
    second.save(tmp_path / "second")
    second.model.unload()
    with pytest.raises(RecoveryError, match="unloaded"):
        _ = second.ranks


def test_saving_replaces_an_adapter_and_nothing_else(make_llama, corpus, tmp_path, monkeypatch):
    found = recover(make_llama(), None, [4, 4], corpus, CONFIG)
    found.save(tmp_path / "adapter")
    found.save(tmp_path / "adapter")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("x")
    monkeypatch.chdir(tmp_path / "notes")
    for place in (".", tmp_path / "notes", tmp_path / "notes" / "thesis.txt"):
        with pytest.raises(ArtifactError, match=r"thesis.txt\). Choose a new folder"):
            found.save(place)
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["thesis.txt"]


def test_after_an_error_the_model_is_as_it_was(make_llama, corpus):
    model = make_llama().train()
    for parameter in model.lm_head.parameters():
        parameter.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    wild = dataclasses.replace(CONFIG, learning_rate=1e30, warmup_steps=0)
    for method in ("lora", "pissa", "eva"):
        with pytest.raises(RecoveryError, match="step 2 of 4"):
            recover(model, None, [4, 4], corpus, wild, method=method)
        assert model.training
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_the_ranks_of_eva_do_not_depend_on_the_sequences_per_pass(make_llama, corpus):
    found = [
        recover(
            make_llama(),
            None,
            [4, 4],
            corpus,
            dataclasses.replace(
                CONFIG, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size
            ),
            method="eva",
        )
        for size in (4, 1)
    ]
    assert found[0].ranks == found[1].ranks
    torch.testing.assert_close(found[0].losses, found[1].losses, rtol=1e-5, atol=1e-5)


def test_memory_that_does_not_suffice_for_held_out_rows_is_an_own_reason_to_halve(
    make_llama, corpus, monkeypatch
):
    whole = recover(make_llama(), None, [4, 4], corpus, CONFIG)
    loss_of = training.pass_loss

    def cramped(model, given, **options):
        if not torch.is_grad_enabled() and len(given.input_ids) > 1:
            raise RuntimeError("CUDA error: out of memory")
        return loss_of(model, given, **options)

    monkeypatch.setattr(training, "pass_loss", cramped)
    parts = recover(make_llama(), None, [4, 4], corpus, CONFIG)
    assert parts.validation_loss == pytest.approx(whole.validation_loss, rel=1e-5)


@pytest.mark.parametrize(("size", "half"), [(16, 8), (6, 3), (9, 3), (7, 1), (2, 1)])
def test_half_a_pass_divides_the_whole_one(size, half):
    micro = MicroBatch(size)
    micro.halve()
    assert micro.size == half


def test_a_gradient_that_is_never_a_number_ends_a_fine_tune_in_float16(
    make_llama, corpus, monkeypatch
):
    loss_of = training.pass_loss

    def broken(*arguments, **named):
        loss = loss_of(*arguments, **named)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    monkeypatch.setattr(training, "pass_loss", broken)
    config = dataclasses.replace(CONFIG, max_steps=60)
    with pytest.raises(RecoveryError, match=r"not finite at step 40 of 60.*bfloat16"):
        recover(make_llama().half(), None, [4, 4], corpus, config)


def test_adalora_keeps_its_budget_where_float16_leaves_out_steps(make_llama, corpus, monkeypatch):
    scaler = torch.amp.GradScaler

    def wild(*arguments, **named):
        return scaler(*arguments, init_scale=2.0**40, **named)

    monkeypatch.setattr(torch.amp, "GradScaler", wild)
    config = dataclasses.replace(CONFIG, max_steps=60)
    plain = recover(make_llama(), None, [4, 4], corpus, CONFIG)
    found = recover(make_llama().half(), None, [4, 4], corpus, config, method="adalora")
    assert sum(found.ranks.values()) == sum(plain.ranks.values())


def test_a_sequence_longer_than_the_context_is_refused(make_llama):
    tokens = torch.ones(300, dtype=torch.int64)
    model = make_llama()
    model.config.max_position_embeddings = 64
    rows = Corpus(sequences=[TrainingSequence(tokens, tokens)], dropped=0)
    with pytest.raises(CorpusError, match="300 tokens, but the context of the model is 64"):
        recover(model, None, [4, 4], rows, CONFIG)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"allocation": [8.0, 8.0]}, RankSpaceError, "must be a list of whole numbers"),
        ({"allocation": "8-8"}, RankSpaceError, "The allocation is '8-8'"),
        ({"allocation": 8}, RankSpaceError, "The allocation is 8"),
        ({"recipe": {"steps": 3}}, ConfigError, "The recipe is of type dict"),
        ({"corpus": None}, ConfigError, "The corpus is of type NoneType"),
        ({"seed": "x"}, ConfigError, "The seed is 'x'"),
        ({"seed": -1}, ConfigError, "The seed is -1"),
    ],
)
def test_wrong_arguments_are_one_line(make_llama, corpus, changes, error, message):
    given = {"allocation": [4, 4], "corpus": corpus, "recipe": CONFIG, **changes}
    with pytest.raises(error, match=message) as caught:
        recover(make_llama(), None, **given)
    assert "\n" not in str(caught.value)


def test_held_out_loss_is_told_without_a_fine_tune_too(make_llama, corpus):
    found = recover(make_llama(), None, [4, 4], corpus, CONFIG, method="none")
    assert found.validation_loss > 0


def test_the_record_has_the_settings(make_llama, corpus):
    found = recover(make_llama(), None, [4, 4], corpus, CONFIG)
    assert found.provenance["settings"]["learning_rate"] == CONFIG.learning_rate
    assert found.provenance["steps"] == CONFIG.max_steps
