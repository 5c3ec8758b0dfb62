"""The pruner "channel": channel-wise LLM-Pruner (arXiv 2305.11627), which cuts the hidden size.

A hidden channel runs through the whole model: embeddings, norms, every matrix of every layer, and
the output layer. So there is no range of layers here, and all layers lose the same.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.models.modeling_rankadaptor import take
from rankadaptor_plugin.models.pruned_model import PrunedModel
from rankadaptor_plugin.models.structures import decoder_layers, hidden_units, structure_of
from rankadaptor_plugin.pruning.cutting import (
    importance_lost,
    note_unused,
    provenance,
    remove,
    rounded,
    set_hidden_size,
    warn_of_too_much,
)
from rankadaptor_plugin.pruning.importance import unit_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.config.tables import PruneConfig

log = logging.getLogger(__name__)


def prune_channel(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[torch.Tensor],
    config: PruneConfig,
) -> PrunedModel:
    """Removes the least important hidden channels, in place.

    A channel is scored by its weights in the matrices of all layers. Almost all parameters are
    proportional to the hidden size, so that ``ratio_of`` makes no difference here.

    Args:
        model: The base model, of a Llama-type family.
        tokenizer: Its tokenizer.
        samples: Calibration sequences, each of shape (t,), int64.
        config: The ``[prune]`` table; the range of layers is not used.

    Raises:
        ConfigError: If the importance is unknown, or nothing would be removed.
        UnsupportedModelError: If the model is not supported.
        CorpusError: If the calibration sequences cannot be used.
        RankAdaptorError: If a weight or a gradient is not finite.
    """
    note_unused(config, "global_pruning", "max_pruning_ratio", "blocks")
    units = hidden_units(model)
    hidden = model.config.hidden_size
    kept = rounded(max(1, int(hidden * (1 - config.pruning_ratio) + 1e-9)), config.round_to, hidden)
    if int(hidden * (1 - config.pruning_ratio) + 1e-9) < 1:
        warn_of_too_much(
            f"[prune] pruning_ratio {config.pruning_ratio:g} would remove all {hidden} hidden "
            "channels",
            f"{kept} stay",
        )
    if kept == hidden:
        raise ConfigError(
            f"[prune] pruning_ratio {config.pruning_ratio:g} removes no hidden channel once they "
            f"are rounded to multiples of {config.round_to}. Raise it or lower round_to."
        )
    base_config = copy.deepcopy(model.config)
    # A layer's own scores of the channels only say what it loses; the sums over layers decide.
    size = len(structure_of(model).matrices)
    own = [units[start : start + size] for start in range(0, len(units), size)]
    score, *shares = unit_scores(model, [units, *own], samples, config)
    removed = sorted(torch.argsort(score, stable=True)[: hidden - kept].tolist())
    remove(units, removed)
    _cut_the_rest(model, removed, hidden)
    set_hidden_size(model, kept)
    lost = importance_lost(len(own), ((i, s, removed) for i, s in enumerate(shares)), config)
    pruned = PrunedModel.of(
        model, tokenizer, provenance(config, samples) | lost, base_config=base_config
    )
    log.info(
        "Pruned the hidden size from %d to %d: %d of %d parameters are left.",
        hidden,
        kept,
        pruned.parameters,
        pruned.base_parameters,
    )
    return pruned


def _cut_the_rest(model: PreTrainedModel, removed: Sequence[int], hidden: int) -> None:
    """Cuts embeddings, norms and output layer."""
    structure = structure_of(model)
    kept: Any = torch.ones(hidden, dtype=torch.bool)
    kept[list(removed)] = False
    kept = kept.nonzero().flatten()
    norms = [
        layer.get_submodule(name) for layer in decoder_layers(model) for name in structure.norms
    ]
    for norm in (*norms, model.get_submodule(structure.final_norm)):
        weight = norm.get_parameter("weight")
        norm.weight = nn.Parameter(
            weight.detach()[kept.to(weight.device)].clone(), requires_grad=weight.requires_grad
        )
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embeddings.weight
    weight = embeddings.weight
    embeddings.weight = nn.Parameter(
        weight.detach()[:, kept.to(weight.device)].clone(), requires_grad=weight.requires_grad
    )
    embeddings.embedding_dim = len(kept)
    if tied:
        head.weight, head.in_features = embeddings.weight, len(kept)
    else:
        take(head, slice(None), kept.to(head.weight.device))
