"""What the search maximizes: one number from the scores of all tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.registry import suggestion
from rankadaptor_plugin.core.scores import metric_suggestion

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from rankadaptor_plugin.config.tables import OracleConfig
    from rankadaptor_plugin.core.scores import Score
    from rankadaptor_plugin.oracle.contract import Oracle

PREFERRED = "choice_logprob"
"""Objective of an oracle that has it and whose run file names none."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A metric's weighted mean over the tasks, or its value on one task.

    Attributes:
        metric: Name of the metric.
        target: The one task; empty for the mean.
        weights: Weight per task in the mean.
    """

    metric: str
    target: str = ""
    weights: Mapping[str, float]

    def __call__(self, score: Score) -> float:
        """Returns the value of a score on the search documents."""
        return score.mean(self.metric, {self.target: 1.0} if self.target else self.weights)


def objective_metric(config: OracleConfig, oracle: Oracle) -> str:
    """Returns the metric that the search maximizes.

    Raises:
        ConfigError: If the oracle does not have the metric that the run file names, or its search
            documents do not have the target.
    """
    metrics = oracle.metrics("search")
    if config.target and config.target not in oracle.weights("search"):
        raise ConfigError(
            f"[oracle] target names {config.target!r}, which has no search documents."
            f"{suggestion(config.target, list(oracle.weights('search')))} Tasks that have: "
            f"{', '.join(oracle.weights('search'))}."
        )
    if not config.objective:
        return PREFERRED if PREFERRED in metrics else metrics[0]
    if config.objective not in metrics:
        hint = metric_suggestion(config.objective, metrics)
        raise ConfigError(
            f"oracle.objective is {config.objective!r}.{hint} Allowed for the oracle "
            f"{config.search_name or config.name}: {', '.join(metrics)}."
        )
    return config.objective


def check_task_names(config: OracleConfig, known: Collection[str]) -> None:
    """Refuses a target or a weight of a task that there is not.

    Raises:
        ConfigError: With the names that there are.
    """
    named = {"target": [config.target] if config.target else [], "weights": list(config.weights)}
    for key, names in named.items():
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"[oracle] {key} names {name!r}, which is not among the tasks."
                    f"{suggestion(name, list(known))} Tasks: {', '.join(known)}."
                )


def reported_target(config: OracleConfig, oracle: Oracle) -> str:
    """Returns the one task that the verdict is about, empty for the mean.

    A target that only the search documents have guides the search alone.
    """
    return config.target if config.target in oracle.weights("report") else ""
