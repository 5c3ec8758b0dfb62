"""Pictures of the HTML report, as inline SVG without scripts.

Colors come from the classes of the page's style sheet, so the pictures follow light and dark.
Every mark carries a title, every picture a label for those who cannot see it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import TYPE_CHECKING

from rankadaptor_plugin.report.words import number

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_LABELS = 9  # labels of an axis; more would collide on a phone


@dataclass(frozen=True)
class Frame:
    """A drawing area: data from `xs` and `ys` are mapped into the box inside the margins."""

    width: float
    height: float
    xs: tuple[float, float]
    ys: tuple[float, float]
    left: float = 62.0
    right: float = 14.0
    top: float = 12.0
    bottom: float = 52.0

    def x(self, value: float) -> float:
        """Returns the horizontal place of a value."""
        low, high = self.xs
        inside = self.width - self.left - self.right
        return round(self.left + inside * (value - low) / (high - low), 2)

    def y(self, value: float) -> float:
        """Returns the vertical place of a value."""
        low, high = self.ys
        inside = self.height - self.top - self.bottom
        return round(self.height - self.bottom - inside * (value - low) / (high - low), 2)


@dataclass(frozen=True)
class Point:
    """A trial in a picture: its place in the search and its values, None where there is none.

    `state` names how a trial without a measured value ended.
    """

    position: int
    initial: bool
    measured: float | None
    predicted: float | None
    state: str = "failed"


def ranks(
    uniform: Sequence[int],
    searched: Sequence[int],
    slots: Sequence[str] = (),
    label: str = "searched",
) -> str:
    """Draws two bars per layer, even ranks (wide) and searched ones (narrow, in front).

    Where `slots` names more than layers, the bars are those in their order. `label` is what the
    narrow ones are called.
    """
    layers = max(len(uniform), len(searched))
    named = slots or [f"layer {layer}" for layer in range(layers)]
    top = max((*uniform, *searched), default=1)
    frame = Frame(720, 260, (-0.5, max(layers, 1) - 0.5), (0, top * 1.05), left=54)
    every = max(1, math.ceil(layers / (2 * MOST_LABELS)))
    marks = _y_axis(frame, "rank", whole=True)
    marks += _x_labels(
        frame, range(0, layers, every), "slot, layer by layer" if slots else "layer (0 = bottom)"
    )
    # The even bar stands wide behind the searched one: readable down to a few pixels per layer.
    slot = min(frame.x(1) - frame.x(0), 64.0)
    bars = (("uniform", "even", uniform, 0.86 * slot), ("searched", label, searched, 0.46 * slot))
    for layer in range(layers):
        for kind, name, values, width in bars:
            if layer < len(values):
                x, y = frame.x(layer) - width / 2, frame.y(values[layer])
                title = f"{named[layer]}: {name} rank {values[layer]}"
                marks.append(_rect(kind, x, y, width, frame.y(0) - y, title))
    listed = ", ".join(f"{name}: {rank}" for name, rank in zip(named, searched, strict=False))
    return _svg(frame, f"Ranks by layer. {label.capitalize()}: {listed or 'none'}.", marks)


def scatter(points: Sequence[Point], unit: str, digits: int) -> str:
    """Draws predicted against measured values with the diagonal of exact prediction."""
    pairs = [(p, p.predicted, p.measured) for p in points]
    both = [(p, q, m) for p, q, m in pairs if q is not None and m is not None]
    if not both:
        return ""
    low, high = span = _span([value for _, q, m in both for value in (q, m)])
    frame = Frame(360, 330, span, span)
    marks = _y_axis(frame, f"measured ({unit})")
    marks += _x_axis(frame, f"predicted ({unit})")
    diagonal = f"M{frame.x(low)} {frame.y(low)}L{frame.x(high)} {frame.y(high)}"
    marks.append(_path("diagonal", diagonal, "predicted equals measured"))
    for point, q, m in both:
        title = f"trial {point.position}: predicted {number(q, digits)}, measured "
        marks.append(_dot(frame.x(q), frame.y(m), title + number(m, digits)))
    return _svg(frame, f"Predicted against measured, {len(both)} trials, in {unit}.", marks)


def best_so_far(points: Sequence[Point], unit: str, digits: int) -> str:
    """Draws every trial and the best value so far; the initialization phase is shaded."""
    values = [p.measured for p in points if p.measured is not None]
    if not values:
        return ""
    last = max(p.position for p in points)
    frame = Frame(360, 330, (0.5, last + 0.5), _span(values))
    base, marks = frame.height - frame.bottom, []
    if initial := [p.position for p in points if p.initial]:
        left, right = frame.x(0.5), frame.x(max(initial) + 0.5)
        title = f"initialization phase: trials 1 to {max(initial)}"
        marks.append(_rect("phase", left, frame.top, right - left, base - frame.top, title))
    marks += _y_axis(frame, f"measured ({unit})")
    every = max(1, math.ceil((last + 1) / MOST_LABELS))
    marks += _x_labels(frame, range(0, last + 1, every), "trial")
    best = -math.inf
    steps: list[str] = []
    for p in sorted(points, key=lambda p: p.position):
        x, y = frame.x(p.position), base - 8
        if p.measured is None:
            cross = f"M{x - 4} {y - 4}l8 8m0 -8l-8 8"
            marks.append(_path("failed", cross, f"trial {p.position}: {p.state}"))
            continue
        if p.measured > best:
            steps.append(f"{'V' if steps else f'M{x} '}{frame.y(p.measured)}")
            best = p.measured
        steps.append(f"H{x}")
        title = f"trial {p.position}: measured {number(p.measured, digits)}"
        marks.append(_dot(x, frame.y(p.measured), title))
    title = f"best so far, {number(best, digits)} at the end"
    marks.append(_path("best", " ".join([*steps, f"H{frame.x(last + 0.5)}"]), title))
    return _svg(frame, f"Best value over {last + 1} trials, in {unit}: {title}.", marks)


def front(
    points: Sequence[tuple[int, float]], best: Sequence[tuple[int, float]], unit: str, digits: int
) -> str:
    """Draws scores against trainable parameters, and the Pareto front as a line.

    Args:
        points: (parameters, score) of all complete trials.
        best: The same of those on the front, smallest first.
        unit: Unit of the scores.
        digits: Decimals of the scores.
    """
    if not best:
        return ""
    sizes = _span([float(size) for size, _ in points])
    frame = Frame(360, 330, sizes, _span([score for _, score in points]))
    marks = _y_axis(frame, f"measured ({unit})")
    marks += _x_axis(frame, "trainable parameters")
    for size, score in points:
        title = f"{size} parameters: measured {number(score, digits)}"
        marks.append(_dot(frame.x(size), frame.y(score), title))
    start, *later = best
    steps = [f"M{frame.x(start[0])} {frame.y(start[1])}"]
    steps += [f"H{frame.x(size)}V{frame.y(score)}" for size, score in later]
    title = f"front of {len(best)} allocations"
    marks.append(_path("best", "".join(steps), title))
    return _svg(frame, f"Score against trainable parameters: {title}.", marks)


def difference(estimate: float, low: float, high: float, unit: str, title: str) -> str:
    """Draws one interval on an axis with zero marked; `title` names the difference."""
    room = max(abs(low), abs(high)) * 1.15 or 1.0
    frame = Frame(360, 100, (-room, room), (0, 2), left=12, right=12, top=2)
    text = f"{number(estimate, 2)}, interval {number(low, 2)} to {number(high, 2)} {unit}"
    middle, zero = frame.y(1), frame.x(0)
    ends = f"M{frame.x(low)} {middle - 8}v16m0 -8H{frame.x(high)}m0 -8v16"
    marks = [
        *_x_axis(frame, f"{title} ({unit})"),
        _path("zero", f"M{zero} {frame.y(2)}V{frame.y(0)}", "no difference"),
        _path("best", ends, text),
        _dot(frame.x(estimate), middle, text, 6.0),
    ]
    return _svg(frame, f"Paired difference: {text}.", marks)


def share_bar(shares: Sequence[tuple[str, float, float]]) -> str:
    """Draws parts of a whole, given as (name, amount, share in [0, 1]), as one bar."""
    frame = Frame(720, 34, (0, 1), (0, 1), left=0, right=0, top=0, bottom=0)
    starts = accumulate((share for _, _, share in shares), initial=0.0)
    texts = [f"{name} {100 * share:.1f} %" for name, _, share in shares]
    marks = [
        _rect(f"part{i}", frame.x(start), 0, 720 * share, 34, text)
        for i, (start, (_, _, share), text) in enumerate(zip(starts, shares, texts, strict=False))
    ]
    return _svg(frame, f"Share of the time: {', '.join(texts)}.", marks)


def _svg(frame: Frame, label: str, marks: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {frame.width:g} {frame.height:g}" role="img" '
        f'aria-label="{escape(label)}">{"".join(marks)}</svg>'
    )


def _rect(kind: str, x: float, y: float, width: float, height: float, title: str) -> str:
    box = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    return f'<rect class="{kind}" {box}><title>{escape(title)}</title></rect>'


def _path(kind: str, steps: str, title: str) -> str:
    return f'<path class="{kind}" d="{steps}"><title>{escape(title)}</title></path>'


def _dot(x: float, y: float, title: str, radius: float = 4.0) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{radius}"><title>{escape(title)}</title></circle>'


def _text(kind: str, place: str, text: str) -> str:
    return f'<text class="{kind}" {place}>{escape(text)}</text>'


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    return low - room, high + room


def _ticks(low: float, high: float, count: int = 5) -> tuple[list[float], int]:
    """Returns round numbers within an interval and the decimals that they need."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * f for f in (1, 2, 5, 10) if power * f >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)], max(0, -math.floor(math.log10(step) + 1e-9))


