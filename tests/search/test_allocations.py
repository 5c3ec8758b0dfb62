from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.core.errors import ConfigError, RankAdaptorError
from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
from rankadaptor_plugin.search import check
from rankadaptor_plugin.search.allocations import TABLE_7, named_allocation, paper_allocations

CANDIDATES = (2, 4, 6, 8, 10, 12)
LISTS = paper_allocations()
PIQA_30 = (
    *(8, 8, 8, 8, 12, 6, 10, 4, 2, 4, 2, 4, 12, 8, 2, 2),
    *(2, 12, 12, 12, 12, 2, 12, 4, 4, 2, 10, 2, 2, 8, 8, 8),
)


def test_lists_are_those_of_four_rates_and_seven_tasks() -> None:
    assert list(TABLE_7) == [20, 25, 30, 50]
    assert list(LISTS)[:7] == [
        f"paper:llama-7b:20:{task}"
        for task in (
            *("boolq", "piqa", "hellaswag", "winogrande"),
            *("arc_easy", "arc_challenge", "openbookqa"),
        )
    ]
    assert len(LISTS) == 28


@pytest.mark.parametrize("name", LISTS)
def test_list_has_32_ranks_and_keeps_the_unpruned_layers_at_8(name: str) -> None:
    ranks = named_allocation(name).ranks
    assert len(ranks) == 32
    assert ranks[:4] == (8,) * 4
    assert ranks[-2:] == (8,) * 2


def test_one_rank_alone_is_outside_the_candidates() -> None:
    outside = [
        (name, layer, rank)
        for name, allocation in LISTS.items()
        for layer, rank in enumerate(allocation.ranks)
        if rank not in CANDIDATES
    ]
    assert outside == [("paper:llama-7b:25:openbookqa", 9, 1)]


def test_lists_lie_in_the_rank_space_of_the_paper() -> None:
    space = RankSpace(
        candidates=CANDIDATES,
        searchable=(False,) * 4 + (True,) * 26 + (False,) * 2,
        default_rank=8,
        costs=(1,) * 32,
    )
    assert [name for name, allocation in LISTS.items() if not space.contains(allocation)] == [
        "paper:llama-7b:25:openbookqa"
    ]


def test_lists_shared_by_tasks_and_rates() -> None:
    assert len(set(LISTS.values())) == 12
    assert len(set(TABLE_7[50].values())) == 1
    assert TABLE_7[25]["boolq"] == TABLE_7[30]["boolq"]
    assert TABLE_7[25]["hella"] == TABLE_7[30]["arc-c"]


def test_sums_of_ranks_differ_from_those_of_uniform_rank_8() -> None:
    sums = {name: sum(allocation.ranks) for name, allocation in LISTS.items()}
    assert (min(sums.values()), max(sums.values())) == (194, 256)
    assert [name for name, total in sums.items() if total == 256] == [
        "paper:llama-7b:20:winogrande"
    ]


def test_a_list_rank_by_rank() -> None:
    assert named_allocation("paper:llama-7b:30:piqa").ranks == PIQA_30


@pytest.mark.parametrize(
    ("short", "task"),
    [
        ("hella", "hellaswag"),
        ("Wino", "winogrande"),
        ("ARC-e", "arc_easy"),
        ("arc-c", "arc_challenge"),
        ("OBQA", "openbookqa"),
        ("BoolQ", "boolq"),
    ],
)
def test_tasks_as_the_paper_calls_them(short: str, task: str) -> None:
    assert named_allocation(f"paper:LLaMA-7B:25:{short}") == LISTS[f"paper:llama-7b:25:{task}"]


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=40), st.sampled_from(["-", ",", ", "]))
def test_ranks_written_out(ranks: list[int], separator: str) -> None:
    text = separator.join(map(str, ranks))
    assert named_allocation(text) == RankAllocation(tuple(ranks))


def test_an_allocation_as_it_is_printed_is_read_again() -> None:
    assert all(named_allocation(str(a)) == a for a in LISTS.values())


def test_unknown_name_is_one_line_with_a_suggestion_and_what_is_allowed() -> None:
    with pytest.raises(ConfigError) as caught:
        named_allocation("paper:llama-7b:20:boolqq")
    message = str(caught.value)
    assert "\n" not in message
    assert "Did you mean 'paper:llama-7b:20:boolq'?" in message
    assert "20, 25, 30, 50" in message
    assert "openbookqa" in message


@pytest.mark.parametrize(
    "text",
    [
        *("", "paper", "paper:llama-7b:20", "paper:llama-13b:20:boolq", "paper:llama-7b:40:boolq"),
        *("4--6", "4-6-", "-4", "4.5-6", "4;6", "\u0664-6", "9" * 5000, "0-0", "x\ny"),
    ],
)
def test_what_is_no_allocation_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        named_allocation(text)
    assert "\n" not in str(caught.value)


def config(**tables):
    return run_file.from_dict({"oracle": {"tasks": ["tiny_boolq"]}, **tables})


@pytest.mark.parametrize(
    ("tables", "layers", "message"),
    [
        (
            {"search": {"allocation": "4-6"}},
            4,
            "has 2 ranks, but the model has 4 layers",
        ),
        (
            {"search": {"allocation": "4-6-8-8"}, "rank_space": {"per": "group"}},
            4,
            "8 module groups",
        ),
        ({"search": {"allocation": "4-6-8-65"}}, 4, "more than the model's hidden size 64"),
        ({"search": {"allocation": "none"}}, None, "Unknown allocation 'none'"),
        ({"search": {"meta": "nowhere"}}, None, "The file nowhere does not exist"),
        ({"rank_space": {"max_rank_sum": 7}}, 4, "max_rank_sum 7 is below 8"),
        (
            {"rank_space": {"max_rank_sum": 15, "per": "group", "budget": "free"}},
            4,
            "max_rank_sum 15 is below 16",
        ),
    ],
)
def test_what_does_not_fit_is_told_from_the_models_configuration(tables, layers, message) -> None:
    with pytest.raises(RankAdaptorError, match=message) as caught:
        check(config(**tables), layers, 64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tables", "layers"),
    [
        ({}, 4),
        ({"search": {"allocation": "4-6-8-8"}}, 4),
        ({"search": {"allocation": "4-6"}}, None),  # pruning may remove layers
        ({"search": {"allocation": "4-6-8-8"}, "rank_space": {"per": "projection"}}, 1),
        ({"rank_space": {"max_rank_sum": 8}}, 4),
        ({"rank_space": {"max_rank_sum": 1, "candidates": [0, 4, 12]}}, 4),
    ],
)
def test_what_may_fit_is_let_through(tables, layers) -> None:
    check(config(**tables), layers, None)
