from __future__ import annotations

import json
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rankadaptor_plugin.core.errors import ArtifactError, UnsupportedModelError
from rankadaptor_plugin.models.footprint import shape_of
from rankadaptor_plugin.models.modeling_rankadaptor import (
    LayerWidths,
    PrunedLlamaConfig,
    PrunedLlamaForCausalLM,
)
from rankadaptor_plugin.models.pruned_model import RECORD, PrunedModel, load_pruned, to_pruned
from rankadaptor_plugin.models.registration import install
from rankadaptor_plugin.models.structures import layer_units
from rankadaptor_plugin.pruning.cutting import remove

TOKENS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(1))


# peft 0.21 asks transformers 5.23 by an outdated name.
OLD_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def tokenizer() -> PreTrainedTokenizerFast:
    words_to_ids = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}))
    words_to_ids.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words_to_ids)


def stock(dtype=torch.float32, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "bos_token_id": 94,
        "eos_token_id": 94,
    }
    # Not .to(dtype), which would also round the rotary frequencies, unlike from_pretrained.
    config = LlamaConfig(**{**sizes, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def pruned(dtype=torch.float32, **changes) -> PrunedModel:
    model = stock(dtype, **changes)
    units = layer_units(model)
    remove(units[1].attention, [0])
    remove(units[2].mlp, [3, 7, 11])
    return PrunedModel.of(model, tokenizer(), {"pruner": "test"})


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS.to(model.device), use_cache=False).logits


VARIANTS = [
    pytest.param({}, id="gqa"),
    pytest.param({"num_key_value_heads": 4, "tie_word_embeddings": True}, id="mha-tied"),
    pytest.param({"attention_bias": True, "mlp_bias": True}, id="biases"),
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_what_was_cut_is_described(changes):
    found = pruned(**changes)
    groups = changes.get("num_key_value_heads", 2)
    rest = groups - 1
    assert found.widths[0] == LayerWidths(4, groups, 24)
    assert found.widths[1] == LayerWidths(4 * rest // groups, rest, 24)
    assert found.widths[2] == LayerWidths(4, groups, 21)
    assert found.pruned_layers == (False, True, True, False)
    assert found.base_parameters == stock(**changes).num_parameters()
    assert found.parameters == found.model.num_parameters() < found.base_parameters


@pytest.mark.parametrize(
    "shares", [None, "0.5", [0.5], [0.5] * 5, [0.1, 0.2, 0.3, None], [0.0, 0.0, 0.0, 1.5]]
)
def test_importance_that_a_provenance_does_not_tell_is_unknown(shares):
    found = pruned()
    assert found.importance_lost is None
    found.provenance["importance_lost"] = shares
    assert found.importance_lost is None


def test_conversion_keeps_the_logits_and_other_models_of_the_config():
    model = stock()
    twin = LlamaForCausalLM(model.config)
    before = logits(model)
    to_pruned(model, shape_of(model))
    assert torch.equal(logits(model), before)
    assert type(model) is PrunedLlamaForCausalLM
    assert type(twin.config) is LlamaConfig
    assert model.model.layers[0].self_attn.config is model.config


def test_a_config_that_holds_pruned_sizes_is_an_error():
    model = stock(num_key_value_heads=4)
    for layer in layer_units(model):
        remove(layer.attention, [0])
    model.config.num_attention_heads = model.config.num_key_value_heads = 3
    with pytest.raises(UnsupportedModelError, match=r"no base model: .* \(32\) is not a multiple"):
        PrunedModel.of(model, tokenizer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", VARIANTS)
def test_loading_is_bit_equal(changes, dtype, tmp_path):
    kept = pruned(dtype, **changes)
    kept.save(tmp_path / "pruned")
    loaded = load_pruned(tmp_path / "pruned")
    assert loaded.record() == kept.record()
    assert loaded.model.dtype == dtype
    assert torch.equal(logits(loaded.model), logits(kept.model))
    assert loaded.tokenizer("w5 w6")["input_ids"] == [5, 6]
    assert sorted(p.suffix for p in (tmp_path / "pruned").iterdir()) == [
        *[".json"] * 5,
        ".safetensors",
    ]
    assert os.listdir(tmp_path) == ["pruned"]


def test_the_type_can_be_chosen(tmp_path):
    pruned().save(tmp_path / "pruned")
    assert load_pruned(tmp_path / "pruned", "cpu", torch.bfloat16).model.dtype == torch.bfloat16
    assert load_pruned(tmp_path / "pruned", "cpu", "float32").model.dtype == torch.float32


FRESH = """
import sys
{registration}
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
for name in ("float32", "bfloat16"):
    folder = sys.argv[1] + "/" + name
    model, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    AutoTokenizer.from_pretrained(folder)
    expected = load_file(folder + ".safetensors")
    with torch.no_grad():
        found = model(input_ids=expected["tokens"], use_cache=False).logits
    if not torch.equal(found, expected["logits"]) or any(notes.values()):
        sys.exit(name + " differs " + str(notes))
    model.save_pretrained(folder + "-again")
"""


@pytest.mark.parametrize(
    "registration",
    [
        "import rankadaptor_plugin.models.pruned_model",
        "import rankadaptor_plugin\nif 'torch' in sys.modules: sys.exit('torch was loaded')",
    ],
    ids=["eager", "lazy"],
)
def test_a_fresh_process_loads_with_plain_transformers(registration, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        kept = pruned(dtype)
        name = str(dtype).removeprefix("torch.")
        kept.save(tmp_path / name)
        expected = {"tokens": TOKENS, "logits": logits(kept.model)}
        save_file(expected, tmp_path / f"{name}.safetensors")
    code = FRESH.format(registration=registration)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "per-layer attribute" not in done.stderr  # transformers' warning, once a process


def test_names_are_added_at_once_where_transformers_is_already_there(monkeypatch):
    table = ModuleType("transformers.models.auto.configuration_auto")
    table.CONFIG_MAPPING_NAMES = {"llama": "LlamaConfig"}
    monkeypatch.setitem(sys.modules, table.__name__, table)
    before = list(sys.meta_path)
    install()
    name = table.CONFIG_MAPPING_NAMES["rankadaptor_llama"]
    assert sys.meta_path == before
    stand_in = sys.modules["transformers.models.rankadaptor_llama"]
    assert getattr(stand_in, name) is PrunedLlamaConfig
    assert not hasattr(stand_in, "__wrapped__")


def test_saving_replaces_a_pruned_model_and_leftovers_but_nothing_else(tmp_path):
    folder = tmp_path / "pruned"
    pruned().save(folder)
    (tmp_path / ".pruned.partial").mkdir()
    (tmp_path / ".pruned.partial" / "torn").touch()
    (folder / "stale").touch()
    pruned(torch.bfloat16).save(folder)
    assert os.listdir(tmp_path) == ["pruned"]
    assert not (folder / "stale").exists()
    assert load_pruned(folder).model.dtype == torch.bfloat16
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(ArtifactError, match="something other than a pruned model"):
        pruned().save(other)
    assert os.listdir(other) == ["thesis.tex"]


def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch):
    kept = pruned()
    kept.save(tmp_path / "pruned")
    broken = pruned()

    def fail(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(broken.tokenizer, "save_pretrained", fail)
    with pytest.raises(ArtifactError, match=r"cannot be written.*No space left"):
        broken.save(tmp_path / "pruned")
    assert os.listdir(tmp_path) == ["pruned"]
    load_pruned(tmp_path / "pruned")


def _edit(name, change):
    def spoil(folder):
        path = folder / name
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return spoil


def _cut_file(name, size):
    return lambda folder: os.truncate(folder / name, size)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / RECORD).unlink(), f"has no pruned model: {RECORD} is missing"),
        (_cut_file(RECORD, 20), f"{RECORD} cannot be read"),
        (lambda f: (f / RECORD).write_text("[]"), f"{RECORD} cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "has no valid (pruned )?model"),
        (_cut_file("model.safetensors", 3000), "has no valid (pruned )?model"),
        (_cut_file("config.json", 30), "has no valid (pruned )?model"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no valid (pruned )?model"),
        (
            _edit(RECORD, lambda r: r["footprint"].update(parameters=1)),
            f"{RECORD} describes another",
        ),
        (
            _edit("config.json", lambda c: c["per_layer_config"].pop("2")),
            "has no valid (pruned )?model",
        ),
    ],
)
def test_torn_folders_give_one_clear_line(spoil, message, tmp_path):
    folder = tmp_path / "pruned"
    pruned().save(folder)
    spoil(folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_pruned(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_and_a_stock_model_are_errors(tmp_path):
    with pytest.raises(ArtifactError, match="has no pruned model"):
        load_pruned(tmp_path / "nothing")
    stock().save_pretrained(tmp_path / "stock")
    with pytest.raises(ArtifactError, match="has no pruned model"):
        load_pruned(tmp_path / "stock")


def test_missing_weights_are_an_error(tmp_path):
    folder = tmp_path / "pruned"
    pruned().save(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight is missing"):
        load_pruned(folder)


@pytest.mark.filterwarnings(OLD_NAME)
def test_models_with_adapters_or_wrong_sizes_are_not_converted():
    wrapped = get_peft_model(stock(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match=r"PeftModel.*without adapters"):
        PrunedModel.of(wrapped, tokenizer())
    model = stock()
    model.config.intermediate_size = 20
    with pytest.raises(UnsupportedModelError, match=r"Layer 0 has .*channels=24.*channels=20"):
        PrunedModel.of(model, tokenizer())
