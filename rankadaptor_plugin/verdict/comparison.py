"""Compares models within a run or between runs, from what the runs have kept.

Nothing is evaluated again and no model is read: `run_models` names the results
of every document, and `rankadaptor_plugin.verdict.statistics` compares them, as it does in
the verdict of a run. A run's report documents are never its search documents, and a document counts
only where it is a report document of both runs, so neither has searched on what it is judged by.

A comparison is asked for models as ``RUN`` or ``RUN:MODEL``. A run is a run folder or a run file.
Its report.json lists under ``results`` the files with the per-document results of each model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankadaptor_plugin.config.run_file import run_folder
from rankadaptor_plugin.core.document_results import read_documents
from rankadaptor_plugin.core.errors import ArtifactError, ConfigError, OracleError
from rankadaptor_plugin.core.registry import suggestion
from rankadaptor_plugin.core.run_folder import RunFolder, flat
from rankadaptor_plugin.core.scores import metric_suggestion
from rankadaptor_plugin.verdict.race import (
    DEFAULT_RANK,
    RECIPE,
    RECOVERED,
    SEARCHED,
    STACK,
    UNIFORM,
)
from rankadaptor_plugin.verdict.statistics import LEAST_SEEDS, compare

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rankadaptor_plugin.core.document_results import TaskDocuments
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
            `rankadaptor_plugin.verdict.comparison.run_models`.
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
    met = {models[a].folder: models[a] for (a, _), count in raced.items() if count}
    races = {folder: _race(model, name, weights) for folder, model in met.items()}
    pairs = {
        (a, b): compare(
            values[a],
            values[b],
            name,
            weights,
            confidence=confidence,
            comparisons=raced[a, b] or others,
            race=races[models[a].folder] if raced[a, b] else (),
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


def _race(model: RunModel, metric: str, tasks: dict[str, float]) -> list[Model]:
    """Returns the values of all models of the race that a model met others in."""
    race = model.report["confirm"]
    return [
        _values(
            model,
            {
                seed: read_documents(model.folder / file)
                for seed, file in zip(race["seeds"], files, strict=True)
            },
            metric,
            tasks,
        )
        for files in race.get("files", [])
    ]


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


Results = Mapping[int | None, Mapping[str, "TaskDocuments"]]
"""Documents by seed and task."""

SEEDLESS = ("base", "pruned", "compensated")
"""Models that no seed changes."""

MODELS = (*SEEDLESS, RECIPE, UNIFORM, DEFAULT_RANK, STACK, SEARCHED, RECOVERED)
"""Models that runs have, ``recovered`` being the delivered one; others are methods."""


@dataclass(frozen=True, kw_only=True)
class RunModel:
    """A model of a run that is to be compared.

    Attributes:
        label: Its name in tables: the run and the model.
        folder: Run folder, an absolute path.
        model: One of `MODELS`, or a recovery method.
        report: The run's report.json.
        files: Path of the per-document results by seed; the seed is None for a model without.
    """

    label: str
    folder: Path
    model: str
    report: Mapping[str, Any]
    files: Mapping[int | None, Path]

    @property
    def is_seedless(self) -> bool:
        """True if no seed changes the model."""
        return self.model in SEEDLESS

    @property
    def trainable(self) -> int | None:
        """Trainable parameters; None for a model without adapter."""
        count = self.report.get("parameters", {}).get("trainable", {}).get(self.model)
        return count if isinstance(count, int) else None

    @property
    def metric(self) -> str:
        """The metric that the run's verdict is about."""
        return str(next(iter(self.report.get("metrics") or ["accuracy"])))

    @property
    def target(self) -> str | None:
        """The one task that the run's verdict is about, None for the mean."""
        return self.report.get("verdict", {}).get("target") or None

    @property
    def confidence(self) -> float:
        """Confidence of the run's own intervals, in (0, 1)."""
        return float(self.report.get("confirm", {}).get("confidence", 0.95))

    def raced(self, other: RunModel) -> int | None:
        """Returns the number of comparisons of the race in which two models met; None if none."""
        if self.folder != other.folder:
            return None
        results, race = self.report["results"], self.report.get("confirm", {})
        pair = [results[self.model], results[other.model]]
        for entry in race.get("competitors", []):
            met = [results.get(entry.get(name)) for name in ("model", "baseline_model")]
            if None not in met and met in (pair, pair[::-1]):
                return int(race["comparisons"])
        return None


