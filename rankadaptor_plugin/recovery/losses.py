"""The loss of a fine-tune: next tokens, mixed with what the unpruned model predicts.

Distillation after Hinton et al., arXiv 1503.02531: the Kullback-Leibler divergence between teacher
and student at a temperature T, times T^2, so that its gradient stays of the size of the other's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from rankadaptor_plugin.models.logits import logits_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rankadaptor_plugin.corpus.sequences import TeacherTokens
    from rankadaptor_plugin.recovery.batches import Pass

LEAST = math.log(torch.finfo(torch.float32).tiny)
"""In place of the logarithm of 0: an infinite one would make a loss that is not a number."""


def forward_logits(model: PreTrainedModel, given: Pass) -> torch.Tensor:
    """Returns the predictions that are trained; no others are computed.

    Args:
        model: The bare model; adapter layers inside it count.
        given: The sequences, on the model's device.

    Returns:
        Shape (n, v), in the model's type.
    """
    logits, _ = logits_at(
        model, model.get_output_embeddings(), given.positions, given.input_ids, use_cache=False
    )
    return logits


def token_loss(
    logits: torch.Tensor,
    given: Pass,
    *,
    weight: float = 0.0,
    temperature: float = 1.0,
    teacher_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the loss, added up over the trained tokens, in nats.

    Args:
        logits: Predictions of the model, shape (n, v).
        given: What they should be.
        weight: Share of the distillation in the loss, in [0, 1].
        temperature: Its temperature.
        teacher_logits: All predictions of a teacher at hand, shape (n, v); None takes those of the
            pass.
    """
    logits = logits.float()
    loss = torch.zeros((), device=logits.device)
    if weight < 1:
        loss = functional.cross_entropy(logits, given.targets, reduction="sum")
    if not weight:
        return loss
    logits = logits / temperature
    if teacher_logits is not None:
        divergence = functional.kl_div(
            torch.log_softmax(logits, dim=-1),
            torch.log_softmax(teacher_logits.float() / temperature, dim=-1),
            reduction="sum",
            log_target=True,
        )
    elif given.teacher is not None:
        divergence = _kept_divergence(logits, given.teacher)
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
    return functional.kl_div(
        torch.cat([kept, rest], dim=1),
        torch.cat([teacher.log_probabilities.float(), teacher.rest[:, None]], dim=1),
        reduction="sum",
        log_target=True,
    )
