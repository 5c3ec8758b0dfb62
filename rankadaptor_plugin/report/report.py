"""The report of a run: report.json, and the same for people as Markdown and as an HTML page.

`rankadaptor_plugin.report.schema.ReportData` is the schema of report.json. Everything else is a
pure function of it, so an old report.json can be rendered again. The verdict comes first: what was
gained over uniform LoRA at equal parameters, or that nothing was.
"""

from __future__ import annotations

import json
import math
import os
import re
from typing import TYPE_CHECKING, Any, cast

from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.core.scores import unit_of_difference
from rankadaptor_plugin.report import report_model_tables as model_tables
from rankadaptor_plugin.report import report_noise_tables as noise_tables
from rankadaptor_plugin.report import report_search_tables as search_tables
from rankadaptor_plugin.report import tables
from rankadaptor_plugin.report import texts as generation
from rankadaptor_plugin.report.html import page
from rankadaptor_plugin.report.numbers import number
from rankadaptor_plugin.report.words import READING, config_text, search_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rankadaptor_plugin.report.schema import ReportData
    from rankadaptor_plugin.report.tables import Table
    from rankadaptor_plugin.verdict.statistics import Difference

BAR_WIDTH = 24  # characters of the longest bar in Markdown
EIGHTHS = "▏▎▍▌▋▊▉█"
MOST_DECIMALS = 6
SEARCHED, METHODS = "the searched allocation", "the recovery methods"
EQUAL = "at equal parameters"


def baseline_label(uniform: Sequence[int]) -> str:
    """Names the baseline: ``uniform rank 8``, or that its ranks are mixed."""
    if len(set(uniform)) == 1:
        return f"uniform rank {uniform[0]}"
    return "the most even allocation"


def alone_sentence(uniform: Sequence[int]) -> str:
    """Says that uniform LoRA was all there was."""
    return f"uniform LoRA alone, compared with nothing: {baseline_label(uniform)} is delivered"


def verdict_sentence(
    comparison: Difference | None,
    uniform: Sequence[int],
    task: str = "",
    metric: str = "accuracy",
    *,
    searched: bool = True,
    subject: str = SEARCHED,
    parameters: str = EQUAL,
) -> str:
    """Says in one sentence what the search, or another recovery method, gained.

    Differences of accuracy are in points, with one decimal; more only where rounding would hide
    that an interval excludes zero.

    Args:
        comparison: Searched minus uniform allocation in the metric; None where no finalist differs
            from the uniform one.
        uniform: Ranks of the baseline, one per layer.
        task: The one task that was compared; empty for the mean of all.
        metric: What was compared.
        searched: Whether noise left a reason to search.
        subject: What was compared with uniform LoRA.
        parameters: How their numbers of trainable parameters compare.
    """
    label = baseline_label(uniform)
    if not searched:
        return f"no search: no plausible gain rises above the noise; {label} is delivered"
    factor, digits = (100, 1) if metric == "accuracy" else (1, 3)
    unit = unit_of_difference(metric) or metric
    what = "" if subject == SEARCHED else f", by {subject}"
    where = f"{parameters}{f' on {task}' if task else ''}{what}"
    if comparison is None:
        found = {SEARCHED: "the search found nothing", METHODS: "no recovery method is shown to be"}
        return f"{found.get(subject, f'{subject} is no')} better than {label}: uniform is delivered"
    estimate, half = factor * comparison.estimate, factor * comparison.half_width
    if comparison.is_gain:
        return f"gain of {_points(estimate, half, digits)} {unit} over {label} {where}"
    if comparison.is_loss:
        return (
            f"no gain: {subject} is worse than {label} by "
            f"{_points(-estimate, half, digits)} {unit}{f' on {task}' if task else ''}: uniform is "
            "delivered"
        )
    size = f"{number(estimate, digits)} +- {number(half, digits)} {unit} over {label} {where}"
    return f"no gain beyond noise: uniform is delivered ({size})"


def write_report(folder: Path, data: ReportData) -> tuple[Path, Path, Path]:
    """Writes report.json, report.md and report.html, each at once or not at all.

    Numbers that are not finite become null, so that every JSON reader can read the file.

    Returns:
        The paths, in this order.

    Raises:
        ArtifactError: If the folder cannot be written.
    """
    text = json.dumps(_plain(data), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # Rendered from what was written: rendering report.json again gives the same bytes.
    plain = cast("ReportData", json.loads(text))
    contents = {"json": text + "\n", "md": markdown(plain), "html": page(plain)}
    paths = [folder / f"report.{suffix}" for suffix in contents]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, contents.values(), strict=True):
            _write(path, content)
    except OSError as error:
        raise ArtifactError(
            f"The report cannot be written to {folder}: {error}. Check the folder and its rights."
        ) from error
    return paths[0], paths[1], paths[2]


