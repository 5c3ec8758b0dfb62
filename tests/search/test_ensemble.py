"""The ensemble knows what it does not know, weighs priors by evidence, and keeps to limits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankadaptor_plugin.config.tables import PerformanceModelConfig
from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.core.ranks import RankSpace
from rankadaptor_plugin.search.performance.ensemble import MLPEnsemble, ensemble
from rankadaptor_plugin.search.performance.local_search import highest
from rankadaptor_plugin.search.performance.performance_model import (
    MetaLearner,
    PriorEffects,
    ProposingModel,
)
from rankadaptor_plugin.testing.search import SPACE, PerformanceModelConformance

CONFIG = PerformanceModelConfig()

FREE = RankSpace(
    candidates=(2, 4, 6, 8, 10, 12), searchable=(True,) * 12, default_rank=8, costs=(1,) * 12
)

NONE = np.empty((0, 12), dtype=np.int64)


class TestEnsemble(PerformanceModelConformance):
    least_correlation = 0.9

    def performance_model(self, space, seed):
        return ensemble(space, CONFIG, seed)


def linear(rows, seed=0) -> np.ndarray:
    weights = np.random.default_rng(seed).normal(size=rows.shape[1])
    return (rows - 7) @ weights / np.sqrt(35 / 3 * (weights**2).sum())  # variance 1


def effects(space, seed=0) -> tuple[np.ndarray, ...]:
    """The effects of `linear`."""
    weights = np.random.default_rng(seed).normal(size=space.columns)
    scale = np.sqrt(35 / 3 * (weights**2).sum())
    return tuple((np.array(space.candidates) - 7) * w / scale for w in weights)


def test_proposes_and_learns_from_tasks():
    assert isinstance(ensemble(SPACE, CONFIG, 0), ProposingModel)
    assert isinstance(ensemble(SPACE, CONFIG, 0), MetaLearner)


def test_two_out_of_three_errors_lie_within_one_standard_deviation():
    scores = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        rows, unseen = FREE.sample(40, rng), FREE.sample(200, rng)
        model = ensemble(FREE, CONFIG, seed)
        model.fit(rows, linear(rows, seed) + 0.5 * rng.normal(size=40))
        prediction = model.predict(unseen)
        measured = linear(unseen, seed) + 0.5 * rng.normal(size=200)
        scores.append((measured - prediction.mean) / np.hypot(prediction.stddev, prediction.noise))
    assert 0.6 < np.std(scores) < 1.4


def test_noise_is_told_from_ignorance():
    rng = np.random.default_rng(0)
    rows = FREE.sample(80, rng)
    noise = []
    for scale in (0.1, 2.0):
        model = ensemble(FREE, CONFIG, 0)
        model.fit(rows, linear(rows) + scale * rng.normal(size=80))
        noise.append(model.predict(rows).noise)
    assert noise[0] < 0.6
    assert noise[1] > 1.0


def test_a_few_epochs_are_not_lost():
    rows = FREE.sample(40, np.random.default_rng(0))
    means = []
    for epochs in (3, 30):
        model = ensemble(FREE, PerformanceModelConfig(epochs=epochs), 0)
        model.fit(rows, linear(rows))
        means.append(np.corrcoef(model.predict(rows).mean, linear(rows))[0, 1])
    assert means[1] > means[0] + 0.1


def test_a_prior_that_is_right_is_trusted_and_one_that_is_wrong_is_not():
    rows = FREE.sample(40, np.random.default_rng(0))
    priors = [PriorEffects("right", effects(FREE)), PriorEffects("wrong", effects(FREE, 1))]
    model = MLPEnsemble(FREE, CONFIG, 0, priors)
    model.fit(rows, linear(rows))
    assert model.weights["right"] > 0.8
    assert model.weights["wrong"] < 0.4


def test_a_prior_points_the_way_before_the_first_value():
    model = MLPEnsemble(FREE, CONFIG, 0, [PriorEffects("earlier", effects(FREE))])
    assert linear(np.array([model.propose(np.random.default_rng(0))]))[0] > 1.5


def test_a_prior_points_the_way_after_one_value():
    rows = FREE.sample(1, np.random.default_rng(0))
    model = MLPEnsemble(FREE, CONFIG, 0, [PriorEffects("earlier", effects(FREE))])
    model.fit(rows, np.array([3.0]))
    assert 0.2 < model.weights["earlier"] < 0.8
    assert linear(np.array([model.best(np.random.default_rng(0))]))[0] > 1.5


def test_a_prior_helps_with_few_values():
    rng = np.random.default_rng(0)
    rows, unseen = FREE.sample(8, rng), FREE.sample(300, rng)
    correlations = []
    for priors in ([], [PriorEffects("earlier", effects(FREE))]):
        model = MLPEnsemble(FREE, CONFIG, 0, priors)
        model.fit(rows, linear(rows) + 0.3 * rng.normal(size=8))
        correlations.append(np.corrcoef(model.predict(unseen).mean, linear(unseen))[0, 1])
    assert correlations[1] > correlations[0] + 0.1


def test_pretraining_on_related_tasks_helps_with_few_values():
    rng = np.random.default_rng(0)
    rows, unseen = FREE.sample(40, rng), FREE.sample(300, rng)
    correlations = []
    for meta in ("none", "joint"):
        model = ensemble(FREE, PerformanceModelConfig(meta=meta), 0)
        model.pretrain(rows, np.stack([linear(rows), 5 + linear(rows) ** 3], axis=1))
        model.fit(rows[:6], linear(rows[:6]))
        correlations.append(np.corrcoef(model.predict(unseen).mean, linear(unseen))[0, 1])
    assert correlations[1] > correlations[0] + 0.1


@pytest.mark.parametrize("limit", [{}, {"budget": 96}, {"max_rank_sum": 70}])
def test_local_search_finds_the_optimum_of_an_additive_function(limit):
    space = dataclasses.replace(FREE, **limit)
    weights = np.linspace(0.1, 2.0, 12)

    def score(rows):
        return np.log(rows) @ weights

    found = highest(space, score, np.random.default_rng(0), known=NONE)
    random = space.sample(20_000, np.random.default_rng(1))
    assert score(np.array([found]))[0] > score(random).max()
    assert space.parameters(space.check(space.allocation(found))) == min(
        144, *(limit.values() or [144])
    )


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    costs=st.lists(st.integers(1, 9), min_size=6, max_size=6),
    share=st.floats(0.2, 1.0),
    budget=st.booleans(),
)
def test_local_search_keeps_to_any_limit(seed, costs, share, budget):
    ranks = (1, 2, 4, 8, 16)
    least = sum(costs)
    most = least + int(share * 15 * least)
    space = RankSpace(
        candidates=ranks,
        searchable=(True,) * 6,
        default_rank=8,
        costs=tuple(costs),
        budget=most if budget else None,
        max_parameters=None if budget else most,
    )
    weights = np.random.default_rng(seed).normal(size=6)
    found = highest(
        space, lambda rows: rows @ weights, np.random.default_rng(seed), known=NONE[:, :6]
    )
    left = most - space.parameters(space.check(space.allocation(found)))
    if budget:  # no further step fits
        steps = [cost * r for cost, r in zip(costs, found, strict=True) if r < 16]
        assert all(step > left for step in steps)


def test_small_spaces_are_searched_in_full_until_nothing_is_left():
    space = RankSpace(candidates=(2, 4), searchable=(True,) * 3, default_rank=2, costs=(1,) * 3)
    model = ensemble(space, CONFIG, 0)
    tried: list[tuple[int, ...]] = [(2, 2, 2)]
    model.fit(np.array(tried), np.array([1.0]))
    for _ in range(7):
        tried.append(tuple(model.propose(np.random.default_rng(0), tried=tried)))
    assert len(set(tried)) == 8
    with pytest.raises(RankSpaceError, match="were tried, 8 in number"):
        model.propose(np.random.default_rng(0), tried=tried)


def test_known_rows_outside_the_limits_are_no_starts():
    space = dataclasses.replace(FREE, max_rank_sum=40)
    known = np.full((3, 12), 12)
    found = highest(
        space, lambda rows: rows.sum(axis=1) * 1.0, np.random.default_rng(0), known=known
    )
    assert sum(found) == 40


def test_every_proposal_spends_the_budget_however_much_was_tried():
    space = RankSpace(
        candidates=(2, 4, 6, 8, 10, 12),
        searchable=(True,) * 8,
        default_rank=8,
        costs=(1,) * 8,
        budget=64,
    )
    rng = np.random.default_rng(0)
    rows = space.sample(20, rng)
    model = MLPEnsemble(space, PerformanceModelConfig(epochs=30), 0)
    model.fit(rows, np.log(rows) @ np.arange(1.0, 9.0))
    tried = {tuple(row) for row in rows.tolist()}
    for _ in range(20):
        row = model.propose(rng, tried=tried)
        assert sum(row) == 64
        assert tuple(row) not in tried
        tried.add(tuple(row))
