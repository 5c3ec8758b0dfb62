"""Tokenized corpora on disk, so that one is tokenized once.

The file's name is a hash of everything that the tokens depend on. Its content is one safetensors
file: all tokens in one row, which of them are trained, and where each sequence ends.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from rankadaptor_plugin.corpus.sequences import IGNORED, Corpus, TrainingSequence

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_FORMAT = 1
"""To be raised when rows are tokenized, or files written, in another way."""

_TENSORS = ("tokens", "trained", "ends")
_COUNTS = ("sequences", "dropped", "rows")


def corpus_key(
    content: str, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> str | None:
    """Returns the name under which a tokenized corpus is kept, 32 hexadecimal digits.

    Args:
        content: Hash of the rows.
        tokenizer: Tokenizer of the model.
        settings: What else the tokens depend on, plain values.

    Returns:
        None if the tokenizer cannot say what it does: one that is not of the tokenizers library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    described = json.loads(backend.to_str())
    # What the last caller asked for; each call sets them anew.
    described["truncation"] = described["padding"] = None
    whole = {
        "format": _FORMAT,
        "versions": [version("tokenizers"), version("transformers")],
        "content": content,
        "settings": settings,
        "tokenizer": described,
        "kind": type(tokenizer).__name__,
        "special": tokenizer.special_tokens_map,
        "chat_template": getattr(tokenizer, "chat_template", None),
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
    }
    text = json.dumps(whole, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_corpus(path: Path) -> Corpus | None:
    """Returns the corpus that `write_corpus` wrote, equal in every bit.

    Returns:
        None if there is no such file, or if it is torn.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("corpus", "{}"))
            flat = {name: file.get_tensor(name) for name in _TENSORS}
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError) as error:
        logger.info("The tokenized corpus %s cannot be read (%s); it is made anew", path, error)
        return None
    counts = {name: metadata.get(name, "") for name in _COUNTS}
    if metadata.get("digest") != _digest(flat, counts):
        logger.info("The tokenized corpus %s is torn; it is made anew", path)
        return None
    tokens = flat["tokens"].long()
    labels = torch.where(flat["trained"], tokens, IGNORED)
    borders = itertools.pairwise([0, *flat["ends"].tolist()])
    sequences = [TrainingSequence(tokens[a:b], labels[a:b]) for a, b in borders]
    training = int(counts["sequences"])
    return Corpus(
        sequences=sequences[:training],
        dropped=int(counts["dropped"]),
        validation=sequences[training:],
        rows=int(counts["rows"]),
    )


def write_corpus(path: Path, corpus: Corpus) -> None:
    """Keeps a tokenized corpus, whole or not at all; if that fails there is only a warning.

    Args:
        path: File to write; its folder is made.
        corpus: A corpus; predictions of a teacher are not kept.
    """
    flat = _flat(corpus)
    counts = {
        "sequences": str(len(corpus.sequences)),
        "dropped": str(corpus.dropped),
        "rows": str(corpus.rows),
    }
    # One entry alone: safetensors writes several in any order, and the file would differ.
    metadata = json.dumps({**counts, "digest": _digest(flat, counts)})
    content = save(flat, {"corpus": metadata})
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        logger.warning(
            "The tokenized corpus is not kept, and tokenized again next time: %s cannot be "
            "written: %s. Free some space or set another output.",
            path,
            error.strerror or error,
        )


def tokens_digest(corpus: Corpus) -> str:
    """Returns a hash of all tokens and labels, for a corpus that is no file to be hashed."""
    return _digest(_flat(corpus), {"sequences": str(len(corpus.sequences))})[:16]


def _flat(corpus: Corpus) -> dict[str, torch.Tensor]:
    sequences = [*corpus.sequences, *corpus.validation]
    lengths = torch.tensor([len(sequence.tokens) for sequence in sequences], dtype=torch.int64)
    return {
        "tokens": torch.cat([sequence.tokens for sequence in sequences]).int(),
        "trained": torch.cat([sequence.labels for sequence in sequences]) != IGNORED,
        "ends": lengths.cumsum(0),
    }


def _digest(flat: dict[str, torch.Tensor], counts: dict[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(counts, sort_keys=True).encode())
    for name in _TENSORS:
        sha.update(flat[name].numpy().tobytes())
    return sha.hexdigest()
