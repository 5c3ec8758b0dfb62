from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.verdict.noise_floor import Reliability, plausible_variances, reliability

# Six targets and four judges: Table 2 of Shrout and Fleiss (1979).
SHROUT_FLEISS = np.array(
    [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]],
    dtype=np.float64,
)


def simulated(
    icc: float, n: int, k: int, *, repetitions: int, seed: int = 0
) -> list[tuple[Reliability, float]]:
    """Results of tables with a known reliability and the true sd between allocations."""
    rng = np.random.default_rng(seed)
    between = float(np.sqrt(icc / (1 - icc)))
    tables = between * rng.normal(size=(repetitions, n, 1)) + rng.normal(size=(repetitions, n, k))
    tables += 3 * rng.normal(size=(repetitions, 1, k))
    return [(reliability(table), between) for table in tables]


@st.composite
def tables(draw) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, k = draw(st.integers(2, 9)), draw(st.integers(2, 6))
    spread = draw(st.sampled_from([0.0, 0.3, 1.0, 5.0]))
    return spread * rng.normal(size=(n, 1)) + rng.normal(size=(n, k))


def test_textbook_reliabilities() -> None:
    found = reliability(SHROUT_FLEISS)
    assert found.icc == pytest.approx(0.71, abs=0.005)
    assert found.icc_independent == pytest.approx(0.29, abs=0.005)
    assert (found.allocations, found.seeds, found.confidence) == (6, 4, 0.95)


def test_textbook_interval() -> None:
    found = reliability(SHROUT_FLEISS)
    assert (found.low, found.high) == (
        pytest.approx(0.342, abs=0.0005),
        pytest.approx(0.946, abs=0.0005),
    )


def test_textbook_variances() -> None:
    # Mean squares of the published analysis of variance: 11.24 between targets, 1.02 residual.
    found = reliability(SHROUT_FLEISS)
    assert found.mean_square == pytest.approx(11.24, abs=0.005)
    assert found.seed_sd**2 == pytest.approx(1.02, abs=0.005)
    assert found.between_sd**2 == pytest.approx((11.24 - 1.02) / 4, abs=0.005)


def test_upper_end_of_between_sd_by_hand() -> None:
    found = reliability(SHROUT_FLEISS, confidence=0.9)
    f, chi = stats.f.ppf(0.05, 5, 15), stats.chi2.ppf(0.05, 5)
    expected = (11.241667 - f * 1.019444) * 5 / (4 * chi)
    assert found.between_sd_high**2 == pytest.approx(expected, rel=1e-5)


def test_without_differences_nothing_is_known() -> None:
    found = reliability(np.full((4, 3), 0.1 + 0.2))
    assert (found.icc, found.low, found.high) == (0.0, 0.0, 1.0)
    assert found.between_sd == found.between_sd_high == found.seed_sd == 0.0


def test_without_residual_all_is_signal() -> None:
    # Sums of decimals that floats hold inexactly, so the residual is rounding alone.
    found = reliability(np.add.outer([0.71, 0.72, 0.74, 0.9], [0.1, 0.2, 0.3]))
    assert (found.icc, found.low, found.high, found.seed_sd) == (1.0, 1.0, 1.0, 0.0)
    assert found.between_sd == pytest.approx(np.std([0.71, 0.72, 0.74, 0.9], ddof=1))
    assert found.icc_independent < 1


def test_equal_means_are_no_signal() -> None:
    found = reliability([[1.0, 0.0], [0.0, 1.0]])
    assert (found.icc, found.low, found.between_sd) == (0.0, 0.0, 0.0)
    assert found.seed_sd == pytest.approx(1.0)


def test_differences_of_seeds_alone_are_no_signal() -> None:
    found = reliability(np.tile([0.1, 0.5, 0.9], (4, 1)))
    assert (found.icc, found.icc_independent, found.between_sd) == (0.0, 0.0, 0.0)


