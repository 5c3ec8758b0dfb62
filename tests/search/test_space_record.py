"""Rank spaces and features as JSON: they come back as they were, and differences are named."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.core.ranks import RankSpace, Setting
from rankadaptor_plugin.search.space import (
    LayerFeatures,
    space_difference,
    space_from_json,
    space_to_json,
)

SPACE = RankSpace(
    candidates=(2, 4, 8),
    searchable=(False, True, True, True),
    default_rank=4,
    costs=(10, 20, 30, 40),
    budget=400,
    settings=(Setting("learning_rate", (1e-4, 3e-4), 3e-4),),
)

positive = st.floats(1e-6, 1e3)
settings = st.builds(
    Setting,
    name=st.sampled_from(["learning_rate", "alpha_over_rank"]),
    values=st.lists(positive, min_size=1, max_size=3, unique=True).map(
        lambda values: tuple(sorted(values))
    ),
    default=positive,
)


@st.composite
def spaces(draw):
    layers = draw(st.integers(1, 6))
    groups = draw(st.sampled_from([("",), ("attention", "mlp"), ("q_proj", "k_proj", "v_proj")]))
    slots = layers * len(groups)
    searchable = draw(st.lists(st.booleans(), min_size=slots, max_size=slots).filter(any))
    limit = st.none() | st.integers(10**6, 10**9)
    return RankSpace(
        candidates=tuple(sorted(draw(st.sets(st.integers(0, 64), min_size=1).filter(any)))),
        searchable=tuple(searchable),
        default_rank=draw(st.integers(1, 64)),
        costs=tuple(draw(st.lists(st.integers(1, 99), min_size=slots, max_size=slots))),
        budget=draw(limit),
        max_parameters=draw(limit),
        max_rank_sum=draw(limit),
        groups=groups,
        settings=tuple(draw(st.lists(settings, max_size=2))),
    )


@given(spaces())
def test_a_space_comes_back_from_json_as_it_was(space):
    back = space_from_json(json.loads(json.dumps(space_to_json(space))))
    assert back == space
    assert space_difference(back, space) is None


@pytest.mark.parametrize(
    "change",
    [
        {"candidates": None},
        {"candidates": "2-4"},
        {"candidates": [4, 2]},
        {"candidates": [2.0, 4]},
        {"searchable": [0, 1, 1, 1]},
        {"searchable": []},
        {"costs": [10]},
        {"default_rank": True},
        {"groups": []},
        {"groups": [1]},
        {"budget": "all"},
        {"settings": [{"name": "learning_rate"}]},
        {"settings": [{"name": "learning_rate", "values": [], "default": 1.0}]},
        {"settings": [{"name": "learning_rate", "values": [1.0], "default": 0.0}]},
    ],
)
def test_json_that_is_no_space_is_refused_in_one_line(change):
    with pytest.raises(ArtifactError, match=r"^A stored rank space cannot be read: [^\n]+$"):
        space_from_json({**space_to_json(SPACE), **change})


@pytest.mark.parametrize("data", [None, [], "space", {}, {"candidates": [2]}])
def test_what_is_no_record_at_all_is_refused(data):
    with pytest.raises(ArtifactError, match="A stored rank space cannot be read"):
        space_from_json(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"searchable": (True,) * 5, "costs": (10,) * 5},
            "it has 4 layers, now there are 5",
        ),
        (
            {"searchable": (True,) * 8, "costs": (5,) * 8, "groups": ("attention", "mlp")},
            "it has one rank per layer, now one rank per layer for each of attention, mlp",
        ),
        ({"candidates": (2, 4)}, "its rank candidates are [2, 4, 8], now [2, 4]"),
        ({"searchable": (True,) * 4}, "it searches layer 1, layer 2, layer 3, now all layers"),
        ({"default_rank": 2}, "its default rank is 4, now 2"),
        (
            {"costs": (10, 20, 31, 40)},
            "a unit of rank costs 30 parameters in layer 2, now 31: it was made with another "
            "pruned model",
        ),
        (
            {"settings": ()},
            "it searches learning_rate among [0.0001, 0.0003] (default 0.0003), now no settings",
        ),
    ],
)
def test_what_differs_is_said(change, words):
    assert space_difference(SPACE, replace(SPACE, **change)) == words


def test_many_searched_layers_are_not_all_listed():
    stored = RankSpace(
        candidates=(2, 4),
        searchable=(False, *(True,) * 12, False),
        default_rank=2,
        costs=(1,) * 14,
        groups=("attention", "mlp"),
    )
    now = replace(stored, searchable=(True,) * 14)
    assert space_difference(stored, now) == (
        "it searches layer 0 mlp, layer 1 attention, layer 1 mlp, layer 2 attention and 8 more, "
        "now all layers"
    )


def test_budget_and_limits_may_differ():
    assert space_difference(SPACE, replace(SPACE, budget=None, max_parameters=500)) is None


@given(
    arrays(
        np.float64,
        array_shapes(min_dims=2, max_dims=2, max_side=5),
        elements=st.just(np.nan) | st.floats(allow_nan=False, allow_infinity=False),
    )
)
def test_features_come_back_from_json_as_they_were(values):
    features = LayerFeatures(tuple(f"f{i}" for i in range(values.shape[1])), values)
    text = json.dumps(features.to_json(), allow_nan=False)
    back = LayerFeatures.from_json(json.loads(text))
    assert back.names == features.names
    np.testing.assert_array_equal(back.values, values)


def test_features_without_columns_keep_their_slots():
    back = LayerFeatures.from_json(LayerFeatures((), np.zeros((3, 0))).to_json())
    assert back.values.shape == (3, 0)
    assert back.column("relative_depth") is None


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"names": ["a"], "values": [[1, 2]]},
        {"names": ["a"], "values": [["high"]]},
        {"names": [1], "values": [[1]]},
        {"names": ["a"], "values": [1]},
    ],
)
def test_json_that_is_no_table_of_features_is_refused(data):
    with pytest.raises(ArtifactError, match="Stored features of layers cannot be read"):
        LayerFeatures.from_json(data)
