"""What ``rankadaptor-plugin run`` does around a run: its run file, its display, its last lines."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.embedded_default import EMBEDDED_RUN_FILE
from rankadaptor_plugin.config.tables import NoiseConfig
from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.report.noise_text import noise_text
from rankadaptor_plugin.report.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pluggy

    from rankadaptor_plugin.config.tables import RunConfig


def load_config(path: Path | None, output: Path | None) -> RunConfig:
    """Returns the config of a run file, or of the embedded default.

    Args:
        path: The run file; None for the embedded default, which writes below the current folder.
        output: Run folder to use in place of the run file's.
    """
    config = run_file.load(path or EMBEDDED_RUN_FILE)
    if path is None:
        config = dataclasses.replace(config, output=str(Path.cwd() / "runs" / "embedded"))
    if output is not None:
        config = dataclasses.replace(config, output=str(Path.cwd() / output))
    return config


def run_file_or_embedded(
    manager: pluggy.PluginManager,
    path: Path | None,
    output: Path | None,
    *,
    quiet: bool,
    began: float,
) -> str:
    """Runs a run file and returns the last lines to print: the verdict, and where things are.

    Args:
        manager: Plugins.
        path: The run file; None for the embedded default.
        output: Run folder to use in place of the run file's.
        quiet: Show nothing while it runs and return the verdict alone.
        began: ``time.perf_counter()`` at the start of the program.
    """
    config = load_config(path, output)
    console = Console(stderr=True)
    _log_to(console, quiet=quiet)
    if quiet:
        from rankadaptor_plugin.pipeline import run as pipeline

        return pipeline.run(config, manager, began=began).verdict
    searches = config.searches
    plan = {
        "noise": config.noise.seeds * config.noise.allocations if searches else 0,
        "search": config.search.max_trials if searches else 0,
        "random": config.search.max_trials if config.confirm.best_random else 0,
        "confirm": config.race_fine_tunes,
    }
    with _shown(manager, Progress(console, plan, began)):
        # Imported here: these are seconds in which there is something to see already.
        from rankadaptor_plugin.pipeline import run as pipeline

        result = pipeline.run(config, manager, began=began)
    return (
        f"Verdict: {result.verdict}\n"
        f"Report:  {_near(result.folder / 'report.html')} (also .md, .json)\n"
        f"Adapter: {_near(result.adapter)}"
    )


def measured_noise(
    manager: pluggy.PluginManager,
    path: Path | None,
    output: Path | None,
    changes: dict[str, Any],
    *,
    as_json: bool,
    began: float,
) -> str:
    """Measures the noise floor of a run file and returns what to print.

    Args:
        manager: Plugins.
        path: The run file; None for the embedded default.
        output: Run folder to use in place of the run file's.
        changes: Settings of ``[noise]`` to use in place of the run file's.
        as_json: Return JSON and show nothing while it works.
        began: ``time.perf_counter()`` at the start of the program.
    """
    plain = run_file.to_dict(load_config(path, output))
    if not plain["noise"]["seeds"]:  # a run skips the step, but here it is asked for
        plain["noise"]["seeds"] = NoiseConfig.seeds
    plain["noise"] |= changes
    config = run_file.from_dict(plain)
    if not config.noise.seeds:
        raise ConfigError("noise.seeds is 0, which measures nothing. Use at least 2.")
    console = Console(stderr=True)
    _log_to(console, quiet=as_json)
    if as_json:
        from rankadaptor_plugin.pipeline import run as pipeline

        return json.dumps(pipeline.noise(config, manager, began=began), indent=2)
    plan = {"noise": config.noise.seeds * config.noise.allocations}
    with _shown(manager, Progress(console, plan, began)):
        from rankadaptor_plugin.pipeline import run as pipeline

        found = pipeline.noise(config, manager, began=began)
    if found is None:
        return "Fewer than two allocations could be fine-tuned; the noise floor is not known."
    return noise_text(found, shutil.get_terminal_size().columns)


@contextlib.contextmanager
def _shown(manager: pluggy.PluginManager, progress: Progress) -> Iterator[None]:
    """Shows progress while the block lasts."""
    with progress:
        manager.register(progress, name="progress")
        try:
            manager.hook.rankadaptor_on_progress(stage="load", done=0, total=1)
            yield
        finally:
            manager.unregister(progress)


def _log_to(console: Console, *, quiet: bool) -> None:
    """Shows warnings: above the live display on a terminal, else as whole lines."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_path=False)
    else:
        handler = logging.StreamHandler()
        if not quiet:  # the plain lines of the progress say already why a trial failed
            handler.addFilter(lambda record: record.name != "rankadaptor_plugin.search.search")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])


def _near(path: Path) -> Path:
    """Returns a path as seen from the current folder where it lies below it."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path
