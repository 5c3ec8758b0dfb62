"""How sure the difference of any two models is: a paired bootstrap over documents and seeds.

`rankadaptor_plugin.verdict.statistics.compare` needs equal seeds and gives one interval. Here the
models may come from different runs, with other seeds or none, and many pairs may be compared at
once.

The estimate is linear in both weights, those of the documents and those of the seeds. So a resample
is the estimate plus two deviations that are drawn on their own:

* Documents are drawn with replacement within each task, from the differences of the means over the
  seeds. Both models see the same draw, which takes out what makes a document hard for both.
* Seeds are drawn with replacement from the means over all tasks, jointly where both models have the
  same seeds, else for each model on its own.

Drawing rows and columns of the same table at once (the pigeonhole bootstrap, Owen 2007, Annals of
Applied Statistics 1:386) would count what is particular to a seed *and* a document three times; the
two deviations count it twice, as `statistics` does. The interval is rather too wide than too
narrow.

Few values. The variance of a mean of n values drawn with replacement is (n - 1) / n times the
unbiased s^2 / n, because the values deviate less from their own mean than from the true one. Each
deviation is therefore scaled by sqrt(n / (n - 1)). For seeds, of which there are few, s itself is a
guess too: their deviation is also divided by sqrt(chi2 / (n - 1)), with chi2 drawn anew from n - 1
degrees of freedom, which turns a normal deviation into Student's t. Without it the type-I error at
5 seeds is twice what it should be. Together the factor is sqrt(n / chi2).

Intervals are percentiles of the resamples. BCa corrects skewness, of which the mean of hundreds of
documents has next to none, and its acceleration is not defined for two sources of chance.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.verdict.pairing import Seeds, paired_values, seeds_to_compare

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rankadaptor_plugin.verdict.pairing import Model

_Floats = NDArray[np.float64]
_BLOCK = 2**18  # draws at a time: 2 MiB each of positions and values, which stay in the cache
_ROUNDING = 1e-12  # share of the largest difference below which a resample counts as zero


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of two models, the first minus the second.

    Attributes:
        estimate: Weighted mean difference over the tasks, in the metric's unit (accuracy: in
            [-1, 1]).
        low: Lower end of the interval, of this pair alone: not widened for the number of pairs.
        high: Upper end of it.
        confidence: Confidence of the interval and of the verdict, in (0, 1).
        p: Two-sided p-value of no difference, in (0, 1].
        p_adjusted: The same by Holm's method over all pairs that were compared together.
        seeds: The seeds.
        documents: Number of documents of all tasks together that both models have.
        left_out: Number of documents that only one of both has.
    """

    estimate: float
    low: float
    high: float
    confidence: float
    p: float
    p_adjusted: float
    seeds: Seeds
    documents: int
    left_out: int

    @property
    def is_gain(self) -> bool:
        """Whether the first model is better, corrected for the number of pairs."""
        return self.estimate > 0 and self.p_adjusted <= 1 - self.confidence

    @property
    def is_loss(self) -> bool:
        """Whether the second model is better, corrected for the number of pairs."""
        return self.estimate < 0 and self.p_adjusted <= 1 - self.confidence

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {**asdict(self), "is_gain": self.is_gain, "is_loss": self.is_loss}


