"""Local copies of the seven benchmarks: found in a folder, read and converted.

A folder of copies replaces the hub: ``DIR/boolq/validation.jsonl``, or the file names of the
benchmarks' own downloads. docs/local-data.md lists them, and the layouts of rows: a layout is a set
of fields and a function from such a row to the fields that lm-eval's own task files read. Nothing
is guessed: a layout from which the original fields cannot be had exactly is not in the list.

Sources: the data sets that lm-eval 0.4.13 names; the benchmarks' own downloads; the flattened files
of LLM-Adapters (arXiv 2304.01933) and of llm-foundry.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets

from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.oracle.oracle import quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

Row = dict[str, Any]


class RowError(OracleError):
    """A row cannot be read; the message goes on from ``row 3``."""


def has_field(row: Any, field: str) -> bool:
    """True if a row has a field; ``a.b`` is the field ``b`` of an object ``a``."""
    head, _, rest = field.partition(".")
    return isinstance(row, dict) and head in row and (not rest or has_field(row[head], rest))


def text(row: Row, field: str) -> str:
    """Returns the text of a field.

    Raises:
        RowError: If it is anything else.
    """
    value = row[field]
    if not isinstance(value, str):
        raise RowError(f"has {field} {value!r:.60}, which is not text. Correct the row.")
    return value


def texts(row: Row, field: str) -> list[str]:
    """Returns the list of texts of a field, of length (choices,).

    Raises:
        RowError: If it is anything else, or empty.
    """
    value = row[field]
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return list(value)
    raise RowError(f"has {field} {value!r:.60}, which is not a list of texts. Correct the row.")


def position(row: Row, field: str, names: Sequence[str]) -> int:
    """Returns the place of a row's answer among the names of its choices.

    Raises:
        RowError: If the answer is left open, as in hidden test sets, or none of them.
    """
    answer = "" if row[field] is None else str(row[field]).strip()
    if answer in ("", "-1"):
        raise RowError(
            f"has {field} {row[field]!r}: a document without an answer, as in hidden test sets. "
            "Give documents with their answers."
        )
    if answer not in names:
        raise RowError(
            f"has {field} {row[field]!r}, which is not among its choices: allowed are "
            f"{', '.join(names)}. Correct the row."
        )
    return list(names).index(answer)


def numbers(count: int, first: int = 0) -> list[str]:
    """Returns ``["0", "1", ...]``, the names of choices that are counted."""
    return [str(number) for number in range(first, first + count)]


@dataclass(frozen=True)
class Fields:
    """The fields of a document that lm-eval reads.

    Attributes:
        texts: Fields of text: the question, and two choices where there is no list of them.
        answer: Field with the right answer.
        choices: Field with the choices: ``endings`` a list of texts, ``choices`` with labels.
        first: Number of the first choice where they are counted.
        kind: Type of the answer.
    """

    texts: tuple[str, ...]
    answer: str
    choices: str = ""
    first: int = 0
    kind: type = str


FIELDS = {
    "boolq": Fields(("question", "passage"), "label", kind=int),
    "piqa": Fields(("goal", "sol1", "sol2"), "label", kind=int),
    "hellaswag": Fields(("activity_label", "ctx_a", "ctx_b"), "label", "endings"),
    "winogrande": Fields(("sentence", "option1", "option2"), "answer", first=1),
    "arc_easy": Fields(("question",), "answerKey", "choices"),
    "arc_challenge": Fields(("question",), "answerKey", "choices"),
    "openbookqa": Fields(("question_stem",), "answerKey", "choices"),
}
"""Fields of each benchmark that lm-eval reads."""

INSTRUCTIONS = {
    "piqa": ("solution to the question", "Solution"),
    "winogrande": ("answer to fill in the blank to complete the given sentence", "Option"),
    **dict.fromkeys(
        ("arc_easy", "arc_challenge", "openbookqa"), ("answer to the question", "Answer")
    ),
}
"""Question of LLM-Adapters, and the word before the numbers of the choices."""


def standard(row: Row, benchmark: str, answer: str = "") -> Row:
    """Checks a row with the fields that lm-eval reads; those alone are kept.

    Args:
        row: With the `FIELDS` of the benchmark.
        benchmark: A key of `FIELDS`.
        answer: Field with the right answer, if it is another one.
    """
    fields, answer = FIELDS[benchmark], answer or FIELDS[benchmark].answer
    result: Row = {field: text(row, field) for field in fields.texts}
    names = numbers(2, fields.first)
    if benchmark == "boolq":
        spelled = {"false": "0", "true": "1"}.get(str(row[answer]).lower(), row[answer])
        row = {answer: spelled}
    if benchmark == "winogrande" and "_" not in row["sentence"]:
        sentence = row["sentence"]
        raise RowError(f"has the sentence {sentence!r:.60} without a blank _. Correct the row.")
    if fields.choices == "endings":
        result["endings"] = texts(row, "endings")
        names = numbers(len(result["endings"]))
    elif fields.choices:
        result["choices"] = _labeled(row["choices"])
        names = result["choices"]["label"]
    result[fields.answer] = fields.kind(names[position(row, answer, names)])
    return result


def _labeled(choices: Any) -> Row:
    """Returns the texts and labels of choices, a list of pairs or a pair of lists."""
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
    if not (has_field(choices, "text") and has_field(choices, "label")):
        raise RowError(f"has choices {choices!r:.60}; they need text and label. Correct the row.")
    options, labels = texts(choices, "text"), texts(choices, "label")
    if len(options) != len(labels):
        raise RowError(f"has {len(options)} choices but {len(labels)} labels. Correct the row.")
    return {"text": options, "label": labels}


def _assembled(benchmark: str, question: str, choices: Sequence[str], gold: int) -> Row:
    """Makes a row of its parts; `gold` counts from 0.

    Labels, which no prompt of lm-eval shows, are A, B, C and so on.
    """
    fields = FIELDS[benchmark]
    row: Row = {fields.texts[0]: question}
    if fields.choices:
        labels = [chr(ord("A") + number) for number in range(len(choices))]
        row |= {"choices": {"text": list(choices), "label": labels}, fields.answer: labels[gold]}
    elif len(choices) == len(fields.texts) - 1:
        row |= {
            **dict(zip(fields.texts[1:], choices, strict=True)),
            fields.answer: gold + fields.first,
        }
    else:
        raise RowError(f"has {len(choices)} choices; {benchmark} has 2. Correct the row.")
    return standard(row, benchmark)


def _spelled(row: Row, benchmark: str) -> Row:
    """BoolQ's own download: ``answer`` is true or false, the title has a field of its own."""
    if "title" in row:  # SuperGLUE, which lm-eval reads, writes it in front of the passage
        row = {**row, "passage": f"{text(row, 'title')} -- {text(row, 'passage')}"}
    return standard(row, benchmark, "answer")


