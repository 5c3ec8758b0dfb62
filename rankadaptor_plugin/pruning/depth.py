"""The built-in pruner "depth": whole decoder blocks go, and a plain Hugging Face model stays.

Shortened LLaMA (arXiv 2402.02834): each block gets one score, the lowest go first. The blocks at
the bottom and at the top are left alone, its "+" heuristic, as its code does for every score.
"""

from __future__ import annotations

import copy
import logging
import math
import operator
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rankadaptor_plugin.core.errors import ConfigError, RankAdaptorError, UnsupportedModelError
from rankadaptor_plugin.core.progress import counted
from rankadaptor_plugin.models.modeling_rankadaptor import PREFIX
from rankadaptor_plugin.models.pruned_model import PrunedModel
from rankadaptor_plugin.models.structures import layer_units, set_config, structure_of
from rankadaptor_plugin.pruning.calibration import (
    Limits,
    backward,
    check_loaded,
    check_samples,
    checkpointed,
    grouped,
    hidden_states,
    micro_batches,
    only_gradients_of,
    padded,
    sequence_loss,
    within_memory,
)
from rankadaptor_plugin.pruning.cutting import importance_lost, note_unused, provenance

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.config.tables import PruneConfig


log = logging.getLogger(__name__)

_EXP_LIMIT = 700.0
"""Above this exp overflows in double precision; the order of so bad blocks does not matter."""


def prune_depth(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[torch.Tensor],
    config: PruneConfig,
) -> PrunedModel:
    """Removes the least important decoder blocks, in place; the class of the model stays.

    Args:
        model: The base model, of a supported family.
        tokenizer: Its tokenizer.
        samples: Calibration sequences, each of shape (t,), int64; only lengths are read where the
            importance is "magnitude" or "random".
        config: The ``[prune]`` table.

    Raises:
        ConfigError: If the table asks for what the model or the method cannot give.
        UnsupportedModelError: If the model is not supported.
        CorpusError: If the calibration sequences cannot be used.
        RankAdaptorError: If a weight or a score is not finite.
    """
    note_unused(config, "global_pruning", "max_pruning_ratio", "round_to", "group_reduction")
    check_removable(model)
    check_loaded(model)
    layer_units(model)  # before the scores are paid for, see whether the matrices are sound
    total = len(block_list(model))
    span = config.layers(total)
    check_importance(config)
    count = _count(model, span, config)
    base_config = copy.deepcopy(model.config)
    scores = _IMPORTANCES[config.importance](model, samples, span)
    _check_finite(scores)
    removed = sorted(sorted(scores, key=scores.__getitem__)[:count])
    kept = tuple(i for i in range(total) if i not in removed)
    within = tuple(i in span for i in kept)
    block = torch.ones(1)  # a block is the one unit of its layer, whatever its score
    lost = importance_lost(total, ((i, block, [0]) for i in removed), config)
    keep_layers(model, kept)
    log.info("Removed blocks %s; %d of %d are left.", removed, len(kept), total)
    return PrunedModel.of(
        model,
        tokenizer,
        {
            **provenance(config, samples),
            "removed_layers": removed,
            "scores": [float(f"{scores[i]:.6g}") if i in scores else None for i in range(total)],
            **lost,
        },
        base_config=base_config,
        kept_layers=kept,
        pruned_layers=within if any(within) else (True,) * len(kept),
    )


def _taylor(
    model: PreTrainedModel, samples: Sequence[torch.Tensor], span: range
) -> dict[int, float]:
    """Sums |w * g| over all parameters of a block, g being that of the mean calibration loss.

    Where all sequences form one pass, each gradient is complete as soon as it is there, and is
    given up at once. Over several passes, gradients are added up, of as many blocks at a time as
    memory allows. Activations are held of one block at a time.
    """
    check_samples(model, samples)
    blocks = block_list(model)

    def compute(limits: Limits) -> dict[int, float]:
        parts = micro_batches(model, samples, limits)
        most = limits.sums if len(parts) > 1 else sys.maxsize
        groups = grouped(span, lambda i: 4 * sum(w.numel() for w in blocks[i].parameters()), most)
        totals = dict.fromkeys(span, 0.0)
        for group in groups:
            totals |= _taylor_of_blocks(model, parts, group)
        return {index: total / len(samples) for index, total in totals.items()}

    return within_memory(model, samples, compute)


