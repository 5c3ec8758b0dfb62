"""The words of a report around its tables, the same in Markdown and HTML."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.scores import METRIC_MEANINGS, METRIC_UNITS, metric_meanings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rankadaptor_plugin.report.schema import ReportData

METHODS_ALONE = "recovery methods"
"""The reason to stop of a run that only fine-tunes given recovery methods."""

READING = (
    (
        "How sure",
        "a +- b is a value and the half width of its interval. Base and pruned model: over "
        "documents. Recovered models: over seeds and documents, counted so that the interval is "
        "rather too wide than too narrow.",
    ),
    (
        "What decides",
        "the paired comparison in the first metric: searched allocation, or another recovery "
        "method, minus uniform LoRA, same seeds, same documents. Two intervals in the score table "
        "may overlap although the paired one excludes zero. Unless the paired one lies above zero, "
        "uniform LoRA is delivered.",
    ),
    (
        "Search documents",
        "the only ones that the search saw. The best of many trials looks better on them than it "
        "is.",
    ),
    (
        "Report documents",
        "kept from the search. The score table and the verdict come from these, with seeds that "
        "the search did not use.",
    ),
    (
        "Metrics",
        f"{metric_meanings(METRIC_MEANINGS)} Higher is better for all. The noise floor says how "
        "noisy each of them is.",
    ),
    (
        "Ranks",
        "the LoRA rank of each decoder layer; layer 0 is at the bottom. Equal parameters: the "
        "uniform allocation has as many trainable parameters as the searched one, as nearly as "
        "whole ranks allow.",
    ),
)


def search_line(data: ReportData) -> str:
    """Says in one line how the search went."""
    search = data["search"]
    if search["stop_reason"] == METHODS_ALONE:
        return "No search: the run file names other recovery methods alone."
    begun = sum(trial["phase"] == "initialization" for trial in data["trials"])
    initial = max(search["n_startup_trials"], begun)
    return (
        f"Method {search['method']}: {search['complete']} trials complete, "
        f"{search['failed']} failed, {search['interrupted']} interrupted; the first {initial} were "
        f"planned as initialization phase. Stopped: {search['stop_reason']}. "
        f"Objective: {objective_label(data)}, on the search documents."
    )


def objective_label(data: ReportData) -> str:
    """Names what the search maximized, such as ``choice_logprob, mean of the tasks (nats)``."""
    metric, target = data["objective"]["metric"], data["objective"]["target"]
    place = "mean of the tasks" if target in ("", "mean") else f"task {target}"
    unit = METRIC_UNITS.get(metric)
    return f"{metric}, {place}{f' ({unit})' if unit else ''}"


def config_text(config: Mapping[str, Any]) -> str:
    """Writes the run file's values in the form of a run file."""
    plain = [(k, v) for k, v in config.items() if not isinstance(v, dict)]
    blocks = [_block("", plain)] if plain else []
    blocks += [_block(k, list(v.items())) for k, v in config.items() if isinstance(v, dict)]
    return "\n\n".join(blocks)


def _block(name: str, values: Sequence[tuple[str, Any]]) -> str:
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values]
    return "\n".join(([f"[{name}]"] if name else []) + lines)
