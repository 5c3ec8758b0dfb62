from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.verdict.noise_floor import (
    Design,
    Floor,
    Reliability,
    assess,
    expected_best_gain,
    fine_tunes_to_detect,
    reliability,
)

SDS = st.floats(1e-4, 10.0)


def table(icc: float, n: int, k: int, rng: np.random.Generator) -> Reliability:
    """A simulated table with residual sd 1."""
    between = math.sqrt(icc / (1 - icc)) * rng.normal(size=(n, 1))
    return reliability(between + rng.normal(size=(n, k)))


def floor(accuracy: Reliability, objective: Reliability | None = None, **options) -> Floor:
    design = {"seeds": 5} | {k: options.pop(k) for k in ("seeds", "document_sd") if k in options}
    return assess(accuracy, objective or accuracy, 30, Design(**design), **options)


def least_detectable_gain(seeds: int, sd: float, *, power: float = 0.5, **design) -> float:
    return float(Design(seeds=seeds, **design).detectable(sd, power))


def fine_tunes(gain: float, sd: float, *, power: float = 0.8, **design) -> int | None:
    return fine_tunes_to_detect(gain, sd, Design(seeds=3, **design), power=power)


def test_least_gain_has_its_power_in_the_noncentral_t() -> None:
    gain = least_detectable_gain(5, 2.0, power=0.8)
    critical = stats.t.ppf(0.975, 4)
    assert stats.nct.sf(critical, 4, gain / (2.0 * math.sqrt(2 / 5))) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("seeds", "document_sd", "models"),
    [(3, 0.1, 2), (5, 0.5, 2), (3, 2.0, 2), (3, 0.0, 4), (6, 0.5, 4), (6, 0.1, 3)],
)
@pytest.mark.parametrize("power", [0.5, 0.8])
def test_least_gain_with_documents_by_simulation(seeds, document_sd, models, power) -> None:
    """The interval is that of the verdict, with documents enough that their variance is known."""
    rng, count = np.random.default_rng(1), 20_000
    gain = least_detectable_gain(seeds, 1.0, power=power, document_sd=document_sd, models=models)
    scores = rng.normal(size=(count, models, seeds))
    rest = scores - scores.mean(1, keepdims=True) - scores.mean(2, keepdims=True)
    rest += scores.mean((1, 2), keepdims=True)
    df = (models - 1) * (seeds - 1)
    differences = gain + scores[:, 0] - scores[:, 1]
    own, every = differences.var(1, ddof=1), 2 * np.square(rest).sum((1, 2)) / df
    differences += document_sd * rng.normal(size=(count, 1))
    squares = stats.t.ppf(0.975, df) ** 2 * np.maximum(own, every) / seeds
    half_widths = np.sqrt(squares + (stats.norm.ppf(0.975) * document_sd) ** 2)
    assert np.mean(differences.mean(1) > half_widths) == pytest.approx(power, abs=0.015)


def test_many_seeds_need_the_normal_quantiles() -> None:
    gain = least_detectable_gain(10**6, 1.0, power=0.8)
    assert gain == pytest.approx((1.959964 + 0.841621) * math.sqrt(2e-6), rel=1e-4)


def test_fine_tunes_of_a_textbook_paired_test() -> None:
    # Cohen's d of 0.5 for the paired differences takes 34 pairs at 5 % and power 0.8.
    assert fine_tunes(0.5 * math.sqrt(2), 1.0) == 2 * 34


def test_documents_set_a_limit_that_seeds_cannot_pass() -> None:
    limit = 1.959964 + 0.841621  # standard errors: the normal quantiles of 0.975 and 0.8
    assert fine_tunes(0.99 * limit, 1.0, document_sd=1.0) is None
    assert fine_tunes(1.01 * limit, 1.0, document_sd=1.0) is not None


@pytest.mark.parametrize("gain", [0.0, -1.0])
def test_no_gain_is_never_detected(gain: float) -> None:
    assert fine_tunes(gain, 1.0) is None
    assert fine_tunes(gain, 0.0) is None


def test_without_noise_the_fewest_fine_tunes_do() -> None:
    assert fine_tunes(1e-9, 0.0) == 4
    assert least_detectable_gain(2, 0.0) == 0.0


def test_a_power_below_chance_needs_no_gain() -> None:
    assert least_detectable_gain(5, 1.0, power=0.01) == 0.0


@settings(max_examples=60)
@given(SDS, SDS, st.sampled_from([0.5, 0.8]), st.sampled_from([0.0, 0.1]))
def test_fine_tunes_are_the_inverse_of_the_least_gain(
    gain: float, sd: float, power: float, document_sd: float
) -> None:
    options = {"power": power, "document_sd": document_sd * gain}
    count = fine_tunes(gain, sd, **options)
    if count is None:
        assert least_detectable_gain(10**6, sd, **options) > gain
        return
    assert count % 2 == 0
    assert least_detectable_gain(count // 2, sd, **options) <= gain
    assert count == 4 or least_detectable_gain(count // 2 - 1, sd, **options) > gain


@settings(max_examples=60)
@given(SDS, SDS, st.floats(1.0, 10.0))
def test_larger_gains_and_less_noise_take_no_more_fine_tunes(
    gain: float, sd: float, factor: float
) -> None:
    def count(gain: float, sd: float) -> float:
        return fine_tunes(gain, sd) or math.inf

    assert count(factor * gain, sd) <= count(gain, sd) <= count(gain, factor * sd)


@settings(max_examples=60)
@given(st.integers(2, 50), SDS, st.floats(0.0, 3.0), st.floats(0.1, 0.9))
def test_more_seeds_show_smaller_gains(seeds: int, sd: float, documents: float, power: float):
    one, more = (
        least_detectable_gain(s, sd, power=power, document_sd=documents) for s in (seeds, 2 * seeds)
    )
    assert 0 < more < one
    double = least_detectable_gain(seeds, 2 * sd, power=power, document_sd=2 * documents)
    assert double == pytest.approx(2 * one, rel=1e-6)


@pytest.mark.parametrize(
    ("trials", "expected"),
    [(1, 0.0), (2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi)), (100, 2.50759)],
)
def test_expected_maximum_of_normals(trials: int, expected: float) -> None:
    assert expected_best_gain(trials, 1.0, 1.0) == pytest.approx(expected, abs=1e-5)


def test_expected_gain_by_simulation() -> None:
    rng = np.random.default_rng(2)
    truth = 0.3 * rng.normal(size=(20_000, 12))
    noise = 0.3 * math.sqrt(0.6 / 0.4) * rng.normal(size=truth.shape)
    best = np.argmax(truth + noise, axis=1)
    gain = np.take_along_axis(truth, best[:, None], axis=1).mean()
    assert expected_best_gain(12, 0.3, 0.4) == pytest.approx(gain, rel=0.03)


@settings(max_examples=60)
@given(st.integers(1, 10**6), SDS, st.floats(0.0, 1.0))
def test_expected_gain_grows_with_all_three(trials: int, sd: float, icc: float) -> None:
    gain = expected_best_gain(trials, sd, icc)
    assert 0 <= gain <= expected_best_gain(2 * trials, sd, icc)
    assert gain <= expected_best_gain(trials, 2 * sd, icc)
    assert gain <= expected_best_gain(trials, sd, 1.0)


def test_floor_of_one_metric_is_the_exact_f_bound() -> None:
    found = table(0.5, 6, 4, np.random.default_rng(3))
    result = floor(found, level=0.9)
    ratio = found.mean_square / found.seed_sd**2 / stats.f.ppf(0.1, 5, 15)
    signal = (ratio - 1) / 4  # var(a) / var(e), upper bound
    icc = signal / (1 + signal)
    bound = expected_best_gain(30, found.seed_sd * math.sqrt(signal), icc)
    assert result.plausible_gain_high == pytest.approx(bound, rel=0.005)


def test_floor_reports_its_parts() -> None:
    found = table(0.5, 6, 4, np.random.default_rng(3))
    result = floor(found, seeds=7, document_sd=0.2)
    assert result.plausible_gain == expected_best_gain(30, found.between_sd, found.icc)
    assert result.detectable_gain == least_detectable_gain(7, found.seed_sd, document_sd=0.2)
    assert json.loads(json.dumps(result.to_json()))["outcome"] == result.outcome


@pytest.mark.parametrize(("icc", "low", "high"), [(0.0, 0.6, 0.8), (0.54, 0.13, 0.27)])
def test_how_often_a_search_is_called_below_the_noise(icc: float, low: float, high: float) -> None:
    # At an icc of 0.54 the expected gain equals the detectable one: 20 % at most, by `level`.
    rng = np.random.default_rng(4)
    below = np.mean([floor(table(icc, 4, 3, rng)).below_noise for _ in range(300)])
    assert low < below < high


def test_a_better_objective_raises_the_gain() -> None:
    rng = np.random.default_rng(5)
    accuracy, sharper, blind = (table(icc, 8, 3, rng) for icc in (0.5, 0.95, 0.0))
    assert sharper.icc > accuracy.icc > blind.icc
    gains = [floor(accuracy, other).plausible_gain_high for other in (blind, accuracy, sharper)]
    assert gains == sorted(gains)


def test_a_table_of_equal_values_decides_nothing() -> None:
    result = floor(reliability(np.zeros((4, 3))))
    assert (result.plausible_gain, result.plausible_gain_high, result.detectable_gain) == (0, 0, 0)
    assert result.outcome == "open"


def test_without_noise_any_gain_is_detectable() -> None:
    result = floor(reliability([[0.1, 0.1], [0.2, 0.2], [0.4, 0.4]]))
    assert (result.detectable_gain, result.outcome) == (0.0, "detectable")


def test_documents_alone_can_be_the_floor() -> None:
    exact = reliability([[0.1, 0.1], [0.2, 0.2], [0.4, 0.4]])
    assert floor(exact, document_sd=0.01).outcome == "detectable"
    assert floor(exact, document_sd=10.0).outcome == "below the noise"


def test_objective_without_any_difference_finds_nothing() -> None:
    rng = np.random.default_rng(6)
    result = floor(table(0.9, 4, 3, rng), reliability(np.zeros((4, 3))))
    assert (result.plausible_gain_high, result.outcome) == (0.0, "below the noise")


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.4, 0.8]), st.floats(0.0, 1.0))
def test_floor_properties(seed: int, icc: float, documents: float) -> None:
    found = table(icc, 4, 3, np.random.default_rng(seed))
    result, stricter = (floor(found, document_sd=documents, level=level) for level in (0.8, 0.95))
    assert 0 <= result.plausible_gain <= result.plausible_gain_high <= stricter.plausible_gain_high
    assert result.below_noise == (result.plausible_gain_high <= result.detectable_gain)
    assert result.below_noise or not stricter.below_noise
    assert floor(found, document_sd=documents, seeds=10).below_noise <= result.below_noise


