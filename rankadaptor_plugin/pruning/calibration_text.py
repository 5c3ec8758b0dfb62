"""Where calibration sequences come from: any text, cut into windows of one length."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from rankadaptor_plugin.core.errors import CorpusError
from rankadaptor_plugin.corpus.corpus import encode
from rankadaptor_plugin.corpus.rows import prompt_and_response, read_rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def calibration_documents(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, template: str = "alpaca"
) -> list[torch.Tensor]:
    """Reads and tokenizes the file that calibration sequences come from.

    Args:
        path: A ``.json``, ``.jsonl`` or text file, as for the corpus.
        tokenizer: Tokenizer of the model.
        template: ``alpaca`` or ``plain``, the prompt around instruction rows.

    Returns:
        Token ids of each row, or of the whole text, each of shape (t,), int64.

    Raises:
        ConfigError: If the file is missing.
        CorpusError: If it is malformed.
    """
    texts = (
        row["text"] if "text" in row else "".join(prompt_and_response(row, template))
        for row in read_rows(path, "calibration text")
    )
    return [torch.tensor(encode(tokenizer, text), dtype=torch.int64) for text in texts]


def calibration_samples(
    documents: Sequence[torch.Tensor], count: int, tokens: int, seed: int
) -> list[torch.Tensor]:
    """Draws sequences of one length, at random and without overlap.

    As in LLM-Pruner they come from documents that are long enough, never from two at once.

    Args:
        documents: Token ids, each of shape (t,), int64.
        count: Number of sequences; with a warning fewer if there are no more.
        tokens: Length of each sequence.
        seed: Seed of the draw.

    Returns:
        Token ids, each of shape (tokens,), int64.

    Raises:
        CorpusError: If no document is long enough.
    """
    generator = torch.Generator().manual_seed(seed)
    windows = [
        (number, place)
        for number, document in enumerate(documents)
        for place in range(len(document) // tokens)
    ]
    if not windows:
        longest = max((len(document) for document in documents), default=0)
        raise CorpusError(
            f"The calibration text is too short: its longest document has {longest} tokens, but "
            f"[prune] calibration_tokens is {tokens}. Lower it, or give longer text in [prune] "
            "calibration."
        )
    if len(windows) < count:
        logger.warning(
            "The calibration text gives %d sequences of %d tokens, not %d. Give more text, or "
            "lower [prune] calibration_tokens.",
            len(windows),
            tokens,
            count,
        )
    samples = []
    shifts: dict[int, int] = {}
    for index in torch.randperm(len(windows), generator=generator)[:count].tolist():
        number, place = windows[index]
        if number not in shifts:  # one for all windows of a document, which so cannot overlap
            spare = len(documents[number]) % tokens
            shifts[number] = int(torch.randint(spare + 1, (1,), generator=generator))
        start = shifts[number] + place * tokens
        samples.append(documents[number][start : start + tokens])
    return samples
