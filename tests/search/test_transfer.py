"""Knowledge of earlier studies carried over: planted effects are found, and nothing is made up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankadaptor_plugin.core.ranks import RankSpace, Setting
from rankadaptor_plugin.search.space import LayerFeatures
from rankadaptor_plugin.search.transfer.studies import MetaKnowledge, SourceStudy
from rankadaptor_plugin.search.transfer.transfer import prior_effects, task_mean

RANKS = (2, 4, 6, 8, 10, 12)
GROUPS = ("attention", "mlp")


def space(layers, candidates=RANKS, **changes):
    slots = layers * len(changes.get("groups", [""]))
    return RankSpace(
        **{
            "candidates": candidates,
            "searchable": (True,) * slots,
            "default_rank": candidates[-1],
            "costs": (10,) * slots,
            **changes,
        }
    )


def features(layers, **columns):
    depth = np.arange(layers) / max(layers - 1, 1)
    table = {"relative_depth": depth, **columns}
    return LayerFeatures(tuple(table), np.column_stack(list(table.values())))


def code(rows):
    """The log rank, about 0 with standard deviation 1 over RANKS."""
    logs = np.log1p(RANKS)
    return (np.log1p(rows) - logs.mean()) / logs.std()


def study(where, weights, rng, *, trials=50, noise=1.0, known=None, name="s"):
    rows = where.sample(trials, rng)
    truth = code(rows[:, : where.slots]) @ weights / np.sqrt(where.slots)
    scores = 0.6 + 0.01 * (truth + noise * rng.normal(size=trials))
    return SourceStudy(
        name=name,
        space=where,
        features=known or features(where.layers),
        rows=rows,
        values=scores[:, None],
        columns=("objective",),
    )


def agreement(prior, where, weights, rng):
    """Correlation with the truth over random allocations, and the size of the prior there."""
    rows = where.sample(2000, rng)
    expected = prior(where, rows)
    return np.corrcoef(expected, code(rows[:, : where.slots]) @ weights)[0, 1], expected.std()


def related(count, layers, correlation, rng):
    """Weights of so many tasks, one more for the target."""
    common = rng.normal(size=layers)
    own = rng.normal(size=(count + 1, layers))
    return np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own


def transferred(correlation, seed, *, noise=1.0, layers=16):
    rng = np.random.default_rng(seed)
    *sources, target = related(6, layers, correlation, rng)
    where = space(layers)
    knowledge = MetaKnowledge(tuple(study(where, w, rng, noise=noise) for w in sources))
    prior = prior_effects(knowledge, where, features(layers))
    return agreement(prior, where, target, rng)


def test_the_same_effects_in_all_studies_are_found():
    found, size = np.mean([transferred(1.0, seed, noise=0.3) for seed in range(3)], axis=0)
    assert found > 0.95
    assert size > 0.7


def test_related_studies_say_something_of_the_target():
    found, size = np.mean([transferred(0.6, seed) for seed in range(5)], axis=0)
    assert found > 0.4  # 0.73 if the sources were known exactly
    assert 0.15 < size < 0.8


def test_unrelated_studies_hardly_say_anything():
    sizes = [transferred(0.0, seed, noise=0.3)[1] for seed in range(5)]
    assert np.mean(sizes) < 0.2


def test_scores_of_noise_alone_have_no_effects():
    rng = np.random.default_rng(0)
    where = space(8)
    sources = tuple(study(where, np.zeros(8), rng) for _ in range(4))
    prior = prior_effects(MetaKnowledge(sources), where, features(8))
    assert agreement(prior, where, np.ones(8), rng)[1] < 0.2


@pytest.mark.parametrize("candidates", [RANKS, (4, 8, 16)])
def test_a_trend_over_depth_is_carried_to_a_deeper_model(candidates):
    rng = np.random.default_rng(0)
    shallow, deep = space(8), space(12, candidates)

    def trend(layers):
        return 1.5 * np.cos(3 * np.arange(layers) / (layers - 1))

    sources = tuple(
        study(shallow, trend(8) + 0.3 * rng.normal(size=8), rng, noise=0.5) for _ in range(4)
    )
    prior = prior_effects(MetaKnowledge(sources), deep, features(12))
    assert agreement(prior, deep, trend(12), rng)[0] > 0.9


def test_a_feature_that_explains_the_effects_is_used_across_models():
    rng = np.random.default_rng(0)

    def known(layers, sign):
        lost = rng.random(layers)
        # A feature without any effect, which one of the models does not even have.
        norm = np.full(layers, np.nan) if layers == 10 else rng.normal(size=layers)
        return 4 * sign * (lost - 0.5), features(layers, importance_lost=lost, norm=norm)

    found = []
    for layers in (10, 12, 14, 16):
        weights, own = known(layers, 1)
        found.append(study(space(layers), weights, rng, noise=0.5, known=own))
    weights, own = known(20, 1)
    prior = prior_effects(MetaKnowledge(tuple(found)), space(20), own)
    assert agreement(prior, space(20), weights, rng)[0] > 0.85
    blind = prior_effects(MetaKnowledge(tuple(found)), space(20), features(20))
    assert blind(space(20), space(20).sample(500, rng)).std() < 0.3


def test_whole_layers_say_something_of_module_groups():
    rng = np.random.default_rng(0)
    whole, parts = space(6), space(6, groups=GROUPS)
    weights = np.linspace(-2, 2, 6)
    sources = tuple(study(whole, weights, rng, noise=0.3) for _ in range(3))
    doubled = LayerFeatures(("relative_depth",), np.repeat(features(6).values, 2, axis=0))
    prior = prior_effects(MetaKnowledge(sources), parts, doubled)
    found, size = agreement(prior, parts, np.repeat(weights, 2), rng)
    assert found > 0.9
    assert size < 0.8  # less certain than of layers
    own = prior_effects(MetaKnowledge(sources), whole, features(6))
    assert agreement(own, whole, weights, rng)[1] > size


def test_a_searched_setting_is_carried_over_by_its_value():
    rng = np.random.default_rng(0)
    low = Setting("learning_rate", (1e-4, 3e-4, 1e-3), 3e-4)
    high = Setting("learning_rate", (3e-4, 1e-3), 3e-4)
    other = Setting("alpha_over_rank", (1.0, 2.0), 2.0)
    where, target = space(4, settings=(low,)), space(4, settings=(high, other))
    sources = []
    for _ in range(4):
        one = study(where, np.zeros(4), rng, noise=0.5)
        values = one.values + 0.02 * one.rows[:, -1:]
        sources.append(SourceStudy(**{**vars(one), "values": values, "columns": ("objective",)}))
    prior = prior_effects(MetaKnowledge(tuple(sources)), target, features(4))
    rate, alpha = prior.effects[-2:]
    assert rate[1] - rate[0] > 0.4
    np.testing.assert_allclose(alpha, 0, atol=1e-9)


def test_tasks_count_the_same_whatever_their_units():
    rng = np.random.default_rng(0)
    one = study(space(4), np.ones(4), rng)
    values = np.column_stack([rng.normal(size=50), one.values, 100 * one.values, one.values**0])
    values[:, 3] = rng.normal(size=50)
    columns = ("objective", "a/choice_logprob", "b/choice_logprob", "a/accuracy")
    several = SourceStudy(**{**vars(one), "values": values, "columns": columns})
    np.testing.assert_allclose(task_mean(several, "choice_logprob"), task_mean(one), atol=1e-9)
    np.testing.assert_allclose(task_mean(several, "margin")[0] > 0, values[0, 0] > 0)
    assert abs(np.corrcoef(task_mean(several), task_mean(one))[0, 1]) > 0.8


def test_one_fine_tune_that_went_astray_does_not_decide():
    rng = np.random.default_rng(0)
    where, weights = space(6), np.linspace(-1, 1, 6)
    one = study(where, weights, rng, noise=0.3)
    one.values[7] = -50.0
    prior = prior_effects(MetaKnowledge((one,)), where, features(6))
    assert agreement(prior, where, weights, rng)[0] > 0.8


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    sources = []
    for _ in range(draw(st.integers(1, 3))):
        layers = draw(st.integers(1, 5))
        candidates = tuple(sorted(draw(st.sets(st.integers(0, 64), min_size=1).filter(any))))
        where = space(layers, candidates, default_rank=8)
        lost = np.where(rng.random(layers) < 0.5, np.nan, rng.random(layers))
        known = draw(st.sampled_from([features(layers), features(layers, lost=lost)]))
        trials = draw(st.integers(2, 6))
        sources.append(study(where, rng.normal(size=layers), rng, trials=trials, known=known))
    layers = draw(st.integers(1, 5))
    candidates = draw(st.sampled_from([(0, 1), (8,), (2, 4, 8, 16)]))
    flags = draw(st.lists(st.booleans(), min_size=layers, max_size=layers).filter(any))
    target = space(layers, candidates, default_rank=8, searchable=tuple(flags))
    return MetaKnowledge(tuple(sources)), target


@given(cases())
@settings(max_examples=30)
def test_effects_are_finite_and_about_zero_in_every_column(case):
    knowledge, target = case
    prior = prior_effects(knowledge, target, features(target.layers), name="file")
    again = prior_effects(knowledge, target, features(target.layers), name="file")
    assert prior.name == "file"
    assert [len(e) for e in prior.effects] == [len(level) for level in target.levels()]
    for effect, same in zip(prior.effects, again.effects, strict=True):
        assert np.isfinite(effect).all()
        assert effect.mean() == pytest.approx(0, abs=1e-9)
        np.testing.assert_array_equal(effect, same)
