"""The rank space: property tests over random spaces, and one case per error message."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace, Setting

GOOD = {
    "candidates": (2, 4, 8),
    "searchable": (True, False, True),
    "default_rank": 4,
    "costs": (10, 20, 30),
}


@st.composite
def spaces(draw, budget: bool | None = None) -> RankSpace:
    searchable = draw(st.lists(st.booleans(), min_size=1, max_size=6).filter(any))
    costs = draw(st.lists(st.integers(1, 9), min_size=len(searchable), max_size=len(searchable)))
    candidates = tuple(sorted(draw(st.sets(st.integers(1, 16), min_size=1, max_size=5))))
    free = RankSpace(
        candidates=candidates,
        searchable=tuple(searchable),
        default_rank=draw(st.integers(1, 16)),
        costs=tuple(costs),
    )
    if budget is False or (budget is None and draw(st.booleans())):
        return free
    low = free.parameters(free.lowest())
    high = low + sum(costs) * (candidates[-1] - candidates[0])
    return RankSpace(
        candidates=free.candidates,
        searchable=free.searchable,
        default_rank=free.default_rank,
        costs=free.costs,
        budget=draw(st.integers(low, high + 3)),
    )


def is_full(space: RankSpace, allocation: RankAllocation) -> bool:
    """Whether no layer can take its next candidate within the budget."""
    left = space.budget - space.parameters(allocation)
    for rank, cost, searched in zip(allocation.ranks, space.costs, space.searchable, strict=True):
        above = [candidate for candidate in space.candidates if candidate > rank]
        if searched and above and (above[0] - rank) * cost <= left:
            return False
    return True


@given(space=spaces(), seed=st.integers(0, 99))
def test_samples_lie_in_the_space(space, seed):
    for row in space.sample(7, np.random.default_rng(seed)):
        allocation = space.check(space.allocation(row))  # fixed layers and budget included
        assert space.budget is None or is_full(space, allocation)


@given(space=spaces(), seed=st.integers(0, 99))
def test_sampling_is_a_function_of_the_generator(space, seed):
    one, two = (space.sample(5, np.random.default_rng(seed)) for _ in range(2))
    np.testing.assert_array_equal(one, two)


@settings(max_examples=30)
@given(space=spaces().filter(lambda space: space.size <= 30))
def test_every_lists_exactly_what_sampling_draws(space):
    listed = {tuple(row) for row in space.every().tolist()}
    assert len(listed) == len(space.every())
    drawn = {tuple(row) for row in space.sample(3000, np.random.default_rng(0)).tolist()}
    assert drawn <= listed
    # Rare ones may be missed where the space is not tiny.
    assert space.size > 10 or drawn == listed


@given(space=spaces(budget=True), seed=st.integers(0, 99), data=st.data())
def test_within_budget_holds_and_uses_it(space, seed, data):
    ranks = tuple(
        data.draw(st.sampled_from(space.candidates)) if s else space.default_rank
        for s in space.searchable
    )
    moved = space.within_budget(RankAllocation(ranks), seed)
    assert is_full(space, space.check(moved))
    assert space.within_budget(moved, seed + 1) == moved
    assert space.within_budget(RankAllocation(ranks), seed) == moved


@given(space=spaces(budget=False), seed=st.integers(0, 99))
def test_within_budget_changes_nothing_without_a_budget(space, seed):
    allocation = space.allocation(space.sample(1, np.random.default_rng(seed))[0])
    assert space.within_budget(allocation, seed) is allocation


@given(space=spaces(budget=False), extra=st.integers(0, 300))
def test_evenly_never_exceeds_and_is_near_even(space, extra):
    searched = [i for i, s in enumerate(space.searchable) if s]
    ones = [1 if s else space.default_rank for s in space.searchable]
    parameters = space.parameters(RankAllocation(tuple(ones))) + extra
    even = space.evenly(parameters)
    left = parameters - space.parameters(even)
    ranks = [even.ranks[i] for i in searched]
    assert left >= 0
    assert max(ranks) - min(ranks) <= 1
    assert all(even.ranks[i] == space.default_rank for i in set(range(space.layers)) - {*searched})
    # No layer at the lower of the two ranks could be raised.
    lower = [space.costs[i] for i in searched if even.ranks[i] == min(ranks)]
    assert max(ranks) == min(ranks) or min(lower) > left


def test_evenly_refuses_too_few_parameters():
    with pytest.raises(RankSpaceError, match="too few for rank 1"):
        RankSpace(**GOOD).evenly(79)  # 20 * 4 for the fixed layer
    assert RankSpace(**GOOD).evenly(90).ranks == (1, 4, 0)
    assert RankSpace(**GOOD).evenly(120).ranks == (1, 4, 1)


def test_sizes_and_corners():
    space = RankSpace(**GOOD)
    assert (space.layers, space.size) == (3, 9)
    assert space.uniform().ranks == (4, 4, 4)
    assert space.lowest().ranks == (2, 4, 2)
    assert space.parameters(space.uniform()) == 240
    assert space.sample(0, np.random.default_rng(0)).shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": ()}, "not all at least 0 with one above 0"),
        ({"candidates": (0,)}, "not all at least 0 with one above 0"),
        ({"candidates": (4, 2)}, "not ascending and distinct"),
        ({"candidates": (2, 2)}, "not ascending and distinct"),
        ({"default_rank": 0}, "default rank 0 is below 1"),
        ({"searchable": (False, False, False)}, "None of the 3 layers is searchable"),
        ({"searchable": ()}, "None of the 0 layers is searchable"),
        ({"costs": (1, 2)}, "2 layer costs were given for 3 layers"),
        ({"costs": (0, 2, 3)}, "below 1 in a searchable layer"),
        ({"budget": 159}, "budget of 159 trainable parameters is below 160"),
        ({"max_parameters": 159}, "max_parameters 159 is below 160"),
        ({"max_rank_sum": 7}, "max_rank_sum 7 is below 8"),
        ({"groups": ("attention", "mlp")}, "3 slots cannot be whole layers of 2 module groups"),
    ],
)
def test_bad_spaces(change, message):
    with pytest.raises(RankSpaceError, match=message):
        RankSpace(**(GOOD | change))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ((2, 4), "has 2 ranks for 3 layers"),
        ((2, 4, 5), r"Rank 5 of layer 2 is not among \[2, 4, 8\]"),
        ((2, 8, 2), r"Rank 8 of layer 1 is not among \[4\]"),
        ((8, 4, 8), "has 400 trainable parameters; the budget is 240"),
    ],
)
def test_allocations_outside_the_space(ranks, message):
    with pytest.raises(RankSpaceError, match=message):
        RankSpace(**GOOD, budget=240).check(RankAllocation(ranks))


@pytest.mark.parametrize("ranks", [(), (0, 0), (-1,)])
def test_bad_allocations(ranks):
    with pytest.raises(RankSpaceError, match="rank below 0, or none above 0"):
        RankAllocation(ranks)


@st.composite
def limited_spaces(draw):
    """Spaces with rank 0, module groups, settings and limits that some allocation keeps to."""
    groups = draw(st.sampled_from([("",), ("attention", "mlp")]))
    slots = len(groups) * draw(st.integers(1, 3))
    settings = (Setting("alpha_over_rank", (1.0, 2.0, 4.0), 2.0),)
    space = RankSpace(
        candidates=tuple(sorted(draw(st.sets(st.integers(0, 9), min_size=2, max_size=4)))),
        searchable=(*draw(st.lists(st.booleans(), min_size=slots, max_size=slots))[:-1], True),
        default_rank=draw(st.integers(1, 9)),
        costs=tuple(draw(st.lists(st.integers(1, 9), min_size=slots, max_size=slots))),
        groups=groups,
        settings=draw(st.sampled_from([(), settings])),
    )
    least = space.lowest()
    extra = st.none() | st.integers(0, 60)
    parameters, ranks, budget = draw(extra), draw(extra), draw(extra)
    # The fewest ranks in sum need not be the fewest parameters: both limits leave room for it.
    return replace(
        space,
        max_parameters=None if parameters is None else space.parameters(least) + parameters,
        max_rank_sum=None if ranks is None else sum(least.ranks) + ranks,
        budget=None if budget is None else space.parameters(least) + budget,
    )


@given(space=limited_spaces(), seed=st.integers(0, 99))
def test_whatever_is_drawn_listed_or_moved_keeps_to_every_limit(space, seed):
    rng = np.random.default_rng(seed)
    for row in [*space.sample(5, rng).tolist(), *space.every().tolist()]:
        allocation = space.check(space.allocation(row))
        assert space.row(allocation) == row
        assert len(row) == space.columns
        assert all(value in levels for value, levels in zip(row, space.levels(), strict=True))
    free = replace(space, max_parameters=None, max_rank_sum=None, budget=None)
    for row in free.sample(5, rng):
        moved = space.within_budget(free.allocation(row), seed)
        assert space.check(moved).settings == free.allocation(row).settings


def test_every_combination_of_settings_is_listed():
    settings = (Setting("learning_rate", (1e-4, 1e-3), 1e-4), Setting("x", (1.0, 2.0, 3.0), 1.9))
    space = RankSpace(
        candidates=(0, 2), searchable=(True, True), default_rank=2, costs=(1, 1), settings=settings
    )
    assert (space.size, space.columns) == (24, 4)
    assert len(space.every()) == 18  # no adapter at all is no allocation
    named = {space.allocation(row) for row in space.every()}
    assert RankAllocation((0, 2), (("learning_rate", 1e-3), ("x", 2.0))) in named
    assert space.row(space.uniform()) == [2, 2, 0, 1]  # nearest to the default by ratio
    assert str(space.allocation([0, 2, 1, 2])) == "0-2, learning_rate 0.001, x 3"


def test_the_most_even_allocation_keeps_the_limit_on_the_sum_of_ranks():
    four = {"searchable": (True,) * 4, "costs": (10, 10, 2, 2)}
    space = RankSpace(candidates=(0, 2, 4, 8), default_rank=8, max_rank_sum=16, **four)
    even = space.evenly(space.parameters(RankAllocation((8, 8, 0, 0))))
    assert even.ranks == (4, 4, 4, 4)
    assert space.limited_uniform() == even
    assert replace(space, max_rank_sum=99).limited_uniform() == space.uniform()


def test_the_baseline_of_a_searched_part_without_adapter_is_that_allocation():
    space = RankSpace(
        candidates=(0, 4), searchable=(False, True, True), default_rank=8, costs=(10,) * 3
    )
    assert space.evenly(space.parameters(space.lowest())) == space.lowest()


def test_an_allocation_that_is_given_is_compared_with_one_that_is_even_everywhere():
    space = RankSpace(
        candidates=(2, 4), searchable=(False, True, True), default_rank=8, costs=(10,) * 3
    )
    even = RankAllocation((6, 6, 6))
    assert space.evenly(space.parameters(even), everywhere=True) == even
    assert space.evenly(space.parameters(even)).ranks == (8, 5, 5)


def test_limits_are_kept_to_and_not_filled():
    four = {"searchable": (True,) * 4, "costs": (1, 2, 3, 4)}
    space = RankSpace(candidates=(0, 2, 4), default_rank=4, max_rank_sum=8, **four)
    sums = space.sample(500, np.random.default_rng(0)).sum(axis=1)
    assert (sums.min(), sums.max()) == (2, 8)
    filled = replace(space, budget=20)
    spent = filled.sample(500, np.random.default_rng(0)) @ np.array([1, 2, 3, 4])
    assert spent.max() <= 20
    assert spent.min() > space.sample(500, np.random.default_rng(0)).min()


def test_an_allocation_is_refused_for_what_it_exceeds():
    settings = (Setting("alpha_over_rank", (1.0, 2.0), 2.0),)
    space = RankSpace(**GOOD, max_rank_sum=9, settings=settings)
    with pytest.raises(RankSpaceError, match="add up to 16; the limit is 9"):
        space.check(RankAllocation((8, 4, 4)))
    with pytest.raises(RankSpaceError, match="alpha_over_rank 3 is not among"):
        space.check(RankAllocation((2, 4, 2), (("alpha_over_rank", 3.0),)))
