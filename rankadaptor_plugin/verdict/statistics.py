"""How sure a score or a difference of scores is, with seeds and documents both random.

A recovered model depends on the seed of its fine-tune, and a score on the documents that happened
to be asked. Two allocations that were fine-tuned with the same seeds and scored on the same
documents are compared pair by pair, which takes out what both share.

The standard error adds both sources, for values ``x[s, j]`` of seed s and document j::

    se^2 = var_s(mean of seed s) / S + sum over tasks of w^2 var_j(mean of document j) / J

Part of what differs between seeds and documents is the chance of that one pair. It is contained
in both terms, so it is counted twice and the interval is rather too wide than too narrow. Degrees
of freedom follow Welch and Satterthwaite.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from rankadaptor_plugin.core.errors import ConfigError, OracleError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rankadaptor_plugin.core.scores import Score

Values = NDArray[np.float64]  # (S, J): one value per seed and document of a task


@dataclass(frozen=True)
class Interval:
    """The mean score of one model and how far it may be off.

    Attributes:
        mean: Weighted mean over the tasks, in the unit of the metric.
        half_width: The interval is ``mean`` +- this; infinite where a task has one document.
        stderr: Standard error of the mean.
        confidence: Confidence of the interval, in (0, 1).
        seeds: Number of seeds, S; with one the interval covers the choice of documents only.
        documents: Number of documents of all tasks together.
    """

    mean: float
    half_width: float
    stderr: float
    confidence: float
    seeds: int
    documents: int

    def to_json(self) -> dict[str, float | None]:
        """Returns the table cell: mean and half width, None where the half width is infinite."""
        return {"mean": self.mean, "half_width": _finite(self.half_width)}


@dataclass(frozen=True)
class Comparison:
    """The paired difference of two recovered models, the first minus the second.

    Attributes:
        estimate: Weighted mean difference, in the unit of the metric (accuracy: in [-1, 1]).
        half_width: Half the width of the interval; infinite where a task has one document.
        low: Lower end of the interval.
        high: Upper end of the interval.
        stderr: Standard error of the estimate.
        confidence: Confidence of the interval, in (0, 1).
        seeds: Number of seeds, S.
        documents: Number of documents of all tasks together.
    """

    estimate: float
    half_width: float
    low: float
    high: float
    stderr: float
    confidence: float
    seeds: int
    documents: int

    @property
    def is_gain(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0

    @property
    def is_loss(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.high < 0

    def to_json(self) -> dict[str, float | None]:
        """Returns plain values, None in place of what is infinite."""
        return {name: _finite(value) for name, value in asdict(self).items()}


def compare(
    first: Sequence[Score],
    second: Sequence[Score],
    metric: str,
    weights: Mapping[str, float] | None = None,
    *,
    confidence: float = 0.95,
) -> Comparison:
    """Compares two models that were fine-tuned with the same seeds, document by document.

    Args:
        first: One score with per-document values for each of S seeds, at least two.
        second: The same for the model to compare with, seeds and documents in the same order.
        metric: One of `rankadaptor_plugin.core.scores.METRICS`.
        weights: Weight per task; tasks left out weigh nothing. Equal weights if None.
        confidence: Confidence of the interval, in (0, 1).

    Returns:
        The difference first minus second. With no variance at all the half width is 0.

    Raises:
        ConfigError: With fewer than two seeds, which say nothing of what a seed changes.
        OracleError: If the scores do not pair up, or values are absent or not finite.
    """
    if len(first) != len(second):
        raise OracleError(
            f"{len(first)} scores cannot be paired with {len(second)}. Use the same seeds for both."
        )
    if len(first) < 2:  # noqa: PLR2004  (a variance takes two)
        raise ConfigError(
            f"A comparison takes at least 2 seeds, not {len(first)}. Raise [confirm] seeds."
        )
    shares = _shares(first, weights)
    differences = []
    for task in shares:
        ours, theirs = _values(first, task, metric), _values(second, task, metric)
        if ours.shape != theirs.shape:
            raise OracleError(
                f"Task {task} has {ours.shape[1]} documents for one model and {theirs.shape[1]} "
                "for the other. Score both on the same documents."
            )
        differences.append(ours - theirs)
    estimate, half_width, stderr = _interval(differences, list(shares.values()), confidence)
    low, high = estimate - half_width, estimate + half_width
    documents = sum(d.shape[1] for d in differences)
    return Comparison(estimate, half_width, low, high, stderr, confidence, len(first), documents)


def interval_of_mean(
    scores: Sequence[Score],
    metric: str,
    weights: Mapping[str, float] | None = None,
    *,
    confidence: float = 0.95,
) -> Interval:
    """Returns the mean score of one model with its interval.

    Args:
        scores: One score with per-document values per seed. A single one, as for the base and
            the pruned model, gives an interval over documents only.
        metric: One of `rankadaptor_plugin.core.scores.METRICS`.
        weights: Weight per task, such as ``{task: 1.0}`` for one task; tasks left out weigh
            nothing. Equal weights if None.
        confidence: Confidence of the interval, in (0, 1).

    Raises:
        OracleError: If there is no score, or values are absent or not finite.
    """
    shares = _shares(scores, weights)
    values = [_values(scores, task, metric) for task in shares]
    mean, half_width, stderr = _interval(values, list(shares.values()), confidence)
    documents = sum(v.shape[1] for v in values)
    return Interval(mean, half_width, stderr, confidence, len(scores), documents)


def score_cells(
    scores: Sequence[Score],
    metrics: Sequence[str],
    weights: Mapping[str, float] | None = None,
    *,
    confidence: float = 0.95,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Returns the report's column of one model: task, then metric, to mean and half width.

    The weighted mean over the tasks stands under ``mean``; tasks without weight are listed too.
    Arguments and errors are those of `interval_of_mean`.
    """
    rows: dict[str, Mapping[str, float] | None] = {t: {t: 1.0} for s in scores[:1] for t in s.tasks}
    rows["mean"] = weights
    return {
        row: {m: interval_of_mean(scores, m, w, confidence=confidence).to_json() for m in metrics}
        for row, w in rows.items()
    }


