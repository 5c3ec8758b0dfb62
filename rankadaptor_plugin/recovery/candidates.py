"""Several fine-tunes in one pass: candidates of different ranks share every look at the base.

Their sequences lie one after the other in the batch, and each matrix with adapters computes all
low-rank products at once, ranks padded to the greatest (Punica, arXiv 2310.18547, serves, mLoRA,
arXiv 2312.02515, trains that way). Nothing else is shared: batches, learning rate, scaling,
clipping and optimizer are each candidate's own, so a result is that of a fine-tune by itself, to
rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from rankadaptor_plugin.core.errors import RecoveryError
from rankadaptor_plugin.models.device import is_out_of_memory, seeded_devices
from rankadaptor_plugin.recovery import adapters
from rankadaptor_plugin.recovery.batches import batches, check_sequences
from rankadaptor_plugin.recovery.candidate_passes import arranged, gradients
from rankadaptor_plugin.recovery.methods.tuning import adamw
from rankadaptor_plugin.recovery.stacked_adapters import StackedWeights, bare_and_frozen
from rankadaptor_plugin.recovery.training import (
    MicroBatch,
    Watch,
    checkpointed,
    learning_rate_factor,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

    from rankadaptor_plugin.config.tables import RecoveryConfig
    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.corpus.sequences import TrainingSequence
    from rankadaptor_plugin.recovery.candidate_passes import Numbered
    from rankadaptor_plugin.recovery.teacher import LiveTeacher


@dataclass(frozen=True, eq=False)
class Trained:
    """What became of a candidate.

    Attributes:
        weights: By the names of the parameters that `adapters.attach` makes; none where it failed.
        losses: Of each step, in nats per trained token.
        failed: At which step and why it was given up; None where it was not.
    """

    weights: dict[str, torch.Tensor]
    losses: list[float]
    failed: str | None = None


class _Candidate:
    """One fine-tune.

    Args:
        config: With its searched settings.
        row: Its weights, a row of all candidates'.
        order: Its sequences by step.
        watch: Tells when it cannot be saved.
    """

    def __init__(
        self,
        config: RecoveryConfig,
        row: nn.Parameter,
        order: Iterator[list[TrainingSequence]],
        watch: Watch,
    ) -> None:
        self.config, self.row, self.order, self._watch = config, row, order, watch
        self.losses: list[float] = []
        self.failed: str | None = None
        self._optimizer = adamw([row], config.learning_rate, config.weight_decay)

    def step(self, number: int, loss: float) -> bool:
        """Takes an optimizer step; returns whether the candidate goes on."""
        limit = self.config.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_([self.row], limit))
        try:
            self._watch.check(number, loss, norm)
        except RecoveryError as error:
            self.failed = str(error)
            return False
        rate = self.config.learning_rate * learning_rate_factor(number, self.config)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self.losses.append(loss)
        return True


def can_train_together(
    config: RecoveryConfig, device: torch.device, model: PreTrainedModel | None = None
) -> str:
    """Returns why fine-tunes of these settings have to run one by one; empty if they need not.

    Args:
        config: The ``[recovery]`` table.
        device: Where the model is.
        model: The bare model, to be looked at as well.
    """
    if device.type not in ("cpu", "cuda"):
        return f"the device is {device.type}, not cpu or cuda"
    if config.engine != "own":
        return f"[recovery] engine is {config.engine}, not own"
    for name in ("dora", "pissa", "keep_best"):
        if value := getattr(config, name):
            return f"[recovery] {name} is {str(value).lower()}"
    if config.validate_every:
        return f"[recovery] validate_every is {config.validate_every}"
    if model is None:
        return ""
    if model.dtype == torch.float16:
        return "the model is in float16, which takes a loss scale for each fine-tune"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "the model is spread over several devices"
    if getattr(model, "is_quantized", False):
        return "the model is quantized"
    if any(map(_drops_out, model.modules())):
        return "the model itself has dropout"
    return ""


def train_together(
    base: PreTrainedModel | PeftModel,
    candidates: Sequence[tuple[RankAllocation, int]],
    sequences: Sequence[TrainingSequence],
    config: RecoveryConfig,
    *,
    steps: int,
    teacher: LiveTeacher | None = None,
    on_step: Callable[[int, list[float]], bool] = lambda done, losses: True,
    micro: MicroBatch | None = None,
) -> list[Trained]:
    """Fine-tunes several allocations at once; the base is left as it was, adapters on it too.

    Args:
        base: The pruned model. An adapter on it is taken out and put back.
        candidates: Allocations, and the seed of initial weights and batches of each.
        sequences: What is trained on.
        config: The ``[recovery]`` table.
        steps: Steps to run; the schedule is that of ``config.steps``.
        teacher: The unpruned model, where it predicts on the way.
        on_step: Told the number of steps done and the last loss of each candidate, those that
            failed left out; False ends all fine-tunes.
        micro: How many sequences of each candidate go through at once, kept from one call to the
            next; None takes what `config` says.

    Returns:
        One result per candidate, in their order.

    Raises:
        RankSpaceError: If an allocation does not fit the model.
        CorpusError: If there is nothing to train on.
        RecoveryError: If settings, methods or the model do not allow it.
        torch.OutOfMemoryError: If memory does not suffice for one sequence of each.
    """
    if not candidates:
        return []
    bare: PreTrainedModel = base.get_base_model() if isinstance(base, PeftModel) else base
    reason = can_train_together(config, bare.device, bare)
    if others := [allocation.method for allocation, _ in candidates if allocation.method]:
        reason = f"the method {others[0]} is not plain LoRA"
    if reason:
        raise RecoveryError(
            f"Candidates cannot be trained together: {reason}. Set [recovery] "
            "candidates_per_pass = 1."
        )
    check_sequences(sequences)
    config = replace(config, steps=config.steps_for(len(sequences)), epochs=0.0)
    settings = [replace(config, **_searched(allocation)) for allocation, _ in candidates]
    seeds = [seed for _, seed in candidates]
    vocabulary = bare.config.get_text_config().vocab_size
    with torch.random.fork_rng(devices=seeded_devices(bare.device)), bare_and_frozen(bare):
        ranks = [
            adapters.module_ranks(bare, allocation, config.targets) for allocation, _ in candidates
        ]
        weights = StackedWeights(bare, ranks, settings, seeds)
        running = [
            _Candidate(
                settings[i],
                weights.rows[i],
                batches(sequences, config.batch_size, seeds[i]),
                Watch(vocabulary, steps, settings[i]),
            )
            for i in range(len(candidates))
        ]
        every = list(running)
        with weights.on(bare), checkpointed(bare, config.gradient_checkpointing):
            bare.train()
            micro = micro or MicroBatch.of(config)
            for step in range(steps):
                drawn = [arranged(next(one.order), micro.layout) for one in running]
                losses = _accumulated(bare, weights, drawn, step, config, micro, teacher)
                alive = [i for i, one in enumerate(running) if one.step(step, losses[i])]
                weights.clear_gradients()
                if len(alive) < len(running):
                    running = [running[i] for i in alive]
                    weights.keep(alive)
                if not running or not on_step(step + 1, [one.losses[-1] for one in running]):
                    break
        found = {id(one): weights.of(i) for i, one in enumerate(running)}
    return [Trained(found.get(id(one), {}), one.losses, one.failed) for one in every]


@torch.no_grad()
def put(model: PeftModel, trained: Trained) -> None:
    """Gives an adapter the weights of a candidate.

    Args:
        model: What `adapters.attach` made for the candidate's allocation.
        trained: The candidate.

    Raises:
        RecoveryError: If it failed, or the adapter is another allocation's.
    """
    if trained.failed is not None:
        raise RecoveryError(trained.failed)
    own = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    shapes = {name: p.shape for name, p in own.items()}
    if shapes != {name: weight.shape for name, weight in trained.weights.items()}:
        raise RecoveryError(
            "The weights of a candidate do not fit the adapter. Attach its own allocation."
        )
    for name, weight in trained.weights.items():
        own[name].copy_(weight)


def _searched(allocation: RankAllocation) -> dict[str, Any]:
    return dict(allocation.settings)


def _drops_out(module: nn.Module) -> bool:
    """Tells whether a module has dropout, as a layer or as a share in an attribute."""
    if isinstance(module, LoraLayer):
        return False
    if isinstance(module, nn.Dropout):
        return module.p > 0
    shares = (v for n, v in vars(module).items() if "dropout" in n and isinstance(v, float))
    return any(share > 0 for share in shares)


def _accumulated(
    model: PreTrainedModel,
    weights: StackedWeights,
    drawn: Sequence[Sequence[Numbered]],
    step: int,
    config: RecoveryConfig,
    micro: MicroBatch,
    teacher: LiveTeacher | None,
) -> list[float]:
    """Adds up the gradients of one step, in as many passes as memory asks for.

    Returns:
        The loss of each candidate.
    """
    while True:
        try:
            return gradients(model, weights, drawn, step, config, micro.size, teacher)
        except RuntimeError as error:
            if micro.size == 1 or not is_out_of_memory(error):
                raise
        # Outside of the clause, where the error no longer holds on to the tensors of the pass.
        weights.clear_gradients()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        micro.halve()
