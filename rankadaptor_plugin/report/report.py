"""The report of a run: report.json, and the same for people as Markdown and as an HTML page.

`rankadaptor_plugin.report.schema.ReportData` is the schema of report.json. Everything else is a
pure function of it, so an old report.json can be rendered again. The verdict comes first: what was
gained over LoRA at equal parameters, or that nothing was. The HTML page stands alone: no scripts,
no other files, no network.

The templates ask `rankadaptor_plugin.report.tables` for their rows. All text of a report is
untrusted: Jinja escapes what goes into HTML, a content security policy forbids anything to be
loaded, and the filters ``md`` and ``md_text`` escape what goes into Markdown.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.core.files import write_file
from rankadaptor_plugin.core.scores import metric_meanings, unit_of_difference
from rankadaptor_plugin.report import svg, tables, words
from rankadaptor_plugin.report.words import metric_label, visible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rankadaptor_plugin.report.schema import ReportData

BAR_WIDTH = 24  # characters of the longest bar in Markdown
EIGHTHS = "▏▎▍▌▋▊▉█"
PROVISIONAL = "provisional"


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
    json_path, md_path, html_path = _written(folder, "report", contents)
    for suffix in ("md", "html"):
        (folder / f"{PROVISIONAL}.{suffix}").unlink(missing_ok=True)
    return json_path, md_path, html_path


def write_provisional(folder: Path, data: ReportData, summary: str) -> tuple[Path, Path]:
    """Writes what is known of a run so far as provisional.md and provisional.html.

    Args:
        folder: The run folder; the report takes the place of the files.
        data: The part of `ReportData` that is known; its sentence is the heading.
        summary: Lines that say how far the run is.

    Returns:
        The paths, in this order.

    Raises:
        ArtifactError: If the folder cannot be written.
    """
    plain = cast("ReportData", _plain(data))
    pictures = _search_pictures(plain)
    names = {"md": "provisional.md.j2", "html": "provisional.html.j2"}
    texts = {
        suffix: rendered(name, plain, summary=summary, pictures=pictures)
        for suffix, name in names.items()
    }
    md_path, html_path = _written(folder, PROVISIONAL, texts | {"md": _tidy(texts["md"])})
    return md_path, html_path


def _written(folder: Path, name: str, contents: Mapping[str, str]) -> list[Path]:
    """Writes files of one name, by suffix."""
    paths = [folder / f"{name}.{suffix}" for suffix in contents]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, contents.values(), strict=True):
            write_file(path, partial(Path.write_text, data=content, encoding="utf-8", newline="\n"))
    except OSError as error:
        raise ArtifactError(
            f"The report cannot be written to {folder}: {error}. Check the folder and its rights."
        ) from error
    return paths


def page(data: ReportData) -> str:
    """Renders the report as an HTML page."""
    count = data["parameters"]["trainable"].get("recovered")
    facts = {
        "Delivered": tables.delivered(data),
        "Trainable parameters": words.UNKNOWN if count is None else f"{count:,}",
        "Compared with": data["verdict"]["baseline"],
        "Run time": tables.total_time(data),
        "Device": data["device"],
    }
    shares = {f"part{i}": name for i, (name, _, _) in enumerate(tables.shares(data))}
    return rendered(
        "report.html.j2",
        data,
        facts=facts,
        pictures=_pictures(data),
        ranks_legend=_ranks_legend(data),
        shares_legend=shares,
    )


def markdown(data: ReportData) -> str:
    """Renders the report as Markdown (GitHub flavor)."""
    return _tidy(rendered("report.md.j2", data, bars=_rank_bars))


def _tidy(text: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def rendered(template: str, data: ReportData, **values: Any) -> str:
    """Renders a template of the folder ``templates``, with further values that it asks for."""
    return _environment().get_template(template).render(data=data, **values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("rankadaptor_plugin.report"),
        autoescape=select_autoescape(("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"tables": tables, "words": words, "meanings": metric_meanings}
    environment.filters |= {"line": _line, "visible": _visible}
    environment.filters |= {"md": _markdown_line, "md_text": _markdown_text, "code": _code}
    return environment


# ------------------------------------------------------------------------------------ safe in HTML


def _line(text: str) -> str:
    return " ".join(text.split()).replace("+-", "±")


def _visible(text: str) -> str:
    return visible(text).strip(" ")


# -------------------------------------------------------------------------------- safe in Markdown


def _markdown_line(text: str) -> str:
    """Makes text safe inside a line of Markdown; underscores inside words stay readable."""
    return _escape(" ".join(text.split()))


def _markdown_text(text: str) -> str:
    """Makes text that a model wrote safe inside a line; its own line breaks stay visible."""
    text = _escape(visible(text).replace("\t", " ").strip(" "))
    # Dollars open formulas, and a colon before slashes makes a link of what a model wrote.
    text = re.sub(r"(\$|:(?=//))", r"\\\1", text)
    return text.replace("\n", " ↵<br>")


def _escape(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|#~])", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def _code(text: str) -> str:
    """Makes text a code block."""
    # A fence longer than any in the text cannot be closed by it.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _rank_bars(data: ReportData) -> str:
    """Draws the ranks as horizontal bars of block characters, one line per layer."""
    named = {name: ranks for name, ranks in tables.named_allocations(data).items() if ranks}
    top = max((rank for ranks in named.values() for rank in ranks), default=1)
    scale = min(1.0, BAR_WIDTH / top)
    column = max(15, round(top * scale) + len(str(top)) + 3, *(len(name) + 2 for name in named))
    slots = data.get("slots") or [f"{i:5}" for i in range(max(map(len, named.values()), default=0))]
    wide = max(map(len, slots), default=5)
    lines = [f"{'layer':{wide}}  " + "".join(name.ljust(column) for name in named)]
    for layer, slot in enumerate(slots):
        cells = (_bar(ranks[layer], scale) for ranks in named.values() if layer < len(ranks))
        lines.append(f"{slot:{wide}}  " + "".join(cell.ljust(column) for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def _bar(rank: int, scale: float) -> str:
    whole, part = divmod(max(1, round(8 * rank * scale)), 8)
    return "█" * whole + (EIGHTHS[part - 1] if part else "") + f" {rank}"


# --------------------------------------------------------------------------------------- pictures


def _pictures(data: ReportData) -> dict[str, str]:
    metric = data["objective"]["metric"]
    (scale, digits), unit = _scale(metric), metric_label(metric)

    def sized(trials: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
        complete = (t for t in trials if t.get("objective") is not None)
        return [(t["parameters"], scale * t["objective"]) for t in complete]

    best = sized(data["front"])
    return _search_pictures(data) | {
        "difference": _difference(data),
        "ranks": _ranks(data),
        "front": svg.front(sized(data["trials"]), best, unit, digits) if best else "",
        "shares": svg.share_bar(tables.shares(data)),
    }


def _search_pictures(data: ReportData) -> dict[str, str]:
    metric = data["objective"]["metric"]
    (scale, digits), unit = _scale(metric), metric_label(metric)
    points = []
    for trial in data["trials"]:
        values = (trial.get("objective"), trial.get("predicted"))
        measured, predicted = (None if value is None else scale * value for value in values)
        initial = trial["phase"] == "initialization"
        point = svg.Point(trial["position"] + 1, initial, measured, predicted, trial["state"])
        points.append(point)
    return {
        "best": svg.best_so_far(points, unit, digits),
        "scatter": svg.scatter(points, unit, digits),
    }


def _scale(metric: str) -> tuple[float, int]:
    return (100.0, 1) if metric == "accuracy" else (1.0, 3)


def _difference(data: ReportData) -> str:
    metric = data["metrics"][0]
    difference = data["verdict"]["comparisons"].get(metric)
    if not difference or difference["low"] is None or difference["high"] is None:
        return ""
    factor, _ = _scale(metric)
    middle, low, high = (factor * difference[name] for name in ("estimate", "low", "high"))
    title = tables.comparisons(data).caption.partition(",")[0]
    return svg.difference(middle, low, high, f"{unit_of_difference(metric)} of {metric}", title)


def _ranks(data: ReportData) -> str:
    named, slots = tables.allocations(data), data.get("slots", [])
    uniform = named.pop("uniform", [])
    label, ranks = next(iter(named.items()), ("searched", []))
    return svg.ranks(uniform, ranks, slots, label)


def _ranks_legend(data: ReportData) -> dict[str, str]:
    named = tables.allocations(data)
    if "recovered" in named:
        return {}
    baseline = data.get("labels", {}).get("uniform", "uniform allocation")
    legend = {"uniform": f"{baseline}, the even allocation of equal size"}
    other = next((name for name in named if name != "uniform"), "")
    if other:
        legend["searched"] = "best searched allocation" if other == "searched" else other
    return legend
