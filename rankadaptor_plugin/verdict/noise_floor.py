"""The noise floor, and what a search can be expected to find above it.

The noise floor is the difference that the comparison of two allocations, fine-tuned with the same
few seeds, shows with an even chance. Against it stands what a search can be expected to gain, of
which some fine-tunes before the search give an idea (`reliability`).
The floor is measured on search documents, the verdict comes from report documents: fewer or more of
them, and other ones. Values per document say how much of the noise depends on that.

The reliability of a score is the share of what differs between allocations that is no seed's
chance. Some allocations are fine-tuned with the same seeds. The value of allocation i with seed j
is::

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
from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, special, stats

from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.verdict.statistics import task_shares

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike

    from rankadaptor_plugin.core.scores import Score

Array = NDArray[np.float64]

MOST_SEEDS = 10**6
"""`fine_tunes_to_detect` takes a difference that needs more seeds for one that none can show."""

_NODES = 64, 8  # quantiles of what seeds may show of their variance: in two models, in others
_STEPS = 50  # of a bisection: to the last digit


@dataclass(frozen=True, kw_only=True)
class Design:
    """The final comparison of two allocations (`rankadaptor_plugin.verdict.statistics`).

    Attributes:
        seeds: Seeds of each allocation, at least 2, the same for both.
        confidence: Confidence of the interval of the difference, in (0, 1).
        document_sd: Standard error of the difference that is due to the choice of documents and
            does not shrink with more seeds, in the unit of the score.
        models: Models of the race, at least 2: what seeds do is told from all of them.

    Raises:
        ConfigError: If a number is out of its range.
    """

    seeds: int
    confidence: float = 0.95
    document_sd: float = 0.0
    models: int = 2

    def __post_init__(self) -> None:
        check_fraction("confidence", self.confidence)
        if self.seeds < 2:  # noqa: PLR2004  (a variance takes two)
            raise ConfigError(
                f"A comparison takes at least 2 seeds, not {self.seeds}. Raise the seeds."
            )
        _check_sd(self.document_sd)

    def detectable(self, seed_sd: float | Array, power: float = 0.5) -> Array:
        """Returns the true differences that the interval shows to be above zero.

        Args:
            seed_sd: Residual sd of one fine-tune, as `Reliability.seed_sd`; any shape.
            power: Probability of showing it, in (0, 1); 0.5 is an even chance.
        """
        check_fraction("power", power)
        df, level = self.seeds - 1, (1 + self.confidence) / 2
        others = self.models - 2
        from_seeds = np.asarray(2 * np.square(seed_sd) / self.seeds)
        critical = special.stdtrit(df * (1 + others), level)
        if not (self.document_sd or others):
            factor = max(0.0, float(special.nctdtrinc(df, 1 - power, critical)))
            return np.asarray(factor * np.sqrt(from_seeds))
        # The interval takes the seeds' variance as these seeds show it, that of many documents as
        # it is. The power is the mean over what the seeds may show.
        shown = _shown(df, _NODES[0])
        if others:
            every = (shown + others * _shown(df * others, _NODES[1])[:, None]) / (1 + others)
            shown = np.maximum(shown, every).ravel()
        squares = critical**2 * from_seeds[..., None] * shown
        half_widths = np.sqrt(squares + (special.ndtri(level) * self.document_sd) ** 2)
        stderr = np.sqrt(from_seeds + self.document_sd**2)
        low, high = np.zeros_like(stderr), half_widths[..., 0] + 9 * stderr
        for _ in range(_STEPS):
            middle = (low + high) / 2
            chance = special.ndtr((middle[..., None] - half_widths) / stderr[..., None]).mean(-1)
            low, high = (
                np.where(chance < power, middle, low),
                np.where(chance < power, high, middle),
            )
        return low


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The gain to expect of a search, against what the final comparison can tell from noise.

    Attributes:
        plausible_gain: Expected true advantage of the allocation that a search picks over the
            average allocation, in the unit of the metric (accuracy: a fraction).
        plausible_gain_high: One-sided upper bound of it at `level`, for the noise as estimated.
        detectable_gain: The final comparison shows a difference of this size with an even chance.
        below_noise: True if even the bound is not above `detectable_gain`.
        trials: Number of trials of the search.
        seeds: Seeds of the final comparison.
        level: Confidence of the bound, in (0, 1).
    """

    plausible_gain: float
    plausible_gain_high: float
    detectable_gain: float
    below_noise: bool
    trials: int
    seeds: int
    level: float

    @property
    def outcome(self) -> Literal["below the noise", "open", "detectable"]:
        """``open`` if the expected gain lies below the noise floor, but its bound does not."""
        if self.below_noise:
            return "below the noise"
        return "detectable" if self.plausible_gain > self.detectable_gain else "open"

    def to_json(self) -> dict[str, float | str | None]:
        """Returns plain values, the outcome among them."""
        return {**asdict(self), "outcome": self.outcome}

    def sentence(self, unit: str = " points", factor: float = 100.0) -> str:
        """Says in plain English what the floor means.

        Args:
            unit: What follows a number, such as ``" nats"``.
            factor: What numbers are multiplied by; 1 for anything but accuracy.
        """
        gain, high, floor = (
            f"{float(f'{factor * value:.2g}'):g}{unit}"
            for value in (self.plausible_gain, self.plausible_gain_high, self.detectable_gain)
        )
        verdict = {
            "below the noise": "the noise floor is above any plausible gain.",
            "open": "these fine-tunes are too few to say whether a search pays.",
            "detectable": "a search can find more than noise.",
        }[self.outcome]
        return (
            f"A search of {self.trials} trials is expected to gain {gain} over the average "
            f"allocation (at most {high}, with {100 * self.level:g} % confidence); the final "
            f"comparison with {self.seeds} seeds can tell {floor} from noise with an even "
            f"chance: {verdict}"
        )


