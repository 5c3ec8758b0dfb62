"""The recovery corpus: what the pruned model is fine-tuned on, and calibrated with.

Three forms are read, told apart by their content: JSON or JSONL rows in Alpaca form
(``instruction``, ``input``, ``output``), JSON or JSONL rows with ``text``, and plain text files.
Instruction rows are trained on their response alone; running text is joined, cut into blocks of
`max_tokens` and trained on every token.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rankadaptor_plugin.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token without loss, as torch's cross-entropy takes it."""

ALPACA = {
    True: (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    ),
    False: (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    ),
}
"""The prompts of Stanford Alpaca, with and without an input, as LLM-Pruner uses them."""


@dataclass(frozen=True)
class TrainingSequence:
    """One training sequence.

    Attributes:
        tokens: Token ids, shape (t,), int64.
        labels: The same ids, `IGNORED` where no loss is taken, shape (t,), int64.
    """

    tokens: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokenized training sequences.

    Attributes:
        sequences: At least one.
        dropped: Rows without a single trainable token within the length limit.
    """

    sequences: Sequence[TrainingSequence]
    dropped: int


_SETTINGS = {
    "corpus": "[corpus] path",
    "calibration text": "[prune] calibration",
    "held-out text": "[oracle] text",
}


def load_corpus(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "alpaca",
    max_tokens: int = 256,
    limit: int = 0,
) -> Corpus:
    """Reads and tokenizes a recovery corpus.

    Args:
        path: A ``.json``, ``.jsonl`` or text file.
        tokenizer: Tokenizer of the model.
        template: ``alpaca`` or ``plain``, the prompt around instruction rows.
        max_tokens: Longest sequence in tokens; longer ones lose their end.
        limit: Use the first rows only; 0 uses all.

    Raises:
        ConfigError: If the file is missing.
        CorpusError: If it is malformed, or yields no training sequence.
    """
    rows = read_rows(path)
    if limit:
        rows = rows[:limit]
    sequences: list[TrainingSequence] = []
    running: list[int] = []
    dropped = 0
    for number, row in enumerate(rows, start=1):
        if "text" in row:
            running += encode(tokenizer, row["text"]) + _end(tokenizer)
            continue
        sequence = _instruction(row, tokenizer, template, max_tokens, f"{path}, row {number}")
        if sequence is None:
            dropped += 1
        else:
            sequences.append(sequence)
    for start in range(0, len(running), max_tokens):
        block = torch.tensor(running[start : start + max_tokens])
        if len(block) > 1:
            sequences.append(TrainingSequence(block, block))
    if not sequences:
        raise CorpusError(
            f"The corpus {path} gives no training sequence ({len(rows)} rows, {dropped} longer "
            f"than {max_tokens} tokens or without a response). Give a file with rows, or raise "
            "[corpus] max_tokens."
        )
    if dropped:
        logger.warning(
            "%d of %d rows of %s have no response within %d tokens and are left out",
            dropped,
            len(rows),
            path,
            max_tokens,
        )
    return Corpus(sequences=sequences, dropped=dropped)


def read_rows(path: Path, what: str = "corpus") -> list[dict[str, str]]:
    """Reads the rows of a corpus file, or of the ``"calibration text"`` or ``"held-out text"``.

    Returns:
        Dictionaries with either ``text`` or ``instruction``, ``input`` and ``output``.

    Raises:
        ConfigError: If the file is missing.
        CorpusError: If it is malformed.
    """
    setting = _SETTINGS[what]
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"The {what} {path} cannot be read: {error.strerror}. Correct {setting}."
        ) from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"The {what} {path} is not UTF-8 text: {error}. Convert it.") from error
    if not content.strip():
        raise CorpusError(f"The {what} {path} is empty. Give a file with at least one row.")
    if path.suffix.lower() == ".json":
        rows = _parse(content, path, what, line=None)
        if not isinstance(rows, list):
            raise CorpusError(f"The {what} {path} is not a JSON list of rows. Wrap it in [ ].")
        numbered = list(enumerate(rows, start=1))
    elif path.suffix.lower() == ".jsonl":
        numbered = [
            (number, _parse(line, path, what, line=number))
            # Not splitlines: JSON strings may hold the other characters that it breaks at.
            for number, line in enumerate(content.split("\n"), start=1)
            if line.strip()
        ]
    else:
        return [{"text": content}]
    return [_row(row, f"{path}, row {number}") for number, row in numbered]


def _parse(content: str, path: Path, what: str, line: int | None) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        where = f"line {line}" if line else f"line {error.lineno}"
        raise CorpusError(
            f"The {what} {path} is not valid JSON in {where}: {error.msg}. Correct it."
        ) from error


def _row(row: Any, where: str) -> dict[str, str]:
    if isinstance(row, dict):
        # Before `text`: Stanford's own file has both, and `text` would be trained on as a whole.
        filled = {**row, "input": row.get("input") or ""}
        texts: dict[str, Any] = {k: filled.get(k) for k in ("instruction", "input", "output")}
        if all(isinstance(text, str) for text in texts.values()):
            return texts
        if isinstance(row.get("text"), str):
            return {"text": row["text"]}
    raise CorpusError(
        f"{where} is {repr(row)[:60]}; a row needs the texts instruction and output (and may have "
        "input), or text. Correct the row."
    )


def _instruction(
    row: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_tokens: int,
    where: str,
) -> TrainingSequence | None:
    """Tokenizes prompt and response together; the loss begins where the prompt alone ends."""
    prompt, response = prompt_and_response(row, template)
    if not row["output"].strip():
        return None
    head = len(encode(tokenizer, prompt))
    tokens = (encode(tokenizer, prompt + response) + _end(tokenizer))[:max_tokens]
    if len(tokens) <= max(head, 1):  # nothing comes before the first token to predict it from
        logger.debug("%s: the prompt alone fills %d tokens", where, max_tokens)
        return None
    ids = torch.tensor(tokens)
    labels = ids.clone()
    labels[:head] = IGNORED
    return TrainingSequence(ids, labels)


def prompt_and_response(row: dict[str, str], template: str) -> tuple[str, str]:
    """Returns what an instruction row reads as; the two follow each other without a gap."""
    if template == "alpaca":
        return ALPACA[bool(row["input"])].format(**row), row["output"]
    return f"{row['instruction']} {row['input']}".strip(), f" {row['output']}"


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns token ids with the tokenizer's own beginning, but without an end that it may add."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
