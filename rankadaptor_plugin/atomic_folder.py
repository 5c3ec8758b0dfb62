"""Folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")


def write_folder(folder: Path, fill: Callable[[Path], T]) -> T:
    """Fills a temporary folder and moves it into place; one that is there is replaced.

    The two lie side by side, hidden, until the last moment; what a killed process left of them is
    removed by the next.

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
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(outdated, ignore_errors=True)
        partial.mkdir(parents=True)
        result = fill(partial)
        if folder.exists():
            os.replace(folder, outdated)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(outdated, ignore_errors=True)
    return result
