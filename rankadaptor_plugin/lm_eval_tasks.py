"""lm-eval's tasks: loaded once, their documents partitioned, their answers read.

What the oracle needs to know of tasks, apart from any model.
"""

from __future__ import annotations

import contextlib
import json
import logging
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.tasks import TaskManager

from rankadaptor_plugin.errors import ConfigError, OracleError
from rankadaptor_plugin.registry import suggestion

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

logger = logging.getLogger(__name__)

LENGTH_NORMALIZED = ("hellaswag", "arc_challenge", "openbookqa")
"""Tasks of the paper whose accuracy is `acc_norm`; all others report `acc`."""


def choice_scores(likelihoods: np.ndarray[Any, Any], gold: set[int]) -> tuple[float, float]:
    """Returns `clp` and `margin` of one document.

    Args:
        likelihoods: Log-likelihood of each choice, shape (choices,), in nats.
        gold: Indices of the right choices.
    """
    right = [ll for i, ll in enumerate(likelihoods) if i in gold]
    wrong = [ll for i, ll in enumerate(likelihoods) if i not in gold]
    with np.errstate(invalid="ignore"):  # a broken model's NaN is for the oracle to report
        clp = np.logaddexp.reduce(right) - np.logaddexp.reduce(likelihoods)
    return float(clp), float(max(right) - max(wrong)) if wrong else 0.0


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


def accuracy_metric(task: str, sample: dict[str, Any]) -> str | None:
    """Returns the lm-eval metric that counts as this task's accuracy, as in the paper."""
    wanted = "acc_norm" if task.removeprefix("tiny_") in LENGTH_NORMALIZED else "acc"
    return next((m for m in (wanted, "acc", "acc_norm") if m in sample), None)


def question(task: Any, doc: dict[str, Any]) -> str:
    """Returns what a document asks: its context and choices, without ids and other fields."""
    return json.dumps([str(task.doc_to_text(doc)), task.doc_to_choice(doc)], default=str)


def partition(
    task: str, questions: Iterable[str], search: int, report: int, seed: int
) -> tuple[list[int], list[int]]:
    """Cuts a task's documents into search and report documents.

    Args:
        task: Name of the task, for messages.
        questions: What each document of the evaluated split asks, as `question` returns it.
        search: Number of search documents.
        report: Number of report documents; 0 for all that are left.
        seed: Enters the order of the documents.

    Returns:
        Two disjoint, sorted lists of document ids; no question is in both.

    Raises:
        ConfigError: If no document would be left for the report.
    """
    distinct: dict[str, int] = {}
    for index, asked in enumerate(questions):
        distinct.setdefault(asked, index)
    ids = np.array(sorted(distinct.values()))
    if len(ids) <= search:
        raise ConfigError(
            f"The task {task!r} has {len(ids)} distinct documents; {search} for the search leave "
            "none for the report. Lower [oracle] search_documents."
        )
    # Ranked by the questions themselves: tasks that share questions cut them alike.
    keys = {index: zlib.crc32(f"{seed} {asked}".encode()) for asked, index in distinct.items()}
    ids = np.array(sorted(ids.tolist(), key=lambda index: (keys[index], index)))
    end = search + report if report else len(ids)
    if end > len(ids):
        logger.warning(
            "%s has %d documents left for the report, not %d", task, len(ids) - search, report
        )
    return sorted(ids[:search].tolist()), sorted(ids[search:end].tolist())


def load_tasks(names: Iterable[str], paths: Iterable[Path]) -> dict[str, Any]:
    """Builds lm-eval tasks; its own thousands of tasks are indexed only if a name needs them.

    A YAML file's relative ``data_files`` are looked for from the current folder, as lm-eval does,
    then from the task folders and the folders above them.

    Raises:
        ConfigError: If a name is unknown.
        OracleError: If a task's data cannot be loaded.
    """
    names, paths = list(names), [path.resolve() for path in paths]
    manager = TaskManager(include_path=[str(p) for p in paths], include_defaults=False)
    if any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=[str(p) for p in paths])
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"Unknown lm-eval task {name!r}.{suggestion(name, manager.all_tasks)} Correct "
                "[oracle] tasks, or name the folder of its YAML file in task_path."
            )
    folders = [Path.cwd(), *(f for path in paths for f in (path, *path.parents))]
    failure: Exception | None = None
    for folder in folders:
        try:
            with contextlib.chdir(folder), quiet("lm_eval"):
                return dict(manager.load(names))
        except FileNotFoundError as error:
            failure = failure or error
        except Exception as error:  # the task's own code and the data library raise anything
            failure = error
            break
    reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
    raise OracleError(
        f"The data of the tasks {', '.join(names)} cannot be loaded: {reason}. Check the task's "
        "data files, or the connection if they lie on a hub."
    ) from failure


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
