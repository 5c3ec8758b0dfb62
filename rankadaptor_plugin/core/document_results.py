"""The result of every document, one parquet file per scored model and seed.

A row is a document of a task: the columns ``task`` and ``document`` (its key), then one float64
column per metric, null where a task lacks that metric. Values come back bit for bit and rows in
their order. Pages carry checksums, so a file that was damaged later is told from a whole one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rankadaptor_plugin.core.errors import ArtifactError, OracleError
from rankadaptor_plugin.core.files import write_file

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from rankadaptor_plugin.core.scores import Score, TaskScore

_TASK, _KEY = "task", "document"


@dataclass(frozen=True, eq=False)
class TaskDocuments:
    """Results of one model on each of the J documents of a task.

    Attributes:
        keys: Names of the documents, J of them; their positions as text where they have no name.
        values: Values by metric, each float64 of shape (J,), in the metric's unit.
    """

    keys: list[str]
    values: dict[str, NDArray[np.float64]]


def write_documents(path: Path, score: Score) -> None:
    """Writes the per-document values of a score, whole or not at all.

    Args:
        path: File to write; its folder is made. One that is there is replaced.
        score: A score with per-document values in every task.

    Raises:
        OracleError: If a task has no per-document values, or not one for each document.
        ArtifactError: If the file cannot be written.
    """
    metrics = list(dict.fromkeys(m for task in score.tasks.values() for m in task.per_document))
    parts = [_rows(name, task, metrics) for name, task in score.tasks.items()]
    options = {"compression": "zstd", "use_dictionary": True, "write_page_checksum": True}
    try:
        write_file(
            path, lambda partial: pq.write_table(pa.concat_tables(parts), partial, **options)
        )
    except OSError as error:
        raise ArtifactError(
            f"The file {path} cannot be written: {error.strerror or error}. Free some space or "
            "set another output, then run again."
        ) from error


def read_documents(path: Path) -> dict[str, TaskDocuments]:
    """Returns the documents by task, in the order in which they were written.

    Raises:
        ArtifactError: If the file is missing, torn or of another kind.
    """
    try:
        table = pq.read_table(path, memory_map=False, page_checksum_verification=True)
        return _by_task(table)
    except FileNotFoundError:
        raise ArtifactError(
            f"The file {path} is missing. Run again to evaluate that model again."
        ) from None
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(
            f"The file {path} cannot be read ({reason}). Delete it and run again."
        ) from error


def with_documents(score: Score, path: Path) -> Score:
    """Returns a score with the per-document values and keys of its file filled in.

    Raises:
        ArtifactError: If the file is missing or torn, or holds other tasks or another number of
            documents than the score.
    """
    read = read_documents(path)
    ours = {name: task.documents for name, task in score.tasks.items()}
    theirs = {name: len(documents.keys) for name, documents in read.items()}
    if ours != theirs:
        raise ArtifactError(
            f"The file {path} holds the documents {theirs} by task, but the score is of {ours}. "
            "Delete the file and its score, then run again."
        )
    tasks = {
        name: replace(
            task,
            per_document={metric: v.tolist() for metric, v in read[name].values.items()},
            keys=read[name].keys,
        )
        for name, task in score.tasks.items()
    }
    return replace(score, tasks=tasks)


def _rows(name: str, task: TaskScore, metrics: list[str]) -> pa.Table:
    counts = {len(values) for values in task.per_document.values()} | {task.documents}
    if task.keys:
        counts.add(len(task.keys))
    if not task.per_document or len(counts) > 1:
        raise OracleError(
            f"Task {name} has {task.documents} documents, and per-document values of "
            f"{', '.join(task.per_document) or 'no metric'} in the numbers {sorted(counts)}. Keep "
            "one value and one key for each document."
        )
    columns = {
        _TASK: pa.array([name] * task.documents, pa.string()),
        _KEY: pa.array(task.keys or map(str, range(task.documents)), pa.string()),
    }
    for metric in metrics:
        values = task.per_document.get(metric)
        columns[metric] = (
            pa.nulls(task.documents, pa.float64())
            if values is None
            else pa.array(np.asarray(values, dtype=np.float64))
        )
    return pa.table(columns)


def _by_task(table: pa.Table) -> dict[str, TaskDocuments]:
    """Takes a table apart.

    Raises:
        KeyError: If a column is absent.
        ValueError: If a column has another type or gaps.
    """
    expected = {_TASK: pa.string(), _KEY: pa.string()}
    for field in table.schema:
        if field.type != expected.get(field.name, pa.float64()):
            raise ValueError(f"its column {field.name} is of type {field.type}")
    names = np.array(table[_TASK].to_pylist(), dtype=object)
    out = {}
    for name in dict.fromkeys(names):
        part = table.filter(pa.array(names == name))
        values = {}
        for metric in table.column_names:
            gaps = part[metric].null_count
            if gaps and (gaps < len(part) or metric in expected):
                raise ValueError(f"its column {metric} has {gaps} gaps in task {name}")
            if metric not in expected and not gaps:
                values[metric] = part[metric].to_numpy()
        out[name] = TaskDocuments(keys=part[_KEY].to_pylist(), values=values)
    return out
