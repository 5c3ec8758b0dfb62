"""lm-eval's tasks: loaded once, their answers understood.

What the oracle needs to know of tasks, apart from any model.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.tasks import TaskManager
from lm_eval.utils import env

from rankadaptor_plugin.core.errors import ConfigError, OracleError, RankAdaptorError
from rankadaptor_plugin.core.registry import suggestion

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

LENGTH_NORMALIZED = ("hellaswag", "arc_challenge", "openbookqa")
"""Tasks of the paper whose accuracy is `acc_norm`; all others report `acc`."""

SEARCH = "_search"
"""Ends the name of a task that holds the search documents of the task before it."""


def gold_choices(task: Any, doc: dict[str, Any]) -> set[int]:
    """Returns the indices of the right choices of a document, as lm-eval understands them.

    Raises:
        OracleError: If the document's answer is not among its choices.
    """
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    found = set()
    for item in gold if isinstance(gold, list) else [gold]:
        index = choices.index(item) if isinstance(item, str) and item in choices else item
        if isinstance(index, int) and 0 <= index < len(choices):
            found.add(index)
    if not found:
        raise OracleError(
            f"The answer {gold!r} of a document of {task.config.task!r} is not among its choices "
            f"{choices!r}. Correct the task's data."
        )
    return found


def accuracy_metric(name: str, task: Any) -> str:
    """Returns the lm-eval metric that counts as this task's accuracy, as in the paper.

    Raises:
        OracleError: If the task is not multiple choice, or has neither metric.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        raise OracleError(
            f"The task {name!r} is of type {task.OUTPUT_TYPE!r}; the oracle lm-eval reads "
            "log-likelihoods of choices, so it takes multiple_choice tasks only. Name other "
            "[oracle] tasks."
        )
    plain = name.removeprefix("tiny_").removesuffix(SEARCH)
    usual = "acc_norm" if plain in LENGTH_NORMALIZED else "acc"
    wanted = getattr(task, "accuracy_metric", usual)
    found = task.aggregation()
    for metric in (wanted, "acc", "acc_norm"):
        if metric in found:
            return metric
    raise OracleError(
        f"The task {name!r} reports {', '.join(found) or 'no metric'}, but neither acc nor "
        "acc_norm. Name other [oracle] tasks."
    )


def question(task: Any, doc: dict[str, Any]) -> str:
    """Returns what a document asks: its context and choices, without ids and other fields."""
    return json.dumps([str(task.doc_to_text(doc)), task.doc_to_choice(doc)], default=str)


class Tasks:
    """lm-eval's tasks by name; its own thousands are indexed only if a name needs them.

    Args:
        paths: Folders with task YAML.
        data_dir: Folder with local copies of data, for tasks that know of such; empty for none.
    """

    def __init__(self, paths: Iterable[Path], data_dir: str = "") -> None:
        self._paths = [path.resolve() for path in paths]
        # Merged into the metadata of every task, which may hand it on: only where it is asked for.
        self._metadata = {"data_dir": data_dir} if data_dir else None
        self._manager = self._indexed(include_defaults=False)
        self._whole = False

    def _indexed(self, *, include_defaults: bool) -> Any:
        return TaskManager(
            include_path=[str(path) for path in self._paths],
            include_defaults=include_defaults,
            metadata=self._metadata,
        )

    def load(self, names: Sequence[str], key: str) -> dict[str, Any]:
        """Builds tasks; groups are taken apart.

        A YAML file's relative ``data_files`` are looked for from the current folder, as lm-eval
        does, then from the task folders and the folders above them.

        Args:
            names: Tasks or groups.
            key: The key of ``[oracle]`` that names them, for messages.

        Raises:
            ConfigError: If a name is unknown.
            OracleError: If a task's data cannot be loaded, or it has no accuracy.
        """
        if not self._whole and any(name not in self._manager.all_tasks for name in names):
            self._manager, self._whole = self._indexed(include_defaults=True), True
        for name in names:
            if name not in self._manager.all_tasks:
                raise ConfigError(
                    f"Unknown lm-eval task {name!r}.{suggestion(name, self._manager.all_tasks)} "
                    f"Correct [oracle] {key}, or name the folder of its YAML file in include_path."
                )
        found: dict[str, Any] = {}
        for name in names:
            found |= self._load(name)
        for name, task in found.items():
            accuracy_metric(name, task)
        return found

    def search_task(self, name: str) -> Any | None:
        """Returns the task with the search documents of a task, None if there is none."""
        partner = name + SEARCH
        return self._load(partner).get(partner) if partner in self._manager.all_tasks else None

    def _load(self, name: str) -> dict[str, Any]:
        folders = [Path.cwd(), *(f for path in self._paths for f in (path, *path.parents))]
        failure: BaseException | None = None
        for folder in folders:
            try:
                with contextlib.chdir(folder), quiet("lm_eval"), quiet("datasets"):
                    return dict(self._manager.load([name])["tasks"])
            except RankAdaptorError:
                raise
            except FileNotFoundError as error:
                failure = failure or error
            except IndexError as error:  # lm-eval looks at the first document
                fault = "a first document with an empty choice, or an answer that is no choice"
                if "size 0" in str(error):
                    fault = "no documents, perhaps because its process_docs leaves none"
                raise OracleError(f"The task {name!r} has {fault}. Correct its data.") from error
            except Exception as error:  # the task's own code and the data library raise anything
                failure = error
                break
        while failure and failure.__cause__ is not None:  # where the data library says what it is
            failure = failure.__cause__
        reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
        raise OracleError(
            f"The data of the task {name!r} cannot be loaded: {reason}. Check the task's data "
            "files, or the connection if they lie on a hub."
        ) from failure


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Keeps compiled templates while lm-eval renders documents.

    lm-eval compiles a task's template anew for each of its documents, which takes ten times as long
    as rendering it.
    """
    compile_template = env.from_string
    env.from_string = functools.lru_cache(maxsize=64)(compile_template)
    try:
        yield
    finally:
        env.from_string = compile_template


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Hides messages below an error while lm-eval works; trials would repeat them endlessly."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
