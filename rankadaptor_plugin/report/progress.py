"""Progress of a run on the terminal: stage, trials so far, time left.

On a terminal a live table and a bar; elsewhere one plain line per stage and trial.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from rankadaptor_plugin import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, RenderableType
    from rich.live import Live

    from rankadaptor_plugin.core.trials import Trial

SHOWN_TRIALS = 12
_COLUMNS: dict[str, Literal["left", "right"]] = {
    "trial": "right",
    "": "left",
    "phase": "left",
    "ranks": "left",
    "predicted": "right",
    "measured": "right",
    "seconds": "right",
}


class Progress:
    """Plugin that shows progress; used as a context manager around a run.

    Args:
        console: Where to write.
        plan: Fine-tunes by stage that the whole run may take, for the time left.
        began: ``time.perf_counter()`` at the start of the program; now if left out.
    """

    def __init__(self, console: Console, plan: dict[str, int], began: float | None = None) -> None:
        self._console = console
        self._plan = dict(plan)
        self._stage, self._done, self._total = "start", 0, 1
        self._trials: list[Trial] = []
        self._began = time.perf_counter() if began is None else began
        self._seconds_per_unit: float | None = None
        self._last_unit: tuple[str, float] | None = None
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=2
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
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
        self._stage, self._done, self._total = stage, done, total
        if self._live is None and (begins or (done and total > 1 and stage != "search")):
            count = f" {done}/{total}" if total > 1 else ""
            self._print(f"{stage}{count}{self._left()}")

    @hookimpl
    def rankadaptor_on_resume(self, trials: Sequence[Trial]) -> None:
        """Takes over the trials of earlier sessions."""
        self._trials.extend(trials)
        if self._live is None:
            self._print(f"resuming after {len(trials)} finished trials")

    @hookimpl
    def rankadaptor_after_trial(self, trial: Trial) -> None:
        """Adds a trial to the table, or prints it as a line."""
        self._trials.append(trial)
        if self._live is None:
            best = self._best()
            self._print(
                f"trial {trial.position + 1}/{self._total} ({trial.phase.value}) ranks "
                f"{trial.allocation} {_result(trial)}"
                f"{f', best {best.objective:.4f}' if best else ''}{self._left()}"
            )

    def _print(self, text: str) -> None:
        # A log file is as wide as its lines.
        self._console.print(f"[{self._elapsed()}] {text}", markup=False, soft_wrap=True)

    def _best(self) -> Trial | None:
        done = [t for t in self._trials if t.objective is not None]
        return max(done, key=lambda t: t.objective or 0.0, default=None)

    def _elapsed(self) -> str:
        return _clock(time.perf_counter() - self._began)

    def _left(self) -> str:
        if self._seconds_per_unit is None or not any(self._plan.values()):
            return ""
        return f", about {_clock(self._seconds_per_unit * sum(self._plan.values()))} left"

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        parts: list[RenderableType] = []
        if self._trials:
            table = Table(box=None, pad_edge=False, header_style="dim")
            for name, justify in _COLUMNS.items():
                table.add_column(name, justify=justify, no_wrap=True)
            best = self._best()
            shown = self._trials[-SHOWN_TRIALS:]
            if best and best not in shown:
                shown = [best, *shown[1:]]
            for trial in shown:
                table.add_row(
                    str(trial.position + 1),
                    "best" if trial is best else "",
                    trial.phase.value,
                    str(trial.allocation),
                    "" if trial.predicted is None else f"{trial.predicted:.4f}",
                    trial.state.value if trial.objective is None else f"{trial.objective:.4f}",
                    f"{sum(trial.seconds.values()):.1f}",
                    style="bold" if trial is best else "",
                )
            parts.append(table)
        line = Table.grid(padding=(0, 1))
        counted = self._total > 1  # a stage in one piece has no share that is done: its bar pulses
        total = self._total if counted or self._done else None
        line.add_row(
            Text(self._elapsed()),
            Text(self._stage, style="bold"),
            ProgressBar(total=total, completed=self._done, width=24),
            Text(f"{self._done}/{self._total}{self._left()}" if counted else ""),
        )
        return Group(*parts, line)


def _result(trial: Trial) -> str:
    if trial.objective is None:
        return f"failed: {(trial.reason or '').rstrip('.')}"
    predicted = "" if trial.predicted is None else f" (predicted {trial.predicted:.4f})"
    return f"measured {trial.objective:.4f}{predicted}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
