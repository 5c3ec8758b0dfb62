"""What can be known of pruning without weights: errors in its table, and the shape it leaves."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.pruning.depth import check_importance
from rankadaptor_plugin.pruning.importance import check_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.config.tables import PruneConfig
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.pruning.cutting import Pruner

_BUILT_IN = ("width", "channel", "depth")


def check(config: PruneConfig, pruner: Pruner, model_config: PreTrainedConfig) -> None:
    """Checks a ``[prune]`` table before any weight is loaded.

    Args:
        config: The table.
        pruner: What its method names. A pruner of a plugin may have an attribute
            ``check(config, model_config)``, which raises what is wrong.
        model_config: Configuration of the base model.

    Raises:
        ConfigError: If a name is unknown, a file is missing, or no layer is left to prune.
    """
    text = config.calibration
    if text and not Path(text).is_file():
        raise ConfigError(
            f"The calibration text {text} does not exist. Correct [prune] calibration, or leave it "
            "empty."
        )
    if config.method in ("width", "channel"):
        check_names(config)
    if config.method == "depth":
        check_importance(config)
    if config.method in ("width", "depth"):
        config.layers(model_config.get_text_config().num_hidden_layers)
    if plugin_check := getattr(pruner, "check", None):
        plugin_check(config, model_config)


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
    if config.method not in _BUILT_IN:
        return None
    log = logging.getLogger("rankadaptor_plugin.pruning")
    before = log.level
    log.setLevel(logging.ERROR)  # the pruner will say it again
    try:
        with torch.random.fork_rng(devices=[]):
            return pruner(model, tokenizer, [], replace(config, importance="random"))
    finally:
        log.setLevel(before)
