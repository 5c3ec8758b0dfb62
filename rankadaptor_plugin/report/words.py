"""Words and numbers of a report: percent, nats, points, times, and the sentences around the tables.

Everything below this works on the fractions and seconds of report.json, everything above on text.
"""

from __future__ import annotations

import json
import math
import unicodedata
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.scores import (
    KNOWN_METRICS,
    described,
    metric_meanings,
    unit_of_difference,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rankadaptor_plugin.report.schema import ReportData
    from rankadaptor_plugin.verdict.statistics import Difference

UNKNOWN = "n/a"
MODELS = {
    "base": "base",
    "pruned": "pruned",
    "compensated": "compensated, not trained",
    "recipe": "LoRA by the recipe",
    "lora": "LoRA, tuned",
    "stack": "LoRA on the stack",
    "uniform": "uniform LoRA",
    "searched": "searched ranks",
}
"""Names of the models in the order of the tables; `ReportData.labels` knows the ranks of LoRA."""

METHODS_ALONE = "recovery methods"
"""The reason to stop of a run that only fine-tunes given recovery methods."""

EQUAL = "at equal parameters"

MOST_DECIMALS = 6

READING = (
    (
        "How sure",
        "a +- b is a value and the half width of its interval; where that would reach past what "
        "is possible, the ends of the interval are given instead. Base and pruned model: over "
        "documents. Recovered models: over seeds and documents, counted so that the interval is "
        "too wide rather than too narrow.",
    ),
    (
        "What decides",
        "paired comparisons in the first metric, with the same seeds on the same documents. What "
        "is gained: the stack, tuned LoRA or another method minus LoRA by the recipe. What ranks "
        "alone give: searched ranks minus even ranks of the same size on the same stack, with the "
        "same settings. Two intervals in the score table may overlap although the paired one "
        "excludes zero. Unless a paired one lies above zero, LoRA by the recipe is delivered.",
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
        f"{metric_meanings(KNOWN_METRICS)} Higher is better for all. The noise floor says how "
        "noisy each of them is.",
    ),
    (
        "Ranks",
        "the LoRA rank of each decoder layer; layer 0 is at the bottom. Equal parameters: the "
        "even allocation has as many trainable parameters as the searched one, as nearly as whole "
        "ranks allow.",
    ),
    (
        "Stack",
        "what is added to LoRA because it raised the score on the search documents: compensate "
        "(refitted frozen weights), distill (the unpruned model's predictions), gradient (first "
        "weights).",
    ),
)


def number(value: float | None, digits: int = 3) -> str:
    """Writes a number with fixed digits, without negative zero."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def scored(value: float | None, metric: str) -> str:
    """Writes a value of a metric: accuracy in percent with one decimal, nats with three."""
    if metric == "accuracy":
        return number(None if value is None else 100 * value, 1)
    return number(value)


def interval(cell: Mapping[str, Any] | None, metric: str, name: str = "mean") -> str:
    """Writes a value and the half width of its interval; the ends where they were clipped.

    Args:
        cell: The value under `name`, and ``half_width``, ``low`` and ``high``; earlier reports have
            no ends. None for a value that is not known.
        metric: The metric.
        name: Name of the value.
    """
    if cell is None:
        return UNKNOWN
    value, half = cell[name], cell["half_width"]
    low, high = cell.get("low"), cell.get("high")
    if None not in (value, half, low, high):
        cut = max(low - (value - half), value + half - high)
        if cut > 1e-9 * max(1.0, half):
            return f"{scored(value, metric)} ({scored(low, metric)} to {scored(high, metric)})"
    return f"{scored(value, metric)} +- {scored(half, metric)}"


def metric_label(metric: str) -> str:
    """Names a metric and its unit."""
    unit = described(metric).unit
    return f"{metric} in {unit}" if unit else metric


def metric_title(metric: str) -> str:
    """Names a metric, its unit and, in plain words, what it is."""
    meaning = described(metric).meaning
    return metric_label(metric) + (f" ({meaning})" if meaning else "")


def size(count: int) -> str:
    """Writes a number of bytes."""
    if count < 2**10:
        return f"{count} B"
    for power, unit in ((10, "KiB"), (20, "MiB")):
        if round(count / 2**power, 1) < 2**10:
            return f"{count / 2**power:.1f} {unit}"
    return f"{count / 2**30:,.1f} GiB"


def duration(seconds: float | None) -> str:
    """Writes seconds, from a minute on with hours, minutes and seconds."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 60:  # noqa: PLR2004  (a minute)
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def visible(text: str) -> str:
    """Shows by name the characters that are invisible, reorder the line or cannot be written."""
    return "".join(map(_named, text.replace("\r\n", "\n")))


def _named(character: str) -> str:
    joiners = "\u200c\u200d"  # some scripts and emoji need them
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    if not hidden or character in "\n\t" or character in joiners:
        return character
    return f"⟨U+{ord(character):04X}⟩"


def recovered_line(
    base: float, pruned: float, recovered: float, metric: str = "accuracy", task: str = ""
) -> str:
    """Says how much of what pruning cost is recovered.

    Args:
        base: Mean score of the unpruned model.
        pruned: That of the pruned one.
        recovered: That of what is delivered.
        metric: What they are scores of.
        task: The one task; empty for the mean of all.
    """
    factor, digits = (100, 1) if metric == "accuracy" else (1, 3)
    unit = unit_of_difference(metric) or metric
    place = f" on {task}" if task else ""
    lost, gained = factor * (base - pruned), factor * (recovered - pruned)
    cost = f"{number(lost, digits)} {unit}"
    if float(number(lost, digits)) <= 0:
        added = f"{number(gained, digits)} {unit}"
        return f"pruning cost nothing{place} in {metric}; recovery adds {added}"
    if float(number(gained, digits)) <= 0:
        return f"recovered none of the {cost} that pruning cost{place}"
    if gained >= lost:
        more = number(gained - lost, digits)
        return f"recovered all of the {cost} that pruning cost{place}, and {more} more"
    return f"recovered {number(gained, digits)} of the {cost} that pruning cost{place}"


def gain_sentence(
    comparison: Difference,
    subject: str,
    reference: str,
    *,
    task: str = "",
    metric: str = "accuracy",
    parameters: str = EQUAL,
) -> str:
    """Says in one sentence what something gained over something else.

    Differences of accuracy are in points, with one decimal; more only where rounding would hide
    that an interval excludes zero.

    Args:
        comparison: The one minus the other in the metric.
        subject: Names the one.
        reference: Names the other.
        task: The one task that was compared; empty for the mean of all.
        metric: What was compared.
        parameters: How their numbers of trainable parameters compare.
    """
    factor, digits = (100, 1) if metric == "accuracy" else (1, 3)
    unit = unit_of_difference(metric) or metric
    where = f"{parameters}{f' on {task}' if task else ''}"
    estimate, half = factor * comparison.estimate, factor * comparison.half_width
    if comparison.is_gain:
        gain = f"{_points(estimate, half, digits)} {unit}"
        return f"gain of {gain} over {reference} {where}, by {subject}"
    if comparison.is_loss:
        worse = _points(-estimate, half, digits)
        return f"no gain: {subject} is worse than {reference} by {worse} {unit} {where}"
    difference = f"{number(estimate, digits)} +- {number(half, digits)} {unit}"
    why = "no gain beyond noise" if comparison.has_verdict else "no verdict from so few seeds"
    return f"{why}: {difference} over {reference} {where}, by {subject}"


def _points(estimate: float, half: float, least: int) -> str:
    """Writes an estimate whose interval excludes zero so that it still does when rounded."""
    for digits in range(least, MOST_DECIMALS):
        if float(f"{estimate:.{digits}f}") > float(f"{half:.{digits}f}"):
            break
    return f"{number(estimate, digits)} +- {number(half, digits)}"


def search_line(data: ReportData) -> str:
    """Says in one line how the search went."""
    search = data["search"]
    if search["stop_reason"] == METHODS_ALONE:
        return "No search: the run file names only other recovery methods."
    begun = sum(trial["phase"] == "initialization" for trial in data["trials"])
    initial = max(search["n_startup_trials"], begun)
    return (
        f"Method {search['method']}: {search['complete']} trials complete, "
        f"{search['failed']} failed, {search['interrupted']} interrupted; the first {initial} were "
        f"planned as initialization phase. Stopped: {search['stop_reason']}. "
        f"Objective: {objective_label(data)}, on the search documents. "
        f"{metric_meanings([data['objective']['metric']])}"
    ).rstrip()


def verdict_lines(data: ReportData) -> list[str]:
    """Returns what a report opens with: what is recovered, both sentences, what else it cost."""
    verdict = data["verdict"]
    keys = ("headline", "sentence", "ranks", "costs")
    return [str(verdict[key]) for key in keys if verdict.get(key)]  # type: ignore[literal-required]


def tune_line(data: ReportData) -> str:
    """Says what the tune stage chose; empty where nothing was tuned."""
    tuned = data.get("tune")
    if not tuned or not tuned["curves"]:
        return ""
    rate, recipe = tuned["learning_rate"], tuned["recipe"]
    chosen = (
        f"the recipe's learning rate, {recipe:g}, was right"
        if rate == recipe
        else f"learning rate {rate:g} in place of the recipe's {recipe:g}"
    )
    edge = ", at the edge of those that were tried" if tuned["at_edge"] else ""
    stack = " + ".join(tuned["parts"]) or ("no part of it helped" if tuned["tried"] else "none")
    return (
        f"Tuned on the search documents: {chosen}{edge}; stack: {stack}. {tuned['fine_tunes']} "
        f"fine-tunes, {duration(tuned['seconds'])}."
    )


def compensation_line(data: ReportData) -> str:
    """Says what was fitted without training; empty where nothing was."""
    record = data.get("compensation")
    if not record:
        return ""
    text = " and ".join(record.get("text", ())) or "calibration text"
    return (
        f"Compensation ({record.get('method', 'of a plugin')}): fitted to "
        f"{record.get('sequences', UNKNOWN)} sequences of {text} in "
        f"{duration(record.get('seconds'))}; a column of the scores shows what it does before any "
        "fine-tune."
    )


def headline(data: ReportData) -> str:
    """Returns the first line of a report."""
    return (verdict_lines(data) or [""])[0]


def cuts_line(data: ReportData) -> str:
    """Says what was left out to keep within the time of the run; empty if nothing was."""
    cuts = data.get("cuts")
    if not cuts:
        return ""
    search = data["config"]["search"]
    keys = ("max_hours", "max_gpu_hours")
    limits = " and ".join(f"{key} {search[key]:g}" for key in keys if search.get(key))
    return f"Cut to fit {limits}: {'; '.join(cuts)}."


def race_line(data: ReportData) -> str:
    """Says how the race was run."""
    race = data["confirm"]
    count, seeds = len(race["competitors"]), len(race["seeds"])
    if not count:
        return "No race was run." + (f" LoRA ran alone, with {seeds} seeds." if seeds else "")
    return (
        f"{'1 competitor' if count == 1 else f'{count} competitors'}, on the report documents; "
        f"{seeds} fresh seeds each; {race['fine_tunes']} fine-tunes. Rate of false gains: "
        f"{100 * race['error_rate']:g} %, all comparisons together."
    )


def objective_label(data: ReportData) -> str:
    """Names what the search maximized, such as ``choice_logprob, mean of the tasks (nats)``."""
    metric, target = data["objective"]["metric"], data["objective"]["target"]
    place = "mean of the tasks" if target in ("", "mean") else f"task {target}"
    unit = described(metric).unit
    return f"{metric}, {place}{f' ({unit})' if unit else ''}"


def config_text(config: Mapping[str, Any]) -> str:
    """Writes the run file's values in the format of a run file."""
    plain = [(k, v) for k, v in config.items() if not isinstance(v, dict)]
    blocks = [_block("", plain)] if plain else []
    blocks += [_block(k, list(v.items())) for k, v in config.items() if isinstance(v, dict)]
    return "\n\n".join(blocks)


def _block(name: str, values: Sequence[tuple[str, Any]]) -> str:
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values]
    return "\n".join(([f"[{name}]"] if name else []) + lines)
