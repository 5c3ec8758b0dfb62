"""Layouts in which copies of the seven benchmarks go round.

A layout is a set of fields and a pure function from such a row to the fields that lm-eval's own
task files read. `LAYOUTS` lists them for each benchmark; a new one is one more line there. The
first layout whose fields are all in a row is taken, row by row. Nothing is guessed: a layout from
which the original fields cannot be had exactly is not in the list.

Sources: the data sets that lm-eval 0.4.13 names; the benchmarks' own downloads; the flattened files
of LLM-Adapters (arXiv 2304.01933) and of llm-foundry.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rankadaptor_plugin.oracle.local_rows import (
    RowError,
    boolq,
    has_field,
    hellaswag,
    numbers,
    piqa,
    piqa_parts,
    position,
    science,
    science_parts,
    text,
    texts,
    winogrande,
    winogrande_parts,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rankadaptor_plugin.oracle.local_rows import Row

    Build = Callable[[str, Sequence[str], int], Row]


@dataclass(frozen=True)
class Layout:
    """One way to write down a document of a benchmark.

    Attributes:
        fields: Names of the fields with the question; ``a.b`` is the field ``b`` of an object
            ``a``.
        answer: Name of the field with the right answer.
        convert: From such a row to the fields that lm-eval reads. Raises `RowError` where a value
            is not as the layout has it.
    """

    fields: tuple[str, ...]
    answer: str
    convert: Callable[[Row], Row]


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
            return layout.convert(row)
    if asked:
        answers = " or ".join(dict.fromkeys(repr(layout.answer) for layout in asked))
        raise RowError(f"has no {answers}. Give documents with their answers.")
    allowed = " | ".join(", ".join((*layout.fields, layout.answer)) for layout in layouts)
    raise RowError(
        f"is in no known layout of {benchmark}: it has the fields {', '.join(row) or '-'}; allowed "
        f"are {allowed}. Convert the file."
    )


def _query(row: Row, build: Build) -> Row:
    """llm-foundry: the question as a prompt, ``choices`` as texts, ``gold`` counted from 0."""
    choices = texts(row, "choices")
    question = text(row, "query").removesuffix("Answer:").rstrip("\n").removeprefix("Question: ")
    return build(question, choices, position(row, "gold", numbers(len(choices))))


def _instruction(row: Row, build: Build, *, head: str, word: str) -> Row:
    """LLM-Adapters: question, numbered choices and the form of the answer in one text."""
    refusal = RowError(
        "has an instruction that cannot be taken apart without guessing: it must be "
        f"'{head.strip()} ...', then '{word}1: ...', '{word}2: ...' and 'Answer format: ...', each "
        "once. Give the file in its original layout."
    )
    whole = text(row, "instruction")
    form = re.search(r"(?:\n\n| )Answer format: (\S+)$", whole)
    if form is None or not whole.startswith(head):
        raise refusal
    names = form[1].split("/")
    marks = [f"{word}{number}" for number in range(1, len(names) + 1)]
    body = whole[len(head) : form.start()]
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
    return build(parts[0], parts[1:], position(row, "answer", names))


def _science_layouts(question: str) -> tuple[Layout, ...]:
    hub, build = partial(science, question=question), partial(science_parts, question=question)
    head = "Please choose the correct answer to the question: "
    instruction = partial(_instruction, build=build, head=head, word="Answer")
    return (
        Layout((question, "choices"), "answerKey", hub),
        Layout(("question.stem", "question.choices"), "answerKey", partial(hub, nested=True)),
        Layout(("query", "choices"), "gold", partial(_query, build=build)),
        Layout(("instruction",), "answer", instruction),
    )


_SOLUTIONS = partial(
    _instruction,
    build=piqa_parts,
    head="Please choose the correct solution to the question: ",
    word="Solution",
)

_OPTIONS = partial(
    _instruction,
    build=winogrande_parts,
    head="Please choose the correct answer to fill in the blank to complete the given sentence: ",
    word="Option",
)

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "boolq": (
        Layout(("question", "passage"), "label", partial(boolq, answer="label")),
        Layout(
            ("question", "title", "passage"), "answer", partial(boolq, answer="answer", title=True)
        ),
        Layout(("question", "passage"), "answer", partial(boolq, answer="answer")),
    ),
    "piqa": (
        Layout(("goal", "sol1", "sol2"), "label", piqa),
        Layout(("query", "choices"), "gold", partial(_query, build=piqa_parts)),
        Layout(("instruction",), "answer", _SOLUTIONS),
    ),
    "hellaswag": (Layout(("activity_label", "ctx_a", "ctx_b", "endings"), "label", hellaswag),),
    "winogrande": (
        Layout(("sentence", "option1", "option2"), "answer", winogrande),
        Layout(("instruction",), "answer", _OPTIONS),
    ),
    "arc_easy": _science_layouts("question"),
    "arc_challenge": _science_layouts("question"),
    "openbookqa": _science_layouts("question_stem"),
}
"""The layouts of each benchmark, the one that lm-eval reads first."""
