"""The Bayesian regression: what it recovers, what it does with little, and where it proposes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankadaptor_plugin.config.tables import PerformanceModelConfig
from rankadaptor_plugin.core.ranks import RankSpace, Setting
from rankadaptor_plugin.search.performance.landscape import Codes
from rankadaptor_plugin.search.performance.linear import (
    WEIGHTS,
    BayesianRegression,
    Prior,
    Rows,
    bayes,
    structures,
)
from rankadaptor_plugin.search.performance.performance_model import PriorEffects, ProposingModel

RATES = Setting(name="learning_rate", values=(1e-4, 3e-4, 1e-3), default=1e-4)


def make_space(layers: int = 10, candidates: tuple[int, ...] = (2, 4, 8, 12), **more) -> RankSpace:
    slots = layers * len(more.get("groups", ("",)))
    given = {"searchable": (True,) * slots, "costs": tuple(10 + i % 3 for i in range(slots))}
    return RankSpace(candidates=candidates, default_rank=4, **{**given, **more})


SPACES = {
    "plain": make_space(),
    "budget": make_space(budget=4 * sum(10 + i % 3 for i in range(10))),
    "limits": make_space(max_parameters=600, max_rank_sum=55),
    "rank 0": make_space(candidates=(0, 2, 8), max_parameters=300),
    "groups": make_space(4, groups=("attention", "mlp")),
    "settings": make_space(settings=(RATES,)),
    "fixed": make_space(searchable=(False, *(True,) * 8, False)),
    "one slot": make_space(2, searchable=(True, False)),
    "one candidate": make_space(3, candidates=(4,)),
    "one layer": make_space(1),
    "wide": make_space(32, candidates=(2, 4, 6, 8, 10, 12)),
}


def codes_of(space: RankSpace, rows: np.ndarray) -> np.ndarray:
    codes = Codes(space)
    return np.take_along_axis(codes.monotone, codes.index(rows).T, axis=1).T


def planted(space: RankSpace, rows: np.ndarray, seed: int = 0) -> np.ndarray:
    """An additive function with a standard deviation of 1 over random rows."""
    weights = np.random.default_rng(seed).normal(size=space.columns)
    return codes_of(space, rows) @ (weights / np.linalg.norm(weights))


def effects_of(space: RankSpace, function, name: str) -> PriorEffects:
    """The effects of an additive function, level by level."""
    base = np.array([[levels[0] for levels in space.levels()]])
    effects = []
    for column, levels in enumerate(space.levels()):
        rows = np.repeat(base, len(levels), axis=0)
        rows[:, column] = levels
        values = function(rows)
        effects.append(values - values.mean())
    return PriorEffects(name, tuple(effects))


def fitted(space, values, count=40, *, noise=0.0, priors=(), seed=0) -> BayesianRegression:
    rng = np.random.default_rng(seed)
    rows = space.sample(count, rng)
    model = BayesianRegression(space, priors)
    model.fit(rows, 0.6 + 0.01 * (values(rows) + noise * rng.normal(size=count)))
    return model


def share_of_pairs(model: BayesianRegression) -> float:
    posterior = model._posterior
    cells = posterior.weights.sum(axis=1).reshape(len(posterior._structures), -1).sum(axis=1)
    return float(cells @ posterior._structures[:, -1])


def test_the_factory_builds_a_proposing_model():
    model = bayes(SPACES["plain"], PerformanceModelConfig(), 0)
    assert isinstance(model, ProposingModel)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("count", [0, 1, 2, 12])
def test_works_on_every_space_with_any_number_of_data(space, count):
    rng = np.random.default_rng(0)
    model = BayesianRegression(space)
    rows = space.sample(count, rng)
    if count:
        model.fit(rows, planted(space, rows))
    prediction = model.predict(space.sample(5, rng))
    for part in (prediction.mean, prediction.stddev, [prediction.noise]):
        assert np.isfinite(part).all()
    assert (prediction.stddev >= 0).all()
    for row in (model.propose(rng), model.best(rng)):
        assert space.contains(space.allocation(row))
        assert all(type(value) is int for value in row)
    most = space.parameters(space.lowest()) + 30
    for row in (model.propose(rng, most_parameters=most), model.best(rng, most_parameters=most)):
        assert space.parameters(space.check(space.allocation(row))) <= most


@settings(max_examples=15)
@given(seed=st.integers(0, 999), name=st.sampled_from(["budget", "limits", "rank 0", "groups"]))
def test_proposals_are_new_and_a_function_of_the_generator(seed, name):
    space, model = SPACES[name], fitted(SPACES[name], lambda rows: rows.sum(axis=1), 6, seed=seed)
    tried: set[tuple[int, ...]] = set()
    for _ in range(4):
        one, two = (model.propose(np.random.default_rng(seed), tried=tried) for _ in range(2))
        assert one == two
        assert tuple(one) not in tried
        space.check(space.allocation(one))
        tried.add(tuple(one))


def test_recovers_a_planted_additive_function():
    space = make_space(20)
    model = fitted(space, lambda rows: planted(space, rows), 80, noise=0.3)
    unseen = space.sample(300, np.random.default_rng(1))
    prediction, truth = model.predict(unseen), 0.6 + 0.01 * planted(space, unseen)
    assert np.corrcoef(prediction.mean, truth)[0, 1] > 0.95
    standardized = (prediction.mean - truth) / prediction.stddev
    assert 0.7 < standardized.std() < 1.4
    assert 0.0015 < prediction.noise < 0.006
    best = np.array([model.best(np.random.default_rng(0))])
    weights = np.random.default_rng(0).normal(size=20)
    top = np.abs(weights / np.linalg.norm(weights)).sum() * Codes(space).monotone.max()
    assert planted(space, best)[0] > 0.8 * top


def test_recovers_a_planted_interaction_by_evidence():
    space = make_space(8)

    def pairs(rows):
        code = codes_of(space, rows)
        return code[:, 0] * code[:, 5] - code[:, 2] * code[:, 3]

    unseen = space.sample(300, np.random.default_rng(1))
    model = fitted(space, pairs, 60, noise=0.1)
    assert np.corrcoef(model.predict(unseen).mean, pairs(unseen))[0, 1] > 0.9
    additive = fitted(space, lambda rows: planted(space, rows), 60, noise=0.1)
    before = float(structures(space)[:, -1].mean())
    assert share_of_pairs(model) > before > 3 * share_of_pairs(additive)
    assert pairs(np.array([model.best(np.random.default_rng(0))]))[0] > 0.8 * pairs(unseen).max()


def test_prior_weights_follow_what_a_prior_proves_to_be_worth():
    space = make_space(20)
    useful = effects_of(space, lambda rows: planted(space, rows), "useful")
    useless = effects_of(space, lambda rows: planted(space, rows, 7), "useless")
    model = fitted(
        space, lambda rows: planted(space, rows), 40, noise=0.2, priors=(useless, useful)
    )
    assert model.prior_weights["useless"] < 0.1
    assert model.prior_weights["useful"] > 0.8
    assert model.evidence > model.evidence_without_priors
    alone = fitted(space, lambda rows: planted(space, rows), 40, noise=0.2, priors=(useless,))
    assert alone.evidence < alone.evidence_without_priors


def test_a_perfect_prior_leads_before_the_first_measurement():
    space = make_space(20)
    prior = effects_of(space, lambda rows: planted(space, rows), "useful")
    model = BayesianRegression(space, [prior])
    random = planted(space, space.sample(300, np.random.default_rng(1)))
    proposed = [model.propose(np.random.default_rng(seed)) for seed in range(10)]
    assert planted(space, np.array(proposed)).mean() > random.mean() + 1.0
    best = planted(space, np.array([model.best(np.random.default_rng(0))]))
    assert best[0] > random.max()
    assert model.prior_weights["useful"] == pytest.approx(np.mean(WEIGHTS))


def test_one_measurement_with_a_prior_keeps_to_the_prior():
    space = make_space(20)
    prior = effects_of(space, lambda rows: planted(space, rows), "useful")
    model = fitted(space, lambda rows: planted(space, rows), 1, priors=[prior])
    unseen = space.sample(100, np.random.default_rng(1))
    assert np.corrcoef(model.predict(unseen).mean, planted(space, unseen))[0, 1] > 0.9


def test_without_priors_the_evidences_agree():
    model = fitted(SPACES["plain"], lambda rows: rows.sum(axis=1), 5)
    assert model.prior_weights == {}
    assert model.evidence == model.evidence_without_priors


def test_constant_values_are_predicted():
    space = SPACES["plain"]
    model = fitted(space, lambda rows: np.zeros(len(rows)), 12)
    prediction = model.predict(space.sample(20, np.random.default_rng(1)))
    np.testing.assert_allclose(prediction.mean, 0.6)
    assert np.isfinite(prediction.stddev).all()
    assert space.contains(space.allocation(model.propose(np.random.default_rng(0))))


def test_a_setting_that_matters_is_found():
    space = SPACES["settings"]
    model = fitted(space, lambda rows: -((rows[:, -1] - 1.0) ** 2), 30, noise=0.3)
    assert model.best(np.random.default_rng(0))[-1] == 1


def test_groups_differ_and_share():
    space = make_space(12, groups=("attention", "mlp"))

    def values(rows):
        code = codes_of(space, rows)
        return (code[:, ::2].sum(axis=1) - code[:, 1::2].sum(axis=1)) / math.sqrt(24)

    model = fitted(space, values, 24, noise=0.2)
    best = np.array(model.best(np.random.default_rng(0)))
    assert best[::2].mean() > best[1::2].mean() + 5


def test_order_of_data_and_shift_and_scale_do_not_matter():
    space, rng = SPACES["plain"], np.random.default_rng(0)
    rows = space.sample(15, rng)
    values = planted(space, rows) + 0.1 * rng.normal(size=15)
    one, two = BayesianRegression(space), BayesianRegression(space)
    one.fit(rows, values)
    order = rng.permutation(15)
    two.fit(rows[order], 100 + 3 * values[order])
    unseen = space.sample(20, rng)
    first, second = one.predict(unseen), two.predict(unseen)
    np.testing.assert_allclose(100 + 3 * first.mean, second.mean, rtol=1e-6)
    np.testing.assert_allclose(3 * first.stddev, second.stddev, rtol=1e-6)
    assert second.noise == pytest.approx(3 * first.noise)
    assert one.evidence == pytest.approx(two.evidence)
    seeds = [np.random.default_rng(5) for _ in range(2)]
    assert one.best(seeds[0]) == two.best(seeds[1])


def test_predictions_do_not_depend_on_the_batch(monkeypatch):
    space = SPACES["plain"]
    model = fitted(space, lambda rows: planted(space, rows), 10)
    rows = space.sample(25, np.random.default_rng(1))
    whole = model.predict(rows)
    monkeypatch.setattr("rankadaptor_plugin.search.performance.linear._BATCH", 7)
    np.testing.assert_allclose(model.predict(rows).mean, whole.mean)
    assert len(model.predict(rows[:0]).mean) == 0


@pytest.mark.parametrize("name", ["plain", "groups", "settings", "fixed"])
def test_covariances_are_those_of_drawn_effects(name):
    space, rng = SPACES[name], np.random.default_rng(0)
    prior = Prior(Codes(space))
    rows = Rows(prior, prior.codes.index(space.sample(4, rng)))
    shares = structures(space)[-1]
    drawn = np.array([rows.values(prior.draw(shares, rng)) for _ in range(4000)])
    gram = np.tensordot(shares, prior.grams(rows, rows), 1)
    np.testing.assert_allclose(np.cov(drawn.T), gram, atol=0.12 * np.diag(gram).max())
    np.testing.assert_allclose(np.diag(gram), shares @ prior.variances(rows))


def test_the_landscape_of_effects_has_their_values():
    space, rng = SPACES["settings"], np.random.default_rng(0)
    prior = Prior(Codes(space))
    index = prior.codes.index(space.sample(9, rng))
    effects = prior.draw(structures(space)[-1], rng)
    one = prior.landscape(effects).values(index)
    two = Rows(prior, index).values(effects)
    np.testing.assert_allclose(one - one.mean(), two - two.mean())


def test_draws_average_to_the_mean_and_spread_as_predicted():
    space, rng = make_space(6), np.random.default_rng(0)
    model = fitted(space, lambda rows: planted(space, rows), 20, noise=0.5)
    index = model._codes.index(space.sample(2, rng))

    def difference(function):
        values = model._prior.landscape(function[0]).values(index)
        return values[0] - values[1]

    drawn = [difference(model._posterior.draw(rng, 1.0)) for _ in range(1500)]
    mean, error = difference(model._posterior.mean()), np.std(drawn) / math.sqrt(len(drawn))
    assert np.mean(drawn) == pytest.approx(mean, abs=4 * error)
    exploited = [difference(model._posterior.draw(rng, 0.0)) for _ in range(200)]
    assert np.std(exploited) < np.std(drawn)


def test_a_drawn_sample_is_what_a_proposal_maximizes():
    space = RankSpace(candidates=(2, 4, 8), searchable=(True,) * 4, default_rank=4, costs=(1,) * 4)
    rows = space.every()
    model = BayesianRegression(space)
    model.fit(rows[::7], np.log(rows[::7]) @ np.arange(4.0))
    best = model.propose(np.random.default_rng(3))
    values = model.drawn(rows, np.random.default_rng(3))
    assert rows[values.argmax()].tolist() == best
