"""PEFT beyond its documented interface, and what of torch has no public name, in one place.

``tests/recovery/test_peft_internals.py`` names what breaks where a later version lacks one of them.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING

from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.incremental_pca import IncrementalPCA
from peft.utils.integrations import dequantize_module_weight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = [
    "ADALORA_ALLOCATOR",
    "ADALORA_LAYER",
    "LORA_LAYER",
    "WRAPPED",
    "WRAPPER",
    "BaseTunerLayer",
    "IncrementalPCA",
    "Linear",
    "LoraLayer",
    "dequantize_module_weight",
    "has_hooks",
    "without_old_name",
]

WRAPPER = "base_model.model."
"""Prefix of PEFT before the names of the model below."""

WRAPPED = ".base_layer."
"""Part that PEFT adds to the name of a matrix that has an adapter."""

LORA_LAYER = (
    *("lora_A", "lora_B", "lora_dropout", "lora_variant", "scaling", "r", "base_layer"),
    *("active_adapters", "disable_adapters", "merged"),
)
"""Attributes of a LoRA layer that are read here."""

ADALORA_LAYER = ("lora_A", "lora_B", "lora_E", "ranknum", "scaling", "r")
"""Attributes of an AdaLoRA layer that are read here."""

ADALORA_ALLOCATOR = ("target_bgt", "exp_avg_ipt", "mask_to_budget")
"""Attributes of AdaLoRA's rank allocator that are read or set here."""


def has_hooks(module: nn.Module) -> bool:
    """True if something is called before or after a module's own forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


@contextlib.contextmanager
def without_old_name() -> Iterator[None]:
    """Hides that PEFT 0.21 asks for an attribute that transformers 5.23 has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield
