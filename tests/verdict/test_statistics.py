from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.verdict.statistics import compare, interval_of_mean, score_cells


def scores(tasks: dict[str, np.ndarray], metric: str = "accuracy") -> list[Score]:
    """One score per seed from values (S, J) per task."""
    seeds = len(next(iter(tasks.values())))
    return [
        Score(
            tasks={
                name: TaskScore(
                    values={metric: float(np.mean(values[s]))},
                    stderr={metric: 0.0},
                    documents=len(values[s]),
                    per_document={metric: list(map(float, values[s]))},
                )
                for name, values in tasks.items()
            }
        )
        for s in range(seeds)
    ]


@st.composite
def pairs(draw):
    """Two models with the same seeds, tasks and documents, and task weights."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    seeds = draw(st.integers(2, 5))
    sizes = draw(st.lists(st.integers(2, 12), min_size=1, max_size=3))
    scale = draw(st.sampled_from([0.0, 1e-6, 1.0, 1e6]))
    shape = {f"t{i}": (seeds, n) for i, n in enumerate(sizes)}
    ours = {t: scale * rng.normal(size=s) for t, s in shape.items()}
    theirs = {t: scale * rng.normal(size=s) for t, s in shape.items()}
    weights = {t: draw(st.floats(0.1, 5.0)) for t in shape}
    return ours, theirs, weights


def test_by_hand() -> None:
    differences = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]])
    result = compare(scores({"a": differences}), scores({"a": 0 * differences}), "accuracy")
    # Both seeds have mean 0.5; documents have seed means 1, 0, .5, .5 with variance 1/6, 3 df.
    assert result.estimate == pytest.approx(0.5)
    assert result.stderr == pytest.approx(math.sqrt(1 / 24))
    assert result.half_width == pytest.approx(3.1824463 * math.sqrt(1 / 24))
    assert (result.seeds, result.documents, result.confidence) == (2, 4, 0.95)


def test_welch_satterthwaite_by_hand() -> None:
    # Seed means 0.5 and 1.5: variance 0.5, over 2 seeds 0.25. Documents 0.75 and 1.25: 0.125 / 2.
    values = np.array([[0.0, 1.0], [1.5, 1.5]])
    result = interval_of_mean(scores({"a": values}), "accuracy")
    assert result.stderr == pytest.approx(math.sqrt(0.25 + 0.0625))
    freedom = 0.3125**2 / (0.25**2 + 0.0625**2)
    assert result.half_width == pytest.approx(float(t.ppf(0.975, freedom)) * result.stderr)


@settings(max_examples=60)
@given(pairs(), st.sampled_from([0.8, 0.95, 0.99]))
def test_properties(pair, confidence: float) -> None:
    ours, theirs, weights = pair
    a, b = scores(ours), scores(theirs)
    result = compare(a, b, "accuracy", weights, confidence=confidence)
    swapped = compare(b, a, "accuracy", weights, confidence=confidence)
    near = {"rel": 1e-6, "abs": 1e-12}
    assert swapped.estimate == pytest.approx(-result.estimate, **near)
    assert swapped.half_width == pytest.approx(result.half_width, **near)
    assert result.low <= result.estimate <= result.high
    assert not (result.is_gain and result.is_loss)
    assert swapped.is_loss == result.is_gain
    # The estimate is the difference of the two weighted means.
    means = [interval_of_mean(x, "accuracy", weights).mean for x in (a, b)]
    assert result.estimate == pytest.approx(means[0] - means[1], **near)
    # Only the ratio of the weights counts, and not the order of seeds or documents.
    tripled = compare(
        a, b, "accuracy", {t: 3 * w for t, w in weights.items()}, confidence=confidence
    )
    assert tripled.half_width == pytest.approx(result.half_width, **near)
    turned = compare(
        scores({t: v[::-1, ::-1] for t, v in ours.items()}),
        scores({t: v[::-1, ::-1] for t, v in theirs.items()}),
        "accuracy",
        weights,
        confidence=confidence,
    )
    assert turned.estimate == pytest.approx(result.estimate, **near)
    assert turned.half_width == pytest.approx(result.half_width, **near)
    wider = compare(a, b, "accuracy", weights, confidence=0.999)
    assert wider.half_width >= result.half_width
    json.dumps(result.to_json(), allow_nan=False)


def test_what_both_models_share_cancels() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(4, 1)) + rng.normal(size=(1, 30))
    small = 0.01 * rng.normal(size=(4, 30))
    paired = compare(scores({"a": shared + small}), scores({"a": shared}), "accuracy")
    alone = interval_of_mean(scores({"a": shared}), "accuracy")
    assert paired.half_width < 0.05 * alone.half_width


def simulate(effect: float, sd: tuple[float, float, float], runs: int, seed: int):
    """Comparisons of two tasks with random seed, document and joint parts of the difference."""
    rng = np.random.default_rng(seed)
    by_seed, by_document, joint = sd
    out = []
    for _ in range(runs):
        common = by_seed * rng.normal(size=(5, 1))
        ours, theirs = {}, {}
        for task, documents in (("a", 40), ("b", 15)):
            base = rng.normal(size=(5, documents))
            theirs[task] = base
            ours[task] = (
                base
                + effect
                + common
                + by_document * rng.normal(size=(1, documents))
                + joint * rng.normal(size=(5, documents))
            )
        out.append(compare(scores(ours), scores(theirs), "accuracy", {"a": 2.0, "b": 1.0}))
    return out


@pytest.mark.parametrize(
    "sd", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.3, 1.0, 1.0), (0.15, 1.0, 0.5)]
)
@pytest.mark.parametrize("effect", [0.0, 0.7])
def test_coverage(sd: tuple[float, float, float], effect: float) -> None:
    results = simulate(effect, sd, runs=1000, seed=int(1000 * sum(sd)))
    covered = np.mean([r.low <= effect <= r.high for r in results])
    # 1000 runs put one standard error of 0.7 points on the nominal 95 %.
    assert covered >= 0.93


def test_planted_effects_are_found() -> None:
    gains = simulate(1.0, (0.1, 0.5, 0.5), runs=100, seed=3)
    assert np.mean([r.is_gain for r in gains]) > 0.99
    losses = simulate(-1.0, (0.1, 0.5, 0.5), runs=100, seed=4)
    assert np.mean([r.is_loss for r in losses]) > 0.99


def test_accuracies_under_the_null() -> None:
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(500):
        easy = rng.random((1, 60))
        ours, theirs = (scores({"a": (rng.random((3, 60)) < easy) * 1.0}) for _ in range(2))
        result = compare(ours, theirs, "accuracy")
        wrong += result.is_gain or result.is_loss
    assert wrong / 500 <= 0.07


def test_no_variance() -> None:
    ones = np.ones((3, 4))
    same = compare(scores({"a": ones}), scores({"a": ones}), "accuracy")
    assert (same.estimate, same.half_width, same.stderr) == (0.0, 0.0, 0.0)
    assert not same.is_gain
    assert not same.is_loss
    apart = compare(scores({"a": ones}), scores({"a": 0 * ones}), "accuracy")
    assert (apart.low, apart.high) == (1.0, 1.0)
    tiny = compare(scores({"a": 1e-160 * np.eye(4)}), scores({"a": 0 * np.eye(4)}), "accuracy")
    assert math.isfinite(tiny.half_width)


def test_one_document_gives_no_finite_interval() -> None:
    values = {"a": np.array([[1.0], [1.0]]), "b": np.ones((2, 3))}
    result = compare(scores(values), scores({t: 0 * v for t, v in values.items()}), "accuracy")
    assert result.estimate == 1.0
    assert result.half_width == math.inf
    assert not result.is_gain
    plain = result.to_json()
    assert (plain["half_width"], plain["low"], plain["high"]) == (None, None, None)
    only_b = compare(
        scores(values), scores({t: 0 * v for t, v in values.items()}), "accuracy", {"b": 1.0}
    )
    assert only_b.is_gain
    assert only_b.documents == 3


def test_single_model_with_one_seed_covers_documents_only() -> None:
    values = np.array([[1.0, 0.0, 1.0, 1.0]])
    result = interval_of_mean(scores({"a": values}), "accuracy")
    assert result.mean == 0.75
    assert result.stderr == pytest.approx(0.25)
    assert result.seeds == 1
    two = interval_of_mean(scores({"a": np.vstack([values, 1 - values])}), "accuracy")
    assert two.stderr > 0


def test_score_cells() -> None:
    values = {"a": np.array([[1.0, 0.0]]), "b": np.array([[1.0, 1.0]])}
    cells = score_cells(scores(values), ["accuracy"], {"a": 3.0, "b": 1.0})
    assert list(cells) == ["a", "b", "mean"]
    assert cells["mean"]["accuracy"]["mean"] == pytest.approx(0.625)
    assert cells["b"]["accuracy"] == {"mean": 1.0, "half_width": 0.0}
    assert cells["a"]["accuracy"]["half_width"] == pytest.approx(12.7062047 * 0.5)


def test_what_cannot_be_compared() -> None:
    two, three = scores({"a": np.zeros((2, 3))}), scores({"a": np.zeros((3, 3))})
    with pytest.raises(OracleError, match="paired"):
        compare(two, three, "accuracy")
    with pytest.raises(ConfigError, match="2 seeds"):
        compare(two[:1], two[:1], "accuracy")
    with pytest.raises(OracleError, match="same documents"):
        compare(two, scores({"a": np.zeros((2, 4))}), "accuracy")
    with pytest.raises(OracleError, match="per-document"):
        compare(two, two, "choice_logprob")
    with pytest.raises(OracleError, match="per-document"):
        compare(two, two, "accuracy", {"absent": 1.0})
    with pytest.raises(OracleError, match="weights"):
        compare(two, two, "accuracy", {"a": 0.0})
    with pytest.raises(OracleError, match="no score"):
        interval_of_mean([], "accuracy")
    broken = scores({"a": np.array([[0.0, math.nan], [0.0, 0.0]])})
    with pytest.raises(OracleError, match="finite"):
        compare(broken, broken, "accuracy")
