"""What a fine-tune takes: its memory is what it keeps, and nothing is changed by timing it."""

from __future__ import annotations

import copy

import pytest
import torch

from rankadaptor_plugin.config.tables import RecoveryConfig
from rankadaptor_plugin.core.progress import advance, watched
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.corpus.sequences import Corpus, TrainingSequence
from rankadaptor_plugin.models.footprint import kept_bytes, on_meta
from rankadaptor_plugin.recovery.adapters import LoraSettings, attach
from rankadaptor_plugin.recovery.cost import _adapted, fine_tune_pace, training_bytes
from rankadaptor_plugin.recovery.fused_lora import fused
from rankadaptor_plugin.recovery.slots import module_ranks

CONFIG = RecoveryConfig(
    max_steps=50, per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_steps=0
)
RANK, TOKENS = 4, 20


@pytest.fixture
def corpus():
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 40, (n,), generator=generator) for n in (3, 5, 6, 8, 4, 7, 5, 9)]
    return Corpus(sequences=[TrainingSequence(one, one) for one in tokens], dropped=0)


def meta_of(model):
    return on_meta(type(model), model.config, model.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_known_from_the_shapes(make_llama, dtype):
    model = make_llama().to(dtype)
    allocation = RankAllocation((RANK,) * 2)
    meta = meta_of(model).requires_grad_(False)
    with _adapted([meta.get_submodule(n) for n in module_ranks(meta, allocation)], RANK):
        predicted = kept_bytes(meta, TOKENS)
    tuned = attach(model, allocation, LoraSettings(), seed=0)
    own = {id(t.untyped_storage()) for t in (*tuned.parameters(), *tuned.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage
        return tensor

    bare = tuned.get_base_model()
    with fused(bare), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        bare.get_decoder()(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64), use_cache=False)
    found = sum(storage.nbytes() for storage in kept.values())
    assert predicted == found


def test_memory_grows_with_the_batch_and_shrinks_with_checkpointing(make_llama):
    meta = meta_of(make_llama(num_hidden_layers=8))
    one, four = (training_bytes(meta, CONFIG, RANK, rows, TOKENS) for rows in (1, 4))
    assert one < four < 4 * one
    light = copy.deepcopy(CONFIG.__dict__) | {"gradient_checkpointing": True}
    assert training_bytes(meta, RecoveryConfig(**light), RANK, 4, TOKENS) < 0.6 * four


def test_timing_leaves_the_model_as_it_was(make_llama, corpus):
    model = make_llama()
    before = copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    seen = []
    with watched(lambda **told: seen.append(told)):
        pace = fine_tune_pace(model, None, corpus, CONFIG, RANK, seed=0)
        advance("steps", 1, 2)
    assert pace.per_token > 0
    assert pace.begin > 0
    assert pace.tokens == 47 / 8
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert len(seen) == 1  # steps that are only timed are nobody's progress


def test_a_fine_tune_of_one_step_is_timed_by_it(make_llama, corpus):
    one = RecoveryConfig(**CONFIG.__dict__ | {"max_steps": 1})
    assert fine_tune_pace(make_llama(), None, corpus, one, RANK, seed=0).per_token > 0
