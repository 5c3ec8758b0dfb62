"""The base model of a run: what is wrong with a folder is said before any work."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM

from rankadaptor_plugin.core.errors import ArtifactError, ConfigError, UnsupportedModelError
from rankadaptor_plugin.models.checkpoints import (
    check_folder,
    load_model,
    load_tokenizer,
)
from rankadaptor_plugin.models.device import (
    attending,
    faster_attention,
    resolve_device,
    resolve_dtype,
    set_attention,
    threads,
)
from rankadaptor_plugin.models.transformers_internals import attention_of

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, make_llama, make_tokenizer):
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_folder_loads_as_it_was_saved(tmp_path, make_llama, make_tokenizer, tied):
    saved = make_llama(tie_word_embeddings=tied)
    saved.save_pretrained(tmp_path, max_shard_size="5KB")
    make_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert isinstance(check_folder(tmp_path), LlamaForCausalLM)
    model = load_model(tmp_path, device=CPU, dtype=torch.float32).train(False)
    tokens = torch.arange(9)[None]
    assert model(tokens).logits.equal(saved(tokens).logits)
    half = load_model(tmp_path, device=CPU, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert not half.training
    assert load_tokenizer(tmp_path)("w1")["input_ids"] == [4]


def test_a_missing_folder_is_a_config_error(tmp_path):
    with pytest.raises(
        ConfigError, match=r"none does not exist\. Set model to a Hugging Face folder"
    ):
        check_folder(tmp_path / "none")


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"[]", b"\xff", b'{"model_type": ["llama"]}', b'{"architectures": "Llama"}'],
)
def test_a_folder_without_a_readable_config_is_a_config_error(folder, content):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"has no readable config\.json \(.*Set model to a Huggi"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
            "model .BertForMaskedLM|not a ca",
        ),
        (
            {"architectures": None, "model_type": "vit"},
            r"architecture vit\)\. Set model to a decoder",
        ),
        (
            {"architectures": None, "model_type": ""},
            r"not a causal language model \(architecture unkn",
        ),
        (
            {"architectures": ["GPTJForCausalLM"], "model_type": "gptj"},
            r'cannot be pruned. The model type "gptj" is not supported\. Use .* llama, ',
        ),
        ({"architectures": None, "model_type": "gptj"}, '"gptj" is not supported'),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts .*_experts 8"),
        ({"model_type": "rankadaptor_llama"}, "already pruned .*base model that it was made from"),
    ],
)
def test_a_model_of_another_kind_is_named(folder, config, message):
    change_config(folder, **config)
    with pytest.raises(UnsupportedModelError, match=message):
        check_folder(folder)


def test_a_config_without_architectures_is_judged_by_its_family(folder):
    change_config(folder, architectures=None)
    assert isinstance(check_folder(folder), LlamaForCausalLM)


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"pickled weights \(pytorch_model.bin\), which are"):
        check_folder(folder)


def test_torn_weights_are_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnsupportedModelError, match=r"cannot be loaded: .*all its files are whole"):
        load_model(folder, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"num_hidden_layers": 3}, r"its weights lack model\.layers\.2\.input_layernorm\.weight"),
        ({"intermediate_size": 8}, "mismatch"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(folder, config, reason):
    change_config(folder, **config)
    with pytest.raises(UnsupportedModelError, match=f"cannot be loaded: .*{reason}"):
        load_model(folder, device=CPU, dtype=torch.float32)


def test_a_torn_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match=r"The tokenizer in .* cannot be loaded"):
        load_tokenizer(folder)


def test_a_tokenizer_without_padding_pads_with_its_end(folder, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).pad_token == "</s>"  # noqa: S105


@pytest.mark.parametrize("device", ["gpu", "", "cuda:", "cuda:x", "cuda:-1", "mps", "meta", "CPU"])
def test_a_device_that_does_not_exist_is_a_config_error(device):
    with pytest.raises(ConfigError, match=r"Allowed: auto, cpu, cuda, cuda:0 and so on"):
        resolve_device(device)


def test_attention_is_set_and_put_back(make_llama):
    model = make_llama()
    set_attention(model, "auto")
    assert attention_of(model) == "sdpa"
    with attending(model, "eager"):
        assert attention_of(model) == "eager"
    assert attention_of(model) == "sdpa"
    with attending(model, ""):
        assert attention_of(model) == "sdpa"
    set_attention(model, "eager")
    assert attention_of(model) == "eager"


def test_attention_that_a_model_lacks_is_a_config_error():
    config = BloomConfig(n_layer=1, hidden_size=16, n_head=2, vocab_size=40)
    with pytest.raises(ConfigError, match='attention is "sdpa", which BloomForCausalLM does not'):
        set_attention(BloomForCausalLM(config), "sdpa")


def test_the_faster_attention_is_looked_for_in_bfloat16_alone(make_llama):
    tokens = torch.arange(3, 19).reshape(2, 8)
    model = make_llama()
    assert faster_attention(model, tokens) == "sdpa"
    model.set_attn_implementation("eager")
    assert faster_attention(model.to(torch.bfloat16), tokens) == "eager"  # as it was asked for
    model.set_attn_implementation("sdpa")
    assert faster_attention(model, tokens) in {"sdpa", "eager"}
    assert attention_of(model) == "sdpa"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_threads_keep_to_the_cores_at_hand(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    with threads(0):
        assert torch.get_num_threads() == 1
    with threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("device", ["cuda:99", "cuda:200"])
def test_a_gpu_that_is_not_there_is_a_config_error(device):
    with pytest.raises(ConfigError, match=r"but torch sees \d+ GPUs\. Set device"):
        resolve_device(device)


def test_auto_takes_what_is_there():
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    has_units = torch.cpu.get_capabilities().get("amx_bf16", False)
    assert resolve_dtype("auto", CPU) == (torch.bfloat16 if has_units else torch.float32)
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("float16", CPU) == torch.float16
