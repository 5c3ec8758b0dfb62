"""Limits in time, and the Pareto front of score against parameters."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
from rankadaptor_plugin.core.trials import Phase, Trial, TrialState
from rankadaptor_plugin.pipeline.search_step import TimeLimits
from rankadaptor_plugin.search.search import StopReason, pareto_front

SPACE = RankSpace(candidates=(2, 4, 8), searchable=(True,) * 2, default_rank=4, costs=(1, 10))
HOUR = 3600.0
FREE = TimeLimits(
    hours=0.0, gpu_hours=0.0, devices=1, spent=0.0, reserve=0, scoring=1.0, twice=False
)


def trial(position, recovery=0.0, oracle=0.0, search=0.0, **changes):
    given_ = {
        "position": position,
        "phase": Phase.ITERATION,
        "allocation": RankAllocation((2, 2)),
        "seed": 0,
        "state": TrialState.COMPLETE,
        "objective": 0.5,
        "seconds": {"recovery": recovery, "oracle": oracle, "search": search},
    }
    return Trial(**{**given_, **changes})


def of_hours(*hours):
    return [trial(i, recovery=h * HOUR) for i, h in enumerate(hours)]


# ------------------------------------------------------------------------------------------ limits


def test_without_limits_nothing_stops():
    assert FREE.reached(of_hours(99.0, 99.0)) is None
    assert FREE.reached([]) is None


def test_a_trial_begins_if_one_as_long_as_the_longest_still_fits():
    limits = replace(FREE, hours=4.0)
    assert limits.reached(of_hours(1.0, 1.0, 1.0)) is None  # 3 and 1 more
    assert limits.reached(of_hours(1.0, 1.1)) is None
    assert limits.reached(of_hours(2.0, 0.1)) is StopReason.MAX_HOURS  # 2.1 and 2 more
    assert limits.reached(of_hours(1.0, 1.0, 1.0, 0.1)) is StopReason.MAX_HOURS


def test_the_first_trial_begins_unless_the_time_is_over():
    assert replace(FREE, hours=1.0).reached([]) is None
    assert replace(FREE, hours=1.0, spent=1.1 * HOUR).reached([]) is StopReason.MAX_HOURS


def test_all_parts_of_a_trial_count_as_wall_time():
    parts = trial(0, recovery=0.3 * HOUR, oracle=0.2 * HOUR, search=0.1 * HOUR)
    assert replace(FREE, hours=1.19).reached([parts]) is StopReason.MAX_HOURS
    assert replace(FREE, hours=1.21).reached([parts]) is None


def test_devices_rest_while_the_search_thinks():
    parts = trial(0, recovery=0.3 * HOUR, oracle=0.2 * HOUR, search=9 * HOUR)
    assert replace(FREE, gpu_hours=1.01).reached([parts]) is None
    assert replace(FREE, gpu_hours=0.99).reached([parts]) is StopReason.MAX_GPU_HOURS


def test_every_device_counts():
    done = of_hours(1.0, 1.0)  # 3 hours with one more
    assert replace(FREE, gpu_hours=12.1, devices=4).reached(done) is None
    assert replace(FREE, gpu_hours=11.9, devices=4).reached(done) is StopReason.MAX_GPU_HOURS
    # Wall time is the same however many there are.
    assert replace(FREE, hours=3.1, devices=4).reached(done) is None


def test_whichever_limit_comes_first():
    done = of_hours(1.0)
    both = replace(FREE, hours=1.5, gpu_hours=9.0)
    assert both.reached(done) is StopReason.MAX_HOURS
    assert replace(both, hours=9.0, gpu_hours=1.5).reached(done) is StopReason.MAX_GPU_HOURS


def test_what_was_spent_before_counts():
    limits = replace(FREE, hours=4.0, spent=2.5 * HOUR)
    assert limits.reached(of_hours(0.7)) is None
    assert limits.reached(of_hours(0.8)) is StopReason.MAX_HOURS


def test_the_race_is_kept_in_reserve_at_the_length_of_the_longest_trial():
    limits = replace(FREE, hours=10.0, reserve=6)
    assert limits.reached(of_hours(1.0, 0.5)) is None  # 1.5, 1 more, 6 in reserve
    assert limits.reached(of_hours(1.0, 1.0, 1.0)) is None
    assert limits.reached(of_hours(1.0, 1.0, 1.0, 0.1)) is StopReason.MAX_HOURS


@pytest.mark.parametrize("key", ["hours", "gpu_hours"])
def test_the_race_scores_more_documents_than_the_search(key):
    # A trial takes 1 hour, a fine-tune of the race 0.5 and three times 0.5.
    done = [trial(0, recovery=0.5 * HOUR, oracle=0.5 * HOUR)]
    limits = replace(FREE, reserve=2, scoring=3.0)
    stop = StopReason.MAX_HOURS if key == "hours" else StopReason.MAX_GPU_HOURS
    assert replace(limits, **{key: 6.01}).reached(done) is None
    assert replace(limits, **{key: 5.99}).reached(done) is stop


def test_as_many_random_trials_as_of_the_search_are_kept_in_reserve():
    limits = replace(FREE, hours=6.0, twice=True)
    assert limits.reached(of_hours(1.0, 1.0)) is None  # 2 and 1 more, twice
    assert limits.reached(of_hours(1.0, 1.0, 0.1)) is StopReason.MAX_HOURS


@given(
    seconds=st.lists(st.floats(1.0, 100.0), min_size=1, max_size=30),
    hours=st.floats(0.01, 1.0),
    reserve=st.integers(0, 10),
    twice=st.booleans(),
)
def test_a_search_that_keeps_to_it_never_exceeds_the_limit(seconds, hours, reserve, twice):
    limits = replace(FREE, hours=hours, reserve=reserve, twice=twice)
    longest, done = max(seconds), [trial(0, recovery=max(seconds))]
    while limits.reached(done) is None and len(done) < len(seconds):
        done.append(trial(len(done), recovery=seconds[len(done)]))
    if len(done) > 1:  # of the first one nobody can know how long it takes
        total = sum(t.seconds["recovery"] for t in done)
        spent = total * (2 if twice else 1) + reserve * longest
        assert spent <= hours * HOUR * (1 + 1e-9)


# ------------------------------------------------------------------------------------------- front


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
