"""Whole runs of every pruner, each on another family."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rankadaptor_plugin.config.run_file import model_folder
from rankadaptor_plugin.models.pruned_model import load_pruned

# peft 0.21 asks transformers 5.23 by an outdated name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

GQA = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
}
RUNS = {
    "width, global, mix": (
        *("phi3", GQA),
        {"importance": "taylor", "taylor": "mix", "global_pruning": True, "pruning_ratio": 0.4},
    ),
    "width, all parameters, Wanda": (
        *("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 40}),
        {"importance": "wanda", "ratio_of": "parameters", "pruning_ratio": 0.2},
    ),
    "width, random": (
        *("gpt_neox", {k: v for k, v in GQA.items() if k != "num_key_value_heads"}),
        {"importance": "random", "pruning_ratio": 0.3},
    ),
    "width, magnitude": (
        *("falcon", {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}),
        {"importance": "magnitude", "pruning_ratio": 0.5, "round_to": 32},
    ),
    "channel": (*("mistral", GQA), {"method": "channel", "pruning_ratio": 0.25}),
    "depth, perplexity": (
        *("qwen3", {**GQA, "head_dim": 8}),
        {"method": "depth", "importance": "ppl", "blocks": 1, "keep_first": 1},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_prunes_recovers_and_reports(name, tmp_path, write_run_file, command):
    model_type, sizes, prune = RUNS[name]
    tokenizer = AutoTokenizer.from_pretrained(model_folder("embedded"))
    tokens = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **sizes, **tokens)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run_file = write_run_file(
        tmp_path / "run.toml",
        model="model",
        device_map="auto",  # accelerate's hooks, though on a single device
        prune=prune,
        corpus={"path": "embedded"},
        oracle={"tasks": ["tiny_boolq"]},
        search={"n_startup_trials": 2, "n_trials": 2},
    )
    result = command("run", run_file)
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    pruned = load_pruned(tmp_path / "out" / "pruned")
    adapter = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert adapter["fan_in_fan_out"] == (model_type == "gpt2")
    assert report["footprints"]["pruned"]["parameters"] == pruned.model.num_parameters()
    assert report["footprints"]["base"]["parameters"] == base.num_parameters()
    assert report["footprints"]["pruned"]["macs"] < report["footprints"]["base"]["macs"]
    assert len(report["allocations"]["recovered"]) == len(pruned.widths)
    is_stock = type(pruned.model) is type(base)
    assert is_stock == (prune.get("method") == "depth")
    for file in ("report.md", "report.html"):
        assert "The pruned model" in (tmp_path / "out" / file).read_text("utf-8")
