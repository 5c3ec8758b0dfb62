"""Units, widths and shapes read off models; the suite of each family is in test_families.py."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from transformers import AutoConfig, AutoModelForCausalLM

from rankadaptor_plugin.core.errors import UnsupportedModelError
from rankadaptor_plugin.models.families import BUILT_IN, GPT2, LLAMA
from rankadaptor_plugin.models.modeling_rankadaptor import LayerWidths
from rankadaptor_plugin.models.structures import (
    decoder_layers,
    group_matrices,
    hidden_units,
    layer_units,
    layer_widths,
    structure_of,
)
from rankadaptor_plugin.pruning.cutting import remove, traceable

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
GQA = {"num_key_value_heads": 2}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
OPT = {"ffn_dim": 24, "word_embed_proj_dim": 32}
FALCON = {"ffn_hidden_size": 24}


def tiny(model_type: str = "llama", **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


# ------------------------------------------------------------------ the graph of torch-pruning

# From which matrices of the attention torch-pruning 1.6.1 finds the group of a unit. Of grouped
# queries it does so from their own side alone, and in eager attention alone. Not at all, also with
# `traceable`: of one key-value head with separate matrices, where it takes that head along, and of
# an interleaved matrix. GPT-2 is left out, as its Conv1D is no layer that torch-pruning knows.
EVERY, OUTER, NONE = slice(None), slice(0, None, 3), slice(0)
GRAPHS = {
    "llama": ("llama", {}, EVERY),
    "llama-gqa-2": ("llama", GQA, OUTER),
    "llama-gqa-4": ("llama", {**GQA, "num_attention_heads": 8}, OUTER),
    "llama-biases": ("llama", {**GQA, "attention_bias": True, "mlp_bias": True}, OUTER),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}, NONE),
    "mistral": ("mistral", {}, EVERY),
    "mistral-gqa": ("mistral", GQA, OUTER),
    "qwen2": ("qwen2", {}, EVERY),
    "qwen2-gqa": ("qwen2", GQA, OUTER),
    "qwen3": ("qwen3", {"head_dim": 8}, EVERY),
    "qwen3-gqa": ("qwen3", {**GQA, "head_dim": 8}, OUTER),
    "gemma": ("gemma", GEMMA, EVERY),
    "gemma-gqa": ("gemma", {**GEMMA, **GQA}, OUTER),
    "gemma2": ("gemma2", GEMMA, EVERY),
    "gemma2-gqa": ("gemma2", {**GEMMA, **GQA}, OUTER),
    "gemma3": ("gemma3_text", GEMMA, EVERY),
    "gemma3-gqa": ("gemma3_text", {**GEMMA, **GQA}, OUTER),
    "phi3": ("phi3", {}, EVERY),
    "phi3-gqa": ("phi3", GQA, EVERY),
    "opt": ("opt", OPT, EVERY),
    "gpt-neox": ("gpt_neox", {}, NONE),
    "bloom": ("bloom", {"n_layer": 4, "n_head": 4}, NONE),
    "falcon-multi-query": ("falcon", FALCON, EVERY),
    "falcon-gqa": (
        "falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        NONE,
    ),
    "falcon-classic": ("falcon", {**FALCON, "multi_query": False}, NONE),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_units_equal_the_groups_of_the_dependency_graph(name):
    model_type, changes, roots = GRAPHS[name]
    model = tiny(model_type, **changes)
    with traceable():
        graph = tp.DependencyGraph().build_dependency(
            model,
            {"input_ids": torch.randint(3, 96, (1, 7))},
            forward_fn=lambda m, inputs: m(**inputs, use_cache=False).logits,
            ignored_params=[p for name, p in model.named_parameters() if "norm" in name],
            verbose=False,
        )
        units = layer_units(model)[1]
        for kind, chosen in ((units.attention, roots), (units.mlp, EVERY)):
            for root in kind[chosen]:
                for number in (0, -1):
                    ours = {(m.module, m.side): set(m.indices[number].tolist()) for m in kind}
                    assert group(graph, root, number) == ours, (root.name, number)


def group(graph, root, number) -> dict:
    """The linear layers of a group, and their rows or columns."""
    cut = {"out": tp.prune_linear_out_channels, "in": tp.prune_linear_in_channels}
    sides = {function: side for side, function in cut.items()}
    found: dict = {}
    for item in graph.get_pruning_group(root.module, cut[root.side], root.indices[number].tolist()):
        if isinstance(item.dep.target.module, torch.nn.Linear):
            key = (item.dep.target.module, sides[item.dep.handler])
            found.setdefault(key, set()).update(item.idxs)
    return found


# -------------------------------------------------------------------------------------- units


def rows(first: int, last: int) -> list[int]:
    return list(range(first, last))


def test_query_heads_that_share_one_key_value_head_are_units_of_their_own():
    units = layer_units(tiny(num_key_value_heads=1))[0].attention
    assert {m.name: m.indices.tolist()[2] for m in units} == {
        "self_attn.q_proj": rows(16, 24),
        "self_attn.o_proj": rows(16, 24),
    }
    single = tiny(num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    assert len(layer_units(single)[0].attention) == 4  # here the key-value head goes along


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("bloom", {"n_layer": 4, "n_head": 4}), ("falcon", {**FALCON, "alibi": True})],
    ids=["bloom", "falcon"],
)
def test_heads_are_no_units_where_alibi_numbers_them(model_type, changes):
    units = layer_units(tiny(model_type, **changes))[0]
    assert units.attention == ()
    assert units.mlp


def test_a_hidden_channel_runs_through_all_matrices():
    model = tiny(**GQA)
    units = hidden_units(model)
    assert len(units) == 4 * len(structure_of(model).matrices)
    assert {m.name for m in units if m.side == "out"} == {"self_attn.o_proj", "mlp.down_proj"}
    assert all(m.indices.tolist() == [[i] for i in range(32)] for m in units)


def test_a_family_whose_hidden_size_stays_is_named():
    with pytest.raises(UnsupportedModelError, match=r'"gemma" cannot be pruned.*llama, mistral'):
        hidden_units(tiny("gemma", **GEMMA))


def test_a_matrix_that_is_not_plain_is_named():
    class Packed(torch.nn.Module):
        weight = torch.ones(24, 32)

    model = tiny()
    mlp = model.model.layers[0].mlp
    whole, mlp.up_proj = mlp.up_proj, Packed()
    for read in (layer_units, hidden_units):
        with pytest.raises(UnsupportedModelError, match=r"mlp.up_proj is a Packed, not a plain"):
            read(model)
    whole.weight = torch.nn.Parameter(torch.ones(24, 32).char(), requires_grad=False)
    mlp.up_proj = whole
    with pytest.raises(UnsupportedModelError, match=r"mlp.up_proj is a Linear, not a plain"):
        layer_units(model)


# --------------------------------------------------------------------------- widths and shapes


def test_widths_before_and_after():
    model = tiny(**GQA)
    assert layer_widths(model) == (LayerWidths(4, 2, 24),) * 4
    units = layer_units(model)[1]
    remove(units.attention, [0])
    remove(units.mlp, [3, 7])
    whole = LayerWidths(4, 2, 24)
    assert layer_widths(model) == (whole, LayerWidths(2, 1, 22), whole, whole)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {**GQA, "attention_bias": True, "mlp_bias": True}),
        ("phi3", GQA),
        ("opt", OPT),
        ("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 24}),
    ],
    ids=["llama", "phi3", "opt", "gpt2"],
)
def test_a_resized_layer_has_the_shapes_that_were_foretold(model_type, changes):
    model = tiny(model_type, **changes)
    structure, layer = structure_of(model), decoder_layers(model)[0]
    groups = layer_widths(model)[0].kv_heads
    after = LayerWidths(4 // groups, 1, 20)
    shapes = structure.shapes(layer, after, 32)
    structure.resize(layer, after, 32)
    assert layer_widths(model)[0] == after
    for name, (height, width) in shapes.items():
        matrix = layer.get_submodule(name)
        assert matrix.weight.numel() == height * width
        assert matrix.bias is None or len(matrix.bias) == height


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda m: _rows(m.self_attn.q_proj, 3), r"q_proj has 29 rows.*3.625 heads"),
        (lambda m: _rows(m.self_attn.q_proj, 8), r"q_proj has shape \(24, 32\), but \(32, 32\)"),
        (lambda m: _rows(m.self_attn.k_proj, 16), r"k_proj has 0 rows"),
        (lambda m: _rows(m.self_attn.v_proj, 8), r"v_proj has shape \(8, 32\), but \(16, 32\)"),
        (lambda m: _rows(m.mlp.down_proj, 2), r"down_proj has shape \(30, 24\), but \(32, 24\)"),
        (lambda m: _rows(m.mlp.gate_proj, 1), r"up_proj has shape \(24, 32\), but \(23, 32\)"),
        (
            lambda m: (_rows(m.self_attn.q_proj, 8), _columns(m.self_attn.o_proj, 8)),
            "3 query heads cannot share 2 key-value heads",
        ),
        (lambda m: _columns(m.self_attn.o_proj, 4), r"o_proj has 28 columns.*3.5 heads"),
    ],
)
def test_matrices_that_do_not_fit_are_named(cut, message):
    model = tiny(**GQA)
    cut(model.model.layers[1])
    with pytest.raises(UnsupportedModelError, match=rf"Layer 1: .*({message})"):
        layer_widths(model)


@pytest.mark.parametrize("structure", BUILT_IN, ids=lambda structure: structure.model_type)
def test_every_matrix_is_in_one_group_of_each_kind(structure):
    kinds = group_matrices(structure)
    assert list(kinds) == ["layer", "group", "projection"]
    for groups in kinds.values():
        assert tuple(name for names in groups.values() for name in names) == structure.matrices
    assert list(kinds["layer"]) == [""]
    assert list(kinds["group"]) == ["attention", "mlp"]


def test_projections_are_named_by_the_last_part_where_it_is_unique():
    assert list(group_matrices(LLAMA)["projection"]) == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    assert list(group_matrices(GPT2)["projection"]) == [
        *("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")
    ]


def test_a_hidden_size_unlike_that_of_the_config_is_an_error():
    model = tiny()
    model.config.hidden_size = 40
    with pytest.raises(UnsupportedModelError, match=r"q_proj has shape.*its hidden size 40"):
        layer_widths(model)


def _rows(linear, count):
    tp.prune_linear_out_channels(linear, list(range(count)))


def _columns(linear, count):
    tp.prune_linear_in_channels(linear, list(range(count)))
