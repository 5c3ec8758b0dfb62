"""Where a run lies that a command names by its folder or by its run file."""

from __future__ import annotations

from pathlib import Path

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.run_folder import RunFolder


def run_folder(run: Path) -> RunFolder:
    """Finds a run by its folder or its run file.

    Raises:
        ConfigError: If there is neither, or the run file is wrong.
    """
    if run.is_dir():
        return RunFolder(run)
    if not run.exists():
        raise ConfigError(
            f"There is no run {run}. Give a run folder, or a run file whose run is finished."
        )
    return RunFolder(Path(run_file.load(run).output))
