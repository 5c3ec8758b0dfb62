"""Weights and config.json are compared without reading weights, and the message says where."""

from __future__ import annotations

import contextlib
import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    Phi3Config,
)

from rankadaptor_plugin.core.errors import ArtifactError, UnsupportedModelError
from rankadaptor_plugin.models import checkpoints as checkpoint_check
from rankadaptor_plugin.models.checkpoints import check_checkpoint, header_shapes, meta_model
from rankadaptor_plugin.models.pruned_model import PrunedModel
from rankadaptor_plugin.models.structures import layer_units
from rankadaptor_plugin.pruning.cutting import remove

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.2.mlp.up_proj.weight"
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "bloom": BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=4),
    "falcon": FalconConfig(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=4, intermediate_size=24),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4),
    "gpt-neox": GPTNeoXConfig(**SIZES, intermediate_size=24),
    "opt": OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16),
    "phi3": Phi3Config(**SIZES, num_key_value_heads=2, intermediate_size=24, pad_token_id=0),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_llama, make_tokenizer):
    """Folders that are sound: a pruned model, and a stock one."""
    folder = tmp_path_factory.mktemp("made")
    model = make_llama(num_hidden_layers=3)
    model.save_pretrained(folder / "stock")
    units = layer_units(model)
    remove(units[1].attention, [0])
    remove(units[2].mlp, [3, 7, 11, 12])
    PrunedModel.of(model, make_tokenizer()).save(folder / "pruned")
    return SimpleNamespace(stock=folder / "stock", pruned=folder / "pruned", model=model)


@pytest.fixture
def pruned(made, tmp_path):
    """A copy of the pruned model that may be spoilt."""
    for file in made.pruned.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def sharded(made, tmp_path):
    made.model.save_pretrained(tmp_path, max_shard_size="3KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def edit(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reweigh(folder, change):
    weights = load_file(folder / SINGLE)
    change(weights)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})


def fails(folder, message):
    with pytest.raises(ArtifactError, match=message) as caught:
        check_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_sound_folders_pass_and_give_the_model(made):
    found = check_checkpoint(made.pruned)
    assert type(found) is type(made.model)
    assert found.device.type == "meta"
    assert {n: p.shape for n, p in found.named_parameters()} == {
        n: p.shape for n, p in made.model.named_parameters()
    }
    assert type(check_checkpoint(made.stock)).__name__ == "LlamaForCausalLM"
    assert header_shapes(made.pruned)[UP] == (20, 16)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("limit", ["5GB", "4KB"], ids=["one-file", "shards"])
def test_stock_models_of_all_kinds_pass(name, limit, tmp_path):
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=limit)
    assert check_checkpoint(tmp_path).dtype == torch.bfloat16


def test_no_weight_is_read(made, monkeypatch):
    opened = checkpoint_check.safe_open

    @contextlib.contextmanager
    def headers(*args, **settings):
        with opened(*args, **settings) as file:
            yield SimpleNamespace(
                keys=file.keys,
                get_slice=lambda name: SimpleNamespace(get_shape=file.get_slice(name).get_shape),
            )

    monkeypatch.setattr(checkpoint_check, "safe_open", headers)
    check_checkpoint(made.pruned)


def test_the_first_contradiction_is_named(pruned):
    config = json.loads((pruned / "config.json").read_text())
    config["per_layer_config"]["2"]["intermediate_size"] = 24
    edit(pruned, "config.json", per_layer_config=config["per_layer_config"])
    gate = r"model\.layers\.2\.mlp\.gate_proj\.weight"
    fails(pruned, rf"{gate} has shape \(20, 16\) in the weights but \(24, 16\) by config\.json")


def test_a_missing_tensor_is_named(pruned):
    reweigh(pruned, lambda weights: weights.pop(UP))
    fails(pruned, rf"{UP} is missing in the weights")


def test_an_unknown_tensor_is_named(pruned):
    later, new = (UP.replace(".2.", f".{i}.") for i in (10, 9))
    reweigh(pruned, lambda w: w.update({later: torch.zeros(20, 16), new: torch.zeros(20, 16)}))
    fails(pruned, rf"{new} is in the weights, but in no model")


