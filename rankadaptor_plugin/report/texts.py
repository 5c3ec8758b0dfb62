"""The texts that the models of a run wrote, side by side, and a table of their measures.

Works on the plain entries of report.json, one per text. Whatever a model writes is untrusted: it is
escaped, and characters that are invisible or reorder the line are shown by name.
"""

from __future__ import annotations

import math
import re
import statistics
import unicodedata
from html import escape
from typing import TYPE_CHECKING, TypedDict

from rankadaptor_plugin.report.numbers import MODELS, UNKNOWN, number
from rankadaptor_plugin.report.tables import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Entry(TypedDict):
    """One text.

    Attributes:
        model: ``base``, ``pruned``, ``uniform`` or ``searched``.
        kind: What the prompt asks for, such as ``article`` or ``steps``.
        prompt: The prompt.
        decoding: ``greedy`` or ``sampled``.
        text: What the model wrote.
        perplexity: Under the base model, at least 1; None if unknown, as in an empty text.
        distinct_1: Different tokens by all tokens, in (0, 1]; None if the text is too short.
        distinct_2: The same of pairs of neighbours.
        repetition: Share of 4-grams that occurred before, in [0, 1); None if the text is too short.
    """

    model: str
    kind: str
    prompt: str
    decoding: str
    text: str
    perplexity: float | None
    distinct_1: float | None
    distinct_2: float | None
    repetition: float | None


MEASURES = ("perplexity", "distinct-1", "distinct-2", "repetition")
DECODINGS = ("greedy", "sampled")
NOTHING = "(nothing)"


def quality_table(entries: Sequence[Entry]) -> Table | None:
    """Tabulates the mean measures by model and decoding; None where there is no text."""
    if not entries:
        return None
    decodings = _ordered((entry["decoding"] for entry in entries), DECODINGS)
    rows = []
    for model in _ordered((entry["model"] for entry in entries), tuple(MODELS)):
        cells = []
        for decoding in decodings:
            own = [e for e in entries if (e["model"], e["decoding"]) == (model, decoding)]
            cells += [
                _mean([entry["perplexity"] for entry in own], geometric=True),
                _mean([entry["distinct_1"] for entry in own]),
                _mean([entry["distinct_2"] for entry in own]),
                _mean([entry["repetition"] for entry in own]),
            ]
        rows.append((MODELS.get(model, model), *cells))
    return Table(
        "mean over the texts, with their number where some are too short to count; perplexity: "
        "geometric mean (exp of the mean logarithm) under the base model, which finds repetitive "
        "text likely too; distinct-1 and distinct-2: different tokens by all tokens, and the same "
        "of pairs; repetition: share of 4-grams that occurred before in the text",
        ("model", *(f"{name}, {decoding}" for decoding in decodings for name in MEASURES)),
        tuple(rows),
    )


def markdown(entries: Sequence[Entry]) -> str:
    """Renders the texts as Markdown (GitHub flavour): one table per prompt and decoding."""
    parts = []
    for kind, prompt, decodings in _prompts(entries):
        for decoding, texts in decodings:
            lines = ["| model | continuation |", "| --- | --- |"]
            lines += [f"| {_inline(m)} | {_inline(text) or NOTHING} |" for m, text in texts]
            parts += [
                f"{_inline(kind)}, {_inline(decoding)}, after: {_inline(prompt)}",
                "\n".join(lines),
            ]
    return "\n\n".join(parts)


def html(entries: Sequence[Entry]) -> str:
    """Renders the texts as HTML: per prompt and decoding a grid with a cell for each model."""
    parts = []
    for kind, prompt, decodings in _prompts(entries):
        parts.append(f'<h3>{_html(kind)}</h3><p class="prompt" dir="auto">{_html(prompt)}</p>')
        for decoding, texts in decodings:
            cells = "".join(
                f'<div><dt>{_html(model)}</dt><dd dir="auto">{_html(text) or NOTHING}</dd></div>'
                for model, text in texts
            )
            parts.append(f'<p class="caption">{_html(decoding)}</p><dl class="texts">{cells}</dl>')
    return "\n".join(parts)


def _prompts(
    entries: Sequence[Entry],
) -> Iterator[tuple[str, str, list[tuple[str, list[tuple[str, str]]]]]]:
    """Yields (kind, prompt, [(decoding, [(name of the model, text)])])."""
    for kind, prompt in dict.fromkeys((entry["kind"], entry["prompt"]) for entry in entries):
        own = [e for e in entries if (e["kind"], e["prompt"]) == (kind, prompt)]
        models = _ordered((entry["model"] for entry in own), tuple(MODELS))
        found = []
        for decoding in _ordered((entry["decoding"] for entry in own), DECODINGS):
            texts = [
                (MODELS.get(model, model), entry["text"])
                for model in models
                for entry in own
                if (entry["model"], entry["decoding"]) == (model, decoding)
            ]
            found.append((decoding, texts))
        yield kind, prompt, found


def _ordered(names: Iterator[str], known: tuple[str, ...]) -> list[str]:
    """Returns each name once: the known ones in their order, then the rest as they came."""
    found = dict.fromkeys(names)
    return [name for name in known if name in found] + [n for n in found if n not in known]


def _mean(values: Sequence[float | None], *, geometric: bool = False) -> str:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return UNKNOWN
    mean = statistics.geometric_mean(known) if geometric else statistics.fmean(known)
    rest = "" if len(known) == len(values) else f" ({len(known)} of {len(values)})"
    return number(mean, 2) + rest


def _inline(text: str) -> str:
    """Makes text safe inside one line of Markdown; its own line breaks stay visible."""
    text = _visible(text).replace("\t", " ").strip(" ")
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Dollars open formulas, and a colon before slashes makes a link of what a model wrote.
    text = re.sub(r"([\\`*\[\]|#~$]|:(?=//))", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    return text.replace("\n", " ↵<br>")


def _html(text: str) -> str:
    return escape(_visible(text).strip(" "))


def _visible(text: str) -> str:
    """Shows by name the characters that are invisible, reorder the line or cannot be written."""
    return "".join(map(_named, text.replace("\r\n", "\n")))


def _named(character: str) -> str:
    joiners = "\u200c\u200d"  # some scripts and emoji need them
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    if not hidden or character in "\n\t" or character in joiners:
        return character
    return f"⟨U+{ord(character):04X}⟩"
