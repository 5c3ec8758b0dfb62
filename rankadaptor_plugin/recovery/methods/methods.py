"""The ways to fine-tune a pruned model, and how each begins.

Whatever the method, it ends as a plain LoRA (or DoRA) adapter on the resident base, whose weights
are untouched. So what is saved, merged, scored and swapped is always the same kind of thing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from rankadaptor_plugin.config.tables import INITS
from rankadaptor_plugin.core.errors import ConfigError, RankSpaceError, RecoveryError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.registry import suggestion
from rankadaptor_plugin.models.structures import decoder_layers
from rankadaptor_plugin.recovery import adapters
from rankadaptor_plugin.recovery.batches import batches
from rankadaptor_plugin.recovery.methods.adalora import AdaLora
from rankadaptor_plugin.recovery.methods.eva import attach_eva
from rankadaptor_plugin.recovery.methods.gradient import start_from_gradient
from rankadaptor_plugin.recovery.methods.pissa import start_from_principal
from rankadaptor_plugin.recovery.methods.squeeze import Squeeze
from rankadaptor_plugin.recovery.methods.tuning import Tuning, train_up_only
from rankadaptor_plugin.recovery.slots import module_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from rankadaptor_plugin.config.tables import RecoveryConfig
    from rankadaptor_plugin.corpus.sequences import TrainingSequence
    from rankadaptor_plugin.recovery.teacher import LiveTeacher

LORA = "lora"
"""LoRA with the ranks as they are given."""

NONE = "none"
"""The method that fine-tunes nothing."""

DISTILL, COMPENSATE = "distill", "compensate"
"""Switches: learn from the unpruned model, and start from compensated weights."""

_VARIANTS, _INITS = ("dora", "rslora"), INITS[1:]
SWITCHES = (*_VARIANTS, *_INITS, DISTILL, COMPENSATE)
"""Switches that may be added to a method, in the order in which they are written."""

METHODS = {
    LORA: SWITCHES,
    "rankadaptor": SWITCHES,
    "pattern": SWITCHES,
    "squeeze": ("rslora", "gradient", DISTILL, COMPENSATE),
    "eva": (*_VARIANTS, DISTILL, COMPENSATE),
    "adalora": (DISTILL, COMPENSATE),
    "lora-fa": ("gradient", "eva", DISTILL, COMPENSATE),
    NONE: (COMPENSATE,),
}
"""Each method with the switches that it can have."""

_RANKS, _NUMBERED = "pattern:4-6-10-12", ("pattern", "squeeze")
_SETTINGS = {"dora": "use_dora", "rslora": "use_rslora", **dict.fromkeys(_INITS, "init")}


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: One of `METHODS`.
        ranks: The numbers of a pattern; empty for other methods.
        dora: Weight-decomposed LoRA, arXiv 2402.09353.
        rslora: Scaling by alpha / sqrt(r), arXiv 2312.03732.
        init: First weights, one of `INITS`.
        distill: Learn from the unpruned model's predictions too.
        compensate: Train on the compensated model (`rankadaptor_plugin.pruning.compensation`).
    """

    name: str
    ranks: tuple[int, ...] = ()
    dora: bool = False
    rslora: bool = False
    init: str = INITS[0]
    distill: bool = False
    compensate: bool = False

    @property
    def switches(self) -> tuple[str, ...]:
        """The switches that are on, in the order in which they are written."""
        return tuple(s for s in SWITCHES if s == self.init or getattr(self, s, False) is True)

    def __str__(self) -> str:
        """Returns the name in run files; ``lora`` with a switch is named by the switch alone."""
        name = self.name + (":" + "-".join(map(str, self.ranks)) if self.ranks else "")
        on = self.switches
        # EVA by itself is a method, which redistributes the ranks as well.
        return "+".join(on if on and name == LORA and on[0] not in METHODS else [name, *on])

    def with_switches(self, config: RecoveryConfig) -> Method:
        """Returns the method with the switches that a run turns on for every fine-tune.

        Raises:
            ConfigError: If the method cannot have one of them.
        """
        if self.name == NONE:
            return self
        return _checked(
            replace(
                self,
                dora=self.dora or config.use_dora,
                rslora=self.rslora or config.use_rslora,
                init=config.init if self.init == INITS[0] and self.name != "eva" else self.init,
            )
        )


