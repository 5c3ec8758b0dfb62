"""The content of report.json (`rankadaptor_plugin.report.schema`), from the results of the stages.

`stage_summary` makes the part of the built-in recovery stage, `foreign_summary` that of a stage
from another package, `report_data` the whole.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.tables import FIXED
from rankadaptor_plugin.core.ranks import WHOLE_LAYER
from rankadaptor_plugin.core.trials import TrialState
from rankadaptor_plugin.oracle.oracle import objective_metric, reported_target
from rankadaptor_plugin.pipeline.context import Summary
from rankadaptor_plugin.pipeline.tune_step import fine_tunes
from rankadaptor_plugin.recovery.files import adapter_parameters
from rankadaptor_plugin.recovery.methods.methods import parse_method
from rankadaptor_plugin.report import words
from rankadaptor_plugin.search.search import StopReason, pareto_front
from rankadaptor_plugin.search.space import slot_names
from rankadaptor_plugin.verdict.race import (
    BEST_RANDOM,
    FINALIST,
    RECOVERED,
    SEARCHED,
    STACK,
    TUNED,
    baseline_label,
    run_path,
)
from rankadaptor_plugin.verdict.statistics import score_cells

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
    from rankadaptor_plugin.core.scores import Score
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.oracle.oracle import Objective
    from rankadaptor_plugin.pipeline.context import Recovered, RunContext
    from rankadaptor_plugin.pipeline.tune_step import Tuned
    from rankadaptor_plugin.report.schema import (
        Column,
        Confirm,
        Entry,
        Footprint,
        ReportData,
        Result,
        Verdict,
    )
    from rankadaptor_plugin.search.search import SearchResult
    from rankadaptor_plugin.verdict.noise import Noise
    from rankadaptor_plugin.verdict.race import Competitor, Confirmed
    from rankadaptor_plugin.verdict.statistics import Difference

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


@dataclass(frozen=True, kw_only=True)
class StageResults:
    """Results of the steps of the recovery stage.

    Attributes:
        search: The search.
        confirmed: The race.
        noise: The noise floor, if it was measured.
        knowledge: What `rankadaptor_plugin.search.transfer.transfer.Knowledge.worth` returned.
        seconds: Those of fine-tunes and evaluations outside of search and race, by part.
        trained: Tells the trainable parameters of what was fine-tuned.
        adapters: Folders of the adapters by name of the model, relative to the run folder.
        cut: Stages that were cut to the time of the run.
        random: Trials of random allocations beside the search.
        tuned: Learning rate and stack.
    """

    search: SearchResult
    confirmed: Confirmed
    noise: Noise | None
    knowledge: Sequence[dict[str, Any]]
    seconds: Sequence[Mapping[str, float]]
    trained: Callable[[RankAllocation], int]
    adapters: Mapping[str, str]
    tuned: Tuned
    cut: Collection[str] = ()
    random: int = 0


def stage_summary(
    results: StageResults, context: RunContext, space: RankSpace, objective: Objective
) -> Summary:
    """Returns the parts of the report that the recovery stage knows."""
    config, oracle = context.config, context.oracle
    search, confirmed, noise = results.search, results.confirmed, results.noise
    models = confirmed.models
    complete = [t for t in search.trials if t.state is TrialState.COMPLETE]
    runs = [run for several in confirmed.runs.values() for run in several]
    seconds = [
        *results.tuned.seconds,
        *results.seconds,
        *(t.seconds for t in search.trials),
        *(r.seconds for r in runs),
    ]
    timed = [sum(t.seconds.values()) for t in complete if t.seconds.get("recovery")]
    metrics, weights = oracle.metrics("report"), oracle.weights("report")
    return Summary(
        verdict=_verdict(results, context),
        scores={
            name: score_cells(
                confirmed.reports(allocation),
                metrics,
                weights,
                confidence=config.confirm.confidence,
            )
            for name, allocation in models.items()
        },
        results={
            name: [
                {"file": f"{run_path(allocation, seed)}.parquet", "seed": seed}
                for seed in confirmed.seeds_of(allocation)
            ]
            for name, allocation in models.items()
        },
        noise=noise.to_json() if noise else None,
        tune=results.tuned.to_json(),
        methods=list(confirmed.methods),
        labels=confirmed.labels,
        allocations={
            name: list(allocation.ranks)
            for name, allocation in models.items()
            if name not in confirmed.methods
        },
        settings={name: dict(a.settings) for name, a in models.items() if a.settings},
        slots=[] if space.groups == WHOLE_LAYER else slot_names(space),
        trainable={name: results.trained(a) for name, a in models.items()},
        trials=[trial.to_json() for trial in search.trials],
        objective={"metric": objective.metric, "target": objective.target or "mean"},
        search={
            "stop_reason": search.stop.value,
            "n_startup_trials": search.n_startup_trials,
            "complete": len(complete),
            "failed": sum(t.state is TrialState.FAILED for t in search.trials),
            "interrupted": search.interrupted,
            "method": _search_method(config),
        },
        front=[t.to_json() for t in pareto_front(search.trials, space)]
        if config.search.pareto
        else [],
        knowledge=list(results.knowledge),
        confirm=cast("Confirm", confirmed.to_json(results.trained)),
        fine_tuning_seconds=sum(s.get("recovery", 0.0) for s in seconds),
        evaluation_seconds=sum(s.get("oracle", 0.0) for s in seconds),
        seconds_per_trial=fmean(timed) if timed else None,
        seeds={
            "run": config.seed,
            "search": config.seed,
            "tune": list(results.tuned.seeds),
            "noise": list(noise.seeds) if noise else [],
            "confirm": list(confirmed.rules.seeds),
        },
        adapters=dict(results.adapters),
        cuts=_cuts(results, config),
    )


def _cuts(results: StageResults, config: RunConfig) -> list[str]:
    """Says what was left out for want of time."""
    noise = results.noise
    made = {
        "tune": ("tuning", len(results.tuned.seconds), fine_tunes(config), "fine-tunes"),
        "noise": ("noise floor", len(noise.seeds) if noise else 0, config.noise.seeds, "seeds"),
        "search": ("search", len(results.search.trials), config.search.n_trials, "trials"),
        "random": ("random search", results.random, len(results.search.trials), "trials"),
        "confirm": (
            "comparison",
            len(results.confirmed.rules.seeds),
            config.confirm.seeds,
            "seeds",
        ),
    }
    return [
        f"{name}: {done} of {whole} {what}"
        for stage, (name, done, whole, what) in made.items()
        if stage in results.cut
    ]


def _verdict(results: StageResults, context: RunContext) -> Verdict:
    confirmed, oracle = results.confirmed, context.oracle
    metrics = oracle.metrics("report")
    target = reported_target(context.config.oracle, oracle)
    differences, of_ranks = (
        confirmed.differences(metrics),
        confirmed.differences_of_ranks(metrics),
    )
    delivered = confirmed.delivered
    names = {a: n for n, a in reversed(confirmed.models.items()) if n != RECOVERED}
    place = {"task": target, "metric": metrics[0]}
    label = _label(confirmed.reference, results)
    sentence = f"{label} is delivered"
    if differences and confirmed.chosen is not None:
        sentence = words.gain_sentence(
            differences[metrics[0]],
            _subject(confirmed.chosen, results),
            label,
            parameters=_parameters(confirmed.chosen.allocation, confirmed.reference, results),
            **place,
        )
        if delivered == confirmed.reference:
            sentence += f"; {label} is delivered"
    return {
        "sentence": sentence,
        "ranks": _ranks_sentence(results, of_ranks.get(metrics[0]), place),
        "costs": _extra_costs(results),
        "delivered": names.get(delivered, SEARCHED),
        "method": results.tuned.resolved(delivered).method,
        "baseline": label,
        "comparisons": {metric: d.to_json() for metric, d in differences.items()},
        "comparisons_of_ranks": {metric: d.to_json() for metric, d in of_ranks.items()},
        "target": target,
    }


def _label(allocation: RankAllocation, results: StageResults) -> str:
    """Names LoRA by its ranks, and, unless it is all that there is, that it is the recipe's."""
    only = not results.tuned.curves and not results.tuned.parts
    return baseline_label(allocation.ranks) + ("" if only else " by the recipe")


