"""Rows of the seven benchmarks, checked and written with the fields that lm-eval's task files read.

Each builder takes a row of one layout, or a question in parts, and returns what lm-eval 0.4.13
reads, no more. `local_layouts` says which layouts there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.errors import OracleError

if TYPE_CHECKING:
    from collections.abc import Sequence

Row = dict[str, Any]


class RowError(OracleError):
    """A row cannot be read; the message goes on from ``row 3``."""


def has_field(row: Any, field: str) -> bool:
    """Returns whether a row has a field; ``a.b`` is the field ``b`` of an object ``a``."""
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
    raise RowError(f"has {field} {value!r:.60}, which is no list of texts. Correct the row.")


def has_answer(row: Row, field: str) -> str:
    """Returns the answer of a row as text, whatever it counts or names.

    Raises:
        RowError: If it is left open, as in hidden test sets.
    """
    answer = "" if row[field] is None else str(row[field]).strip()
    if answer in ("", "-1"):
        raise RowError(
            f"has {field} {row[field]!r}: a document without an answer, as in hidden test sets. "
            "Give documents with their answers."
        )
    return answer


def position(row: Row, field: str, names: Sequence[str]) -> int:
    """Returns the place of a row's answer among the names of its choices.

    Raises:
        RowError: If the answer is left open or none of them.
    """
    answer = has_answer(row, field)
    if answer not in names:
        raise RowError(
            f"has {field} {row[field]!r}, which is not among its choices: allowed are "
            f"{', '.join(names)}. Correct the row."
        )
    return list(names).index(answer)


def numbers(count: int, first: int = 0) -> list[str]:
    """Returns ``["0", "1", ...]``, the names of choices that are counted."""
    return [str(number) for number in range(first, first + count)]


def boolq(row: Row, answer: str, *, title: bool = False) -> Row:
    """A question on a passage, answered by 0 or 1, false or true."""
    spelled = {"false": "0", "true": "1"}.get(str(row[answer]).lower(), row[answer])
    passage = text(row, "passage")
    return {
        "question": text(row, "question"),
        # SuperGLUE, which lm-eval reads, writes the title in front of the passage.
        "passage": f"{text(row, 'title')} -- {passage}" if title else passage,
        "label": position({answer: spelled}, answer, numbers(2)),
    }


def hellaswag(row: Row) -> Row:
    """A context in two parts and its endings."""
    endings = texts(row, "endings")
    return {
        **{field: text(row, field) for field in ("activity_label", "ctx_a", "ctx_b")},
        "endings": endings,
        "label": str(position(row, "label", numbers(len(endings)))),
    }


def winogrande(row: Row) -> Row:
    """A sentence with a blank, and two options counted from 1."""
    sentence = text(row, "sentence")
    if "_" not in sentence:
        raise RowError(f"has the sentence {sentence!r:.60} without a blank _. Correct the row.")
    return {
        "sentence": sentence,
        "option1": text(row, "option1"),
        "option2": text(row, "option2"),
        "answer": str(1 + position(row, "answer", numbers(2, first=1))),
    }


def winogrande_parts(sentence: str, choices: Sequence[str], gold: int) -> Row:
    """As `winogrande`, from its parts; `gold` counts from 0."""
    option1, option2 = _pair(choices, "winogrande")
    row = {"sentence": sentence, "option1": option1, "option2": option2, "answer": gold + 1}
    return winogrande(row)


def piqa(row: Row) -> Row:
    """A goal and two solutions counted from 0."""
    return {
        **{field: text(row, field) for field in ("goal", "sol1", "sol2")},
        "label": position(row, "label", numbers(2)),
    }


def piqa_parts(goal: str, choices: Sequence[str], gold: int) -> Row:
    """As `piqa`, from its parts; `gold` counts from 0."""
    sol1, sol2 = _pair(choices, "piqa")
    return {"goal": goal, "sol1": sol1, "sol2": sol2, "label": gold}


def science(row: Row, *, question: str, nested: bool = False) -> Row:
    """A question of ARC or OpenBookQA with labelled choices.

    Args:
        row: With `question`, ``choices`` and ``answerKey``, or `nested`.
        question: Name of the field that lm-eval reads the question from.
        nested: Question and choices are the fields ``stem`` and ``choices`` of an object
            ``question``.
    """
    source = row["question"] if nested else row
    choices = source["choices"]
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
    if not (has_field(choices, "text") and has_field(choices, "label")):
        raise RowError(f"has choices {choices!r:.60}; they need text and label. Correct the row.")
    options, labels = texts(choices, "text"), texts(choices, "label")
    if len(options) != len(labels):
        raise RowError(f"has {len(options)} choices but {len(labels)} labels. Correct the row.")
    return {
        question: text(source, "stem" if nested else question),
        "choices": {"text": options, "label": labels},
        "answerKey": labels[position(row, "answerKey", labels)],
    }


def science_parts(stem: str, choices: Sequence[str], gold: int, *, question: str) -> Row:
    """As `science`, from its parts; `gold` counts from 0.

    The labels, which no prompt of lm-eval shows, are A, B, C and so on.
    """
    labels = [chr(ord("A") + number) for number in range(len(choices))]
    return {
        question: stem,
        "choices": {"text": list(choices), "label": labels},
        "answerKey": labels[gold],
    }


def _pair(choices: Sequence[str], benchmark: str) -> tuple[str, str]:
    if len(choices) != 2:  # noqa: PLR2004  what a pair is
        raise RowError(f"has {len(choices)} choices; {benchmark} has 2. Correct the row.")
    return choices[0], choices[1]
