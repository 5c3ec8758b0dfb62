"""Record of a session: its lines in run.log, and in session.json how far it is or how it ended.

Others read there what a run does while it works (`rankadaptor_plugin.report.status`). Neither
file is part of the result, and a run goes on where they cannot be written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin import __version__, hookimpl
from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.core.errors import ArtifactError, RankAdaptorError, signal_of
from rankadaptor_plugin.core.progress import watched
from rankadaptor_plugin.core.run_folder import SESSION
from rankadaptor_plugin.core.run_log import logged, said
from rankadaptor_plugin.models.device import device_name
from rankadaptor_plugin.oracle.oracle import objective_metric
from rankadaptor_plugin.report.progress import Progress, planned_fine_tunes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pluggy

    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.core.run_folder import RunFolder
    from rankadaptor_plugin.pipeline.preparation import Prepared

_SPACING = 2.0  # seconds between two writes inside a unit of work


class Record:
    """Plugin that keeps session.json up to date.

    Args:
        folder: The run folder.
        config: The run file.
        progress: What follows the run.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, progress: Progress) -> None:
        self._folder, self._progress = folder, progress
        settings = json.dumps(run_file.to_dict(config), sort_keys=True)
        self._known: dict[str, Any] = {
            "version": __version__,
            "settings": hashlib.sha256(settings.encode()).hexdigest()[:12],
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "began": time.time(),
            "seconds_before": sum(folder.timings().values()),
            "planned": planned_fine_tunes(config),
            "device": None,
            "measures": None,
        }
        self._written = 0.0

    def begins(self) -> None:
        """Says in run.log what begins."""
        known = self._known
        said.info(
            f"started: rankadaptor-plugin {known['version']}, settings {known['settings']}, "
            f"process {known['pid']} on {known['host']}"
        )

    def prepared(self, prepared: Prepared) -> None:
        """Notes what is known of the session once all is loaded.

        That is its device, and what the oracle measures, for who reads the scores so far.
        """
        device = self._known["device"] = device_name(prepared.device)
        said.info(f"device: {device}, {str(prepared.dtype).removeprefix('torch.')}")
        oracle, config = prepared.context.oracle, prepared.context.config
        self._known["measures"] = {
            "metrics": list(oracle.metrics("report")),
            "weights": oracle.weights("report"),
            "objective": objective_metric(config.oracle, oracle),
            "target": config.oracle.target or "mean",
            "confidence": config.confirm.confidence,
        }
        self._write("running")

    @hookimpl(trylast=True)  # after the progress itself
    def rankadaptor_on_progress(self) -> None:
        """Writes the state of the run after each unit of work."""
        self._write("running")

    @hookimpl(trylast=True)
    def rankadaptor_on_step(self) -> None:
        """Writes the state of the run every few seconds."""
        if time.monotonic() - self._written > _SPACING:
            self._write("running")

    def ends(self, state: str, error: str = "") -> None:
        """Writes how the session ended, and says so in run.log."""
        said.info(f"{state}: {error}" if error else state)
        self._write(state.split()[0], error)

    def _write(self, state: str, error: str = "") -> None:
        self._written = time.monotonic()
        now = {"state": state, "error": error, "updated": time.time(), **self._progress.now}
        if self._folder.is_claimed:  # else it may be of another run, and this one refused
            with contextlib.suppress(ArtifactError):
                self._folder.write_json(SESSION, self._known | now)


@contextlib.contextmanager
def recorded(
    folder: RunFolder, config: RunConfig, manager: pluggy.PluginManager
) -> Iterator[Record]:
    """Keeps run.log and session.json of a session; what is reported inside goes to the hooks.

    Args:
        folder: The run folder, opened.
        config: The run file.
        manager: Plugins; the progress among them, if any, is what the lines come from.
    """
    shown = manager.get_plugin("progress")
    progress = shown if isinstance(shown, Progress) else Progress(config)
    record = Record(folder, config, progress)
    own = [record] if progress is shown else [record, progress]
    for plugin in own:
        manager.register(plugin)
    try:
        with logged(folder.path), _ended(record), watched(manager.hook.rankadaptor_on_step):
            record.begins()
            yield record
    finally:
        for plugin in own:
            manager.unregister(plugin)


@contextlib.contextmanager
def _ended(record: Record) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        record.ends(f"interrupted by {signal_of(error).name}")
        raise
    except BaseException as error:
        kind = "" if isinstance(error, RankAdaptorError) else f"{type(error).__name__}: "
        record.ends("failed", " ".join(f"{kind}{error}".split()))
        raise
    record.ends("finished")
