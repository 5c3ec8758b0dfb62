"""Base models by any name: the Hub's cache, GGUF files, and what is said where there is none."""

from __future__ import annotations

import gguf
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import errors
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.core.errors import ConfigError, UnsupportedModelError
from rankadaptor_plugin.core.hub import hub_problem
from rankadaptor_plugin.models.checkpoints import check_folder, load_tokenizer
from rankadaptor_plugin.models.sources import model_source, quantized_before

COMMIT = "a" * 40


def source(model, **settings):
    return model_source(
        run_file.from_dict(
            {
                "model": str(model),
                "output": "run",
                "corpus": {"path": "rows.jsonl"},
                "oracle": {"tasks": ["a"]},
                **settings,
            }
        )
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the Hub, which cannot be reached."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def cached(hub, model, tokenizer=None, name="owner/name"):
    """Puts a model into the cache, as a download leaves it there."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    model.save_pretrained(snapshot)
    if tokenizer:
        tokenizer.save_pretrained(snapshot)
    for revision in ("main", "v1"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("revision", ["", "v1", COMMIT])
def test_a_name_on_the_hub_is_the_folder_of_its_cache(hub, make_llama, make_tokenizer, revision):
    snapshot = cached(hub, make_llama(), make_tokenizer())
    found = source("owner/name", revision=revision)
    assert found == snapshot
    check_folder(found)
    assert load_tokenizer(found)("w1")["input_ids"] == [4]


def test_a_folder_goes_before_a_name_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert source("owner/name").samefile(tmp_path / "owner" / "name")


def test_a_family_that_is_not_supported_is_told_before_its_weights_are_downloaded(hub, make_llama):
    snapshot = cached(hub, make_llama())
    (snapshot / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UnsupportedModelError, match="cannot be pruned"):
        source("owner/name")


def test_without_the_hub_it_is_said_how_to_download(hub):
    with pytest.raises(ConfigError, match=r"no-such is not on this machine, and the Hub cannot be"):
        source("owner/no-such")
    with pytest.raises(ConfigError, match=r"network: hf download owner/no-such$"):
        source("owner/no-such", revision="v1")


def test_a_revision_needs_the_hub(tmp_path):
    with pytest.raises(ConfigError, match=r'revision is "v1", but the model .* is not on the Hub'):
        source(tmp_path, revision="v1")


class Response:
    """What the Hub's client keeps of an answer."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, r"is gated\. Accept its terms .* hf auth login"),
        (errors.RepositoryNotFoundError, "neither on this machine nor on the Hub"),
        (errors.RevisionNotFoundError, 'no revision "v1"'),
    ],
)
@pytest.mark.parametrize("is_cause", [False, True])
def test_what_to_do_follows_from_the_answer_of_the_hub(kind, message, is_cause):
    error = kind("no", response=Response())
    if is_cause:
        outer = RuntimeError("the data library's own")
        outer.__cause__ = error
        error = outer
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(hub_problem("model", "owner/name", error, "v1"))
    line = hub_problem("dataset", "owner/name", ConnectionError("no route"))
    assert line.endswith("hf download owner/name --repo-type dataset")


@pytest.fixture
def gguf_file(tmp_path, monkeypatch):
    """A Llama in a GGUF file whose matrices are quantized to 8 bits, and its config."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(architecture="llama"):
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(2)
        writer.add_context_length(64)
        writer.add_embedding_length(32)
        writer.add_feed_forward_length(64)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(10000.0)
        writer.add_vocab_size(259)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
        tokens = ["<unk>", "<s>", "</s>", "w", "1", *(f"w{i}" for i in range(1, 255))]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_merges(["w 1"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        generator = torch.Generator().manual_seed(0)

        def add(name, *shape):
            weight = torch.randn(shape, generator=generator).numpy()
            if len(shape) == 1:
                writer.add_tensor(name, weight)
            else:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)

        add("token_embd.weight", 259, 32)
        add("output.weight", 259, 32)
        add("output_norm.weight", 32)
        for i in range(2):
            for name, shape in (
                ("attn_norm", (32,)),
                ("ffn_norm", (32,)),
                ("attn_q", (32, 32)),
                ("attn_k", (16, 32)),
                ("attn_v", (16, 32)),
                ("attn_output", (32, 32)),
                ("ffn_gate", (64, 32)),
                ("ffn_up", (64, 32)),
                ("ffn_down", (32, 64)),
            ):
                add(f"blk.{i}.{name}.weight", *shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def test_a_gguf_file_is_dequantized_once_and_says_so(gguf_file, caplog):
    path = gguf_file()
    folder = source(path, dtype="float32")
    assert "is dequantized (Q8_0) to float32 once: quantization came before pruning" in caplog.text
    assert quantized_before(folder) == "Q8_0"
    check_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.float32
    assert isinstance(load_tokenizer(folder).backend_tokenizer.model, BPE)
    assert load_tokenizer(folder)("w")["input_ids"][-1:] == [3]
    row = gguf.GGUFReader(path).get_tensor(0)
    expected = gguf.quants.dequantize(row.data, row.tensor_type)
    assert torch.equal(model.get_input_embeddings().weight, torch.from_numpy(expected))
    caplog.clear()
    assert source(path, dtype="float32") == folder
    assert not caplog.text
    assert source(path, dtype="bfloat16") != folder  # as exact as the run asks for


def test_a_folder_was_not_quantized(tmp_path):
    assert quantized_before(tmp_path) == ""


def test_a_gguf_file_that_cannot_be_used_is_told_in_one_line(gguf_file, tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.gguf does not exist\. Set model to a GGUF"):
        source(tmp_path / "missing.gguf")
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"torn\.gguf cannot be read as GGUF"):
        source(torn)
    with pytest.raises(UnsupportedModelError, match='its architecture is "mamba"'):
        source(gguf_file("mamba"))
    assert not list(tmp_path.glob("cache/**/*.safetensors"))
