"""Every built-in family and variant passes the suite; what is no family of ours is refused."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rankadaptor_plugin.core.errors import PluginError, UnsupportedModelError
from rankadaptor_plugin.core.registry import Registry
from rankadaptor_plugin.hooks import builtin
from rankadaptor_plugin.models import families as table
from rankadaptor_plugin.models import registration as lazy_registration
from rankadaptor_plugin.models import structures
from rankadaptor_plugin.models.checkpoints import check_folder
from rankadaptor_plugin.models.families import BUILT_IN
from rankadaptor_plugin.models.modeling_rankadaptor import PREFIX, Structure
from rankadaptor_plugin.testing.families import FamilyConformance

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
GQA = {**SIZES, "num_key_value_heads": 2}
GEMMA = {**GQA, "head_dim": 8}
SHORT_NAMES = {**SIZES, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 24, "n_positions": 64}
FALCON = {**SIZES, "ffn_hidden_size": 24, "new_decoder_architecture": False}
EAGER = {"attentions": ("eager",)}
# transformers 5.23: with ALiBi, Falcon itself fails on a static cache.
NO_STATIC = {"static_cache": False}

# Config and model class, config values, attributes of the suite.
VARIANTS = {
    "llama": ("Llama", SIZES, {}),
    "llama-gqa": ("Llama", GQA, {}),
    "llama-mqa": ("Llama", {**SIZES, "num_key_value_heads": 1}, {}),
    "llama-biases-tied": (
        "Llama",
        {**GQA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {},
    ),
    "mistral": ("Mistral", {**GQA, "sliding_window": 6}, {}),
    "qwen2": ("Qwen2", GQA, {}),
    "qwen3": ("Qwen3", {**GQA, "head_dim": 8}, {}),
    "gemma": ("Gemma", GEMMA, {}),
    "gemma2": ("Gemma2", {**GEMMA, "query_pre_attn_scalar": 8, "sliding_window": 6}, EAGER),
    "gemma3": ("Gemma3Text", {**GEMMA, "query_pre_attn_scalar": 8, "sliding_window": 6}, {}),
    "phi3": ("Phi3", SIZES, {}),
    "phi3-gqa": ("Phi3", GQA, {}),
    "opt": ("OPT", {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 32}, {}),
    "gpt-neox": ("GPTNeoX", SIZES, {}),
    "bloom": ("Bloom", {**SIZES, "n_layer": 4, "n_head": 4}, EAGER),
    "falcon-multi-query": ("Falcon", FALCON, {}),
    "falcon-gqa": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, {}),
    "falcon-classic": ("Falcon", {**FALCON, "multi_query": False}, {}),
    "falcon-alibi": ("Falcon", {**FALCON, "multi_query": False, "alibi": True}, NO_STATIC),
    "gpt2": ("GPT2", SHORT_NAMES, {}),
}


def tiny(variant: str, **changes):
    name, values, _ = VARIANTS[variant]
    config = getattr(transformers, f"{name}Config")(**{**values, **changes})
    return transformers.AutoModelForCausalLM.from_config(config)


class TestBuiltIn(FamilyConformance):
    @pytest.fixture(autouse=True, params=VARIANTS)
    def variant(self, request):
        self.name = request.param
        for attribute, value in VARIANTS[self.name][2].items():
            setattr(self, attribute, value)

    def model(self, attention):
        return tiny(self.name, attn_implementation=attention)


# ----------------------------------------------------------------------- what is no family of ours

EXPERTS = {
    "Mixtral": {"num_local_experts": 2},
    "Qwen2Moe": {"num_experts": 2, "moe_intermediate_size": 8},
    "Qwen3Moe": {"num_experts": 2, "moe_intermediate_size": 8},
    "Olmoe": {"num_experts": 2},
    "GraniteMoe": {"num_local_experts": 2},
}


def refused(model, folder) -> list[str]:
    """The messages for a model in memory and for its folder, where no weights are needed."""
    with pytest.raises(UnsupportedModelError) as in_memory:
        structures.structure_of(model)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    with pytest.raises(UnsupportedModelError) as on_disk:
        check_folder(folder)
    return [str(in_memory.value), str(on_disk.value)]


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts_is_refused_in_one_line(name, tmp_path):
    config = getattr(transformers, f"{name}Config")(**SIZES, **EXPERTS[name])
    model = transformers.AutoModelForCausalLM.from_config(config)
    for message in refused(model, tmp_path):
        assert f'The model type "{config.model_type}" is a mixture of experts (num' in message
        assert "\n" not in message
        assert "Use a dense model of type bloom, falcon, gemma," in message


def test_an_unknown_family_is_named_with_the_list_of_all(tmp_path):
    config = transformers.GPTJConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=2, rotary_dim=2)
    known = ", ".join(sorted(structure.model_type for structure in BUILT_IN))
    for message in refused(transformers.GPTJForCausalLM(config), tmp_path):
        assert 'The model type "gptj" is not supported' in message
        assert f"Use a model of type {known}, or add the family by a plugin" in message
    with pytest.raises(UnsupportedModelError, match='"Linear" is not supported'):
        structures.structure_of(torch.nn.Linear(1, 1))


# ------------------------------------------------------------------------------ families of others


@pytest.fixture
def families(monkeypatch):
    """The table of the process, as it was before when the test is over."""
    monkeypatch.setattr(table, "_FAMILIES", dict(table._FAMILIES))


# The norms of queries and keys span all heads, so these stay; all norms come after the matrices.
OLMO2 = Structure(
    model_type="olmo2",
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    prunable_heads=False,
)


class TestOlmo2(FamilyConformance):
    @pytest.fixture(autouse=True)
    def known(self, families):
        table.register_family(OLMO2)

    def model(self, attention):
        config = transformers.Olmo2Config(**GQA, attn_implementation=attention)
        return transformers.Olmo2ForCausalLM(config)


def test_a_wrong_map_fails_the_suite(families):
    table.register_family(dataclasses.replace(OLMO2, prunable_heads=True))
    with pytest.raises(RuntimeError, match="must match the size"):
        TestOlmo2().test_a_pruned_model_equals_one_whose_units_are_zeroed()
    for name in ("falcon-gqa", "gpt-neox", "gpt2"):
        suite = TestBuiltIn()
        suite.name = name
        right = structures.structure_of(suite.model("eager"))
        table._FAMILIES[right.model_type] = dataclasses.replace(
            right, interleaved=not right.interleaved
        )
        with pytest.raises(AssertionError):
            suite.test_a_pruned_model_equals_one_whose_units_are_zeroed()


def test_a_family_is_registered_once(families):
    table.register_family(OLMO2)
    table.register_family(dataclasses.replace(OLMO2))  # an equal one
    assert "olmo2" in table.supported_families()
    for other in (dataclasses.replace(OLMO2, norms=()), Structure(model_type="llama")):
        with pytest.raises(PluginError, match=f'"{other.model_type}" has a map already'):
            table.register_family(other)


def test_the_plugin_of_the_page_passes_the_suite_of_the_page(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    plugin, suite = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (package,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "rankadaptor_phi.py").write_text(plugin, encoding="utf-8")
    (tmp_path / "test_phi.py").write_text(suite, encoding="utf-8")
    points = tomllib.loads(package)["project"]["entry-points"]["rankadaptor_plugin"]
    info = tmp_path / "rankadaptor_phi-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rankadaptor-phi\nVersion: 0.1\n")
    lines = "\n".join(f"{name} = {module}" for name, module in points.items())
    (info / "entry_points.txt").write_text(f"[rankadaptor_plugin]\n{lines}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "."],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    count = sum(name.startswith("test_") for name in dir(FamilyConformance))
    assert f"{count} passed" in done.stdout, done.stdout + done.stderr


def test_the_table_of_the_page_is_complete():
    rows = re.findall(
        r"^\|.*?\| `(\w+)` \| (\w+) \| yes \| (\w+) \|", PAGE.read_text("utf-8"), re.M
    )
    assert {name: (heads == "yes", hidden == "yes") for name, heads, hidden in rows} == {
        s.model_type: (s.prunable_heads, bool(s.norms)) for s in BUILT_IN
    }


# ------------------------------------------------------------------------------------------ tables


def test_the_table_of_lazy_registration_names_all_families_and_their_classes():
    names = {s.model_type: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[s.model_type] for s in BUILT_IN}
    known = {n: c for n, c in lazy_registration._STOCK.items() if n != OLMO2.model_type}
    assert known == names
    assert {PREFIX + name for name in names} <= set(lazy_registration.CONFIGS)
    for variant in VARIANTS:
        model = tiny(variant)
        assert type(model).__name__ == names[model.config.model_type]


def test_the_hook_registers_all_families():
    registry: Registry[Structure] = Registry("model family")
    builtin.rankadaptor_register_families(registry)
    assert {name: registry.get(name) for name in registry.names()} == {
        structure.model_type: structure for structure in BUILT_IN
    }
    assert {tiny(variant).config.model_type for variant in VARIANTS} == set(registry.names())
