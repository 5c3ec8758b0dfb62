"""Differences of two models and means of one, with intervals over seeds and documents.

The one statistical procedure of the package: the verdict of a run and the command ``compare`` both
ask `compare`, so they cannot disagree.

A fine-tuned model depends on the seed of its fine-tune, and a score on the documents that happened
to be asked. Documents are paired by key within a task. Seeds are paired where both models have the
same ones; otherwise those of each model stand alone. An interval adds what seeds and what documents
leave open, each at its own quantile of Student's t, after W. G. Howe, JASA 69 (1974), 789::

    h^2 = t_seeds^2 v_seeds + t_documents^2 v_documents

with a term ``t^2 v`` for the seeds of each model where they are not paired. The chance of a single
pair of seed and document is contained in both variances and taken out of the second; where few
seeds agree by luck, the interval is still no narrower than that chance makes it. In a race, in
which several models have the same seeds, what seeds leave open is the larger of what the two models
show and what all models show, at the degrees of freedom of all (a randomized block design): two
models with a handful of seeds say little of a variance, and a model that seeds change more than
others still gets its due. Intervals that
hold for several comparisons together share the error rate out among them (Bonferroni), and end
where the metric does. Error rates and power: ``benchmarks/comparison_errors.py``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import stdtrit

from rankadaptor_plugin.core.errors import OracleError
from rankadaptor_plugin.core.scores import bounds

if TYPE_CHECKING:
    from rankadaptor_plugin.core.scores import Score

Values = NDArray[np.float64]  # (S, J): one value per seed and document of a task

Documents = Mapping[str, tuple[Sequence[str], Sequence[float] | NDArray[np.float64]]]
"""By task: the keys of the J documents, and one value for each."""

Model = Mapping[int | None, Documents]
"""Documents by seed; the one key None for a model that no seed changes, such as the base."""

LEAST_SEEDS = 3
"""Fewest fine-tunes of a model about which there is a verdict."""

_SMALLEST = 1e-16  # no p-value is smaller
_ROUNDING = 1e-12  # share of the largest value below which a difference counts as zero


@dataclass(frozen=True)
class Seeds:
    """The seeds behind a difference.

    Attributes:
        first: Number of seeds of the first model; 0 for a model that no seed changes.
        second: The same of the second model.
        paired: True if they are the same seeds.
        left_out: Number of seeds that only one of both models has, while others are paired.
    """

    first: int
    second: int
    paired: bool
    left_out: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of two models, the first minus the second.

    Attributes:
        estimate: Weighted mean difference over the tasks, in the metric's unit (accuracy: in
            [-1, 1]).
        low: Lower end of the interval, which holds for all comparisons together; no lower than the
            metric can differ.
        high: Upper end of it.
        half_width: Half the width of the interval before it is cut to what is possible; infinite
            where a task has one document.
        confidence: Confidence of the intervals of all comparisons together, in (0, 1).
        comparisons: Number of comparisons that the interval and the verdict are corrected for.
        p: Two-sided p-value of no difference, of this comparison alone, in (0, 1].
        p_adjusted: The same corrected for the number of comparisons.
        seeds: The seeds.
        documents: Number of documents of all tasks together that both models have.
        left_out: Number of documents that only one of both has.
    """

    estimate: float
    low: float
    high: float
    half_width: float
    confidence: float
    comparisons: int
    p: float
    p_adjusted: float
    seeds: Seeds
    documents: int
    left_out: int

    @property
    def has_verdict(self) -> bool:
        """True if each model was fine-tuned with enough seeds, or is one that no seed changes."""
        return not {self.seeds.first, self.seeds.second} & set(range(1, LEAST_SEEDS))

    @property
    def is_gain(self) -> bool:
        """True if the whole interval lies above zero."""
        return self.has_verdict and self.estimate > self.half_width

    @property
    def is_loss(self) -> bool:
        """True if the whole interval lies below zero."""
        return self.has_verdict and -self.estimate > self.half_width

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, None in place of what is infinite."""
        plain = {name: _finite(value) for name, value in asdict(self).items()}
        verdict = {name: getattr(self, name) for name in ("has_verdict", "is_gain", "is_loss")}
        return plain | verdict


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The mean score of one model and its interval.

    Attributes:
        mean: Weighted mean over the tasks, in the unit of the metric.
        low: Lower end of the interval, no lower than the metric can be.
        high: Upper end of it.
        half_width: Half the width of the interval before it is cut to what is possible; infinite
            where a task has one document.
    """

    mean: float
    low: float
    high: float
    half_width: float

    def to_json(self) -> dict[str, float | None]:
        """Returns the table cell, None in place of what is infinite."""
        return {name: _finite(value) for name, value in asdict(self).items()}


