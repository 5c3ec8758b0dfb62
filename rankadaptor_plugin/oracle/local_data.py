"""Local copies of the seven benchmarks: found in a folder, read and converted.

A folder of copies replaces the hub: ``DIR/boolq/validation.jsonl``, or the file names of the
benchmarks' own downloads. docs/local-data.md lists them, and the layouts of rows.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from pyarrow import ArrowException, parquet

from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.oracle.local_layouts import LAYOUTS, convert_row
from rankadaptor_plugin.oracle.local_rows import RowError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from rankadaptor_plugin.oracle.local_rows import Row

SPLITS = ("train", "validation", "test")
BENCHMARKS = tuple(LAYOUTS)
SUFFIXES = (".parquet", ".jsonl", ".json")

FOLDERS: dict[str, tuple[str, ...]] = {
    "boolq": ("BoolQ", "super_glue/boolq"),
    "piqa": ("piqa/data", "piqa/plain_text", "physicaliqa-train-dev"),
    "hellaswag": ("hellaswag/data",),
    "winogrande": ("winogrande/winogrande_xl", "winogrande_1.1", "winogrande/winogrande_1.1"),
    "arc_easy": ("ARC-Easy", "ai2_arc/ARC-Easy", "ARC-V1-Feb2018-2/ARC-Easy"),
    "arc_challenge": ("ARC-Challenge", "ai2_arc/ARC-Challenge", "ARC-V1-Feb2018-2/ARC-Challenge"),
    "openbookqa": ("openbookqa/main", "OpenBookQA-V1-Sep2018/Data/Main"),
}
"""Folders of unpacked downloads and of copied hub repositories, beside the benchmark's own name."""

STEMS: dict[str, dict[str, tuple[str, ...]]] = {
    "boolq": {"validation": ("dev", "val")},
    "piqa": {"validation": ("valid", "dev")},
    "hellaswag": {"train": ("hellaswag_train",), "validation": ("hellaswag_val",)},
    "winogrande": {"train": ("train_xl",), "validation": ("dev",)},
    "arc_easy": {
        "train": ("ARC-Easy-Train",),
        "validation": ("ARC-Easy-Dev",),
        "test": ("ARC-Easy-Test",),
    },
    "arc_challenge": {
        "train": ("ARC-Challenge-Train",),
        "validation": ("ARC-Challenge-Dev",),
        "test": ("ARC-Challenge-Test",),
    },
    "openbookqa": {"validation": ("dev",)},
}
"""File names of the downloads, without their ending."""

LABELS = {"piqa": "label", "winogrande": "answer"}
"""The field that a file ``*-labels.lst`` beside the rows fills."""


def load_split(data_dir: Path, benchmark: str, split: str) -> list[Row]:
    """Reads one split of a benchmark from a folder of local copies.

    Args:
        data_dir: The folder.
        benchmark: One of `BENCHMARKS`.
        split: One of `SPLITS`.

    Returns:
        Rows with the fields that lm-eval's task file reads, in the order of the file.

    Raises:
        ConfigError: If the folder or the file is missing, or a name is none of these.
        OracleError: If a file is empty or broken, or a row cannot be read.
    """
    check_copies(data_dir, [(benchmark, split)])
    rows: list[Row] = []
    for file in find_copy(data_dir, benchmark, split):
        found = _with_labels(read_rows(file), file, benchmark)
        rows += convert(found, benchmark, source=str(file))
    return rows


def convert(rows: Iterable[Row], benchmark: str, *, source: str = "") -> list[Row]:
    """Converts rows of any known layout to the fields that lm-eval's task file reads.

    Args:
        rows: In the layouts of `LAYOUTS`, also mixed.
        benchmark: One of `BENCHMARKS`.
        source: Where the rows come from, for messages.

    Raises:
        ConfigError: If the benchmark is unknown.
        OracleError: If a row cannot be read; rows are counted from 1.
    """
    _check_name("benchmark", benchmark, BENCHMARKS)
    converted = []
    for number, row in enumerate(rows, start=1):
        where = f"{source or benchmark}, row {number}"
        if not isinstance(row, dict):
            raise OracleError(f"{where} is {row!r:.60}, not an object with fields. Correct it.")
        try:
            converted.append(convert_row(row, benchmark))
        except RowError as error:
            raise OracleError(f"{where} {error}") from error
    return converted


def check_copies(data_dir: Path, wanted: Iterable[tuple[str, str]]) -> None:
    """Checks that a folder has a copy of each wanted split, all of them at once.

    Args:
        data_dir: The folder.
        wanted: Pairs of benchmark and split.

    Raises:
        ConfigError: If the folder is missing, or with the path of every file that is.
    """
    if not data_dir.is_dir():
        raise ConfigError(
            f"The data_dir {data_dir} is no folder. Correct it, or leave data_dir out to read the "
            "data sets from the hub."
        )
    missing = []
    for benchmark, split in wanted:
        _check_name("benchmark", benchmark, BENCHMARKS)
        _check_name("split", split, SPLITS)
        if not find_copy(data_dir, benchmark, split):
            missing.append(str(data_dir / benchmark / f"{split}.jsonl"))
    if missing:
        raise ConfigError(
            f"Local copies are missing: {', '.join(missing)} (or .json, .parquet). Put them there; "
            "docs/local-data.md lists other file names that are found. Or leave data_dir out to "
            "read the data sets from the hub."
        )