def test_json_holds_all_fields() -> None:
    found = reliability(SHROUT_FLEISS)
    assert Reliability(**json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("icc", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize(("n", "k"), [(4, 3), (8, 2)])
def test_intervals_cover_the_truth_as_often_as_they_say(icc: float, n: int, k: int) -> None:
    results = simulated(icc, n, k, repetitions=600)
    # At 0 the lower end alone can miss. Tolerances are three standard errors and a half.
    covered = np.mean([r.low <= icc <= r.high for r, _ in results])
    assert covered == pytest.approx(0.95 if icc else 0.975, abs=0.031)
    assert np.mean([between <= r.between_sd_high for r, between in results]) >= 0.975 - 0.023


def test_between_sd_is_nearly_unbiased_with_many_allocations() -> None:
    results = simulated(0.5, 40, 3, repetitions=300)
    assert np.mean([r.between_sd for r, _ in results]) == pytest.approx(1.0, abs=0.05)
    assert np.mean([r.seed_sd for r, _ in results]) == pytest.approx(1.0, abs=0.03)


@settings(max_examples=100)
@given(tables(), st.sampled_from([0.8, 0.95, 0.99]))
def test_bounds(table: np.ndarray, confidence: float) -> None:
    found = reliability(table, confidence=confidence)
    assert 0 <= found.icc_independent <= found.icc <= 1
    assert 0 <= found.low <= found.icc <= found.high <= 1
    assert 0 <= found.between_sd <= found.between_sd_high
    assert found.seed_sd > 0


@settings(max_examples=100)
@given(tables(), st.integers(0, 2**32 - 1))
def test_constants_and_order_do_not_count(table: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, k = table.shape
    moved = (table + 10 * rng.normal(size=(1, k)))[rng.permutation(n)][:, rng.permutation(k)]
    one, other = reliability(table).to_json(), reliability(moved).to_json()
    # It alone counts the seeds' main effect as noise.
    del one["icc_independent"], other["icc_independent"]
    assert one == pytest.approx(other, rel=1e-6, abs=1e-6)


@settings(max_examples=100)
@given(tables(), st.sampled_from([-1e-6, 0.01, -3.0, 1e9]))
def test_sds_scale_with_the_unit(table: np.ndarray, factor: float) -> None:
    one, other = reliability(table), reliability(factor * table)
    for name in ("icc", "low", "high", "icc_independent"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-9)
    for name in ("between_sd", "between_sd_high", "seed_sd"):
        assert getattr(other, name) == pytest.approx(abs(factor) * getattr(one, name), rel=1e-6)


@settings(max_examples=30)
@given(tables())
def test_a_wider_interval_holds_the_narrower(table: np.ndarray) -> None:
    narrow, wide = reliability(table, confidence=0.8), reliability(table, confidence=0.99)
    assert wide.low <= narrow.low
    assert narrow.high <= wide.high
    assert narrow.between_sd_high <= wide.between_sd_high


def test_plausible_variances_agree_with_the_interval() -> None:
    found = reliability(SHROUT_FLEISS)
    between, residual = plausible_variances(found)
    ends = np.quantile(between / (between + residual), [0.025, 0.975])
    assert ends == pytest.approx([found.low, found.high], abs=0.01)


@pytest.mark.parametrize("values", [[[1.0, 2.0]], [[1.0], [2.0]], [1.0, 2.0], []])
def test_too_small_a_table(values: list) -> None:
    with pytest.raises(ConfigError, match=r"at least 2 allocations with 2 seeds each, not .*shape"):
        reliability(values)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_must_be_finite(bad: float) -> None:
    with pytest.raises(OracleError, match=r"allocation 1 with seed 0 is (nan|inf)"):
        reliability([[1.0, 2.0], [bad, 2.0]])


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_is_a_fraction(confidence: float) -> None:
    with pytest.raises(ConfigError, match=f"confidence {confidence} must lie between 0 and 1"):
        reliability(SHROUT_FLEISS, confidence=confidence)
