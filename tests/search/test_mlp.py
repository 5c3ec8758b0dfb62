"""The paper's performance model learns, transfers between tasks, and takes its open choices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from rankadaptor_plugin.config.tables import PerformanceModelConfig
from rankadaptor_plugin.core.ranks import RankSpace, Setting
from rankadaptor_plugin.search.performance.mlp import mlp, mlp_1, mlp_2, mlp_3
from rankadaptor_plugin.search.performance.performance_model import (
    MetaLearner,
    PerformanceModel,
    ProposingModel,
)
from rankadaptor_plugin.testing.search import SPACE, PerformanceModelConformance, additive_value

CONFIG = PerformanceModelConfig()

WIDE = RankSpace(
    candidates=(2, 4, 6, 8, 10, 12),
    searchable=(False,) * 2 + (True,) * 10,
    default_rank=8,
    costs=(1,) * 12,
)


def spearman(one, two) -> float:
    return float(scipy.stats.spearmanr(one, two).statistic)


def widths(model) -> list[int]:
    return [len(bias) for name, bias in model._state().items() if name.endswith("bias")]


class TestJoint(PerformanceModelConformance):
    least_correlation = 0.9

    def performance_model(self, space, seed):
        return mlp(space, CONFIG, seed)


class TestRaw(PerformanceModelConformance):
    any_units = False

    def performance_model(self, space, seed):
        return mlp(space, PerformanceModelConfig(meta="raw"), seed)


class TestReptile(PerformanceModelConformance):
    least_correlation = 0.9

    def performance_model(self, space, seed):
        return mlp(space, PerformanceModelConfig(meta="reptile"), seed)


class TestNewestOnly(PerformanceModelConformance):
    def performance_model(self, space, seed):
        return mlp(space, PerformanceModelConfig(replay=False), seed)


class TestSetting2(PerformanceModelConformance):
    least_correlation = 0.9

    def performance_model(self, space, seed):
        return mlp_2(space, PerformanceModelConfig(meta="none"), seed)


class TestSetting3(PerformanceModelConformance):
    least_correlation = 0.9

    def performance_model(self, space, seed):
        return mlp_3(space, CONFIG, seed)


def test_learns_from_tasks_but_makes_no_proposals():
    model = mlp(SPACE, CONFIG, 0)
    assert isinstance(model, PerformanceModel)
    assert isinstance(model, MetaLearner)
    assert not isinstance(model, ProposingModel)


def test_initial_weights_come_from_the_seed():
    ranks = SPACE.sample(5, np.random.default_rng(0))
    one, same, other = (mlp(SPACE, CONFIG, seed).predict(ranks).mean for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("factory", "hidden"),
    [(mlp_1, [32, 32, 32]), (mlp_2, [32, 64, 32]), (mlp_3, [32, 16, 32])],
)
def test_settings_of_the_ablation_have_the_widths_of_the_paper(factory, hidden):
    assert widths(factory(WIDE, PerformanceModelConfig(hidden=(4,)), 0)) == [*hidden, 1]


def test_default_widths_are_those_of_the_paper_and_the_run_file_may_change_them():
    assert widths(mlp(WIDE, CONFIG, 0)) == [32, 32, 32, 1]
    assert widths(mlp(WIDE, PerformanceModelConfig(hidden=(7, 5)), 0)) == [7, 5, 1]


@pytest.mark.parametrize("meta", ["joint", "reptile"])
@pytest.mark.parametrize(("offset", "scale"), [(100.0, 1.0), (-3.0, 1e-4), (0.0, 1e5)])
def test_offset_and_scale_of_the_target_do_not_change_the_ranking(meta, offset, scale):
    rng = np.random.default_rng(0)
    ranks, unseen = WIDE.sample(20, rng), WIDE.sample(200, rng)
    values = additive_value(ranks)
    tasks = np.stack([values, np.cos(values), rng.normal(size=20)], axis=1)
    means = []
    for a, b in ((0.0, 1.0), (offset, scale)):
        model = mlp(WIDE, PerformanceModelConfig(meta=meta), 0)
        model.pretrain(ranks, a + b * tasks)
        model.fit(ranks, a + b * values)
        means.append((model.predict(unseen).mean - a) / b)
    np.testing.assert_allclose(means[0], means[1], atol=0.05)  # float32 training, rounding grows
    assert spearman(*means) > 0.999


def test_raw_scores_are_learned_as_they_are():
    ranks = WIDE.sample(20, np.random.default_rng(0))
    values = additive_value(ranks)
    model = mlp(WIDE, PerformanceModelConfig(meta="raw", meta_epochs=400), 0)
    model.pretrain(ranks, np.stack([values + 1, values + 3], axis=1))
    # Before any fit, it predicts the mean over tasks and not standard deviations.
    assert abs(model.predict(ranks).mean.mean() - (values.mean() + 2)) < 0.2


def test_reptile_and_joint_learning_differ():
    ranks = WIDE.sample(20, np.random.default_rng(0))
    tasks = np.stack([additive_value(ranks), np.cos(ranks[:, 3])], axis=1)
    means = []
    for meta in ("joint", "reptile"):
        model = mlp(WIDE, PerformanceModelConfig(meta=meta), 0)
        model.pretrain(ranks, tasks)
        means.append(model.predict(ranks).mean)
    assert not np.array_equal(*means)


@pytest.mark.parametrize("meta", ["joint", "reptile"])
def test_pretraining_on_related_tasks_helps_with_few_target_values(meta):
    gains = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        shared = rng.normal(size=WIDE.layers)
        ranks, unseen = WIDE.sample(40, rng), WIDE.sample(500, rng)
        weights = shared + 0.3 * rng.normal(size=(8, WIDE.layers))  # the last task is the target
        tasks = np.log(ranks) @ weights.T
        correlation = {}
        for pretrained in (True, False):
            model = mlp(WIDE, PerformanceModelConfig(meta=meta), seed)
            if pretrained:
                model.pretrain(ranks, tasks[:, :-1] * 100 - 7)
            model.fit(ranks[:6], tasks[:6, -1])
            truth = np.log(unseen) @ weights[-1]
            correlation[pretrained] = spearman(model.predict(unseen).mean, truth)
        gains.append(correlation[True] - correlation[False])
    assert np.mean(gains) > 0.1
    assert min(gains) > 0


@pytest.mark.parametrize("setting", [{"meta_epochs": 0}, {"meta": "none"}])
@pytest.mark.parametrize("meta", ["joint", "reptile"])
def test_no_epochs_or_no_meta_learning_mean_no_pretraining(setting, meta):
    ranks = WIDE.sample(6, np.random.default_rng(0))
    untouched = mlp(WIDE, CONFIG, 0).predict(ranks).mean
    model = mlp(WIDE, PerformanceModelConfig(**{"meta": meta, **setting}), 0)
    model.pretrain(ranks, additive_value(ranks)[:, None])
    np.testing.assert_array_equal(model.predict(ranks).mean, untouched)


def test_without_replay_the_order_of_the_points_matters():
    ranks = WIDE.sample(8, np.random.default_rng(0))
    values = additive_value(ranks)
    means = {}
    for replay, step in itertools.product((True, False), (1, -1)):
        model = mlp(WIDE, PerformanceModelConfig(replay=replay), 0)
        model.fit(ranks[::step], values[::step])
        means[replay, step] = model.predict(ranks).mean
    np.testing.assert_allclose(means[True, 1], means[True, -1], atol=0.02)
    assert np.abs(means[False, 1] - means[False, -1]).max() > 0.02


def test_without_replay_the_newest_point_is_matched():
    ranks = WIDE.sample(8, np.random.default_rng(0))
    values = additive_value(ranks)
    model = mlp(WIDE, PerformanceModelConfig(replay=False), 0)
    model.fit(ranks, values)
    error = np.abs(model.predict(ranks).mean - values)
    assert error[-1] < 0.02 * values.std()
    assert error.max() > 0.05 * values.std()


def test_is_certain_but_for_the_noise_of_its_residuals():
    ranks = WIDE.sample(200, np.random.default_rng(0))
    values = np.random.default_rng(1).normal(scale=3.0, size=200)
    model = mlp(WIDE, PerformanceModelConfig(epochs=1), 0)
    model.fit(ranks, values)
    prediction = model.predict(ranks)
    np.testing.assert_array_equal(prediction.stddev, 0)
    assert prediction.noise == pytest.approx(np.std(values - prediction.mean))
    assert 2 < prediction.noise < 4


def test_fixed_layers_and_single_candidates_are_harmless():
    space = RankSpace(candidates=(4,), searchable=(True, False), default_rank=1000, costs=(1, 1))
    ranks = space.sample(3, np.random.default_rng(0))
    model = mlp(space, CONFIG, 0)
    model.fit(ranks, np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(model.predict(ranks).mean, 2.0, atol=0.05)


def test_learns_searched_settings():
    space = RankSpace(
        candidates=(2, 4),
        searchable=(True,) * 3,
        default_rank=4,
        costs=(1,) * 3,
        settings=(Setting("learning_rate", (1e-5, 1e-4, 1e-3), 1e-4),),
    )
    rows = space.every()
    values = np.where(rows[:, -1] == 1, 1.0, 0.0) + 0.01 * rows[:, 0]
    model = mlp(space, CONFIG, 0)
    model.fit(rows, values)
    assert rows[model.predict(rows).mean.argmax(), -1] == 1


def test_batches_do_not_change_predictions():
    ranks = WIDE.sample(9000, np.random.default_rng(0))
    model = mlp(WIDE, CONFIG, 0)
    model.fit(ranks[:30], additive_value(ranks[:30]))
    np.testing.assert_allclose(
        model.predict(ranks).mean[8900:], model.predict(ranks[8900:]).mean, rtol=1e-5
    )
