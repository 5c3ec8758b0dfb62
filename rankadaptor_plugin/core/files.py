"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def cache_folder(name: str) -> Path:
    """Returns the folder of what can be made again, by its kind, where the system keeps caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "rankadaptor-plugin" / name


def write_file(path: Path, fill: Callable[[Path], object], *, shared: bool = False) -> None:
    """Fills a temporary file and moves it into place; one that is there is replaced.

    Args:
        path: The file to write; its folder is made.
        fill: Writes the file that it is given.
        shared: True if other processes may write the same file at the same time.

    Raises:
        OSError: If it cannot be written; a file that was there is then as it was.
    """
    writer = f".{uuid.uuid4().hex}" if shared else ""
    # Beside its target: only there is os.replace atomic.
    partial = path.with_name(f".{path.name}{writer}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(partial)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_folder(folder: Path, fill: Callable[[Path], T]) -> T:
    """Fills a temporary folder and moves it into place; one that is there is replaced.

    The two lie side by side, hidden, until the last moment; of what a killed process left, the next
    one keeps the folder and removes the rest.

    Args:
        folder: The folder to write; its parents are made.
        fill: Writes into the folder that it is given.

    Returns:
        What `fill` returned.

    Raises:
        OSError: If it cannot be written; the folder is then as it was.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    outdated = folder.with_name(f".{folder.name}.outdated")
    if outdated.exists() and not folder.exists():
        os.replace(outdated, folder)
    shutil.rmtree(outdated, ignore_errors=True)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        result = fill(partial)
        if folder.exists():
            os.replace(folder, outdated)
        try:
            os.replace(partial, folder)
        except OSError:
            if outdated.exists():
                os.replace(outdated, folder)
            raise
    except shutil.Error as error:
        found = error.args[0]  # of copytree a list: source, target and reason of each file
        reason = found[0][-1] if isinstance(found, list) else found
        raise OSError(re.sub(r"^\[Errno \d+\] ", "", str(reason))) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(outdated, ignore_errors=True)
    return result
