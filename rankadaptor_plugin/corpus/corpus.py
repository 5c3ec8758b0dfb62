"""The recovery corpus: what the pruned model is fine-tuned on, and calibrated with.

Rows come from a file, from a dataset of the hub, or from memory, in four forms that are told apart
by their content: Alpaca rows (``instruction``, ``input``, ``output``), conversations, rows with
``text``, and plain text files. Instruction rows are trained on their response alone, conversations
on what the assistant says; running text is joined, cut into blocks of `max_tokens` and trained on
every token.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from rankadaptor_plugin.config.run_file import is_hub_name
from rankadaptor_plugin.core.errors import CorpusError
from rankadaptor_plugin.corpus.cache import corpus_key, read_corpus, write_corpus
from rankadaptor_plugin.corpus.chat import chat_sequences
from rankadaptor_plugin.corpus.rows import (
    ALPACA,
    checked_rows,
    file_digest,
    hub_rows,
    prompt_and_response,
    read_rows,
    rows_digest,
)
from rankadaptor_plugin.corpus.sequences import IGNORED, Corpus, TrainingSequence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    Rows = Sequence[dict[str, Any]]

__all__ = [
    "ALPACA",
    "IGNORED",
    "Corpus",
    "TrainingSequence",
    "corpus_of_rows",
    "encode",
    "load_corpus",
    "prompt_and_response",
    "read_rows",
    "split_rows",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MEMORY = "in memory"


@dataclass(frozen=True, kw_only=True)
class _How:
    """How rows become sequences; see `load_corpus`."""

    template: str
    max_tokens: int
    limit: int
    validation: int
    validation_seed: int


def load_corpus(
    path: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "alpaca",
    max_tokens: int = 256,
    limit: int = 0,
    validation: int = 0,
    validation_seed: int = 42,
    cache: Path | None = None,
) -> Corpus:
    """Reads and tokenizes a recovery corpus.

    Args:
        path: A ``.json``, ``.jsonl`` or text file, or a dataset of the hub, ``owner/name``, whose
            split ``train`` is taken.
        tokenizer: Tokenizer of the model.
        template: ``alpaca`` or ``plain``, the prompt around instruction rows.
        max_tokens: Longest sequence in tokens; longer ones lose their end.
        limit: Use the first rows only; 0 uses all.
        validation: Rows to hold out from training, drawn as by `split_rows`.
        validation_seed: Seed of this draw.
        cache: Folder where the tokens are kept for the next time.

    Raises:
        ConfigError: If the file is missing.
        CorpusError: If it is malformed, or yields no training sequence.
    """
    how = _How(
        template=template,
        max_tokens=max_tokens,
        limit=limit,
        validation=validation,
        validation_seed=validation_seed,
    )
    file = Path(path)
    if is_hub_name(path) and not file.exists():
        rows = hub_rows(str(path), limit)
        return _corpus(str(path), tokenizer, how, cache, lambda: rows_digest(rows), lambda: rows)
    return _corpus(
        str(path), tokenizer, how, cache, lambda: file_digest(file), lambda: read_rows(file)
    )


def corpus_of_rows(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "alpaca",
    max_tokens: int = 256,
    limit: int = 0,
    validation: int = 0,
    validation_seed: int = 42,
    cache: Path | None = None,
) -> Corpus:
    """Tokenizes rows as `load_corpus` does those of a file.

    Args:
        rows: Dictionaries in any of the forms that a file may have; a ``datasets.Dataset`` will do.
        tokenizer: See `load_corpus`, as all that follows.
        template: The prompt around instruction rows.
        max_tokens: Longest sequence in tokens.
        limit: First rows to use.
        validation: Rows to hold out from training.
        validation_seed: Seed of this draw.
        cache: Folder where the tokens are kept.

    Raises:
        CorpusError: If a row is malformed, or there is no training sequence.
    """
    how = _How(
        template=template,
        max_tokens=max_tokens,
        limit=limit,
        validation=validation,
        validation_seed=validation_seed,
    )
    known = checked_rows(rows, _MEMORY)
    return _corpus(_MEMORY, tokenizer, how, cache, lambda: rows_digest(known), lambda: known)


def split_rows(rows: Sequence[T], count: int, seed: int) -> tuple[list[T], list[T]]:
    """Holds rows out as ``datasets.Dataset.train_test_split(test_size=count, seed=seed)`` does.

    Args:
        rows: Of any kind.
        count: Rows to hold out; 0 leaves all rows in their order.
        seed: Seed of the draw.

    Returns:
        The rows to train on and those held out, both in the order of the draw.
    """
    if not count:
        return list(rows), []
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    return [rows[i] for i in order[count:]], [rows[i] for i in order[:count]]


def _corpus(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    how: _How,
    cache: Path | None,
    digest: Callable[[], str],
    rows: Callable[[], Rows],
) -> Corpus:
    """Returns a corpus from the cache, or tokenizes its rows and keeps them there."""
    key = corpus_key(digest(), tokenizer, dataclasses.asdict(how)) if cache else None
    kept = cache / f"{key}.safetensors" if cache and key else None
    corpus = read_corpus(kept) if kept else None
    if corpus is None:
        corpus = _tokenized(rows(), tokenizer, how, name)
        if kept:
            write_corpus(kept, corpus)
    if corpus.dropped:
        logger.warning(
            "%d of %d rows of %s have no response within %d tokens and are left out",
            corpus.dropped,
            corpus.rows,
            name,
            how.max_tokens,
        )
    return corpus


def _tokenized(rows: Rows, tokenizer: PreTrainedTokenizerBase, how: _How, name: str) -> Corpus:
    numbered = list(enumerate(rows, start=1))[: how.limit or None]
    if how.validation and how.validation >= len(numbered):
        raise CorpusError(
            f"[corpus] validation holds out {how.validation} rows, but the corpus {name} has "
            f"{len(numbered)}, which leaves none to train on. Lower validation, or give more rows."
        )
    training, held_out = split_rows(numbered, how.validation, how.validation_seed)
    sequences, dropped = _sequences(training, tokenizer, how, name)
    validation, also_dropped = _sequences(held_out, tokenizer, how, name)
    dropped += also_dropped
    if not sequences:
        raise CorpusError(
            f"The corpus {name} gives no training sequence ({len(numbered)} rows, {dropped} longer "
            f"than {how.max_tokens} tokens or without a response). Give a file with rows, or raise "
            "[corpus] max_tokens."
        )
    if held_out and not validation:
        raise CorpusError(
            f"The {len(held_out)} rows of the corpus {name} that [corpus] validation holds out "
            f"give no sequence within {how.max_tokens} tokens. Raise validation or max_tokens."
        )
    return Corpus(sequences=sequences, dropped=dropped, validation=validation, rows=len(numbered))


def _sequences(
    rows: list[tuple[int, dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    how: _How,
    name: str,
) -> tuple[list[TrainingSequence], int]:
    """Returns the sequences of numbered rows, and how many rows gave none."""
    sequences: list[TrainingSequence] = []
    running: list[int] = []
    dropped = 0
    for number, row in rows:
        where = f"{name}, row {number}"
        if "text" in row:
            running += encode(tokenizer, row["text"]) + _end(tokenizer)
            continue
        if "messages" in row:
            found = chat_sequences(row["messages"], tokenizer, how.max_tokens, where)
        else:
            found = _instruction(row, tokenizer, how)
        if not found:
            logger.debug("%s has no response within %d tokens", where, how.max_tokens)
            dropped += 1
        sequences += found
    for start in range(0, len(running), how.max_tokens):
        block = torch.tensor(running[start : start + how.max_tokens])
        if len(block) > 1:
            sequences.append(TrainingSequence(block, block))
    return sequences, dropped


def _instruction(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, how: _How
) -> list[TrainingSequence]:
    """Tokenizes prompt and response together; the loss begins where the prompt alone ends."""
    prompt, response = prompt_and_response(row, how.template)
    if not row["output"].strip():
        return []
    head = len(encode(tokenizer, prompt))
    tokens = (encode(tokenizer, prompt + response) + _end(tokenizer))[: how.max_tokens]
    if len(tokens) <= max(head, 1):  # nothing comes before the first token to predict it from
        return []
    ids = torch.tensor(tokens)
    labels = ids.clone()
    labels[:head] = IGNORED
    return [TrainingSequence(ids, labels)]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns token ids with the tokenizer's own beginning, but without an end that it may add."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
