"""State of a run as its folder shows it, while it works or after; nothing of the run is changed.

`read_status` serves ``rankadaptor-plugin status``; `write_provisional` writes what is known so far
as provisional.html and provisional.md, in the tables and pictures of the report.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rankadaptor_plugin.config.run_file import run_folder
from rankadaptor_plugin.core.errors import ArtifactError, ConfigError
from rankadaptor_plugin.core.run_folder import SESSION, RunFolder
from rankadaptor_plugin.core.run_log import last_line
from rankadaptor_plugin.core.scores import Score
from rankadaptor_plugin.report import report as pages
from rankadaptor_plugin.report import tables
from rankadaptor_plugin.report.progress import clock, work_text
from rankadaptor_plugin.report.words import duration, verdict_lines
from rankadaptor_plugin.search.study import stored_trials
from rankadaptor_plugin.verdict.statistics import score_cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rankadaptor_plugin.core.trials import Trial
    from rankadaptor_plugin.report.schema import Column, ReportData

RUNNING, FINISHED = "running", "finished"
INTERRUPTED, PAUSED = "interrupted", "paused"


@dataclass(frozen=True, kw_only=True)
class Status:
    """State of a run.

    Attributes:
        folder: The run folder.
        state: ``running``; ``finished``, with its report; ``failed``; ``interrupted``, by a signal
            or without a word; ``paused`` after a command that makes only the first stages.
        error: What the last session failed with; empty otherwise.
        pid: Process of the last session; None if the run is older than this record.
        host: Its machine.
        alive: True if the process works, None if it ran on another machine and may still do.
        stage: Stage that it is in, or was in at last.
        done: Units of work of the stage that are done.
        total: All of them.
        work: What goes on inside the stage, as `Progress.now` has it; None if nothing does.
        trials: Trials of the search that are finished.
        planned: Trials that the run file allows; None if not known.
        best: The best complete trial: ``trial`` (from 1), ``objective``, ``ranks``, ``settings``;
            None before the first.
        metric: What the search maximizes; None if not known.
        noise: What the noise floor says; empty before it is measured.
        verdict: The sentence of the report; empty unless finished.
        seconds: Wall time of all sessions.
        seconds_left: Wall time of the fine-tunes that are left, at most; None if not known.
        updated: When the session last noted its state, in seconds since 1970; None if never.
        log: Last line of run.log.
    """

    folder: str
    state: str
    error: str
    pid: int | None
    host: str | None
    alive: bool | None
    stage: str | None
    done: int
    total: int
    work: dict[str, Any] | None
    trials: int
    planned: int | None
    best: dict[str, Any] | None
    metric: str | None
    noise: str
    verdict: str
    seconds: float
    seconds_left: float | None
    updated: float | None
    log: str

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)

    @property
    def place(self) -> str:
        """State, and where in the run that is: ``running, search 3/20``."""
        if self.stage is None:
            return self.state
        count = f" {self.done}/{self.total}" if self.total > 1 else ""
        return f"{self.state}, {self.stage}{count}"

    def __str__(self) -> str:
        """Writes what is known, one line each."""
        best = (
            None
            if self.best is None
            else (
                f"best: trial {self.best['trial']}, {self.metric or 'objective'} "
                f"{self.best['objective']:.4f}, ranks {tables.ranks_text(self.best)}"
            )
        )
        counted = f"{self.trials} of {self.planned}" if self.planned else str(self.trials)
        left = f"about {clock(self.seconds_left)} left" if self.seconds_left else None
        is_over = self.state == FINISHED
        lines = {
            "run": self.folder,
            "state": _joined(self.state if is_over else self.place, self._process()),
            "inside": self.work and work_text(self.work),
            "error": self.error,
            "trials": _joined(counted, best) if self.trials or self.planned else "",
            "noise": self.noise,
            "verdict": self.verdict,
            "time": _joined(f"{duration(self.seconds)} used", None if is_over else left),
            "log": self.log,
        }
        return "\n".join(f"{name + ':':9}{text}" for name, text in lines.items() if text)

    def _process(self) -> str:
        if self.state != RUNNING or self.pid is None or self.updated is None:
            return ""
        process = f"process {self.pid} on {self.host}"
        if self.alive:
            return process
        ago = duration(max(0.0, time.time() - self.updated))
        return f"as {process} said {ago} ago; whether it still works cannot be seen from here"


def _joined(*parts: str | None) -> str:
    return ", ".join(filter(None, parts))


def read_status(run: Path) -> Status:
    """Returns the state of a run.

    Args:
        run: Run folder or run file.

    Raises:
        ConfigError: If there is no such run, or it has not begun.
        ArtifactError: If files of it cannot be read.
    """
    folder = run_folder(run)
    session = folder.read_json(SESSION) or {}
    alive = folder.is_open()
    if alive is None:
        alive = session.get("host") == socket.gethostname() and _works(session["pid"])
    if not alive and not (folder.path / "inputs.json").exists():
        raise ConfigError(
            f"No run has begun in {folder.path}: it holds no inputs.json. Name the folder or the "
            "run file of a run."
        )
    if alive and not _is_of_now(session):
        session = {"measures": session.get("measures"), "planned": session.get("planned", {})}
        session["stage"] = "load"
    report = folder.read_json("report.json")
    state, error = _state(session, alive=alive, has_report=report is not None)
    seconds = sum(folder.timings().values())
    if "began" in session:
        until = time.time() if alive else session["updated"]
        seconds = session["seconds_before"] + until - session["began"]
    trials = stored_trials(folder.path / "study.db", "search")
    return Status(
        folder=str(folder.path),
        state=state,
        error=error,
        pid=session.get("pid"),
        host=session.get("host"),
        alive=None if state == RUNNING and not alive else alive,
        stage=session.get("stage"),
        done=session.get("done", 0),
        total=session.get("total", 0),
        work=session.get("work") if state == RUNNING else None,
        trials=len(trials),
        planned=session.get("planned", {}).get("search"),
        best=_best(trials),
        metric=(session.get("measures") or {}).get("objective"),
        noise=(folder.read_json("noise.json") or {}).get("sentence", ""),
        verdict="; ".join(verdict_lines(cast("ReportData", report)))
        if report and state == FINISHED
        else "",
        seconds=seconds,
        seconds_left=session.get("seconds_left"),
        updated=session.get("updated"),
        log=last_line(folder.path),
    )


def _verdict(report: dict[str, Any] | None) -> str:
    return "; ".join(verdict_lines(cast("ReportData", report))) if report else ""


def _works(pid: int) -> bool:
    """True if there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # somebody else's
    return True


