from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.verdict.bootstrap import compare_pairs, holm
from rankadaptor_plugin.verdict.pairing import Seeds
from rankadaptor_plugin.verdict.statistics import compare

FEW = {"resamples": 200}


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


def difference(first, second, weights=None, **options):
    return compare_pairs([(first, second)], weights or {"t": 1.0}, **{**FEW, **options})[0]


def draw_values(seed: int, seeds: int, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {task: rng.normal(size=(seeds, size)) for task, size in sizes.items()}


@st.composite
def pairs(draw):
    """Two models on the same documents, with common seeds or not, and task weights."""
    sizes = {f"t{i}": draw(st.integers(2, 12)) for i in range(draw(st.integers(1, 3)))}
    ours = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
    theirs = draw(st.sampled_from([ours, [None], [20, 21], [*ours, 30]]))
    first = draw_values(draw(st.integers(0, 999)), len(ours), sizes)
    second = draw_values(draw(st.integers(0, 999)), len(theirs), sizes)
    weights = {task: draw(st.floats(0.1, 5.0)) for task in sizes}
    return model(first, ours), model(second, theirs), weights


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


@settings(max_examples=60)
@given(pairs())
def test_the_estimate_is_the_difference_of_the_means(pair):
    first, second, weights = pair
    found = difference(first, second, weights)
    common = sorted(s for s in first if s is not None and s in second)
    paired = common if found.seeds.paired else []
    expected = mean(first, paired or first, weights) - mean(second, paired or second, weights)
    assert found.estimate == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60)
@given(pairs())
def test_swapping_the_models_turns_the_sign(pair):
    first, second, weights = pair
    found, swapped = difference(first, second, weights), difference(second, first, weights)
    near = {"abs": 1e-12}
    assert swapped.estimate == pytest.approx(-found.estimate, **near)
    assert (swapped.low, swapped.high) == (
        pytest.approx(-found.high, **near),
        pytest.approx(-found.low, **near),
    )
    assert swapped.p == found.p
    assert (swapped.is_gain, swapped.is_loss) == (found.is_loss, found.is_gain)


@settings(max_examples=40)
@given(pairs(), st.integers(0, 999))
def test_the_order_of_rows_seeds_and_tasks_changes_nothing(pair, seed):
    first, second, weights = pair
    found = difference(first, second, weights)

    def permutation(of, count):
        return np.random.default_rng([seed, hash(of) % 97]).permutation(count)

    again = difference(
        turned(first, permutation),
        turned(second, permutation),
        dict(reversed(weights.items())),
    )
    assert again == found


@settings(max_examples=40)
@given(pairs())
def test_the_numbers_hold_together(pair):
    first, second, weights = pair
    found = difference(first, second, weights)
    assert found.low <= found.high
    assert 2 / 201 <= found.p <= found.p_adjusted <= 1
    assert not (found.is_gain and found.is_loss)
    wider = difference(first, second, weights, confidence=0.985)
    assert wider.low <= found.low
    assert wider.high >= found.high
    tripled = difference(first, second, {t: 3 * w for t, w in weights.items()})
    assert tripled.estimate == pytest.approx(found.estimate, abs=1e-12)
    json.dumps(found.to_json(), allow_nan=False)


def test_equal_models_do_not_differ():
    values = draw_values(0, 3, {"t": 20})
    found = difference(model(values), model(values))
    assert (found.estimate, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert not found.is_gain
    assert not found.is_loss


def test_a_clear_difference_is_found_and_its_p_is_not_zero():
    values = draw_values(0, 5, {"t": 50})
    better = {"t": values["t"] + 1 + 0.01 * draw_values(1, 5, {"t": 50})["t"]}
    found = difference(model(better), model(values))
    assert found.is_gain
    assert found.p == 2 / 201
    assert difference(model(values), model(better)).is_loss


def test_what_both_models_share_cancels():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(4, 1)) + rng.normal(size=(1, 30))
    small = 0.01 * rng.normal(size=(4, 30))
    paired = difference(model({"t": shared + small}), model({"t": shared}))
    alone = difference(model({"t": shared + small}), model({"t": shared}, [10, 11, 12, 13]))
    assert paired.seeds == Seeds(4, 4, paired=True, left_out=0)
    assert alone.seeds == Seeds(4, 4, paired=False, left_out=0)
    assert paired.high - paired.low < 0.05 * (alone.high - alone.low)


# ------------------------------------------------------------------------------------- pairing


def test_documents_of_one_model_alone_are_left_out_and_counted():
    found = difference(
        single(1.0, 0.0, 9.0, keys="abx"), single(0.0, 5.0, 0.0, 7.0, keys="bycabz"[1:5])
    )
    # Common are a and b of "abx" and "ycab".
    assert (found.documents, found.left_out) == (2, 3)
    assert found.estimate == pytest.approx((1.0 - 0.0 + 0.0 - 7.0) / 2)


def test_repeated_keys_are_paired_in_order():
    found = difference(single(1.0, 5.0, 2.0, keys="aba"), single(1.0, 2.0, 5.0, keys="aab"))
    assert (found.estimate, found.documents, found.left_out) == (0.0, 3, 0)


def test_a_key_repeated_more_often_in_one_model_leaves_the_rest_out():
    found = difference(single(1.0, 2.0, 3.0, keys="aaa"), single(1.0, 2.0, keys="aa"))
    assert (found.estimate, found.documents, found.left_out) == (0.0, 2, 1)


