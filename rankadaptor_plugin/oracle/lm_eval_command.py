"""lm-eval's own command line, with our model type and the tasks of all plugins known to it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import lm_eval.models  # noqa: F401 (a registry that is not empty would keep lm-eval's own out)
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry

from rankadaptor_plugin.oracle.lm_eval_internals import with_tasks

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_MODEL = "rankadaptor"
_CLASS = "rankadaptor_plugin.lm_eval_model:RankAdaptorLM"  # imported when a run asks for it


def run(arguments: Iterable[str], task_paths: Iterable[Path], program: str) -> None:
    """Runs lm-eval's command line.

    Args:
        arguments: What follows the name of the program.
        task_paths: Folders whose tasks are known without ``--include_path``.
        program: Name of the program.

    Raises:
        SystemExit: As lm-eval ends.
        RankAdaptorError: What our model type says of its arguments.
    """
    if _MODEL not in model_registry:
        model_registry.register(_MODEL, target=_CLASS)
    before = sys.argv
    sys.argv = [program, *arguments]  # which lm-eval reads, and adds to
    try:
        with with_tasks(task_paths):
            cli_evaluate()
    finally:
        sys.argv = before
