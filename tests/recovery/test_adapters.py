"""Allocations as PEFT adapters: the right rank in the right layer, nested initial weights."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from rankadaptor_plugin.config.tables import RankSpaceConfig, RecoveryConfig
from rankadaptor_plugin.core.errors import ArtifactError, ConfigError, RankSpaceError
from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
from rankadaptor_plugin.models.families import GPT2, LLAMA
from rankadaptor_plugin.recovery.adapters import (
    LoraSettings,
    attach,
    nested_rows,
    trainable_parameters,
)
from rankadaptor_plugin.recovery.files import RECORD, fingerprint, save_adapter
from rankadaptor_plugin.recovery.slots import module_ranks, rank_costs, rank_space, target_matrices

THIRTEEN = RankAllocation((2, 8, 4, 6, 8, 7, 2, 4, 6, 8, 3, 5, 7))


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
    model = attach(deep, THIRTEEN, LoraSettings(alpha_over_rank=alpha_over_rank), seed=0)
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


def test_a_layer_starts_from_the_first_rows_whatever_the_other_ranks(make_llama):
    starts = []
    for ranks in ((4, 8), (8, 2), (8, 8)):
        model = attach(make_llama(), RankAllocation(ranks), seed=3)
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


# ------------------------------------------------------------------------------------------- DoRA


def test_dora_starts_from_the_base_and_from_the_same_rows(make_llama):
    base, tokens, ranks = make_llama(), torch.arange(9)[None], RankAllocation((4, 2))
    before = base(tokens).logits
    plain = first_weights(attach(make_llama(), ranks, seed=3))
    model = attach(base, ranks, LoraSettings(use_dora=True), seed=3).eval()
    torch.testing.assert_close(model(tokens).logits, before)
    assert all(weight.equal(plain[name]) for name, weight in first_weights(model).items())
    for module in adapted(model).values():
        norms = module.base_layer.weight.norm(dim=1)
        torch.testing.assert_close(module.lora_magnitude_vector["default"].weight, norms)


# ---------------------------------------------------------------------------------------- targets


def test_targets_alone_get_adapters(make_llama):
    targets = ("q_proj", "mlp.down_proj")
    model = attach(
        make_llama(), RankAllocation((4, 2)), LoraSettings(target_modules=targets), seed=0
    )
    expected = {
        f"layers.{i}.{name}": rank
        for i, rank in enumerate((4, 2))
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert {name: module.r["default"] for name, module in adapted(model).items()} == expected
    count = sum(p.numel() for p in trainable_parameters(model))
    costs = rank_costs(model.get_base_model(), targets=targets)
    assert count == sum(r * c for r, c in zip((4, 2), costs, strict=True))


def test_other_targets_leave_nothing_of_the_ones_before(make_llama):
    base, ranks = make_llama(), RankAllocation((4, 2))
    model = attach(base, ranks, seed=0)
    for targets in (("q_proj",), ("mlp.up_proj", "v_proj"), ()):
        swapped = attach(model, ranks, LoraSettings(target_modules=targets), seed=0)
        fresh = attach(make_llama(), ranks, LoraSettings(target_modules=targets), seed=0)
        assert swapped is model
        assert adapted(swapped).keys() == adapted(fresh).keys()
        assert all(a.equal(b) for a, b in zip(*map(trainable_parameters, (swapped, fresh))))  # noqa: B905


@settings(max_examples=30)
@given(targets=st.sets(st.sampled_from(LLAMA.matrices), min_size=1))
def test_targets_by_name_and_by_last_part_are_the_same(make_llama, targets):
    short = [name.rpartition(".")[2] for name in targets]
    assert set(target_matrices(LLAMA, targets)) == set(target_matrices(LLAMA, short)) == targets
    model = make_llama()
    whole = zip(rank_costs(model, "projection"), LLAMA.matrices * 2, strict=True)
    expected = tuple(cost if name in targets else 0 for cost, name in whole)
    assert rank_costs(model, "projection", tuple(targets)) == expected
    assert sum(rank_costs(model, "layer", short)) == sum(rank_costs(model, "group", short))


def test_a_last_part_stands_for_all_matrices_of_that_name():
    assert target_matrices(GPT2, ("c_proj",)) == ("attn.c_proj", "mlp.c_proj")
    assert target_matrices(GPT2, ("mlp.c_proj",)) == ("mlp.c_proj",)


def test_matrices_that_lie_transposed_have_their_costs(make_llama):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_inner=24))
    assert rank_costs(model, "projection") == (16 + 48, 16 + 16, 16 + 24, 24 + 16)
    ranks = module_ranks(model, RankAllocation((16,)), ("c_attn",))
    assert ranks == {"transformer.h.0.attn.c_attn": 16}


def test_an_unknown_target_is_one_line_with_a_suggestion(make_llama):
    with pytest.raises(ConfigError) as caught:
        attach(
            make_llama(),
            RankAllocation((4, 2)),
            LoraSettings(target_modules=("q_proj", "qkv_proj")),
            seed=0,
        )
    assert str(caught.value) == (
        '[recovery] target_modules names "qkv_proj", which no layer of a model of type "llama" '
        "has. Did you mean 'v_proj'? There are: q_proj, k_proj, v_proj, o_proj, gate_proj, "
        "up_proj, down_proj."
    )


def test_a_group_without_targets_is_not_searched(make_llama):
    config = RankSpaceConfig(candidates=(2, 4, 6), default_rank=4, per="group")
    recovery = RecoveryConfig(target_modules=("q_proj", "v_proj"))
    space = rank_space(make_llama(), (True, True), config, recovery)
    cost = (16 + 16) + (16 + 8)
    assert space.costs == (cost, 0, cost, 0)
    assert space.searchable == (True, False, True, False)
    assert space.budget == 4 * 2 * cost
    model = attach(
        make_llama(), space.uniform(), LoraSettings(target_modules=recovery.target_modules), seed=0
    )
    parameters = sum(p.numel() for p in trainable_parameters(model))
    assert parameters == space.parameters(space.uniform())


def test_an_allocation_without_an_adapter_for_any_target_is_refused(make_llama):
    with pytest.raises(RankSpaceError, match="gives none of \\[recovery\\] target_modules"):
        module_ranks(make_llama(), RankAllocation((0, 4, 0, 4)), ("q_proj",))


# ------------------------------------------------------------------------------- ranks and shapes


def test_a_rank_may_be_as_high_as_the_smaller_side_and_no_higher(make_llama):
    base = make_llama()
    assert max(module_ranks(base, RankAllocation((8, 8))).values()) == 8
    text = "Rank 9 is too high for Layer 1: self_attn.k_proj, which has shape (8, 16) and full rank"
    with pytest.raises(RankSpaceError, match=re.escape(text)) as caught:
        attach(base, RankAllocation((8, 9)), seed=0)
    assert "\n" not in str(caught.value)
    assert not any("lora" in name for name, _ in base.named_parameters())


def test_a_narrow_matrix_that_is_no_target_sets_no_limit(make_llama):
    ranks = module_ranks(make_llama(), RankAllocation((16, 16)), ("q_proj", "down_proj"))
    assert set(ranks.values()) == {16}


@pytest.mark.parametrize(
    ("candidates", "default", "pruned", "fits"),
    [
        ((2, 6, 8), 5, (True, True), True),
        ((2, 9), 4, (True, False), False),
        ((2, 12), 9, (True, False), False),
        ((2, 4, 9), 4, (False, True), False),
    ],
)
def test_the_rank_space_goes_up_to_the_narrowest_matrix(
    make_llama, candidates, default, pruned, fits
):
    config = RankSpaceConfig(candidates=candidates, default_rank=default)
    if fits:
        assert rank_space(make_llama(), pruned, config).candidates == candidates
    else:
        with pytest.raises(RankSpaceError, match="is too high for Layer"):
            rank_space(make_llama(), pruned, config)


# ----------------------------------------------------------------------------------------- saving


@pytest.fixture
def trained(make_llama):
    model = attach(make_llama(), RankAllocation((4, 2)), seed=0)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.copy_(torch.randn(parameter.shape))
    return model.eval()


def files(folder):
    return {p.name for p in folder.iterdir()}


def test_a_saved_adapter_says_where_it_comes_from(trained, make_llama, tmp_path):
    save_adapter(trained, tmp_path / "adapter", {"method": "lora"}, "some/base")
    record = json.loads((tmp_path / "adapter" / RECORD).read_text())
    assert record == {"base": fingerprint(make_llama()), "method": "lora"}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    save_adapter(trained, tmp_path / "adapter", {}, None)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None


def test_a_saved_adapter_has_safetensors_and_nothing_pickled(trained, tmp_path):
    save_adapter(trained, tmp_path / "adapter", {}, None)
    expected = {"adapter_config.json", "adapter_model.safetensors", RECORD}
    assert expected <= files(tmp_path / "adapter") <= {*expected, "README.md"}
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * 14


def test_a_full_disk_leaves_the_adapter_before(trained, tmp_path, monkeypatch):
    save_adapter(trained, tmp_path / "adapter", {"run": 1}, None)

    def fail(tensors, path, **_):
        with open(path, "wb") as file:
            file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft.peft_model.safe_save_file", fail)
    with pytest.raises(ArtifactError, match="No space left on device") as caught:
        save_adapter(trained, tmp_path / "adapter", {"run": 2}, None)
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == {"adapter"}
    assert json.loads((tmp_path / "adapter" / RECORD).read_text())["run"] == 1
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")
