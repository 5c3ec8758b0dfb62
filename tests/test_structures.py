from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rankadaptor_plugin.errors import UnsupportedModelError
from rankadaptor_plugin.pruned_classes import to_pruned
from rankadaptor_plugin.pruning import remove
from rankadaptor_plugin.structures import (
    base_widths,
    decoder_layers,
    layer_widths,
    structure_of,
)
from rankadaptor_plugin.units import LayerWidths

VARIANTS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
}


def tiny(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases and norms start at constants, which hide mistakes
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def logits(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_removing_units_equals_zeroing_what_reads_them(variant):
    model = tiny(**VARIANTS[variant])
    masked = copy.deepcopy(model)
    structure = structure_of(model)
    groups = len(structure.units(decoder_layers(model)[0]).attention[0].indices)
    cuts = {1: ([0] if groups > 1 else [], []), 2: ([], [0, 5, 23]), 3: ([groups - 1], [1, 2])}
    if groups == 1:
        cuts[3] = ([], [1, 2])
    for index, numbers in cuts.items():
        for kind, removed in zip(
            structure.units(decoder_layers(masked)[index]), numbers, strict=True
        ):
            for member in kind:
                if member.side == "in":
                    member.module.weight.data[:, member.indices[removed].flatten()] = 0
        for kind, removed in zip(
            structure.units(decoder_layers(model)[index]), numbers, strict=True
        ):
            remove(kind, removed)
    tokens = torch.randint(0, 96, (2, 9))
    to_pruned(model)
    assert layer_widths(model)[2] == LayerWidths(4, groups, 21)
    assert (logits(model, tokens) - logits(masked, tokens)).abs().max() < 1e-5


def test_units_equal_the_groups_of_the_dependency_graph():
    model = tiny()
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    graph = tp.DependencyGraph().build_dependency(
        model,
        {"input_ids": torch.randint(0, 96, (1, 7))},
        forward_fn=lambda m, inputs: m(**inputs, use_cache=False).logits,
        ignored_params=norms,
        verbose=False,
    )
    for layer in decoder_layers(model):
        for kind in structure_of(model).units(layer):
            for number in (0, 3):
                ours = {(m.module, m.side, tuple(m.indices[number].tolist())) for m in kind}
                root = kind[0]
                group = graph.get_pruning_group(
                    root.module, tp.prune_linear_out_channels, root.indices[number].tolist()
                )
                traced = {
                    (
                        item.dep.target.module,
                        "out" if item.dep.handler == tp.prune_linear_out_channels else "in",
                        tuple(sorted(item.idxs)),
                    )
                    for item in group
                    if isinstance(item.dep.target.module, torch.nn.Linear)
                }
                assert ours == traced


def test_a_group_holds_one_key_value_head_and_its_query_heads():
    model = tiny(num_key_value_heads=2)
    units = structure_of(model).units(decoder_layers(model)[0])
    rows = {m.name: m.indices[1].tolist() for m in units.attention}
    assert rows == {
        "self_attn.q_proj": list(range(16, 32)),
        "self_attn.k_proj": list(range(8, 16)),
        "self_attn.v_proj": list(range(8, 16)),
        "self_attn.o_proj": list(range(16, 32)),
    }
    assert {m.side for m in units.mlp if m.name != "mlp.down_proj"} == {"out"}


def test_widths_before_and_after():
    model = tiny(num_key_value_heads=2)
    assert layer_widths(model) == (LayerWidths(4, 2, 24),) * 4
    remove(structure_of(model).units(decoder_layers(model)[1]).attention, [0])
    to_pruned(model)
    assert structure_of(model).model_type == "llama"
    assert layer_widths(model)[1] == LayerWidths(2, 1, 24)
    assert base_widths(model) == LayerWidths(4, 2, 24)


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_counted_at_any_width(bias):
    model = tiny(attention_bias=bias, mlp_bias=bias, num_key_value_heads=2)
    structure, layer = structure_of(model), decoder_layers(model)[0]
    before, after = LayerWidths(4, 2, 24), LayerWidths(2, 1, 20)
    counted = structure.parameters(layer, after, 32)
    norms = sum(p.numel() for name, p in layer.named_parameters() if "norm" in name)
    total = sum(p.numel() for p in layer.parameters()) - norms
    assert structure.parameters(layer, before, 32) == total
    structure.resize(layer, after, 32)
    assert sum(p.numel() for p in layer.parameters()) - norms == counted


def test_an_unsupported_family_is_named():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModelError, match=r'"gpt2" is not supported.*type llama'):
        structure_of(model)
    with pytest.raises(UnsupportedModelError, match='"Linear" is not supported'):
        structure_of(torch.nn.Linear(1, 1))


def test_a_matrix_that_is_not_plain_is_named():
    class Packed(torch.nn.Linear):
        pass

    model = tiny()
    model.model.layers[0].mlp.up_proj = Packed(32, 24)
    with pytest.raises(UnsupportedModelError, match=r"mlp.up_proj is a Packed"):
        structure_of(model).units(decoder_layers(model)[0])


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda m: _rows(m.self_attn.q_proj, 3), r"Layer 1: .*q_proj has 29 rows.*3.625 heads"),
        (lambda m: _rows(m.self_attn.q_proj, 8), "3 query heads cannot share 2 key-value heads"),
        (lambda m: _rows(m.self_attn.v_proj, 8), r"v_proj has shape \(8, 32\), but \(16, 32\)"),
        (lambda m: _rows(m.mlp.down_proj, 2), r"down_proj has shape \(30, 24\), but \(32, 24\)"),
        (lambda m: _rows(m.mlp.gate_proj, 1), r"mlp.up_proj has shape \(24, 32\), but \(23, 32\)"),
    ],
)
def test_matrices_that_do_not_fit_are_named(cut, message):
    model = tiny(num_key_value_heads=2)
    cut(model.model.layers[1])
    with pytest.raises(UnsupportedModelError, match=message):
        layer_widths(model)


def test_a_pruned_hidden_size_is_an_error():
    model = tiny()
    model.config.hidden_size = 40
    with pytest.raises(UnsupportedModelError, match=r"embeddings have size 32.*is 40"):
        layer_widths(model)


def _rows(linear, count):
    tp.prune_linear_out_channels(linear, list(range(count)))