def find_copy(data_dir: Path, benchmark: str, split: str) -> list[Path]:
    """Returns the file of a split, or its parquet shards in their order, or nothing.

    Where several copies are there, the first counts: ``DIR/<benchmark>/<split>``,
    ``DIR/<benchmark>_<split>``, the names of the downloads, then a part of a split with its number
    of rows in the name, ``DIR/<benchmark>_<split>1000``; parquet before JSON.

    Raises:
        OracleError: If a shard is missing, or several parts are there.
    """
    for stem in _stems(data_dir, benchmark, split):
        for suffix in SUFFIXES:
            file = stem.with_name(stem.name + suffix)
            if file.is_file():
                return [file]
        shards = sorted(stem.parent.glob(f"{stem.name}-*-of-*.parquet"))
        if shards:
            return _complete(shards, stem)
    return _part(data_dir, benchmark, split)


def _part(data_dir: Path, benchmark: str, split: str) -> list[Path]:
    named = re.compile(rf"{benchmark}_{split}\d+")
    parts = sorted(
        file
        for file in data_dir.glob(f"{benchmark}_{split}*")
        if file.suffix in SUFFIXES and named.fullmatch(file.stem)
    )
    if len(parts) > 1:
        raise OracleError(
            f"{data_dir} holds several parts of {benchmark} {split}: "
            f"{', '.join(file.name for file in parts)}. Leave one of them."
        )
    return parts


def read_rows(file: Path) -> list[Any]:
    """Reads a parquet file, a JSON list, or one JSON value per line, told apart by content.

    Raises:
        OracleError: If it is empty or broken; for JSON with the line.
    """
    try:
        if file.suffix == ".parquet":
            rows: list[Any] = parquet.ParquetFile(file).read().to_pylist()
        else:
            rows = _parse(file.read_text(encoding="utf-8-sig"), file)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise OracleError(f"{file} cannot be read: {reason}. Copy it again.") from error
    if not rows:
        raise OracleError(f"{file} has no rows. Copy it again.")
    return rows


def _parse(content: str, file: Path) -> list[Any]:
    whole = content.lstrip().startswith("[")
    # Not splitlines: JSON strings may hold the other characters that it breaks at.
    lines = [(1, content)] if whole else list(enumerate(content.split("\n"), start=1))
    rows = []
    for number, line in lines:
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise OracleError(
                f"{file} is not valid JSON in line {number + error.lineno - 1}: {error.msg}. Write "
                "a list of objects, or one object per line."
            ) from error
    return list(rows[0]) if whole else rows


def _with_labels(rows: list[Any], file: Path, benchmark: str) -> list[Any]:
    """Fills in the answers that PIQA and WinoGrande ship in a file of their own.

    Raises:
        OracleError: If there are more or fewer answers than rows, or a row has another answer.
    """
    labels = file.with_name(f"{file.stem}-labels.lst")
    if benchmark not in LABELS or not labels.is_file():
        return rows
    field = LABELS[benchmark]
    answers = labels.read_text(encoding="utf-8-sig").split()
    if len(answers) != len(rows):
        raise OracleError(
            f"{labels} has {len(answers)} labels for the {len(rows)} rows of {file.name}. Copy "
            "both again."
        )
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True), start=1):
        if isinstance(row, dict) and str(row.setdefault(field, answer)) != answer:
            raise OracleError(
                f"{file}, row {number} has {field} {row[field]!r}, but {labels.name} says "
                f"{answer!r}. Remove the wrong one."
            )
    return rows


def _stems(data_dir: Path, benchmark: str, split: str) -> Iterator[Path]:
    """Yields paths without their ending, in the order of preference."""
    downloads = STEMS[benchmark].get(split, ())
    yield data_dir / benchmark / split
    yield data_dir / f"{benchmark}_{split}"
    for folder in (benchmark, *FOLDERS[benchmark]):
        for stem in (split, *downloads):
            yield data_dir / folder / stem
    for stem in downloads:
        if stem.lower().replace("-", "_").startswith(benchmark):  # dev.jsonl could be of any
            yield data_dir / stem


def _complete(shards: list[Path], stem: Path) -> list[Path]:
    parts = [re.fullmatch(r".*-(\d+)-of-(\d+)\.parquet", shard.name) for shard in shards]
    numbered = [(int(part[1]), int(part[2])) for part in parts if part]
    if numbered != [(number, len(shards)) for number in range(len(shards))]:
        raise OracleError(
            f"The shards {stem}-*-of-*.parquet are not complete: there are "
            f"{', '.join(shard.name for shard in shards)}. Copy all of one version."
        )
    return shards


def _check_name(kind: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ConfigError(f"Unknown {kind} {name!r}. Allowed are {', '.join(known)}.")
