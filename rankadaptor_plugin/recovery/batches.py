"""The batches of a fine-tune, and the forward passes that each is cut into.

Which sequences an optimizer step sees depends on the corpus and the seed alone. Within a step they
are sorted by length, which leaves little padding and changes a result no further than rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rankadaptor_plugin.core.errors import CorpusError
from rankadaptor_plugin.corpus.sequences import IGNORED, TeacherTokens, TrainingSequence

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True, eq=False)
class Pass:
    """The sequences of one forward pass.

    Attributes:
        input_ids: Shape (b, t), int64. All padding is on the right.
        positions: Index into the (b * t) predictions of each that is trained, shape (n,), int64.
        targets: The tokens that they should have predicted, shape (n,), int64.
        lengths: Tokens of each sequence, shape (b,), int64.
        teacher: Predictions of the unpruned model there; None without distillation.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    teacher: TeacherTokens | None = None

    def to(self, device: torch.device) -> Pass:
        """Returns the same on a device."""
        return Pass(
            self.input_ids.to(device),
            self.positions.to(device),
            self.targets.to(device),
            self.lengths.to(device),
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


def passes(batch: Sequence[TrainingSequence], size: int) -> list[Pass]:
    """Cuts the sequences of an optimizer step, longest first, into passes of at most `size`."""
    ordered = sorted(batch, key=lambda sequence: -len(sequence.tokens))
    return [padded(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def padded(batch: Sequence[TrainingSequence]) -> Pass:
    """Pads on the right to the longest; causal attention never looks at what comes after.

    So no mask is needed, without which attention has its fastest kernels.
    """
    longest = max(len(sequence.tokens) for sequence in batch)
    input_ids = torch.empty(len(batch), longest, dtype=torch.int64)
    positions, targets = [], []
    for row, sequence in enumerate(batch):
        length = len(sequence.tokens)
        input_ids[row, :length] = sequence.tokens
        # A token of its own: some models warn of their padding token without a mask.
        input_ids[row, length:] = sequence.tokens[-1]
        labels = sequence.labels[1:]
        trained = (labels != IGNORED).nonzero()[:, 0]
        positions.append(trained + row * longest)
        targets.append(labels[trained])
    taught = [sequence.teacher for sequence in batch if sequence.teacher is not None]
    return Pass(
        input_ids,
        torch.cat(positions),
        torch.cat(targets),
        torch.tensor([len(sequence.tokens) for sequence in batch]),
        TeacherTokens.joined(taught) if taught else None,
    )