def _nested(row: Row, benchmark: str) -> Row:
    """The downloads of ARC and OpenBookQA: ``question`` has ``stem`` and ``choices``."""
    inner = row["question"]
    question = {FIELDS[benchmark].texts[0]: inner["stem"], "choices": inner["choices"]}
    return standard({**row, **question}, benchmark)


def _query(row: Row, benchmark: str) -> Row:
    """llm-foundry: the question as a prompt, ``choices`` as texts, ``gold`` counted from 0."""
    choices = texts(row, "choices")
    question = text(row, "query").removesuffix("Answer:").rstrip("\n").removeprefix("Question: ")
    gold = position(row, "gold", numbers(len(choices)))
    return _assembled(benchmark, question, choices, gold)


def _instruction(row: Row, benchmark: str) -> Row:
    """LLM-Adapters: question, numbered choices and the format of the answer in one text."""
    asked, word = INSTRUCTIONS[benchmark]
    head = f"Please choose the correct {asked}: "
    refusal = RowError(
        "has an instruction that cannot be taken apart without guessing: it must be "
        f"'{head.strip()} ...', then '{word}1: ...', '{word}2: ...' and 'Answer format: ...', each "
        "once. Give the file in its original layout."
    )
    whole = text(row, "instruction")
    ending = re.search(r"(?:\n\n| )Answer format: (\S+)$", whole)
    if ending is None or not whole.startswith(head):
        raise refusal
    names = ending[1].split("/")
    marks = [f"{word}{number}" for number in range(1, len(names) + 1)]
    body = whole[len(head) : ending.start()]
    # A mark that comes twice could as well belong to the question or to a choice.
    found = re.findall(rf"{word}\d+:|Answer format:", body)
    parts = re.split(rf"(?:\n\n| )(?:{'|'.join(marks)}): ", body)
    if (
        found != [f"{mark}:" for mark in marks]
        or names != [mark.lower() for mark in marks]
        or len(parts) != len(marks) + 1
        or not all(parts)
    ):
        raise refusal
    return _assembled(benchmark, parts[0], parts[1:], position(row, "answer", names))


