"""lm-eval's tasks, loaded once, and their documents: those of the search and those of the report.

A task with search documents of its own (`rankadaptor_boolq_search`: the train split) gives all of
its documents, or as many as are asked for, to the report. The documents of any other task are cut
in two, by a hash of what they ask. No question is on both sides.
"""

from __future__ import annotations

import contextlib
import json
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankadaptor_plugin.core.errors import ConfigError, OracleError, RankAdaptorError
from rankadaptor_plugin.core.scores import document_key
from rankadaptor_plugin.oracle.lm_eval_internals import task_manager
from rankadaptor_plugin.oracle.oracle import quiet
from rankadaptor_plugin.oracle.task_names import unknown

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from rankadaptor_plugin.config.tables import OracleConfig


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
    """Returns the question of a document: context and choices, without ids and other fields."""
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
        self._manager = task_manager(self._paths, self._metadata, include_defaults=False)
        self._whole = False

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
            self._manager, self._whole = task_manager(self._paths, self._metadata), True
        for name in names:
            if name not in self._manager.all_tasks:
                raise unknown(name, key, self._manager.all_tasks)
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
                fault = "a first document with an empty choice, or an answer that is not a choice"
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
            "files. Data on the Hub can be downloaded where there is a network: hf download "
            "OWNER/NAME --repo-type dataset; if it is gated, accept its terms and hf auth login."
        ) from failure


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of one task for one purpose.

    Attributes:
        task: The lm-eval task that they belong to.
        ids: Their numbers in the task's evaluated split, in ascending order.
        questions: What each of them asks.
    """

    task: Any
    ids: tuple[int, ...]
    questions: tuple[str, ...]

    def keys(self) -> list[str]:
        """Returns a name of each document that depends on nothing but what it asks."""
        return [document_key(question) for question in self.questions]


def choose(
    tasks: Tasks, config: OracleConfig, seed: int, purposes: Collection[str] = ("search", "report")
) -> dict[str, dict[str, Documents]]:
    """Returns the documents by purpose (``search``, ``report``) and name of the task.

    Search documents from a task of their own go under the name of the task that they are for, so
    that weights and target mean the same in both.

    Args:
        tasks: Loads tasks by name.
        config: The ``[oracle]`` table.
        seed: Decides which documents are drawn.
        purposes: What is asked for. For the report alone nothing is cut off for a search.

    Raises:
        ConfigError: If a task is unknown or has too few documents.
        OracleError: If documents cannot be loaded, or are on both sides.
    """
    reported = tasks.load(config.tasks, "tasks")
    own, cut = _search_tasks(tasks, reported, config) if "search" in purposes else ({}, set())
    search: dict[str, Documents] = {}
    report: dict[str, Documents] = {}
    for name, task in reported.items():
        if name in cut:
            if task.config.num_fewshot:
                logger.warning(
                    "The few-shot examples of %s may be report documents, shown to the search with "
                    "their answers",
                    name,
                )
            asked = [question(task, doc) for doc in task.eval_docs]
            halves = partition(name, asked, config.search_documents, config.report_documents, seed)
            search[name], report[name] = (
                Documents(task=task, ids=tuple(ids), questions=tuple(asked[i] for i in ids))
                for ids in halves
            )
        else:
            report[name] = _report_documents(name, task, config.report_documents, seed)
    if cut:
        report = _without_searched(report, search)
    taken = {q for documents in report.values() for q in documents.questions}
    for name, task in own.items():
        search[name] = _own_documents(name, task, config, taken, seed)
    found = {"search": search, "report": report}
    return {purpose: found[purpose] for purpose in purposes}


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
    if len(distinct) <= search:
        raise ConfigError(
            f"The task {task!r} has {len(distinct)} distinct documents; {search} for the search "
            "leave none for the report. Lower [oracle] search_documents."
        )
    # Ranked by the questions themselves: tasks that share questions cut them alike.
    keys = {index: zlib.crc32(f"{seed} {asked}".encode()) for asked, index in distinct.items()}
    ids = sorted(keys, key=lambda index: (keys[index], index))
    end = search + report if report else len(ids)
    if end > len(ids):
        _say_few(task, len(ids) - search, report, "report")
    return sorted(ids[:search]), sorted(ids[search:end])


def _search_tasks(
    tasks: Tasks, reported: Mapping[str, Any], config: OracleConfig
) -> tuple[dict[str, Any], set[str]]:
    """Returns the tasks that hold search documents only, and the names of those that are cut."""
    if not config.search_tasks:
        partners = {name: tasks.search_task(name) for name in reported}
        own = {name: task for name, task in partners.items() if task is not None}
        return own, reported.keys() - own.keys()
    named = tasks.load(config.search_tasks, "search_tasks")
    cut = named.keys() & reported.keys()
    own = {}
    for name, task in named.items():
        if name not in cut:
            plain = name.removesuffix(SEARCH)
            own[plain if plain in reported and plain not in cut else name] = task
    return own, cut


def _report_documents(name: str, task: Any, count: int, seed: int) -> Documents:
    """Draws `count` documents, or takes all for 0: the very set that lm-eval scores."""
    docs = task.eval_docs  # once: lm-eval processes all documents at each access
    if count > len(docs):
        _say_few(name, len(docs), count, "report")
    ids = sorted(_order(name, len(docs), seed)[: count or len(docs)])
    asked = tuple(question(task, docs[index]) for index in ids)
    return Documents(task=task, ids=tuple(ids), questions=asked)


def _order(name: str, total: int, seed: int) -> list[int]:
    """Returns the numbers below `total` in a random order."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return [int(index) for index in rng.permutation(total)]


