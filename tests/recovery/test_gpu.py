"""What only a GPU runs: half precision, too little memory, quantized weights.

pytest -m gpu tests/recovery/test_gpu.py
"""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from rankadaptor_plugin.config.tables import RecoveryConfig
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.corpus.sequences import IGNORED, Corpus, TrainingSequence
from rankadaptor_plugin.models.device import peak_memory_bytes
from rankadaptor_plugin.recovery import training
from rankadaptor_plugin.recovery.batches import padded, pass_loss
from rankadaptor_plugin.recovery.fine_tune import recover

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CUDA = torch.device("cuda", 0)
ALLOCATION = RankAllocation((4, 2))
SIZES = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.05}


def settings(**changes) -> RecoveryConfig:
    chosen = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-3,
        "warmup_steps": 1,
    }
    return RecoveryConfig(**{**chosen, **changes})


@pytest.fixture(scope="module")
def corpus():
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (9, 30, 12, 25, 18, 40, 15, 22, 35, 11):
        tokens = torch.randint(3, 40, (length,), generator=generator)
        labels = tokens.clone()
        labels[: length // 2] = IGNORED
        made.append(TrainingSequence(tokens, labels))
    return Corpus(sequences=made, dropped=0)


@pytest.fixture
def make_base(make_llama):
    def make(dtype=torch.float32, device=CUDA, attention="sdpa"):
        model = make_llama(**SIZES)
        model.set_attn_implementation(attention)
        return model.to(device=device, dtype=dtype)

    return make


@pytest.fixture
def tuned_on(corpus, make_tokenizer):
    def tuned(base, config, **options):
        return recover(base, make_tokenizer(), ALLOCATION, corpus, config, **options)

    return tuned


def weights(model) -> torch.Tensor:
    found = [p for n, p in model.named_parameters() if ".lora_" in n]
    return torch.cat([p.detach().float().cpu().flatten() for p in found])


def test_a_gpu_gives_the_losses_of_the_cpu(make_base, tuned_on):
    there, here = (tuned_on(make_base(device=d), settings()) for d in (CUDA, torch.device("cpu")))
    torch.testing.assert_close(there.losses, here.losses, rtol=1e-3, atol=1e-3)
    # As a whole: Adam turns the rounding of a gradient near zero into a whole step.
    ours, theirs = weights(here.model), weights(there.model)
    assert (theirs - ours).norm() < 0.02 * ours.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_has_float32_adapters_and_stays(make_base, tuned_on, dtype):
    base = make_base(dtype)
    before = copy.deepcopy(base.state_dict())
    done = tuned_on(base, settings(max_steps=20))
    assert done.losses[-1] < done.losses[0]
    assert {p.dtype for n, p in done.model.named_parameters() if ".lora_" in n} == {torch.float32}
    after = done.model.unload().state_dict()
    assert all(after[name].equal(before[name]) for name in before)


def test_checkpointing_takes_less_memory_for_the_same_losses(make_llama, tuned_on):
    peaks, losses = [], []
    for wanted in (False, True):
        base = make_llama(**SIZES | {"intermediate_size": 4096}).to(CUDA)
        before = torch.cuda.memory_allocated(CUDA)
        torch.cuda.reset_peak_memory_stats(CUDA)
        losses.append(tuned_on(base, settings(gradient_checkpointing=wanted)).losses)
        peaks.append(peak_memory_bytes(CUDA) - before)
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    assert peaks[1] < 0.8 * peaks[0]


def test_too_little_memory_halves_the_pass(make_base, tuned_on, monkeypatch):
    def hungry(model, given, **options):
        if len(given.input_ids) > 2:
            torch.empty(2**50, dtype=torch.uint8, device=CUDA)  # more than any GPU has
        return pass_loss(model, given, **options)

    whole = tuned_on(make_base(), settings())
    monkeypatch.setattr(training, "pass_loss", hungry)
    less = tuned_on(make_base(), settings())
    assert less.per_device_train_batch_size == 2
    torch.testing.assert_close(less.losses, whole.losses, rtol=1e-3, atol=1e-3)


def test_a_seed_fixes_dropout_on_the_gpu(make_base, tuned_on):
    config = settings(lora_dropout=0.3)
    state = torch.cuda.get_rng_state(CUDA)
    one, same = (tuned_on(make_base(), config, seed=3) for _ in range(2))
    torch.testing.assert_close(one.losses, same.losses)
    assert torch.cuda.get_rng_state(CUDA).equal(state)


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_a_quantized_base_is_fine_tuned(make_base, tuned_on, tmp_path, quantize):
    from rankadaptor_plugin.models.device import quantization_config

    make_base(torch.bfloat16, device="cpu").save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=quantization_config(quantize, CUDA, torch.bfloat16),
        device_map={"": CUDA},
        dtype=torch.bfloat16,
    )
    done = tuned_on(base, settings(max_steps=20))
    assert done.losses[-1] < done.losses[0]


def test_peak_memory_is_that_of_the_gpu():
    torch.cuda.reset_peak_memory_stats(CUDA)
    before = peak_memory_bytes(CUDA)
    block = torch.empty(2**26, dtype=torch.uint8, device=CUDA)
    assert peak_memory_bytes(CUDA) - before >= block.numel()


def test_a_pass_is_copied_to_the_gpu_as_it_is(corpus):
    given = padded(corpus.sequences)
    there = given.to(CUDA)
    for name in ("input_ids", "positions", "targets", "lengths"):
        assert getattr(there, name).device == CUDA
        assert getattr(there, name).cpu().equal(getattr(given, name))
    assert there.to(CUDA).input_ids is there.input_ids
