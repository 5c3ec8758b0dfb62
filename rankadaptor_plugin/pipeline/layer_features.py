"""Features of the layers of a pruned model, by which one model's studies can help another's.

The features of a slot, one column each:
    relative_depth: Place of its layer in the base model, 0 = bottom, 1 = top.
    parameters_pruned: Share of the parameters of the slot's matrices that pruning took, in [0, 1].
        Removed layers count with the next one above that stayed, or with the topmost.
    importance_lost: Share of the layer's importance that pruning took, in [0, 1], the mean over the
        layers that count with it.
    log_spectral_norm: Natural logarithm of the largest singular value, mean over its matrices.
    log_stable_rank: Natural logarithm of the stable rank, that is of the squared Frobenius norm
        over the squared spectral norm; mean over its matrices.
    cost_share: Share of the parameters of uniform LoRA that lie in the slot, in [0, 1].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.models.structures import (
    decoder_layers,
    group_matrices,
    is_transposed,
    structure_of,
)
from rankadaptor_plugin.search.space import LayerFeatures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from rankadaptor_plugin.core.ranks import RankSpace
    from rankadaptor_plugin.models.modeling_rankadaptor import Structure
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.models.structures import ModelShape

NAMES = (
    "relative_depth",
    "parameters_pruned",
    "importance_lost",
    "log_spectral_norm",
    "log_stable_rank",
    "cost_share",
)

_EXACT = 512
"""Up to so many rows or columns all singular values are computed, 0.1 s a matrix at most."""

_SKETCH, _PASSES = 12, 4
"""Directions and power iterations for larger matrices: the norm comes out at most 6 % too low, in
matrices of noise alone, and exact to six digits where it stands out."""


def layer_features(pruned: PrunedModel, space: RankSpace) -> LayerFeatures:
    """Measures the slots of a pruned model's rank space.

    The memory holds one matrix at a time in float32, on the CPU. A matrix of LLaMA-7B takes about
    half a second on one core.

    Args:
        pruned: The pruned model; weights that are quantized or offloaded make features unknown.
        space: Its rank space.

    Returns:
        The features `NAMES` of each slot.

    Raises:
        RankSpaceError: If the space is not that of this model.
    """
    structure = structure_of(pruned.model)
    groups = next((g for g in group_matrices(structure).values() if tuple(g) == space.groups), None)
    layers = decoder_layers(pruned.model)
    if groups is None or space.layers != len(layers):
        raise RankSpaceError(
            f"A rank space of {space.layers} layers with the groups {list(space.groups)} is not "
            f"that of this model: it has {len(layers)} layers of type {structure.model_type}."
        )
    spans = _spans(pruned.kept_layers, len(pruned.base_shape.layers))
    lost = pruned.importance_lost
    rows = []
    for index, (layer, number, span) in enumerate(
        zip(layers, pruned.kept_layers, spans, strict=True)
    ):
        depth = number / max(len(pruned.base_shape.layers) - 1, 1)
        importance = math.nan if lost is None else float(np.mean([lost[i] for i in span]))
        norms = {name: _norms(layer.get_submodule(name)) for name in structure.matrices}
        for names in groups.values():
            share = _share_pruned(pruned, structure, index, layer, span, names)
            spectral, stable = np.mean([norms[name] for name in names], axis=0)
            rows.append([depth, share, importance, spectral, stable])
    costs = np.array(space.costs, dtype=np.float64)
    return LayerFeatures(NAMES, np.column_stack([np.array(rows), costs / costs.sum()]))


def _spans(kept: Sequence[int], total: int) -> list[range]:
    """Returns for each kept layer the layers of the base model that count with it."""
    ends = [*(number + 1 for number in kept[:-1]), total]
    return [range(start, end) for start, end in zip((0, *ends[:-1]), ends, strict=True)]


def _share_pruned(
    pruned: PrunedModel,
    structure: Structure,
    index: int,
    layer: nn.Module,
    span: Sequence[int],
    names: Sequence[str],
) -> float:
    def parameters(shape: ModelShape, number: int) -> int:
        shapes = structure.shapes(layer, shape.layers[number], shape.hidden)
        return sum(math.prod(shapes[name]) for name in names)

    before = sum(parameters(pruned.base_shape, number) for number in span)
    return 1 - parameters(pruned.shape, index) / before


@torch.no_grad()
def _norms(matrix: Any) -> tuple[float, float]:
    """Returns the logarithms of spectral norm and stable rank; NaN if they cannot be had."""
    weight = matrix.weight
    if weight.is_meta or not weight.is_floating_point():
        return math.nan, math.nan
    weight = weight.detach().to("cpu", torch.float32)
    weight = weight.T if is_transposed(matrix) else weight
    spectral, frobenius = _spectral_norm(weight), float(torch.linalg.vector_norm(weight))
    if not (0 < spectral < math.inf and frobenius < math.inf):
        return math.nan, math.nan
    return math.log(spectral), max(2 * math.log(frobenius / spectral), 0.0)


def _spectral_norm(weight: torch.Tensor) -> float:
    """Returns the largest singular value; of large matrices by a randomized decomposition."""
    if not weight.isfinite().all():
        return math.nan
    if min(weight.shape) <= _EXACT:
        return float(torch.linalg.matrix_norm(weight, ord=2))
    with torch.random.fork_rng(devices=[]):  # torch's sketch takes the global generator
        torch.manual_seed(0)
        return float(torch.svd_lowrank(weight, q=_SKETCH, niter=_PASSES)[1][0])
