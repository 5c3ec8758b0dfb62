"""Scores of a model: values per task and metric, and per document where needed.

Metrics, all "higher is better"; ``ll[c]`` is the log-likelihood of choice c in nats, in the first
two scores after accuracy per byte of its text in UTF-8 where lm-eval offers `acc_norm` for the
task. Several right choices count together in `choice_logprob`, and by the likeliest of them in the
other two:
    accuracy: Share of documents answered correctly, in [0, 1]; `acc` or `acc_norm` of lm-eval,
        fixed per task.
    choice_logprob: Mean log-probability of the right choice among the choices, in nats, at most 0:
        ``ll[gold] - logsumexp(ll)``.
    margin: Mean of ``ll[gold] - max(ll[wrong])``, in nats.
    gold_logprob: Mean log-likelihood of the right choice per byte, in nats per byte, at most 0.
    log_likelihood: Mean log-likelihood of a token of running text, in nats per token, at most 0;
        perplexity is ``exp(-log_likelihood)``.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rankadaptor_plugin.core.errors import OracleError
from rankadaptor_plugin.core.registry import suggestion

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

METRICS = ("accuracy", "choice_logprob", "margin", "gold_logprob")
"""Metrics of multiple-choice tasks."""

LOG_LIKELIHOOD = "log_likelihood"
"""The metric of running text."""


def document_key(content: str) -> str:
    """Returns a name of a document, 16 hexadecimal digits, that depends on its content alone."""
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The scores of one task on one set of documents.

    Attributes:
        values: Mean over the documents, by metric name.
        stderr: Standard error of that mean over the documents, by metric name.
        documents: Number of documents scored.
        accuracy_metric: The lm-eval metric behind `accuracy`: ``acc`` or ``acc_norm``.
        per_document: Values by metric name, one per document in the order of the document ids;
            empty where only means are kept.
        keys: Names of these documents that stay the same from run to run, for pairing; a hash of
            the content where there is one.
    """

    values: dict[str, float]
    stderr: dict[str, float]
    documents: int
    accuracy_metric: str = "acc"
    per_document: dict[str, list[float]] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        per_document: Mapping[str, Sequence[float]],
        *,
        keys: Sequence[str] = (),
        accuracy_metric: str = "acc",
    ) -> TaskScore:
        """Builds the score of a task from its values per document, by metric name.

        Raises:
            OracleError: If there is no document, or the metrics have different numbers of them.
        """
        counts = {metric: len(values) for metric, values in per_document.items()}
        if not counts or len({*counts.values()}) > 1 or 0 in counts.values():
            raise OracleError(
                f"A score has {counts} values by metric; needed is one per document for each "
                "metric, and at least one document. Correct the oracle."
            )
        count = next(iter(counts.values()))
        return cls(
            values={metric: float(np.mean(v)) for metric, v in per_document.items()},
            stderr={
                metric: float(np.std(v, ddof=1)) / math.sqrt(count) if count > 1 else 0.0
                for metric, v in per_document.items()
            },
            documents=count,
            accuracy_metric=accuracy_metric,
            per_document={metric: list(values) for metric, values in per_document.items()},
            keys=list(keys),
        )

    def is_finite(self) -> bool:
        """True if every mean is a finite number."""
        return all(math.isfinite(value) for value in self.values.values())


@dataclass(frozen=True, kw_only=True)
class Score:
    """The scores of one model on several tasks."""

    tasks: dict[str, TaskScore]

    def mean(self, metric: str, weights: Mapping[str, float] | None = None) -> float:
        """Returns the weighted mean of a metric over the tasks.

        Args:
            metric: Name of a metric that every task has.
            weights: Weight per task; tasks left out weigh nothing. Equal weights if None.
        """
        weights = dict.fromkeys(self.tasks, 1.0) if weights is None else weights
        total = sum(weights.values())
        return sum(w * self.tasks[name].values[metric] for name, w in weights.items()) / total

    def is_finite(self) -> bool:
        """True if every value is a finite number."""
        return all(task.is_finite() for task in self.tasks.values())

    def to_json(self) -> dict[str, Any]:
        """Returns plain dictionaries, without the per-document values."""
        return {
            name: {
                "values": task.values,
                "stderr": task.stderr,
                "documents": task.documents,
                "accuracy_metric": task.accuracy_metric,
            }
            for name, task in self.tasks.items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Score:
        """Builds a score from what `to_json` returned."""
        return cls(tasks={name: TaskScore(**task) for name, task in data.items()})


class Metric(NamedTuple):
    """Description of a metric in tables.

    Attributes:
        unit: Unit of its values; accuracy is shown in percent.
        meaning: What it measures, in plain words.
        low: The least value that it can have.
        high: The greatest one.
    """

    unit: str = ""
    meaning: str = ""
    low: float = -math.inf
    high: float = math.inf


KNOWN_METRICS = {
    "accuracy": Metric("%", "share of documents answered correctly", low=0.0, high=1.0),
    "choice_logprob": Metric(
        "nats", "log-probability of the right choice among the choices", high=0.0
    ),
    "margin": Metric("nats", "log-likelihood of the right choice minus that of the best wrong one"),
    "gold_logprob": Metric(
        "nats per byte", "log-likelihood of the right choice per byte", high=0.0
    ),
    "log_likelihood": Metric(
        "nats per token",
        "log-likelihood of a token of running text; perplexity is its exp(-x)",
        high=0.0,
    ),
}
"""The metrics of the built-in oracles, by name."""

_FORMER_METRICS = {"clp": "choice_logprob", "gold_ll": "gold_logprob"}


def metric_meanings(names: Iterable[str]) -> str:
    """Explains metrics in plain words, for below a table; names of plugins' metrics are left out.

    Returns:
        One sentence per metric, such as ``accuracy: share of documents answered correctly.``
    """
    return " ".join(f"{n}: {KNOWN_METRICS[n].meaning}." for n in names if n in KNOWN_METRICS)


def metric_suggestion(name: str, metrics: Sequence[str]) -> str:
    """Returns `` Did you mean 'x'?`` for a former name or the nearest metric, or nothing."""
    former = _FORMER_METRICS.get(name, "")
    return suggestion(former if former in metrics else name, list(metrics))


def described(metric: str) -> Metric:
    """Returns the description of a metric; empty for one of a plugin."""
    return KNOWN_METRICS.get(metric, Metric())


def bounds(metric: str) -> tuple[float, float]:
    """Returns the least and the greatest value that a metric can have."""
    return described(metric).low, described(metric).high


def unit_of_difference(metric: str) -> str:
    """Names the unit of a difference in a metric; accuracy differs in points."""
    return "points" if metric == "accuracy" else described(metric).unit
