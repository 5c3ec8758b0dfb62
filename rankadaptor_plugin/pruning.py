"""Structured pruning: the built-in pruner "width", and the bridge to torch-pruning's pruners.

Every pruned layer loses the same share of its attention units and of its MLP channels, the least
important ones: block-wise LLM-Pruner (arXiv 2305.11627) as the paper uses it (arXiv 2406.15734,
section 2), with layers at the bottom and the top left whole. The only module that imports
torch_pruning.
"""

from __future__ import annotations

import logging
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
import torch_pruning as tp

from rankadaptor_plugin.errors import ConfigError
from rankadaptor_plugin.importance import taylor
from rankadaptor_plugin.pruned_model import PrunedModel
from rankadaptor_plugin.structures import (
    decoder_layers,
    layer_widths,
    structure_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.config import PruneConfig
    from rankadaptor_plugin.units import LayerWidths, Units

log = logging.getLogger(__name__)

_IMPORTANCES = {"taylor": taylor}
_CUT = {"out": tp.prune_linear_out_channels, "in": tp.prune_linear_in_channels}


def prune_width(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[torch.Tensor],
    config: PruneConfig,
) -> PrunedModel:
    """Removes the least important units of each layer, in place.

    Of C units ``C - int(C * (1 - ratio))`` go, as in LLM-Pruner, but never the last one.

    Args:
        model: The base model, of a supported family.
        tokenizer: Its tokenizer.
        samples: Calibration sequences, each of shape (t,), int64.
        config: The ``[prune]`` table.

    Raises:
        ConfigError: If no layer is left to prune, or the importance is unknown.
        UnsupportedModelError: If the model is not supported.
        CorpusError: If the calibration sequences cannot be used.
        RankAdaptorError: If a gradient is not finite.
    """
    structure, layers = structure_of(model), decoder_layers(model)
    first, last = config.keep_first, len(layers) - config.keep_last
    if first >= last:
        raise ConfigError(
            f"[prune] keep_first {config.keep_first} and keep_last {config.keep_last} leave none "
            f"of the {len(layers)} layers to prune. Lower one of them."
        )
    if config.importance not in _IMPORTANCES:
        raise ConfigError(
            f'[prune] importance "{config.importance}" is unknown. Use one of: '
            f"{', '.join(sorted(_IMPORTANCES))}."
        )
    layer_widths(model)  # before the gradients are paid for, see whether the shapes are sound
    scores = _IMPORTANCES[config.importance](model, samples)
    clamped = False
    for index in range(first, last):
        for units, score in zip(structure.units(layers[index]), scores[index], strict=True):
            removed, all_of_them = _lowest(score, config.ratio)
            clamped |= all_of_them
            remove(units, removed)
    if clamped:
        log.warning(
            "[prune] ratio %g would remove all KV groups or channels of a layer; one is kept. "
            "Lower the ratio to prune evenly.",
            config.ratio,
        )
    pruned = PrunedModel.of(
        model,
        tokenizer,
        {
            "pruner": "width",
            "importance": config.importance,
            "ratio": config.ratio,
            "keep_first": config.keep_first,
            "keep_last": config.keep_last,
            "calibration_tokens": [len(sample) for sample in samples],
        },
    )
    log.info(
        "Pruned layers %d to %d: %d of %d parameters are left.",
        first,
        last - 1,
        pruned.parameters,
        pruned.base_parameters,
    )
    return pruned


def remove(units: Units, numbers: Sequence[int]) -> None:
    """Cuts units out of all their matrices; which parameters are frozen stays as it is."""
    if not numbers:
        return
    for member in units:
        flags = {name: p.requires_grad for name, p in member.module.named_parameters()}
        # One call for all units: the indices of a second one would count from the cut matrix.
        _CUT[member.side](member.module, member.indices[list(numbers)].flatten().tolist())
        for name, parameter in member.module.named_parameters():
            parameter.requires_grad_(flags[name])


def describe_pruned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: LayerWidths | None = None,
    provenance: dict[str, Any] | None = None,
) -> PrunedModel:
    """Takes over a model that was pruned by other means; converts it in place.

    Heads must have been removed whole: with torch-pruning's own pruners set
    ``prune_head_dims=False``, as heads made smaller may look like fewer heads.

    Args:
        model: A model of a supported family whose heads or MLP channels were cut.
        tokenizer: Its tokenizer.
        base: Widths before pruning; None if ``model.config`` still holds them.
        provenance: Where it comes from, plain JSON values.

    Raises:
        UnsupportedModelError: If heads are fractional, or matrices do not fit each other or the
            config.
    """
    structure_of(model)
    if base is not None:
        for key, size in base.to_config().items():
            setattr(model.config, key, size)
    return PrunedModel.of(model, tokenizer, {"pruner": "custom", **(provenance or {})})


def after_pruning(
    pruner: tp.pruner.BasePruner, callback: Callable[[PreTrainedModel], object]
) -> None:
    """Makes a torch-pruning pruner call back when it is done.

    torch-pruning has no callbacks, so ``pruner.step`` is replaced on this one instance. The
    callback gets ``pruner.model`` once: when step number ``iterative_steps`` has ended, or, with
    ``step(interactive=True)``, when its groups have all been taken.
    """
    step = pruner.step
    called = False

    def finish() -> None:
        nonlocal called
        if not called and pruner.current_step >= pruner.iterative_steps:
            called = True
            callback(pruner.model)

    def then_finish(groups: Iterator[Any]) -> Iterator[Any]:
        yield from groups
        finish()

    @wraps(step)
    def step_and_finish(interactive: bool = False) -> Iterator[Any] | None:
        groups = step(interactive=interactive)
        if interactive:
            return then_finish(groups)
        finish()
        return None

    pruner.step = step_and_finish


def _lowest(scores: torch.Tensor, ratio: float) -> tuple[list[int], bool]:
    """Returns the units to remove, and whether by their number none would have been left."""
    left = int(len(scores) * (1 - ratio))
    order = torch.argsort(scores, stable=True)
    return sorted(order[: len(scores) - max(left, 1)].tolist()), left < 1
