"""Checks of the ``[prune]`` table that need no weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.pruning.depth import check_importance
from rankadaptor_plugin.pruning.importance import check_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from rankadaptor_plugin.config.tables import PruneConfig
    from rankadaptor_plugin.pruning.cutting import Pruner


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
