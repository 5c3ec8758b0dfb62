"""What an oracle says of a model: values per task and metric, and per document where needed.

Metrics, all "higher is better":
    accuracy: Share of documents answered rightly, in [0, 1]; `acc` or `acc_norm` of lm-eval,
        fixed per task.
    clp: Mean log-probability of the right choice among the choices, in nats, at most 0:
        ``ll[gold] - logsumexp(ll)``.
    margin: Mean of ``ll[gold] - max(ll[wrong])``, in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

METRICS = ("accuracy", "clp", "margin")


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The scores of one task on one set of documents.

    Attributes:
        values: Mean over the documents, by metric name (`METRICS`).
        stderr: Standard error of that mean over the documents, by metric name.
        documents: Number of documents scored.
        accuracy_metric: The lm-eval metric behind `accuracy`: ``acc`` or ``acc_norm``.
        per_document: Values by metric name, one per document in the order of the document ids;
            empty where only means are kept.
    """

    values: dict[str, float]
    stderr: dict[str, float]
    documents: int
    accuracy_metric: str = "acc"
    per_document: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Score:
    """The scores of one model on several tasks."""

    tasks: dict[str, TaskScore]

    def mean(self, metric: str, weights: Mapping[str, float] | None = None) -> float:
        """Returns the weighted mean of a metric over the tasks.

        Args:
            metric: One of `METRICS`.
            weights: Weight per task; tasks left out weigh nothing. Equal weights if None.
        """
        weights = dict.fromkeys(self.tasks, 1.0) if weights is None else weights
        total = sum(weights.values())
        return sum(w * self.tasks[name].values[metric] for name, w in weights.items()) / total

    def is_finite(self) -> bool:
        """Tells whether every value is a finite number."""
        return all(math.isfinite(v) for task in self.tasks.values() for v in task.values.values())

    def to_json(self, *, per_document: bool = False) -> dict[str, Any]:
        """Returns plain dictionaries, with the per-document values only where asked for."""
        out: dict[str, Any] = {}
        for name, task in self.tasks.items():
            out[name] = {
                "values": task.values,
                "stderr": task.stderr,
                "documents": task.documents,
                "accuracy_metric": task.accuracy_metric,
            }
            if per_document:
                out[name]["per_document"] = task.per_document
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Score:
        """Builds a score from what `to_json` returned."""
        return cls(tasks={name: TaskScore(**task) for name, task in data.items()})