def run_models(runs: Sequence[str], *, every_model: bool = False) -> list[RunModel]:
    """Returns the models to compare.

    Args:
        runs: ``RUN`` or ``RUN:MODEL`` each. Without a model the delivered one is meant; of one and
            the same run alone, all of its recovered models.
        every_model: All recovered models of every run that is named without a model.

    Returns:
        At least two models, no two of them the same.

    Raises:
        ConfigError: If there is no such run or model, or a model would be compared with itself.
        ArtifactError: If a run is not finished, its report is torn, or an earlier version made it.
    """
    named = [_split(run) for run in runs]
    folders = [run_folder(path).path.resolve() for path, _ in named]
    reports = {folder: _report(folder) for folder in dict.fromkeys(folders)}
    alone = len(reports) == 1 and not any(name for _, name in named)
    wanted: list[tuple[Path, str]] = []
    for folder, (_, name) in zip(folders, named, strict=True):
        if name or not (alone or every_model):
            wanted.append((folder, name or RECOVERED))
        else:
            pairs = [(folder, distinct) for distinct in _distinct(reports[folder])]
            wanted += [pair for pair in pairs if pair not in wanted]
    labels = _labels(list(reports))
    models = [_model(folder, name, reports[folder], labels[folder]) for folder, name in wanted]
    if len(models) < 2:  # noqa: PLR2004  (a comparison takes two)
        raise ConfigError(
            f"There is only {models[0].label} to compare. Name another run, or a model after a "
            f"colon: {', '.join(reports[models[0].folder]['results'])}."
        )
    seen: dict[tuple[Path, ...], str] = {}
    for model in models:
        files = tuple(model.files.values())
        if files in seen:
            raise ConfigError(
                f"{seen[files]} and {model.label} are the same model. Name two models that differ."
            )
        seen[files] = model.label
    return models


def _split(run: str) -> tuple[Path, str]:
    """Splits off the model; a path may hold colons of its own."""
    if Path(run).exists():
        return Path(run), ""
    parts = run.split(":")
    for cut in range(len(parts) - 1, 0, -1):  # so may a model, as pattern:4-6-8 does
        path, model = ":".join(parts[:cut]), ":".join(parts[cut:])
        if path and (model in MODELS or Path(path).exists()):
            return Path(path), model
    return Path(run), ""


def _report(folder: Path) -> dict[str, Any]:
    report = RunFolder(folder).read_json("report.json")
    if report is None:
        if (folder / "inputs.json").is_file():
            raise ArtifactError(
                f"The run in {folder} is not finished: report.json is missing. Finish it with: "
                "rankadaptor-plugin run RUN.toml"
            )
        raise ArtifactError(
            f"{folder} is not a run folder. Give one that rankadaptor-plugin run has written."
        )
    results = report.get("results")
    if results is None:
        raise ArtifactError(
            f"The run in {folder} was made by an earlier version, which kept no results to "
            "compare. Delete the folder or set another output, and run again."
        )
    try:
        whole = all(
            isinstance(entry["file"], str) and isinstance(entry["seed"], int | None)
            for entries in results.values()
            for entry in entries
        ) and all(
            entries and len({entry["seed"] for entry in entries}) == len(entries)
            for entries in results.values()
        )
        # What is read below, and in the notes, without another look.
        weights = report["weights"].values()
        whole = whole and all(math.isfinite(weight) and weight >= 0 for weight in weights)
        whole = whole and isinstance(report["parameters"].get("trainable", {}), dict)
        whole = whole and all(isinstance(method, str) for method in report.get("methods", []))
        race = report.get("confirm") or {}
        whole = whole and all(
            len(files) == len(race["seeds"]) and all(isinstance(file, str) for file in files)
            for files in race.get("files", [])
        )
    except (AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ArtifactError(
            f"The file {folder / 'report.json'} lists no usable results, weights or parameters. "
            "Delete it and run again."
        )
    return report


def _distinct(report: Mapping[str, Any]) -> list[str]:
    """Returns the recovered models of a run, each once, and what others are compared with last."""
    results = report["results"]
    names = [SEARCHED, *report.get("methods", []), STACK, UNIFORM, DEFAULT_RANK, RECIPE]
    names = [name for name in names if name in results]
    if RECOVERED in results and results[RECOVERED] not in [results[name] for name in names]:
        names.insert(0, RECOVERED)
    return names


def _model(folder: Path, model: str, report: Mapping[str, Any], name: str) -> RunModel:
    results = report["results"]
    if model not in results:
        raise ConfigError(
            f"The run {folder} has no model {model!r}.{suggestion(model, list(results))} It has: "
            f"{', '.join(results) or 'none'}."
        )
    return RunModel(
        label=f"{name}:{model}" if name else model,
        folder=folder,
        model=model,
        report=report,
        files={entry["seed"]: folder / entry["file"] for entry in results[model]},
    )


def _labels(folders: Sequence[Path]) -> dict[Path, str]:
    """Returns the last parts of each path, as many as it takes to tell them apart."""
    if len(folders) == 1:
        return {folders[0]: ""}
    longest = max(len(folder.parts) for folder in folders)
    for count in range(1, longest + 1):
        labels = {folder: "/".join(folder.parts[-count:]) for folder in folders}
        if len(set(labels.values())) == len(folders):
            break
    return labels
