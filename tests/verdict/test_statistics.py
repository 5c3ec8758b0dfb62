"""The one procedure: intervals by hand, pairing, several comparisons, and the rate of errors."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from rankadaptor_plugin.core.errors import OracleError
from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.verdict.statistics import (
    Seeds,
    compare,
    mean_interval,
    model_of,
    score_cells,
)


def model(values: dict[str, np.ndarray], seeds=None):
    """A model from values (S, J) per task, with documents named by their position."""
    count = len(next(iter(values.values())))
    return {
        seed: {t: ([f"d{j}" for j in range(v.shape[1])], v[i]) for t, v in values.items()}
        for i, seed in enumerate(seeds or range(count))
    }


def single(*values: float, keys: str = "", seed: int | None = 0):
    """A model with one task of one seed."""
    return {seed: {"t": (list(keys or "abcdefgh"[: len(values)]), list(values))}}


def difference(first, second, weights=None, metric="margin", **options):
    return compare(first, second, metric, weights or {"t": 1.0}, **options)


def gain(values, **options):
    """The difference of values (S, J) from zero, with the same seeds."""
    return difference(model({"t": values}), model({"t": np.zeros_like(values)}), **options)


@st.composite
def pairs(draw):
    """Two models on the same documents, with common seeds or not, and task weights."""
    sizes = {f"t{i}": draw(st.integers(2, 12)) for i in range(draw(st.integers(1, 3)))}
    ours = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True))
    theirs = draw(st.sampled_from([ours, [None], [20, 21, 22], [*ours, 30]]))
    scales = [draw(st.sampled_from([0.0, 1e-6, 1.0, 1e6])) for _ in range(3)]

    def values(seeds):
        rng = np.random.default_rng(draw(st.integers(0, 999)))
        by_seed = scales[0] * rng.normal(size=(len(seeds), 1))
        return {
            task: by_seed
            + scales[1] * rng.normal(size=(1, size))
            + scales[2] * rng.normal(size=(len(seeds), size))
            for task, size in sizes.items()
        }

    weights = {task: draw(st.floats(0.1, 5.0)) for task in sizes}
    return model(values(ours), ours), model(values(theirs), theirs), weights


def turned(model, permutation):
    """The same model with the rows of its files in another order."""
    return {
        seed: {
            task: ([keys[i] for i in order], np.asarray(values)[order])
            for task, (keys, values) in tasks.items()
            for order in [permutation(seed, len(keys))]
        }
        for seed, tasks in reversed(model.items())
    }


def mean(model, seeds, weights) -> float:
    total = sum(weights.values())
    return sum(
        w / total * float(np.mean([model[s][t][1] for s in seeds])) for t, w in weights.items()
    )


# ------------------------------------------------------------------------------------- by hand


def test_where_only_seeds_differ_it_is_students_interval():
    means = np.array([[1.0], [2.0], [4.0]])
    result = gain(np.repeat(means, 5, axis=1))
    stderr = math.sqrt(np.var(means, ddof=1) / 3)
    assert result.estimate == pytest.approx(7 / 3)
    assert result.half_width == pytest.approx(float(t.ppf(0.975, 2)) * stderr)
    assert result.p == pytest.approx(2 * float(t.sf(7 / 3 / stderr, 2)))
    assert (result.seeds.first, result.documents, result.confidence) == (3, 5, 0.95)


def test_where_only_documents_differ_it_is_students_interval():
    documents = np.array([[0.0, 1.0, 3.0, 4.0, 9.0]])
    stderr = math.sqrt(np.var(documents, ddof=1) / 5)
    for seeds in (1, 4):
        result = gain(np.repeat(documents, seeds, axis=0), confidence=0.9)
        assert result.half_width == pytest.approx(float(t.ppf(0.95, 4)) * stderr)


def test_seeds_and_documents_add_up_each_at_its_own_quantile():
    by_seed, by_document = np.array([[1.0], [2.0], [6.0]]), np.array([[0.0, 1.0, 3.0, 4.0]])
    result = gain(by_seed + by_document)
    seeds = float(t.ppf(0.975, 2)) ** 2 * np.var(by_seed, ddof=1) / 3
    documents = float(t.ppf(0.975, 3)) ** 2 * np.var(by_document, ddof=1) / 4
    assert result.half_width == pytest.approx(math.sqrt(seeds + documents))


def test_what_seeds_do_is_told_from_a_whole_race():
    """By the residual of a randomized block design, but never less than the two models show."""
    rng = np.random.default_rng(5)
    for scales in ([1.0, 1.0, 1.0, 1.0], [9.0, 1.0, 1.0, 1.0], [0.1, 0.1, 9.0, 1.0]):
        means = rng.normal(size=(4, 6)) * np.array(scales)[:, None] + rng.normal(size=6)
        race = [model({"t": np.repeat(row[:, None], 5, axis=1)}) for row in means]
        rest = means - means.mean(0) - means.mean(1, keepdims=True) + means.mean()
        every, own = 2 * np.square(rest).sum() / 15, np.var(means[0] - means[1], ddof=1)
        result = difference(race[0], race[1], race=race)
        expected = float(t.ppf(0.975, 15)) * math.sqrt(max(every, own) / 6)
        assert result.half_width == pytest.approx(expected)
        alone = difference(race[0], race[1])
        assert difference(race[0], race[1], race=race[:2]).half_width == alone.half_width
        assert difference(race[0], race[1], race=race[::-1]).estimate == alone.estimate


def test_seeds_of_their_own_have_a_term_each():
    ours, theirs = np.array([[1.0], [2.0], [6.0]]), np.array([[0.0], [0.5], [0.7], [0.1]])
    first = model({"t": np.repeat(ours, 5, axis=1)}, [1, 2, 3])
    second = model({"t": np.repeat(theirs, 5, axis=1)}, [11, 12, 13, 14])
    squares = [
        float(t.ppf(0.975, len(v) - 1)) ** 2 * np.var(v, ddof=1) / len(v) for v in (ours, theirs)
    ]
    assert difference(first, second).half_width == pytest.approx(math.sqrt(sum(squares)))


def test_seeds_that_agree_by_luck_are_no_certainty():
    """Each of three seeds gains one document of 48, each another one."""
    values = np.zeros((3, 48))
    values[0, 3] = values[1, 7] = values[2, 9] = 1.0
    result = gain(values)
    assert result.estimate > 0
    assert not result.is_gain


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_without_variance_the_interval_is_a_point(value):
    result = gain(np.full((3, 4), value))
    assert (result.low, result.high) == (pytest.approx(value), pytest.approx(value))
    assert result.is_gain is (value > 0)
    assert result.p == (1.0 if value == 0 else pytest.approx(0, abs=1e-9))


def test_one_document_decides_nothing():
    result = gain(np.full((3, 1), -1.0), metric="accuracy")
    assert (result.half_width, result.low, result.high, result.p) == (math.inf, -1.0, 1.0, 1.0)
    assert not result.is_loss
    assert result.to_json()["half_width"] is None
    values = {"a": np.ones((3, 1)), "b": np.ones((3, 3))}
    others = {task: 0 * v for task, v in values.items()}
    assert difference(model(values), model(others), {"a": 0.0, "b": 1.0}).is_gain


# ---------------------------------------------------------------------------------- properties


@settings(max_examples=60)
@given(pairs(), st.sampled_from([0.8, 0.95, 0.99]), st.integers(1, 9))
def test_the_numbers_hold_together(pair, confidence, comparisons):
    first, second, weights = pair
    options = {"confidence": confidence, "comparisons": comparisons}
    result = difference(first, second, weights, **options)
    common = sorted(s for s in first if s is not None and s in second)
    paired = common if result.seeds.paired else []
    expected = mean(first, paired or first, weights) - mean(second, paired or second, weights)
    assert result.estimate == pytest.approx(expected, abs=1e-5, rel=1e-9)
    assert result.low <= result.estimate <= result.high
    assert 0 < result.p <= result.p_adjusted <= 1
    assert result.p_adjusted == min(1.0, comparisons * result.p)
    # Interval, p-value and verdict are one and the same.
    excludes = result.low > 0 or result.high < 0
    if not 0.999 < result.p_adjusted / (1 - confidence) < 1.001:
        assert excludes == (result.p_adjusted < 1 - confidence)
    assert (result.is_gain or result.is_loss) == (excludes and result.has_verdict)
    wider = difference(first, second, weights, confidence=0.999, comparisons=10)
    assert wider.half_width >= result.half_width
    alone = difference(first, second, weights, confidence=1 - (1 - confidence) / comparisons)
    assert alone.half_width == pytest.approx(result.half_width)
    json.dumps(result.to_json(), allow_nan=False)


@settings(max_examples=60)
@given(pairs())
def test_swapping_the_models_turns_the_sign(pair):
    first, second, weights = pair
    result, swapped = difference(first, second, weights), difference(second, first, weights)
    near = {"abs": 1e-9 * (1 + abs(result.half_width)), "rel": 1e-9}
    assert swapped.estimate == pytest.approx(-result.estimate, **near)
    assert swapped.low == pytest.approx(-result.high, **near)
    assert swapped.p == pytest.approx(result.p, rel=1e-6)
    assert (swapped.is_gain, swapped.is_loss) == (result.is_loss, result.is_gain)


@settings(max_examples=40)
@given(pairs(), st.integers(0, 999))
def test_the_order_of_rows_seeds_and_tasks_changes_no_bit(pair, seed):
    first, second, weights = pair
    result = difference(first, second, weights)

    def permutation(of, count):
        return np.random.default_rng([seed, hash(of) % 97]).permutation(count)

    again = difference(
        turned(first, permutation), turned(second, permutation), dict(reversed(weights.items()))
    )
    assert again == result


@settings(max_examples=40)
@given(pairs(), st.sampled_from([0.8, 0.99]))
def test_an_interval_is_no_narrower_than_that_of_the_seeds_alone(pair, confidence):
    first, _, weights = pair
    result = mean_interval(first, "margin", weights, confidence=confidence)
    assert result.mean == pytest.approx(mean(first, first, weights), abs=1e-5, rel=1e-9)
    if len(first) > 1:
        means = [mean(first, [seed], weights) for seed in first]
        alone = t.ppf((1 + confidence) / 2, len(means) - 1) * np.std(means, ddof=1)
        assert result.half_width >= alone / math.sqrt(len(means)) * (1 - 1e-6) - 1e-9


def test_what_both_models_share_cancels():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(4, 1)) + rng.normal(size=(1, 30))
    small = 0.01 * rng.normal(size=(4, 30))
    paired = difference(model({"t": shared + small}), model({"t": shared}))
    alone = difference(model({"t": shared + small}), model({"t": shared}, [10, 11, 12, 13]))
    assert paired.seeds == Seeds(4, 4, paired=True, left_out=0)
    assert alone.seeds == Seeds(4, 4, paired=False, left_out=0)
    assert paired.high - paired.low < 0.05 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("metric", "lowest", "highest"),
    [("accuracy", -1.0, 1.0), ("margin", -math.inf, math.inf)],
)
def test_an_interval_ends_where_the_metric_does(metric, lowest, highest):
    values = np.array([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    result = gain(values, metric=metric, confidence=0.999)
    assert result.estimate + result.half_width > 1
    assert result.high == min(highest, result.estimate + result.half_width)
    assert result.low == max(lowest, result.estimate - result.half_width)
    cell = mean_interval(model({"t": values}), metric, {"t": 1.0}, confidence=0.999)
    assert (cell.low, cell.high) == (0.0, 1.0) or metric == "margin"


# ------------------------------------------------------------------------------------- pairing


def test_documents_of_one_model_alone_are_left_out_and_counted():
    result = difference(
        single(1.0, 0.0, 9.0, keys="abx"), single(0.0, 5.0, 0.0, 7.0, keys="bycabz"[1:5])
    )
    # Common are a and b of "abx" and "ycab".
    assert (result.documents, result.left_out) == (2, 3)
    assert result.estimate == pytest.approx((1.0 - 0.0 + 0.0 - 7.0) / 2)


def test_repeated_keys_are_paired_in_order():
    result = difference(single(1.0, 5.0, 2.0, keys="aba"), single(1.0, 2.0, 5.0, keys="aab"))
    assert (result.estimate, result.documents, result.left_out) == (0.0, 3, 0)
    result = difference(single(1.0, 2.0, 3.0, keys="aaa"), single(1.0, 2.0, keys="aa"))
    assert (result.estimate, result.documents, result.left_out) == (0.0, 2, 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "seeds"),
    [
        ([1, 2, 3], [1, 2, 3], Seeds(3, 3, paired=True, left_out=0)),
        ([1, 2, 3, 4], [4, 3, 2, 5], Seeds(3, 3, paired=True, left_out=2)),
        ([1, 2, 3], [2, 3, 4], Seeds(3, 3, paired=False, left_out=0)),  # two are no verdict
        ([1, 2], [2, 1], Seeds(2, 2, paired=True, left_out=0)),
        ([1, 2, 3], [None], Seeds(3, 0, paired=False, left_out=0)),
        ([None], [None], Seeds(0, 0, paired=False, left_out=0)),
    ],
)
def test_seeds_are_paired_where_enough_are_common(ours, theirs, seeds):
    values = np.random.default_rng(0).normal(size=(4, 10))
    first, second = (model({"t": values[: len(s)]}, s) for s in (ours, theirs))
    assert difference(first, second).seeds == seeds


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([1, 2, 3], [1, 2, 3], True),
        ([1, 2], [1, 2], False),
        ([1, 2, 3], [11, 12], False),
        ([1], [None], False),
        ([1, 2, 3], [None], True),
        ([None], [None], True),
    ],
)
def test_fewer_than_three_fine_tunes_have_an_interval_but_no_verdict(ours, theirs, verdict):
    values = 1e-3 * np.random.default_rng(0).normal(size=(3, 40))
    better, worse = (
        model({"t": shift + values[: len(seeds)]}, seeds)
        for shift, seeds in ((1.0, ours), (0.0, theirs))
    )
    result = difference(better, worse)
    assert result.low > 0
    assert (result.has_verdict, result.is_gain) == (verdict, verdict)
    assert difference(worse, better).is_loss is verdict


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (single(1.0, 2.0, keys="ab"), single(1.0, 2.0, keys="xy"), "0 documents of task t"),
        (single(1.0, 2.0, keys="ab"), single(1.0, 2.0, keys="ax"), "1 documents of task t"),
        (single(1.0, math.nan), single(1.0, 2.0), "not finite"),
        ({0: {"u": (["a"], [1.0])}}, single(1.0, 2.0), "Task t is absent"),
        ({0: {"t": (["a"], [1.0, 2.0])}}, single(1.0, 2.0), "1 keys for 2 values"),
        ({}, single(1.0, 2.0), "has the seeds"),
        ({**single(1.0, 2.0), **single(1.0, 2.0, seed=None)}, single(1.0, 2.0), "has the seeds"),
    ],
)
def test_models_that_cannot_be_paired(first, second, message):
    with pytest.raises(OracleError, match=message) as caught:
        difference(first, second)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", [{"t": 0.0}, {"t": -1.0, "u": 2.0}])
def test_weights_that_leave_nothing(weights):
    with pytest.raises(OracleError, match="task weights"):
        difference(single(1.0, 2.0), single(1.0, 2.0), weights)


# ----------------------------------------------------------------------------------- from scores


def scores(tasks: dict[str, np.ndarray], metric: str = "accuracy") -> list[Score]:
    """One score per seed from values (S, J) per task."""
    return [
        Score(tasks={name: TaskScore.of({metric: v[s].tolist()}) for name, v in tasks.items()})
        for s in range(len(next(iter(tasks.values()))))
    ]


def test_score_cells():
    values = {"a": np.array([[1.0, 0.0]]), "b": np.array([[1.0, 1.0]])}
    cells = score_cells(scores(values), ["accuracy"], {"a": 3.0, "b": 1.0})
    assert list(cells) == ["a", "b", "mean"]
    assert cells["mean"]["accuracy"]["mean"] == pytest.approx(0.625)
    assert cells["b"]["accuracy"] == {"mean": 1.0, "half_width": 0.0, "low": 1.0, "high": 1.0}
    cell = cells["a"]["accuracy"]
    assert cell["half_width"] == pytest.approx(12.7062047 * 0.5)
    assert (cell["low"], cell["high"]) == (0.0, 1.0)


def test_scores_without_what_is_asked_for_are_refused():
    two = scores({"a": np.zeros((2, 3))})
    for metric, weights in (("margin", {"a": 1.0}), ("accuracy", {"absent": 1.0})):
        with pytest.raises(OracleError, match="absent from a model"):
            score_cells(two, [metric], weights)


# ------------------------------------------------------------------------- how often it is wrong


def simulated(rng, seeds, by_seed, *, paired=True, effect=0.0):
    """Two models on two tasks; sd of what documents, single answers and seeds do."""
    first, second = {}, {}
    documents = {"a": 30, "b": 15}
    shift = [by_seed * rng.normal(size=(seeds, 1)) for _ in range(2)]
    for task, count in documents.items():
        shared = rng.normal(size=(1, count))
        first[task], second[task] = (
            shared + s + 0.4 * rng.normal(size=(1, count)) + 0.3 * rng.normal(size=(seeds, count))
            for s in shift
        )
        first[task] += effect
    return model(first), model(second, None if paired else range(100, 100 + seeds))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("by_seed", [0.0, 0.1, 1.0])
def test_the_stated_error_rate_is_kept(seeds, by_seed, paired):
    rng = np.random.default_rng([seeds, round(10 * by_seed), paired])
    weights, runs, comparisons = {"a": 2.0, "b": 1.0}, 300, 2
    wrong = 0
    for _ in range(runs):
        models = [simulated(rng, seeds, by_seed, paired=paired) for _ in range(comparisons)]
        found = [difference(*m, weights, comparisons=comparisons) for m in models]
        wrong += any(d.is_gain or d.is_loss for d in found)
    # Three standard errors above the 5 % that are stated for both comparisons together.
    assert wrong <= runs * 0.05 + 3 * math.sqrt(runs * 0.05 * 0.95)


def test_planted_effects_are_found():
    rng = np.random.default_rng(3)
    weights = {"a": 2.0, "b": 1.0}
    found = [
        difference(*simulated(rng, 3, 0.05, effect=sign), weights)
        for sign in (1.0, -1.0)
        for _ in range(40)
    ]
    assert all(d.is_gain for d in found[:40])
    assert all(d.is_loss for d in found[40:])


def test_values_by_document_come_back_from_scores():
    score = scores({"a": np.array([[1.0, 0.0]])})[0]
    assert model_of({7: score}, "accuracy") == {7: {"a": (["0", "1"], [1.0, 0.0])}}
    named = replace(score, tasks={"a": replace(score.tasks["a"], keys=["x", "y"])})
    assert model_of({7: named}, "accuracy")[7]["a"][0] == ["x", "y"]