def _y_axis(frame: Frame, title: str, *, whole: bool = False) -> list[str]:
    values, digits = _ticks(*frame.ys)
    left, right = frame.left, frame.width - frame.right
    marks = []
    for value in values:
        if whole and value != round(value):
            continue
        y = frame.y(value)
        marks.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        marks.append(_text("end", f'x="{left - 6}" y="{y + 4}"', number(value, digits)))
    middle = round((frame.top + frame.height - frame.bottom) / 2, 1)
    return [*marks, _text("middle", f'transform="translate(13 {middle}) rotate(-90)"', title)]


def _x_axis(frame: Frame, title: str) -> list[str]:
    values, digits = _ticks(*frame.xs)
    return _x_labels(frame, values, title, 0 if all(v == round(v) for v in values) else digits)


def _x_labels(frame: Frame, values: Sequence[float], title: str, digits: int = 0) -> list[str]:
    base = frame.height - frame.bottom
    left, right = frame.left, frame.width - frame.right
    marks = [f'<line class="axis" x1="{left}" x2="{right}" y1="{base}" y2="{base}"/>']
    for value in values:
        place = f'x="{frame.x(value)}" y="{base + 18}"'
        marks.append(_text("middle", place, number(value, digits)))
    return [*marks, _text("middle", f'x="{(left + right) / 2}" y="{base + 42}"', title)]
