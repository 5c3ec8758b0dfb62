"""The pruner "width": block-wise LLM-Pruner (arXiv 2305.11627), as the paper uses it.

The least important attention units and MLP channels of the layers in a range go (arXiv 2406.15734,
section 2); layers at the bottom and the top stay whole. Either every layer loses the same share,
or the units of one kind compete across layers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.models.pruned_model import PrunedModel
from rankadaptor_plugin.models.structures import decoder_layers, layer_units, structure_of
from rankadaptor_plugin.pruning.cutting import (
    importance_lost,
    note_unused,
    provenance,
    remove,
    rounded,
    warn_of_too_much,
)
from rankadaptor_plugin.pruning.importance import unit_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.config.tables import PruneConfig
    from rankadaptor_plugin.models.structures import Member, Units

log = logging.getLogger(__name__)

GROUP, CHANNEL = "KV group", "MLP channel"
_TINY = 1e-9  # 10 * (1 - 0.9) is 0.999...


@dataclass(frozen=True)
class Kind:
    """The units of one kind in one layer.

    Attributes:
        layer: Number of the layer.
        name: `GROUP` or `CHANNEL`.
        units: Their matrices.
        count: Number of units.
        cost: Parameters of one unit, biases included.
    """

    layer: int
    name: str
    units: Units
    count: int
    cost: int


def prune_width(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[torch.Tensor],
    config: PruneConfig,
) -> PrunedModel:
    """Removes the least important units, in place.

    Of C units ``C - int(C * (1 - ratio))`` go, as in LLM-Pruner, but never the last one.

    Args:
        model: The base model, of a supported family.
        tokenizer: Its tokenizer.
        samples: Calibration sequences, each of shape (t,), int64.
        config: The ``[prune]`` table.

    Raises:
        ConfigError: If no layer is left to prune, the importance is unknown, or nothing would
            be removed.
        UnsupportedModelError: If the model is not supported.
        CorpusError: If the calibration sequences cannot be used.
        RankAdaptorError: If a weight or a gradient is not finite.
    """
    note_unused(config, "blocks")
    kinds = prunable(model, config)
    ratio = unit_ratio(kinds, sum(p.numel() for p in model.parameters()), config)
    # Both say what is wrong before the scores are paid for.
    is_global = config.global_pruning
    counts = [] if is_global else layer_counts(kinds, ratio, config)
    totals = global_totals(kinds, ratio, config) if is_global else {}
    scores = unit_scores(model, [kind.units for kind in kinds], samples, config)
    if is_global:
        counts = _global_counts(kinds, scores, totals, config)
    if not any(counts):
        raise ConfigError(
            f"[prune] pruning_ratio {config.pruning_ratio:g} removes nothing with "
            "max_pruning_ratio "
            f"{config.max_pruning_ratio:g} and round_to {config.round_to}. Raise one of the two "
            "ratios, or lower round_to."
        )
    parts = []
    for kind, score, count in zip(kinds, scores, counts, strict=True):
        removed = sorted(torch.argsort(score, stable=True)[:count].tolist())
        remove(kind.units, removed)
        parts.append((kind.layer, score, removed))
    lost = importance_lost(len(decoder_layers(model)), parts, config)
    pruned = PrunedModel.of(
        model, tokenizer, provenance(config, samples) | {"unit_ratio": ratio} | lost
    )
    log.info(
        "Pruned layers %d to %d by %.3g of their units: %d of %d parameters are left.",
        kinds[0].layer,
        kinds[-1].layer,
        ratio,
        pruned.parameters,
        pruned.base_parameters,
    )
    return pruned


def prunable(model: PreTrainedModel, config: PruneConfig) -> list[Kind]:
    """Lists what may be pruned of the layers in the range, bottom first.

    Raises:
        ConfigError: If no layer is left to prune.
        UnsupportedModelError: If the model is not supported.
    """
    units = layer_units(model)
    kinds = []
    for index in config.layers(len(units)):
        for name, kind in zip((GROUP, CHANNEL), units[index], strict=True):
            if kind:
                cost = sum(_cost(member) for member in kind)
                kinds.append(Kind(index, name, kind, len(kind[0].indices), cost))
    if not any(kind.name == GROUP for kind in kinds):
        log.warning(
            'Of the model type "%s" only MLP channels are pruned: its heads cannot be removed '
            "(docs/families.md).",
            structure_of(model).model_type,
        )
    return kinds


def unit_ratio(kinds: Sequence[Kind], total: int, config: PruneConfig) -> float:
    """Returns the share of the units in the range to remove.

    Where the ratio is one of all parameters, it is the share of units that comes nearest: 0.25
    within layers 4 to 29 removes 0.195 of LLaMA-7B.

    Args:
        kinds: What may be pruned.
        total: Parameters of the whole model.
        config: The ``[prune]`` table.
    """
    if config.ratio_of == "units":
        return config.pruning_ratio
    low, high = 0.0, 1.0
    for _ in range(40):  # halves the interval below what a single channel makes out
        middle = (low + high) / 2
        if share_removed(kinds, total, middle, config) < config.pruning_ratio:
            low = middle
        else:
            high = middle
    return min(
        (low, high),
        key=lambda r: abs(share_removed(kinds, total, r, config) - config.pruning_ratio),
    )


def share_removed(kinds: Sequence[Kind], total: int, ratio: float, config: PruneConfig) -> float:
    """Returns the share of all parameters that go with a share of the units."""
    if not config.global_pruning:
        return sum(_layer_count(kind, ratio, config) * kind.cost for kind in kinds) / total
    removed = 0.0
    for own in _by_name(kinds).values():
        count = min(_wanted(own, ratio), sum(_most(kind, config) for kind in own))
        removed += count * sum(kind.cost for kind in own) / len(own)
    return removed / total


def layer_counts(kinds: Sequence[Kind], ratio: float, config: PruneConfig) -> list[int]:
    """Returns the number of units of each kind to remove if all layers lose the same share."""
    emptied = next((kind for kind in kinds if _kept(kind.count, ratio) < 1), None)
    if emptied:
        warn_of_too_much(
            f"[prune] pruning_ratio {config.pruning_ratio:g} would remove the last "
            f"{emptied.name} of layer {emptied.layer}",
            "one is kept",
        )
    counts = [_layer_count(kind, ratio, config) for kind in kinds]
    for kind, count in zip(kinds, counts, strict=True):
        if not count:
            log.warning(
                "[prune] round_to %d leaves all %d %ss of layer %d. Lower it to prune them.",
                config.round_to,
                kind.count,
                kind.name,
                kind.layer,
            )
    return counts


def global_totals(kinds: Sequence[Kind], ratio: float, config: PruneConfig) -> dict[str, int]:
    """Returns the number of units of each kind to remove from all layers if they compete."""
    totals = {}
    for name, own in _by_name(kinds).items():
        most = sum(_most(kind, config) for kind in own)
        wanted, count = _wanted(own, ratio), sum(kind.count for kind in own)
        if wanted > most:
            warn_of_too_much(
                f"[prune] pruning_ratio {config.pruning_ratio:g} asks for {wanted} of {count} "
                f"{name}s, more than max_pruning_ratio {config.max_pruning_ratio:g} allows",
                f"{most} go",
            )
        totals[name] = min(wanted, most)
    return totals


def _global_counts(
    kinds: Sequence[Kind],
    scores: Sequence[torch.Tensor],
    totals: dict[str, int],
    config: PruneConfig,
) -> list[int]:
    """Shares the totals out among the layers.

    Scores are compared as they are: a loss that changes by as much counts the same everywhere.
    """
    counts = [0] * len(kinds)
    for name, total in totals.items():
        own = [i for i, kind in enumerate(kinds) if kind.name == name]
        queue = []
        for i in own:
            lowest = scores[i].sort(stable=True).values[: _most(kinds[i], config)]
            queue += [(score, i) for score in lowest.tolist()]
        for _, i in sorted(queue)[:total]:
            counts[i] += 1
    return [
        kind.count - _rounded_within(kind, kind.count - count, config)
        for kind, count in zip(kinds, counts, strict=True)
    ]


def _by_name(kinds: Sequence[Kind]) -> dict[str, list[Kind]]:
    return {name: [k for k in kinds if k.name == name] for name in {k.name: None for k in kinds}}


def _most(kind: Kind, config: PruneConfig) -> int:
    """Returns the most units of a kind that a layer may lose to global pruning."""
    return min(int(kind.count * config.max_pruning_ratio + _TINY), kind.count - 1)


def _wanted(kinds: Sequence[Kind], ratio: float) -> int:
    total = sum(kind.count for kind in kinds)
    return total - _kept(total, ratio)


def _layer_count(kind: Kind, ratio: float, config: PruneConfig) -> int:
    """Returns the number of units of one kind to remove at a ratio; one always stays."""
    return kind.count - _rounded(kind, max(1, _kept(kind.count, ratio)), config)


def _kept(count: int, ratio: float) -> int:
    return int(count * (1 - ratio) + _TINY)


def _rounded_within(kind: Kind, kept: int, config: PruneConfig) -> int:
    """Rounds to the nearest multiple that leaves enough units, if there is one."""
    least = kind.count - _most(kind, config)
    if kind.name != CHANNEL:
        return kept
    steps = range(config.round_to, kind.count + 1, config.round_to)
    allowed = [count for count in steps if count >= least]
    return min(allowed, key=lambda count: abs(count - kept), default=kept)


def _rounded(kind: Kind, kept: int, config: PruneConfig) -> int:
    return rounded(kept, config.round_to, kind.count) if kind.name == CHANNEL else kept


def _cost(member: Member) -> int:
    """Returns the parameters that one unit has in a matrix."""
    lines = member.indices.shape[1]
    if member.side == "in":
        return lines * member.weight.shape[0]
    return lines * (member.weight.shape[1] + (member.module.bias is not None))
