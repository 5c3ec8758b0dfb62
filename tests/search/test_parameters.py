"""Rank spaces as parameters of Optuna, and what a study of them has observed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState as OptunaState

from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace, Setting
from rankadaptor_plugin.core.trials import RECORD
from rankadaptor_plugin.search.space import (
    Observations,
    allocation_from,
    distributions,
    parameters_of,
    proposed,
    require_untried,
    slot_names,
    untried,
)
from rankadaptor_plugin.search.study import quiet_study
from rankadaptor_plugin.testing.search import SPACE, UNEVEN_SPACE

RATE = Setting("learning_rate", (1e-4, 3e-4, 1e-3), 3e-4)
GROUPED = RankSpace(
    candidates=(0, 2, 4, 8),
    searchable=(True,) * 8,
    default_rank=4,
    costs=(1, 2) * 4,
    groups=("attention", "mlp"),
    settings=(RATE,),
    max_rank_sum=40,
)
KEPT = RankSpace(candidates=(0, 4), searchable=(False, True, True), default_rank=4, costs=(1, 1, 1))
SPACES = (SPACE, UNEVEN_SPACE, GROUPED, KEPT)
TWO = RankSpace(candidates=(0, 2, 4), searchable=(True, True), default_rank=2, costs=(1, 1))


def study_of(*trials, direction="maximize"):
    study = quiet_study(
        "s", StudyDirection[direction.upper()], sampler=optuna.samplers.RandomSampler()
    )
    study.add_trials(trials)
    return study


def trial_of(ranks, value=None, *, space=TWO, state=OptunaState.COMPLETE, record=False, **more):
    allocation = ranks if isinstance(ranks, RankAllocation) else RankAllocation(tuple(ranks))
    if record:
        attributes = {
            RECORD: {"ranks": list(allocation.ranks), "settings": dict(allocation.settings)}
        }
        return optuna.trial.create_trial(state=state, value=value, user_attrs=attributes, **more)
    return optuna.trial.create_trial(
        state=state,
        value=value,
        params=parameters_of(space, allocation),
        distributions=distributions(space),
        **more,
    )


# -------------------------------------------------------------------------------------- names


def test_slots_are_named_by_layer_and_group():
    assert slot_names(TWO) == ["layer_00", "layer_01"]
    assert slot_names(GROUPED)[:3] == ["layer_00.attention", "layer_00.mlp", "layer_01.attention"]
    assert len(set(slot_names(GROUPED))) == GROUPED.slots
    deep = replace(TWO, searchable=(True,) * 13, costs=(1,) * 13)
    assert slot_names(deep) == sorted(slot_names(deep))


def test_only_what_is_searched_is_a_parameter():
    assert list(distributions(KEPT).items()) == [
        ("layer_01", IntDistribution(0, 4, step=4)),
        ("layer_02", IntDistribution(0, 4, step=4)),
    ]
    grouped = distributions(GROUPED)
    assert grouped.pop("learning_rate") == CategoricalDistribution(RATE.values)
    assert list(grouped) == slot_names(GROUPED)
    assert set(grouped.values()) == {CategoricalDistribution((0, 2, 4, 8))}


@pytest.mark.parametrize("space", SPACES)
@given(seed=st.integers(0, 2**32 - 1))
def test_parameters_and_allocations_turn_into_each_other(space, seed):
    (row,) = space.sample(1, np.random.default_rng(seed))
    allocation = space.allocation(row)
    params = parameters_of(space, allocation)
    assert list(params) == list(distributions(space))
    for name, distribution in distributions(space).items():
        assert distribution._contains(distribution.to_internal_repr(params[name]))
    assert allocation_from(space, params) == allocation
    assert proposed(space, params) == allocation
    assert space.row(allocation_from(space, params)) == row.tolist()


def test_an_allocation_without_settings_takes_the_value_next_to_the_default():
    assert parameters_of(GROUPED, GROUPED.uniform())["learning_rate"] == 3e-4


def test_no_adapter_at_all_becomes_the_smallest_allocation():
    nothing = dict.fromkeys(slot_names(GROUPED), 0)
    found = proposed(GROUPED, {**nothing, "learning_rate": 1e-3})
    assert found == RankAllocation(GROUPED.lowest().ranks, (("learning_rate", 1e-3),))


def test_no_adapter_in_the_searched_layers_is_kept_where_others_have_one():
    assert proposed(KEPT, {"layer_01": 0, "layer_02": 0}) == RankAllocation((4, 0, 0))


# ------------------------------------------------------------------------------- observations


def test_complete_trials_are_measured_in_order():
    study = study_of(trial_of((2, 4), 0.3), trial_of((4, 0), 0.1))
    seen = Observations.of(study, TWO)
    np.testing.assert_array_equal(seen.rows, [[2, 4], [4, 0]])
    np.testing.assert_array_equal(seen.values, [0.3, 0.1])
    assert [trial.number for trial in seen.trials] == [0, 1]
    assert seen.tried == {(2, 4), (4, 0)}
    assert (seen.position, seen.sign) == (2, 1)


def test_an_empty_study():
    seen = Observations.of(study_of(), GROUPED)
    assert seen.rows.shape == (0, GROUPED.columns)
    assert seen.values.shape == (0,)
    assert not seen.tried
    assert seen.position == 0


def test_running_and_failed_trials_are_tried_and_not_measured():
    running = trial_of((2, 4), state=OptunaState.RUNNING)
    failed = trial_of((4, 4), state=OptunaState.FAIL)
    started = optuna.trial.create_trial(state=OptunaState.RUNNING)
    seen = Observations.of(study_of(running, failed, started), TWO)
    assert not seen.trials
    assert seen.tried == {(2, 4), (4, 4)}
    assert seen.position == 3


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_values_that_are_not_finite_are_not_measured(value):
    seen = Observations.of(study_of(trial_of((2, 4), value)), TWO)
    assert not seen.trials
    assert seen.tried == {(2, 4)}


def test_the_trial_that_is_asked_for_is_left_out():
    study = study_of(trial_of((2, 4), 0.3), trial_of((4, 0), 0.1), trial_of((4, 4), 0.2))
    seen = Observations.of(study, TWO, 1)
    assert [trial.number for trial in seen.trials] == [0, 2]
    assert seen.position == 1


def test_minimized_values_change_their_sign():
    study = study_of(trial_of((2, 0), 0.5), trial_of((2, 2), 1.5), direction="minimize")
    seen = Observations.of(study, TWO)
    np.testing.assert_allclose(seen.values, [-0.5, -1.5])
    assert seen.sign == -1


@pytest.mark.parametrize(
    ("space", "trial", "row"),
    [
        (TWO, trial_of((2, 4), 0.3, user_attrs={RECORD: {"ranks": [4, 0]}}), [4, 0]),
        (TWO, trial_of((3, 3), 0.3, record=True), [3, 3]),  # uniform LoRA beyond the candidates
        (KEPT, trial_of((4, 0, 0), 0.3, space=KEPT), [4, 0, 0]),
    ],
)
def test_what_was_really_used_is_observed(space, trial, row):
    np.testing.assert_array_equal(Observations.of(study_of(trial), space).rows, [row])


def with_parameters(space, value, **more):
    params = {**dict.fromkeys(distributions(space), value), **more}
    kinds = {"x": FloatDistribution(0, 1), **distributions(space)}
    kinds = {name: kinds[name] for name in params}
    return optuna.trial.create_trial(value=1.0, params=params, distributions=kinds)


@pytest.mark.parametrize(
    ("space", "trial", "count"),
    [
        (TWO, with_parameters(TWO, 2, x=0.5), 1),  # a parameter beside the ranks does no harm
        (TWO, with_parameters(TWO, 0), 0),  # a trial without any adapter is left out
        (GROUPED, with_parameters(GROUPED, 0, learning_rate=1e-4), 0),
    ],
)
def test_parameters_that_make_an_allocation_are_observed(space, trial, count):
    assert len(Observations.of(study_of(trial), space).rows) == count


def test_settings_of_records_are_observed():
    rated = RankAllocation((4,) * 8, (("learning_rate", 1e-3),))
    bare = RankAllocation((4,) * 8)
    study = study_of(trial_of(rated, 0.3, record=True), trial_of(bare, 0.2, record=True))
    rows = Observations.of(study, GROUPED).rows
    np.testing.assert_array_equal(rows[:, -1], [2, 1])


@pytest.mark.parametrize(
    "foreign",
    [
        optuna.trial.create_trial(value=1.0),
        optuna.trial.create_trial(
            value=1.0, params={"x": 0.5}, distributions={"x": FloatDistribution(0, 1)}
        ),
        optuna.trial.create_trial(
            value=1.0, params={"layer_00": 2}, distributions={"layer_00": IntDistribution(2, 4)}
        ),
        trial_of((2, 2, 2), 1.0, record=True),
    ],
)
def test_trials_of_something_else_are_left_out(foreign):
    seen = Observations.of(study_of(foreign, trial_of((2, 4), 0.3)), TWO)
    np.testing.assert_array_equal(seen.rows, [[2, 4]])
    assert seen.position == 2


def test_a_pruned_trial_is_tried_and_not_measured():
    pruned = trial_of((4, 4), state=OptunaState.PRUNED, intermediate_values={50: 0.5})
    seen = Observations.of(study_of(pruned, trial_of((2, 4), 0.3)), TWO)
    assert len(seen.trials) == 1
    assert (4, 4) in seen.tried


# ------------------------------------------------------------------------------------ untried


def test_what_is_left_is_found_and_an_exhausted_space_is_an_error():
    rows = TWO.every()
    assert not any(tuple(row) == (0, 0) for row in rows.tolist())
    tried = {tuple(row) for row in rows[1:].tolist()}
    left = untried(TWO, tried, 9, np.random.default_rng(0))
    np.testing.assert_array_equal(left, rows[:1])
    tried.add(tuple(rows[0].tolist()))
    left = untried(TWO, tried, 9, np.random.default_rng(0))
    with pytest.raises(RankSpaceError, match=f"were tried, {len(rows)} in number"):
        require_untried(left, tried)
