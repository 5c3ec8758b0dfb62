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

from rankadaptor_plugin.errors import ConfigError
from rankadaptor_plugin.importance import unit_scores
from rankadaptor_plugin.pruned_model import PrunedModel
from rankadaptor_plugin.pruning import provenance, remove
from rankadaptor_plugin.structures import layer_units, structure_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.config import PruneConfig
    from rankadaptor_plugin.units import Member, Units

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """The units of one kind in one layer.

    Attributes:
        layer: Number of the layer.
        name: ``"KV group"`` or ``"MLP channel"``.
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
        ConfigError: If no layer is left to prune, the importance is unknown, or the ratio cannot
            be had and ``if_emptied`` is ``"refuse"``.
        UnsupportedModelError: If the model is not supported.
        CorpusError: If the calibration sequences cannot be used.
        RankAdaptorError: If a gradient is not finite.
    """
    kinds = prunable(model, config)
    total = sum(p.numel() for p in model.parameters())
    ratio = unit_ratio(kinds, total, config)
    counts = layer_counts(kinds, ratio, config)  # complains before the scores are paid for
    scores = unit_scores(model, [kind.units for kind in kinds], samples, config)
    if config.ranking == "global":
        counts = _global_counts(kinds, scores, ratio, config)
    for kind, score, count in zip(kinds, scores, counts, strict=True):
        remove(kind.units, sorted(torch.argsort(score, stable=True)[:count].tolist()))
    pruned = PrunedModel.of(
        model, tokenizer, provenance(config, samples) | {"unit_ratio": round(ratio, 6)}
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
        for name, kind in zip(("KV group", "MLP channel"), units[index], strict=True):
            if kind:
                cost = sum(_cost(member) for member in kind)
                kinds.append(Kind(index, name, kind, len(kind[0].indices), cost))
    if not any(kind.name == "KV group" for kind in kinds):
        log.warning(
            'Of the model type "%s" only MLP channels are pruned: its ALiBi positions are tied to '
            "the number of heads.",
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
        return config.ratio
    low, high = 0.0, 1.0
    for _ in range(40):  # halves the interval below what a single channel makes out
        middle = (low + high) / 2
        if share_removed(kinds, total, middle, config) < config.ratio:
            low = middle
        else:
            high = middle
    return min(
        (low, high), key=lambda r: abs(share_removed(kinds, total, r, config) - config.ratio)
    )


def share_removed(kinds: Sequence[Kind], total: int, ratio: float, config: PruneConfig) -> float:
    """Returns the share of all parameters that go with a share of the units."""
    counts = (_count(kind, ratio, config) for kind in kinds)
    removed = sum(
        min(count, kind.count - 1) * kind.cost for kind, count in zip(kinds, counts, strict=True)
    )
    return removed / total


def layer_counts(kinds: Sequence[Kind], ratio: float, config: PruneConfig) -> list[int]:
    """Returns how many units of each kind go where all layers lose the same share.

    Raises:
        ConfigError: If that would be all units of a layer, and ``if_emptied`` is ``"refuse"``.
    """
    counts = [_count(kind, ratio, config) for kind in kinds]
    emptied = [kind for kind, count in zip(kinds, counts, strict=True) if count >= kind.count]
    if emptied:
        _emptied(
            f"[prune] ratio {config.ratio:g} would remove the last {emptied[0].name} of layer "
            f"{emptied[0].layer}",
            "one is kept",
            config,
        )
    return [min(count, kind.count - 1) for kind, count in zip(kinds, counts, strict=True)]


def _count(kind: Kind, ratio: float, config: PruneConfig) -> int:
    """Returns how many units of one kind go at a ratio, rounded as the run file asks."""
    return kind.count - _rounded(kind, int(kind.count * (1 - ratio) + 1e-9), config)


def _rounded(kind: Kind, kept: int, config: PruneConfig) -> int:
    step = config.round_to
    if kind.name != "MLP channel" or step == 1:
        return kept
    return min(kind.count, max(1, (2 * kept + step) // (2 * step)) * step)


def _global_counts(
    kinds: Sequence[Kind], scores: Sequence[torch.Tensor], ratio: float, config: PruneConfig
) -> list[int]:
    """Returns how many units of each kind go where those of one kind compete across layers.

    Scores are compared as they are: a loss that changes by as much counts the same everywhere.
    """
    counts = [0] * len(kinds)
    for name in ("KV group", "MLP channel"):
        own = [i for i, kind in enumerate(kinds) if kind.name == name]
        total = sum(kinds[i].count for i in own)
        wanted = total - int(total * (1 - ratio) + 1e-9)
        queue = []
        for i in own:
            least = -int(-kinds[i].count * config.floor // 1)
            most = int(kinds[i].count * config.ceiling)
            counts[i] = least
            ordered = scores[i].sort(stable=True).values.tolist()
            queue += [(score, i) for score in ordered[least:most]]
        missing = wanted - sum(counts[i] for i in own)
        if missing > len(queue):
            _emptied(
                f"[prune] ratio {config.ratio:g} would remove {wanted} of {total} {name}s, more "
                f"than ceiling {config.ceiling:g} allows",
                f"{wanted - missing + len(queue)} are removed",
                config,
            )
        for _, i in sorted(queue)[: max(0, missing)]:
            counts[i] += 1
        for i in own:
            counts[i] = kinds[i].count - _rounded(kinds[i], kinds[i].count - counts[i], config)
    return counts


def _emptied(problem: str, remedy: str, config: PruneConfig) -> None:
    if config.if_emptied == "refuse":
        raise ConfigError(f'{problem}. Lower it, or set if_emptied = "clamp".')
    log.warning("%s; %s. Lower it to prune as asked.", problem, remedy)


def _cost(member: Member) -> int:
    """Returns the parameters that one unit has in a matrix."""
    lines = member.indices.shape[1]
    if member.side == "in":
        return lines * member.weight.shape[0]
    return lines * (member.weight.shape[1] + (member.module.bias is not None))