def assess(
    accuracy: Reliability,
    objective: Reliability,
    trials: int,
    design: Design,
    *,
    level: float = 0.8,
    seed_scale: float = 1.0,
) -> Floor:
    """Says if any plausible gain of a search is above the noise of the final comparison.

    The gain is `expected_best_gain` with the sd of accuracy between allocations and the
    reliability of the objective that chooses. Both metrics are taken to rank the allocations alike
    but for noise, which is the best case. It is below the noise if its upper bound, not its
    estimate, does not exceed what the comparison can show: a search whose expected gain just
    reaches that is called so with probability ``1 - level``. The bound is the quantile of the
    generalized confidence distribution of gain over detectable gain (Weerahandi 1993): with one
    metric and without `Design.document_sd` it is the exact F bound. With two metrics their errors
    are taken to go together, which makes it rather too high than too low.

    Args:
        accuracy: Reliability of the metric that the final comparison reports.
        objective: Reliability of what the search maximizes; the same object if it is that metric.
        trials: Number of trials of the search, at least 1.
        design: The final comparison.
        level: Confidence of the upper bound, in (0, 1); the higher, the fewer gains are called
            below the noise.
        seed_scale: Seed noise in the final comparison, as a multiple of that of `accuracy`: part of
            it is the chance of single answers, which shrinks with more documents.

    Raises:
        ConfigError: If a number is out of its range.
    """
    check_fraction("level", level)
    gain = expected_best_gain(trials, accuracy.between_sd, objective.icc)
    floor = float(design.detectable(seed_scale * accuracy.seed_sd))
    between, residual = plausible_variances(accuracy)
    chooser, noise = plausible_variances(objective)
    total = chooser + noise
    share = np.divide(chooser, total, out=np.zeros_like(total), where=total > 0)
    gains = _normal_maximum(trials) * np.sqrt(between * share)
    floors = design.detectable(seed_scale * np.sqrt(residual))
    # Gain and floor are uncertain together, so their ratio is bounded. With a floor of 0 any gain
    # can be told from noise, and its bound decides nothing.
    high = float(np.quantile(gains / floors, level)) * floor if floor else gain
    return Floor(
        plausible_gain=gain,
        plausible_gain_high=high,
        detectable_gain=floor,
        below_noise=floor > 0 and high <= floor,
        trials=trials,
        seeds=design.seeds,
        level=level,
    )


def fine_tunes_to_detect(
    gain: float, seed_sd: float, design: Design, *, power: float = 0.8
) -> int | None:
    """Returns the fewest fine-tunes, of two allocations together, that show a true difference.

    This is the inverse of `Design.detectable`, whatever the seeds of the design.

    Returns:
        Twice the number of seeds, at least 4; None if more than `MOST_SEEDS` do not show it.

    Raises:
        ConfigError: If an sd is negative, or the power not in (0, 1).
    """
    _check_sd(seed_sd)

    def is_shown(seeds: int) -> bool:
        return gain > 0 and bool(gain >= replace(design, seeds=seeds).detectable(seed_sd, power))

    if not is_shown(MOST_SEEDS):
        return None
    return 2 * bisect_left(range(MOST_SEEDS), True, lo=2, key=is_shown)


