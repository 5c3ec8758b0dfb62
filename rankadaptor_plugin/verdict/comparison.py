"""Compares models within a run or between runs, from what the runs have kept.

Nothing is evaluated again and no model is read: `rankadaptor_plugin.verdict.run_models` names the
results of every document, and `rankadaptor_plugin.verdict.statistics` compares them, as it does in
the verdict of a run. A run's report documents are never its search documents, and a document counts
only where it is a report document of both runs, so neither has searched on what it is judged by.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from rankadaptor_plugin.core.document_results import read_documents
from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.core.registry import suggestion
from rankadaptor_plugin.core.run_folder import flat
from rankadaptor_plugin.core.scores import metric_suggestion
from rankadaptor_plugin.verdict.run_models import run_models
from rankadaptor_plugin.verdict.statistics import LEAST_SEEDS, compare

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rankadaptor_plugin.verdict.run_models import Results, RunModel
    from rankadaptor_plugin.verdict.statistics import Difference, Model

_SIMILAR = 0.02  # share by which trainable parameters may differ and still count as equal
_NAMED = 6  # settings that a note spells out
_UNKNOWN_SEED = -1  # of a single fine-tune of which none is written down


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """The models of a comparison, and their differences.

    Attributes:
        metric: The metric compared.
        weights: Weight of each task that was compared, as the first run's report has it.
        models: The models.
        pairs: Their differences, by positions in ``models``: the first minus the second.
        notes: What else the reader should know, a sentence or two each.
    """

    metric: str
    weights: dict[str, float]
    models: list[RunModel]
    pairs: dict[tuple[int, int], Difference]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; differences in the metric's unit, accuracy in [-1, 1]."""
        labels = [model.label for model in self.models]
        models = [
            {
                "label": model.label,
                "run": str(model.folder),
                "model": model.model,
                "trainable_parameters": model.trainable,
                "seeds": list(model.files),
            }
            for model in self.models
        ]
        pairs = [
            {"first": labels[a], "second": labels[b], **difference.to_json()}
            for (a, b), difference in self.pairs.items()
        ]
        return {
            "metric": self.metric,
            "weights": self.weights,
            "correction": "bonferroni",
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
) -> RunComparison:
    """Compares models of finished runs, each with each.

    A competitor of a run's race and its baseline are corrected for the comparisons of that race, so
    they get the interval and the verdict of the run's own report; all other pairs are corrected for
    their number.

    Args:
        runs: Run folders or run files, each with or without ``:MODEL``; see
            `rankadaptor_plugin.verdict.run_models.run_models`.
        every_model: All recovered models of every run that is named without a model.
        metric: Metric to compare; None for the one that the first run's verdict is about.
        task: One task; None for that of the verdicts, or for the mean over the tasks that all
            models have, with the weights of the first run.
        confidence: Confidence of intervals and verdicts, in (0, 1); None for the first run's.

    Raises:
        ConfigError: If there is no such run, model, metric or task, or a model would be compared
            with itself.
        ArtifactError: If a run is not finished, or its results are torn or absent.
        OracleError: If two models have no documents in common.
    """
    models = run_models(runs, every_model=every_model)
    name = metric or models[0].metric
    if task is None and len({model.target for model in models}) == 1:
        task = models[0].target
    results: list[Results] = [
        {s: read_documents(path) for s, path in model.files.items()} for model in models
    ]
    tasks = [_tasks(model, result, name) for model, result in zip(models, results, strict=True)]
    weights = _weights(models, tasks, task)
    notes = list(_notes_on_models(models, results, list(weights)))
    if task is None:
        notes = [*_notes_on_tasks(models, tasks, list(weights)), *notes]
    if confidence is None:
        confidence = models[0].confidence
        notes += _notes_on_confidence(models)
    values = [
        _values(model, result, name, weights) for model, result in zip(models, results, strict=True)
    ]
    positions = list(combinations(range(len(models)), 2))
    raced = {(a, b): models[a].raced(models[b]) for a, b in positions}
    others = sum(count is None for count in raced.values())
    pairs = {
        (a, b): compare(
            values[a],
            values[b],
            name,
            weights,
            confidence=confidence,
            comparisons=raced[a, b] or others,
        )
        for a, b in positions
    }
    return RunComparison(metric=name, weights=weights, models=models, pairs=pairs, notes=notes)


def _values(model: RunModel, results: Results, metric: str, tasks: dict[str, float]) -> Model:
    """Returns the values of a metric; a fine-tune without a known seed is one of some seed."""
    return {
        _UNKNOWN_SEED if seed is None and not model.is_seedless else seed: {
            task: (documents[task].keys, documents[task].values[metric]) for task in tasks
        }
        for seed, documents in results.items()
    }