def compare_pairs(
    pairs: Sequence[tuple[Model, Model]],
    weights: Mapping[str, float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Difference]:
    """Compares the two models of each pair, and corrects the p-values for the number of pairs.

    Args:
        pairs: Models to compare. Documents are paired by key within a task, and where a key comes
            more than once in order of appearance.
        weights: Weight per task; tasks left out weigh nothing.
        confidence: Confidence of the intervals and of the verdicts, in (0, 1).
        resamples: Number of resamples, B; no p-value is below 2 / (1 + B).
        seed: Seed of the draws; the result of a pair does not depend on the other pairs.

    Raises:
        ConfigError: If so few resamples could show no difference between so many pairs.
        OracleError: If a task is absent or has fewer than 2 documents in common, values are not
            finite, or no weight is above 0.
    """
    needed = int(np.ceil(2 * len(pairs) / (1 - confidence)))
    if resamples < needed:
        raise ConfigError(
            f"{resamples} resamples cannot show a difference between any of {len(pairs)} pairs at "
            f"confidence {confidence:g}. Use at least {needed}, or compare fewer models."
        )
    shares = _shares(weights)
    found = [_difference(*pair, shares, confidence, resamples, seed) for pair in pairs]
    adjusted = holm([difference.p for difference in found])
    return [replace(d, p_adjusted=p) for d, p in zip(found, adjusted, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values that hold for all comparisons together, by Holm's step-down method.

    The k-th smallest of m is multiplied by m - k + 1, and none may be below a smaller one's. The
    chance of any false finding is then as asked for, however the comparisons depend on each other.
    """
    order = np.argsort(p_values, kind="stable")
    ranked = np.asarray(p_values, dtype=np.float64)[order]
    stepped = np.maximum.accumulate(ranked * np.arange(len(ranked), 0, -1))
    adjusted = np.empty_like(ranked)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(p) for p in adjusted]


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Returns the weights above zero, scaled to a sum of 1, in an order of their own."""
    total = math.fsum(weights.values())  # the same in any order
    if min(weights.values(), default=0.0) < 0 or not total > 0:
        raise OracleError(
            f"The task weights {dict(weights)} must be 0 or more, one of them above 0. Change them."
        )
    return {task: weights[task] / total for task in sorted(weights) if weights[task] > 0}


def _difference(
    first: Model,
    second: Model,
    shares: Mapping[str, float],
    confidence: float,
    resamples: int,
    seed: int,
) -> Difference:
    """Compares two models; the adjusted p-value is that of this pair alone."""
    seeds, used = seeds_to_compare(first, second)
    generator = np.random.default_rng(seed)
    estimate, documents, left_out, largest = 0.0, 0, 0, 0.0
    deviations = np.zeros(resamples)
    seed_means = [np.zeros(len(group)) for group in used]  # (S,) of each model, over the tasks
    for task, share in shares.items():
        values, missing = paired_values(task, (first, second), used)
        by_document = values[0].mean(axis=0) - values[1].mean(axis=0)
        estimate += share * float(by_document.mean())
        deviations += share * _document_deviations(by_document, resamples, generator)
        for means, rows, sign in zip(seed_means, values, (1, -1), strict=True):
            means += sign * share * rows.mean(axis=1)
        documents += len(by_document)
        left_out += missing
        largest = max(largest, float(np.abs(by_document).max()))
    if seeds.paired:
        seed_means = [seed_means[0] + seed_means[1]]
    elif str(used[0]) > str(used[1]):  # the draws shall not depend on which model is called first
        seed_means.reverse()
    for means in seed_means:
        deviations += _seed_deviations(means, resamples, generator)
    drawn = estimate + deviations
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    # What is zero but for rounding speaks for neither side.
    rounding = _ROUNDING * largest
    fewer = min(np.count_nonzero(drawn <= rounding), np.count_nonzero(drawn >= -rounding))
    p = min(1.0, 2 * (1 + int(fewer)) / (1 + resamples))
    return Difference(
        estimate=estimate,
        low=float(low),
        high=float(high),
        confidence=confidence,
        p=p,
        p_adjusted=p,
        seeds=seeds,
        documents=documents,
        left_out=left_out,
    )


def _document_deviations(
    values: _Floats, resamples: int, generator: np.random.Generator
) -> _Floats:
    """Draws J documents with replacement, shape (J,), B times.

    Returns:
        How far the mean of each draw is from the mean of all, shape (B,), scaled for few values.
    """
    count = len(values)
    centred = values - values.mean()
    out = np.empty(resamples)
    rows = max(1, _BLOCK // count)
    for begin in range(0, resamples, rows):
        part = out[begin : begin + rows]
        part[:] = centred[generator.integers(count, size=(len(part), count))].mean(axis=1)
    return out * math.sqrt(count / (count - 1))


def _seed_deviations(means: _Floats, resamples: int, generator: np.random.Generator) -> _Floats:
    """Draws S seeds with replacement from their means, shape (S,), B times.

    Returns:
        How far the mean of each draw is from the mean of all, shape (B,), scaled as the module
        says; zeros for a single seed, which shows nothing of how seeds differ.
    """
    count = len(means)
    if count == 1:
        return np.zeros(resamples)
    centred = means - means.mean()
    drawn: _Floats = centred[generator.integers(count, size=(resamples, count))].mean(axis=1)
    return drawn * np.sqrt(count / generator.chisquare(count - 1, size=resamples))