def markdown(data: ReportData) -> str:
    """Renders the report as Markdown (GitHub flavour)."""
    verdict = data["verdict"]
    first, *others = data["metrics"]
    parts = [
        f"# {_escape(verdict['sentence'])}",
        f"Delivered: {_escape(tables.delivered(data))}. "
        f"Device: {_escape(data['device'])}. Time: {tables.total_time(data)}.",
        "## Scores",
        _table(tables.scores(data, first)),
    ]
    if verdict["comparisons"]:
        parts += ["### The comparison that decides", _table(tables.comparisons(data))]
    parts += ["## Ranks by layer", _code(_bars(data)), _table(model_tables.parameters(data))]
    parts += ["## The pruned model", _table(model_tables.footprint(data))]
    if data["noise"]:
        parts += [
            "## Noise floor",
            _escape(data["noise"]["sentence"]),
            _table(noise_tables.scores(data["noise"])),
            _table(noise_tables.needed(data["noise"])),
        ]
    parts += [
        "## Search",
        _escape(search_line(data)),
        _table(search_tables.trials(data)),
        _table(search_tables.knowledge(data)),
        _table(search_tables.front(data)),
        "## The race",
        _escape(search_tables.race_line(data)),
        _table(search_tables.race(data)),
        *(
            [
                "## Texts",
                _table(generation.quality_table(data["generation"])),
                generation.markdown(data["generation"]),
            ]
            if data["generation"]
            else []
        ),
        "## Cost",
        *(_table(table) for table in tables.costs(data)),
        "## How to read this",
        "\n".join(f"- **{_escape(name)}:** {_escape(text)}" for name, text in READING),
        _table(tables.documents(data)),
        "## Details",
        *(_table(tables.scores(data, metric)) for metric in others),
        _table(model_tables.layers(data)),
        _table(tables.pairs("versions", data["versions"])),
        _table(tables.pairs("seeds", data["seeds"])),
        "Inputs (run file)",
        _code(config_text(data["config"])),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _points(estimate: float, half: float, least: int) -> str:
    """Writes an estimate whose interval excludes zero so that it still does when rounded."""
    for digits in range(least, MOST_DECIMALS):
        if float(f"{estimate:.{digits}f}") > float(f"{half:.{digits}f}"):
            break
    return f"{number(estimate, digits)} +- {number(half, digits)}"


def _bars(data: ReportData) -> str:
    """Draws the ranks as horizontal bars of block characters, one line per layer."""
    found = {name: ranks for name, ranks in tables.allocations(data).items() if ranks}
    top = max((rank for ranks in found.values() for rank in ranks), default=1)
    scale = min(1.0, BAR_WIDTH / top)
    column = round(top * scale) + len(str(top)) + 3
    named = data.get("slots") or [f"{i:5}" for i in range(max(map(len, found.values()), default=0))]
    wide = max(map(len, named), default=5)
    lines = [
        f"{'layer':{wide}}  " + "".join(f"{name} rank".ljust(max(column, 15)) for name in found)
    ]
    for layer, name in enumerate(named):
        cells = (_bar(ranks[layer], scale) for ranks in found.values() if layer < len(ranks))
        lines.append(f"{name:{wide}}  " + "".join(cell.ljust(max(column, 15)) for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def _bar(rank: int, scale: float) -> str:
    whole, part = divmod(max(1, round(8 * rank * scale)), 8)
    return "█" * whole + (EIGHTHS[part - 1] if part else "") + f" {rank}"


def _table(table: Table | None) -> str:
    if table is None or not table.rows:
        return ""
    rule = ["---" if i in table.left else "--:" for i in range(len(table.header))]
    rows = [map(_escape, table.header), rule, *(map(_escape, row) for row in table.rows)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return f"{_escape(table.caption)}\n\n" + "\n".join(lines)


def _code(text: str) -> str:
    # A fence longer than any in the text cannot be closed by it.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _escape(text: str) -> str:
    """Makes text safe inside a line of Markdown; underscores inside words stay readable."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|#~])", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write(path: Path, content: str) -> None:
    # Beside its target: only there is os.replace atomic. Opened plainly, it obeys the umask.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