def _own_documents(
    name: str, task: Any, config: OracleConfig, taken: Collection[str], seed: int
) -> Documents:
    """Draws search documents from a task that holds nothing else.

    They are drawn by number, and only those drawn are looked at: a train split may be large.
    """
    docs, wanted = task.eval_docs, config.search_documents
    found: dict[str, int] = {}
    shared = 0
    for index in _order(name, len(docs), seed):
        if len(found) == wanted:
            break
        asked = question(task, docs[index])
        if asked in taken:
            shared += 1
        else:
            found.setdefault(asked, index)
    if shared and config.overlap == "refuse":
        raise OracleError(
            f"{shared} of the search documents of {name!r} are report documents as well. Name "
            'other [oracle] search_tasks, or set overlap = "drop" to leave them out of the search.'
        )
    if not found:
        raise OracleError(
            f"No search document of {name!r} is left: all {shared} are report documents as well. "
            "Name other [oracle] search_tasks."
        )
    if len(found) < wanted:
        _say_few(name, len(found), wanted, "search")
    ids = sorted(found.items(), key=lambda item: item[1])
    return Documents(task=task, ids=tuple(i for _, i in ids), questions=tuple(q for q, _ in ids))


def _without_searched(
    report: Mapping[str, Documents], search: Mapping[str, Documents]
) -> dict[str, Documents]:
    """Leaves out report documents whose question is a search document of another task.

    Raises:
        OracleError: If no report document of a task is left.
    """
    searched = {asked for documents in search.values() for asked in documents.questions}
    kept = {}
    for name, documents in report.items():
        pairs = [
            (i, q)
            for i, q in zip(documents.ids, documents.questions, strict=True)
            if q not in searched
        ]
        if not pairs:
            raise OracleError(
                f"Every report document of {name!r} is a search document of another task. "
                "Leave one of the two out of [oracle] tasks."
            )
        ids, asked = zip(*pairs, strict=True)
        kept[name] = Documents(task=documents.task, ids=ids, questions=asked)
    return kept


def _say_few(task: str, found: int, wanted: int, purpose: str) -> None:
    logger.warning("%s has %d documents left for the %s, not %d", task, found, purpose, wanted)
