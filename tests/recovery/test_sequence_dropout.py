"""Dropout that is the same however an optimizer step is cut into passes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankadaptor_plugin.config.tables import RecoveryConfig
from rankadaptor_plugin.corpus.sequences import Corpus, TrainingSequence
from rankadaptor_plugin.recovery.batches import passes
from rankadaptor_plugin.recovery.dropout import DropoutPlace, SequenceDropout, tell
from rankadaptor_plugin.recovery.recover import recover

CONFIG = RecoveryConfig(
    steps=4, batch_size=6, micro_batch_size=6, learning_rate=0.02, warmup_steps=1, dropout=0.3
)


def corpus_of(lengths=(3, 5, 6, 8, 4, 7, 5, 6, 9, 4)):
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 40, (length,), generator=generator) for length in lengths]
    return Corpus(sequences=[TrainingSequence(one, one) for one in tokens], dropped=0)


def run(make_llama, method="lora", seed=0, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return recover(make_llama(), None, [4, 4], corpus_of(), config, seed, method=method)


@pytest.mark.parametrize("method", ["lora", "adalora", "eva", "pissa", "dora", "lora-fa"])
def test_passes_do_not_change_a_fine_tune_with_dropout(make_llama, method):
    whole = run(make_llama, method)
    for changes in (
        {"micro_batch_size": 1},
        {"micro_batch_size": 4},
        {"layout": "padded", "micro_batch_size": 2},
        {"layout": "packed"},
        {"gradient_checkpointing": True},
        {"engine": "trainer", "micro_batch_size": 2},
    ):
        other = run(make_llama, method, **changes)
        torch.testing.assert_close(other.losses, whole.losses, rtol=1e-4, atol=1e-5)


def test_dropout_changes_a_fine_tune_and_its_seed_does_too(make_llama):
    plain, one, other = (
        run(make_llama, dropout=share, learning_rate=0.2).losses for share in (0.0, 0.3, 0.5)
    )
    assert len({round(losses[-1], 6) for losses in (plain, one, other)}) == 3
    assert run(make_llama).losses != run(make_llama, seed=1).losses


class Model(torch.nn.Module):
    def __init__(self, share, seed, name="layer"):
        super().__init__()
        self.dropout = SequenceDropout(share, name, DropoutPlace(seed))


def kept(share, seed, step, lengths, *, name="layer", layout="padded", features=64):
    model = Model(share, seed, name)
    (given_,) = passes(corpus_of(lengths).sequences, layout, len(lengths))
    tell(model, given_, step)
    rows = given_.inputs["input_ids"].shape
    return model.dropout(torch.ones(*rows, features))


@given(st.sampled_from([0.05, 0.3, 0.9]), st.integers(0, 2**31), st.integers(0, 10**6))
def test_the_share_is_as_asked_for_and_the_mean_stays(share, seed, step):
    found = kept(share, seed, step, (90, 80, 70), features=256)
    dropped = (found[0, :70] == 0).float()
    assert abs(float(dropped.mean()) - share) < 0.03
    assert abs(float(found.mean()) - 1) < 0.35
    # No token and no feature is dropped much more often than another.
    assert float((dropped.mean(0) - share).abs().max()) < 0.4
    assert float((dropped.mean(1) - share).abs().max()) < 0.25


def test_sequences_steps_matrices_and_seeds_have_masks_of_their_own():
    masks = [
        kept(0.5, 0, 0, (20, 20))[0],
        kept(0.5, 0, 0, (20, 20))[1],
        kept(0.5, 0, 1, (20, 20))[0],
        kept(0.5, 1, 0, (20, 20))[0],
        kept(0.5, 0, 0, (20, 20), name="other")[0],
    ]
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            alike = float(((one == 0) == (other == 0)).float().mean())
            assert 0.42 < alike < 0.58


def test_nothing_is_dropped_in_evaluation():
    model = Model(0.5, 0).eval()
    assert model.dropout(torch.ones(1, 3, 4)).equal(torch.ones(1, 3, 4))
