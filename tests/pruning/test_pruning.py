from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankadaptor_plugin.core.errors import UnsupportedModelError
from rankadaptor_plugin.models.modeling_rankadaptor import LayerWidths
from rankadaptor_plugin.models.pruned_model import load_pruned
from rankadaptor_plugin.pruning.cutting import after_pruning, describe_pruned, traceable

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"w0": 0})))
SAMPLES = [
    torch.randint(0, 96, (t,), generator=torch.Generator().manual_seed(t)) for t in (8, 11, 6)
]


def tiny(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "intermediate_size": 24,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=SAMPLES[0][None], use_cache=False).logits


# torch-pruning warns of the norms although they are ignored below.
NORMS = "ignore:Unwrapped parameters detected:UserWarning"


def torch_pruning_pruner(model, steps=1) -> tp.pruner.BasePruner:
    """Heads and channels of layers 1 to 3 only: see the ignored layers."""
    layers = model.model.layers
    edges = [part for i in (0, 4) for part in (layers[i].self_attn, layers[i].mlp)]
    outputs = [part for x in layers for part in (x.self_attn.o_proj, x.mlp.down_proj)]
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    return tp.pruner.BasePruner(
        model,
        {"input_ids": SAMPLES[0][None]},
        forward_fn=lambda m, inputs: m(**inputs, use_cache=False).logits,
        importance=tp.importance.GroupMagnitudeImportance(),
        root_module_types=[torch.nn.Linear],
        ignored_layers=[model.lm_head, *edges, *outputs, *norms],
        num_heads={
            x.self_attn.get_submodule(f"{p}_proj"): 4 for x in layers for p in ("q", "k", "v")
        },
        prune_num_heads=True,
        prune_head_dims=False,
        pruning_ratio=0.5,
        head_pruning_ratio_dict={x.self_attn: 0.5 for x in layers[1:4]},
        iterative_steps=steps,
        in_channel_groups={},  # the default dicts are shared by all pruners
        out_channel_groups={},
    )


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
    before, ignored = copy.deepcopy(model.config), [model.lm_head]
    for layer in model.model.layers:
        q, o = layer.self_attn.q_proj.weight, layer.self_attn.o_proj.weight
        with torch.no_grad():  # each head is marked, to see that both lose the same
            marks = (torch.arange(heads).repeat_interleave(4) + 1) * 1e-3
            q[:, 0], o[0] = marks, marks
        if not hidden:
            ignored += [layer.self_attn.o_proj, layer.mlp.down_proj]
    if not hidden:
        ignored += [p for name, p in model.named_parameters() if "norm" in name]
    with traceable():
        pruner = tp.pruner.BasePruner(
            model,
            {"input_ids": SAMPLES[0][None]},
            forward_fn=lambda m, inputs: m(**inputs, use_cache=False).logits,
            importance=getattr(tp.importance, f"{importance}Importance")(),
            root_module_types=[torch.nn.Linear],
            ignored_layers=ignored,
            num_heads={
                x.self_attn.get_submodule(f"{p}_proj"): heads if p == "q" else groups
                for x in model.model.layers
                for p in ("q", "k", "v")
            },
            prune_num_heads=True,
            prune_head_dims=False,
            pruning_ratio=0.5,
            head_pruning_ratio=0.5,
            in_channel_groups={},
            out_channel_groups={},
        )
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
