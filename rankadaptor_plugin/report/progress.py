"""Progress of a run for people: stage, what goes on inside it, trials so far, time left.

On a terminal a live display; elsewhere plain lines: one per stage and trial, and inside long
fine-tunes and evaluations a few. The lines are said to `rankadaptor_plugin.core.run_log` as well.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.core.run_log import said
from rankadaptor_plugin.report.console import plan_text
from rankadaptor_plugin.report.words import duration, size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console, RenderableType
    from rich.live import Live

    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.core.trials import Trial

SHOWN_TRIALS = 12
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "12345678"
_NARROW = 60  # columns, below which phases and bars make room for scores and ranks
_SPACING, _PARTS = 30.0, 10  # between two lines inside a fine-tune: seconds, and parts of it
_SMOOTHING = 0.9  # weight of the past in what is shown of a pace


def planned_fine_tunes(config: RunConfig) -> dict[str, int]:
    """Returns the most fine-tunes that a whole run takes, by stage."""
    trials = config.search.n_trials if config.searches else 0
    return {
        "noise": config.noise.seeds * config.noise.allocations if config.searches else 0,
        "search": trials,
        "random": trials if config.confirm.best_random else 0,
        "confirm": config.race_fine_tunes,
    }


def rank_bars(ranks: Sequence[int], low: int, high: int, levels: str = BARS) -> str:
    """Draws ranks as one character each, the first level for `low` and the last for `high`."""
    top, span = len(levels) - 1, max(1, high - low)
    return "".join(levels[round(top * (min(max(r, low), high) - low) / span)] for r in ranks)


@dataclass
class _Work:
    """A fine-tune or an evaluation that goes on inside a stage.

    Attributes:
        what: Its parts, such as ``steps``.
        began: When it began; seconds of `time.perf_counter`, as `told_at`.
        done: Parts that are done.
        total: All parts.
        figures: Last measurements; those per second are smoothed.
        told: Parts that were done when a line was last said of it.
        told_at: When that was.
    """

    what: str
    began: float
    done: int = 0
    total: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    told: int = 0
    told_at: float = 0.0

    def note(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        self.done, self.total = done, total
        for name, value in figures.items():
            old = self.figures.get(name, value) if name.endswith("_per_second") else value
            self.figures[name] = _SMOOTHING * old + (1 - _SMOOTHING) * value

    def is_due(self, now: float) -> bool:
        """True if it is time for another line; notes that it is said."""
        due = now - self.told_at >= _SPACING and self.done - self.told >= self.total / _PARTS
        if due:
            self.told, self.told_at = self.done, now
        return due

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, with the seconds that are left at the mean pace so far."""
        left = None
        if 0 < self.done < self.total:
            left = (time.perf_counter() - self.began) / self.done * (self.total - self.done)
        shown = {name: getattr(self, name) for name in ("what", "done", "total", "figures")}
        return {**shown, "seconds_left": left}

    def __str__(self) -> str:
        return work_text(self.to_json())


def work_text(work: Mapping[str, Any]) -> str:
    """Writes what goes on inside a stage, such as ``120 of 200 steps, loss 2.31, 2:10 left``."""
    parts = [f"{work['done']:,} of {work['total']:,} {work['what']}"]
    for name, value in work["figures"].items():
        unit, per_second, _ = name.partition("_per_second")
        words = name.replace("_", " ")
        parts.append(f"{value:,.0f} {unit}/s" if per_second else f"{words} {value:.4g}")
    if work["seconds_left"] is not None:
        parts.append(f"{clock(work['seconds_left'])} left")
    return ", ".join(parts)