def made(gain: float, high: float, detectable: float) -> Floor:
    return Floor(
        plausible_gain=gain,
        plausible_gain_high=high,
        detectable_gain=detectable,
        below_noise=high <= detectable,
        trials=30,
        seeds=5,
        level=0.8,
    )


def test_sentence_of_a_search_below_the_noise() -> None:
    assert made(0.003, 0.0091, 0.0142).sentence() == (
        "A search of 30 trials is expected to gain 0.3 points over the average allocation "
        "(at most 0.91 points, with 80 % confidence); the final comparison with 5 seeds can tell "
        "1.4 points from noise with an even chance: the noise floor is above any plausible gain."
    )


@pytest.mark.parametrize(
    ("gain", "outcome", "words"),
    [(0.01, "open", "too few to say"), (0.02, "detectable", "can find more than noise")],
)
def test_sentences_of_other_outcomes(gain: float, outcome: str, words: str) -> None:
    result = made(gain, 0.03, 0.0142)
    assert result.outcome == outcome
    assert words in result.sentence()


def test_sentence_in_another_unit() -> None:
    sentence = made(123.4, 130.0, 0.0142).sentence(unit=" nats", factor=1.0)
    assert "120 nats" in sentence
    assert "0.014 nats" in sentence


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: least_detectable_gain(1, 1.0), "at least 2 seeds, not 1"),
        (lambda: fine_tunes(1.0, -1.0), "-1.0 must be finite and 0 or more"),
        (lambda: least_detectable_gain(2, 1.0, document_sd=math.nan), "nan must be finite"),
        (lambda: least_detectable_gain(2, 1.0, power=1.0), "power 1.0 must lie between 0 and 1"),
        (lambda: fine_tunes(1.0, 1.0, confidence=95), "confidence 95 must lie"),
        (lambda: expected_best_gain(0, 1.0, 0.5), "0 trials, an sd of 1.0"),
        (lambda: expected_best_gain(3, 1.0, 1.5), "a reliability of 1.5"),
        (lambda: floor(reliability([[1, 2], [3, 5]]), level=0.0), "level 0.0 must lie"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
