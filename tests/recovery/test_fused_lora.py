"""LoRA as one operation: what PEFT's layers compute, to rounding, with less that is kept."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.corpus.sequences import TrainingSequence
from rankadaptor_plugin.recovery import adapters
from rankadaptor_plugin.recovery.batches import padded
from rankadaptor_plugin.recovery.fused_lora import FusedLinear, adapted_product, can_fuse, fused
from rankadaptor_plugin.recovery.memory import mixed_precision
from rankadaptor_plugin.recovery.training import checkpointed, compiled

ROWS = [
    TrainingSequence(tokens, tokens)
    for tokens in (torch.arange(3, 15), torch.arange(20, 27), torch.arange(5, 14))
]


@pytest.fixture
def tuned(make_llama):
    """Makes a model with adapters that all compute something."""

    def make(dtype=torch.float32, model=None, **settings):
        base = (model or make_llama()).to(dtype)
        ranks = RankAllocation((3, 5))
        found = adapters.attach(base, ranks, adapters.LoraSettings(**settings), seed=0)
        generator = torch.Generator().manual_seed(0)
        for name, weight in found.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(0, 0.2, generator=generator)
        return found.train()

    return make


def outcome(model):
    """Returns logits and gradients, the same dropout each time."""
    model.zero_grad()
    torch.manual_seed(1)
    with mixed_precision(model.get_base_model()):
        logits = model(input_ids=padded(ROWS).input_ids).logits
    logits.float().square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | gradients


def assert_alike(found, expected, share):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert (found[name] - value).norm() <= share * value.norm(), name


def fused_layers(model):
    return sum(isinstance(module, FusedLinear) for module in model.modules())


def kept_bytes(model):
    """Returns the bytes that are kept for the backward pass, the weights left out."""
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outcome(model)
    return sum(kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_values_and_gradients_are_those_of_peft(tuned, dropout, checkpointing):
    model = tuned(lora_dropout=dropout)
    expected = outcome(model)
    with checkpointed(model.get_base_model(), checkpointing), fused(model):
        found = outcome(model)
    assert_alike(found, expected, 2e-6)
    assert_alike(outcome(model), expected, 0.0)  # PEFT's again


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_evaluation_gives_what_peft_gives(tuned, dropout):
    model = tuned(lora_dropout=dropout).eval()
    inputs = padded(ROWS).input_ids
    with torch.inference_mode():
        expected = model(input_ids=inputs).logits
        with fused(model):
            torch.testing.assert_close(model(input_ids=inputs).logits, expected)


@pytest.mark.filterwarnings("ignore")  # torch warns of its own code while it traces
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_of_equal_shapes_are_compiled_once(make_llama, checkpointing):
    """The first one may have a graph of its own: its input needs no gradient."""

    def run(layers):
        graphs = []

        def counting(graph, inputs):
            graphs.append(graph)
            return graph.forward

        torch.compiler.reset()
        base = make_llama(num_hidden_layers=layers, use_cache=False)
        model = adapters.attach(base, RankAllocation((3,) * layers), seed=0).train()
        with checkpointed(base, checkpointing), fused(model):
            expected = outcome(model)
            with compiled(base, True, backend=counting):
                assert_alike(outcome(model), expected, 1e-6)
        assert not any("forward" in vars(layer) for layer in base.model.layers)
        return len(graphs)

    assert run(3) == run(9) <= 2


def test_half_precision_is_about_as_near_to_the_truth_as_peft(tuned):
    model = tuned(torch.bfloat16)
    half = outcome(model)
    with fused(model):
        found = outcome(model)
    exact = outcome(model.float())
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in half.items()}
    errors = [
        sum(float((values[n] - v).norm() / v.norm()) for n, v in exact.items())
        for values in (found, half)
    ]
    assert errors[0] < 1.1 * errors[1]


def test_a_frozen_a_gets_no_gradient_and_keeps_no_input(tuned):
    model = tuned()
    whole = kept_bytes(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_B" in name)
    expected = outcome(model)
    with fused(model):
        assert_alike(outcome(model), expected, 1e-6)
        assert kept_bytes(model) < whole


def test_inputs_are_kept_once_in_half_precision(tuned):
    model = tuned(torch.bfloat16)
    before = kept_bytes(model)
    with fused(model):
        assert kept_bytes(model) < 0.9 * before


def test_a_bias_is_added():
    matrix = nn.Linear(5, 4).requires_grad_(False)
    x, down, up = torch.randn(2, 3, 5), torch.randn(2, 5), torch.randn(4, 2)
    found = adapted_product(matrix, x, down, up, 0.5)
    torch.testing.assert_close(found, matrix(x) + 0.5 * x @ down.T @ up.T)


def test_gradients_are_those_of_finite_differences():
    matrix = nn.Linear(3, 4).double().requires_grad_(False)
    x, dropped, down, up = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((4, 2, 3), (4, 2, 3), (2, 3), (4, 2))
    )

    def product(x, dropped, down, up):
        return adapted_product(matrix, x, down, up, 0.5, dropped)

    assert torch.autograd.gradcheck(product, (x, dropped, down, up))
    assert torch.autograd.gradcheck(
        lambda x, down, up: adapted_product(matrix, x, down, up, 0.5), (x, down, up)
    )


def test_what_is_more_than_a_frozen_matrix_is_left_alone(tuned):
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    conv = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))
    dora, other, conv = tuned(use_dora=True), tuned(), tuned(model=conv)
    other.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    hooked, trained, moved = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2), nn.Linear(2, 2)
    hooked.register_forward_pre_hook(lambda module, inputs: None)
    moved.requires_grad_(False).forward = moved.forward
    assert not any(map(can_fuse, (hooked, trained, moved, nn.Identity())))
    for model in (dora, other, conv):
        with fused(model):
            assert fused_layers(model) == (10 if model is other else 0)


def test_layers_are_as_before_after_a_failure(tuned):
    model = tuned()
    seen = []

    def fail():
        with fused(model):
            seen.append(fused_layers(model))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [14]
    assert fused_layers(model) == 0
