"""Allocations as PEFT adapters: the right rank in the right layer, nested initial weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankadaptor_plugin.adapters import (
    attach,
    nested_rows,
    rank_costs,
    trainable_parameters,
)
from rankadaptor_plugin.errors import RankSpaceError
from rankadaptor_plugin.families import LLAMA
from rankadaptor_plugin.ranks import RankAllocation, RankSpace

THIRTEEN = RankAllocation((2, 12, 4, 6, 8, 10, 2, 4, 6, 8, 3, 5, 7))


@pytest.fixture(scope="module")
def deep(make_llama):
    """Thirteen layers, so that layer 1 may be taken for 10, 11 or 12; uneven ones."""
    model = make_llama(num_hidden_layers=13)
    model.model.layers[3].mlp.gate_proj = torch.nn.Linear(16, 10, bias=False)
    model.model.layers[3].mlp.up_proj = torch.nn.Linear(16, 10, bias=False)
    model.model.layers[3].mlp.down_proj = torch.nn.Linear(10, 16, bias=False)
    return model


def adapted(model) -> dict[str, torch.nn.Module]:
    return {
        name.removeprefix("base_model.model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def first_weights(model) -> dict[str, torch.Tensor]:
    return {n: m.lora_A["default"].weight.detach().clone() for n, m in adapted(model).items()}


@pytest.mark.parametrize("alpha_over_rank", [2.0, 0.5])
def test_every_layer_has_its_rank_and_one_scaling_on_seven_projections(deep, alpha_over_rank):
    model = attach(deep, THIRTEEN, seed=0, alpha_over_rank=alpha_over_rank)
    try:
        modules = adapted(model)
        expected = {
            f"layers.{i}.{name}": r for i, r in enumerate(THIRTEEN.ranks) for name in LLAMA.matrices
        }
        assert {name: module.r["default"] for name, module in modules.items()} == expected
        for name, module in modules.items():
            assert module.lora_A["default"].weight.shape[0] == expected[name]
            assert module.scaling["default"] == alpha_over_rank
        space = RankSpace(
            candidates=(2, 4),
            searchable=(True,) * 13,
            default_rank=8,
            costs=rank_costs(model.get_base_model()),
        )
        count = sum(p.numel() for p in trainable_parameters(model))
        assert count == space.parameters(THIRTEEN)
    finally:
        model.unload()


def test_the_costs_are_those_of_uneven_layers(deep):
    costs = rank_costs(deep)
    attention = (16 + 16) + (16 + 8) + (16 + 8) + (16 + 16)
    assert costs[0] == attention + 3 * (16 + 24)
    assert costs[3] == attention + 3 * (16 + 10)
    assert set(costs) == {costs[0], costs[3]}


def test_a_fresh_adapter_changes_nothing(make_llama):
    base, tokens = make_llama(), torch.arange(9)[None]
    before = base(tokens).logits
    model = attach(base, RankAllocation((4, 2)), seed=0, alpha_over_rank=2.0).eval()
    assert model(tokens).logits.equal(before)


def test_a_layer_starts_from_the_first_rows_whatever_the_other_ranks(make_llama):
    starts = []
    for ranks in ((4, 12), (12, 2), (12, 12)):
        model = attach(make_llama(), RankAllocation(ranks), seed=3, alpha_over_rank=2.0)
        starts.append(first_weights(model))
    for name, full in starts[2].items():
        for start in starts[:2]:
            assert start[name].equal(full[: len(start[name])])
        assert full.abs().max() <= full.shape[1] ** -0.5
    assert len({tuple(w.flatten().tolist()) for w in starts[2].values()}) == 2 * len(LLAMA.matrices)


@given(
    rank=st.integers(1, 100),
    more=st.integers(0, 100),
    features=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    name=st.text(),
)
def test_a_smaller_rank_is_the_beginning_of_a_larger(rank, more, features, seed, name):
    small = nested_rows(rank, features, seed, name)
    assert small.shape == (rank, features)
    assert small.equal(nested_rows(rank + more, features, seed, name)[:rank])
    assert (small >= -1).all()
    assert (small < 1).all()


def test_other_seeds_and_other_modules_draw_otherwise():
    rows = nested_rows(4, 8, 0, "a")
    assert not rows.equal(nested_rows(4, 8, 1, "a"))
    assert not rows.equal(nested_rows(4, 8, 0, "b"))


def test_swapping_replaces_the_adapter_and_leaves_the_base(make_llama):
    base = make_llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    first = attach(base, RankAllocation((4, 2)), seed=0, alpha_over_rank=2.0)
    old = trainable_parameters(first)
    second = attach(first, RankAllocation((2, 6)), seed=0, alpha_over_rank=2.0)
    assert second is first
    new = trainable_parameters(second)
    assert {id(p) for p in old}.isdisjoint({id(p) for p in second.parameters()})
    assert len(new) == 2 * 2 * len(LLAMA.matrices)
    assert second.active_adapters == ["default"]
    alone = attach(make_llama(), RankAllocation((2, 6)), seed=0, alpha_over_rank=2.0)
    assert all(a.equal(b) for a, b in zip(new, trainable_parameters(alone), strict=True))
    after = second.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].equal(before[name]) for name in before)


@pytest.mark.parametrize("ranks", [(4,), (4, 4, 4)])
def test_an_allocation_for_another_depth_is_refused(make_llama, ranks):
    base = make_llama()
    text = f"The allocation {RankAllocation(ranks)} has {len(ranks)} ranks for 2 layers"
    with pytest.raises(RankSpaceError, match=text):
        attach(base, RankAllocation(ranks), seed=0, alpha_over_rank=2.0)
    assert not any("lora" in name for name, _ in base.named_parameters())


def test_a_half_precision_base_keeps_full_precision_adapters(make_llama):
    base = make_llama().to(torch.bfloat16)
    model = attach(base, RankAllocation((2, 2)), seed=0, alpha_over_rank=2.0)
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}
    assert base.lm_head.weight.dtype == torch.bfloat16
