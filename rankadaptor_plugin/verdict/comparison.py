"""Compares recovered models within a run or between runs, from what the runs have kept.

Nothing is evaluated again and no model is read: `rankadaptor_plugin.verdict.choice` finds the
results of every document, and `rankadaptor_plugin.verdict.bootstrap` compares them. A run's report
documents are never its search documents, and a document counts only where it is a report document
of both runs. So neither run has searched on what it is judged by here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.document_results import read_documents
from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.core.registry import suggestion
from rankadaptor_plugin.core.scores import metric_suggestion
from rankadaptor_plugin.verdict.bootstrap import compare_pairs
from rankadaptor_plugin.verdict.choice import choose
from rankadaptor_plugin.verdict.run_notes import (
    notes_on_confidence,
    notes_on_models,
    notes_on_tasks,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rankadaptor_plugin.verdict.bootstrap import Difference
    from rankadaptor_plugin.verdict.choice import Choice
    from rankadaptor_plugin.verdict.run_notes import Results


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """What came out.

    Attributes:
        metric: The metric compared.
        weights: Weight of each task that was compared, as the first run's report has it.
        resamples: Number of resamples.
        seed: Seed of the resamples.
        choices: The models.
        pairs: Their differences, by positions in ``choices``: the first minus the second.
        notes: What else the reader should know, a sentence or two each.
    """

    metric: str
    weights: dict[str, float]
    resamples: int
    seed: int
    choices: list[Choice]
    pairs: dict[tuple[int, int], Difference]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; differences in the metric's unit, accuracy in [-1, 1]."""
        labels = [choice.label for choice in self.choices]
        models = [
            {
                "label": choice.label,
                "run": str(choice.folder),
                "model": choice.model,
                "trainable_parameters": choice.trainable,
                "seeds": list(choice.files),
            }
            for choice in self.choices
        ]
        pairs = [
            {"first": labels[a], "second": labels[b], **difference.to_json()}
            for (a, b), difference in self.pairs.items()
        ]
        return {
            "metric": self.metric,
            "weights": self.weights,
            "resamples": self.resamples,
            "seed": self.seed,
            "correction": "holm",
            "models": models,
            "pairs": pairs,
            "notes": self.notes,
        }


def compare_runs(
    runs: Sequence[str],
    *,
    every_model: bool = False,
    metric: str | None = None,
    task: str | None = None,
    confidence: float | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> RunComparison:
    """Compares models of finished runs, each with each.

    Args:
        runs: Run folders or run files, each with or without ``:MODEL``; see
            `rankadaptor_plugin.verdict.choice.choose`.
        every_model: All recovered models of every run that is named without a model.
        metric: Metric to compare; None for the one that the first run's verdict is about.
        task: One task; None for that of the verdicts, or for the mean over the tasks that all
            models have, with the weights of the first run.
        confidence: Confidence of intervals and verdicts, in (0, 1); None for the first run's.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Raises:
        ConfigError: If there is no such run, model, metric or task, a model would be compared with
            itself, or the resamples are too few.
        ArtifactError: If a run is not finished, or its results are torn or absent.
        OracleError: If two models have no documents in common.
    """
    choices = choose(runs, every_model=every_model)
    metric = metric or choices[0].metric
    if task is None and len({choice.target for choice in choices}) == 1:
        task = choices[0].target
    results: list[Results] = [
        {s: read_documents(path) for s, path in choice.files.items()} for choice in choices
    ]
    tasks = [
        _tasks(choice, result, metric) for choice, result in zip(choices, results, strict=True)
    ]
    weights = _weights(choices, tasks, task)
    notes = list(notes_on_models(choices, results, list(weights)))
    if task is None:
        notes = [*notes_on_tasks(choices, tasks, list(weights)), *notes]
    if confidence is None:
        confidence = choices[0].confidence
        notes += notes_on_confidence(choices)
    models = [
        {s: {t: (d[t].keys, d[t].values[metric]) for t in weights} for s, d in result.items()}
        for result in results
    ]
    positions = list(combinations(range(len(choices)), 2))
    found = compare_pairs(
        [(models[a], models[b]) for a, b in positions],
        weights,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
    return RunComparison(
        metric=metric,
        weights=weights,
        resamples=resamples,
        seed=seed,
        choices=choices,
        pairs=dict(zip(positions, found, strict=True)),
        notes=notes,
    )


def _tasks(choice: Choice, result: Results, metric: str) -> list[str]:
    """Returns the tasks that have the metric for every seed of a model."""
    scores = list(result.values())
    present = dict.fromkeys(m for score in scores for task in score.values() for m in task.values)
    if metric not in present:
        raise ConfigError(
            f"{choice.label} has no results for the metric {metric!r}."
            f"{metric_suggestion(metric, list(present))} It has: {', '.join(present) or 'none'}."
        )
    return [
        task
        for task in scores[0]
        if all(task in score and metric in score[task].values for score in scores)
    ]


def _weights(
    choices: Sequence[Choice], tasks: Sequence[Sequence[str]], task: str | None
) -> dict[str, float]:
    """Returns the weights above zero of the tasks to compare."""
    common = [name for name in tasks[0] if all(name in others for others in tasks)]
    if task is not None:
        if task not in common:
            raise ConfigError(
                f"The models have no task {task!r} in common.{suggestion(task, common)} They "
                f"have: {', '.join(common) or 'none'}."
            )
        return {task: 1.0}
    given = choices[0].report["weights"]
    weights = {name: float(given.get(name, 0.0)) for name in common}
    if not any(weights.values()):
        raise OracleError(
            f"The models have no task in common that has weight in {choices[0].label}. Common "
            f"tasks: {', '.join(common) or 'none'}. Compare runs that share tasks, or use --task."
        )
    return {name: weight for name, weight in weights.items() if weight > 0}