def _shares(scores: Sequence[Score], weights: Mapping[str, float] | None) -> dict[str, float]:
    """Returns the weights above zero, scaled to a sum of 1."""
    if not scores:
        raise OracleError("There is no score to take a mean of. Evaluate at least one model.")
    given = dict.fromkeys(scores[0].tasks, 1.0) if weights is None else dict(weights)
    total = sum(given.values())
    if min(given.values(), default=0.0) < 0 or not total > 0:
        raise OracleError(
            f"The task weights {given} must be 0 or more, one of them above 0. Change them."
        )
    return {task: weight / total for task, weight in given.items() if weight > 0}


def _values(scores: Sequence[Score], task: str, metric: str) -> Values:
    """Returns the values of one task, shape (S, J)."""
    rows = [s.tasks[task].per_document.get(metric, []) if task in s.tasks else [] for s in scores]
    counts = sorted({len(row) for row in rows})
    if len(counts) > 1 or counts[0] == 0:
        raise OracleError(
            f"Task {task} has {counts} per-document values of {metric}, by seed; needed is the "
            "same number, above 0, for all. Keep the per-document values."
        )
    values = np.asarray(rows, dtype=np.float64)
    if not np.isfinite(values).all():
        raise OracleError(f"Task {task} has values of {metric} that are not finite numbers.")
    return values


def _interval(
    values: Sequence[Values], shares: Sequence[float], confidence: float
) -> tuple[float, float, float]:
    """Returns estimate, half width and standard error of values (S, J) per task."""
    seed_means = sum(w * v.mean(axis=1) for w, v in zip(shares, values, strict=True))
    estimate = float(np.mean(seed_means))
    # One document shows nothing of how documents differ: no finite interval would be honest.
    if any(v.shape[1] == 1 for v in values):
        return estimate, math.inf, math.inf
    parts = [  # (variance of the mean, degrees of freedom)
        (w * w * float(v.mean(axis=0).var(ddof=1)) / v.shape[1], v.shape[1] - 1)
        for w, v in zip(shares, values, strict=True)
    ]
    seeds = values[0].shape[0]
    if seeds > 1:
        parts.append((float(np.var(seed_means, ddof=1)) / seeds, seeds - 1))
    variance = sum(part for part, _ in parts)
    # Each part is divided by the total first: squares of tiny variances underflow to zero.
    spread = sum((part / variance) ** 2 / df for part, df in parts) if variance > 0 else 0.0
    stderr = math.sqrt(variance)
    if spread == 0:
        return estimate, 0.0, 0.0
    quantile = float(student.ppf((1 + confidence) / 2, 1 / spread))
    return estimate, quantile * stderr, stderr


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