def expected_best_gain(trials: int, between_sd: float, icc: float) -> float:
    """Returns the expected true advantage of the best of some trials over the average allocation.

    The trials are drawn at random and the one with the best score is taken. Their true values are
    normal with sd `between_sd`; the score that chooses has reliability `icc`, so that its best
    value keeps the share ``sqrt(icc)``. A search that learns from its trials can do better, at
    most as well as with an icc of 1 and more trials. Where the good allocations crowd below a
    ceiling it gains less: about 0.7 of this in the project's own 133 allocations of a tiny model.

    Args:
        trials: Number of allocations to choose from, at least 1.
        between_sd: True sd between allocations, in the unit of the result.
        icc: Reliability of the score, in [0, 1].

    Raises:
        ConfigError: If there is no trial, a negative sd, or an icc outside [0, 1].
    """
    if trials < 1 or not 0 <= between_sd < math.inf or not 0 <= icc <= 1:
        raise ConfigError(
            f"{trials} trials, an sd of {between_sd} and a reliability of {icc} are not possible. "
            "Take at least 1 trial, an sd of 0 or more and a reliability in [0, 1]."
        )
    return between_sd * math.sqrt(icc) * _normal_maximum(trials)


def document_sd(
    scores: Sequence[Sequence[Score]],
    metric: str,
    weights: Mapping[str, float],
    report_documents: Mapping[str, int],
) -> float:
    """Returns the standard error of a difference that the choice of documents makes.

    From the differences between the first and each other allocation per document, the mean over
    the seeds; scaled from the documents at hand to those of the final comparison. It counts the
    chance of single answers here as well as among the seeds.

    Args:
        scores: Scores with values per document, by allocation and seed.
        metric: The metric of the difference.
        weights: Weight per task.
        report_documents: Documents of the final comparison by task.
    """
    variance = 0.0
    for task, share in task_shares(weights).items():
        means = _table(scores, task, metric).mean(axis=1)
        count = means.shape[1]
        if count > 1:
            spreads = (means[0] - means[1:]).var(axis=1, ddof=1)
            if metric == "accuracy":
                # That no answer differs among these documents does not mean that none can:
                # half of one more document, as Jeffreys' prior has it.
                spreads = np.maximum(spreads, 0.5 / (count + 1))
            variance += share**2 * float(spreads.mean()) / report_documents[task]
    return math.sqrt(variance)


def seed_scale(
    scores: Sequence[Sequence[Score]],
    metric: str,
    weights: Mapping[str, float],
    report_documents: Mapping[str, int],
    seed_sd: float,
) -> float:
    """Returns the seed noise on the report documents, as a multiple of that on those at hand.

    What a seed does to single answers averages out over more documents; what it does to all of
    them does not. The first is the variance over the documents of what is left of an answer once
    the means of its allocation and of its seed are taken out.

    Args:
        scores: Scores with values per document, by allocation and seed, two of each at least.
        metric: The metric of the verdict.
        weights: Weight per task.
        report_documents: Documents of the final comparison by task.
        seed_sd: Residual sd of a fine-tune on the documents at hand.
    """
    if not seed_sd:
        return 1.0
    here = there = 0.0
    for task, share in task_shares(weights).items():
        values = _table(scores, task, metric)
        n, k, count = values.shape
        if count == 1:  # shows no variance
            continue
        rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean((0, 1))
        single = float(rest.var(axis=2, ddof=1).sum()) / ((n - 1) * (k - 1))
        here += share**2 * single / count
        there += share**2 * single / report_documents[task]
    return math.sqrt((max(0.0, seed_sd**2 - here) + there) / seed_sd**2)


def _table(scores: Sequence[Sequence[Score]], task: str, metric: str) -> Array:
    """Returns values by allocation, seed and document."""
    return np.array([[s.tasks[task].per_document[metric] for s in row] for row in scores])


def _shown(df: int, count: int) -> Array:
    """Returns quantiles of a variance of 1 as it shows with so many degrees of freedom."""
    return np.asarray(special.chdtri(df, (np.arange(count) + 0.5) / count) / df)


def _check_sd(value: float) -> None:
    if not 0 <= value < math.inf:
        raise ConfigError(f"The standard deviation {value} must be finite and 0 or more.")


def _normal_maximum(count: int) -> float:
    """Returns the expected largest of some independent standard normal numbers."""

    def above(x: float) -> float:  # P(maximum > x) - P(maximum < -x)
        return -math.expm1(count * special.log_ndtr(x)) - math.exp(count * special.log_ndtr(-x))

    # No more than 9 beyond the typical maximum, where nothing of weight is left.
    return max(0.0, float(integrate.quad(above, 0.0, math.sqrt(2 * math.log(count)) + 9)[0]))


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
