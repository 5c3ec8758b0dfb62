"""Landscapes and the ascent on them: against plain sums and against listing all rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.core.ranks import RankSpace, Setting
from rankadaptor_plugin.search.performance import landscape as landscape_module
from rankadaptor_plugin.search.performance.landscape import Ascent, Codes, Landscape

RATES = Setting(name="learning_rate", values=(1e-4, 3e-4, 1e-3), default=1e-4)


@st.composite
def spaces(draw) -> RankSpace:
    searchable = draw(st.lists(st.booleans(), min_size=2, max_size=5).filter(any))
    costs = draw(st.lists(st.integers(1, 9), min_size=len(searchable), max_size=len(searchable)))
    given = {
        "candidates": tuple(sorted(draw(st.sets(st.integers(0, 12), min_size=2, max_size=4)))),
        "searchable": tuple(searchable),
        "default_rank": draw(st.integers(1, 8)),
        "costs": tuple(costs),
        "settings": draw(st.sampled_from([(), (RATES,)])),
    }
    free = RankSpace(**given)
    lowest = free.lowest()
    parameters = st.integers(free.parameters(lowest), free.parameters(lowest) + 12 * sum(costs))
    sums = st.integers(sum(lowest.ranks), sum(lowest.ranks) + 12 * len(costs))
    limits = {"budget": parameters, "max_parameters": parameters, "max_rank_sum": sums}
    named = draw(st.sets(st.sampled_from(sorted(limits))))
    return RankSpace(**given, **{name: draw(limits[name]) for name in sorted(named)})


def random_landscape(space: RankSpace, seed: int, pairs: float = 0.3) -> Landscape:
    rng, codes = np.random.default_rng(seed), Codes(space)
    weights = np.triu(pairs * rng.normal(size=(space.columns, space.columns)), 1)
    return Landscape(
        codes=codes,
        tables=rng.normal(size=codes.valid.shape),
        pairs=(weights + weights.T) / 2,
        linear=rng.normal(),
        quadratic=0.3 * rng.normal(),
    )


def even_space(layers: int, candidates: tuple[int, ...] = (2, 4, 8), **limits) -> RankSpace:
    costs = tuple(10 + 3 * (i % 3) for i in range(layers))
    return RankSpace(
        candidates=candidates,
        searchable=(True,) * layers,
        default_rank=4,
        costs=costs,
        **limits,
    )


def is_full(space: RankSpace, row: list[int], most: int | None = None) -> bool:
    """Whether no slot can take its next candidate within budget and limits."""
    allocation = space.allocation(row)
    limit = min(n for n in (space.limit, most) if n is not None)
    for slot, (rank, searched) in enumerate(zip(allocation.ranks, space.searchable, strict=True)):
        above = [candidate for candidate in space.candidates if candidate > rank]
        if not searched or not above:
            continue
        spent = space.parameters(allocation) + (above[0] - rank) * space.costs[slot]
        total = sum(allocation.ranks) + above[0] - rank
        if spent <= limit and (space.max_rank_sum is None or total <= space.max_rank_sum):
            return False
    return True


def climb(landscape: Landscape, seed: int = 0, most: int | None = None, random: int = 5):
    rng = np.random.default_rng(seed)
    ascent = Ascent(landscape, rng, most)
    found = ascent.highest(np.zeros((1, landscape.codes.space.columns), dtype=int), random=random)
    return landscape.codes.rows(found[None])[0].tolist(), float(landscape.values(found[None])[0])


@pytest.fixture
def no_listing(monkeypatch):
    """Has small spaces climbed like large ones."""
    monkeypatch.setattr(landscape_module, "_LISTED", 0)


@given(space=spaces(), seed=st.integers(0, 99))
def test_rows_and_positions_of_levels_are_one_to_one(space, seed):
    codes, rows = Codes(space), space.sample(5, np.random.default_rng(seed))
    np.testing.assert_array_equal(codes.rows(codes.index(rows)), rows)


@given(space=spaces())
def test_codes_are_standardized_and_orthogonal(space):
    codes = Codes(space)
    for column, levels in enumerate(space.levels()):
        one = codes.monotone[column, : len(levels)]
        two = codes.curvature[column, : len(levels)]
        assert (np.diff(one) > 0).all()
        assert one.mean() == pytest.approx(0, abs=1e-9)
        assert (one**2).mean() == pytest.approx(float(len(levels) > 1))
        assert (two**2).mean() == pytest.approx(float(len(levels) > 2))
        assert (one * two).mean() == pytest.approx(0, abs=1e-9)


@given(space=spaces(), seed=st.integers(0, 99))
def test_values_are_the_sum_that_is_promised(space, seed):
    one, rows = random_landscape(space, seed), space.sample(4, np.random.default_rng(seed))
    index = one.codes.index(rows)
    for row, value in zip(index, one.values(index), strict=True):
        code = [one.codes.monotone[i, level] for i, level in enumerate(row)]
        total = sum(one.codes.total[i, level] for i, level in enumerate(row))
        both = itertools.combinations(range(space.columns), 2)
        expected = sum(one.tables[i, level] for i, level in enumerate(row))
        expected += sum(2 * one.pairs[i, j] * code[i] * code[j] for i, j in both)
        expected += one.linear * total + one.quadratic * total**2
        assert value == pytest.approx(expected)


@given(space=spaces(), seed=st.integers(0, 99))
def test_gains_are_differences_of_values(space, seed):
    one, rows = random_landscape(space, seed), space.sample(1, np.random.default_rng(seed))
    index = one.codes.index(rows)
    gains, _, _ = one.gains(index)
    for column, level in zip(*np.nonzero(one.codes.valid), strict=True):
        changed = index.copy()
        changed[0, column] = level
        difference = one.values(changed) - one.values(index)
        assert gains[0, column, level] == pytest.approx(difference[0], abs=1e-9)
        to = index.copy()
        to[0, column] = level
        assert one.step_gains(index, to)[0, column] == pytest.approx(difference[0], abs=1e-9)
    assert np.isneginf(gains[0][~one.codes.valid]).all()


@settings(max_examples=60)
@given(space=spaces(), seed=st.integers(0, 99), data=st.data())
def test_the_highest_row_lies_in_the_space_and_uses_its_budget(space, seed, data):
    lowest = space.parameters(space.lowest())
    most = data.draw(st.none() | st.integers(lowest, lowest + 50))
    row, _ = climb(random_landscape(space, seed), seed, most)
    allocation = space.check(space.allocation(row))
    assert most is None or space.parameters(allocation) <= most
    assert space.budget is None or is_full(space, row, most)


@settings(max_examples=60)
@given(space=spaces(), seed=st.integers(0, 99))
def test_a_climbed_row_lies_in_the_space_and_uses_its_budget(space, seed):
    landscape = random_landscape(space, seed)
    landscape.codes.listed = None  # climbed like a large space
    row, _ = climb(landscape, seed)
    space.check(space.allocation(row))
    assert space.budget is None or is_full(space, row)


@settings(max_examples=40)
@given(space=spaces(), seed=st.integers(0, 99))
def test_small_spaces_are_searched_exactly(space, seed):
    landscape = random_landscape(space, seed)
    _, value = climb(landscape, seed)
    every = landscape.values(landscape.codes.index(space.every()))
    assert value == pytest.approx(every.max())


@pytest.mark.parametrize("pairs", [0.0, 0.1])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_parameters": 290},
        {"max_rank_sum": 25},
        {"max_parameters": 300, "max_rank_sum": 24},
    ],
    ids=lambda limits: "+".join(limits) or "free",
)
@pytest.mark.usefixtures("no_listing")
def test_ascent_equals_brute_force(limits, pairs):
    space = even_space(6, (0, 2, 4, 8), **limits)
    found, highest = [], []
    for seed in range(12):
        landscape = random_landscape(space, seed, pairs)
        found.append(climb(landscape, seed)[1])
        highest.append(landscape.values(landscape.codes.index(space.every())).max())
    # Exact but for a rare local optimum of many pairs or of a tight limit.
    assert np.isclose(found, highest).sum() >= 11
    np.testing.assert_allclose(found, highest, atol=0.5)


@pytest.mark.usefixtures("no_listing")
def test_ascent_under_a_budget_comes_near_brute_force():
    space = even_space(7, budget=4 * sum(even_space(7).costs))
    for seed in range(12):
        landscape = random_landscape(space, seed, 0.1)
        every = landscape.values(landscape.codes.index(space.every()))
        assert (every > climb(landscape, seed)[1] + 1e-9).mean() < 0.01


@pytest.mark.usefixtures("no_listing")
def test_a_parabola_in_the_total_is_climbed_exactly():
    space = even_space(6)
    codes = Codes(space)
    flat = np.zeros(codes.valid.shape)
    target = Landscape(codes=codes, tables=flat, pairs=np.zeros((6, 6)), quadratic=-1.0)
    assert climb(target)[1] == pytest.approx(
        target.values(codes.index(space.every())).max(), abs=1e-3
    )


@pytest.mark.usefixtures("no_listing")
def test_a_flat_landscape_is_left_where_it_is():
    codes = Codes(even_space(6))
    flat = Landscape(codes=codes, tables=np.zeros(codes.valid.shape), pairs=np.zeros((6, 6)))
    start = np.array([[0, 1, 2, 0, 1, 2]])
    found = Ascent(flat, np.random.default_rng(0)).highest(start, random=0)
    np.testing.assert_array_equal(found, start[0])


@settings(max_examples=40)
@given(space=spaces(), seed=st.integers(0, 99), data=st.data())
def test_no_tried_row_is_returned_while_another_is_left(space, seed, data):
    landscape = random_landscape(space, seed)
    every = [tuple(row) for row in space.every().tolist()]
    left = data.draw(st.sampled_from(every))
    tried = set(every) - {left}
    ascent = Ascent(landscape, np.random.default_rng(seed))
    highest = landscape.codes.index(np.array([every[0]]))[0]
    found = landscape.codes.rows(ascent.next_highest(highest, tried)[None])[0]
    assert tuple(found.tolist()) == left
    all_tried = ascent.next_highest(highest, set(every))
    np.testing.assert_array_equal(all_tried, highest)


def test_the_next_highest_row_is_the_best_single_change():
    space = even_space(9)
    landscape = random_landscape(space, 3, 0.0)
    ascent = Ascent(landscape, np.random.default_rng(0))
    top = ascent.highest(np.zeros((1, 9), dtype=int), random=2)
    row = tuple(landscape.codes.rows(top[None])[0].tolist())
    second = ascent.next_highest(top, {row})
    assert (second != top).sum() == 1
    gains, _, _ = landscape.gains(top[None])
    best = np.sort(gains[np.isfinite(gains)])[-10]  # nine columns stay as they are, at gain 0
    difference = landscape.values(second[None]) - landscape.values(top[None])
    assert difference[0] == pytest.approx(best)


def test_an_impossible_limit_is_refused():
    with pytest.raises(RankSpaceError, match="most_parameters is 3; the smallest allocation"):
        Ascent(random_landscape(even_space(4), 0), np.random.default_rng(0), 3)
