"""The scan finds the best random row, whatever the model and the space."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rankadaptor_plugin.config.tables import PerformanceModelConfig
from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.core.ranks import RankSpace, Setting
from rankadaptor_plugin.search.paper import best_of_random
from rankadaptor_plugin.search.performance.linear import bayes
from rankadaptor_plugin.search.performance.mlp import mlp
from rankadaptor_plugin.testing.search import SPACE, UNEVEN_SPACE, additive_value

CONFIG = PerformanceModelConfig(epochs=30)

BARE = RankSpace(candidates=(0, 4), searchable=(True,) * 3, default_rank=4, costs=(1,) * 3)

SETTINGS = dataclasses.replace(
    SPACE,
    settings=(Setting("learning_rate", (1e-4, 3e-4, 1e-3), 3e-4),),
)

LIMITED = dataclasses.replace(SPACE, budget=120)

FEW = 5000  # enough to draw every row of these spaces


def fitted(space, factory=mlp):
    rows = space.sample(30, np.random.default_rng(0))
    model = factory(space, CONFIG, 0)
    model.fit(rows, additive_value(rows + 1))
    return model


def rng(seed=0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("space", [SPACE, UNEVEN_SPACE, BARE, SETTINGS, LIMITED])
@pytest.mark.parametrize("factory", [mlp, bayes])
def test_finds_the_best_row_of_small_spaces(space, factory):
    model = fitted(space, factory)
    every = space.every()
    every = every[every[:, : space.slots].any(axis=1)]
    means = model.predict(every).mean
    row, predicted = best_of_random(space, model, 40 * FEW if space is SETTINGS else 4 * FEW, rng())
    assert predicted == pytest.approx(means.max(), abs=1e-5)
    np.testing.assert_allclose(model.predict(np.array([row])).mean, predicted)
    space.check(space.allocation(row))


@pytest.mark.parametrize("space", [SPACE, LIMITED])
def test_rows_that_were_tried_are_left_out(space):
    model = fitted(space)
    every = space.every()
    order = np.argsort(-model.predict(every).mean)
    tried = {tuple(row) for row in every[order[:5]].tolist()}
    row, predicted = best_of_random(space, model, 4 * FEW, rng(), tried)
    assert tuple(row) not in tried
    assert predicted == pytest.approx(model.predict(every).mean[order[5]], abs=1e-5)


def test_a_space_without_anything_new_is_an_error():
    model = fitted(BARE)
    tried = [tuple(row) for row in BARE.every().tolist()]
    with pytest.raises(RankSpaceError, match="All 100 random allocations"):
        best_of_random(BARE, model, 100, rng(), tried)


def test_more_candidates_are_at_least_as_good():
    wide = dataclasses.replace(SPACE, searchable=(True,) * 20, costs=(1,) * 20)
    model = fitted(wide)
    means = [best_of_random(wide, model, count, rng())[1] for count in (4096, 65536, 1 << 19)]
    assert means == sorted(means)
    assert means[-1] > means[0]


@pytest.mark.parametrize("space", [SPACE, UNEVEN_SPACE])
def test_candidates_are_drawn_evenly(space):
    model = fitted(space)
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(600):
        row, _ = best_of_random(space, model, 1, rng(seed))
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    drawn = np.repeat(np.array([*counts]), [*counts.values()], axis=0)
    for column, levels in enumerate(space.levels()):
        shares = [(drawn[:, column] == level).mean() for level in levels]
        np.testing.assert_allclose(shares, 1 / len(levels), atol=0.08)