def test_buffers_of_older_transformers_are_no_contradiction(made, tmp_path):
    made.model.save_pretrained(tmp_path)
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    reweigh(tmp_path, lambda weights: weights.update({old: torch.zeros(2)}))
    check_checkpoint(tmp_path)


def test_names_without_the_prefix_of_the_base_model_pass(tmp_path):
    AutoModelForCausalLM.from_config(CONFIGS["gpt2"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / SINGLE)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    bare["h.0.attn.bias"] = torch.zeros(1, 1, 4, 4)
    save_file(bare, tmp_path / SINGLE, metadata={"format": "pt"})
    check_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_of_tied_weights_either_may_be_missing(kept, make_llama, tmp_path):
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    reweigh(tmp_path, lambda w: w.update({kept: w.pop("model.embed_tokens.weight")}))
    check_checkpoint(tmp_path)
    reweigh(tmp_path, lambda w: w.pop(kept))
    fails(tmp_path, "embed_tokens.weight is missing")


@pytest.mark.parametrize("size", [0, 5, 300, 4000])
def test_a_torn_file_is_named(pruned, size):
    os.truncate(pruned / SINGLE, size)
    fails(pruned, r"model\.safetensors is corrupt \(")


def test_a_torn_or_missing_shard_is_named(sharded):
    check_checkpoint(sharded)
    file = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(file, file.stat().st_size - 1)
    fails(sharded, f"{file.name} is corrupt")
    file.unlink()
    fails(sharded, f"the file '{file.name}' of .* is missing")


def test_the_index_and_the_shards_must_agree(sharded):
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    files = list(index.values())
    name, file = next((n, f) for n, f in index.items() if files.count(f) > 1)
    edit(sharded, INDEX, weight_map={n: f for n, f in index.items() if n != name})
    fails(sharded, f"{name} of {file} is missing in {INDEX}")
    edit(sharded, INDEX, weight_map={**index, "other.weight": file})
    fails(sharded, f"other.weight is not in {file}, where {INDEX} says it is")
    edit(sharded, INDEX, weight_map={**index, "other.weight": "../elsewhere.safetensors"})
    fails(sharded, r"'\.\./elsewhere\.safetensors' of .* is missing")
    edit(sharded, INDEX, weight_map=[])
    fails(sharded, "has no weight_map")
    (sharded / INDEX).write_text("{")
    fails(sharded, f"{INDEX} cannot be read")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth"])
def test_pickled_weights_are_refused(pruned, name):
    (pruned / SINGLE).rename(pruned / name)
    fails(pruned, rf"holds pickled weights \({name}\), which are rejected.*save_pretrained")


def test_no_weights_at_all(pruned, tmp_path):
    (pruned / SINGLE).unlink()
    fails(pruned, f"neither {SINGLE} nor {INDEX}")
    with pytest.raises(ArtifactError, match=r"does not exist\. Give a folder"):
        header_shapes(tmp_path / "nothing")


def test_a_config_that_cannot_be_used(pruned):
    edit(pruned, "config.json", structure={"nonsense": 1})
    fails(pruned, "no model can be built from config.json: .*nonsense")
    (pruned / "config.json").write_text("[]")
    fails(pruned, "config.json is not a table")
    (pruned / "config.json").write_text('{"model')
    fails(pruned, "config.json cannot be read")
    (pruned / "config.json").unlink()
    fails(pruned, "config.json is missing")


def test_families_and_weights_that_are_not_supported(pruned):
    edit(pruned, "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModelError, match=r"quantized \(gptq\)"):
        check_checkpoint(pruned)
    edit(pruned, "config.json", quantization_config=None, model_type="mamba")
    with pytest.raises(UnsupportedModelError, match='type "mamba" is not supported'):
        check_checkpoint(pruned)


def test_a_family_that_transformers_lacks(pruned, monkeypatch):
    monkeypatch.setattr(checkpoint_check, "CONFIG_MAPPING", {})
    with pytest.raises(UnsupportedModelError, match="no causal language model of type"):
        meta_model(pruned)


def test_code_in_the_folder_is_not_run(pruned):
    (pruned / "evil.py").write_text("raise SystemExit('ran')")
    edit(pruned, "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    check_checkpoint(pruned)