def test_seeds_of_one_model_alone_are_left_out_where_two_are_paired():
    values = draw_values(0, 3, {"t": 10})
    found = difference(model(values, [1, 2, 3]), model(values, [4, 3, 2]))
    assert found.seeds == Seeds(2, 2, paired=True, left_out=2)


def test_one_common_seed_among_others_pairs_nothing():
    values = draw_values(0, 3, {"t": 10})
    found = difference(model(values, [1, 2, 3]), model(values, [3, 4, 5]))
    assert found.seeds == Seeds(3, 3, paired=False, left_out=0)


def test_a_model_without_seed_counts_none():
    values = draw_values(0, 3, {"t": 10})
    base = model({"t": values["t"][:1]}, [None])
    assert difference(model(values), base).seeds == Seeds(3, 0, paired=False, left_out=0)
    assert difference(base, base).seeds == Seeds(0, 0, paired=False, left_out=0)


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


# ---------------------------------------------------------------------------- several comparisons


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(1e-4, 1), max_size=8))
def test_holm_keeps_the_order_and_lies_between_none_and_bonferroni(p_values):
    adjusted = holm(p_values)
    order = np.argsort(p_values, kind="stable")
    assert all(np.diff(np.array(adjusted)[order]) >= 0)
    for p, a in zip(p_values, adjusted, strict=True):
        assert p <= a <= min(1.0, p * len(p_values) * (1 + 1e-12))
    if p_values:
        assert min(adjusted) == pytest.approx(min(1.0, len(p_values) * min(p_values)))


def test_pairs_are_corrected_together_and_otherwise_independent():
    rng = np.random.default_rng(3)
    same = {"t": rng.normal(size=(5, 40))}
    models = [model({"t": same["t"] + k * 0.15 + 0.3 * rng.normal(size=(5, 40))}) for k in range(3)]
    asked = [(models[0], models[1]), (models[0], models[2]), (models[1], models[2])]
    found = compare_pairs(asked, {"t": 1.0}, resamples=2000)
    alone = [compare_pairs([pair], {"t": 1.0}, resamples=2000)[0] for pair in asked]
    assert [f.p for f in found] == [f.p for f in alone]
    assert [(f.low, f.high) for f in found] == [(f.low, f.high) for f in alone]
    assert [f.p_adjusted for f in found] == holm([f.p for f in alone])
    assert alone[0].p_adjusted == alone[0].p


def test_the_verdict_follows_the_adjusted_p():
    rng = np.random.default_rng(0)
    first = {"t": rng.normal(size=(5, 40))}
    near = {"t": first["t"] - 0.08 + 0.3 * rng.normal(size=(5, 40))}
    once = compare_pairs([(model(first), model(near))], {"t": 1.0}, resamples=8000)[0]
    assert 0.05 / 40 < once.p < 0.05
    assert once.is_gain
    repeated = compare_pairs([(model(first), model(near))] * 40, {"t": 1.0}, resamples=8000)
    assert not any(found.is_gain for found in repeated)
    assert all(found.low > 0 for found in repeated)


def test_too_few_resamples_for_so_many_pairs_are_refused():
    pair = (single(1.0, 2.0), single(2.0, 3.0))
    with pytest.raises(ConfigError, match="Use at least 400"):
        compare_pairs([pair] * 10, {"t": 1.0}, resamples=399)


# ------------------------------------------------------------------------------ against the t test


def scores(values: dict[str, np.ndarray]) -> list[Score]:
    count = len(next(iter(values.values())))
    return [
        Score(
            tasks={
                t: TaskScore(
                    values={},
                    stderr={},
                    documents=v.shape[1],
                    per_document={"choice_logprob": v[s].tolist()},
                )
                for t, v in values.items()
            }
        )
        for s in range(count)
    ]


@pytest.mark.parametrize("by_seed", [0.0, 0.02, 0.3])
@pytest.mark.parametrize(("seeds", "widest"), [(3, 1.4), (5, 1.2)])
def test_intervals_agree_with_the_t_test(by_seed, seeds, widest):
    rng = np.random.default_rng(7)
    ratios = []
    for _ in range(12):
        shift = by_seed * rng.normal(size=(seeds, 1))
        ours = {t: shift + rng.normal(size=(seeds, 60)) for t in ("t", "u")}
        theirs = {t: rng.normal(size=(seeds, 60)) for t in ("t", "u")}
        weights = {"t": 1.0, "u": 2.0}
        found = difference(model(ours), model(theirs), weights, resamples=2000)
        expected = compare(scores(ours), scores(theirs), "choice_logprob", weights)
        assert found.estimate == pytest.approx(expected.estimate)
        ratios.append((found.high - found.low) / 2 / expected.half_width)
    assert 0.9 < float(np.median(ratios)) < widest


def test_false_findings_stay_rare_when_seeds_decide():
    rng = np.random.default_rng(11)
    found = []
    for _ in range(150):
        shift = rng.normal(size=(2, 5, 1))
        ours, theirs = (s + 0.5 * rng.normal(size=(5, 20)) for s in shift)
        found.append(difference(model({"t": ours}), model({"t": theirs})))
    wrong = sum(f.is_gain or f.is_loss for f in found)
    # 7.5 are expected at 5 %; drawing 5 seeds without correction finds three times as many.
    assert wrong <= 15
    assert sum(f.low <= 0 <= f.high for f in found) >= 135
