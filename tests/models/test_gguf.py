"""A depth-pruned, merged export is what llama.cpp's converter reads for the Llama architecture.

The converter itself is in no package, so its steps for Llama are done here with the `gguf` package:
the names through its map, the rows of queries and keys permuted, the keys of config.json written.
What comes out is read back by transformers.
"""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rankadaptor_plugin.config.tables import PruneConfig
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.pipeline.export import export
from rankadaptor_plugin.pruning.depth import prune_depth
from rankadaptor_plugin.recovery.adapters import attach

TOKENS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings(
    # peft 0.21 asks transformers 5.23 by an outdated name.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.fixture(scope="module")
def merged(tmp_path_factory, make_llama, make_tokenizer):
    """The merged export of a Llama of six layers that has lost three."""
    run = tmp_path_factory.mktemp("gguf")
    settings = PruneConfig(
        method="depth", importance="magnitude", pruning_ratio=0.5, keep_first=0, keep_last=0
    )
    model = make_llama(num_hidden_layers=6)
    pruned = prune_depth(model, make_tokenizer(), [TOKENS[0]], settings)
    pruned.save(run / "pruned")
    adapted = attach(pruned.model, RankAllocation((2, 3, 4)), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    adapted.save_pretrained(run / "adapter")
    for name in ("inputs.json", "report.json"):
        (run / name).write_text("{}")
    export(run, "merged", run / "model")
    return run / "model"


def test_every_tensor_has_a_name_at_the_new_depth(merged):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    tensors = load_file(merged / "model.safetensors")
    assert len(tensors) == 3 * 9 + 3
    mapped = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensors}
    assert None not in mapped
    assert len(mapped) == len(tensors)
    known = set(gguf.MODEL_TENSORS[gguf.MODEL_ARCH.LLAMA])
    assert {names.get_type(name, try_suffixes=(".weight",)) for name in tensors} <= known


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Orders the rows of a head as GGUF has them: the halves of a rotated pair side by side."""
    return (
        weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
    )


def test_a_gguf_file_of_it_computes_the_same(merged, tmp_path):
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_name("pruned")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(merged / "model.safetensors").items():
        if "q_proj" in name:
            tensor = permuted(tensor, config["num_attention_heads"])
        if "k_proj" in name:
            tensor = permuted(tensor, config["num_key_value_heads"])
        new = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(new, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert type(found) is LlamaForCausalLM
    expected = AutoModelForCausalLM.from_pretrained(merged)
    assert torch.equal(logits(found), logits(expected))
