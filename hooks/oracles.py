"""Built-in oracles and the folder of our own lm-eval tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin.tasks import task_dir

from rankadaptor_plugin import hookimpl

if TYPE_CHECKING:
    from pathlib import Path

    from rankadaptor_plugin.context import OracleFactory
    from rankadaptor_plugin.registry import Registry


@hookimpl
def rankadaptor_register_oracles(register: Registry[OracleFactory]) -> None:
    """Registers lm-eval."""
    register("lm-eval", "rankadaptor_plugin.oracles:lm_eval")


@hookimpl
def rankadaptor_lm_eval_task_paths() -> Path:
    """Returns the folder of the seven tiny tasks."""
    return task_dir()
