"""Weights in 8 or 4 bits while a pruned model is fine-tuned (bitsandbytes; QLoRA, 2305.14314)."""

from __future__ import annotations

import importlib.util

import torch
from transformers import BitsAndBytesConfig

from rankadaptor_plugin.core.errors import ConfigError


def quantization_config(
    quantize: str, device: torch.device, dtype: str | torch.dtype
) -> BitsAndBytesConfig | None:
    """Returns what ``from_pretrained`` takes to quantize a model while it loads.

    Nothing is loaded here, so that it can be called early, to see whether it will work.

    Args:
        quantize: ``"8bit"``, ``"4bit"``, or empty for weights as they are.
        device: Where the model will be.
        dtype: Type to compute in; ``"auto"`` takes bfloat16. The int8 kernels have their own.

    Returns:
        None for weights as they are. 4 bits are NF4 with quantized constants, as in QLoRA.

    Raises:
        ConfigError: If the device is no CUDA GPU, or bitsandbytes is not installed.
    """
    if not quantize:
        return None
    if quantize not in ("8bit", "4bit"):
        raise ConfigError(f'quantize is "{quantize}". Allowed: "8bit", "4bit", or "" for neither.')
    if device.type != "cuda":
        raise ConfigError(
            f'quantize is "{quantize}", which needs a CUDA GPU, but the device is {device}. Set '
            'quantize = "", or run where there is a GPU.'
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f'quantize is "{quantize}", which needs bitsandbytes. Install it with: pip install '
            '"rankadaptor-plugin[quant]"'
        )
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
    )