def parse_method(text: str) -> Method:
    """Reads a method: a name, a switch, or names joined by ``+``, in upper or lower case.

    Examples: ``adalora``, ``dora``, ``lora+rslora``, ``eva+dora``, ``pattern:4-6-10-12+pissa``,
    ``gradient+distill+compensate``. ``eva`` alone is the method that redistributes ranks;
    ``lora+eva`` keeps them and takes its first weights.

    Raises:
        ConfigError: If it is none, or its parts do not go together.
    """
    first, *rest = (part.strip() for part in text.lower().split("+"))
    if first in SWITCHES and first not in METHODS:
        first, rest = LORA, [first, *rest]
    name, colon, numbers = (part.strip() for part in first.partition(":"))
    if name not in METHODS or (colon and name not in _NUMBERED):
        known = list(dict.fromkeys([*METHODS, _RANKS, *SWITCHES]))
        known.remove("pattern")
        near = suggestion(first, known) if first else ""
        raise ConfigError(
            f"Unknown recovery method {text!r}.{near} Give one of: {', '.join(known)}; "
            "switches may be added, such as eva+dora."
        )
    for switch in rest:
        if switch not in SWITCHES:
            raise ConfigError(
                f"Unknown switch {switch!r} in the recovery method {text!r}."
                f"{suggestion(switch, list(SWITCHES))} After + give one of: {', '.join(SWITCHES)}."
            )
    inits = list(dict.fromkeys(switch for switch in rest if switch in _INITS))
    if len(inits) > 1:
        raise ConfigError(
            f"The recovery method {text!r} has two kinds of first weights, {' and '.join(inits)}. "
            "Choose one of them."
        )
    ranks = _numbers(numbers, text) if name == "pattern" or colon else ()
    if name == "squeeze" and len(ranks) > 1:
        raise ConfigError(
            f"The recovery method {text!r} trains at one rank. Write it as in squeeze:16."
        )
    on = {s: s in rest for s in (*_VARIANTS, DISTILL, COMPENSATE)}
    return _checked(Method(name, ranks, **on, init=inits[0] if inits else INITS[0]))


def _numbers(numbers: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in numbers.split("-")]
    # isdecimal alone takes digits of all scripts, which ranks are not written in here.
    if not all(part.isascii() and part.isdecimal() for part in parts) or not any(map(int, parts)):
        raise ConfigError(
            f"The recovery method {text!r} has no list of ranks. Write whole numbers of 0 or more, "
            f"one of them above 0, as in {_RANKS}."
        )
    return tuple(map(int, parts))


def _checked(method: Method) -> Method:
    able = METHODS[method.name]
    for switch in method.switches:
        if switch not in able:
            setting = _SETTINGS.get(switch)
            raise ConfigError(
                f"The recovery method {method.name} cannot be combined with {switch}: it takes "
                f"only {' or '.join(able)}. Leave {switch} out"
                f"{f', also of [recovery] {setting}' if setting else ''}."
            )
    if method.dora and method.init == "pissa":
        raise ConfigError(
            f"The recovery method {method} starts its magnitudes from the base weights (dora) and "
            "replaces these (pissa). Choose one of the two."
        )
    return method


