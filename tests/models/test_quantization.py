"""Quantized loading: refused early where it cannot work; packed weights count as what they are."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.models import device as quantization
from rankadaptor_plugin.models.device import quantization_config
from rankadaptor_plugin.models.pruned_model import PrunedModel, load_pruned
from rankadaptor_plugin.models.structures import (
    decoder_layers,
    layer_units,
    layer_widths,
    structure_of,
)
from rankadaptor_plugin.pruning.cutting import remove
from rankadaptor_plugin.recovery.files import fingerprint
from rankadaptor_plugin.recovery.slots import rank_costs

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Packed(torch.nn.Linear):
    """A matrix whose weights lie packed in bytes, two to a byte, as bitsandbytes keeps 4 bits."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        packed = torch.zeros(plain.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)


@pytest.fixture
def installed(monkeypatch):
    found = importlib.util.find_spec("torch")
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: found)


@pytest.fixture
def packed_llama(make_llama):
    model = make_llama()
    for layer in decoder_layers(model):
        for name in structure_of(model).matrices:
            layer.set_submodule(name, Packed(layer.get_submodule(name)))
    return model


@pytest.fixture
def pruned(make_llama, make_tokenizer):
    model = make_llama()
    attention, mlp = layer_units(model)[1]
    remove(attention, [0])
    remove(mlp, [1, 2])
    return PrunedModel.of(model, make_tokenizer())


def test_nothing_is_quantized_by_default():
    assert quantization_config("", CPU, "auto") is None


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_a_device_without_cuda_is_refused_in_one_line(quantize):
    text = f'quantize is "{quantize}", which needs a CUDA GPU, but the device is cpu'
    with pytest.raises(ConfigError, match=text) as caught:
        quantization_config(quantize, CPU, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "rankadaptor-plugin\[quant\]"'):
        quantization_config("4bit", GPU, torch.bfloat16)


def test_an_unknown_width_is_refused():
    with pytest.raises(ConfigError, match='quantize is "2bit"'):
        quantization_config("2bit", GPU, "auto")


@pytest.mark.usefixtures("installed")
def test_four_bits_compute_in_the_type_of_the_run():
    config = quantization_config("4bit", GPU, torch.float16)
    assert config.load_in_4bit
    assert config.bnb_4bit_compute_dtype == torch.float16
    assert quantization_config("4bit", GPU, "auto").bnb_4bit_compute_dtype == torch.bfloat16
    config = quantization_config("8bit", GPU, "auto")
    assert (config.load_in_8bit, config.load_in_4bit) == (True, False)


def test_a_pruned_model_is_not_loaded_quantized_without_a_gpu(pruned, tmp_path):
    pruned.save(tmp_path / "pruned")
    with pytest.raises(ConfigError, match="needs a CUDA GPU"):
        load_pruned(tmp_path / "pruned", "cpu", quantize="8bit")


def test_quantized_weights_are_made_on_their_device(pruned, tmp_path, monkeypatch):
    """bitsandbytes is not asked: the loader sees what it would get, and then the plain weights."""
    pruned.save(tmp_path / "pruned")
    seen, plain = {}, AutoModelForCausalLM.from_pretrained

    def load(folder, *, quantization_config, device_map, **options):
        seen.update(quantization=quantization_config, device_map=device_map)
        return plain(folder, **options)

    monkeypatch.setattr(
        "rankadaptor_plugin.models.pruned_model.quantization_config", lambda *_: "in few bits"
    )
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    loaded = load_pruned(tmp_path / "pruned", "cpu", quantize="4bit")
    assert seen == {"quantization": "in few bits", "device_map": {"": CPU}}
    assert loaded.record() == pruned.record()


def test_packed_matrices_have_the_shapes_and_costs_of_plain_ones(packed_llama, make_llama):
    plain = make_llama()
    assert layer_widths(packed_llama) == layer_widths(plain)
    assert rank_costs(packed_llama) == rank_costs(plain)


def test_packed_weights_have_no_hash_but_that_of_their_shapes(packed_llama, make_llama):
    plain, found = fingerprint(make_llama()), fingerprint(packed_llama)
    assert found == {"shapes": plain["shapes"], "weights": ""}


def test_a_pruned_model_attends_with_sdpa_when_it_is_loaded(pruned, tmp_path):
    pruned.save(tmp_path / "pruned")
    loaded = load_pruned(tmp_path / "pruned").model
    assert loaded.config._attn_implementation == "sdpa"
    attention = [m for m in loaded.modules() if hasattr(m, "q_proj")]
    assert {m.config._attn_implementation for m in attention} == {"sdpa"}