class Progress:
    """Plugin that follows a run and shows it; used as a context manager around it.

    Args:
        config: The run file.
        console: Where to write; None shows nothing.
        began: ``time.perf_counter()`` at the start of the program; now if left out.
    """

    def __init__(
        self, config: RunConfig, console: Console | None = None, began: float | None = None
    ) -> None:
        self._console = console
        self._plan = planned_fine_tunes(config)
        self._candidates = config.rank_space.candidates
        self._stage, self._done, self._total = "start", 0, 1
        self._work: _Work | None = None
        self._trials: list[Trial] = []
        self._began = time.perf_counter() if began is None else began
        self._forecast: float | None = None  # of the plan: when the run ends
        self._seconds_per_unit: float | None = None
        self._last_unit: tuple[str, float] | None = None
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        console = self._console
        if console is not None and console.is_terminal and not console.is_dumb_terminal:
            from rich.live import Live

            self._live = Live(get_renderable=self._render, console=console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._live.stop()
            self._live = None

    @hookimpl
    def rankadaptor_on_progress(self, stage: str, done: int, total: int) -> None:
        """Notes the state of a stage and shows it."""
        now = time.perf_counter()
        if stage != self._stage and self._stage in self._plan:
            self._plan[self._stage] = 0  # a search may stop early
        if stage in self._plan:
            if self._last_unit is not None and done > 0 and self._last_unit[0] == stage:
                took = now - self._last_unit[1]
                old = self._seconds_per_unit
                self._seconds_per_unit = took if old is None else 0.7 * old + 0.3 * took
            self._last_unit = (stage, now)
            self._plan[stage] = total - done
        begins = stage != self._stage
        self._stage, self._done, self._total, self._work = stage, done, total, None
        if begins or (done and total > 1 and stage != "search"):
            self._say(f"{self._place()}{self._left()}")

    @hookimpl
    def rankadaptor_on_plan(self, plan: Mapping[str, Any]) -> None:
        """Says in a line how much is left, and shows the table of it."""
        self._forecast = time.perf_counter() + plan["seconds"]
        cuts = "".join(f"; {cut}" for cut in plan["cuts"])
        took, memory = duration(plan["seconds"]), size(plan["memory"])
        self._say(f"at most {plan['fine_tunes']} fine-tunes, {took}, {memory} of memory{cuts}")
        if self._console is not None:
            text = plan_text(plan, self._console.width)
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @hookimpl
    def rankadaptor_on_step(
        self, what: str, done: int, total: int, figures: Mapping[str, float]
    ) -> None:
        """Notes what goes on inside a stage; says so now and then."""
        now, work = time.perf_counter(), self._work
        if work is None or work.what != what or done < work.done:
            work = self._work = _Work(what, began=now, told_at=now)
        work.note(done, total, figures)
        if done < total and work.is_due(now):
            self._say(f"{self._place()}: {work}")

    @hookimpl
    def rankadaptor_on_resume(self, trials: Sequence[Trial]) -> None:
        """Takes over the trials of earlier sessions."""
        self._trials.extend(trials)
        self._say(f"resuming after {len(trials)} finished trials")

    @hookimpl
    def rankadaptor_after_trial(self, trial: Trial) -> None:
        """Adds a trial to the table, or says it in a line."""
        self._trials.append(trial)
        best = self._best()
        self._say(
            f"trial {trial.position + 1}/{self._total} ({trial.phase.value}) ranks "
            f"{trial.allocation} {_result(trial)}"
            f"{f', best {best.objective:.4f}' if best else ''}{self._left()}"
        )

    @property
    def now(self) -> dict[str, Any]:
        """State of the run as plain values.

        ``stage``, ``done`` and ``total`` of its units of work; ``work``: what goes on inside, for
        `work_text`, None if nothing does; ``seconds_left``: as planned, and from the first
        fine-tune on those of the fine-tunes; None if not known.
        """
        return {
            "stage": self._stage,
            "done": self._done,
            "total": self._total,
            "work": self._work and self._work.to_json(),
            "seconds_left": self._seconds_left(),
        }

    def _say(self, text: str) -> None:
        said.info(text)
        if self._console is not None and self._live is None:
            # A log file is as wide as its lines.
            self._console.print(f"[{self._elapsed()}] {text}", markup=False, soft_wrap=True)

    def _place(self) -> str:
        return f"{self._stage} {self._done}/{self._total}" if self._total > 1 else self._stage

    def _best(self) -> Trial | None:
        done = [t for t in self._trials if t.objective is not None]
        return max(done, key=lambda t: t.objective or 0.0, default=None)

    def _elapsed(self) -> str:
        return clock(time.perf_counter() - self._began)

    def _left(self) -> str:
        seconds = self._seconds_left()
        return f", about {clock(seconds)} left" if seconds else ""

    def _seconds_left(self) -> float | None:
        if self._seconds_per_unit is not None:
            return self._seconds_per_unit * sum(self._plan.values())
        return None if self._forecast is None else max(0.0, self._forecast - time.perf_counter())

    # ----------------------------------------------------------------------------- live display

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = []
        if self._trials:
            parts += [self._table(), Text(self._legend(), "dim", no_wrap=True, overflow="ellipsis")]
        parts.append(self._stage_line())
        if self._work is not None:
            parts.append(Text(str(self._work)))
        return Group(*parts)

    def _table(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="dim")
        numbers = ("trial", "predicted", "measured", "seconds")
        for name in numbers:
            table.add_column(name, justify="right", no_wrap=True)
        if self._width >= _NARROW:
            table.add_column("phase", no_wrap=True)
        table.add_column("ranks")  # the only column that may be cropped
        best = self._best()
        shown = self._trials[-SHOWN_TRIALS:]
        if best and best not in shown:
            shown = [best, *shown[1:]]
        for trial in shown:
            cells: list[RenderableType] = [
                f"{trial.position + 1}{'*' if trial is best else ' '}",
                "" if trial.predicted is None else f"{trial.predicted:.4f}",
                trial.state.value if trial.objective is None else f"{trial.objective:.4f}",
                f"{sum(trial.seconds.values()):.1f}",
            ]
            if self._width >= _NARROW:
                cells.append(trial.phase.value[:4])
            cells.append(Text(self._drawn(trial.allocation), no_wrap=True, overflow="ellipsis"))
            table.add_row(*cells, style="bold" if trial is best else "")
        return table

    def _stage_line(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        counted = self._total > 1  # a stage in one piece has no share that is done: its bar pulses
        cells: list[RenderableType] = [self._elapsed(), Text(self._stage, style="bold")]
        if self._width >= _NARROW:
            total = self._total if counted or self._done else None
            cells.append(ProgressBar(total=total, completed=self._done, width=self._width // 5))
        count = f"{self._done}/{self._total}{self._left()}" if counted else ""
        cells.append(Text(count, no_wrap=True, overflow="ellipsis"))
        line = Table.grid(padding=(0, 1))
        for _ in cells[:-1]:
            line.add_column(no_wrap=True)
        line.add_row(*cells)
        return line

    def _drawn(self, allocation: RankAllocation) -> str:
        settings = (f", {name} {value:g}" for name, value in allocation.settings)
        return rank_bars(allocation.ranks, *self._range(), self._levels) + "".join(settings)

    def _legend(self) -> str:
        low, high = self._range()
        return f"ranks, first layer to last: {self._levels[0]} {low} to {self._levels[-1]} {high}"

    def _range(self) -> tuple[int, int]:
        return min(self._candidates), max(self._candidates)

    @property
    def _levels(self) -> str:
        ascii_only = self._console is not None and self._console.options.ascii_only
        return ASCII_BARS if ascii_only else BARS

    @property
    def _width(self) -> int:
        return 0 if self._console is None else self._console.width


def _result(trial: Trial) -> str:
    if trial.objective is None:
        return f"failed: {(trial.reason or '').rstrip('.')}"
    predicted = "" if trial.predicted is None else f" (predicted {trial.predicted:.4f})"
    return f"measured {trial.objective:.4f}{predicted}"


def clock(seconds: float) -> str:
    """Writes seconds as ``2:10``, or ``1:02:10`` from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
