"""The shape that pruning leaves, found without weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.config.tables import PruneConfig
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.pruning.cutting import Pruner

BUILT_IN = ("width", "channel", "depth")


def shape_after(
    pruner: Pruner,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PruneConfig,
) -> PrunedModel | None:
    """Prunes a model on the meta device, at random: as much goes as in earnest.

    Args:
        pruner: The pruner that the table names.
        model: The base model on the meta device; it is changed.
        tokenizer: Its tokenizer.
        config: The ``[prune]`` table.

    Returns:
        The pruned model, on the meta device; None for a plugin's pruner, which may need weights.

    Raises:
        RankAdaptorError: If the table does not fit the model, as the pruner says it.
    """
    if config.method not in BUILT_IN:
        return None
    log = logging.getLogger("rankadaptor_plugin.pruning")
    before = log.level
    log.setLevel(logging.ERROR)  # the pruner will say it again
    try:
        with torch.random.fork_rng(devices=[]):
            return pruner(model, tokenizer, [], replace(config, importance="random"))
    finally:
        log.setLevel(before)