def pattern_allocation(ranks: Sequence[int], layers: int) -> RankAllocation:
    """Spreads ranks over the layers of a model, bottom first, in blocks as equal as can be.

    The paper's example (section 2) has 4, 6, 10 and 12 in the quarters of a model.

    Raises:
        RankSpaceError: If there are more ranks than layers, or none above 0.
    """
    if len(ranks) > layers:
        raise RankSpaceError(
            f"The pattern {'-'.join(map(str, ranks))} has {len(ranks)} ranks for {layers} layers. "
            f"Give at most {layers}."
        )
    if not ranks:
        raise RankSpaceError("The pattern has no ranks. Give at least one.")
    return RankAllocation(tuple(ranks[i * len(ranks) // layers] for i in range(layers)))


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
        """True if `finish` keeps every rank that is trained now."""

    def parameters(self) -> list[nn.Parameter]:
        """Returns the trainable parameters; none for the method ``none``."""

    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """Returns the method's optimizer of these parameters."""

    def extra_loss(self) -> torch.Tensor | None:
        """Returns the term added to the loss once per optimizer step, or None."""

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
    divides = method.init == "pissa" or method.name in ("adalora", "lora-fa", "squeeze")
    if divides and not (config.lora_alpha or config.alpha_over_rank):
        raise ConfigError(
            f"The recovery method {method} divides by LoRA's scaling, which is 0. Set [recovery] "
            "alpha_over_rank or lora_alpha above 0."
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
    teacher: LiveTeacher | None = None,
) -> Tuned:
    """Puts what a method trains on the base model, in the place of any adapter before.

    Args:
        base: The pruned model, or any PEFT model of it.
        method: The method; switches of the run are added.
        allocation: The ranks; AdaLoRA and EVA take their sum, squeeze their parameters, a pattern
            has its own.
        config: The ``[recovery]`` table.
        seed: Seed of first weights and of EVA's batches; torch's own random state stays as it is.
        steps: Optimizer steps of the whole fine-tune, for AdaLoRA's schedule.
        sequences: What is trained on; EVA and the gradient look at it.
        teacher: The unpruned model, where it predicts on the way.

    Raises:
        RankSpaceError: If the allocation does not fit the model.
        ConfigError: If the method cannot have a switch of the run, needs a scaling above 0, or is
            AdaLoRA on a model that is spread over several devices.
        RecoveryError: If `base` is a bare model with adapter layers in it, or memory runs out.
        CorpusError: If EVA has no sequences.
    """
    method = method.with_switches(config)
    settings = replace(
        adapters.LoraSettings.of(config), use_dora=method.dora, use_rslora=method.rslora
    )
    bare = _checked_base(base, method, config)
    if method.name == "pattern":
        allocation = pattern_allocation(method.ranks, len(decoder_layers(bare)))
    ranks = module_ranks(bare, allocation, config.target_modules)

    def point(model: PeftModel) -> None:
        table = replace(config, distill_weight=config.distill_weight if method.distill else 0.0)
        first = next(batches(sequences, config.batch_size, seed))
        start_from_gradient(model, first, table, seed=seed, teacher=teacher)

    if method.name == "adalora":
        return AdaLora(bare, ranks, settings, seed=seed, steps=steps)
    if method.name == "squeeze":
        wide = method.ranks[0] if method.ranks else 0
        squeeze = Squeeze(bare, ranks, settings, wide=wide, seed=seed, steps=steps)
        if method.init == "gradient":
            point(squeeze.model)
        return squeeze
    if method.name == "eva":
        model = attach_eva(bare, ranks, settings, sequences, seed=seed)
        return Tuning(model=model, trained=adapters.trainable_parameters(model))
    if method.init == "eva":
        model = attach_eva(bare, ranks, settings, sequences, seed=seed, redistributes=False)
    else:
        with torch.random.fork_rng(devices=[]):
            model = adapters.attach(base, allocation, settings, seed=seed)
    if method.name == NONE:
        model.requires_grad_(False)
        return Tuning(model=model, trained=[])
    if method.init == "gradient":
        point(model)
    if method.name == "lora-fa":
        return train_up_only(model)
    if method.init == "pissa":
        return start_from_principal(model, seed)
    return Tuning(model=model, trained=adapters.trainable_parameters(model))


def _checked_base(
    base: PreTrainedModel | PeftModel, method: Method, config: RecoveryConfig
) -> PreTrainedModel:
    """Returns the bare model, once it is known that the method can be put on it; see `begin`."""
    check_scaling(method, config)
    if base is adapters.base_of(base) and adapters.has_adapters(adapters.base_of(base)):
        raise RecoveryError(
            "The model has the adapter of an earlier fine-tune on it. Give RecoveredAdapter.model "
            "in its place, or call its unload() first."
        )
    bare = adapters.bare_model(base)
    if method.name == "adalora" and len(set(getattr(bare, "hf_device_map", {}).values())) > 1:
        raise ConfigError(
            "The recovery method adalora compares ranks on one device, but the model is spread "
            'over several. Leave it out, or set device_map = "".'
        )
    return bare
