"""Pictures of the regret of searches, as plain SVG: a panel for each kind of task and noise."""

from __future__ import annotations

import itertools
from html import escape
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.report.svg import Frame

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

# Okabe and Ito's colors, which those who do not see all colors can tell apart.
_STYLES = {
    "bayes": ("#0072b2", ""),
    "bayes-nometa": ("#0072b2", "5 3"),
    "paper": ("#cc79a7", ""),
    "paper-nometa": ("#cc79a7", "5 3"),
    "paper, observed": ("#cc79a7", "1.5 2.5"),
    "gp": ("#009e73", ""),
    "tpe": ("#56b4e9", ""),
    "random": ("#888888", ""),
}
_PICTURES = {
    "regret-methods": ("bayes", "paper", "paper, observed", "gp", "tpe", "random"),
    "regret-own": ("bayes", "paper", "bayes-nometa", "paper-nometa"),
}
_WIDTH, _HEIGHT, _LEGEND = 300.0, 230.0, 28.0
_GRID = 2  # sigma_b between the lines of the grid


def draw(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws the pictures of a `regret_tables.summary`.

    Every method is shown by its own final rule: the recommendation of its performance model, or
    without one the best value measured. ``paper, observed`` is the best value that the paper's
    search measured, which its own rule passes over. Bars are one standard error to either side.

    Returns:
        The files, one per choice of methods.
    """
    paths = []
    for name, methods in _PICTURES.items():
        path = folder / f"{name}.svg"
        path.write_text(picture(summary["rows"], methods), "utf-8")
        paths.append(path)
    return paths


def picture(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> str:
    """Draws regret against evaluations, a column per kind and a row per noise ratio."""
    both = [r for r in rows if (r["method"], r["rule"]) == ("paper", "observed")]
    rows = [*rows, *({**row, "method": "paper, observed"} for row in both)]
    kinds = sorted({row["kind"] for row in rows})
    noises = sorted({row["noise"] for row in rows})
    shown = [m for m in methods if any(row["method"] == m for row in rows)]
    marks = []
    for i, method in enumerate(shown):
        color, dashes = _STYLES[method]
        x = 60 + 140.0 * i
        marks += [
            f'<path d="M{x} 14h24" stroke="{color}" stroke-width="2" stroke-dasharray="{dashes}"/>',
            f'<text x="{x + 30}" y="18">{escape(method)}</text>',
        ]
    for (column, kind), (line, noise) in itertools.product(enumerate(kinds), enumerate(noises)):
        panel = [r for r in rows if (r["kind"], r["noise"]) == (kind, noise)]
        place = f"translate({column * _WIDTH} {_LEGEND + line * _HEIGHT})"
        marks.append(
            f'<g transform="{place}">{_panel(panel, shown, f"{kind}, noise {noise:g}")}</g>'
        )
    width = max(len(kinds) * _WIDTH, 60 + 140.0 * len(shown))
    height = _LEGEND + len(noises) * _HEIGHT
    label = "Simple regret in standard deviations of random allocations, by evaluations."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img" aria-label="{label}" '
        'font-family="sans-serif" font-size="11" fill="#222">'
        f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>\n'
        + "\n".join(marks)
        + "\n</svg>\n"
    )


def _panel(rows: Sequence[Mapping[str, Any]], methods: Sequence[str], title: str) -> str:
    own = {r["method"]: r for r in sorted(rows, key=lambda r: r["rule"], reverse=True)}
    own = {method: own[method] for method in methods if method in own}
    if not own:
        return ""
    checks = [int(check) for check in next(iter(own.values()))["mean"]]
    top = max(max(row["mean"].values()) for row in own.values()) * 1.08
    frame = Frame(
        _WIDTH, _HEIGHT, (-0.3, len(checks) - 0.7), (0.0, top), 42.0, 10.0, top=24.0, bottom=36.0
    )
    left, right, floor = frame.left, frame.width - frame.right, frame.y(0)
    marks = [f'<text x="{left}" y="16" font-weight="bold">{escape(title)}</text>']
    for value in range(0, int(top) + 1, _GRID if top > 2 * _GRID else 1):
        y = frame.y(value)
        marks.append(f'<path d="M{left} {y}H{right}" stroke="#ddd"/>')
        marks.append(f'<text x="{left - 6}" y="{y + 4:g}" text-anchor="end">{value}</text>')
    for i, check in enumerate(checks):
        marks.append(
            f'<text x="{frame.x(i)}" y="{floor + 15:g}" text-anchor="middle">{check}</text>'
        )
    middle = (left + right) / 2
    marks.append(f'<text x="{middle}" y="{floor + 30:g}" text-anchor="middle">evaluations</text>')
    height = (floor + frame.top) / 2
    marks.append(
        f'<text transform="translate(14 {height:g}) rotate(-90)" text-anchor="middle">'
        "regret in sigma_b</text>"
    )
    for number, (method, row) in enumerate(own.items()):
        color, dashes = _STYLES[method]
        aside = (number - (len(own) - 1) / 2) * 2.0  # so that bars do not hide each other
        xs = [round(frame.x(i) + aside, 2) for i in range(len(checks))]
        means = [row["mean"][str(check)] for check in checks]
        errors = [row["stderr"][str(check)] for check in checks]
        steps = " L".join(f"{x} {frame.y(mean)}" for x, mean in zip(xs, means, strict=True))
        values = ", ".join(f"{mean:.2f}" for mean in means)
        marks.append(
            f'<path d="M{steps}" fill="none" stroke="{color}" stroke-width="1.8" '
            f'stroke-dasharray="{dashes}"><title>{escape(method)}: {values}</title></path>'
        )
        marks += [
            f'<path d="M{x} {frame.y(max(mean - error, 0.0))}V{frame.y(min(mean + error, top))}" '
            f'stroke="{color}"/>'
            for x, mean, error in zip(xs, means, errors, strict=True)
        ]
    return "".join(marks)
