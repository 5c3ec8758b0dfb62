"""The models that a comparison of runs is asked for: ``RUN`` or ``RUN:MODEL``.

A run is a run folder or a run file. Its report.json lists under ``results`` the files with the
per-document results of each model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.config.run_file import run_folder
from rankadaptor_plugin.core.errors import ArtifactError, ConfigError
from rankadaptor_plugin.core.registry import suggestion
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.verdict.race import DEFAULT_RANK, RECOVERED, SEARCHED, UNIFORM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rankadaptor_plugin.core.document_results import TaskDocuments

Results = Mapping[int | None, Mapping[str, "TaskDocuments"]]
"""Documents by seed and task."""

SEEDLESS = ("base", "pruned")
"""Models that no seed changes."""

MODELS = (*SEEDLESS, UNIFORM, DEFAULT_RANK, SEARCHED, RECOVERED)
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
    names = [SEARCHED, *report.get("methods", []), DEFAULT_RANK, UNIFORM]
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
