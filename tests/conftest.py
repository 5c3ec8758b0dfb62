"""Shared fixtures: a tiny random Llama and a tokenizer of whole words."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.cli import build_cli
from rankadaptor_plugin.plugins import plugin_manager

if TYPE_CHECKING:
    from pathlib import Path

# How fast the machine is, and what else it does, is not what is tested.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

WORDS = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>"])}
WORDS |= {f"w{i}": i + len(WORDS) for i in range(37)}


@pytest.fixture(scope="session")
def make_llama():
    def make(seed: int = 0, **changes) -> LlamaForCausalLM:
        sizes = {
            "vocab_size": len(WORDS),
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 64,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "initializer_range": 0.3,  # far from uniform predictions
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()

    return make


@pytest.fixture(scope="session")
def make_tokenizer():
    def make(frame: str = "$A") -> PreTrainedTokenizerFast:
        """`frame` is what the tokenizer adds, for example ``<s> $A </s>``."""
        words_to_ids = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))  # noqa: S106
        words_to_ids.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words_to_ids.post_processor = processors.TemplateProcessing(
            single=frame, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=words_to_ids,
            bos_token="<s>",  # noqa: S106
            eos_token="</s>",  # noqa: S106
            unk_token="<unk>",  # noqa: S106
            pad_token="</s>",  # noqa: S106
        )

    return make


# ------------------------------------------------------------------ whole runs, as small as may be

SMALL = {
    "output": "out",
    "dtype": "float32",
    "threads": 1,
    "tune": {"learning_rates": []},
    "prune": {"keep_first": 0, "keep_last": 0, "calibration_samples": 8, "calibration_tokens": 7},
    "corpus": {"template": "plain", "max_length": 32},
    "recovery": {
        "stack": [],
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-3,
        "warmup_steps": 1,
    },
    "oracle": {
        "tasks": ["tiny_boolq", "tiny_piqa"],
        "search_documents": 12,
        "report_documents": 20,
    },
    "performance_model": {"meta_epochs": 20, "epochs": 20},
    "search": {"n_startup_trials": 3, "n_trials": 5, "candidates": 200, "tolerance": 0.0},
    "noise": {"seeds": 0},
    "confirm": {"finalists": 1, "seeds": 3},
    "generation": {"max_new_tokens": 0},
}
"""A run of the embedded model in seconds."""


def _toml(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value) if isinstance(value, (bool, int, str, list)) else repr(value)


@pytest.fixture(scope="session")
def write_run_file():
    def write(path: Path, **changes) -> Path:
        """Writes a small run; a dictionary replaces single keys of a table."""
        data = dict(SMALL)
        for key, value in changes.items():
            table = isinstance(value, dict) and isinstance(data.get(key, {}), dict)
            data[key] = {**data.get(key, {}), **value} if table else value
        data = dict(sorted(data.items(), key=lambda item: isinstance(item[1], dict)))
        lines = []
        for key, value in data.items():
            if isinstance(value, dict):
                lines += ["", f"[{key}]", *(f"{k} = {_toml(v)}" for k, v in value.items())]
            else:
                lines.append(f"{key} = {_toml(value)}")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def command():
    def call(*words, plugin=None):
        """Calls the command line in process, with the built-in plugins and perhaps another."""
        manager = plugin_manager(third_party=False)
        if plugin is not None:
            manager.register(plugin)
        result = CliRunner().invoke(build_cli(manager), [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


class Observer:
    """Notes every trial that a run makes, and the documents of its oracle."""

    def __init__(self):
        self.trials, self.documents = [], {}

    @hookimpl
    def rankadaptor_after_trial(self, trial, context):
        self.trials.append(trial)
        self.documents = context.oracle.describe()["documents"]


@pytest.fixture
def observer():
    return Observer()


@pytest.fixture(scope="session")
def finished(tmp_path_factory, write_run_file, command):
    """An uninterrupted small run, for reading only; see `finished_copy`."""
    folder = tmp_path_factory.mktemp("finished")
    watcher = Observer()
    result = command("run", write_run_file(folder / "small.toml"), plugin=watcher)
    assert result.exit_code == 0, result.stderr
    report = json.loads((folder / "out" / "report.json").read_text("utf-8"))
    return SimpleNamespace(
        folder=folder / "out",
        stdout=result.stdout,
        stderr=result.stderr,
        report=report,
        trials=watcher.trials,
        documents=watcher.documents,
    )


@pytest.fixture
def finished_copy(finished, tmp_path, write_run_file):
    """The run file of a finished run whose folder may be changed."""
    shutil.copytree(finished.folder, tmp_path / "out")
    return write_run_file(tmp_path / "small.toml")
