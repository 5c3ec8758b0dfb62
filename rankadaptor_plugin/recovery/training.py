"""The training loop: optimizer steps on the resident model, and what may go wrong in one.

Running out of memory halves the sequences per pass, with the same effective batch. A loss that is
not a number, or that stays far above that of guessing, ends the fine-tune with the step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rankadaptor_plugin.core.errors import RecoveryError
from rankadaptor_plugin.core.progress import advance
from rankadaptor_plugin.models.logits import replaced_forward
from rankadaptor_plugin.models.structures import decoder_layers
from rankadaptor_plugin.recovery.adapters import evaluated
from rankadaptor_plugin.recovery.batches import (
    pass_loss,
    passes,
    trained_tokens,
)
from rankadaptor_plugin.recovery.fused_lora import fused
from rankadaptor_plugin.recovery.memory import MicroBatch, mixed_precision, within_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from rankadaptor_plugin.config.tables import RecoveryConfig
    from rankadaptor_plugin.corpus.sequences import Corpus, TrainingSequence
    from rankadaptor_plugin.recovery.methods.methods import Tuned
    from rankadaptor_plugin.recovery.teacher import LiveTeacher

logger = logging.getLogger(__name__)

_KINDS = 256  # of layers that are compiled at most
_HOPELESS = 5  # steps in a row
_SKIPPED = 40  # steps in a row; float16 begins with a loss scale of 2 ** 16
_FAR = 2.0  # times the loss of guessing, or of the first step where that is higher


class Watch:
    """Watch over a fine-tune that cannot be saved any more.

    Args:
        vocabulary: Number of tokens, which guessing chooses from.
        steps: Steps of the fine-tune.
        config: The ``[recovery]`` table, for the advice.
    """

    def __init__(self, vocabulary: int, steps: int, config: RecoveryConfig) -> None:
        self._guessing, self._steps, self._config = math.log(vocabulary), steps, config
        self._first: float | None = None
        self._above = self._skipped = 0

    def check(self, step: int, loss: float, norm: float = 0.0) -> None:
        """Looks at one step, counted from 0.

        Raises:
            RecoveryError: If loss or gradient is not a finite number, or the loss stays far above
                that of guessing.
        """
        advice = (
            f"Lower [recovery] learning_rate (now {self._config.learning_rate:g}) or raise "
            "warmup_steps."
        )
        where = f"at step {step + 1} of {self._steps}"
        for what, value in (("training loss", loss), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                raise RecoveryError(f"The {what} is {value} {where}. {advice}")
        self._first = loss if self._first is None else self._first
        limit = _FAR * max(self._first, self._guessing)
        self._above = self._above + 1 if loss > limit else 0
        if self._above >= _HOPELESS:
            raise RecoveryError(
                f"The fine-tune diverges: the training loss is {loss:.4g} {where}, for "
                f"{_HOPELESS} steps above {limit:.4g}. {advice}"
            )

    def check_skipped(self, step: int, skipped: bool) -> None:
        """Looks at a step that may have been skipped, its gradients not being finite in float16.

        Raises:
            RecoveryError: If that happens again and again, whatever the loss scale.
        """
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped >= _SKIPPED:
            raise RecoveryError(
                f"The gradients are not finite at step {step + 1} of {self._steps}, nor at the "
                f'{_SKIPPED - 1} steps before. Set dtype = "bfloat16" or "float32".'
            )


def train(
    tuned: Tuned,
    batches: Iterator[list[TrainingSequence]],
    config: RecoveryConfig,
    steps: int,
    *,
    micro: MicroBatch,
    teacher: LiveTeacher | None = None,
    on_step: Callable[[int], object] = lambda done: None,
) -> list[float]:
    """Runs the steps of a fine-tune.

    Args:
        tuned: The method at work on a model.
        batches: The sequences of each step.
        config: The ``[recovery]`` table; its ``max_steps`` are those of the whole schedule.
        steps: Steps to run.
        micro: How much goes through at once; halved where memory runs out.
        teacher: The unpruned model, where it predicts on the way.
        on_step: Called with the number of steps done after each.

    Returns:
        The loss of each step, in nats per trained token.

    Raises:
        RecoveryError: If the fine-tune diverges, or memory runs out with one sequence.
    """
    model: PreTrainedModel = tuned.model.get_base_model()
    optimizer = tuned.optimizer(config.learning_rate, config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, config)
    )
    parameters = tuned.parameters()
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)
    watch = Watch(model.config.get_text_config().vocab_size, steps, config)
    losses: list[float] = []
    advance("steps", 0, steps)
    tuned.model.train()
    on_gpu = model.device.type == "cuda"
    with (
        checkpointed(model, config.gradient_checkpointing),
        fused(model),
        compiled(model, config.compile and on_gpu),
    ):
        for step in range(steps):
            began, batch = time.perf_counter(), next(batches)
            loss = _accumulated(tuned, batch, config, micro, scaler, teacher)
            scaler.unscale_(optimizer)
            limit = config.max_grad_norm or math.inf
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
            watch.check(step, loss, 0.0 if scaler.is_enabled() else norm)  # which skips such steps
            scaler.step(optimizer)
            scale = scaler.get_scale()
            scaler.update()
            skipped = scaler.get_scale() < scale
            watch.check_skipped(step, skipped)
            if skipped:  # the method must not weigh gradients that are not finite either
                for parameter in parameters:
                    parameter.grad = None if parameter.grad is None else parameter.grad.zero_()
            else:
                schedule.step()
            tuned.after_step(step)
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            pace = sum(len(s.tokens) for s in batch) / (time.perf_counter() - began)
            advance("steps", step + 1, steps, loss=loss, tokens_per_second=pace)
            on_step(step + 1)
    return losses


def _accumulated(
    tuned: Tuned,
    batch: Sequence[TrainingSequence],
    config: RecoveryConfig,
    micro: MicroBatch,
    scaler: torch.amp.GradScaler,
    teacher: LiveTeacher | None,
) -> float:
    """Adds up the gradients of one optimizer step, in as many passes as memory asks for."""

    def undo() -> None:
        for parameter in tuned.parameters():
            parameter.grad = None

    def add_up() -> float:
        return _gradients(tuned, batch, config, micro, scaler, teacher)

    return within_memory(add_up, undo, tuned.model.device, micro)


def _gradients(
    tuned: Tuned,
    batch: Sequence[TrainingSequence],
    config: RecoveryConfig,
    micro: MicroBatch,
    scaler: torch.amp.GradScaler,
    teacher: LiveTeacher | None,
) -> float:
    model = tuned.model.get_base_model()
    count = trained_tokens(batch)
    total = torch.zeros((), device=model.device)
    for part in passes(batch, micro.size, model.device):
        given = part.to(model.device)
        with mixed_precision(model):
            loss = pass_loss(
                model,
                given,
                weight=config.distill_weight,
                temperature=config.distill_temperature,
                teacher=teacher,
            )
        # Divided by the tokens of the whole step, so that the parts add up to their mean.
        loss = loss / count
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    if (extra := tuned.extra_loss()) is not None:
        scaler.scale(extra).backward()  # type: ignore[no-untyped-call]
    return float(total)


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel, sequences: Sequence[TrainingSequence], micro: MicroBatch
) -> float:
    """Returns the loss on sequences that are not trained on, in nats per trained token.

    Where memory runs out, `micro` is halved.

    Raises:
        RecoveryError: If memory runs out with one sequence.
    """

    def add_up() -> float:
        total = 0.0
        for part in passes(sequences, micro.size, model.device):
            given = part.to(model.device)
            with mixed_precision(model):
                total += float(pass_loss(model, given))
        return total / trained_tokens(sequences)

    with evaluated(model):
        return within_memory(add_up, lambda: None, model.device, micro)


class HeldOut:
    """Looks at the held-out loss, and keeps the weights that it was lowest with.

    Args:
        corpus: The corpus; without held-out rows nothing is looked at.
        config: The ``[recovery]`` table.
        steps: Steps of the fine-tune.
        micro: How much goes through the model at once.

    Attributes:
        loss: The lowest loss with ``load_best_model_at_end``, else the last, in nats per trained
            token; None before the first look.
    """

    def __init__(
        self, corpus: Corpus, config: RecoveryConfig, steps: int, micro: MicroBatch
    ) -> None:
        self._sequences, self._config, self._steps = corpus.validation, config, steps
        self._micro = micro
        self._weights: list[torch.Tensor] = []
        self.loss: float | None = None

    def after(self, tuned: Tuned, done: int) -> None:
        """Looks if it is time to; `done` steps are."""
        every = self._config.eval_steps
        is_last = done == self._steps
        if not self._sequences or not (is_last or (every and done % every == 0)):
            return
        if self._config.load_best_model_at_end and not (is_last or tuned.is_settled):
            return  # of weights from before the last ranks were dropped nobody knows which count
        loss = mean_loss(tuned.model.get_base_model(), self._sequences, self._micro)
        if self.loss is None or loss < self.loss or not self._config.load_best_model_at_end:
            self.loss = loss
            if self._config.load_best_model_at_end:
                self._weights = [p.detach().clone() for p in tuned.parameters()]

    @torch.no_grad()
    def restore(self, tuned: Tuned) -> None:
        """Puts the best weights back."""
        for parameter, weight in zip(tuned.parameters(), self._weights, strict=False):
            parameter.copy_(weight)


@contextlib.contextmanager
def compiled(model: PreTrainedModel, wanted: bool, backend: Any = "inductor") -> Iterator[None]:
    """Compiles the decoder layers while the block lasts, each kind of them once.

    Layers are of a kind if their matrices and ranks are of the same shapes. Left as they are: those
    that accelerate moves between devices.

    Args:
        model: The model.
        wanted: Whether to.
        backend: That of ``torch.compile``.
    """
    if not wanted:
        yield
        return
    # One function for all layers, so that they share what is compiled of it.
    compile_: Any = torch.compile  # whose types lack the limit
    run = compile_(_layer_forward, backend=backend, dynamic=True, recompile_limit=_KINDS)
    with contextlib.ExitStack() as stack:
        for layer in decoder_layers(model):
            if "forward" not in vars(layer):
                stack.enter_context(replaced_forward(layer, partial(run, layer)))
        yield


def _layer_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


@contextlib.contextmanager
def checkpointed(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Computes activations twice instead of keeping them, while the block lasts."""
    if not wanted or model.is_activation_checkpointing:
        yield
        return
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def learning_rate_factor(step: int, config: RecoveryConfig) -> float:
    """Returns the share of the peak learning rate at a step, counted from 0."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.lr_scheduler_type == "constant":
        return 1.0
    return max(0.0, (config.max_steps - step) / max(1, config.max_steps - config.warmup_steps))