def _subject(competitor: Competitor, results: StageResults) -> str:
    """Names what the first sentence is about."""
    tuned = results.tuned
    if competitor.label == STACK:
        parts = tuned.stack.replace("+", " + ")
        return f"the stack ({parts}, learning rate {tuned.learning_rate:g})"
    if competitor.label == TUNED:
        return f"learning rate {tuned.learning_rate:g} in place of {tuned.recipe:g}"
    if competitor.label in (FINALIST, BEST_RANDOM):
        return _ranks_subject(competitor, results) + (" on the stack" if tuned.parts else "")
    return competitor.label


def _ranks_subject(competitor: Competitor, results: StageResults) -> str:
    if competitor.label == BEST_RANDOM:
        return "the best random allocation"
    if results.search.stop is StopReason.FIXED:
        return "the allocation of the run file"
    return "the searched ranks" if competitor.label == FINALIST else competitor.label


def _ranks_sentence(
    results: StageResults, difference: Difference | None, place: Mapping[str, str]
) -> str:
    """Says what the ranks alone gave."""
    search, confirmed = results.search, results.confirmed
    ranks = confirmed.ranks
    if ranks is not None and difference is not None:
        even = f"even ranks ({baseline_label(ranks.baseline.ranks)})"
        if results.tuned.parts:
            even += " on the same stack"
        sentence = words.gain_sentence(difference, _ranks_subject(ranks, results), even, **place)
        return f"ranks alone: {sentence}"
    if failed := next((c for c in confirmed.competitors if c.is_ranks and c.detail), None):
        return f"ranks alone: not compared, as a fine-tune failed: {failed.detail}"
    if search.stop is StopReason.NOISE:
        return "ranks alone: no search, as no plausible gain rises above the noise"
    if search.stop is StopReason.METHODS:
        return ""
    return "ranks alone: the search found nothing better than even ranks"


