"""The Pareto front of score against parameters."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
from rankadaptor_plugin.core.trials import Phase, Trial, TrialState
from rankadaptor_plugin.search.search import pareto_front

SPACE = RankSpace(candidates=(2, 4, 8), searchable=(True,) * 2, default_rank=4, costs=(1, 10))


def trial(position, **changes):
    given_ = {
        "position": position,
        "phase": Phase.ITERATION,
        "allocation": RankAllocation((2, 2)),
        "seed": 0,
        "state": TrialState.COMPLETE,
        "objective": 0.5,
    }
    return Trial(**{**given_, **changes})


def scored(position, ranks, objective, state=TrialState.COMPLETE):
    allocation = RankAllocation(ranks)
    return trial(position, allocation=allocation, objective=objective, state=state)


def test_the_front_rises_with_parameters():
    trials = [
        scored(0, (2, 4), 0.5),  # 42 parameters
        scored(1, (8, 2), 0.4),  # 28
        scored(2, (4, 2), 0.1),  # 24
        scored(3, (2, 2), 0.2),  # 22
        scored(4, (8, 8), 0.5),  # 88, no better than 42
    ]
    assert [t.position for t in pareto_front(trials, SPACE)] == [3, 1, 0]


def test_of_equally_small_trials_the_best_is_in_front_and_of_equal_ones_the_first():
    even = replace(SPACE, costs=(1, 1))
    trials = [scored(0, (2, 4), 0.1), scored(1, (4, 2), 0.3), scored(2, (4, 2), 0.3)]
    assert [t.position for t in pareto_front(trials, even)] == [1]


def test_only_complete_trials_are_in_front():
    trials = [
        scored(0, (2, 2), None, TrialState.FAILED),
        scored(2, (8, 8), -0.5),
    ]
    assert [t.position for t in pareto_front(trials, SPACE)] == [2]
    assert pareto_front([], SPACE) == []


@given(
    st.lists(
        st.tuples(st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 8]), st.integers(-3, 3)),
        max_size=12,
    )
)
def test_nothing_in_front_is_beaten_and_all_else_is(drawn):
    trials = [scored(i, (a, b), float(value)) for i, (a, b, value) in enumerate(drawn)]
    found = pareto_front(trials, SPACE)
    points = [(SPACE.parameters(t.allocation), t.objective) for t in found]
    for (small, low), (large, high) in itertools.pairwise(points):
        assert small < large
        assert low < high
    for other in trials:
        size = SPACE.parameters(other.allocation)
        assert any(s <= size and v >= other.objective for s, v in points)
