"""From what the stages found to what the report says (`rankadaptor_plugin.report.schema`)."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.tables import FIXED
from rankadaptor_plugin.core.ranks import WHOLE_LAYER
from rankadaptor_plugin.core.trials import TrialState
from rankadaptor_plugin.oracle.oracle import objective_metric, reported_target
from rankadaptor_plugin.recovery.files import adapter_parameters
from rankadaptor_plugin.report.words import (
    EQUAL,
    METHODS,
    SEARCHED,
    alone_sentence,
    verdict_sentence,
)
from rankadaptor_plugin.search.search import StopReason, pareto_front
from rankadaptor_plugin.search.space import slot_names
from rankadaptor_plugin.verdict.race import BEST_RANDOM, DEFAULT_RANK, baseline_label, run_name
from rankadaptor_plugin.verdict.statistics import score_cells

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
    from rankadaptor_plugin.core.scores import Score
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.oracle.oracle import Objective, Oracle
    from rankadaptor_plugin.pipeline.context import Recovered, RunContext
    from rankadaptor_plugin.report.schema import Entry, Footprint, ReportData, Result
    from rankadaptor_plugin.search.search import SearchResult
    from rankadaptor_plugin.verdict.noise import Noise
    from rankadaptor_plugin.verdict.race import Confirmed

PACKAGES = (
    "rankadaptor-plugin",
    "torch",
    "transformers",
    "peft",
    "lm-eval",
    "torch-pruning",
    "optuna",
)

_EQUAL = 0.01
"""Relative difference up to which numbers of trainable parameters count as equal."""


def stage_summary(
    found: SearchResult,
    confirmed: Confirmed,
    space: RankSpace,
    config: RunConfig,
    oracle: Oracle,
    objective: Objective,
    noise: Noise | None,
    knowledge: Sequence[dict[str, Any]],
    extra_seconds: Sequence[Mapping[str, float]],
    trained: Callable[[RankAllocation], int],
) -> dict[str, Any]:
    """Returns the parts of the report that the recovery stage knows.

    `extra_seconds` are those of fine-tunes and evaluations outside of search and race, by part.
    `trained` tells the trainable parameters of what was fine-tuned.
    """
    delivered = confirmed.delivered
    named = confirmed.models
    allocations = {
        name: a
        for name, a in named.items()
        if name == DEFAULT_RANK or name not in confirmed.methods
    }
    complete = [t for t in found.trials if t.state is TrialState.COMPLETE]
    runs = [run for several in confirmed.runs.values() for run in several]
    seconds = [*extra_seconds, *(t.seconds for t in found.trials), *(run.seconds for run in runs)]
    metrics = oracle.metrics("report")
    comparisons = confirmed.differences(metrics)
    chosen = confirmed.chosen
    method = chosen.label if chosen is not None and chosen.is_method else None
    return {
        "verdict": {
            "sentence": verdict_sentence(
                comparisons.get(metrics[0]),
                confirmed.baseline.ranks,
                reported_target(config.oracle, oracle),
                metrics[0],
                searched=found.stop is not StopReason.NOISE or method is not None,
                subject=_subject(found, confirmed),
                parameters=_parameters(confirmed, trained),
            )
            if confirmed.competitors
            else alone_sentence(confirmed.baseline.ranks),
            "delivered": "uniform" if delivered == confirmed.baseline else method or "searched",
            "baseline": baseline_label(confirmed.baseline.ranks),
            "comparisons": {metric: c.to_json() for metric, c in comparisons.items()},
            "target": reported_target(config.oracle, oracle),
        },
        "scores": {
            name: score_cells(
                confirmed.reports(allocation),
                metrics,
                oracle.weights("report"),
                confidence=config.confirm.confidence,
            )
            for name, allocation in named.items()
        },
        "results": {
            name: [
                {"file": f"evaluations/{run_name(allocation, seed)}.parquet", "seed": seed}
                for seed in confirmed.seeds_of(allocation)
            ]
            for name, allocation in named.items()
        },
        "noise": noise and noise.to_json(),
        "methods": list(confirmed.methods),
        "labels": confirmed.labels,
        "allocations": {name: list(a.ranks) for name, a in allocations.items()},
        "settings": {name: dict(a.settings) for name, a in named.items() if a.settings},
        "slots": [] if space.groups == WHOLE_LAYER else slot_names(space),
        "trainable": {name: trained(a) for name, a in named.items()},
        "trials": [trial.to_json() for trial in found.trials],
        "objective": {
            "metric": objective.metric,
            "target": objective.target or "mean",
        },
        "search": {
            "stop_reason": found.stop.value,
            "n_startup_trials": found.n_startup_trials,
            "complete": len(complete),
            "failed": sum(t.state is TrialState.FAILED for t in found.trials),
            "interrupted": found.interrupted,
            "method": _search_method(config),
        },
        "front": (
            [t.to_json() for t in pareto_front(found.trials, space)] if config.search.pareto else []
        ),
        "knowledge": list(knowledge),
        "confirm": confirmed.to_json(trained),
        "cost": {
            "fine_tuning": sum(s.get("recovery", 0.0) for s in seconds),
            "evaluation": sum(s.get("oracle", 0.0) for s in seconds),
            "per_trial": (
                sum(sum(t.seconds.values()) for t in complete) / len(complete) if complete else None
            ),
        },
        "seeds": {
            "run": config.seed,
            "search": config.seed,
            "noise": list(noise.seeds) if noise else [],
            "confirm": list(confirmed.rules.seeds),
        },
    }


def _subject(found: SearchResult, confirmed: Confirmed) -> str:
    """Names what the verdict is about."""
    chosen = confirmed.chosen
    if chosen is not None and chosen.is_method:
        return chosen.label
    if found.stop is StopReason.FIXED:
        return "the given allocation"
    if chosen is not None and chosen.label == BEST_RANDOM:
        return "the best random allocation"
    return METHODS if found.stop is StopReason.METHODS else SEARCHED


def _parameters(confirmed: Confirmed, trained: Callable[[RankAllocation], int]) -> str:
    """Says how the numbers of parameters compare that the chosen one and its baseline train."""
    chosen = confirmed.chosen
    if chosen is None or not chosen.is_method:
        return EQUAL
    own, other = trained(chosen.allocation), trained(chosen.baseline)
    if not own:
        return "without any fine-tune"
    more = own / other - 1
    if abs(more) <= _EQUAL:
        return EQUAL
    return f"with {100 * abs(more):.0f} % {'more' if more > 0 else 'fewer'} trainable parameters"


def _search_method(config: RunConfig) -> str:
    if not config.races_ranks:
        return "none"
    return FIXED if config.search.is_fixed else config.search.method


def report_data(
    pruned: PrunedModel,
    recovered: Recovered,
    scores: Mapping[str, Sequence[Score]],
    context: RunContext,
    *,
    results: Mapping[str, Sequence[Result]],
    generation: Sequence[dict[str, Any]],
    timings: Mapping[str, float],
    evaluation_seconds: float,
    peak_memory_bytes: int | None,
    device: str,
) -> ReportData:
    """Returns all of report.json.

    Args:
        pruned: The pruned model.
        recovered: What the recovery stage handed back; a foreign stage may leave its summary
            empty, the report then shows what the run itself measured.
        scores: Scores on the report documents that the run itself measured, by model.
        context: The run.
        results: Files with values per document of these scores, by model.
        generation: Texts of the models.
        timings: Seconds by stage.
        evaluation_seconds: Seconds of evaluations outside the recovery stage.
        peak_memory_bytes: Most memory in use.
        device: Name of the device.
    """
    summary, config = recovered.summary, context.config
    oracle = context.oracle
    weights, metrics = oracle.weights("report"), oracle.metrics("report")
    counts = {
        purpose: {task: len(ids) for task, ids in by_task.items()}
        for purpose, by_task in context.oracle.describe()["documents"].items()
    }
    cost = summary.get("cost", {})
    fine_tuning = cost.get("fine_tuning", 0.0)
    evaluation = cost.get("evaluation", 0.0) + evaluation_seconds
    columns = {
        name: score_cells(list(several), metrics, weights, confidence=config.confirm.confidence)
        for name, several in scores.items()
    }
    ranks = list(recovered.allocation.ranks)
    return {
        "verdict": summary.get(
            "verdict",
            {
                "sentence": "recovered by another stage; it was not compared with uniform LoRA",
                "delivered": "foreign",
                "baseline": "none",
                "comparisons": {},
                "target": "",
            },
        ),
        "tasks": list(weights),
        "metrics": list(metrics),
        "weights": dict(weights),
        "scores": columns | summary.get("scores", {}),
        "allocations": summary.get("allocations", {"recovered": ranks}),
        "parameters": {
            "base": pruned.base_parameters,
            "pruned": pruned.parameters,
            "trainable": summary.get("trainable")
            or {"recovered": adapter_parameters(recovered.adapter)},
        },
        "dtype": str(pruned.model.dtype).removeprefix("torch."),
        "footprints": {
            "base": cast("Footprint", pruned.base_footprint.with_bytes(pruned.model.dtype)),
            "pruned": cast("Footprint", pruned.footprint.with_bytes(pruned.model.dtype)),
        },
        "widths": [[w.heads, w.kv_heads, w.channels] for w in pruned.widths],
        "kept_layers": list(pruned.kept_layers),
        "layers": {"base": len(pruned.base_shape.layers), "pruned": len(pruned.widths)},
        "hidden_sizes": {"base": pruned.base_shape.hidden, "pruned": pruned.shape.hidden},
        "trials": summary.get("trials", []),
        "objective": summary.get(
            "objective",
            {
                "metric": objective_metric(config.oracle, oracle),
                "target": config.oracle.target or "mean",
            },
        ),
        "search": summary.get(
            "search",
            {
                "stop_reason": "none",
                "n_startup_trials": 0,
                "complete": 0,
                "failed": 0,
                "interrupted": 0,
                "method": "none",
            },
        ),
        "front": summary.get("front", []),
        "knowledge": summary.get("knowledge", []),
        "confirm": summary.get(
            "confirm",
            {
                "error_rate": 1 - config.confirm.confidence,
                "confidence": config.confirm.confidence,
                "metric": metrics[0],
                "comparisons": 1,
                "seeds": [],
                "fine_tunes": 0,
                "baselines": [],
                "competitors": [],
            },
        ),
        "cost": {
            "stages": dict(timings),
            "fine_tuning": fine_tuning,
            "evaluation": evaluation,
            "other": max(0.0, sum(timings.values()) - fine_tuning - evaluation),
            "per_trial": cost.get("per_trial"),
            "peak_memory_bytes": peak_memory_bytes,
        },
        "versions": versions(),
        "seeds": summary.get("seeds", {"run": config.seed}),
        "documents": {"search": counts["search"], "report": counts["report"]},
        "results": {name: list(files) for name, files in results.items()}
        | summary.get("results", {}),
        "noise": summary.get("noise"),
        "generation": cast("list[Entry]", list(generation)),
        "config": run_file.to_dict(config),
        "device": device,
        "slots": summary.get("slots", []),
        "settings": summary.get("settings", {}),
        "methods": summary.get("methods", []),
        "labels": summary.get("labels", {}),
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that shape a result."""
    found = {"python": platform.python_version(), "platform": sys.platform}
    return found | {package: version(package) for package in PACKAGES}
