"""The batches of a fine-tune, and how each is laid out in forward passes.

Which sequences an optimizer step sees depends on the corpus and the seed alone. A layout only says
how they lie in memory, so it changes a result no further than rounding: `padded` takes them in
their order, `sorted` by length, which leaves less padding, and `packed` puts them end to end in
one row, where attention keeps to its sequence and no token is wasted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rankadaptor_plugin.core.errors import CorpusError
from rankadaptor_plugin.corpus.sequences import IGNORED, TeacherTokens, TrainingSequence

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LAYOUTS = ("padded", "sorted", "packed")

_LONGEST = 2**24  # tokens of a sequence, beyond any context


@dataclass(frozen=True, eq=False)
class Pass:
    """The sequences of one forward pass.

    Attributes:
        inputs: Arguments of the model: ``input_ids`` and, where sequences are packed,
            ``position_ids``; each of shape (b, t), int64. All padding is on the right.
        positions: Index into the (b * t) predictions of each that is trained, shape (n,), int64.
        targets: The tokens that they should have predicted, shape (n,), int64.
        places: Of each of the (b * t) tokens, a number that tells its sequence in the optimizer
            step and its position there, whatever the layout; -1 for padding. int64.
        teacher: What the unpruned model predicts there; None without distillation.
    """

    inputs: dict[str, torch.Tensor]
    positions: torch.Tensor
    targets: torch.Tensor
    places: torch.Tensor
    teacher: TeacherTokens | None = None

    @property
    def is_packed(self) -> bool:
        """Whether all sequences lie in one row."""
        return "position_ids" in self.inputs

    def to(self, device: torch.device) -> Pass:
        """Returns the same on a device."""
        return Pass(
            {name: tensor.to(device) for name, tensor in self.inputs.items()},
            self.positions.to(device),
            self.targets.to(device),
            self.places.to(device),
            self.teacher and self.teacher.to(device),
        )


def batches(
    sequences: Sequence[TrainingSequence], size: int, seed: int
) -> Iterator[list[TrainingSequence]]:
    """Yields batches without end: a new random order for every pass over the corpus."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(len(sequences), generator=generator).tolist()
        yield [sequences[i] for i in waiting[:size]]
        waiting = waiting[size:]


def check_sequences(
    sequences: Sequence[TrainingSequence],
    window: int | None = None,
    vocabulary: int | None = None,
) -> None:
    """Checks that there is something to train on everywhere.

    Args:
        sequences: The sequences.
        window: Context of the model, in tokens; None for no limit.
        vocabulary: Number of tokens that the model knows; None for no limit.

    Raises:
        CorpusError: If there is no sequence, one without a token to train on, one that is longer
            than the context, or one with a token beyond the vocabulary.
    """
    if not sequences:
        raise CorpusError("The corpus holds no training sequence. Give at least one row.")
    for number, sequence in enumerate(sequences, start=1):
        if not trained_tokens([sequence]):
            raise CorpusError(
                f"Training sequence {number} of {len(sequences)} has no token to train on: all of "
                "its labels are masked. Leave it out, or unmask its response."
            )
        if window and len(sequence.tokens) > window:
            raise CorpusError(
                f"Training sequence {number} of {len(sequences)} has {len(sequence.tokens)} "
                f"tokens, but the context of the model is {window}. Lower [corpus] max_length."
            )
        if vocabulary and (largest := int(sequence.tokens.max())) >= vocabulary:
            raise CorpusError(
                f"Training sequence {number} of {len(sequences)} has token {largest}, but the "
                f"model knows tokens below {vocabulary}. Give the tokenizer of the model."
            )


def trained_tokens(batch: Sequence[TrainingSequence]) -> int:
    """Returns the number of tokens that loss is taken of; the first of a sequence never is."""
    return sum(int((sequence.labels[1:] != IGNORED).sum()) for sequence in batch)


def passes(
    batch: Sequence[TrainingSequence],
    layout: str,
    micro_batch_size: int,
    numbers: Sequence[int] | None = None,
) -> list[Pass]:
    """Lays out the sequences of an optimizer step.

    Args:
        batch: The sequences.
        layout: One of `LAYOUTS`.
        micro_batch_size: Most sequences per pass; packed ones as many as take no more tokens than
            so many of the longest would.
        numbers: Place of each sequence in the optimizer step; None counts from 0.
    """
    rows = list(zip(numbers or range(len(batch)), batch, strict=True))
    if layout == "packed":
        return [_packed(part) for part in _filled(rows, micro_batch_size)]
    if layout == "sorted":
        rows.sort(key=lambda row: -len(row[1].tokens))
    return [
        _padded(rows[start : start + micro_batch_size])
        for start in range(0, len(rows), micro_batch_size)
    ]


_Row = tuple[int, TrainingSequence]  # with its place in the optimizer step


def _filled(rows: Sequence[_Row], micro_batch_size: int) -> Iterator[list[_Row]]:
    room = micro_batch_size * max(len(sequence.tokens) for _, sequence in rows)
    part: list[_Row] = []
    used = 0
    for number, sequence in rows:
        if used + len(sequence.tokens) > room:
            yield part
            part, used = [], 0
        part.append((number, sequence))
        used += len(sequence.tokens)
    yield part


def _padded(rows: Sequence[_Row]) -> Pass:
    """Pads on the right to the longest; causal attention never looks at what comes after.

    So no mask is needed, without which attention has its fastest kernels.
    """
    longest = max(len(sequence.tokens) for _, sequence in rows)
    input_ids = torch.empty(len(rows), longest, dtype=torch.int64)
    places = torch.full_like(input_ids, -1)
    for row, (number, sequence) in enumerate(rows):
        length = len(sequence.tokens)
        input_ids[row, :length] = sequence.tokens
        # A token of its own: some models warn of their padding token without a mask.
        input_ids[row, length:] = sequence.tokens[-1]
        places[row, :length] = _places(number, length)
    starts = [row * longest for row in range(len(rows))]
    inputs = {"input_ids": input_ids}
    return _trained([sequence for _, sequence in rows], starts, inputs, places.flatten())


def _packed(rows: Sequence[_Row]) -> Pass:
    lengths = [len(sequence.tokens) for _, sequence in rows]
    starts = [sum(lengths[:i]) for i in range(len(rows))]
    # Where positions begin anew, transformers takes it for another sequence and masks attention.
    inputs = {
        "input_ids": torch.cat([sequence.tokens for _, sequence in rows])[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    places = torch.cat([_places(number, len(sequence.tokens)) for number, sequence in rows])
    return _trained([sequence for _, sequence in rows], starts, inputs, places)


def _places(number: int, length: int) -> torch.Tensor:
    return torch.arange(length) + number * _LONGEST


def _trained(
    batch: Sequence[TrainingSequence],
    starts: Sequence[int],
    inputs: dict[str, torch.Tensor],
    places: torch.Tensor,
) -> Pass:
    positions, targets = [], []
    for start, sequence in zip(starts, batch, strict=True):
        labels = sequence.labels[1:]
        trained = (labels != IGNORED).nonzero()[:, 0]
        positions.append(trained + start)
        targets.append(labels[trained])
    taught = [sequence.teacher for sequence in batch if sequence.teacher is not None]
    return Pass(
        inputs,
        torch.cat(positions),
        torch.cat(targets),
        places,
        TeacherTokens.joined(taught) if taught else None,
    )
