"""Fingerprints of base models: what changes them, what does not, and what they keep apart."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, get_peft_model

from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.recovery.adapters import LoraSettings, attach
from rankadaptor_plugin.recovery.files import (
    RECORD,
    check_base,
    fingerprint,
    load,
    merged,
    save_adapter,
)

RANKS = RankAllocation((4, 2))


@pytest.fixture
def saved(make_llama, tmp_path):
    """An adapter that was trained on the model with seed 0."""
    model = attach(make_llama(), RANKS, seed=0)
    save_adapter(model, tmp_path / "adapter", {"recipe": "quick"})
    return tmp_path / "adapter"


def test_other_weights_have_another_hash_but_the_same_shapes(make_llama):
    one, other = fingerprint(make_llama()), fingerprint(make_llama(seed=1))
    assert one["shapes"] == other["shapes"]
    assert one["weights"] != other["weights"]


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_changes_nothing(make_llama, dora):
    base = make_llama()
    bare = fingerprint(base)
    model = attach(base, RANKS, LoraSettings(use_dora=dora), seed=0)
    assert fingerprint(model) == fingerprint(model.get_base_model()) == bare


def test_an_adapter_of_another_kind_changes_nothing(make_llama):
    base = make_llama()
    bare = fingerprint(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = get_peft_model(base, AdaLoraConfig(target_modules=["q_proj"], total_step=9))
    assert fingerprint(model) == bare


def test_a_checkpoint_has_one_hash_in_float32_and_bfloat16(make_llama):
    assert fingerprint(make_llama().to(torch.bfloat16)) == fingerprint(make_llama())


def test_float16_is_compared_by_shapes_alone(make_llama):
    found = fingerprint(make_llama().to(torch.float16))
    assert found == {**fingerprint(make_llama()), "weights": ""}


def test_weights_that_are_not_in_memory_are_not_compared(make_llama):
    assert fingerprint(make_llama().to("meta"))["weights"] == ""


@settings(max_examples=25)
@given(layer=st.integers(0, 1), row=st.integers(0, 23), column=st.integers(0, 15))
def test_one_changed_number_of_a_small_tensor_is_seen(make_llama, layer, row, column):
    model = make_llama()
    before = fingerprint(model)["weights"]
    with torch.no_grad():
        model.model.layers[layer].mlp.up_proj.weight[row, column] += 1
    assert fingerprint(model)["weights"] != before


def test_large_tensors_are_sampled_to_their_end():
    model = torch.nn.Linear(1, 5000, bias=False)
    before = fingerprint(model)["weights"]
    with torch.no_grad():
        model.weight[4500:] += 1
    assert fingerprint(model)["weights"] != before


def test_an_adapter_goes_back_on_its_own_base(make_llama, saved):
    for base in (make_llama(), make_llama().to(torch.bfloat16), make_llama().to(torch.float16)):
        assert load(base, saved).peft_config["default"].r == 4


@pytest.mark.parametrize("put_on", [load, merged])
def test_another_base_of_the_same_shape_is_refused_with_both_hashes(make_llama, saved, put_on):
    base, other = fingerprint(make_llama()), make_llama(seed=1)
    with pytest.raises(ArtifactError) as caught:
        put_on(other, saved)
    text = str(caught.value)
    assert text.startswith(f"The adapter in {saved} was trained on another base model")
    assert base["weights"] in text
    assert fingerprint(other)["weights"] in text
    assert "\n" not in text
    assert not any("lora" in name for name, _ in other.named_parameters())


@pytest.mark.parametrize("put_on", [load, merged])
def test_another_shape_is_refused_before_peft_is_asked(make_llama, saved, put_on):
    with pytest.raises(ArtifactError, match=r"another base model \(shapes"):
        put_on(make_llama(intermediate_size=20), saved)


def test_an_adapter_without_a_record_is_not_checked(make_llama, saved):
    (saved / RECORD).unlink()
    check_base(make_llama(seed=1), saved)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"base": 3}', '{"base": {"shapes": "x"}}', '{"base": "\udcff"}']
)
def test_a_torn_record_is_one_line(make_llama, saved, text):
    (saved / RECORD).write_bytes(text.encode("utf-8", "surrogateescape"))
    for put_on in (load, merged):
        with pytest.raises(ArtifactError, match=rf"{RECORD} cannot be read") as caught:
            put_on(make_llama(), saved)
        assert "\n" not in str(caught.value)