def _extra_costs(results: StageResults) -> str:
    """Says what the delivered model took that LoRA by the recipe does not."""
    confirmed = results.confirmed
    delivered = confirmed.delivered
    if delivered == confirmed.reference:
        return ""
    method = parse_method(results.tuned.resolved(delivered).method)
    extra = []
    if method.compensate:
        extra.append("its frozen weights were refitted to the unpruned model (compensated/)")
    if method.distill:
        extra.append("it learned from the unpruned model's predictions")
    seconds = [
        fmean(run.seconds["recovery"] for run in confirmed.runs[a])
        for a in (delivered, confirmed.reference)
    ]
    if extra and seconds[1] > 0:
        extra.append(f"a fine-tune took {seconds[0] / seconds[1]:.2g} times as long")
    return f"at equal optimizer steps; {', '.join(extra)}" if extra else ""


def foreign_summary(recovered: Recovered, context: RunContext) -> Summary:
    """Returns the summary of another package's stage, which compared nothing."""
    config, oracle = context.config, context.oracle
    confidence = config.confirm.confidence
    return Summary(
        verdict={
            "sentence": "recovered by another stage; it was not compared with LoRA by the recipe",
            "delivered": "foreign",
            "baseline": "none",
            "comparisons": {},
            "target": "",
        },
        allocations={RECOVERED: list(recovered.allocation.ranks)},
        trainable={RECOVERED: adapter_parameters(recovered.adapter)},
        objective={
            "metric": objective_metric(config.oracle, oracle),
            "target": config.oracle.target or "mean",
        },
        search={
            "stop_reason": "none",
            "n_startup_trials": 0,
            "complete": 0,
            "failed": 0,
            "interrupted": 0,
            "method": "none",
        },
        confirm={
            "error_rate": round(1 - confidence, 12),  # 0.05, not 0.050000000000000044
            "confidence": confidence,
            "comparisons": 1,
            "metric": oracle.metrics("report")[0],
            "seeds": [],
            "fine_tunes": 0,
            "baselines": [],
            "competitors": [],
        },
        seeds={"run": config.seed},
        adapters={RECOVERED: str(recovered.adapter)},
    )


def _parameters(one: RankAllocation, other: RankAllocation, results: StageResults) -> str:
    """Says how the numbers of parameters compare that two fine-tunes train."""
    count, reference = results.trained(one), results.trained(other)
    if not count:
        return "without any fine-tune"
    more = count / reference - 1
    if abs(more) <= _EQUAL:
        return words.EQUAL
    return f"with {100 * abs(more):.0f} % {'more' if more > 0 else 'fewer'} trainable parameters"


