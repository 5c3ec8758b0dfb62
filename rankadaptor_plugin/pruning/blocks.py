"""Takes decoder blocks out of a model so that a plain, shorter Hugging Face model stays."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from rankadaptor_plugin.core.errors import ConfigError, UnsupportedModelError
from rankadaptor_plugin.models.modeling_rankadaptor import PREFIX
from rankadaptor_plugin.models.structures import set_config, structure_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedConfig, PreTrainedModel

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
            f"The blocks to keep, {list(kept)}, are no ascending choice from 0 to "
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
    """Sees to it that blocks work as before when others are gone.

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
