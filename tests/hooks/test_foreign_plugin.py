"""A plugin of another distribution, really installed, takes part in a real run."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file

from rankadaptor_plugin.models.pruned_model import load_pruned

SOURCE = Path(__file__).parent / "foreign_plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    source = shutil.copytree(SOURCE, folder / "source")  # the build writes beside its source
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--target", folder / "site", source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def call(installed: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rankadaptor_plugin", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_plugins_lists_it_with_distribution_and_version(installed, tmp_path):
    lines = call(installed, tmp_path, "plugins").splitlines()
    at = lines.index("halve (rankadaptor-foreign 3.1.4)")
    assert lines[at + 1] == "    rankadaptor_register_pruners"
    assert "flat (rankadaptor-foreign 3.1.4)" in lines
    assert "pruners: channel, depth, halve, width" in lines
    assert lines.count("    rankadaptor_post_prune") == 2


@pytest.fixture(scope="module")
def foreign_run(installed, tmp_path_factory, write_run_file):
    """A run with its pruner and its recovery stage: what was printed, and the run folder."""
    folder = tmp_path_factory.mktemp("run")
    settings = {
        "prune": {"method": "halve", "calibration_samples": 3},
        "oracle": {"search_documents": 4, "report_documents": 6},
    }
    write_run_file(folder / "RUN.toml", **settings)
    return call(installed, folder, "run", "RUN.toml"), folder / "out"


def test_its_pruner_checks_the_run_file_before_anything_is_loaded(
    installed, tmp_path, write_run_file
):
    file = write_run_file(tmp_path / "RUN.toml", prune={"method": "halve", "pruning_ratio": 0.3})
    done = subprocess.run(
        [sys.executable, "-m", "rankadaptor_plugin", "run", str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(installed)},
        check=False,
    )
    assert done.returncode == 2
    assert (
        "pruning_ratio is 0.3, but the pruner halve removes half of one of 8 layers" in done.stderr
    )
    assert not (tmp_path / "out" / "pruned").exists()


def test_a_run_uses_its_pruner(foreign_run):
    pruned = load_pruned(foreign_run[1] / "pruned")
    assert pruned.provenance == {"pruner": "halve", "samples": 3}
    assert pruned.pruned_layers == (True, *[False] * (len(pruned.widths) - 1))


# peft 0.21 asks transformers 5.23 by an outdated name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_run_uses_its_recovery_stage_and_delivers_its_adapter(foreign_run):
    output, folder = foreign_run
    assert "recovered by another stage" in output
    assert not (folder / "study.db").exists()
    model = PeftModel.from_pretrained(load_pruned(folder / "pruned").model, folder / "adapter")
    assert set(model.peft_config["default"].rank_pattern.values()) == {1}


def test_the_report_of_a_foreign_recovery_stage_is_right(foreign_run):
    folder = foreign_run[1]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert set(report["scores"]) == {"base", "pruned", "recovered"}
    for column in report["scores"].values():
        assert set(column) == {"tiny_boolq", "tiny_piqa", "mean"}
        assert all(math.isfinite(cell["mean"]) for row in column.values() for cell in row.values())
    layers = len(report["widths"])
    assert report["allocations"] == {"recovered": [1] * layers}
    assert report["trials"] == report["confirm"]["competitors"] == []
    assert report["parameters"]["pruned"] < report["parameters"]["base"]
    assert report["documents"]["report"] == {"tiny_boolq": 6, "tiny_piqa": 6}
    assert report["verdict"]["delivered"] == "foreign"
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    trainable = sum(weight.numel() for weight in weights.values())
    assert report["parameters"]["trainable"] == {"recovered": trainable}
    assert report["cost"]["stages"]["recover"] > 0
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "Delivered: the adapter of another recovery stage." in text
    assert "| layer | before pruning | heads | KV heads | MLP channels | recovered ranks |" in text
    assert re.search(r"^    0  \S+ 1$", text, re.MULTILINE)  # the bar of the lowest layer


def test_another_run_file_does_not_take_over_the_folder_of_a_foreign_run(
    foreign_run, write_run_file, command
):
    folder = foreign_run[1]
    result = command("run", write_run_file(folder.parent / "OTHER.toml", seed=5))
    assert result.exit_code == 1
    assert "was made from different inputs" in result.stderr
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
