"""The training loop of `rankadaptor_plugin.recovery.training`, run by `transformers.Trainer`.

For those who want its callbacks, reporting integrations or launchers. One item of the data is one
optimizer step: the number of passes in it may change from step to step, which Trainer's own
gradient accumulation does not allow. Losses and weights are those of the own loop up to rounding.
"""

from __future__ import annotations

import contextlib
import tempfile
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from rankadaptor_plugin.models.device import is_out_of_memory
from rankadaptor_plugin.recovery.batches import trained_tokens
from rankadaptor_plugin.recovery.dropout import tell
from rankadaptor_plugin.recovery.losses import forward_logits, token_loss
from rankadaptor_plugin.recovery.trainer.arguments import is_sharding, refusals, training_arguments
from rankadaptor_plugin.recovery.trainer.sharding import (
    gradient_norm,
    own_passes,
    place,
    shard_over_cpus,
    sharded,
)
from rankadaptor_plugin.recovery.trainer.trainer_traces import (
    as_it_was,
    random_state_kept,
    set_torch_states,
    torch_states,
)
from rankadaptor_plugin.recovery.training import (
    Watch,
    checkpointed,
    learning_rate_factor,
    mixed_precision,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rankadaptor_plugin.config.tables import RecoveryConfig
    from rankadaptor_plugin.corpus.sequences import TrainingSequence
    from rankadaptor_plugin.recovery.batches import Pass
    from rankadaptor_plugin.recovery.methods.methods import Tuned
    from rankadaptor_plugin.recovery.teacher import LiveTeacher
    from rankadaptor_plugin.recovery.training import MicroBatch


def train(
    tuned: Tuned,
    batches: Iterator[list[TrainingSequence]],
    config: RecoveryConfig,
    steps: int,
    *,
    micro: MicroBatch,
    teacher: LiveTeacher | None = None,
    on_step: Callable[[int, float], bool] = lambda done, loss: True,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[float]:
    """Runs the steps of a fine-tune, as `rankadaptor_plugin.recovery.training.train` does.

    Started by torchrun, every process takes its share of each batch.

    Args:
        tuned: The method at work on a model.
        batches: The sequences of each step, the same in all processes.
        config: The ``[recovery]`` table; its ``steps`` are those of the whole schedule.
        steps: Steps to run.
        micro: How much goes through at once; changed where memory does not suffice.
        teacher: The unpruned model, where it predicts on the way.
        on_step: Told the number of steps done and the loss of the last; False ends the fine-tune.
        callbacks: Callbacks of transformers; they are told after `on_step`.

    Returns:
        The loss of each step, in nats per trained token.

    Raises:
        ConfigError: If ``trainer_arguments`` are wrong.
        RecoveryError: If the fine-tune diverges, or memory does not suffice in any way.
    """
    if not is_sharding(config.trainer_arguments):
        return _trained(tuned, batches, config, steps, micro, teacher, on_step, callbacks)
    with sharded(tuned, config.trainer_arguments) as shards:
        on_step = shards.watched(on_step)
        return _trained(shards.work, batches, config, steps, micro, teacher, on_step, callbacks)


def _trained(
    tuned: Tuned,
    batches: Iterator[list[TrainingSequence]],
    config: RecoveryConfig,
    steps: int,
    micro: MicroBatch,
    teacher: LiveTeacher | None,
    on_step: Callable[[int, float], bool],
    callbacks: Sequence[TrainerCallback],
) -> list[float]:
    model = tuned.model
    watch = Watch(model.config.get_text_config().vocab_size, steps, config)
    with tempfile.TemporaryDirectory() as folder, as_it_was(model):
        with refusals(), random_state_kept():  # Trainer seeds every generator when it is made
            trainer = _Trainer(
                tuned,
                _Steps(batches, steps),
                config,
                micro,
                teacher,
                args=training_arguments(config, steps, folder, model),
                callbacks=[followed := _Followed(tuned, watch, on_step), *callbacks],
            )
        followed.loss_of = trainer.last_loss
        with checkpointed(model.get_base_model(), config.gradient_checkpointing):
            trainer.train()
    return followed.losses


class _Steps:
    """The batches as Trainer takes them: sized, and each one a mapping."""

    def __init__(self, batches: Iterator[list[TrainingSequence]], steps: int) -> None:
        self._batches, self._steps = batches, steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[dict[str, list[TrainingSequence]]]:
        for _ in range(self._steps):
            yield {"sequences": next(self._batches)}


class _Trainer(Trainer):  # type: ignore[misc] # of a library without types
    """Trainer with the gradients of a whole optimizer step in one of its steps."""

    is_fsdp_enabled: bool
    optimizer: Any

    def __init__(
        self,
        tuned: Tuned,
        steps: _Steps,
        config: RecoveryConfig,
        micro: MicroBatch,
        teacher: LiveTeacher | None,
        **options: Any,
    ) -> None:
        super().__init__(model=tuned.model, **options)
        self.remove_callback(PrinterCallback)
        self._tuned, self._steps, self._recovery = tuned, steps, config
        self._micro, self._teacher = micro, teacher
        self._loss = 0.0
        if self.accelerator.num_processes == 1:
            # The model is where it belongs, on whichever device; Accelerate would use the first.
            self.accelerator.device_placement = False

    def last_loss(self) -> float:
        """Returns the loss of the last step, in nats per trained token."""
        return self._loss

    def create_accelerator_and_postprocess(self) -> None:
        """Makes the accelerator; that of Accelerate shards over GPUs alone, this one over CPUs."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            shard_over_cpus(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer of the method; FSDP puts its shards into it afterwards."""
        config = self._recovery
        made = self._tuned.optimizer(config.learning_rate, config.weight_decay)
        self.optimizer = made
        return made

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Makes the schedule of the recovery."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: learning_rate_factor(step, self._recovery)
        )
        return self.lr_scheduler

    def get_train_dataloader(self) -> _Steps:
        """Returns the batches; a DataLoader would draw from the random numbers of dropout."""
        return self._steps

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, list[TrainingSequence]],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Adds up the gradients of one optimizer step, in as many passes as memory asks for."""
        model.train()
        batch, accelerator = inputs["sequences"], self.accelerator
        device = self._tuned.model.device
        states = torch_states()
        while (loss := self._accumulated(model, batch)) is None:
            for parameter in self._tuned.parameters():
                parameter.grad = None
            if device.type == "cuda":
                torch.cuda.empty_cache()
            self._micro.halve()
            set_torch_states(states)  # the same dropout again
        if (extra := self._tuned.extra_loss()) is not None:
            accelerator.backward(extra)
        total: torch.Tensor = accelerator.reduce(loss.to(self.args.device), "sum")
        self._loss = float(total)
        return total

    def _accumulated(
        self, model: torch.nn.Module, batch: Sequence[TrainingSequence]
    ) -> torch.Tensor | None:
        """Returns this process's part of the loss; None where memory did not suffice."""
        count = trained_tokens(batch)
        try:
            total = torch.zeros((), device=self._tuned.model.device)
            parts = own_passes(batch, self._micro, *place(self.accelerator))
            for number, (part, weight) in enumerate(parts, start=1):
                is_last = number == len(parts)
                with contextlib.nullcontext() if is_last else self._gradients_kept(model):
                    given = part.to(total.device)
                    total += self._backward(model, given, weight, count)
        except RuntimeError as error:
            # Other processes would wait for the passes that this one takes more of.
            if place(self.accelerator)[1] > 1 or not is_out_of_memory(error):
                raise
            return None
        return total

    @contextlib.contextmanager
    def _gradients_kept(self, model: torch.nn.Module) -> Iterator[None]:
        """Lets a pass add its gradients to those that come before and after it."""
        state = self.accelerator.gradient_state
        with self.accelerator.no_sync(model):
            state._set_sync_gradients(False)  # DeepSpeed would make a step of them
            try:
                yield
            finally:
                state._set_sync_gradients(True)

    def _backward(
        self, model: torch.nn.Module, given: Pass, weight: float, count: int
    ) -> torch.Tensor:
        bare = self._tuned.model.get_base_model()
        tell(bare, given, self.state.global_step)
        with mixed_precision(bare), self.accelerator.autocast():
            logits = forward_logits(bare, given, called=model)
        loss = token_loss(
            logits,
            given,
            weight=self._recovery.distill_weight,
            temperature=self._recovery.distill_temperature,
            teacher_logits=self._teacher(given) if self._teacher is not None else None,
        )
        # Divided by the tokens of the whole step, so that the parts add up to their mean.
        loss = weight * loss / count
        # Gradients of several processes are averaged, where they have to add up.
        self.accelerator.backward(loss * place(self.accelerator)[1])
        return loss.detach()


class _Followed(TrainerCallback):  # type: ignore[misc] # of a library without types
    """What happens around an optimizer step."""

    def __init__(self, tuned: Tuned, watch: Watch, on_step: Callable[[int, float], bool]) -> None:
        self._tuned, self._watch, self._on_step = tuned, watch, on_step
        self.loss_of: Callable[[], float]
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **around: Any) -> None:
        """Looks at the loss and the clipped gradients."""
        gradients = [p.grad for p in self._tuned.parameters() if p.grad is not None]
        norm = 0.0 if args.fp16 else gradient_norm(gradients)
        self._watch.check(state.global_step, self.loss_of(), norm)  # fp16's scaler skips steps

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **around: Any) -> None:
        """Lets the method follow, while the gradients are there."""
        if args.fp16:  # its scaler may have left out the step: what is no number is not weighed
            for parameter in self._tuned.parameters():
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        self._tuned.after_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **around: Any) -> None:
        """Reports the step."""
        self.losses.append(self.loss_of())
        if not self._on_step(state.global_step, self.losses[-1]):
            control.should_training_stop = True
