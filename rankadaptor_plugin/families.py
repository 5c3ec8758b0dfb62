"""The maps of the families that come with the package: one `Structure` each.

What is not named is as in Llama. docs/families.md says how to add one.
"""

from __future__ import annotations

from rankadaptor_plugin.modeling_rankadaptor import Structure

_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")

LLAMA = Structure(model_type="llama", norms=_LLAMA_NORMS)
"""Llama 1, 2 and 3, and Vicuna."""

MISTRAL = Structure(model_type="mistral", norms=_LLAMA_NORMS)

QWEN2 = Structure(model_type="qwen2", norms=_LLAMA_NORMS)

QWEN3 = Structure(model_type="qwen3", norms=_LLAMA_NORMS)

# No norms: Gemma scales its embeddings by the hidden size, which so cannot be pruned.
GEMMA = Structure(model_type="gemma")

GEMMA2 = Structure(model_type="gemma2")

GEMMA3 = Structure(model_type="gemma3_text")

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
    GEMMA3,
    PHI3,
    OPT,
    GPT_NEOX,
    BLOOM,
    FALCON,
    GPT2,
)