def model_of(scores: Mapping[int, Score], metric: str) -> Model:
    """Returns the values of a metric by document, of one model's scores by seed."""
    return {
        seed: {
            name: (task.keys or [str(i) for i in range(task.documents)], task.per_document[metric])
            for name, task in score.tasks.items()
            if metric in task.per_document
        }
        for seed, score in scores.items()
    }


def compare(
    first: Model,
    second: Model,
    metric: str,
    weights: Mapping[str, float],
    *,
    confidence: float = 0.95,
    comparisons: int = 1,
    race: Sequence[Model] = (),
) -> Difference:
    """Compares two models, document by document and, where they share seeds, seed by seed.

    A model that no seed changes, such as the base, adds nothing to what seeds leave open. One that
    was fine-tuned with fewer than `LEAST_SEEDS` seeds has an interval, but no verdict; with a
    single seed the interval leaves out what another seed would change.

    Args:
        first: One model. Where a document's key comes more than once in a task, its documents are
            paired in order of appearance.
        second: The model to compare it with.
        metric: Name of the metric, whose bounds the interval keeps.
        weights: Weight per task; tasks left out weigh nothing.
        confidence: Confidence of all comparisons together, in (0, 1).
        comparisons: Number of comparisons that are looked at together, this one included.
        race: All models that were fine-tuned with the same seeds, these two included; what seeds
            do to all of them is told better than what they do to two.

    Raises:
        OracleError: If a task is absent or has no documents in common, values are not finite, or
            no weight is above 0.
    """
    shares = task_shares(weights)
    seeds, used = _common_seeds(first, second)
    sides: list[list[Values]] = [[], []]
    left_out = 0
    for task in shares:
        groups = [[m[s] for s in seeds] for m, seeds in zip((first, second), used, strict=True)]
        (ours, theirs), missing = _aligned(task, groups)
        left_out += missing
        sides[0].append(ours)
        sides[1].append(-theirs)
    tables = [[a + b for a, b in zip(*sides, strict=True)]] if seeds.paired else sides
    evidence = _Evidence.of(tables, list(shares.values()))
    if seeds.paired and seeds.first > 1 and race:
        evidence = evidence.steadied(_seed_variance(race, used[0], shares))
    half_width = evidence.half_width((1 - confidence) / comparisons)
    lowest, highest = bounds(metric)
    p = evidence.p_value()
    return Difference(
        estimate=evidence.estimate,
        low=max(lowest - highest, evidence.estimate - half_width),
        high=min(highest - lowest, evidence.estimate + half_width),
        half_width=half_width,
        confidence=confidence,
        comparisons=comparisons,
        p=p,
        p_adjusted=min(1.0, comparisons * p),
        seeds=seeds,
        documents=evidence.documents,
        left_out=left_out,
    )


def mean_interval(
    model: Model, metric: str, weights: Mapping[str, float], *, confidence: float = 0.95
) -> Interval:
    """Returns the mean score of one model with its interval.

    With one seed, or none, the interval covers the choice of documents only. Arguments and errors
    are those of `compare`.
    """
    shares = task_shares(weights)
    tables = [_aligned(task, [list(model.values())])[0][0] for task in shares]
    evidence = _Evidence.of([tables], list(shares.values()))
    half_width = evidence.half_width(1 - confidence)
    lowest, highest = bounds(metric)
    return Interval(
        mean=evidence.estimate,
        low=max(lowest, evidence.estimate - half_width),
        high=min(highest, evidence.estimate + half_width),
        half_width=half_width,
    )


