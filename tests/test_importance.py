from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankadaptor_plugin.errors import CorpusError, RankAdaptorError
from rankadaptor_plugin.importance import taylor


def tiny(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


@pytest.fixture
def samples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 96, (t,), generator=generator) for t in (12, 5, 9)]


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4, "tie_word_embeddings": True}])
def test_scores_equal_a_naive_computation(changes, samples):
    model = tiny(**changes)
    scores = taylor(model, samples)
    loss = sum(model(input_ids=s[None], labels=s[None]).loss for s in samples) / len(samples)
    loss.backward()
    size, groups = 8, model.config.num_key_value_heads
    share = 4 // groups * size
    for layer, found in zip(model.model.layers, scores, strict=True):
        salience = {
            name: (p.grad * p).abs() for name, p in layer.named_parameters() if "norm" not in name
        }
        q, k, v, o, gate, up, down = salience.values()
        for g in range(groups):
            heads, own = slice(g * share, (g + 1) * share), slice(g * size, (g + 1) * size)
            expected = q[heads].sum() + k[own].sum() + v[own].sum() + o[:, heads].sum()
            assert torch.isclose(found.attention[g], expected, rtol=1e-4)
        for c in range(24):
            assert torch.isclose(
                found.mlp[c], gate[c].sum() + up[c].sum() + down[:, c].sum(), rtol=1e-4
            )
        assert found.attention.shape == (groups,)
        assert found.mlp.shape == (24,)


def test_the_model_is_left_as_it_was(samples):
    model = tiny()
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    model.lm_head.weight.grad = None
    kept = torch.ones_like(model.model.norm.weight)
    model.model.norm.weight.grad = kept
    before = {name: p.clone() for name, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        taylor(model, samples)
    assert [m.training for m in model.modules()] == modes
    assert model.config.use_cache is True
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad == (name != "lm_head.weight")
        assert parameter.grad is (kept if name == "model.norm.weight" else None)


def test_bfloat16_gives_float32_scores(samples):
    scores = taylor(tiny().to(torch.bfloat16), samples)
    assert {s.dtype for layer in scores for s in layer} == {torch.float32}


def test_a_bad_weight_is_named(samples):
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(RankAdaptorError, match=r"Layer 1: mlp.up_proj has weights"):
        taylor(model, samples)
    assert all(p.grad is None for p in model.parameters())


def test_a_bad_gradient_names_the_layer_where_it_begins(samples):
    model = tiny()
    model.model.layers[1].register_full_backward_hook(
        lambda _, grads_in, __: tuple(g * torch.inf for g in grads_in)
    )
    with pytest.raises(RankAdaptorError, match=r"Layer 0: the gradients are not finite in 1 of 3"):
        taylor(model, samples)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "no calibration sequences"),
        ([torch.tensor([3])], r"sequence 0 has shape \(1,\)"),
        ([torch.tensor([[3, 4]])], r"sequence 0 has shape \(1, 2\)"),
        ([torch.tensor([3, 4]), torch.tensor([3, 96])], "sequence 1 has tokens from 3 to 96"),
    ],
)
def test_unusable_sequences_are_errors(bad, message):
    with pytest.raises(CorpusError, match=message):
        taylor(tiny(), bad)