@dataclass(frozen=True)
class Layout:
    """One way to write down a document of a benchmark.

    Attributes:
        fields: Names of the fields with the question; ``a.b`` is the field ``b`` of an object
            ``a``.
        answer: Name of the field with the right answer.
        convert: From such a row, and the name of the benchmark, to the fields that lm-eval reads.
            Raises `RowError` where a value is not as the layout has it.
    """

    fields: tuple[str, ...]
    answer: str
    convert: Callable[[Row, str], Row]


def _layouts(benchmark: str) -> tuple[Layout, ...]:
    fields = FIELDS[benchmark]
    question = fields.texts + ((fields.choices,) if fields.choices else ())
    layouts = [Layout(question, fields.answer, standard)]
    if benchmark == "boolq":
        layouts.append(Layout(("question", "title", "passage"), "answer", _spelled))
        layouts.append(Layout(question, "answer", _spelled))
    if fields.choices == "choices":
        layouts.append(Layout(("question.stem", "question.choices"), fields.answer, _nested))
    if benchmark in INSTRUCTIONS:
        if benchmark != "winogrande":
            layouts.append(Layout(("query", "choices"), "gold", _query))
        layouts.append(Layout(("instruction",), "answer", _instruction))
    return tuple(layouts)


LAYOUTS = {benchmark: _layouts(benchmark) for benchmark in FIELDS}
"""The layouts of each benchmark, the one that lm-eval reads first."""


def convert_row(row: Row, benchmark: str) -> Row:
    """Converts one row to the fields that lm-eval reads; those alone are kept.

    A converted row stays as it is if converted again.

    Args:
        row: In any layout of the benchmark.
        benchmark: A key of `LAYOUTS`.

    Raises:
        RowError: If the row is in no known layout, has no answer, or its answer is not among its
            choices.
    """
    layouts = LAYOUTS[benchmark]
    asked = [layout for layout in layouts if all(has_field(row, name) for name in layout.fields)]
    for layout in asked:
        if layout.answer in row:
            return layout.convert(row, benchmark)
    if asked:
        answers = " or ".join(dict.fromkeys(repr(layout.answer) for layout in asked))
        raise RowError(f"has no {answers}. Give documents with their answers.")
    allowed = " | ".join(", ".join((*layout.fields, layout.answer)) for layout in layouts)
    raise RowError(
        f"is in no known layout of {benchmark}: it has the fields {', '.join(row) or '-'}; allowed "
        f"are {allowed}. Convert the file."
    )


SPLITS = ("train", "validation", "test")
BENCHMARKS = tuple(LAYOUTS)
FORMATS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
}
"""The reader of `datasets` for each ending of a file, the preferred one first."""

FOLDERS: dict[str, tuple[str, ...]] = {
    "boolq": ("BoolQ", "super_glue/boolq"),
    "piqa": ("piqa/data", "piqa/plain_text", "physicaliqa-train-dev"),
    "hellaswag": ("hellaswag/data",),
    "winogrande": ("winogrande/winogrande_xl", "winogrande_1.1", "winogrande/winogrande_1.1"),
    **{
        f"arc_{kind.lower()}": (
            f"ARC-{kind}",
            f"ai2_arc/ARC-{kind}",
            f"ARC-V1-Feb2018-2/ARC-{kind}",
        )
        for kind in ("Easy", "Challenge")
    },
    "openbookqa": ("openbookqa/main", "OpenBookQA-V1-Sep2018/Data/Main"),
}
"""Folders of unpacked downloads and of copied hub repositories, beside the benchmark's own name."""