def _is_of_now(session: dict[str, Any]) -> bool:
    """True unless the record is that of an earlier session, while the next one is loading."""
    if session.get("state") != RUNNING:
        return False
    return session["host"] != socket.gethostname() or _works(session["pid"])


def _state(session: dict[str, Any], *, alive: bool, has_report: bool) -> tuple[str, str]:
    """Returns the state of a run and its error, from what its last session noted."""
    if alive:
        return RUNNING, ""
    state = session.get("state", FINISHED if has_report else INTERRUPTED)
    if state == RUNNING:  # without a word, or where it cannot be seen
        return (INTERRUPTED if session["host"] == socket.gethostname() else RUNNING), ""
    if state == FINISHED and not has_report:
        return PAUSED, ""
    return state, session.get("error", "")


def _best(trials: Sequence[Trial]) -> dict[str, Any] | None:
    complete = [trial for trial in trials if trial.objective is not None]
    best = max(complete, key=lambda trial: trial.objective or 0.0, default=None)
    if best is None:
        return None
    return {
        "trial": best.position + 1,
        "objective": best.objective,
        **best.allocation.to_json(),
    }


def write_provisional(status: Status) -> tuple[Path, Path]:
    """Writes what is known of a run so far as provisional.md and provisional.html; no verdict.

    Returns:
        The paths, in this order.

    Raises:
        ArtifactError: If files of the run cannot be read, or these not be written.
    """
    folder = RunFolder(Path(status.folder))
    session = folder.read_json(SESSION) or {}
    measures = session.get("measures")
    if measures is None:
        raise ArtifactError(
            f"The run {folder.path} has nothing to report yet: it has not been loaded, or was made "
            "by an earlier version. Run it, or ask again in a moment."
        )
    columns = {name: _column(folder, name, measures) for name in ("base", "pruned")}
    trials = stored_trials(folder.path / "study.db", "search")
    data = {
        "verdict": {"sentence": f"Provisional: {status.place}, no verdict yet", "delivered": ""},
        "tasks": list(measures["weights"]),
        "metrics": measures["metrics"],
        "scores": {name: column for name, column in columns.items() if column},
        "parameters": {"trainable": {}},
        "confirm": {"confidence": measures["confidence"]},
        "objective": {"metric": measures["objective"], "target": measures["target"]},
        "trials": [trial.to_json() for trial in trials],
        "noise": folder.read_json("noise.json"),
    }
    return pages.write_provisional(folder.path, cast("ReportData", data), str(status))


def _column(folder: RunFolder, name: str, measures: dict[str, Any]) -> Column | None:
    """Returns the scores of a model on the report documents, None if it was not scored yet."""
    file = f"evaluations/{name}"
    score = folder.read_result(file, lambda content: Score.from_json(content["score"]))
    if score is None:
        return None
    whole = folder.with_documents(f"{file}.parquet", score)
    weights, confidence = measures["weights"], measures["confidence"]
    return score_cells([whole], measures["metrics"], weights, confidence=confidence)
