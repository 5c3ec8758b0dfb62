"""Built-in model families."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin import hookimpl

if TYPE_CHECKING:
    from rankadaptor_plugin.modeling_rankadaptor import Structure
    from rankadaptor_plugin.registry import Registry

_MAPS = {
    "bloom": "BLOOM",
    "falcon": "FALCON",
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "gpt2": "GPT2",
    "gpt_neox": "GPT_NEOX",
    "llama": "LLAMA",
    "mistral": "MISTRAL",
    "opt": "OPT",
    "phi3": "PHI3",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
}


@hookimpl
def rankadaptor_register_families(register: Registry[Structure]) -> None:
    """Registers the maps of `rankadaptor_plugin.families`."""
    for model_type, name in _MAPS.items():
        register(model_type, f"rankadaptor_plugin.families:{name}")
