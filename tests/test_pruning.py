from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch_pruning as tp
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankadaptor_plugin.config import PruneConfig
from rankadaptor_plugin.errors import ConfigError, UnsupportedModelError
from rankadaptor_plugin.importance import taylor
from rankadaptor_plugin.pruned_model import load_pruned
from rankadaptor_plugin.pruning import after_pruning, describe_pruned, prune_width
from rankadaptor_plugin.units import LayerWidths

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


def settings(**changes) -> PruneConfig:
    return PruneConfig(**{"keep_first": 1, "keep_last": 1, **changes})


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2, "tie_word_embeddings": True}])
def test_the_least_important_units_go(changes, tmp_path):
    model = tiny(**changes)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    masked = copy.deepcopy(model)
    scores = taylor(model, SAMPLES)
    groups = model.config.num_key_value_heads
    share = 32 // groups
    for index in (1, 2, 3):
        layer = masked.model.layers[index]
        for group in scores[index].attention.argsort()[: groups // 2].tolist():
            layer.self_attn.o_proj.weight.data[:, group * share : (group + 1) * share] = 0
        layer.mlp.down_proj.weight.data[:, scores[index].mlp.argsort()[:12]] = 0
    pruned = prune_width(model, TOKENIZER, SAMPLES, settings(ratio=0.5))
    assert pruned.pruned_layers == (False, True, True, True, False)
    assert pruned.widths[2] == LayerWidths(2, groups // 2, 12)
    assert (logits(pruned.model) - logits(masked)).abs().max() < 1e-5
    assert pruned.base_parameters == masked.num_parameters()
    assert pruned.provenance["ratio"] == 0.5
    frozen = [name for name, p in pruned.model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.layers.1.mlp.up_proj.weight"]
    pruned.save(tmp_path / "pruned")
    assert torch.equal(logits(load_pruned(tmp_path / "pruned").model), logits(pruned.model))


@pytest.mark.parametrize(
    ("ratio", "heads", "channels"), [(0.25, 3, 18), (0.3, 2, 16), (0.1, 3, 21)]
)
def test_the_number_removed_is_that_of_llm_pruner(ratio, heads, channels):
    pruned = prune_width(tiny(), TOKENIZER, SAMPLES, settings(ratio=ratio, keep_last=0))
    assert pruned.widths[0] == LayerWidths(4, 4, 24)
    assert set(pruned.widths[1:]) == {LayerWidths(heads, heads, channels)}


def test_one_unit_is_always_kept(caplog):
    with caplog.at_level(logging.WARNING):
        pruned = prune_width(tiny(), TOKENIZER, SAMPLES, settings(ratio=0.97))
    assert pruned.widths[1] == LayerWidths(1, 1, 1)
    assert [r.message for r in caplog.records if "ratio 0.97 would remove all" in r.message]
    assert logits(pruned.model).isfinite().all()


def test_pruning_a_pruned_model_again():
    once = prune_width(tiny(), TOKENIZER, SAMPLES, settings())
    twice = prune_width(once.model, TOKENIZER, SAMPLES, settings())
    assert twice.widths[1] == LayerWidths(1, 1, 6)
    assert twice.base_parameters == once.base_parameters


@pytest.mark.parametrize(("first", "last"), [(4, 2), (5, 0), (0, 5)])
def test_layers_must_be_left_to_prune(first, last):
    with pytest.raises(ConfigError, match=f"keep_first {first} and keep_last {last} leave none of"):
        prune_width(tiny(), TOKENIZER, SAMPLES, settings(keep_first=first, keep_last=last))


def test_an_unknown_importance_is_named():
    with pytest.raises(ConfigError, match=r'importance "magic" is unknown. Use one of: taylor'):
        prune_width(tiny(), TOKENIZER, SAMPLES, settings(importance="magic"))


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
        model, TOKENIZER, base=LayerWidths(4, 4, 24), provenance={"pruner": "mine"}
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