def _tasks(model: RunModel, result: Results, metric: str) -> list[str]:
    """Returns the tasks that have the metric for every seed of a model."""
    scores = list(result.values())
    present = dict.fromkeys(m for score in scores for task in score.values() for m in task.values)
    if metric not in present:
        raise ConfigError(
            f"{model.label} has no results for the metric {metric!r}."
            f"{metric_suggestion(metric, list(present))} It has: {', '.join(present) or 'none'}."
        )
    return [
        task
        for task in scores[0]
        if all(task in score and metric in score[task].values for score in scores)
    ]


def _weights(
    models: Sequence[RunModel], tasks: Sequence[Sequence[str]], task: str | None
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
    stated = models[0].report["weights"]
    weights = {name: float(stated.get(name, 0.0)) for name in common}
    if not any(weights.values()):
        raise OracleError(
            f"The models have no task in common that has weight in {models[0].label}. Common "
            f"tasks: {', '.join(common) or 'none'}. Compare runs that share tasks, or use --task."
        )
    return {name: weight for name, weight in weights.items() if weight > 0}


def _notes_on_tasks(
    models: Sequence[RunModel], tasks: Sequence[Sequence[str]], compared: Sequence[str]
) -> Iterator[str]:
    """Says which tasks are left out, and that the runs weight them differently.

    Args:
        models: The models.
        tasks: Names of the tasks that each model has.
        compared: Names of the tasks that are compared.
    """
    left_out = sorted(
        {task for names in tasks for task in names if any(task not in n for n in tasks)}
    )
    if left_out:
        yield (
            f"Only tasks that all models have are compared: {', '.join(compared)}. Left out: "
            f"{', '.join(left_out)}."
        )
    shares = []
    for model in models:
        stated = model.report["weights"]
        total = sum(stated.get(task, 0.0) for task in compared)
        shares.append([stated.get(task, 0.0) / total if total else 0.0 for task in compared])
    if any(not np.allclose(share, shares[0]) for share in shares):
        yield (
            f"The runs weight their tasks differently; the weights of {models[0].label} are used."
        )


def _notes_on_models(
    models: Sequence[RunModel], results: Sequence[Results], compared: Sequence[str]
) -> Iterator[str]:
    """Says in what the runs differ, and what the results leave open.

    Args:
        models: The models.
        results: The results of each.
        compared: Names of the tasks that are compared.
    """
    runs = list({model.folder: model for model in models}.values())
    for size, what in (("base", "base models"), ("pruned", "pruned models")):
        counts = [run.report["parameters"].get(size) for run in runs]
        if len(set(counts)) > 1:
            listed = ", ".join(f"{c:,}" if isinstance(c, int) else "unknown" for c in counts)
            yield f"The runs have {what} of different sizes: {listed} parameters."
    settings = [flat(run.report.get("config", {})) for run in runs]
    changed = [
        key
        for key in sorted({key for values in settings for key in values} - {"output"})
        if any(values.get(key) != settings[0].get(key) for values in settings)
    ]
    if changed:
        more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
        yield f"Settings that differ between the runs: {', '.join(changed[:_NAMED])}{more}."
    counted = [(m.trainable, m.label) for m in models if m.trainable is not None]
    if counted and max(counted)[0] > (1 + _SIMILAR) * min(counted)[0]:
        (most, largest), (least, smallest) = max(counted), min(counted)
        yield (
            f"Warning: not at equal parameters: {largest} has {most:,} trainable parameters, "
            f"{smallest} {least:,}. More parameters recover more."
        )
    for model in models:
        count = len(model.files)
        if count < LEAST_SEEDS and not model.is_seedless:
            yield (
                f"No verdict on {model.label}: it was fine-tuned with {count} "
                f"{'seed' if count == 1 else 'seeds'}, and a verdict takes at least {LEAST_SEEDS}."
            )
    unnamed = {
        task
        for result in results
        for score in result.values()
        for task in compared
        if score[task].keys == [str(i) for i in range(len(score[task].keys))]
    }
    if unnamed and len(runs) > 1:
        yield (
            f"The documents of {', '.join(sorted(unnamed))} have no names and are paired by "
            "position. That is right only if the runs were scored on the same documents."
        )


def _notes_on_confidence(models: Sequence[RunModel]) -> Iterator[str]:
    """Says that the runs have different confidences, if so."""
    levels = sorted({model.confidence for model in models})
    if len(levels) > 1:
        yield (
            f"The runs have different confidences ({', '.join(f'{c:g}' for c in levels)}); "
            f"{models[0].confidence:g} is used, that of {models[0].label}."
        )
