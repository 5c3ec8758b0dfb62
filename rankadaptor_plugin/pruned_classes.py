"""Model classes whose layers differ in width.

Stock transformers classes give every layer the same width, so each family has a subclass of its
own with the model type ``rankadaptor_<family>``. Its config keeps the sizes before pruning as
global values and the widths of cut layers under transformers' native key ``per_layer_config``.
Importing this module registers the classes, after which the ordinary
``AutoModelForCausalLM.from_pretrained(folder)`` loads such a folder.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rankadaptor_plugin.errors import UnsupportedModelError
from rankadaptor_plugin.structures import (
    PRUNED_PREFIX,
    base_widths,
    decoder_layers,
    layer_widths,
    structure_of,
)
from rankadaptor_plugin.units import LayerWidths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Only warns when a global value of an uneven config is read, and ours are meant to be.
logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").setLevel("ERROR")


class PrunedLlamaConfig(LlamaConfig):  # type: ignore[misc] # transformers is untyped to us
    """A Llama config with widths of its own for some layers."""

    model_type = PRUNED_PREFIX + "llama"

    def __post_init__(self, **kwargs: Any) -> None:
        # The global values are the sizes before pruning, and anyone may read them as such.
        kwargs["allow_global_per_layer_attribute_access"] = True
        super().__post_init__(**kwargs)


class PrunedLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc] # transformers is untyped
    """A Llama with widths of its own for some layers."""

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # builds all layers with the global values
        structure = structure_of(self)
        for layer, own in zip(decoder_layers(self), config.per_layer_config, strict=True):
            structure.resize(layer, LayerWidths.from_config(own), config.hidden_size)


_FAMILIES = {"llama": (LlamaForCausalLM, PrunedLlamaConfig, PrunedLlamaForCausalLM)}

for _stock, _config, _model in _FAMILIES.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)


def to_pruned(model: PreTrainedModel) -> PreTrainedModel:
    """Turns a model whose layers were cut into the class that can be saved, in place.

    The forward pass stays the same. The config's global values must be the sizes before pruning.

    Raises:
        UnsupportedModelError: If the class or the shapes of the model are not supported.
    """
    structure, widths, base = structure_of(model), layer_widths(model), base_widths(model)
    stock, config_class, model_class = _FAMILIES[structure.model_type]
    if type(model) not in (stock, model_class):
        raise UnsupportedModelError(
            f"The model is a {type(model).__name__}. Give a {stock.__name__} without adapters."
        )
    for index, (layer, width) in enumerate(zip(decoder_layers(model), widths, strict=True)):
        if any(now > was for now, was in zip(astuple(width), astuple(base), strict=True)):
            raise UnsupportedModelError(
                f"Layer {index} has {width}, more than {base} before pruning according to the "
                "model's config. Set the config back to the sizes of the base model."
            )
        structure.repair(layer, width)
    old = model.config
    config = copy.deepcopy(old)  # other models may share the old one
    config.__class__ = config_class
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = {i: w.to_config() for i, w in enumerate(widths)}
    config.architectures = [model_class.__name__]
    try:
        config.validate()  # saving would, too late
    except StrictDataclassError as error:
        raise UnsupportedModelError(
            f"The model's config is that of no base model: {str(error).splitlines()[-1].strip()} "
            "Set it back to the sizes of the base model."
        ) from error
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config
    model.__class__ = model_class
    return model