def score_cells(
    scores: Sequence[Score],
    metrics: Sequence[str],
    weights: Mapping[str, float],
    *,
    confidence: float = 0.95,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Returns the report's column of one model: task, then metric, to mean and interval.

    The weighted mean over the tasks stands under ``mean``; tasks without weight are listed too.

    Args:
        scores: One score with per-document values per seed, at least one.
        metrics: The metrics.
        weights: Weight per task.
        confidence: Confidence of the intervals, in (0, 1).

    Raises:
        OracleError: If values are absent or not finite, or no weight is above 0.
    """
    models = {metric: model_of(dict(enumerate(scores)), metric) for metric in metrics}
    rows: dict[str, Mapping[str, float]] = {t: {t: 1.0} for s in scores[:1] for t in s.tasks}
    rows["mean"] = weights
    return {
        row: {
            m: mean_interval(model, m, w, confidence=confidence).to_json()
            for m, model in models.items()
        }
        for row, w in rows.items()
    }


def task_shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Returns the weights above zero, scaled to a sum of 1, in the order of the tasks' names.

    Raises:
        OracleError: If a weight is below 0, or none is above it.
    """
    total = math.fsum(weights.values())  # the same in any order
    if min(weights.values(), default=0.0) < 0 or not total > 0:
        raise OracleError(
            f"The task weights {dict(weights)} must be 0 or more, one of them above 0. Change them."
        )
    return {task: weights[task] / total for task in sorted(weights) if weights[task] > 0}


@dataclass(frozen=True, kw_only=True)
class _Evidence:
    """An estimate and the variances of it, each with its degrees of freedom."""

    estimate: float
    documents: int
    by_seed: tuple[tuple[float, float], ...]
    by_document: tuple[float, float]  # infinite where a task has a single document
    by_chance: tuple[float, float]

    @classmethod
    def of(cls, sides: Sequence[Sequence[Values]], shares: Sequence[float]) -> _Evidence:
        """Takes values (S, J) by side and task; the estimate is the sum of the sides' means."""
        seed_means = [
            np.sum([w * v.mean(axis=1) for w, v in zip(shares, tables, strict=True)], axis=0)
            for tables in sides
        ]
        estimate = float(sum(means.mean() for means in seed_means))
        parts, chances, pairs = [], [], 0
        for share, tables in zip(shares, zip(*sides, strict=True), strict=True):
            count = tables[0].shape[1]
            chance = sum(_chance(values) for values in tables)
            by_document = np.sum([values.mean(axis=0) for values in tables], axis=0)
            variance = math.inf if count == 1 else float(by_document.var(ddof=1)) / count - chance
            parts.append((share * share * max(0.0, variance), count - 1))
            chances.append(share * share * chance)
            pairs += sum((len(values) - 1) * (count - 1) for values in tables)
        total = sum(part for part, _ in parts)
        # Each part is divided by the total first: squares of tiny variances underflow to zero.
        spread = sum((p / total) ** 2 / df for p, df in parts) if 0 < total < math.inf else 0.0
        largest = max(float(np.abs(values).max()) for tables in sides for values in tables)
        return cls(
            estimate=0.0 if abs(estimate) <= _ROUNDING * largest else estimate,
            documents=sum(values.shape[1] for values in sides[0]),
            by_seed=tuple(
                (float(means.var(ddof=1)) / len(means), len(means) - 1.0)
                for means in seed_means
                if len(means) > 1
            ),
            by_document=(total, 1 / spread if spread else 1.0),
            by_chance=(sum(chances), float(pairs)),
        )

    def steadied(self, variance: tuple[float, float]) -> _Evidence:
        """Returns the same with what the seeds of a whole race leave open, if that is no less."""
        ((own, _),), (whole, freedom) = self.by_seed, variance
        return replace(self, by_seed=((max(own, whole), freedom),))

    def half_width(self, error_rate: float) -> float:
        """Returns half the width of the two-sided interval with an error rate, in (0, 1]."""
        total, freedom = self.by_document
        if math.isinf(total):  # one document shows nothing of how documents differ
            return math.inf

        def square(variance: float, freedom: float) -> float:
            quantile = float(stdtrit(freedom, error_rate / 2))
            return quantile * quantile * variance

        both = sum(square(v, df) for v, df in self.by_seed) + square(total, freedom)
        chance, pairs = self.by_chance
        least = square(total + chance, pairs) if pairs else 0.0
        return math.sqrt(max(both, least))

    def p_value(self) -> float:
        """Returns the error rate at which the interval just reaches zero."""
        size = abs(self.estimate)
        if size == 0 or math.isinf(self.half_width(1.0)):
            return 1.0
        if self.half_width(_SMALLEST) < size:
            return _SMALLEST
        log_rate = brentq(
            lambda x: self.half_width(math.exp(x)) - size, math.log(_SMALLEST), 0.0, rtol=1e-12
        )
        return math.exp(log_rate)


def _seed_variance(
    race: Sequence[Model], seeds: Sequence[int | None], shares: Mapping[str, float]
) -> tuple[float, float]:
    """Returns the variance of a mean paired difference that seeds make, and its freedom.

    From what is left of each model's mean with each seed once the means of the model and of the
    seed are taken out.
    """
    means: Any = 0.0
    for task, share in shares.items():
        tables, _ = _aligned(task, [[model[seed] for seed in seeds] for model in race])
        means = means + share * np.array([values.mean(axis=1) for values in tables])
    rest = means - means.mean(0) - means.mean(1, keepdims=True) + means.mean()
    rest[np.abs(rest) <= _ROUNDING * np.abs(means).max()] = 0.0
    freedom = float((len(race) - 1) * (len(seeds) - 1))
    return 2 * float(np.square(rest).sum()) / freedom / len(seeds), freedom


def _chance(values: Values) -> float:
    """Returns the part of the variance of the mean from single pairs of seed and document."""
    seeds, documents = values.shape
    if min(seeds, documents) == 1:
        return 0.0
    rest = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    chance = np.square(rest).sum() / ((seeds - 1) * (documents - 1))
    return float(chance) / len(values) / len(values[0])


def _common_seeds(
    first: Model, second: Model
) -> tuple[Seeds, tuple[list[int | None], list[int | None]]]:
    """Chooses the seeds to compare.

    Those that both have are paired if they are enough for a verdict, or neither model has others.

    Returns:
        What is said of them, and the seeds of each model; where they are paired, the same twice.
    """
    for model in (first, second):
        if not model or (None in model and len(model) > 1):
            raise OracleError(
                f"A model has the seeds {list(model)}; give one or more numbers, or None alone."
            )
    common = _in_order(seed for seed in first if seed is not None and seed in second)
    if len(common) >= LEAST_SEEDS or (common and first.keys() == second.keys()):
        alone = len(first.keys() ^ second.keys())
        return Seeds(len(common), len(common), paired=True, left_out=alone), (common, common)
    used = (_in_order(first), _in_order(second))
    first_count, second_count = (0 if None in seeds else len(seeds) for seeds in used)
    return Seeds(first_count, second_count, paired=False, left_out=0), used


def _in_order(seeds: Iterable[int | None]) -> list[int | None]:
    return sorted(seeds, key=lambda seed: -1 if seed is None else seed)


def _aligned(task: str, groups: Sequence[Sequence[Documents]]) -> tuple[list[Values], int]:
    """Brings the values of a task into one order of documents.

    Args:
        task: Name of the task.
        groups: The scores of each model, by seed.

    Returns:
        The values of each model, shape (S, J) with its own S, and the number of documents that
        only some of the scores have.

    Raises:
        OracleError: If the task is absent, no document is common, or values are not finite.
    """
    places: list[tuple[list[str], dict[tuple[str, int], int]]] = []  # of each list that differs
    scores = [[_named(documents, task, places) for documents in group] for group in groups]
    names = [set(place) for _, place in places]
    common = sorted(set.intersection(*names))
    left_out = len(set.union(*names)) - len(common)
    if not common or (left_out and len(common) == 1):
        raise OracleError(
            f"The models have {len(common)} documents of task {task} in common, and {left_out} "
            "that only one of them has; at least 2 are needed. Give both runs the same seed and "
            "numbers of documents: they then split a task alike."
        )
    order = {id(place): [place[name] for name in common] for _, place in places}
    values = [np.stack([column[order[id(place)]] for column, place in group]) for group in scores]
    if not all(np.isfinite(rows).all() for rows in values):
        raise OracleError(f"Task {task} has values that are not finite numbers. Evaluate it again.")
    return values, left_out


def _named(
    documents: Documents, task: str, places: list[tuple[list[str], dict[tuple[str, int], int]]]
) -> tuple[NDArray[np.float64], dict[tuple[str, int], int]]:
    """Returns the values of a task, and positions by key and by how often it came before.

    Args:
        documents: The documents of a score.
        task: Name of the task.
        places: Positions for each list of keys met so far; a new one is added.
    """
    if task not in documents:
        raise OracleError(
            f"Task {task} is absent from a model, which has {', '.join(documents) or 'none'}. "
            "Compare tasks that both have, and keep the per-document values."
        )
    keys, values = list(documents[task][0]), np.asarray(documents[task][1], dtype=np.float64)
    if len(keys) != len(values):
        raise OracleError(
            f"Task {task} has {len(keys)} keys for {len(values)} values. Give one for each."
        )
    for earlier, place in places:
        if earlier == keys:
            return values, place
    before: Counter[str] = Counter()
    place = {}
    for position, key in enumerate(keys):
        place[key, before[key]] = position
        before[key] += 1
    places.append((keys, place))
    return values, place


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