_ARC = {"train": "Train", "validation": "Dev", "test": "Test"}
STEMS: dict[str, dict[str, tuple[str, ...]]] = {
    "boolq": {"validation": ("dev", "val")},
    "piqa": {"validation": ("valid", "dev")},
    "hellaswag": {"train": ("hellaswag_train",), "validation": ("hellaswag_val",)},
    "winogrande": {"train": ("train_xl",), "validation": ("dev",)},
    "arc_easy": {split: (f"ARC-Easy-{name}",) for split, name in _ARC.items()},
    "arc_challenge": {split: (f"ARC-Challenge-{name}",) for split, name in _ARC.items()},
    "openbookqa": {"validation": ("dev",)},
}
"""File names of the downloads, without their ending."""


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
        labeled = _with_labels(read_rows(file), file, benchmark)
        rows += convert(labeled, benchmark, source=str(file))
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
            f"The data_dir {data_dir} is not a folder. Correct it, or leave data_dir out to read "
            "the data sets from the hub."
        )
    missing = []
    for benchmark, split in wanted:
        _check_name("benchmark", benchmark, BENCHMARKS)
        _check_name("split", split, SPLITS)
        if not find_copy(data_dir, benchmark, split):
            missing.append(str(data_dir / benchmark / f"{split}.jsonl"))
    if missing:
        raise ConfigError(
            f"Local copies are missing: {', '.join(missing)} (or .json, .parquet, .arrow, .csv). "
            "Put them there; docs/local-data.md lists other file names that are found. Or leave "
            "data_dir out to read the data sets from the hub."
        )


def find_copy(data_dir: Path, benchmark: str, split: str) -> list[Path]:
    """Returns the file of a split, or its parquet shards in their order, or nothing.

    Where several copies are there, the first counts: ``DIR/<benchmark>/<split>``,
    ``DIR/<benchmark>_<split>``, the names of the downloads, then a part of a split with its number
    of rows in the name, ``DIR/<benchmark>_<split>1000``; parquet first.

    Raises:
        OracleError: If a shard is missing, or several parts are there.
    """
    for stem in _stems(data_dir, benchmark, split):
        for suffix in FORMATS:
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
        if file.suffix in FORMATS and named.fullmatch(file.stem)
    )
    if len(parts) > 1:
        raise OracleError(
            f"{data_dir} holds several parts of {benchmark} {split}: "
            f"{', '.join(file.name for file in parts)}. Leave one of them."
        )
    return parts


def read_rows(file: Path) -> list[Row]:
    """Reads the rows of a file with `datasets`; fields without a value are left out.

    Raises:
        OracleError: If it is empty or broken.
    """
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        # The cache of the user stays as it is.
        with tempfile.TemporaryDirectory() as cache, quiet("datasets"):
            rows = datasets.load_dataset(
                FORMATS[file.suffix],
                data_files=str(file),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
            ).to_list()
    except Exception as error:  # each reader has errors of its own
        if isinstance(error, ValueError) and "no data" in str(error):
            raise OracleError(f"{file} has no rows. Copy it again.") from error
        reason = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
        raise OracleError(f"{file} cannot be read: {reason}. Copy it again.") from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def _with_labels(rows: list[Row], file: Path, benchmark: str) -> list[Row]:
    """Fills in the answers that PIQA and WinoGrande ship in a file of their own.

    Raises:
        OracleError: If there are more or fewer answers than rows, or a row has another answer.
    """
    labels = file.with_name(f"{file.stem}-labels.lst")
    if benchmark not in ("piqa", "winogrande") or not labels.is_file():
        return rows
    field = FIELDS[benchmark].answer
    answers = labels.read_text(encoding="utf-8-sig").split()
    if len(answers) != len(rows):
        raise OracleError(
            f"{labels} has {len(answers)} labels for the {len(rows)} rows of {file.name}. Copy "
            "both again."
        )
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True), start=1):
        if str(row.setdefault(field, answer)) != answer:
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
