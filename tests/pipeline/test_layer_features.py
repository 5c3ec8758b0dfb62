"""Features of layers: what they are, on tiny models that were pruned in every way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rankadaptor_plugin.config.tables import PruneConfig
from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.core.ranks import WHOLE_LAYER, RankSpace
from rankadaptor_plugin.models.pruned_model import PrunedModel
from rankadaptor_plugin.models.structures import group_matrices, layer_units, structure_of
from rankadaptor_plugin.pipeline.search_step import FEATURE_NAMES, layer_features
from rankadaptor_plugin.pruning.cutting import remove
from rankadaptor_plugin.pruning.depth import prune_depth
from rankadaptor_plugin.pruning.width import prune_width

SAMPLES = [torch.arange(3, 12)]


def space_of(pruned, groups=WHOLE_LAYER, costs=None):
    slots = len(pruned.widths) * len(groups)
    return RankSpace(
        candidates=(2, 4),
        searchable=(True,) * slots,
        default_rank=4,
        costs=costs or (7,) * slots,
        groups=tuple(groups),
    )


def by_name(pruned, **choices):
    features = layer_features(pruned, space_of(pruned, **choices))
    assert features.names == FEATURE_NAMES
    return dict(zip(FEATURE_NAMES, features.values.T, strict=True))


@pytest.fixture
def width(make_llama, make_tokenizer):
    config = PruneConfig(keep_first=1, keep_last=1, importance="magnitude")
    return prune_width(make_llama(num_hidden_layers=5), make_tokenizer(), SAMPLES, config)


def test_depth_and_shares_of_a_model_whose_middle_was_pruned(width):
    found = by_name(width, costs=(10, 20, 30, 30, 10))
    assert found["relative_depth"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found["parameters_pruned"].tolist() == [0, 0.5, 0.5, 0.5, 0]
    assert found["importance_lost"].tolist() == list(width.importance_lost)
    assert found["cost_share"].tolist() == [0.1, 0.2, 0.3, 0.3, 0.1]


@pytest.mark.parametrize("kind", ["layer", "group", "projection"])
def test_norms_are_those_of_the_matrices_of_a_slot(width, kind):
    groups = group_matrices(structure_of(width.model))[kind]
    found = by_name(width, groups=tuple(groups))
    layer = width.model.model.layers[1]
    for slot, names in enumerate(groups.values(), start=len(groups)):
        weights = [layer.get_submodule(name).weight.detach() for name in names]
        values = [torch.linalg.svdvals(weight) for weight in weights]
        spectral = np.mean([math.log(v[0]) for v in values])
        stable = np.mean([math.log((v**2).sum() / v[0] ** 2) for v in values])
        assert found["log_spectral_norm"][slot] == pytest.approx(spectral, rel=1e-4)
        assert found["log_stable_rank"][slot] == pytest.approx(stable, rel=1e-4)


def test_module_groups_lose_their_own_share(make_llama, make_tokenizer):
    model = make_llama()
    remove(layer_units(model)[1].mlp, range(6))  # of 24
    pruned = PrunedModel.of(model, make_tokenizer())
    found = by_name(pruned, groups=("attention", "mlp"))
    assert found["parameters_pruned"].tolist() == [0, 0, 0, 0.25]
    assert found["relative_depth"].tolist() == [0, 0, 1, 1]
    assert np.isnan(found["importance_lost"]).all()


def test_removed_layers_count_with_the_next_one_above(make_llama, make_tokenizer):
    config = PruneConfig(
        method="depth", importance="magnitude", blocks=3, keep_first=1, keep_last=0
    )
    model = make_llama(num_hidden_layers=6)
    with torch.no_grad():
        for number in (1, 2, 5):
            for weight in model.model.layers[number].parameters():
                weight *= 0.5
    pruned = prune_depth(model, make_tokenizer(), SAMPLES, config)
    assert pruned.kept_layers == (0, 3, 4)
    found = by_name(pruned)
    assert found["relative_depth"].tolist() == [0, 0.6, 0.8]
    assert found["parameters_pruned"] == pytest.approx([0, 2 / 3, 1 / 2])
    assert found["importance_lost"] == pytest.approx([0, 2 / 3, 1 / 2])


def test_the_norms_of_large_matrices_come_close(make_llama, make_tokenizer, monkeypatch):
    model = make_llama(hidden_size=64, intermediate_size=96)
    pruned = PrunedModel.of(model, make_tokenizer())
    exact = layer_features(pruned, space_of(pruned)).values
    monkeypatch.setattr("rankadaptor_plugin.pipeline.search_step._EXACT", 8)
    before = torch.get_rng_state()
    close = layer_features(pruned, space_of(pruned)).values
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_allclose(close, exact, atol=0.1)
    assert not np.array_equal(close, exact)


def test_norms_that_cannot_be_had_are_unknown(make_llama, make_tokenizer):
    model = make_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.inf
    found = by_name(PrunedModel.of(model, make_tokenizer()))
    assert np.isnan(found["log_spectral_norm"]).all()
    assert np.isnan(found["log_stable_rank"]).all()


@pytest.mark.parametrize(
    "space",
    [
        RankSpace(candidates=(2,), searchable=(True,) * 3, default_rank=2, costs=(1,) * 3),
        RankSpace(
            candidates=(2,),
            searchable=(True,) * 4,
            default_rank=2,
            costs=(1,) * 4,
            groups=("attention", "experts"),
        ),
    ],
)
def test_the_space_of_another_model_is_refused(make_llama, make_tokenizer, space):
    pruned = PrunedModel.of(make_llama(), make_tokenizer())
    with pytest.raises(RankSpaceError, match="it has 2 layers of type llama"):
        layer_features(pruned, space)
