"""The time of a run: what fits into it before the start, and while it goes on."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.core.errors import RecoveryError
from rankadaptor_plugin.pipeline.budget import (
    Budget,
    Costs,
    Done,
    Size,
    cut,
    fine_tunes,
    seconds_of,
    smallest,
)
from rankadaptor_plugin.search.search import StopReason

HOUR = 3600.0
COSTS = Costs(fine_tune=8.0, search_score=2.0, report_score=5.0, before=100.0, after=50.0)


def config(**tables):
    data = {
        "oracle": {"tasks": ["toy"]},
        "noise": {"seeds": 3, "allocations": 4},
        "search": {"n_trials": 30},
        "confirm": {"finalists": 2, "seeds": 6},
        "tune": {"learning_rates": []},
        "recovery": {"stack": []},
    }
    for name, table in tables.items():
        data[name] = {**data.get(name, {}), **table}
    return run_file.from_dict(data)


RACED = 3  # allocations: two finalists and uniform LoRA


def test_the_fine_tunes_of_a_run_are_counted_once():
    whole = fine_tunes(config(), Size.of(config()))
    # The first four trials are those of the noise floor.
    assert whole == {"tune": 0, "noise": 12, "search": 26, "random": 0, "confirm": 6 * RACED}
    twice = config(confirm={"best_random": True})
    assert fine_tunes(twice, Size.of(twice))["random"] == 30


def test_what_is_done_is_not_planned_again():
    done = Done(noise=12, search=10, race=1)
    rest = fine_tunes(config(), Size.of(config()), done)
    assert rest == {"tune": 0, "noise": 0, "search": 20, "random": 0, "confirm": 17}


def test_a_run_without_search_is_its_comparison():
    fixed = config(recovery={"methods": ["dora"]})
    size = Size.of(fixed)
    assert (size.noise_seeds, size.trials) == (0, 0)
    counts = {"tune": 0, "noise": 0, "search": 0, "random": 0, "confirm": 12}
    assert fine_tunes(fixed, size) == counts


TUNED = {"tune": {"learning_rates": [1e-3, 2e-3]}, "recovery": {"stack": ["distill"]}}


def test_the_tuned_stack_is_counted_and_serves_the_noise_floor_too():
    tuned = config(**TUNED)
    whole = fine_tunes(tuned, Size.of(tuned))
    assert whole == {
        "tune": 2 * (2 + 1),
        "noise": 12 - 2,
        "search": 26,
        "random": 0,
        "confirm": 6 * (RACED + 2),
    }


def test_tuning_is_cut_last():
    tuned = config(**TUNED)
    whole, least = Size.of(tuned), smallest(tuned)
    assert (whole.tune, least.tune) == (6, 0)
    kept = Size(noise_seeds=0, trials=2, seeds=3, tune=6)
    assert cut(tuned, COSTS, seconds_of(tuned, kept, COSTS)) == kept
    assert cut(tuned, COSTS, seconds_of(tuned, kept, COSTS) - 1).tune == 0


def test_the_seconds_of_a_run_are_those_of_its_parts():
    assert seconds_of(config(), Size.of(config()), COSTS) == 100 + 38 * 10 + 18 * 15 + 50


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (math.inf, Size(noise_seeds=3, trials=30, seeds=6)),
        (800, Size(noise_seeds=3, trials=30, seeds=6)),
        (799, Size(noise_seeds=3, trials=29, seeds=6)),
        (550, Size(noise_seeds=3, trials=5, seeds=6)),
        (539, Size(noise_seeds=2, trials=7, seeds=6)),
        (499, Size(noise_seeds=0, trials=7, seeds=6)),
        (430, Size(noise_seeds=0, trials=5, seeds=5)),
        (305, Size(noise_seeds=0, trials=2, seeds=3)),
        (304, None),
    ],
)
def test_trials_are_cut_first_and_seeds_of_the_comparison_last(seconds, expected):
    assert cut(config(), COSTS, seconds) == expected


def test_the_smallest_run_is_what_must_fit():
    least = smallest(config())
    assert seconds_of(config(), least, COSTS) == 100 + 2 * 10 + 3 * RACED * 15 + 50
    assert cut(config(), COSTS, 305) is None or seconds_of(config(), least, COSTS) == 305


@given(seconds=st.floats(0, 2000), trials=st.integers(2, 40), twice=st.booleans())
def test_what_is_cut_fits_and_one_more_trial_would_not(seconds, trials, twice):
    run = config(search={"n_trials": trials}, confirm={"best_random": twice})
    size = cut(run, COSTS, seconds)
    if size is None:
        assert seconds_of(run, smallest(run), COSTS) > seconds
        return
    assert seconds_of(run, size, COSTS) <= seconds
    if size.trials < trials:
        more = Size(noise_seeds=size.noise_seeds, trials=size.trials + 1, seeds=size.seeds)
        assert seconds_of(run, more, COSTS) > seconds


# ---------------------------------------------------------------------------------- while it runs


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def budget(clock, hours=1.0, **given_):
    run = config(**given_.pop("tables", {"search": {"max_hours": hours}}))
    return Budget(run, now=clock, **given_).planned(COSTS, Size.of(run))


def test_without_a_limit_everything_is_allowed():
    free = Budget(config())
    assert free.left == math.inf
    assert all(free.allows(stage, 10**6) for stage in ("noise", "search", "random", "confirm"))


def test_the_tighter_limit_counts_and_every_device():
    both = {"search": {"max_hours": 2.0, "max_gpu_hours": 4.0}}
    assert budget(Clock(), tables=both).stop is StopReason.MAX_HOURS
    on_four = budget(Clock(), tables=both, devices=4)
    assert (on_four.limit, on_four.stop) == (HOUR, StopReason.MAX_GPU_HOURS)


def test_what_must_follow_is_kept_free():
    clock = Clock()
    watched = budget(clock, hours=1000 / HOUR, spent=100.0)
    reserve = 18 * 15 + 50
    clock.seconds = 900 - reserve - 10
    assert watched.allows("search")
    clock.seconds += 1
    assert not watched.allows("search")
    assert watched.refused == {"search"}
    assert watched.allows("confirm", 18)
    assert not watched.allows("confirm", 19)
    assert watched.refused == {"search", "confirm"}


def test_as_many_random_trials_as_of_the_search_are_kept_free():
    clock = Clock()
    tables = {"search": {"max_hours": 1000 / HOUR}, "confirm": {"best_random": True}}
    watched = budget(clock, tables=tables)
    clock.seconds = 1000 - (24 * 15 + 50) - 80
    assert watched.allows("search", trials=7)
    assert not watched.allows("search", trials=8)
    assert watched.allows("random", 8)


def test_a_slower_machine_than_forecast_is_noticed_at_the_first_fine_tune():
    clock = Clock()
    watched = budget(clock, hours=1000 / HOUR)
    assert watched.allows("search", 60)
    watched.observe({"recovery": 24.0, "oracle": 6.0})
    assert watched.costs.report_score == 15.0  # three times as long as well
    assert not watched.allows("search", 10)
    assert watched.allows("search", 4)
    watched.observe({"recovery": 1.0, "oracle": 1.0})  # the longest counts
    assert not watched.allows("search", 10)
    watched.observe_report(20.0)
    watched.observe_report(5.0)
    assert watched.costs.race_run == 24.0 + 6.0 + 20.0


def test_a_faster_machine_does_more_than_forecast():
    watched = budget(Clock(), hours=1000 / HOUR)
    assert not watched.allows("search", 100)
    watched.observe({"recovery": 1.0, "oracle": 1.0})
    assert watched.allows("search", 100)


def test_what_a_run_cannot_do_without_is_begun_while_it_ends_in_time():
    clock = Clock()
    watched = budget(clock, hours=1000 / HOUR)
    clock.seconds = 985.0
    assert watched.allows("confirm", 1, needed=True)
    clock.seconds = 986.0
    with pytest.raises(RecoveryError, match=r"max_hours 0.278 leaves 14 s.* takes 15 s.* Raise it"):
        watched.allows("confirm", 1, needed=True)
    assert not watched.refused
