"""One fine-tune: from a pruned model and a rank allocation to a recovered model.

A plain loop on the resident model. Order of the sequences, initial weights and dropout come from
the seed alone, so all allocations of a search see the same batches in the same order, and the
global random state is left as it was found.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rankadaptor_plugin import adapters
from rankadaptor_plugin.corpus import IGNORED, Corpus, TrainingSequence
from rankadaptor_plugin.errors import RecoveryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from peft import PeftModel
    from transformers import PreTrainedModel

    from rankadaptor_plugin.config import RecoveryConfig
    from rankadaptor_plugin.ranks import RankAllocation


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A look at a fine-tune on its way.

    Attributes:
        fidelity: Share of the steps after which it is looked at, in (0, 1).
        goes_on: Told the model, in evaluation mode; False ends the fine-tune there. Whatever it
            draws from torch's random numbers, the rest of the fine-tune is as without it.
    """

    fidelity: float
    goes_on: Callable[[PeftModel], bool]


@dataclass(kw_only=True)
class RecoveredModel:
    """A fine-tuned model; its weights live in the resident base and the adapter on it.

    Attributes:
        model: In evaluation mode.
        train_loss: Mean loss over the last tenth of the steps, in nats per trained token.
        seconds: Wall time, that of a rung left out.
        fidelity: Share of the steps that were run; that of the rung where it ended there.
    """

    model: PeftModel
    train_loss: float
    seconds: float
    fidelity: float = 1.0


def recover(
    base: PreTrainedModel | PeftModel,
    allocation: RankAllocation,
    corpus: Corpus,
    config: RecoveryConfig,
    *,
    seed: int,
    fidelity: float = 1.0,
    rung: Rung | None = None,
) -> RecoveredModel:
    """Fine-tunes a fresh adapter with the given ranks.

    Args:
        base: The pruned model, or the `RecoveredModel.model` of an earlier call on it.
        allocation: One rank per decoder layer.
        corpus: Training sequences.
        config: The ``[recovery]`` table.
        seed: Seed of initial weights, batches and dropout.
        fidelity: Share of the steps to run, in (0, 1]; the schedule is that of the full run.
        rung: Where to look at the model on the way. Going on from there costs no step twice.

    Raises:
        RecoveryError: If the loss is not a finite number.
    """
    began, paused = time.perf_counter(), 0.0
    steps = steps_of(config, fidelity)
    look = steps_of(config, rung.fidelity) if rung else steps
    batches = _batches(corpus, config.batch_size, seed)
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)  # PEFT's own first weights and dropout draw from it
        model = adapters.attach(
            base,
            allocation,
            seed=seed,
            alpha_over_rank=config.alpha_over_rank,
            dropout=config.dropout,
        )
        torch.manual_seed(seed)  # as many numbers as PEFT drew depend on the ranks
        try:
            losses = []
            for loss in _train(model, batches, config, steps):
                losses.append(loss)
                if rung and len(losses) == look < steps:
                    looked = time.perf_counter()
                    model.eval()
                    with torch.random.fork_rng(devices=devices):
                        goes_on = rung.goes_on(model)
                    paused = time.perf_counter() - looked
                    if not goes_on:
                        fidelity = rung.fidelity
                        break
                    model.train()
        except BaseException:
            if model is not base:
                model.unload()  # the caller holds the bare base alone, and gets it back as it was
            raise
    model.eval()
    last = losses[-max(1, len(losses) // 10) :]
    return RecoveredModel(
        model=model,
        train_loss=sum(last) / len(last),
        seconds=time.perf_counter() - began - paused,
        fidelity=fidelity,
    )


def steps_of(config: RecoveryConfig, fidelity: float) -> int:
    """Returns the optimizer steps of a share of a fine-tune, at least one."""
    return max(1, round(config.steps * fidelity))


def _train(
    model: PeftModel,
    batches: Iterator[list[TrainingSequence]],
    config: RecoveryConfig,
    steps: int,
) -> Iterator[float]:
    """Runs the steps; yields the loss of each, in nats per trained token."""
    parameters = adapters.trainable_parameters(model)
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, config)
    )
    model.train()
    for step in range(steps):
        batch = next(batches)
        trained = sum(int((s.labels[1:] != IGNORED).sum()) for s in batch)
        loss = 0.0
        for start in range(0, len(batch), config.micro_batch_size):
            part = collate(batch[start : start + config.micro_batch_size])
            part = {name: tensor.to(model.device) for name, tensor in part.items()}
            # `num_items_in_batch` makes the parts' losses add up to the mean over the whole batch.
            output = model(**part, use_cache=False, num_items_in_batch=trained)
            output.loss.backward()
            loss += output.loss.item()
        if not math.isfinite(loss):
            raise RecoveryError(
                f"The training loss is {loss} at step {step + 1} of {steps}. Lower [recovery] "
                f"learning_rate (now {config.learning_rate:g}) or raise warmup_steps."
            )
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss


def learning_rate_factor(step: int, config: RecoveryConfig) -> float:
    """Returns the share of the peak learning rate at a step, counted from 0."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    return max(0.0, (config.steps - step) / max(1, config.steps - config.warmup_steps))


def collate(batch: list[TrainingSequence]) -> dict[str, torch.Tensor]:
    """Pads sequences on the right to the longest.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each of shape (b, t), int64.
    """
    longest = max(len(s.tokens) for s in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, sequence in enumerate(batch):
        length = len(sequence.tokens)
        input_ids[row, :length] = sequence.tokens
        attention_mask[row, :length] = 1
        labels[row, :length] = sequence.labels
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _batches(corpus: Corpus, size: int, seed: int) -> Iterator[list[TrainingSequence]]:
    """Yields batches without end: a new random order for every pass over the corpus."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(len(corpus.sequences), generator=generator).tolist()
        yield [corpus.sequences[i] for i in waiting[:size]]
        waiting = waiting[size:]
