"""Built-in oracles and the folder of our own lm-eval tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.tasks import task_dir

if TYPE_CHECKING:
    from pathlib import Path

    from rankadaptor_plugin.core.registry import Registry
    from rankadaptor_plugin.oracle.contract import OracleFactory


@hookimpl
def rankadaptor_register_oracles(register: Registry[OracleFactory]) -> None:
    """Registers lm-eval's tasks, and perplexity on held-out text."""
    register("lm-eval", "rankadaptor_plugin.oracle.lm_eval_oracle:lm_eval")
    register("perplexity", "rankadaptor_plugin.oracle.perplexity:perplexity")


@hookimpl
def rankadaptor_lm_eval_task_paths() -> Path:
    """Returns the folder of our tasks: the seven of the paper, and seven tiny ones."""
    return task_dir()
