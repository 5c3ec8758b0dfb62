"""PEFT and torch still have what is used beyond their documented interfaces."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankadaptor_plugin.config.tables import RecoveryConfig
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.recovery import peft_internals as internals
from rankadaptor_plugin.recovery.adapters import attach
from rankadaptor_plugin.recovery.methods import begin, parse_method

USES = {
    "Linear": "fused LoRA (fused_lora) is skipped or wrong",
    "LoraLayer": "adapted modules are not found (adapters)",
    "BaseTunerLayer": "a failed fine-tune leaves its layers on the model (adapters)",
    "IncrementalPCA": "EVA has no components (methods/eva)",
    "dequantize_module_weight": "PiSSA of quantized weights fails (methods/pissa)",
}
RANKS = RankAllocation((2, 2))


def lacking(found, names):
    return [name for name in names if not hasattr(found, name)]


@pytest.mark.parametrize("name", USES)
def test_the_module_has_all_that_is_used(name):
    assert hasattr(internals, name), f"Without {name}: {USES[name]}"


def test_a_lora_layer_has_what_fusing_and_saving_read(make_llama):
    model = attach(make_llama(), RANKS, seed=0)
    names = {name for name, m in model.named_modules() if isinstance(m, internals.LoraLayer)}
    assert names
    for name in names:
        layer = model.get_submodule(name)
        assert name.startswith(internals.WRAPPER), "names of adapted modules are wrong (adapters)"
        assert type(layer) is internals.Linear, USES["Linear"]
        assert not lacking(layer, internals.LORA_LAYER), "fused LoRA and saving read them"
        assert f"{name}{internals.WRAPPED}weight" in dict(model.named_parameters()), (
            "the hash of the base model counts the adapter (files)"
        )


def test_adalora_has_what_settling_its_ranks_reads(make_llama):
    tuned = begin(
        make_llama(),
        parse_method("adalora"),
        RANKS,
        RecoveryConfig(),
        seed=0,
        steps=4,
        sequences=[],
    )
    allocator = tuned.model.base_model.rankallocator
    assert not lacking(allocator, internals.ADALORA_ALLOCATOR), "AdaLoRA's budget cannot be set"
    layers = [m for m in tuned.model.modules() if hasattr(m, "lora_E")]
    assert layers
    for layer in layers:
        assert not lacking(layer, internals.ADALORA_LAYER), "AdaLoRA cannot end as plain LoRA"


def test_hooks_of_a_module_are_seen():
    module = nn.Linear(2, 2)
    assert not internals.has_hooks(module)
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert internals.has_hooks(module), "fused LoRA would skip a matrix's hooks (fused_lora)"
        handle.remove()
    assert torch.equal(module(torch.zeros(1, 2)), module.bias[None])
