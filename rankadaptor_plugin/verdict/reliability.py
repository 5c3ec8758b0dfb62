"""Reliability of a score: the share of what differs between allocations that is no seed's chance.

Some allocations are fine-tuned with the same seeds. The value of allocation i with seed j is::

    x[i, j] = mean + a[i] + b[j] + e[i, j]

The seed's effect b is shared by all allocations and drops out of every difference. What is left of
the noise is the residual e, and the reliability is ``var(a) / (var(a) + var(e))``: ICC(3,1) of
Shrout and Fleiss (1979), with their interval from the F distribution, which is exact for normal a
and e. It speaks of the population that the allocations were drawn from, and of these documents:
what an allocation is good for on these documents alone counts as a true difference.

A negative estimate of a variance is reported as 0. Without residual the reliability is 1, or 0
with an interval from 0 to 1 if all allocations are equal.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rankadaptor_plugin.core.errors import ConfigError, OracleError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Array = NDArray[np.float64]

_ROUNDING = 1e-9
_GRID = 200  # a finer grid moves no bound by 0.5 %


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Variances of a score between allocations and seeds; sd in the unit of the score.

    Attributes:
        icc: ICC(3,1): share of the variance between fine-tunes with the same seed that is due to
            the allocation, in [0, 1].
        low: Lower end of its interval, in [0, 1].
        high: Upper end of its interval, in [0, 1].
        icc_independent: ICC(2,1): the same if each fine-tune had a seed of its own, in [0, icc].
        between_sd: True sd between allocations, without noise. On average too low where it is
            about as large as its error, and too high where the truth is near 0.
        between_sd_high: Upper end of its two-sided interval (Williams 1962).
        seed_sd: Residual sd of one fine-tune, shared seeds.
        mean_square: Mean square between allocations: estimates k var(a) + var(e).
        confidence: Confidence of the intervals, in (0, 1).
        allocations: Number of allocations, n.
        seeds: Number of seeds, k.
    """

    icc: float
    low: float
    high: float
    icc_independent: float
    between_sd: float
    between_sd_high: float
    seed_sd: float
    mean_square: float
    confidence: float
    allocations: int
    seeds: int

    def to_json(self) -> dict[str, float]:
        """Returns plain values."""
        return asdict(self)


def reliability(values: ArrayLike, *, confidence: float = 0.95) -> Reliability:
    """Separates true differences between allocations from noise.

    Args:
        values: Scores, shape (n, k): n >= 2 allocations with the same k >= 2 seeds each.
        confidence: Confidence of the intervals, in (0, 1).

    Raises:
        ConfigError: With fewer than two allocations or seeds, or a confidence outside (0, 1).
        OracleError: If a value is not a finite number.
    """
    check_fraction("confidence", confidence)
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or min(table.shape) < 2:  # noqa: PLR2004  (a table; a variance takes two)
        raise ConfigError(
            f"A noise floor takes at least 2 allocations with 2 seeds each, not a table of shape "
            f"{table.shape}. Raise the number of allocations or seeds."
        )
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise OracleError(
            f"The score of allocation {row} with seed {column} is {table[row, column]}, not a "
            "finite number. Leave this allocation out or run it again."
        )
    n, k = table.shape
    rows, columns, residual = _mean_squares(table)
    df, df_residual = n - 1, (n - 1) * (k - 1)
    gap = rows - residual
    # Equal mean squares differ by rounding.
    between, seed = gap / k if gap > _ROUNDING * rows else 0.0, max(0.0, (columns - residual) / n)
    tail = (1 - confidence) / 2
    # rows / residual over its expectation (k var(a) + var(e)) / var(e) is F distributed.
    lowest, highest = (float(stats.f.ppf(q, df, df_residual)) for q in (tail, 1 - tail))
    spread = (rows - lowest * residual) / float(stats.chi2.ppf(tail, df)) * df / k
    total = between + residual
    return Reliability(
        icc=between / total if total else 0.0,
        low=_icc(rows / highest, residual, k) if rows else 0.0,
        high=_icc(rows / lowest, residual, k) if total else 1.0,
        icc_independent=between / (total + seed) if total else 0.0,
        between_sd=math.sqrt(between),
        between_sd_high=math.sqrt(max(0.0, spread)),
        seed_sd=math.sqrt(residual),
        mean_square=rows,
        confidence=confidence,
        allocations=n,
        seeds=k,
    )


def plausible_variances(score: Reliability) -> tuple[Array, Array]:
    """Returns the variances that a table allows: between allocations (g, g), and residual (g,).

    All are equally likely in the sense of generalized confidence (Weerahandi 1993): what each of
    the two sums of squares is divided by runs over the g quantiles of its chi-squared
    distribution. The columns of the first go with the second.
    """
    nodes = (np.arange(_GRID) + 0.5) / _GRID
    df = score.allocations - 1
    df_residual = df * (score.seeds - 1)
    residual = score.seed_sd**2 * df_residual / stats.chi2.ppf(nodes, df_residual)
    rows = score.mean_square * df / stats.chi2.ppf(nodes, df)
    return np.maximum(0.0, rows[:, None] - residual) / score.seeds, residual


def check_fraction(name: str, value: float) -> None:
    """Raises ConfigError unless the value lies in (0, 1)."""
    if not 0 < value < 1:
        raise ConfigError(f"The {name} {value} must lie between 0 and 1, both excluded. Change it.")


def _mean_squares(table: Array) -> tuple[float, float, float]:
    """Returns the mean squares of allocations, seeds and residual; rounding errors become 0."""
    n, k = table.shape
    centered = table - table.mean()
    rows, columns = centered.mean(axis=1, keepdims=True), centered.mean(axis=0, keepdims=True)
    residual = centered - rows - columns
    exact = (16 * np.finfo(np.float64).eps * np.abs(table).max()) ** 2
    squares = (
        k * float(np.sum(rows**2)) / (n - 1),
        n * float(np.sum(columns**2)) / (k - 1),
        float(np.sum(residual**2)) / ((n - 1) * (k - 1)),
    )
    first, second, third = (0.0 if square <= exact else square for square in squares)
    return first, second, third


def _icc(rows: float, residual: float, seeds: int) -> float:
    """Returns ICC(3,1) of two mean squares, not both 0."""
    return max(0.0, (rows - residual) / (rows + (seeds - 1) * residual))
