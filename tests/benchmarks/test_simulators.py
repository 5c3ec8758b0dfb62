"""The simulated tasks of benchmarks/search: what the tables of regret take for granted."""

from __future__ import annotations

import numpy as np
import pytest
import simulators

RNG = np.random.default_rng(1)
ROWS = simulators.random_rows(4000, RNG)
kinds = pytest.mark.parametrize("kind", simulators.KINDS)


def test_a_problem_follows_from_its_seed():
    one = simulators.problem("heteroscedastic", 1.0, 3)
    simulators.family.cache_clear()
    two = simulators.problem("heteroscedastic", 1.0, 3)
    assert one.measure(ROWS[0], 5) == two.measure(ROWS[0], 5)
    assert (one.source_values == two.source_values).all()
    other = simulators.problem("heteroscedastic", 1.0, 4)
    assert one.measure(ROWS[0], 5) != other.measure(ROWS[0], 5)


@kinds
def test_true_scores_have_unit_spread_over_random_allocations(kind):
    scores = simulators.family(kind, 0)[0](ROWS)
    assert scores.mean() == pytest.approx(0, abs=0.06)
    assert scores.std() == pytest.approx(1, abs=0.05)


@kinds
def test_tasks_of_a_family_resemble_each_other(kind):
    target, *sources = (task(ROWS) for task in simulators.family(kind, 0))
    found = [np.corrcoef(target, source)[0, 1] for source in sources]
    assert 0.2 < np.mean(found) < 0.8


@kinds
def test_no_random_allocation_and_no_change_of_one_layer_beats_the_optimum(kind):
    problem = simulators.problem(kind, 0.3, 0)
    assert max(problem.target(ROWS)) < problem.optimum
    rows, values = simulators.climb(problem.target, ROWS[:50])
    assert max(values) <= problem.optimum + 1e-9
    assert problem.regret(rows[0]) == pytest.approx(problem.optimum - values[0])


@pytest.mark.parametrize("seed", [0, 1])
@kinds
def test_noise_has_the_size_asked_for(kind, seed):
    scale = simulators.family(kind, seed)[0].noise_scale(ROWS)
    assert np.sqrt(np.mean(scale**2)) == pytest.approx(1, abs=0.06)
    assert (scale.min() < 0.6) == (kind == "heteroscedastic")


def test_measurements_differ_from_the_truth_by_the_noise():
    problem = simulators.problem("saturating", 2.0, 0)
    values = np.array([problem.measure(ROWS[0], number) for number in range(1000)])
    errors = (values - problem.target.offset) / problem.target.spread - problem.target(ROWS[:1])
    assert errors.mean() == pytest.approx(0, abs=0.2)
    assert errors.std() == pytest.approx(2, rel=0.08)


def test_interactions_are_more_than_half_of_their_kind():
    target = simulators.family("interactions", 0)[0]
    index = np.searchsorted(simulators.RANKS, ROWS)
    one_hot = np.eye(len(simulators.RANKS))[index].reshape(len(ROWS), -1)
    scores = target(ROWS)
    fitted = one_hot @ np.linalg.lstsq(one_hot, scores, rcond=None)[0]
    assert 0.5 < np.var(scores - fitted) / np.var(scores) < 0.7
