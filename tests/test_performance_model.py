"""The paper's performance model learns, transfers between tasks and ignores units."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from rankadaptor_plugin.config import PerformanceModelConfig
from rankadaptor_plugin.performance_model import mlp
from rankadaptor_plugin.ranks import RankSpace
from rankadaptor_plugin.testing import SPACE, PerformanceModelConformance, additive_value

WIDE = RankSpace(
    candidates=(2, 4, 6, 8, 10, 12),
    searchable=(False,) * 2 + (True,) * 10,
    default_rank=8,
    costs=(1,) * 12,
)


def spearman(one, two) -> float:
    return float(scipy.stats.spearmanr(one, two).statistic)


class TestMLP(PerformanceModelConformance):
    least_correlation = 0.9

    def performance_model(self, space, seed):
        return mlp(space, PerformanceModelConfig(), seed)


def test_initial_weights_come_from_the_seed():
    ranks = SPACE.sample(5, np.random.default_rng(0))
    config = PerformanceModelConfig()
    one, same, other = (mlp(SPACE, config, seed).predict(ranks).mean for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_has_the_widths_of_the_paper():
    model = mlp(WIDE, PerformanceModelConfig(), 0)
    shapes = [tuple(p.shape) for p in model._network.parameters() if p.ndim > 1]
    assert shapes == [(32, 12), (32, 32), (32, 32), (1, 32)]


@pytest.mark.parametrize(("offset", "scale"), [(100.0, 1.0), (-3.0, 1e-4), (0.0, 1e5)])
def test_offset_and_scale_of_the_target_do_not_change_the_ranking(offset, scale):
    rng = np.random.default_rng(0)
    ranks, unseen = WIDE.sample(20, rng), WIDE.sample(200, rng)
    values = additive_value(ranks)
    tasks = np.stack([values, np.cos(values), rng.normal(size=20)], axis=1)
    means = []
    for a, b in ((0.0, 1.0), (offset, scale)):
        model = mlp(WIDE, PerformanceModelConfig(), 0)
        model.pretrain(ranks, a + b * tasks)
        model.fit(ranks, a + b * values)
        means.append((model.predict(unseen).mean - a) / b)
    np.testing.assert_allclose(means[0], means[1], atol=0.02)  # float32 training, rounding grows
    assert spearman(*means) > 0.999


def test_pretraining_on_related_tasks_helps_with_few_target_values():
    gains = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        shared = rng.normal(size=WIDE.layers)
        ranks, unseen = WIDE.sample(40, rng), WIDE.sample(500, rng)
        weights = shared + 0.3 * rng.normal(size=(8, WIDE.layers))  # the last task is the target
        tasks = np.log(ranks) @ weights.T
        correlation = {}
        for pretrained in (True, False):
            model = mlp(WIDE, PerformanceModelConfig(), seed)
            if pretrained:
                model.pretrain(ranks, tasks[:, :-1] * 100 - 7)
            model.fit(ranks[:6], tasks[:6, -1])
            truth = np.log(unseen) @ weights[-1]
            correlation[pretrained] = spearman(model.predict(unseen).mean, truth)
        gains.append(correlation[True] - correlation[False])
    assert np.mean(gains) > 0.1
    assert min(gains) > 0


def test_no_tasks_or_no_epochs_mean_no_pretraining():
    ranks = WIDE.sample(6, np.random.default_rng(0))
    untouched = mlp(WIDE, PerformanceModelConfig(), 0).predict(ranks).mean
    none = mlp(WIDE, PerformanceModelConfig(), 0)
    none.pretrain(ranks, np.empty((6, 0)))
    off = mlp(WIDE, PerformanceModelConfig(meta_epochs=0), 0)
    off.pretrain(ranks, additive_value(ranks)[:, None])
    for model in (none, off):
        np.testing.assert_array_equal(model.predict(ranks).mean, untouched)


def test_fixed_layers_and_single_candidates_are_harmless():
    space = RankSpace(candidates=(4,), searchable=(True, False), default_rank=1000, costs=(1, 1))
    ranks = space.sample(3, np.random.default_rng(0))
    model = mlp(space, PerformanceModelConfig(), 0)
    model.fit(ranks, np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(model.predict(ranks).mean, 2.0, atol=0.05)


def test_batches_do_not_change_predictions():
    ranks = WIDE.sample(9000, np.random.default_rng(0))
    model = mlp(WIDE, PerformanceModelConfig(), 0)
    model.fit(ranks[:30], additive_value(ranks[:30]))
    np.testing.assert_allclose(
        model.predict(ranks).mean[8900:], model.predict(ranks[8900:]).mean, rtol=1e-5
    )
