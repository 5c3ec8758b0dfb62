"""transformers beyond its documented interface, in one place.

`modeling_rankadaptor` is copied into exports and has to stand alone, so the one private method that
it overrides, ``_can_set_attn_implementation``, stays there.
``tests/models/test_transformers_internals.py`` names what breaks where a later version lacks one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def attention_of(model: PreTrainedModel) -> str:
    """Returns the name of the attention kernels that a model uses, such as ``sdpa``."""
    return str(model.config._attn_implementation)


def ignored_keys(model: PreTrainedModel) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns patterns of tensors that a checkpoint may have, and of those that it may lack."""
    return (
        tuple(model._keys_to_ignore_on_load_unexpected or ()),
        tuple(model._keys_to_ignore_on_load_missing or ()),
    )


def forget_quantization(model: PreTrainedModel) -> None:
    """Makes a dequantized model save as one that never was quantized."""
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None


def forget_weight_names(model: PreTrainedModel) -> None:
    """Makes a model save its weights under its own names.

    transformers would write those of the file that the model came from, which it translates back
    for stock model types alone.
    """
    model._weight_conversions = None


def from_config(
    model_class: Any, config: PreTrainedConfig, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Builds a model of a given class, with initial weights of a type."""
    model: PreTrainedModel = model_class._from_config(config, dtype=dtype)
    return model
