"""Files for lm-eval: task YAML, small data sets, prompt functions."""

from __future__ import annotations

from pathlib import Path


def task_dir() -> Path:
    """Returns the folder with our task definitions, for lm-eval's ``include_path``."""
    return Path(__file__).resolve().parent
