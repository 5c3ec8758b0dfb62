"""The output layer apart from the rest: what a family does to its logits stays."""

from __future__ import annotations

import pytest
import torch
import transformers

from rankadaptor_plugin.models import logits
from rankadaptor_plugin.models.logits import hidden_at, logits_of, summed_loss

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}
FAMILIES = {
    "Llama": {},
    "Gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "Granite": {"logits_scaling": 7.0},
    "Cohere": {"logit_scale": 0.3},
}


@pytest.fixture(params=FAMILIES)
def model(request):
    """Families that scale or cap their logits, and one that does not."""
    config = getattr(transformers, f"{request.param}Config")(
        **SIZES, **FAMILIES[request.param], pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).double().eval()


INPUTS = torch.arange(3, 33).reshape(2, 15)
PLACES = torch.tensor([0, 4, 14, 15, 21, 22, 28])


def test_logits_are_those_of_the_whole_model(model):
    whole = model(input_ids=INPUTS, use_cache=False).logits.flatten(0, 1)[PLACES]
    torch.testing.assert_close(logits_of(model, hidden_at(model, PLACES, INPUTS)), whole)
    bare = hidden_at(model, PLACES, INPUTS) @ model.get_output_embeddings().weight.T
    assert torch.allclose(bare, whole) == (model.config.model_type == "llama")


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_a_loss_in_parts_has_value_and_gradient_of_the_whole(model, monkeypatch, rows):
    targets = torch.arange(7)

    def loss(predictions, rows):
        return torch.nn.functional.cross_entropy(predictions, targets[rows], reduction="sum")

    hidden = hidden_at(model, PLACES, INPUTS).detach().requires_grad_()
    whole = loss(logits_of(model, hidden), slice(None)) / 5
    (expected,) = torch.autograd.grad(whole, hidden)
    monkeypatch.setattr(logits, "_CHUNK", rows * SIZES["vocab_size"])
    found = summed_loss(model, hidden, loss) / 5
    (gradient,) = torch.autograd.grad(found, hidden)
    torch.testing.assert_close((found, gradient), (whole, expected), check_dtype=False)


def test_a_loss_without_gradients_makes_none(model):
    hidden = hidden_at(model, PLACES, INPUTS)
    with torch.no_grad():
        assert not summed_loss(
            model, hidden, lambda predictions, _: predictions.sum()
        ).requires_grad
    assert not summed_loss(model, hidden.detach(), lambda p, _: p.sum()).requires_grad
