"""Optuna's samplers in our harness: rebuilt from the study, they propose what they would have."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import optuna
import pytest
from optuna.exceptions import ExperimentalWarning
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState as OptunaState

from rankadaptor_plugin.config.tables import PerformanceModelConfig, SearchConfig
from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.ranks import RankSpace, Setting
from rankadaptor_plugin.core.trials import RECORD, Phase, Trial, TrialState
from rankadaptor_plugin.search import optuna_samplers
from rankadaptor_plugin.search.contract import SamplerSettings
from rankadaptor_plugin.search.optuna_samplers import ReplayedSampler
from rankadaptor_plugin.search.parameters import allocation_from, distributions
from rankadaptor_plugin.search.rank_sampler import quiet_study
from rankadaptor_plugin.search.search import search
from rankadaptor_plugin.search.study import TrialStore
from rankadaptor_plugin.testing.search import SPACE, UNEVEN_SPACE, additive_value, planted_outcome

MAXIMIZE = StudyDirection.MAXIMIZE
SEED = 5
RATED = replace(SPACE, settings=(Setting("learning_rate", (1e-4, 3e-4), 1e-4),))


def persistent(name):
    """What `optuna_samplers` replays, with its whole life in one piece."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if name == "cmaes":
            return optuna.samplers.CmaEsSampler(
                seed=SEED, n_startup_trials=1, with_margin=True, warn_independent_sampling=False
            )
        return optuna.samplers.QMCSampler(seed=SEED, scramble=True, warn_independent_sampling=False)


def settings(space, seed=0):
    return SamplerSettings(
        space=space,
        seed=seed,
        search_seed=SEED,
        initial_trials=0,
        candidates=1,
        performance_model=lambda: pytest.fail("no model here"),
        model_config=PerformanceModelConfig(),
    )


def value_of(space, params):
    ranks = allocation_from(space, params).ranks
    return float(additive_value(np.array([ranks]))[0]) + params.get("learning_rate", 0.0)


def proposals(sampler_for, space, trials, direction=MAXIMIZE, failed=()):
    study = quiet_study("s", direction, sampler=sampler_for(0))
    found = []
    for number in range(trials):
        study.sampler = sampler_for(number)
        trial = study.ask(distributions(space))
        found.append(trial.params)
        if number in failed:
            study.tell(trial, state=OptunaState.FAIL)
        else:
            study.tell(trial, value_of(space, trial.params))
    return found


@pytest.mark.parametrize("direction", StudyDirection.__members__.values())
@pytest.mark.parametrize("failed", [(), (3, 4, 11)])
@pytest.mark.parametrize("name", ["cmaes", "qmc"])
def test_a_fresh_sampler_per_trial_proposes_what_one_sampler_would(name, failed, direction):
    if direction is StudyDirection.NOT_SET:
        return
    make = getattr(optuna_samplers, name)
    one = persistent(name)
    expected = proposals(lambda _: one, SPACE, 24, direction, failed)
    found = proposals(lambda n: make(settings(SPACE, seed=n)), SPACE, 24, direction, failed)
    assert found == expected
    assert len({tuple(params.values()) for params in found}) > 12


@pytest.mark.parametrize("name", ["cmaes", "qmc"])
def test_searched_settings_are_replayed_too(name):
    make = getattr(optuna_samplers, name)
    one = persistent(name)
    expected = proposals(lambda _: one, RATED, 12)
    assert proposals(lambda n: make(settings(RATED, seed=n)), RATED, 12) == expected
    assert len({params["learning_rate"] for params in expected}) == 2


@pytest.mark.parametrize("name", ["cmaes", "qmc"])
def test_another_search_seed_proposes_otherwise(name):
    make = getattr(optuna_samplers, name)
    one, other = (
        proposals(lambda n, s=s: make(replace(settings(SPACE, n), search_seed=s)), SPACE, 5)
        for s in (1, 2)
    )
    assert one != other


def test_cmaes_gets_better():
    space = RankSpace(
        candidates=(2, 4, 6, 8, 10, 12), searchable=(True,) * 6, default_rank=8, costs=(1,) * 6
    )
    found = proposals(lambda n: optuna_samplers.cmaes(settings(space, n)), space, 60)
    values = [value_of(space, params) for params in found]
    assert np.mean(values[40:]) > np.mean(values[:20]) + 0.1


