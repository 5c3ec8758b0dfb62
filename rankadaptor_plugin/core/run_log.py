"""run.log: what a run says and warns of, with the time, line by line over all its sessions."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RUN_LOG = "run.log"
"""Name of the file in the run folder."""

said = logging.getLogger("rankadaptor_plugin.said")
"""Logger of what is for run.log alone, and not for other handlers."""
said.setLevel(logging.INFO)
said.propagate = False

_TAIL = 2**14  # bytes of the end of the file, more than a line has
_TOLD = "rankadaptor_plugin.search.search"  # its warnings are lines of the progress already


class _RunLog(logging.Handler):
    """Appends to a file line by line; a line that cannot be written is lost, and no more.

    Args:
        path: The file.
        claimed: A file that is there as soon as the folder may be written to; lines wait for it.
    """

    def __init__(self, path: Path, claimed: Path) -> None:
        super().__init__()
        self._path, self._claimed = path, claimed
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record that was said, or that warns."""
        is_said = record.name == said.name
        if not is_said and (record.levelno < logging.WARNING or record.name == _TOLD):
            return
        # A full disk is no reason to end a run, nor is a message that its own logger cannot format.
        with contextlib.suppress(OSError, TypeError, ValueError):
            message = " ".join(record.getMessage().split())
            now = time.strftime("%Y-%m-%d %H:%M:%S%z", time.localtime(record.created))
            self._lines.append(f"{now} {'' if is_said else f'{record.levelname}: '}{message}\n")
            if self._claimed.exists():
                lines, self._lines = "".join(self._lines), []
                with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(lines)


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Lets run.log take down what is said within the block, and all warnings.

    Args:
        folder: The run folder. Nothing is written before it holds ``inputs.json``: until then it
            may belong to somebody else.
    """
    handler = _RunLog(folder / RUN_LOG, folder / "inputs.json")
    loggers = (said, logging.getLogger())
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def last_line(folder: Path) -> str:
    """Returns the last line of run.log, empty if there is none."""
    try:
        with (folder / RUN_LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""
