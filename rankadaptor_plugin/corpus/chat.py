"""Conversations as training sequences, by the tokenizer's chat template.

Only the turns of the assistant are trained on.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from jinja2 import TemplateError

from rankadaptor_plugin.core.errors import CorpusError
from rankadaptor_plugin.corpus.sequences import IGNORED, TrainingSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rankadaptor_plugin.corpus.rows import Message

_DATE = "26 Jul 2024"
"""Date of today in Llama's templates; the one of 3.1 falls back to it."""


def chat_sequences(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, max_length: int, where: str
) -> list[TrainingSequence]:
    """Tokenizes a conversation; the loss is on the turns of the assistant and their ends.

    A turn of the assistant begins where the conversation so far, with the prompt for an answer,
    ends. It ends where the conversation with that turn ends. Templates that write earlier turns in
    another way once later ones follow (Qwen3 leaves out its thoughts) give one sequence for
    each turn, all others one for the whole conversation. What Llama's templates say of
    today's date is the same every day.

    Args:
        messages: The turns, as `read_rows` returns them.
        tokenizer: A tokenizer with a chat template.
        max_length: Longest sequence in tokens; longer ones lose their end.
        where: File and row, for messages.

    Returns:
        No sequence if the assistant says nothing within `max_length`.

    Raises:
        CorpusError: If there is no chat template, or if it refuses the conversation.
    """
    turns: list[tuple[int, list[int]]] = []
    for end, message in enumerate(messages, start=1):
        if message["role"] != "assistant" or not message["content"].strip():
            continue
        prompt = _ids(messages[: end - 1], tokenizer, where, asks=True)
        if len(prompt) >= max_length:  # so are those of all later turns
            break
        whole = _ids(messages[:end], tokenizer, where, asks=False)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
        turns.append((sum(1 for _ in same), whole))
    if turns and all(whole == turns[-1][1][: len(whole)] for _, whole in turns):
        spans = [(start, len(whole)) for start, whole in turns]
        cut = [_sequence(turns[-1][1], spans, max_length)]
    else:
        cut = [_sequence(whole, [(start, len(whole))], max_length) for start, whole in turns]
    return [sequence for sequence in cut if (sequence.labels[1:] != IGNORED).any()]


def _sequence(ids: list[int], spans: list[tuple[int, int]], max_length: int) -> TrainingSequence:
    tokens = torch.tensor(ids[:max_length])
    labels = torch.full_like(tokens, IGNORED)
    for start, end in spans:
        labels[start:end] = tokens[start:end]
    return TrainingSequence(tokens, labels)


def _ids(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, where: str, *, asks: bool
) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise CorpusError(
            f"{where} is a conversation, but the tokenizer of the model has no chat template. Take "
            "the model's instruct version, add chat_template.jinja to its folder, or write rows "
            "with instruction and output."
        )
    try:
        return list(
            tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=asks,
                return_dict=False,
                tokenizer_kwargs={"verbose": False},
                date_string=_DATE,
            )
        )
    except (TemplateError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CorpusError(
            f"{where} is rejected by the chat template of the tokenizer: {reason}. Correct "
            "or remove the row."
        ) from error
