"""The forward and backward passes of one optimizer step of several candidates.

A pass has the same number of sequences of each candidate, one candidate after the other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rankadaptor_plugin.corpus.sequences import TeacherTokens
from rankadaptor_plugin.recovery.batches import Pass, passes, trained_tokens
from rankadaptor_plugin.recovery.losses import forward_logits, token_loss
from rankadaptor_plugin.recovery.training import mixed_precision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from rankadaptor_plugin.config.tables import RecoveryConfig
    from rankadaptor_plugin.corpus.sequences import TrainingSequence
    from rankadaptor_plugin.recovery.stacked_adapters import StackedWeights
    from rankadaptor_plugin.recovery.teacher import LiveTeacher

    Numbered = tuple[int, TrainingSequence]  # with its place in the optimizer step


def arranged(batch: list[TrainingSequence], layout: str) -> list[Numbered]:
    """Numbers a candidate's sequences and orders them; those at one place share a pass."""
    rows = list(enumerate(batch))
    return rows if layout == "padded" else sorted(rows, key=lambda row: -len(row[1].tokens))


def gradients(
    model: PreTrainedModel,
    weights: StackedWeights,
    drawn: Sequence[Sequence[Numbered]],
    step: int,
    config: RecoveryConfig,
    size: int,
    teacher: LiveTeacher | None,
) -> list[float]:
    """Adds the gradients of one step to those that are there, one pass after the other.

    Args:
        model: The bare model with the candidates' adapters.
        weights: Those.
        drawn: The sequences of each candidate, as many of each; see `arranged`.
        step: The optimizer step, counted from 0.
        config: The ``[recovery]`` table.
        size: Most sequences of a candidate per pass.
        teacher: The unpruned model, where it predicts on the way.

    Returns:
        The loss of each candidate, in nats per trained token.
    """
    counts = [trained_tokens([sequence for _, sequence in batch]) for batch in drawn]
    totals = torch.zeros(len(drawn), device=model.device)
    for start in range(0, len(drawn[0]), size):
        parts = [batch[start : start + size] for batch in drawn]
        numbers, rows = zip(*(row for part in parts for row in part), strict=True)
        given = passes(rows, "padded", len(rows), numbers)[0].to(model.device)
        weights.tell(given, step)
        with mixed_precision(model):
            logits = forward_logits(model, given)
        taught = teacher(given) if teacher is not None else None
        own = [trained_tokens([sequence for _, sequence in part]) for part in parts]
        losses = _losses(logits, given, own, config, taught)
        # Divided by the tokens of the whole step, so that the parts add up to their mean.
        losses = losses / torch.tensor(counts, device=model.device)
        weights.add_gradients(losses.sum())
        totals += losses.detach()
    found: list[float] = totals.tolist()
    return found


def _losses(
    logits: torch.Tensor,
    given: Pass,
    counts: list[int],
    config: RecoveryConfig,
    taught: torch.Tensor | None,
) -> torch.Tensor:
    """Returns the loss of each candidate, added up over its trained tokens; shape (k,)."""
    found, start = [], 0
    for count in counts:
        own = slice(start, start + count)
        start += count
        part = replace(
            given,
            positions=given.positions[own],
            targets=given.targets[own],
            teacher=given.teacher and _part(given.teacher, own),
        )
        found.append(
            token_loss(
                logits[own],
                part,
                weight=config.distill_weight,
                temperature=config.distill_temperature,
                teacher_logits=None if taught is None else taught[own],
            )
        )
    return torch.stack(found)


def _part(teacher: TeacherTokens, own: slice) -> TeacherTokens:
    return TeacherTokens(teacher.indices[own], teacher.log_probabilities[own], teacher.rest[own])
