"""The names of lm-eval's tasks, read as text: a misspelled one is told before anything is imported.

lm-eval's own index of its 14 000 names takes ten seconds to build; to find the names in the text of
its files takes a fraction of one. What is found here is more than lm-eval knows, never less: what
it does with a name is for `rankadaptor_plugin.oracle.tasks` to say.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.registry import suggestion

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rankadaptor_plugin.config.tables import OracleConfig

LM_EVAL = "lm-eval"
"""Name of the oracle that takes tasks of lm-eval."""

_ENTRY = re.compile(
    r"""^[- \t{]*["']?(?:task|group|tag)["']?[ \t]*:(.*(?:\n[ \t]*-.*)*)""", re.MULTILINE
)
"""The keys that give names, each with its value or the list below it."""

_NAME = re.compile(r"""[^\s\[\]{},"'](?:[^\n\[\]{},"']*[^\s\[\]{},"'])?""")


def check(config: OracleConfig, paths: Iterable[Path]) -> None:
    """Refuses tasks that neither lm-eval nor a task folder has; nothing heavy is imported.

    Args:
        config: The ``[oracle]`` table.
        paths: Task folders of plugins.

    Raises:
        ConfigError: If a name is unknown.
    """
    wanted = {}
    if LM_EVAL in (config.name, config.search_name):
        wanted["tasks"] = config.tasks
    if (config.search_name or config.name) == LM_EVAL:
        wanted["search_tasks"] = config.search_tasks
    folders = [*paths, *([Path(config.include_path)] if config.include_path else [])]
    known = {name for folder in folders for name in names(folder)}
    missing = [(key, name) for key, named in wanted.items() for name in named if name not in known]
    if missing:
        own = lm_eval_folder()
        known.update(names(own) if own else ())
    for key, name in missing:
        if name not in known:
            raise unknown(name, key, known)


def unknown(name: str, key: str, known: Iterable[str]) -> ConfigError:
    """Returns the error about a task that does not exist.

    Args:
        name: The task.
        key: The key of ``[oracle]`` that names it.
        known: The names that there are.
    """
    return ConfigError(
        f"Unknown lm-eval task {name!r}.{suggestion(name, list(known))} Correct [oracle] {key}, or "
        "name the folder of its YAML file in include_path."
    )


def lm_eval_folder() -> Path | None:
    """Returns the folder of lm-eval's own tasks, without importing it; None if it has moved."""
    spec = find_spec("lm_eval")
    roots = spec.submodule_search_locations if spec else None
    return Path(roots[0]) / "tasks" if roots else None


def names(folder: Path) -> Iterator[str]:
    """Yields the names of tasks, groups and tags in the files of a folder, some several times."""
    for parent, _, files in os.walk(folder):
        for name in files:
            if name.endswith((".yaml", ".yml")) or "." not in name:  # of these, some are included
                text = Path(parent, name).read_text(encoding="utf-8", errors="replace")
                for value in _ENTRY.findall(text):
                    for line in value.splitlines():
                        for entry in _NAME.findall(line.lstrip("- \t").partition(" #")[0]):
                            yield entry.rpartition(": ")[2]
