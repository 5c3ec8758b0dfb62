"""The report as one HTML page that stands alone: no scripts, no other files, no network.

All text passes through `html.escape`; a content security policy forbids anything to be loaded.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.scores import unit_of_difference
from rankadaptor_plugin.report import report_model_tables as model_tables
from rankadaptor_plugin.report import report_noise_tables as noise_tables
from rankadaptor_plugin.report import report_search_tables as search_tables
from rankadaptor_plugin.report import svg, tables
from rankadaptor_plugin.report import texts as generation
from rankadaptor_plugin.report.numbers import metric_label
from rankadaptor_plugin.report.report_style import STYLE
from rankadaptor_plugin.report.words import READING, config_text, search_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rankadaptor_plugin.report.schema import ReportData
    from rankadaptor_plugin.report.tables import Table


def page(data: ReportData) -> str:
    """Renders the report as an HTML page."""
    sentence = _text(data["verdict"]["sentence"])
    first, *others = data["metrics"]
    body = [
        '<p class="kind">RankAdaptor report</p>',
        f"<h1>{sentence}</h1>",
        _facts(data),
        "<h2>Scores</h2>",
        _table(tables.scores(data, first), total="mean"),
        _decision(data),
        "<h2>Ranks by layer</h2>",
        _ranks(data),
        _table(model_tables.parameters(data)),
        "<h2>The pruned model</h2>",
        _table(model_tables.footprint(data)),
        _noise(data),
        "<h2>Search</h2>",
        f"<p>{_text(search_line(data))}</p>",
        _pictures(data),
        _details(f"All {len(data['trials'])} trials", _table(search_tables.trials(data))),
        _table(search_tables.knowledge(data)),
        _front(data),
        "<h2>The race</h2>",
        f"<p>{_text(search_tables.race_line(data))}</p>",
        _table(search_tables.race(data)),
        _texts(data),
        "<h2>Cost</h2>",
        _cost(data),
        "<h2>How to read this</h2>",
        _reading(),
        _table(tables.documents(data)),
        "<h2>Details</h2>",
        *(
            _details(f"Scores: {metric}", _table(tables.scores(data, metric), total="mean"))
            for metric in others
        ),
        _details("Layers", _table(model_tables.layers(data))),
        _details("Versions", _table(tables.pairs("versions", data["versions"]))),
        _details("Seeds", _table(tables.pairs("seeds", data["seeds"]))),
        _details("Inputs (run file)", f"<pre>{escape(config_text(data['config']))}</pre>"),
    ]
    content = "\n".join(part for part in body if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>RankAdaptor: {sentence}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{content}\n</main>\n</body>\n</html>\n"
    )


def _facts(data: ReportData) -> str:
    count = data["parameters"]["trainable"].get("recovered")
    facts = {
        "Delivered": tables.delivered(data),
        "Trainable parameters": "n/a" if count is None else f"{count:,}",
        "Compared with": data["verdict"]["baseline"],
        "Run time": tables.total_time(data),
        "Device": data["device"],
    }
    items = "".join(f"<div><dt>{k}</dt><dd>{_text(v)}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _decision(data: ReportData) -> str:
    if not data["verdict"]["comparisons"]:
        return ""
    parts = ["<h3>The comparison that decides</h3>"]
    metric = data["metrics"][0]
    found = data["verdict"]["comparisons"].get(metric)
    if found and found["low"] is not None and found["high"] is not None:
        factor = 100 if metric == "accuracy" else 1
        middle, low, high = (factor * found[name] for name in ("estimate", "low", "high"))
        picture = svg.difference(middle, low, high, f"{unit_of_difference(metric)} of {metric}")
        parts.append(_figure(picture, "", "small"))
    return "\n".join([*parts, _table(tables.comparisons(data))])


def _ranks(data: ReportData) -> str:
    named, slots = tables.allocations(data), data.get("slots", [])
    if "recovered" in named:
        return _figure(svg.ranks([], named["recovered"], slots), "", "broad")
    labels = {"uniform": "uniform allocation"}
    uniform, other = named.pop("uniform"), next(iter(named), "")
    if other:
        labels["searched"] = "best searched allocation" if other == "searched" else other
    picture = svg.ranks(uniform, named.get(other, []), slots, other or "searched")
    return _figure(picture, _legend(labels), "broad")


def _pictures(data: ReportData) -> str:
    metric = data["objective"]["metric"]
    scale, digits = (100.0, 1) if metric == "accuracy" else (1.0, 3)
    unit = metric_label(metric)
    points = []
    for trial in data["trials"]:
        values = (trial.get("objective"), trial.get("predicted"))
        measured, predicted = (None if v is None else scale * v for v in values)
        initial = trial["phase"] == "initialization"
        position, state = trial["position"] + 1, trial["state"]
        points.append(svg.Point(position, initial, measured, predicted, state))
    steps = svg.best_so_far(points, unit, digits)
    scatter = svg.scatter(points, unit, digits)
    legend = _legend({"phase": "initialization phase"})
    first = _figure(
        steps,
        f"Best so far (line) and every trial (dots; cross: failed). {legend}",
    )
    second = _figure(scatter, "Predicted against measured. Dashed: predicted equals measured.")
    return (
        f'<div class="pair">{first or "<p>No trial is complete.</p>"}'
        f"{second or '<p>No trial has both a prediction and a measured value.</p>'}</div>"
    )


def _front(data: ReportData) -> str:
    if not data["front"]:
        return ""
    percent = data["objective"]["metric"] == "accuracy"
    scale, digits = (100.0, 1) if percent else (1.0, 3)

    def points(trials: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
        complete = (t for t in trials if t.get("objective") is not None)
        return [(t["parameters"], scale * t["objective"]) for t in complete]

    unit = metric_label(data["objective"]["metric"])
    picture = svg.front(points(data["trials"]), points(data["front"]), unit, digits)
    return _figure(picture, "Line: the Pareto front.") + _table(search_tables.front(data))


def _noise(data: ReportData) -> str:
    if not data["noise"]:
        return ""
    return (
        f"<h2>Noise floor</h2><p>{_text(data['noise']['sentence'])}</p>"
        f"{_table(noise_tables.scores(data['noise']))}{_table(noise_tables.needed(data['noise']))}"
    )


def _texts(data: ReportData) -> str:
    texts = data["generation"]
    if not texts:
        return ""
    shown = _details(f"All {len(texts)} texts", generation.html(texts))
    return f"<h2>Texts</h2>{_table(generation.quality_table(texts))}{shown}"


def _cost(data: ReportData) -> str:
    shares = tables.shares(data)
    legend = _legend({f"part{i}": name for i, (name, _, _) in enumerate(shares)})
    bar = _figure(svg.share_bar(shares), legend)
    listed = "".join(f"<div>{_table(table)}</div>" for table in tables.costs(data))
    return f'{bar}<div class="pair">{listed}</div>'


def _reading() -> str:
    items = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in READING)
    return f'<dl class="reading">{items}</dl>'


def _legend(entries: dict[str, str]) -> str:
    return "".join(
        f'<span class="legend"><span class="key {kind}"></span>{_text(name)}</span>'
        for kind, name in entries.items()
    )


def _figure(picture: str, caption: str, kind: str = "") -> str:
    if not picture:
        return ""
    caption = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="{kind}"><div class="scroll">{picture}</div>{caption}</figure>'


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{content}</details>" if content else ""


def _table(table: Table | None, total: str = "") -> str:
    """Renders a table; the row that starts with `total` is set apart."""
    if table is None or not table.rows:
        return ""
    words = ['class="words"' if i in table.left else "" for i in range(len(table.header))]
    head = "".join(
        f'<th scope="col" {kind}>{_text(cell)}</th>'
        for kind, cell in zip(words, table.header, strict=True)
    )
    rows = []
    for row in table.rows:
        first, *rest = row
        cells = "".join(
            f"<td {_wide(w, c)}>{_cell(c)}</td>" for w, c in zip(words[1:], rest, strict=True)
        )
        kind = ' class="total"' if total and row is table.rows[-1] and row[0] == total else ""
        rows.append(f'<tr{kind}><th scope="row" {words[0]}>{_cell(first)}</th>{cells}</tr>')
    caption = _text(table.caption)
    return (
        f'<p class="caption">{caption}</p>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">'
        f'<table aria-label="{caption}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _wide(kind: str, text: str) -> str:
    # Ranks of many layers need room, or a row becomes taller than the screen.
    many = 20
    return 'class="words long"' if kind and len(text) > many and " " not in text else kind


def _cell(text: str) -> str:
    value, sign, half = text.partition(" +- ")
    if not sign:
        return escape(text)
    return f'{escape(value)} <span class="pm">± {escape(half)}</span>'


def _text(text: str) -> str:
    return escape(" ".join(text.split())).replace("+-", "±")
