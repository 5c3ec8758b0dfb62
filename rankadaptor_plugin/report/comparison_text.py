"""Shows what `rankadaptor_plugin.verdict.comparison` found, as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from rankadaptor_plugin.core.scores import metric_meanings, unit_of_difference
from rankadaptor_plugin.report.console import printed
from rankadaptor_plugin.report.numbers import number

if TYPE_CHECKING:
    from rankadaptor_plugin.verdict.comparison import RunComparison
    from rankadaptor_plugin.verdict.statistics import Difference


def text(found: RunComparison, width: int) -> str:
    """Returns the tables and the sentences below them.

    Args:
        found: What was found.
        width: Characters in a line; a table that needs more gets more.
    """
    tasks = ", ".join(found.weights)
    place = f"task {tasks}" if len(found.weights) == 1 else f"weighted mean of {tasks}"
    meaning = metric_meanings([found.metric])
    sentences = [*_seeds_and_documents(found), *_correction(found), *found.notes]
    sentences = [meaning, *sentences] if meaning else sentences
    title = f"Difference A - B in {found.metric}, {place}:"
    return printed([title, "", _pairs(found), "", _models(found), "", *sentences], width)


def _pairs(found: RunComparison) -> Table:
    confidence = next(iter(found.pairs.values())).confidence
    unit = unit_of_difference(found.metric)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("A", "B"):
        table.add_column(name, no_wrap=True)
    for name in (
        f"difference ({unit})" if unit else "difference",
        f"{100 * confidence:g} % interval",
        "p",
        "adjusted p",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for (a, b), difference in found.pairs.items():
        estimate, low, high = (
            _signed(value, found.metric)
            for value in (difference.estimate, difference.low, difference.high)
        )
        table.add_row(
            Text(found.models[a].label),
            Text(found.models[b].label),
            estimate,
            f"{low} to {high}",
            number(difference.p, 4),
            number(difference.p_adjusted, 4),
            _verdict(difference),
        )
    return table


def _models(found: RunComparison) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("model", no_wrap=True)
    for name in ("trainable parameters", "seeds"):
        table.add_column(name, justify="right", no_wrap=True)
    for model in found.models:
        seeds = "none" if None in model.files else str(len(model.files))
        trainable = "none" if model.trainable is None else f"{model.trainable:,}"
        table.add_row(Text(model.label), trainable, seeds)
    return table


def _seeds_and_documents(found: RunComparison) -> list[str]:
    """Returns a line for all pairs, or one for each kind of pair where they differ."""
    lines: dict[str, list[str]] = {}
    for (a, b), difference in found.pairs.items():
        labels = f"{found.models[a].label} and {found.models[b].label}"
        lines.setdefault(_basis(difference), []).append(labels)
    if len(lines) == 1:
        return list(lines)
    return [f"{'; '.join(pairs)}: {line}" for line, pairs in lines.items()]


def _basis(difference: Difference) -> str:
    seeds = difference.seeds
    if seeds.paired:
        basis = f"{seeds.first} paired seeds"
    else:
        basis = f"seeds not paired ({seeds.first or 'none'} and {seeds.second or 'none'})"
    if seeds.left_out:
        basis += f", {seeds.left_out} of one model alone left out"
    basis += f"; {difference.documents:,} paired documents"
    if difference.left_out:
        basis += f", {difference.left_out:,} of one model alone left out"
    return f"{basis}."


def _correction(found: RunComparison) -> list[str]:
    """Says what intervals and verdicts are corrected for, unless that is nothing."""
    counts = {difference.comparisons for difference in found.pairs.values()}
    if counts == {1}:
        return []
    several = " or ".join(str(count) for count in sorted(counts))
    return [
        f"Intervals, adjusted p and verdicts hold for {several} comparisons together (Bonferroni)."
    ]


def _verdict(difference: Difference) -> str:
    if not difference.has_verdict:
        return "none: fewer than 3 seeds"
    if difference.is_gain:
        return "A is better"
    return "B is better" if difference.is_loss else "no difference beyond noise"


def _signed(value: float, metric: str) -> str:
    shown = number(100 * value, 2) if metric == "accuracy" else number(value, 4)
    return f"+{shown}" if float(shown) > 0 else shown