@pytest.mark.parametrize("name", ["cmaes", "qmc"])
@pytest.mark.parametrize("candidates", [(1, 2, 8), (0, 2, 4, 8)])
def test_uneven_candidates_are_refused_in_one_line(name, candidates):
    space = replace(UNEVEN_SPACE, candidates=candidates)
    with pytest.raises(ConfigError) as error:
        getattr(optuna_samplers, name)(settings(space))
    text = str(error.value)
    assert text.startswith(f"Method {name} takes evenly spaced rank candidates, not ")
    assert str(list(candidates)) in text
    assert "Change [rank_space] candidates or [search] method." in text
    assert "\n" not in text


@pytest.mark.parametrize("name", ["cmaes", "qmc", "tpe", "gp", "random"])
def test_nothing_of_a_samplers_state_is_stored(name, tmp_path):
    config = SearchConfig(method=name, max_trials=12 if name == "cmaes" else 4, initial_trials=2)
    url = f"sqlite:///{tmp_path}/study.db"
    with TrialStore.open(url, "search") as store:
        search(
            SPACE,
            lambda allocation, fidelity, seed: planted_outcome(allocation.ranks),
            store,
            lambda seed: getattr(optuna_samplers, name)(settings(SPACE, seed)),
            config,
            lambda score: score.tasks["exact"].values["clp"],
            0,
        )
        study = store._study
        own = study._storage.get_study_system_attrs(study._study_id)
        kept = [own, *(trial.system_attrs for trial in study.trials)]
        assert len(study.trials) == config.max_trials
    assert not any("cma" in key or "qmc" in key for attributes in kept for key in attributes)
    assert "80049" not in json.dumps(kept)  # how a pickle begins in hexadecimal


def noting(kind, notes, **settings_):
    """A sampler that notes what it was told."""

    class Told(kind):
        def after_trial(self, study, trial, state, values):
            if values is not None:
                notes[tuple(trial.params.values())] = values[0]
            super().after_trial(study, trial, state, values)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return Told(seed=SEED, **settings_)


def told_after(store, trials, *, batch=1, kind=optuna.samplers.RandomSampler, **settings_):
    """Searches with a replayed sampler; returns what the replay of the last proposal told."""
    replays = []

    def make():
        replays.append({})
        return noting(kind, replays[-1], **settings_)

    search(
        SPACE,
        lambda allocation, fidelity, seed: planted_outcome(allocation.ranks),
        store,
        lambda seed: ReplayedSampler(SPACE, make, seed=seed),
        SearchConfig(method="random", max_trials=trials, batch=batch),
        lambda score: score.tasks["exact"].values["clp"],
        0,
    )
    return replays[-1]


def pairs_of(store):
    return {tuple(t.params.values()): t.value for t in store._study.trials if t.params}


def test_values_are_told_of_what_was_proposed():
    store = TrialStore(InMemoryStorage(), "s")
    told = told_after(store, 6)
    pairs = pairs_of(store)
    assert told
    assert all(pairs[params] == value for params, value in told.items())


def test_values_of_trials_that_somebody_else_chose_are_not_told_of_other_ranks():
    # As the noise floor does with uniform LoRA and random allocations before the search.
    store = TrialStore(InMemoryStorage(), "s")
    for position, row in enumerate(SPACE.sample(2, np.random.default_rng(0))):
        allocation = SPACE.allocation(row)
        outcome = planted_outcome(allocation.ranks)
        store.add(
            Trial(
                position=position,
                phase=Phase.INITIALIZATION,
                allocation=allocation,
                seed=0,
                fidelity=1.0,
                state=TrialState.COMPLETE,
                score=outcome.score,
                objective=outcome.score.tasks["exact"].values["clp"],
            ),
            SPACE,
        )
    told = told_after(store, 6)
    pairs = pairs_of(store)
    assert all(pairs.get(params) == value for params, value in told.items())


def test_records_of_other_trials_are_no_parameters():
    study = quiet_study("s", MAXIMIZE, sampler=optuna_samplers.qmc(settings(SPACE)))
    study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={RECORD: {"ranks": [8] * 6}}))
    trial = study.ask(distributions(SPACE))
    SPACE.check(allocation_from(SPACE, trial.params))


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_cmaes_is_told_the_values_of_its_own_proposals_in_a_batch(batch):
    """What was asked side by side must not be replayed as if it had been asked in turn."""
    store = TrialStore(InMemoryStorage(), "s")
    told = told_after(
        store,
        25,
        batch=batch,
        kind=optuna.samplers.CmaEsSampler,
        n_startup_trials=1,
        with_margin=True,
        warn_independent_sampling=False,
    )
    pairs = pairs_of(store)
    assert len(told) > 10
    assert [params for params, value in told.items() if pairs.get(params) != value] == []
