"""The recovery corpus: what the pruned model is fine-tuned on, and calibrated with.

Rows come from a file, from a dataset of the hub, or from memory, in four formats that are told
apart by their content: Alpaca rows (``instruction``, ``input``, ``output``), conversations, rows
with ``text``, and plain text files. Instruction rows are trained on their response alone,
conversations on the turns of the assistant; running text is joined, cut into blocks of `max_length`
and trained on every token.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from rankadaptor_plugin.config.run_file import corpus_file, is_hub_name
from rankadaptor_plugin.config.tables import CorpusConfig
from rankadaptor_plugin.core.errors import ConfigError, CorpusError
from rankadaptor_plugin.corpus.chat import chat_sequences
from rankadaptor_plugin.corpus.rows import (
    check_readable,
    checked_rows,
    hub_rows,
    prompt_and_response,
    read_rows,
)
from rankadaptor_plugin.corpus.sequences import IGNORED, Corpus, TrainingSequence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from rankadaptor_plugin.config.tables import RunConfig

    Rows = Sequence[dict[str, Any]]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_DEFAULTS = CorpusConfig()
_SPLIT_SEED = 42  # LLM-Pruner's, which draws the rows that are held out


def check(config: RunConfig) -> None:
    """Checks the table ``[corpus]``; what the file holds is checked by `load_corpus`.

    Raises:
        ConfigError: If the file cannot be read.
    """
    file = corpus_file(config.corpus.path)
    if file.exists() or not is_hub_name(file):
        check_readable(file)


def load_corpus(
    source: Rows | Path | str,
    tokenizer: PreTrainedTokenizerBase,
    config: CorpusConfig = _DEFAULTS,
) -> Corpus:
    """Reads and tokenizes a recovery corpus.

    Args:
        source: A ``.json``, ``.jsonl`` or text file; a dataset of the hub, ``owner/name``, whose
            split ``train`` is taken; or rows in memory, dictionaries in any of the formats that a
            file may have, such as a ``datasets.Dataset``.
        tokenizer: Tokenizer of the model.
        config: The ``[corpus]`` table, of which `path` is not used.

    Raises:
        ConfigError: If the file is missing, or `source` is something else.
        CorpusError: If a row is malformed, or there is no training sequence.
    """
    name = "in memory"
    if isinstance(source, (str, Path)):
        name, file = str(source), Path(source)
        on_hub = is_hub_name(source) and not file.exists()
        rows = hub_rows(name, config.max_train_samples) if on_hub else read_rows(file)
    elif hasattr(source, "__len__") and not isinstance(source, dict):
        rows = checked_rows(source, name)
    else:
        raise ConfigError(
            f"The corpus is of type {type(source).__name__}. Give a list of rows, a file, a "
            "name on the hub, or a tokenized Corpus."
        )
    corpus = _tokenized(rows, tokenizer, config, name)
    if corpus.dropped:
        logger.warning(
            "%d of %d rows of %s have no response within %d tokens and are skipped",
            corpus.dropped,
            corpus.rows,
            name,
            config.max_length,
        )
    return corpus


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


def _tokenized(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, config: CorpusConfig, name: str
) -> Corpus:
    numbered = list(enumerate(rows, start=1))[: config.max_train_samples or None]
    if config.val_set_size and config.val_set_size >= len(numbered):
        raise CorpusError(
            f"[corpus] val_set_size holds out {config.val_set_size} rows, but the corpus {name} "
            f"has {len(numbered)}, which leaves none to train on. Lower val_set_size, or give more "
            "rows."
        )
    training, held_out = split_rows(numbered, config.val_set_size, _SPLIT_SEED)
    sequences, dropped = _sequences(training, tokenizer, config, name)
    validation, also_dropped = _sequences(held_out, tokenizer, config, name)
    dropped += also_dropped
    if not sequences:
        raise CorpusError(
            f"The corpus {name} gives no training sequence ({len(numbered)} rows, {dropped} longer "
            f"than {config.max_length} tokens or without a response). Give a file with rows, or "
            "raise [corpus] max_length."
        )
    if held_out and not validation:
        raise CorpusError(
            f"The {len(held_out)} rows of the corpus {name} that [corpus] val_set_size holds out "
            f"give no sequence within {config.max_length} tokens. Raise val_set_size or max_length."
        )
    return Corpus(sequences=sequences, dropped=dropped, validation=validation, rows=len(numbered))


def _sequences(
    rows: list[tuple[int, dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    config: CorpusConfig,
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
            cut = chat_sequences(row["messages"], tokenizer, config.max_length, where)
        else:
            cut = _instruction(row, tokenizer, config)
        if not cut:
            logger.debug("%s has no response within %d tokens", where, config.max_length)
            dropped += 1
        sequences += cut
    for start in range(0, len(running), config.max_length):
        block = torch.tensor(running[start : start + config.max_length])
        if len(block) > 1:
            sequences.append(TrainingSequence(block, block))
    return sequences, dropped


def _instruction(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, config: CorpusConfig
) -> list[TrainingSequence]:
    """Tokenizes prompt and response together; the loss begins where the prompt alone ends."""
    prompt, response = prompt_and_response(row, config.template)
    if not row["output"].strip():
        return []
    head = len(encode(tokenizer, prompt))
    tokens = (encode(tokenizer, prompt + response) + _end(tokenizer))[: config.max_length]
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
