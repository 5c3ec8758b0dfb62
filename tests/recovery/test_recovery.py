"""The fine-tune: it learns, it repeats itself exactly, and it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from rankadaptor_plugin.config.tables import RecoveryConfig
from rankadaptor_plugin.core.errors import RecoveryError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.corpus.sequences import IGNORED, Corpus, TrainingSequence
from rankadaptor_plugin.recovery import training
from rankadaptor_plugin.recovery.adapters import trainable_parameters
from rankadaptor_plugin.recovery.batches import passes
from rankadaptor_plugin.recovery.fine_tune import recover
from rankadaptor_plugin.recovery.training import learning_rate_factor

CONFIG = RecoveryConfig(
    max_steps=6,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    learning_rate=0.02,
    warmup_steps=1,
    lora_dropout=0.1,
)
ALLOCATION = RankAllocation((4, 2))


@pytest.fixture(scope="module")
def corpus():
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for length in (3, 5, 6, 8, 4, 7, 5, 6, 9, 4):
        tokens = torch.randint(3, 40, (length,), generator=generator)
        labels = tokens.clone()
        labels[: length // 2] = IGNORED
        sequences.append(TrainingSequence(tokens, labels))
    return Corpus(sequences=sequences, dropped=0)


def weights(recovered) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainable_parameters(recovered.model)]


def equal(one, other) -> bool:
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_the_loss_falls_and_the_base_stays(make_llama, corpus):
    base = make_llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = dataclasses.replace(CONFIG, max_steps=40, lora_dropout=0.0)
    first = recover(
        base, None, ALLOCATION, corpus, dataclasses.replace(config, max_steps=1), seed=0
    )
    last = recover(first.model, None, ALLOCATION, corpus, config, seed=0)
    assert last.train_loss < 0.7 * first.train_loss
    assert last.seconds > 0
    assert not last.model.training
    after = last.model.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].equal(before[name]) for name in before)


def test_a_seed_fixes_the_adapter_bit_for_bit(make_llama, corpus):
    first = recover(make_llama(), None, ALLOCATION, corpus, CONFIG, seed=7)
    bits = weights(first)
    torch.manual_seed(99)
    other = recover(first.model, None, RankAllocation((2, 8)), corpus, CONFIG, seed=7)
    again = recover(other.model, None, ALLOCATION, corpus, CONFIG, seed=7)
    assert again.train_loss == first.train_loss
    assert equal(bits, weights(again))
    assert not equal(bits, weights(recover(again.model, None, ALLOCATION, corpus, CONFIG, seed=8)))


def test_the_global_random_states_are_left_as_they_were(make_llama, corpus):
    base = make_llama()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    recovered = recover(base, None, ALLOCATION, corpus, CONFIG, seed=0)
    recover(recovered.model, None, ALLOCATION, corpus, CONFIG, seed=0)
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_all_allocations_see_the_same_batches_and_dropout(make_llama, corpus, monkeypatch):
    seen, masks = [], []

    def noting(batch, size, device):
        seen[-1].append([s.tokens.tolist() for s in batch])
        masks[-1].append(torch.get_rng_state())
        return passes(batch, size, device)

    monkeypatch.setattr(training, "passes", noting)
    base = make_llama()
    for ranks in ((4, 2), (2, 8), (8, 8)):
        seen.append([])
        masks.append([])
        base = recover(base, None, RankAllocation(ranks), corpus, CONFIG, seed=1).model
    assert seen[0] == seen[1] == seen[2]
    assert all(equal(masks[0], other) for other in masks[1:])
    once = [tuple(tokens) for batch in seen[0][:2] for tokens in batch]
    assert len(set(once)) == 8  # a pass over the corpus repeats nothing


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_give_the_result_of_one_batch(make_llama, corpus, micro):
    config = dataclasses.replace(
        CONFIG,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        lora_dropout=0.0,
        max_steps=3,
    )
    whole = recover(make_llama(), None, ALLOCATION, corpus, config, seed=0)
    config = dataclasses.replace(
        config, per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro
    )
    parts = recover(make_llama(), None, ALLOCATION, corpus, config, seed=0)
    assert parts.train_loss == pytest.approx(whole.train_loss, rel=1e-5)
    # AdamW magnifies rounding where a gradient is nearly 0.
    for one, other in zip(weights(whole), weights(parts), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)


def test_the_loss_is_that_of_the_responses_alone(make_llama, corpus):
    base = make_llama()
    total, count = 0.0, 0
    for sequence in corpus.sequences:
        logits = base(sequence.tokens[None]).logits[0]
        for position in range(1, len(sequence.tokens)):
            if sequence.labels[position] != IGNORED:
                target = sequence.tokens[position]
                total -= logits[position - 1].log_softmax(-1)[target].item()
                count += 1
    config = dataclasses.replace(
        CONFIG,
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(corpus.sequences),
        lora_dropout=0.0,
    )
    recovered = recover(base, None, ALLOCATION, corpus, config, seed=0)
    assert recovered.train_loss == pytest.approx(total / count, rel=1e-5)


def test_the_learning_rate_rises_and_falls_in_straight_lines():
    config = RecoveryConfig(max_steps=10, warmup_steps=2, lr_scheduler_type="linear")
    factors = [learning_rate_factor(step, config) for step in range(11)]
    expected = [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]
    assert factors == pytest.approx(expected)
    constant = dataclasses.replace(config, lr_scheduler_type="constant")
    assert {learning_rate_factor(step, constant) for step in range(2, 12)} == {1.0}
    short = RecoveryConfig(max_steps=2, warmup_steps=5)
    assert [learning_rate_factor(step, short) for step in range(2)] == pytest.approx([1 / 6, 1 / 3])
    assert learning_rate_factor(0, RecoveryConfig(warmup_steps=0)) == 1.0


def test_a_diverging_fine_tune_names_the_remedy_and_leaves_the_base_usable(make_llama, corpus):
    base = make_llama()
    names = [name for name, _ in base.named_parameters()]
    wild = dataclasses.replace(CONFIG, learning_rate=1e30, warmup_steps=0, max_grad_norm=0.0)
    message = r"loss is (nan|inf) at step \d of 6. Lower \[recovery\] learning_rate \(now 1e\+30\)"
    with pytest.raises(RecoveryError, match=message):
        recover(base, None, ALLOCATION, corpus, wild, seed=0)
    assert [name for name, _ in base.named_parameters()] == names
    recovered = recover(base, None, ALLOCATION, corpus, CONFIG, seed=0)
    bits = weights(recover(make_llama(), None, ALLOCATION, corpus, CONFIG, seed=0))
    assert equal(bits, weights(recovered))
    with pytest.raises(RecoveryError):
        recover(recovered.model, None, ALLOCATION, corpus, wild, seed=0)
    again = recover(recovered.model, None, ALLOCATION, corpus, CONFIG, seed=0)
    assert equal(bits, weights(again))