def _taylor_of_blocks(
    model: PreTrainedModel, parts: Sequence[Sequence[torch.Tensor]], indices: Sequence[int]
) -> dict[int, float]:
    """Sums |w * g| of some blocks, g being that of the sum of the sequences' losses."""
    totals = dict.fromkeys(indices, 0.0)
    sums: dict[torch.Tensor, torch.Tensor] = {}

    def add(index: int, parameter: torch.Tensor) -> None:
        if parameter.grad is None:
            return
        gradient = parameter.grad.float()
        if len(parts) == 1:
            totals[index] += _absolute_sum(gradient * parameter.detach().float())
        elif parameter in sums:
            sums[parameter] += gradient
        else:
            sums[parameter] = gradient
        parameter.grad = None

    hook_on: Any = torch.Tensor.register_post_accumulate_grad_hook  # torch leaves it untyped
    blocks = block_list(model)
    weights = [(index, weight) for index in indices for weight in blocks[index].parameters()]
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(only_gradients_of(model, [weight for _, weight in weights]))
        stack.enter_context(checkpointed(blocks))
        for index, weight in weights:
            stack.callback(hook_on(weight, partial(add, index)).remove)
        for part in counted(parts, "calibration passes"):
            backward(model, part, hidden_states(model, padded(part)))
    for index, weight in weights:
        if weight in sums:
            totals[index] += _absolute_sum(sums.pop(weight).mul_(weight.detach()))
    return totals


def _magnitude(
    model: PreTrainedModel, samples: Sequence[torch.Tensor], span: range
) -> dict[int, float]:
    """Sums |w| over all parameters of a block."""
    blocks = block_list(model)
    return {i: sum(_absolute_sum(w.detach()) for w in blocks[i].parameters()) for i in span}


def _perplexity(
    model: PreTrainedModel, samples: Sequence[torch.Tensor], span: range
) -> dict[int, float]:
    """Returns the perplexity of the model without the block, over all tokens of all sequences."""
    check_samples(model, samples)
    scores, counts = {}, [len(sample) - 1 for sample in samples]
    with only_gradients_of(model, []), torch.no_grad():
        for index in counted(span, "blocks"):
            with without_layer(model, index):
                losses = [float(sequence_loss(model, sample)) for sample in samples]
            loss = sum(map(operator.mul, losses, counts)) / sum(counts)
            scores[index] = math.exp(min(loss, _EXP_LIMIT)) if loss < math.inf else loss
    return scores


def _random(
    model: PreTrainedModel, samples: Sequence[torch.Tensor], span: range
) -> dict[int, float]:
    return dict(zip(span, torch.rand(len(span)).tolist(), strict=True))


_Importance = Callable[["PreTrainedModel", "Sequence[torch.Tensor]", range], dict[int, float]]
_IMPORTANCES: dict[str, _Importance] = {
    "magnitude": _magnitude,
    "ppl": _perplexity,
    "random": _random,
    "taylor": _taylor,
}


def _absolute_sum(values: torch.Tensor) -> float:
    return float(values.float().abs().sum())


def check_importance(config: PruneConfig) -> None:
    """Checks what `prune_depth` takes from a run file.

    Raises:
        ConfigError: If the score is unknown, or none of this method.
    """
    if config.importance not in _IMPORTANCES:
        raise ConfigError(
            f'[prune] importance "{config.importance}" is unknown for method = "depth". Use one '
            f"of: {', '.join(sorted(_IMPORTANCES))}."
        )
    if config.importance == "taylor" and config.taylor != "first":
        raise ConfigError(
            f'[prune] taylor is "{config.taylor}", but method = "depth" uses the first-order '
            'term. Set taylor = "first".'
        )


def _count(model: PreTrainedModel, span: range, config: PruneConfig) -> int:
    """Returns the number of blocks to remove."""
    blocks = block_list(model)
    if config.blocks:
        asked, wish = config.blocks, f"blocks {config.blocks}"
    else:
        share, wish = config.pruning_ratio * len(span), f"pruning_ratio {config.pruning_ratio:g}"
        if config.ratio_of == "parameters":
            wish += " of all parameters"
            own = sum(w.numel() for index in span for w in blocks[index].parameters())
            everything = sum(weight.numel() for weight in model.parameters())
            share = config.pruning_ratio * everything / own * len(span)
        asked = max(round(share), 1)
    if asked > len(span):
        raise ConfigError(
            f"[prune] {wish} means {asked} blocks, but only {len(span)} of {len(blocks)} may go. "
            "Lower it, or keep_first or keep_last."
        )
    if asked < len(blocks):
        return asked
    if len(blocks) == 1:
        raise ConfigError(
            f"[prune] {wish} means all {len(blocks)} blocks of the model. Lower it, or raise "
            "keep_first or keep_last."
        )
    log.warning(
        "[prune] %s means all %d blocks of the model; the most important one is kept. Lower it.",
        wish,
        len(blocks),
    )
    return asked - 1


