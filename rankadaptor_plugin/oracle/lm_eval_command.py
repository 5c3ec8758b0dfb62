"""lm-eval's own command line, with our model type and the tasks of all plugins known to it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any

import lm_eval.models  # noqa: F401 (a registry that is not empty would keep lm-eval's own out)
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry
from lm_eval.tasks import TaskManager

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
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


@contextlib.contextmanager
def with_tasks(folders: Iterable[Path]) -> Iterator[None]:
    """Makes every `TaskManager` know the tasks in some folders, while the block lasts.

    lm-eval's command line takes one ``--include_path`` and hands it to a `TaskManager`, which takes
    several. Tasks in a folder that is given there go before those of the same name here, and these
    before lm-eval's own.
    """
    plain = TaskManager.__init__
    signature = inspect.signature(plain)
    ours = [str(folder) for folder in folders]

    @functools.wraps(plain)
    def with_ours(*args: Any, **named: Any) -> None:
        call = signature.bind(*args, **named)
        given = call.arguments.get("include_path") or []
        several = isinstance(given, (list, tuple))
        call.arguments["include_path"] = [*ours, *(given if several else [given])]
        plain(*call.args, **call.kwargs)

    TaskManager.__init__ = with_ours
    try:
        yield
    finally:
        TaskManager.__init__ = plain
