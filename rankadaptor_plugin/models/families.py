"""The model families that can be pruned: one `Structure` each, and the table of all.

What a map does not name is as in Llama. docs/families.md says how to add one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rankadaptor_plugin.core.errors import PluginError, UnsupportedModelError
from rankadaptor_plugin.models import registration as lazy_registration
from rankadaptor_plugin.models.modeling_rankadaptor import PREFIX, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")

LLAMA = Structure(model_type="llama", norms=_LLAMA_NORMS)
"""Llama 1, 2 and 3, and Vicuna."""

MISTRAL = Structure(model_type="mistral", norms=_LLAMA_NORMS)

QWEN2 = Structure(model_type="qwen2", norms=_LLAMA_NORMS)

QWEN3 = Structure(model_type="qwen3", norms=_LLAMA_NORMS)

# No norms: Gemma scales its embeddings by the hidden size, which so cannot be pruned.
GEMMA = Structure(model_type="gemma")

GEMMA2 = Structure(model_type="gemma2")

GEMMA3_TEXT = Structure(model_type="gemma3_text")

PHI3 = Structure(
    model_type="phi3",
    query_key_value=("self_attn.qkv_proj",),
    expand=("mlp.gate_up_proj",),
    expand_blocks=2,
    norms=_LLAMA_NORMS,
    own_config=True,
)

OPT = Structure(
    model_type="opt",
    layers="model.decoder.layers",
    output="self_attn.out_proj",
    expand=("fc1",),
    contract="fc2",
    kv_heads_key="",
    channels_key="ffn_dim",
)

GPT_NEOX = Structure(
    model_type="gpt_neox",
    layers="gpt_neox.layers",
    attention="attention",
    head_size="head_size",
    query_key_value=("attention.query_key_value",),
    interleaved=True,
    output="attention.dense",
    expand=("mlp.dense_h_to_4h",),
    contract="mlp.dense_4h_to_h",
    kv_heads_key="",
)
"""Pythia and GPT-NeoX-20B."""

BLOOM = Structure(
    model_type="bloom",
    layers="transformer.h",
    attention="self_attention",
    query_key_value=("self_attention.query_key_value",),
    interleaved=True,
    output="self_attention.dense",
    expand=("mlp.dense_h_to_4h",),
    contract="mlp.dense_4h_to_h",
    heads_key="n_head",
    kv_heads_key="",
    prunable_heads=False,
)

FALCON = Structure(
    model_type="falcon",
    layers="transformer.h",
    attention="self_attention",
    query_key_value=("self_attention.query_key_value",),
    interleaved=True,
    output="self_attention.dense",
    expand=("mlp.dense_h_to_4h",),
    contract="mlp.dense_4h_to_h",
    kv_heads_key="num_kv_heads",
    channels_key="ffn_hidden_size",
    cached_per_query=True,
)

GPT2 = Structure(
    model_type="gpt2",
    layers="transformer.h",
    attention="attn",
    query_key_value=("attn.c_attn",),
    output="attn.c_proj",
    expand=("mlp.c_fc",),
    contract="mlp.c_proj",
    heads_key="n_head",
    kv_heads_key="",
    channels_key="n_inner",
)

BUILT_IN = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3_TEXT,
    PHI3,
    OPT,
    GPT_NEOX,
    BLOOM,
    FALCON,
    GPT2,
)

_FAMILIES = {structure.model_type: structure for structure in BUILT_IN}
# Where configs say how many experts they have.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def register_family(structure: Structure) -> None:
    """Makes a family known to the whole process, as transformers does with its own.

    Raises:
        PluginError: If another map has the same model type.
    """
    known = _FAMILIES.setdefault(structure.model_type, structure)
    if known != structure:
        raise PluginError(
            f'The model type "{structure.model_type}" has a map already that differs from the new '
            "one. Remove one of the two plugins."
        )
    stock = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(structure.model_type)
    if isinstance(stock, str):  # then AutoModelForCausalLM can load what was pruned
        lazy_registration.add(structure.model_type, stock)


def supported_families() -> tuple[str, ...]:
    """Returns the model types that can be pruned."""
    return tuple(sorted(_FAMILIES))


def hidden_size_families() -> tuple[str, ...]:
    """Returns the model types whose hidden size can be pruned."""
    return tuple(name for name in supported_families() if _FAMILIES[name].norms)


def family_of(config: PreTrainedConfig | dict[str, Any]) -> Structure:
    """Returns the map of a family by the config of a model, pruned or not.

    Raises:
        UnsupportedModelError: If the family is not supported.
    """
    get = config.get if isinstance(config, dict) else lambda key: getattr(config, key, None)
    model_type = str(get("model_type") or "unknown")
    if experts := next((key for key in _EXPERTS if get(key)), None):
        raise UnsupportedModelError(
            f'The model type "{model_type}" is a mixture of experts ({experts} {get(experts)}), '
            f"which is not supported. Use a dense model of type {', '.join(supported_families())}."
        )
    structure = _FAMILIES.get(model_type.removeprefix(PREFIX))
    if structure is None:
        raise UnsupportedModelError(
            f'The model type "{model_type}" is not supported. Use a model of type '
            f"{', '.join(supported_families())}, or add the family by a plugin (docs/families.md)."
        )
    return structure
