"""Tokenized training sequences: what a recovery corpus is once it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from rankadaptor_plugin.corpus.teacher_tokens import TeacherTokens

IGNORED = -100
"""Label of a token without loss, as torch's cross-entropy takes it."""


@dataclass(frozen=True)
class TrainingSequence:
    """One training sequence.

    Attributes:
        tokens: Token ids, shape (t,), int64.
        labels: The same ids, `IGNORED` where no loss is taken, shape (t,), int64.
        teacher: What the unpruned model predicts for the trained tokens; None without distillation.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    teacher: TeacherTokens | None = None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokenized training sequences.

    Attributes:
        sequences: At least one.
        dropped: Rows without a single trainable token within the length limit.
        validation: Sequences that are held out from training.
        rows: Rows that were read, dropped and held-out ones included.
    """

    sequences: Sequence[TrainingSequence]
    dropped: int
    validation: Sequence[TrainingSequence] = ()
    rows: int = 0
