"""Which units the pruners cut, how many, what bad settings give; and pruners of torch-pruning."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rankadaptor_plugin.config.tables import PruneConfig
from rankadaptor_plugin.core.errors import ConfigError, UnsupportedModelError
from rankadaptor_plugin.models.footprint import footprint
from rankadaptor_plugin.models.modeling_rankadaptor import LayerWidths
from rankadaptor_plugin.models.pruned_model import load_pruned
from rankadaptor_plugin.models.structures import layer_units
from rankadaptor_plugin.pruning.channel import prune_channel
from rankadaptor_plugin.pruning.cutting import after_pruning, describe_pruned, remove, traceable
from rankadaptor_plugin.pruning.importance import unit_scores
from rankadaptor_plugin.pruning.width import (
    layer_counts,
    prunable,
    prune_width,
    share_removed,
    unit_ratio,
)

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"w0": 0})))
SAMPLES = [
    torch.randint(0, 96, (t,), generator=torch.Generator().manual_seed(t)) for t in (8, 11, 6)
]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}


def tiny(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=SAMPLES[0][None], use_cache=False).logits


def table(**changes) -> PruneConfig:
    return PruneConfig(**{"keep_first": 1, "keep_last": 1, **changes})


def prune(model, **changes):
    return prune_width(model, TOKENIZER, SAMPLES, table(**changes))


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2, "tie_word_embeddings": True}])
@pytest.mark.parametrize("importance", ["taylor", "magnitude", "wanda"])
def test_the_least_important_units_go(changes, importance, tmp_path):
    model = tiny(**changes)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    masked = copy.deepcopy(model)
    config = table(importance=importance)
    units = layer_units(masked)[1:4]
    scores = unit_scores(masked, [kind for layer in units for kind in layer], SAMPLES, config)
    shares = [0.0]
    groups = model.config.num_key_value_heads
    for number, layer in enumerate(units):
        attention, mlp = scores[2 * number : 2 * number + 2]
        for score, kind, count in (
            (attention, layer.attention, groups // 2),
            (mlp, layer.mlp, 12),
        ):
            lost = kind[-1].indices[score.argsort()[:count]].flatten()
            kind[-1].module.weight.data[:, lost] = 0
        own = torch.cat([attention, mlp]).sum()
        kept = sum(score.sort().values[len(score) // 2 :].sum() for score in (attention, mlp))
        shares.append(1 - float(kept / own))
    pruned = prune(model, importance=importance)
    assert pruned.importance_lost == pytest.approx((*shares, 0.0))
    assert all(0 < share < 0.5 for share in shares[1:])
    assert pruned.pruned_layers == (False, True, True, True, False)
    assert pruned.widths[2] == LayerWidths(2, groups // 2, 12)
    assert (logits(pruned.model) - logits(masked)).abs().max() < 1e-5
    assert pruned.base_parameters == masked.num_parameters()
    assert (pruned.provenance["pruning_ratio"], pruned.provenance["importance"]) == (
        0.5,
        importance,
    )
    frozen = [name for name, p in pruned.model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.layers.1.mlp.up_proj.weight"]
    pruned.save(tmp_path / "pruned")
    loaded = load_pruned(tmp_path / "pruned")
    assert torch.equal(logits(loaded.model), logits(pruned.model))
    assert loaded.importance_lost == pruned.importance_lost


@pytest.mark.parametrize(
    ("ratio", "heads", "channels"), [(0.25, 3, 18), (0.3, 2, 16), (0.1, 3, 21)]
)
def test_the_number_removed_is_that_of_llm_pruner(ratio, heads, channels):
    pruned = prune(tiny(), pruning_ratio=ratio, keep_last=0)
    assert pruned.widths[0] == LayerWidths(4, 4, 24)
    assert set(pruned.widths[1:]) == {LayerWidths(heads, heads, channels)}


# (hidden, layers, heads, channels); LLaMA-7B and Vicuna-7B have the same shape.
LLAMA_7B, LLAMA_13B = (4096, 32, 32, 11008), (5120, 40, 40, 13824)
SHAPES = {"llama-7b": LLAMA_7B, "vicuna-7b": LLAMA_7B, "llama-13b": LLAMA_13B}
KEEP_LAST = {"llama-13b": 4}  # the paper prunes layers 5 to 30 of 32, and 5 to 36 of 40


def on_meta(hidden, layers, heads, channels) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=channels,
        vocab_size=32000,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ratios_of_the_paper_give_its_shares_of_the_model(shape):
    """25, 32, 38 and 63.5 % inside its range of layers are 20, 25, 30 and 50 % of all."""
    model = on_meta(*SHAPES[shape])
    total = footprint(model).parameters
    shares = []
    for ratio in (0.25, 0.32, 0.38, 0.635):
        config = PruneConfig(pruning_ratio=ratio, keep_last=KEEP_LAST.get(shape, 2))
        cut = copy.deepcopy(model)
        kinds = prunable(cut, config)
        assert [kinds[0].layer, kinds[-1].layer] == ([4, 35] if "13b" in shape else [4, 29])
        for kind, count in zip(kinds, layer_counts(kinds, ratio, config), strict=True):
            remove(kind.units, range(count))
        shares.append(1 - footprint(cut).parameters / total)
        assert shares[-1] == pytest.approx(share_removed(kinds, total, ratio, config))
    assert shares == pytest.approx([0.20, 0.25, 0.30, 0.50], abs=0.015)
    if shape == "llama-7b":  # what LLM-Pruner reports for 25 %: 5,422,977,024 parameters are left
        assert (1 - shares[0]) * total == pytest.approx(5_422_977_024, abs=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.20, 0.25, 0.30, 0.50])
def test_a_share_of_all_parameters_is_hit(shape, share):
    model = on_meta(*SHAPES[shape])
    total = footprint(model).parameters
    config = PruneConfig(pruning_ratio=share, ratio_of="parameters")
    kinds = prunable(model, config)
    ratio = unit_ratio(kinds, total, config)
    assert share_removed(kinds, total, ratio, config) == pytest.approx(share, abs=0.005)


def test_the_statistics_of_llama_7b():
    found = footprint(on_meta(*LLAMA_7B))
    assert found.parameters == 6_738_415_616
    assert found.macs == pytest.approx(424.02e9, rel=1e-3)  # LLM-Pruner's figure for 64 tokens
    assert found.with_bytes(torch.float16)["kv_cache_bytes"] == 2 * 2 * 32 * 4096


def test_units_compete_across_layers():
    model = tiny()
    with torch.no_grad():
        for parameter in model.model.layers[1].mlp.parameters():
            parameter *= 0.01  # all of the least important channels lie here
    pruned = prune(
        model,
        pruning_ratio=0.3,
        global_pruning=True,
        importance="magnitude",
        max_pruning_ratio=0.75,
    )
    lost = [24 - width.channels for width in pruned.widths]
    assert lost[1] == 18
    assert sum(lost) == 72 - int(72 * 0.7)
    assert lost[0] == lost[4] == 0
    assert sum(4 - width.heads for width in pruned.widths) == 12 - int(12 * 0.7)


@given(
    ratio=st.floats(0.01, 0.99),
    most=st.floats(0.1, 0.99),
    step=st.integers(1, 30),
    heads=st.sampled_from([(4, 4), (4, 2), (1, 1)]),
)
@settings(max_examples=25)
def test_any_global_ranking_leaves_every_layer_something(ratio, most, step, heads):
    model = tiny(num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=8)
    asked = {
        "pruning_ratio": ratio,
        "global_pruning": True,
        "importance": "random",
        "max_pruning_ratio": most,
        "round_to": step,
    }
    try:
        pruned = prune(model, **asked)
    except ConfigError:  # so few units that all stay
        reject()
    for width in pruned.widths[1:4]:
        assert width.kv_heads >= 1
        assert width.heads * heads[1] == width.kv_heads * heads[0]
        assert 1 <= width.channels <= 24
        lost = 1 - width.channels / 24
        assert lost <= most + 1e-9


@pytest.mark.parametrize("global_pruning", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.3, 0.5])
def test_a_share_of_all_parameters_is_hit_in_either_ranking(global_pruning, share):
    model = tiny(num_hidden_layers=8, num_attention_heads=8, head_dim=4, intermediate_size=100)
    pruned = prune(
        model,
        pruning_ratio=share,
        ratio_of="parameters",
        global_pruning=global_pruning,
        importance="random",
    )
    step = 4 * 4 * 32 * (1 if global_pruning else 6)  # one head, of every layer or of one
    removed = pruned.base_parameters - pruned.parameters
    assert abs(removed - share * pruned.base_parameters) < step


def test_a_rounding_that_leaves_nothing_to_remove_is_an_error():
    sizes = {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4}
    with pytest.raises(ConfigError, match=r"ratio 0.5 removes nothing with .* round_to 256"):
        prune(BloomForCausalLM(BloomConfig(**sizes)), round_to=256)


@pytest.mark.parametrize(
    ("pruner", "keys"),
    [
        (prune_width, ["blocks"]),
        (prune_channel, ["global_pruning", "max_pruning_ratio", "blocks"]),
    ],
)
def test_settings_that_a_method_does_not_use_are_named(pruner, keys, caplog):
    config = table(importance="random", blocks=2, global_pruning=True, max_pruning_ratio=0.8)
    pruner(tiny(), TOKENIZER, [], config)
    named = [r.args[0] for r in caplog.records if "is not used by method" in r.msg]
    assert named == keys


@pytest.mark.parametrize(("step", "channels"), [(8, 16), (5, 15), (7, 14), (100, 24)])
def test_channels_are_rounded_to_a_multiple(step, channels, caplog):
    pruned = prune(tiny(), pruning_ratio=0.4, round_to=step)
    assert {width.channels for width in pruned.widths[1:4]} == {channels}
    assert ("round_to 100 leaves all 24 MLP channels of layer 1" in caplog.text) == (step == 100)


def test_one_unit_is_kept_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        pruned = prune(tiny(), pruning_ratio=0.97)
    assert pruned.widths[1] == LayerWidths(1, 1, 1)
    assert "would remove the last KV group of layer 1; one is kept" in caplog.text
    assert logits(pruned.model).isfinite().all()


def test_a_maximum_in_the_way_of_the_ratio_is_said(caplog):
    prune(tiny(), pruning_ratio=0.75, global_pruning=True, max_pruning_ratio=0.5)
    assert "more than max_pruning_ratio 0.5 allows; 6 go" in caplog.text


def test_pruning_a_pruned_model_again():
    once = prune(tiny())
    twice = prune(once.model)
    assert twice.widths[1] == LayerWidths(1, 1, 6)
    assert twice.base_parameters == once.base_parameters


@pytest.mark.parametrize(("first", "last"), [(4, 2), (5, 0), (0, 5)])
def test_layers_must_be_left_to_prune(first, last):
    with pytest.raises(ConfigError, match=f"keep_first {first} and keep_last {last} leave none of"):
        prune(tiny(), keep_first=first, keep_last=last)


def test_random_units_follow_torchs_seed():
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = tiny()
        torch.manual_seed(seed)
        pruned = prune(model, importance="random")
        assert pruned.importance_lost is None
        found.append(logits(pruned.model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_bloom_keeps_its_heads_and_says_so(caplog):
    sizes = {"vocab_size": 96, "hidden_size": 32, "n_layer": 4, "n_head": 4}
    pruned = prune(BloomForCausalLM(BloomConfig(**sizes)).eval())
    assert pruned.widths[1] == LayerWidths(4, 4, 64)
    assert 'Of the model type "bloom" only MLP channels are pruned' in caplog.text


# ------------------------------------------------------------------------------- the hidden size


@pytest.mark.parametrize("tied", [False, True])
def test_the_least_important_hidden_channels_go(tied, tmp_path):
    model = tiny(tie_word_embeddings=tied, num_key_value_heads=2)
    with torch.no_grad():  # as if trained away: the norms ignore them and nothing reads them
        lost = torch.arange(0, 32, 4)
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                layer.self_attn.get_submodule(name).weight[:, lost] *= 1e-3
            for name in ("gate_proj", "up_proj"):
                layer.mlp.get_submodule(name).weight[:, lost] *= 1e-3
            layer.self_attn.o_proj.weight[lost] *= 1e-3
            layer.mlp.down_proj.weight[lost] *= 1e-3
    before = model.state_dict()["model.embed_tokens.weight"].clone()
    config = PruneConfig(method="channel", pruning_ratio=0.25)
    pruned = prune_channel(model, TOKENIZER, SAMPLES, config)
    assert len(pruned.importance_lost) == 5
    assert all(0 < share < 0.01 for share in pruned.importance_lost)
    kept = [i for i in range(32) if i % 4]
    assert torch.equal(pruned.model.model.embed_tokens.weight, before[:, kept])
    assert (pruned.shape.hidden, pruned.base_shape.hidden) == (24, 32)
    assert set(pruned.widths) == {LayerWidths(4, 2, 24)}
    assert all(pruned.pruned_layers)
    assert pruned.model.model.layers[0].self_attn.head_dim == 8
    assert (pruned.model.lm_head.weight is pruned.model.model.embed_tokens.weight) is tied
    assert (
        pruned.base_parameters
        == tiny(tie_word_embeddings=tied, num_key_value_heads=2).num_parameters()
    )
    assert pruned.parameters == pytest.approx(0.75 * pruned.base_parameters, rel=0.01)
    pruned.save(tmp_path / "pruned")
    loaded = load_pruned(tmp_path / "pruned")
    assert loaded.record() == pruned.record()
    assert torch.equal(logits(loaded.model), logits(pruned.model))
    prompt = SAMPLES[1][None]
    settings_ = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        loaded.model.generate(prompt, use_cache=True, **settings_),
        loaded.model.generate(prompt, use_cache=False, **settings_),
    )


def test_the_hidden_size_is_rounded_and_never_lost(caplog):
    def cut(**changes):
        config = PruneConfig(method="channel", importance="magnitude", **changes)
        return prune_channel(tiny(), TOKENIZER, [], config).shape.hidden

    assert cut(pruning_ratio=0.4, round_to=8) == 16
    assert cut(pruning_ratio=0.99) == 1
    assert "would remove all 32 hidden channels; 1 stay" in caplog.text


def test_the_hidden_size_of_other_families_is_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModelError, match=r'"bloom" cannot be pruned\. Use .*"width"'):
        prune_channel(model, TOKENIZER, SAMPLES, PruneConfig(method="channel"))


# ---------------------------------------------------------------------- pruners of torch-pruning

# torch-pruning warns of the norms although they are ignored below.
NORMS = "ignore:Unwrapped parameters detected:UserWarning"


def base_pruner(model, ignored, importance="GroupMagnitude", **settings) -> tp.pruner.BasePruner:
    config = model.config
    return tp.pruner.BasePruner(
        model,
        {"input_ids": SAMPLES[0][None]},
        forward_fn=lambda m, inputs: m(**inputs, use_cache=False).logits,
        importance=getattr(tp.importance, f"{importance}Importance")(),
        root_module_types=[torch.nn.Linear],
        ignored_layers=[model.lm_head, *ignored],
        num_heads={
            x.self_attn.get_submodule(f"{p}_proj"): count
            for x in model.model.layers
            for p, count in (
                ("q", config.num_attention_heads),
                ("k", config.num_key_value_heads),
                ("v", config.num_key_value_heads),
            )
        },
        prune_num_heads=True,
        prune_head_dims=False,
        pruning_ratio=0.5,
        in_channel_groups={},  # the default dicts are shared by all pruners
        out_channel_groups={},
        **settings,
    )


def outputs_and_norms(model):
    outputs = [part for x in model.model.layers for part in (x.self_attn.o_proj, x.mlp.down_proj)]
    return [*outputs, *(p for name, p in model.named_parameters() if "norm" in name)]


def torch_pruning_pruner(model, steps=1) -> tp.pruner.BasePruner:
    """Heads and channels of layers 1 to 3 only: see the ignored layers."""
    layers = model.model.layers
    edges = [part for i in (0, 4) for part in (layers[i].self_attn, layers[i].mlp)]
    ratios = {x.self_attn: 0.5 for x in layers[1:4]}
    ignored = [*edges, *outputs_and_norms(model)]
    return base_pruner(model, ignored, head_pruning_ratio_dict=ratios, iterative_steps=steps)


@pytest.mark.filterwarnings(NORMS)
def test_the_callback_follows_a_step_and_gets_the_pruned_model(tmp_path):
    model = tiny()
    pruner, seen = torch_pruning_pruner(model), []
    after_pruning(pruner, lambda m: seen.append(describe_pruned(m, TOKENIZER)))
    pruner.step()
    (pruned,) = seen
    assert pruned.model is model
    assert pruned.pruned_layers == (False, True, True, True, False)
    assert pruned.widths[1] == LayerWidths(2, 2, 12)
    assert pruned.base_parameters == tiny().num_parameters()
    assert pruned.provenance == {"pruner": "custom"}
    pruned.save(tmp_path / "pruned")
    assert torch.equal(logits(load_pruned(tmp_path / "pruned").model), logits(model))


@pytest.mark.filterwarnings(NORMS)
@pytest.mark.parametrize("importance", ["GroupMagnitude", "GroupTaylor", "Random"])
@pytest.mark.parametrize("hidden", [False, True], ids=["heads", "hidden too"])
@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (8, 4), (4, 4)])
def test_torch_prunings_own_pruner_on_shared_key_value_heads(
    heads, groups, hidden, importance, tmp_path
):
    model = tiny(
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=4,
        hidden_size=4 * heads,
    )
    before = copy.deepcopy(model.config)
    for layer in model.model.layers:
        q, o = layer.self_attn.q_proj.weight, layer.self_attn.o_proj.weight
        with torch.no_grad():  # each head is marked, to see that both lose the same
            marks = (torch.arange(heads).repeat_interleave(4) + 1) * 1e-3
            q[:, 0], o[0] = marks, marks
    ignored = [] if hidden else outputs_and_norms(model)
    with traceable():
        pruner = base_pruner(model, ignored, importance, head_pruning_ratio=0.5)
    seen = []
    after_pruning(pruner, lambda m: seen.append(describe_pruned(m, TOKENIZER, base_config=before)))
    model(input_ids=SAMPLES[0][None], labels=SAMPLES[0][None], use_cache=False).loss.backward()
    pruner.step()
    (pruned,) = seen
    left = LayerWidths(*((4, 2) if (heads, groups) == (8, 2) else (heads, groups)), 12)
    if heads == groups:
        left = LayerWidths(2, 2, 12)
    assert set(pruned.widths) == {left}
    assert pruned.shape.hidden == 4 * heads // (2 if hidden else 1)
    if not hidden:
        for layer in model.model.layers:
            attention = layer.self_attn
            assert torch.equal(attention.q_proj.weight[:, 0], attention.o_proj.weight[0])
    pruned.save(tmp_path / "pruned")
    loaded = load_pruned(tmp_path / "pruned").model
    assert torch.equal(logits(loaded), logits(model))
    words = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        loaded.generate(SAMPLES[0][None], **words),
        loaded.generate(SAMPLES[0][None], use_cache=False, **words),
    )


@pytest.mark.filterwarnings(NORMS)
@pytest.mark.parametrize("interactive", [False, True])
def test_the_callback_waits_for_the_last_step(interactive):
    pruner, seen = torch_pruning_pruner(tiny(), steps=2), []
    after_pruning(pruner, seen.append)
    for number in (1, 2):
        groups = pruner.step(interactive=interactive)
        assert pruner.current_step == number
        for group in groups or ():
            assert not seen
            group.prune()
        assert len(seen) == number - 1
    assert seen[0].model.layers[1].mlp.up_proj.out_features == 12
    with pytest.warns(UserWarning, match="exceed"):
        pruner.step()
    assert len(seen) == 1


def test_a_script_that_cut_by_hand_is_described():
    model = tiny()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            tp.prune_linear_out_channels(layer.mlp.get_submodule(name), [0, 1])
        tp.prune_linear_in_channels(layer.mlp.down_proj, [0, 1])
    model.config.intermediate_size = 22
    pruned = describe_pruned(
        model, TOKENIZER, base_config=tiny().config, provenance={"pruner": "mine"}
    )
    assert pruned.pruned_layers == (True,) * 5
    assert pruned.base_parameters == tiny().num_parameters()
    assert pruned.provenance == {"pruner": "mine"}


def test_fractional_heads_and_loose_matrices_are_errors():
    model = tiny()
    tp.prune_linear_out_channels(model.model.layers[2].self_attn.q_proj, [0])
    with pytest.raises(UnsupportedModelError, match=r"Layer 2: .* has 31 rows.*3.875 heads"):
        describe_pruned(model, TOKENIZER)
    model = tiny()
    tp.prune_linear_in_channels(model.model.layers[2].mlp.down_proj, [0])
    with pytest.raises(UnsupportedModelError, match=r"down_proj has shape \(32, 23\)"):
        describe_pruned(model, TOKENIZER)


@pytest.mark.filterwarnings(NORMS)
@pytest.mark.parametrize("groups", [4, 2])
def test_a_model_that_fills_a_cache_is_traced_without_a_forward_function(groups):
    """Without `traceable` this ends in an error, or, on the logits alone, never."""
    model = tiny(num_key_value_heads=groups)
    layers = model.model.layers
    with traceable():
        graph = tp.DependencyGraph().build_dependency(model, {"input_ids": SAMPLES[0][None]})
        group = graph.get_pruning_group(
            layers[1].mlp.up_proj, tp.prune_linear_out_channels, idxs=[0]
        )
        heads = graph.get_pruning_group(
            layers[1].self_attn.q_proj, tp.prune_linear_out_channels, idxs=list(range(8))
        )
    cut = {dep.target.module for dep, _ in group}
    assert cut >= {layers[1].mlp.up_proj, layers[1].mlp.gate_proj, layers[1].mlp.down_proj}
    assert len(heads) > 1
