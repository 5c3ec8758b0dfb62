"""The batches of a fine-tune, the forward passes that each is cut into, and the loss of a pass.

Which sequences an optimizer step sees depends on the corpus and the seed alone. Within a step they
are sorted by length, which leaves little padding and changes a result no further than rounding.

The loss is that of the next tokens, mixed with that of the unpruned model's predictions. This
distillation is Hinton et al.'s, arXiv 1503.02531: the Kullback-Leibler divergence between teacher
and student at a temperature T, times T^2, so that its gradient stays of the size of the other's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from rankadaptor_plugin.core.errors import CorpusError
from rankadaptor_plugin.corpus.sequences import IGNORED, TeacherTokens, TrainingSequence, moved
from rankadaptor_plugin.models.logits import hidden_at, summed_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

LEAST = math.log(torch.finfo(torch.float32).tiny)
"""In place of the logarithm of 0: an infinite one would make a loss that is not a number."""


_CPU = torch.device("cpu")
_ENOUGH = 512  # tokens of a pass with which a CPU is busy, whatever the model
_ALIKE = 7 / 8  # of the longest row: shorter ones are not worth their padding


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
            moved(self.input_ids, device),
            moved(self.positions, device),
            moved(self.targets, device),
            moved(self.lengths, device),
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
        raise CorpusError("The corpus has no training sequences. Give at least one row.")
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


def passes(batch: Sequence[TrainingSequence], size: int, device: torch.device = _CPU) -> list[Pass]:
    """Cuts the sequences of an optimizer step, longest first, into passes.

    A CPU needs no more than a few rows to be busy. So there a pass that has work enough ends before
    a much shorter row, which would mostly be padding: a quarter of all tokens of 16 Alpaca rows.
    That saves time in float32, and memory in bfloat16 as well.

    Args:
        batch: The sequences.
        size: Most sequences per pass.
        device: Where the passes will run.
    """
    parts: list[list[TrainingSequence]] = []
    longest = 0
    for sequence in sorted(batch, key=lambda sequence: -len(sequence.tokens)):
        length = len(sequence.tokens)
        rows = len(parts[-1]) if parts else size
        has_enough = device.type == "cpu" and rows * longest >= _ENOUGH
        if rows == size or (has_enough and length < _ALIKE * longest):
            parts.append([])
            longest = length
        parts[-1].append(sequence)
    return [padded(part) for part in parts]


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


def pass_loss(
    model: PreTrainedModel,
    given: Pass,
    *,
    weight: float = 0.0,
    temperature: float = 1.0,
    teacher: Callable[[Pass], Callable[[slice], torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Returns the loss of a pass, added up over the trained tokens, in nats.

    Predictions of other tokens are not computed, and of these few are in memory at a time.

    Args:
        model: The bare model; adapter layers inside it count. Its output layer is frozen.
        given: The sequences, on the model's device.
        weight: Share of the distillation in the loss, in [0, 1].
        temperature: Its temperature.
        teacher: The teacher at hand (`recovery.teacher.LiveTeacher`); None takes the predictions of
            the pass.
    """
    predicted = teacher(given) if teacher is not None else None

    def loss(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        return token_loss(
            logits,
            given.targets[rows],
            given.teacher and given.teacher[rows],
            weight=weight,
            temperature=temperature,
            teacher_logits=predicted(rows) if predicted is not None else None,
        )

    return summed_loss(model, hidden_at(model, given.positions, given.input_ids), loss)


def token_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    teacher: TeacherTokens | None = None,
    *,
    weight: float = 0.0,
    temperature: float = 1.0,
    teacher_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the loss, added up over tokens, in nats; computed in float32 at least.

    Args:
        logits: Predictions of the model, shape (n, v).
        targets: The tokens that they should have predicted, shape (n,), int64.
        teacher: Kept predictions of a teacher.
        weight: Share of the distillation in the loss, in [0, 1].
        temperature: Its temperature.
        teacher_logits: All predictions of a teacher at hand, shape (n, v); None takes `teacher`.

    Raises:
        ValueError: If there is distillation without predictions.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = torch.zeros((), device=logits.device)
    if weight < 1:
        loss = functional.cross_entropy(logits, targets, reduction="sum")
    if not weight:
        return loss
    logits = logits / temperature
    if teacher_logits is not None:
        divergence = functional.kl_div(
            torch.log_softmax(logits, dim=-1),
            torch.log_softmax(teacher_logits.to(logits.dtype) / temperature, dim=-1),
            reduction="sum",
            log_target=True,
        )
    elif teacher is not None:
        divergence = _kept_divergence(logits, teacher)
    else:
        raise ValueError("distillation needs the teacher's predictions")
    return (1 - weight) * loss + weight * temperature**2 * divergence


def _kept_divergence(logits: torch.Tensor, teacher: TeacherTokens) -> torch.Tensor:
    """Returns the divergence over the kept tokens and all others taken as one.

    It is at most that over all tokens, and the same where all of them are kept.
    """
    indices = teacher.indices.long()
    total = logits.logsumexp(dim=1, keepdim=True)
    kept = logits.gather(1, indices) - total
    # Of a sure student, 1 minus the probabilities of the kept tokens would be rounding alone.
    others = logits.scatter(1, indices, torch.finfo(logits.dtype).min).logsumexp(1, keepdim=True)
    rest = (others - total).clamp(min=LEAST)
    # Converted first: below autocast, halves of another kind cannot be joined.
    theirs = [values.to(logits.dtype) for values in (teacher.log_probabilities, teacher.rest)]
    return functional.kl_div(
        torch.cat([kept, rest], dim=1),
        torch.cat([theirs[0], theirs[1][:, None]], dim=1),
        reduction="sum",
        log_target=True,
    )