def _search_method(config: RunConfig) -> str:
    if not config.races_ranks:
        return "none"
    return FIXED if config.search.is_fixed else config.search.method


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of the run itself, around the recovery stage.

    Attributes:
        scores: Scores on the report documents, by model.
        results: Files with values per document of these scores, by model.
        generation: Texts of the models.
        timings: Seconds by stage.
        evaluation_seconds: Seconds of these evaluations.
        peak_memory_bytes: Most memory in use.
        device: Name of the device.
        quantization: What the base model went through before; empty for nothing.
    """

    scores: Mapping[str, Sequence[Score]]
    results: Mapping[str, Sequence[Result]]
    generation: Sequence[Entry]
    timings: Mapping[str, float]
    evaluation_seconds: float
    peak_memory_bytes: int | None
    device: str
    quantization: str


def report_data(
    pruned: PrunedModel, summary: Summary, context: RunContext, measured: Measured
) -> ReportData:
    """Returns all of report.json.

    Args:
        pruned: The pruned model.
        summary: What the recovery stage knows.
        context: The run.
        measured: What the run itself measured.
    """
    config, oracle = context.config, context.oracle
    weights, metrics = oracle.weights("report"), oracle.metrics("report")
    counts = {
        purpose: {task: len(ids) for task, ids in by_task.items()}
        for purpose, by_task in oracle.describe()["documents"].items()
    }
    columns = {
        name: score_cells(list(several), metrics, weights, confidence=config.confirm.confidence)
        for name, several in measured.scores.items()
    }
    dtype = pruned.model.dtype
    evaluation = summary.evaluation_seconds + measured.evaluation_seconds
    spent = summary.fine_tuning_seconds + evaluation
    scores = columns | summary.scores
    return {
        "verdict": _with_headline(summary.verdict, scores, metrics[0]),
        "tasks": list(weights),
        "metrics": list(metrics),
        "weights": dict(weights),
        "scores": scores,
        "allocations": summary.allocations,
        "parameters": {
            "base": pruned.base_parameters,
            "pruned": pruned.parameters,
            "trainable": summary.trainable,
        },
        "dtype": str(dtype).removeprefix("torch."),
        "footprints": {
            "base": cast("Footprint", pruned.base_footprint.with_bytes(dtype)),
            "pruned": cast("Footprint", pruned.footprint.with_bytes(dtype)),
        },
        "widths": [[w.heads, w.kv_heads, w.channels] for w in pruned.widths],
        "kept_layers": list(pruned.kept_layers),
        "layers": {"base": len(pruned.base_shape.layers), "pruned": len(pruned.widths)},
        "hidden_sizes": {"base": pruned.base_shape.hidden, "pruned": pruned.shape.hidden},
        "trials": summary.trials,
        "objective": summary.objective,
        "search": summary.search,
        "front": summary.front,
        "knowledge": summary.knowledge,
        "confirm": summary.confirm,
        "cost": {
            "stages": dict(measured.timings),
            "fine_tuning": summary.fine_tuning_seconds,
            "evaluation": evaluation,
            "other": max(0.0, sum(measured.timings.values()) - spent),
            "per_trial": summary.seconds_per_trial,
            "peak_memory_bytes": measured.peak_memory_bytes,
        },
        "versions": versions(),
        "seeds": summary.seeds,
        "documents": {"search": counts["search"], "report": counts["report"]},
        "results": {n: list(files) for n, files in measured.results.items()} | summary.results,
        "noise": summary.noise,
        "generation": list(measured.generation),
        "config": run_file.to_dict(config),
        "device": measured.device,
        "quantization": measured.quantization,
        "slots": summary.slots,
        "settings": summary.settings,
        "methods": summary.methods,
        "labels": summary.labels,
        "cuts": summary.cuts,
        "tune": summary.tune,
        "compensation": context.compensation.record if context.compensation else None,
    }


def _with_headline(verdict: Verdict, scores: Mapping[str, Column], metric: str) -> Verdict:
    """Returns the verdict with its first line, which says what is recovered."""
    task = verdict.get("target", "")
    base, pruned, recovered = (
        cast("float", scores[name][task or "mean"][metric]["mean"])
        for name in ("base", "pruned", RECOVERED)
    )
    line = words.recovered_line(base, pruned, recovered, metric=metric, task=task)
    return {**verdict, "headline": line}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that shape a result."""
    python = {"python": platform.python_version(), "platform": sys.platform}
    return python | {package: version(package) for package in PACKAGES}
