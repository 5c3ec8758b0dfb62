"""Text and tables on a terminal: the noise floor, a comparison, the layers of a model."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable

from rankadaptor_plugin.core.scores import metric_meanings, unit_of_difference
from rankadaptor_plugin.report import tables
from rankadaptor_plugin.report.tables import Table
from rankadaptor_plugin.report.words import duration, number, size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rankadaptor_plugin.models.inspection import Inspection
    from rankadaptor_plugin.verdict.comparison import RunComparison
    from rankadaptor_plugin.verdict.statistics import Difference

_ENDLESS = 10_000  # characters, more than any table has


def printed(parts: Sequence[Table | RichTable | str], width: int) -> str:
    """Returns lines and tables, one below the other.

    Args:
        parts: Lines, which the terminal wraps, and tables, without their captions.
        width: Characters in a line. A table that needs more gets more: a line that wraps is better
            than a number that is cut.
    """
    drawn = [_rich(part) if isinstance(part, Table) else part for part in parts]
    endless = _console(_ENDLESS)
    needed = [
        Measurement.get(endless, endless.options, part).maximum
        for part in drawn
        if isinstance(part, RichTable)
    ]
    console = _console(max([width, *needed]))
    with console.capture() as lines:
        for part in drawn:
            console.print(part, soft_wrap=True)
    return "\n".join(line.rstrip() for line in lines.get().splitlines())


def _console(width: int) -> Console:
    # A folder's name may hold brackets or colons, which are markup and emoji to rich.
    return Console(file=StringIO(), width=width, highlight=False, markup=False, emoji=False)


def _rich(table: Table, footer: Sequence[str] = ()) -> RichTable:
    drawn = RichTable(box=None, padding=(0, 2, 0, 0), show_footer=bool(footer))
    for place, name in enumerate(table.header):
        justify = "left" if place in table.left else "right"
        last = footer[place] if footer else ""
        drawn.add_column(name, last, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in table.rows:
        drawn.add_row(*row)
    return drawn


# ------------------------------------------------------------------------------------------- plan


_STAGES = {
    "evaluate": "evaluate base and pruned",
    "noise": "noise floor",
    "random": "random search",
    "confirm": "comparison",
    "texts": "texts and report",
}


def plan_text(plan: Mapping[str, Any], width: int) -> str:
    """Returns the table of what is left of a run, and the sentences below it.

    Args:
        plan: What `rankadaptor_plugin.pipeline.plan.Plan.to_json` returned.
        width: Characters in a line.
    """
    is_gpu, costs = plan["device"] == "cuda", plan["costs"]
    total = {"name": "all", **{key: plan[key] for key in ("fine_tunes", "seconds", "memory")}}
    columns = {
        "stage": lambda stage: _STAGES.get(stage["name"], stage["name"]),
        "fine-tunes": lambda stage: str(stage["fine_tunes"] or ""),
        "time": lambda stage: duration(stage["seconds"]),
        "GPU hours": lambda stage: f"{plan['devices'] * stage['seconds'] / 3600:.2g}",
        "peak memory": lambda stage: size(stage["memory"]),
    }
    if not is_gpu:
        del columns["GPU hours"]
    free = "" if plan["free_memory"] is None else f", {size(plan['free_memory'])} are free"
    trial = costs["fine_tune"] + costs["search_score"]
    sentences = [
        f"At most, on {plan['device']}{free}. A fine-tune takes {duration(costs['fine_tune'])}, "
        f"{duration(trial)} with its evaluation, and on the report documents "
        f"{duration(costs['report_score'])} more.",
        f"The run folder takes {size(plan['disk'])}; {size(plan['free_disk'])} are free there.",
        *([f"Earlier sessions took {duration(plan['spent'])}."] if plan["spent"] else []),
        *(f"Cut: {cut}." for cut in plan["cuts"]),
    ]
    table = Table.of("", [*plan["stages"], total], columns, ("stage",))
    return printed([table, "", *sentences], width)


# ------------------------------------------------------------------------------------ noise floor


def noise_text(noise: dict[str, Any], width: int) -> str:
    """Returns the conclusion, the tables and the forecast of a noise floor.

    Args:
        noise: What `rankadaptor_plugin.verdict.noise.Noise.to_json` returned.
        width: Characters in a line.
    """
    parts: list[Table | str] = [noise["sentence"], ""]
    for table in (tables.noise_scores(noise), tables.noise_needed(noise)):
        if table.rows:
            parts += [table.caption, table, ""]
    left, seconds = noise["fine_tunes_left"], noise["seconds_per_fine_tune"]
    forecast = (
        f"A fine-tune with its evaluation takes {duration(seconds)}; the at most {left} that are "
        f"left of this run file would take {duration(left * seconds)}."
    )
    return printed([*parts, metric_meanings(noise["scores"]), "", forecast], width)


# ------------------------------------------------------------------------------------- comparison


def comparison_text(comparison: RunComparison, width: int) -> str:
    """Returns the tables of a comparison of models and the sentences below them.

    Args:
        comparison: The comparison.
        width: Characters in a line; a table that needs more gets more.
    """
    tasks = ", ".join(comparison.weights)
    place = f"task {tasks}" if len(comparison.weights) == 1 else f"weighted mean of {tasks}"
    meaning = metric_meanings([comparison.metric])
    sentences = [*_seeds_and_documents(comparison), *_correction(comparison), *comparison.notes]
    sentences = [meaning, *sentences] if meaning else sentences
    title = f"Difference A - B in {comparison.metric}, {place}:"
    return printed([title, "", _pairs(comparison), "", _models(comparison), "", *sentences], width)


def _pairs(comparison: RunComparison) -> Table:
    confidence = next(iter(comparison.pairs.values())).confidence
    unit, models = unit_of_difference(comparison.metric), comparison.models

    def signed(value: float) -> str:
        percent = comparison.metric == "accuracy"
        shown = number(100 * value, 2) if percent else number(value, 4)
        return f"+{shown}" if float(shown) > 0 else shown

    return Table.of(
        "",
        comparison.pairs.items(),
        {
            "A": lambda pair: models[pair[0][0]].label,
            "B": lambda pair: models[pair[0][1]].label,
            f"difference ({unit})" if unit else "difference": lambda p: signed(p[1].estimate),
            f"{100 * confidence:g} % interval": lambda pair: (
                f"{signed(pair[1].low)} to {signed(pair[1].high)}"
            ),
            "p": lambda pair: number(pair[1].p, 4),
            "adjusted p": lambda pair: number(pair[1].p_adjusted, 4),
            "verdict": lambda pair: _verdict(pair[1]),
        },
        ("A", "B", "verdict"),
    )


def _models(comparison: RunComparison) -> Table:
    return Table.of(
        "",
        comparison.models,
        {
            "model": lambda m: m.label,
            "trainable parameters": lambda m: "none" if m.trainable is None else f"{m.trainable:,}",
            "seeds": lambda m: "none" if None in m.files else str(len(m.files)),
        },
    )


def _seeds_and_documents(comparison: RunComparison) -> list[str]:
    """Returns a line for all pairs, or one for each kind of pair where they differ."""
    lines: dict[str, list[str]] = {}
    for (a, b), difference in comparison.pairs.items():
        labels = f"{comparison.models[a].label} and {comparison.models[b].label}"
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


def _correction(comparison: RunComparison) -> list[str]:
    """Says what intervals and verdicts are corrected for, unless that is nothing."""
    counts = {difference.comparisons for difference in comparison.pairs.values()}
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


# ------------------------------------------------------------------------------ layers of a model


def inspection_text(inspection: Inspection, width: int) -> str:
    """Returns the tables of a model's layers and of what it costs.

    Args:
        inspection: The model.
        width: Characters in a line; a table that needs more gets more.
    """
    from rankadaptor_plugin.models.footprint import TOKENS  # needs torch, which others do without

    amounts = {
        "parameters": "parameters",
        "macs": f"MACs for {TOKENS} tokens",
        "kv_cache_bytes": "KV cache per token",
        "checkpoint_bytes": "checkpoint",
        "hidden_size": "hidden size",
        "layers": "layers",
    }
    title = f"{inspection.folder}: {inspection.architecture}, {inspection.dtype}"
    statistics = Table.of(
        "",
        amounts,
        {
            "": lambda key: amounts[key],
            "before": lambda key: _amount(key, inspection.before[key]),
            "after": lambda key: _amount(key, inspection.after[key]),
            "kept": lambda key: _percent(inspection.after[key] / inspection.before[key]),
        },
    )
    parts: list[Table | RichTable | str] = [title, ""]
    parts += [_layers(inspection), "", statistics]
    if inspection.removed_layers:
        gone = ", ".join(map(str, inspection.removed_layers))
        parts += ["", f"Removed layers, by their number before: {gone}"]
    return printed(parts, width)


def _layers(inspection: Inspection) -> RichTable:
    widths = [layer.widths for layer in inspection.layers]
    total, (other_before, other) = inspection.after["parameters"], inspection.other
    columns = {
        "layer": ("all", [str(layer.layer) for layer in inspection.layers]),
        "before": ("", [str(layer.before) for layer in inspection.layers]),
        "heads": _counted([w.heads for w in widths]),
        "KV heads": _counted([w.kv_heads for w in widths]),
        "channels": _counted([w.channels for w in widths]),
        "parameters": (f"{total:,}", [f"{layer.parameters:,}" for layer in inspection.layers]),
        "kept": (
            _percent(total / inspection.before["parameters"]),
            [_percent(layer.kept) for layer in inspection.layers],
        ),
    }
    if not inspection.removed_layers:
        del columns["before"]
    blanks = [""] * (len(columns) - 3)
    rows = [*zip(*(cells for _, cells in columns.values()), strict=True)]
    rows.append(("other", *blanks, f"{other:,}", _percent(other / other_before)))
    return _rich(Table("", tuple(columns), tuple(rows), ()), [last for last, _ in columns.values()])


def _counted(values: Sequence[int]) -> tuple[str, list[str]]:
    return f"{sum(values):,}", [f"{value:,}" for value in values]


def _amount(key: str, value: int) -> str:
    return size(value) if key.endswith("_bytes") else f"{value:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
