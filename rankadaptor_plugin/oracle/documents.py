"""Which documents the search sees, and which the report is made from.

A task with search documents of its own (`rankadaptor_boolq_search`: the train split) gives all of
its documents, or as many as are asked for, to the report. The documents of any other task are cut
in two, by a hash of what they ask. No question is on both sides.
"""

from __future__ import annotations

import logging
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.core.scores import document_key
from rankadaptor_plugin.oracle.tasks import SEARCH, question

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from rankadaptor_plugin.config.tables import OracleConfig
    from rankadaptor_plugin.oracle.tasks import Tasks

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
