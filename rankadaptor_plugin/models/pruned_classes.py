"""Turns models whose layers were cut into classes that save and load, and registers those.

Importing this module registers nothing; `register` is called for a family when one of its pruned
configs is asked for (see `rankadaptor_plugin.models.registration`).
"""

from __future__ import annotations

import copy
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rankadaptor_plugin.core.errors import UnsupportedModelError
from rankadaptor_plugin.models.modeling_rankadaptor import (
    pruned_config_class,
    pruned_model_class,
    structure_entry,
)
from rankadaptor_plugin.models.structures import (
    decoder_layers,
    layer_widths,
    set_config,
    structure_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rankadaptor_plugin.models.units import ModelShape


def stock_class(model: PreTrainedModel) -> Any:
    """Returns the transformers class of a model, pruned or not.

    Raises:
        UnsupportedModelError: If it is no causal LM of transformers.
    """
    stock = getattr(type(model), "stock_class", type(model))
    config_class = getattr(stock, "config_class", None)
    # Asked by its config: a look at all classes would import every model of transformers.
    if config_class is None or MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None) is not stock:
        raise UnsupportedModelError(
            f"The model is a {type(model).__name__}. Give a causal LM of transformers without "
            "adapters."
        )
    return stock


def is_pruned(model: PreTrainedModel) -> bool:
    """Returns whether a model is of a pruned class already."""
    return hasattr(type(model), "stock_class")


def register(stock: Any) -> tuple[Any, Any]:
    """Makes ``AutoModelForCausalLM`` load pruned models of a stock class.

    Returns:
        The config class and the model class of pruned models.
    """
    config_class, model_class = pruned_config_class(stock.config_class), pruned_model_class(stock)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


def to_pruned(model: PreTrainedModel, base: ModelShape) -> PreTrainedModel:
    """Turns a model whose layers were cut into the class that can be saved, in place.

    The forward pass stays the same.

    Args:
        model: The model; its hidden size is that of its config.
        base: The shape before pruning, layers that were left out not counted.

    Raises:
        UnsupportedModelError: If the class or the shapes of the model are not supported.
    """
    structure, widths, stock = structure_of(model), layer_widths(model), stock_class(model)
    for index, (width, was) in enumerate(zip(widths, base.layers, strict=True)):
        if any(a > b for a, b in zip(astuple(width), astuple(was), strict=True)):
            raise UnsupportedModelError(
                f"Layer {index} has {width}, more than {was} before pruning according to the "
                "base model's config. Set the config back to the sizes of the base model."
            )
    config_class, model_class = register(stock)
    config = copy.deepcopy(model.config)
    config.__class__ = config_class
    config.allow_global_per_layer_attribute_access = True
    for key, value in structure.to_config(base.layers[0]).items():
        setattr(config, key, value)
    config.structure = structure_entry(structure)
    config.per_layer_config = {i: structure.to_config(w) for i, w in enumerate(widths)}
    config.architectures = [model_class.__name__]
    set_config(model, config)
    # Of the file that the base came from: transformers would write old names again, which it
    # translates back for stock model types alone.
    model._weight_conversions = None
    for layer, width in zip(decoder_layers(model), widths, strict=True):
        structure.repair(layer, width)
    model.__class__ = model_class
    return model
