"""The ways to fine-tune a pruned model, and how each begins.

Whatever the method, it ends as a plain LoRA (or DoRA) adapter on the resident base, whose weights
are untouched. So what is saved, merged, scored and swapped is always the same kind of thing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from rankadaptor_plugin.core.errors import ConfigError, RecoveryError
from rankadaptor_plugin.models.structures import decoder_layers
from rankadaptor_plugin.recovery import adapters
from rankadaptor_plugin.recovery.methods.adalora import AdaLora
from rankadaptor_plugin.recovery.methods.eva import attach_eva
from rankadaptor_plugin.recovery.methods.lora_fa import train_up_only
from rankadaptor_plugin.recovery.methods.method_names import (
    LORA,
    METHODS,
    NONE,
    Method,
    parse_method,
    pattern_allocation,
)
from rankadaptor_plugin.recovery.methods.pissa import start_from_principal
from rankadaptor_plugin.recovery.methods.tuning import Tuning
from rankadaptor_plugin.recovery.module_adapters import (
    Scaling,
    adapter_ranks,
    bare_model,
    base_of,
    has_adapters,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from rankadaptor_plugin.config.tables import RecoveryConfig
    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.corpus.sequences import TrainingSequence

__all__ = [
    "LORA",
    "METHODS",
    "NONE",
    "Method",
    "Tuned",
    "adapter_ranks",
    "begin",
    "parse_method",
    "pattern_allocation",
]


class Tuned(Protocol):
    """A fine-tune in the making.

    A step is: forward and backward passes of ``model.get_base_model()``, backward of `extra_loss`,
    the step of `optimizer`, `after_step`, then the gradients are set to None.
    """

    @property
    def model(self) -> PeftModel:
        """The model with what is trained on it."""

    @property
    def is_settled(self) -> bool:
        """Whether `finish` keeps every rank that is trained now."""

    def parameters(self) -> list[nn.Parameter]:
        """Returns what is trained; nothing for the method ``none``."""

    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """Returns the method's optimizer of these parameters."""

    def extra_loss(self) -> torch.Tensor | None:
        """Returns what is added to the loss once per optimizer step, or None."""

    def after_step(self, step: int) -> None:
        """Is called after the optimizer's step, while its gradients are there; steps from 0."""

    def finish(self) -> PeftModel:
        """Ends the fine-tune, at whatever step it is.

        Returns:
            The base with a plain LoRA or DoRA adapter named `adapters.ADAPTER`, in evaluation mode;
            it computes what `model` did. Not always the same object as `model`.
        """


def check_scaling(method: Method, config: RecoveryConfig) -> None:
    """Checks that a method that divides by LoRA's scaling has one.

    Raises:
        ConfigError: If the scaling is 0.
    """
    divides = method.pissa or method.name in ("adalora", "lora-fa")
    if divides and not (config.alpha or config.alpha_over_rank):
        raise ConfigError(
            f"The recovery method {method} divides by LoRA's scaling, which is 0. Set [recovery] "
            "alpha_over_rank or alpha above 0."
        )


def begin(
    base: PreTrainedModel | PeftModel,
    method: Method,
    allocation: RankAllocation,
    config: RecoveryConfig,
    *,
    seed: int,
    steps: int,
    sequences: Sequence[TrainingSequence],
) -> Tuned:
    """Puts what a method trains on the base model, in the place of any adapter before.

    Args:
        base: The pruned model, or any PEFT model of it.
        method: The method; switches of the run are added.
        allocation: The ranks; AdaLoRA and EVA take their sum, a pattern has its own.
        config: The ``[recovery]`` table.
        seed: Seed of first weights and of EVA's batches; torch's own random state stays as it is.
        steps: Optimizer steps of the whole fine-tune, for AdaLoRA's schedule.
        sequences: What is trained on; EVA looks at it.

    Raises:
        RankSpaceError: If the allocation does not fit the model.
        ConfigError: If the method cannot have a switch of the run, needs a scaling above 0, or is
            AdaLoRA on a model that is spread over several devices.
        RecoveryError: If `base` is no PEFT model but has adapters, or memory does not suffice.
        CorpusError: If EVA has no sequences.
    """
    method = method.with_switches(config)
    scaling = Scaling(
        alpha_over_rank=config.alpha_over_rank, alpha=config.alpha, rslora=method.rslora
    )
    check_scaling(method, config)
    if base is base_of(base) and has_adapters(base_of(base)):
        raise RecoveryError(
            "The model has the adapter of an earlier fine-tune on it. Give RecoveredAdapter.model "
            "in its place, or call its unload() first."
        )
    bare = bare_model(base)
    if method.name == "adalora" and len(set(getattr(bare, "hf_device_map", {}).values())) > 1:
        raise ConfigError(
            "The recovery method adalora compares ranks on one device, but the model is spread "
            'over several. Leave it out, or set device_map = "".'
        )
    if method.ranks:
        allocation = pattern_allocation(method.ranks, len(decoder_layers(bare)))
    ranks = adapters.module_ranks(bare, allocation, config.targets)
    if method.name == "adalora":
        return AdaLora(bare, ranks, scaling, seed=seed, steps=steps, dropout=config.dropout)
    if method.name == "eva":
        model = attach_eva(
            bare,
            ranks,
            scaling,
            sequences,
            seed=seed,
            dropout=config.dropout,
            dora=method.dora,
        )
        return Tuning(model=model, trained=adapters.trainable_parameters(model))
    with torch.random.fork_rng(devices=[]):
        model = adapters.attach(
            base,
            allocation,
            seed=seed,
            alpha_over_rank=config.alpha_over_rank,
            dropout=config.dropout,
            alpha=config.alpha,
            dora=method.dora,
            rslora=method.rslora,
            targets=config.targets,
        )
    if method.name == NONE:
        model.requires_grad_(False)
        return Tuning(model=model, trained=[])
    if method.name == "lora-fa":
        return train_up_only(model)
    if method.pissa:
        return start_from_principal(model, seed)
    return Tuning(model=model, trained=adapters.trainable_parameters(model))