def _check_finite(scores: dict[int, float]) -> None:
    """Names the block where the trouble begins."""
    bad = [index for index, score in scores.items() if not math.isfinite(score)]
    if not bad:
        return
    raise RankAdaptorError(
        f"Layer {bad[-1]}: the score is not finite in {len(bad)} of {len(scores)} layers, this "
        'being the topmost. Set dtype = "float32" or "bfloat16", or use other calibration text.'
    )


_DEPENDS_ON_DEPTH = ("config", "layer_idx", "has_sliding_layers")
"""Attributes of stock modules that `keep_layers` may change."""


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Removes all decoder blocks but some, in place; the rest is as if built with so many.

    The model gets a config of its own, as other models may share the old one.

    Args:
        model: A stock causal language model.
        kept: Indices of the blocks that stay, ascending.

    Raises:
        ConfigError: If the indices are no ascending choice of the model's blocks.
        UnsupportedModelError: If the blocks cannot be found, or would not work at another place.
    """
    check_removable(model)
    blocks, wanted = block_list(model), set(kept)
    if not kept or list(kept) != [i for i in range(len(blocks)) if i in wanted]:
        raise ConfigError(
            f"The blocks to keep, {list(kept)}, are not ascending indices from 0 to "
            f"{len(blocks) - 1}. Name at least one, and each once."
        )
    config = _shorter(model.config, kept)
    set_config(model, config)
    for index in reversed(range(len(blocks))):
        if index not in wanted:
            del blocks[index]
    part: Any
    for part in model.modules():
        if hasattr(part, "has_sliding_layers"):
            part.has_sliding_layers = "sliding_attention" in config.layer_types
    # A cache has one place per block, so that old numbers may point beyond its end.
    for index, block in enumerate(blocks):
        for part in block.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = index


@contextmanager
def without_layer(model: PreTrainedModel, index: int) -> Iterator[None]:
    """Takes one decoder block out of a model, and puts it back afterwards.

    Raises:
        ConfigError: If there is no such block, or it is the only one.
        UnsupportedModelError: See `keep_layers`.
    """
    blocks = block_list(model)
    if not 0 <= index < len(blocks):
        raise ConfigError(
            f"There is no block {index} to leave out. Name one from 0 to {len(blocks) - 1}."
        )
    block = blocks[index]
    state = [
        (part, {name: vars(part)[name] for name in _DEPENDS_ON_DEPTH if name in vars(part)})
        for part in model.modules()
    ]
    keep_layers(model, [i for i in range(len(blocks)) if i != index])
    try:
        yield
    finally:
        blocks.insert(index, block)
        for part, attributes in state:
            vars(part).update(attributes)


def block_list(model: PreTrainedModel) -> nn.ModuleList:
    """Finds the list of decoder blocks.

    Raises:
        UnsupportedModelError: If the family is not supported, or the list is not at its place.
    """
    path = structure_of(model).layers
    try:
        blocks = model.get_submodule(path)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of decoder blocks at {path}. Give the causal "
            "language model itself, without adapters around it."
        )
    return blocks


def check_removable(model: PreTrainedModel) -> None:
    """Makes blocks work as before after others are removed.

    Raises:
        UnsupportedModelError: If they do not.
    """
    if model.config.model_type.startswith(PREFIX):
        raise UnsupportedModelError(
            f'The model is of type "{model.config.model_type}", so its blocks differ in width '
            "already. Give the base model."
        )
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedModelError(
            "config.scale_attn_by_inverse_layer_idx is on: the blocks above a removed one would "
            'change. Use a model without it, or [prune] method = "width".'
        )


def _shorter(old: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
    """Copies a config and limits what it says about single blocks to those that stay."""
    config, count = copy.deepcopy(old), old.num_hidden_layers
    for name, value in vars(old).items():
        # By name too, since a list of end-of-text tokens may happen to have that length.
        if "layer" in name and isinstance(value, list | tuple) and len(value) == count:
            setattr(config, name, type(value)(value[i] for i in kept))
    config.num_hidden_layers = len(kept)
    if hasattr(old, "max_window_layers"):  # the blocks below it have full attention
        config.max_window_layers = sum(i < old.max_window_layers for i in kept)
    return config
