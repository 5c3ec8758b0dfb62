"""The commands: help without heavy imports, init, run, plugins, task-path."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.run_file import EMBEDDED_RUN_FILE
from rankadaptor_plugin.config.schema import json_schema
from rankadaptor_plugin.models.families import BUILT_IN

HELP = """
import sys
from click.testing import CliRunner
from rankadaptor_plugin.cli import build_cli
from rankadaptor_plugin.plugins import plugin_manager

cli = build_cli(plugin_manager(third_party=False))
for words in ([], *([name] for name in cli.commands if name != "lm-eval")):
    result = CliRunner().invoke(cli, [*words, "--help"])
    assert result.exit_code == 0 and result.stdout.startswith("Usage: "), result.output
    print(" ".join(words), end=";")
heavy = {"torch", "transformers", "peft", "lm_eval", "optuna", "datasets", "torch_pruning"}
print(sorted(heavy & sys.modules.keys()))
"""

SMALLER = {
    "recovery.max_steps": 2,
    "oracle.tasks": '["tiny_boolq"]',
    "oracle.search_documents": 12,
    "oracle.report_documents": 20,
    "search.n_startup_trials": 2,
    "search.n_trials": 2,
    "confirm.finalists": 1,
    "confirm.seeds": 3,
    "noise.seeds": 3,
    "prune.calibration_samples": 8,
    "generation.max_new_tokens": 4,
}

SAMPLERS = ["bayes", "gp", "paper", "random", "tpe"]


def test_help_of_every_command_loads_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert (
        done.stdout
        == ";run;plan;noise;status;init;schema;compare;export;inspect;meta-learn;plugins;task-path;"
        "[]\n"
    )


def test_the_file_that_init_writes_runs(tmp_path, command):
    path = tmp_path / "mine.toml"
    written = command("init", path)
    assert written.exit_code == 0
    assert written.stdout == f"Wrote {path}. Start it with: rankadaptor-plugin run {path}\n"
    config, default = run_file.load(path), run_file.load(EMBEDDED_RUN_FILE)
    assert (config.oracle, config.recovery) == (default.oracle, default.recovery)

    smaller = [word for key, value in SMALLER.items() for word in ("--set", f"{key}={value}")]
    done = command("run", path, *smaller)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Verdict: ")
    out = tmp_path / "runs" / "mine"
    assert lines[-2] == f"Report:  {out / 'report.html'} (also .md, .json)"
    assert lines[-1] == f"Adapter: {out / 'adapter'}"
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_init_overwrites_only_when_forced_and_says_what_is_left_to_do(
    tmp_path, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text("mine", "utf-8")
    refused = command("init", path)
    assert refused.exit_code == 2
    assert "already exists. Give another name, or --force to overwrite it." in refused.stderr
    assert path.read_text("utf-8") == "mine"
    words = ("--model", "models/llama", "--recipe", "quick", "--full", "--force")
    written = command("init", path, *words)
    assert written.stdout == (
        f"Wrote {path}. models/llama is not here, so it is taken as a name on the Hub. Set "
        f"[corpus] path in it first. Start it with: rankadaptor-plugin run {path}\n"
    )
    refused = command("run", path)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("Error: corpus.path is empty or missing. Set it to a JSON,")
    assert command("init", path, *words, "--corpus", "rows.jsonl").exit_code == 0
    assert run_file.load(path).corpus.path == str(tmp_path / "rows.jsonl")
    (tmp_path / "file").touch()
    refused = command("init", tmp_path / "file" / "x.toml")
    assert refused.exit_code == 2
    assert "cannot be written" in refused.stderr


def test_a_key_can_be_set_on_the_command_line(command):
    for name in ("run", "noise"):
        refused = command(name, "--set", "sed=1")
        assert refused.exit_code == 2
        assert refused.stderr.startswith("Error: --set sed=1: Unknown key sed in the run file. Did")


def test_the_schema_is_printed(command):
    assert json.loads(command("schema").stdout) == json_schema()


def test_plugins_lists_what_is_active_for_people_and_for_programs(command):
    found = json.loads(command("plugins", "--json").stdout)
    names = [plugin["name"] for plugin in found["plugins"]]
    assert names == ["rankadaptor"]
    assert {plugin["provider"] for plugin in found["plugins"]} == {
        f"rankadaptor-plugin {version('rankadaptor-plugin')}, built in"
    }
    assert found["registered"] == {
        "pruners": ["channel", "depth", "width"],
        "model families": sorted(structure.model_type for structure in BUILT_IN),
        "oracles": ["lm-eval", "perplexity"],
        "performance models": ["bayes", "mlp", "mlp-1", "mlp-2", "mlp-3"],
        "samplers": SAMPLERS,
    }
    text = command("plugins").stdout
    for plugin in found["plugins"]:
        assert f"{plugin['name']} ({plugin['provider']})" in text
        assert all(f"    {hook}\n" in text for hook in plugin["hooks"])
    assert f"samplers: {', '.join(SAMPLERS)}\n" in text


def test_task_path_is_a_folder_of_seven_tasks(command):
    folder = Path(command("task-path").stdout.strip())
    assert len(list(folder.rglob("tiny_*.yaml"))) == 7


@pytest.mark.parametrize("words", [["--version"], ["-h"], ["run", "-h"]])
def test_short_questions_are_answered(words, command):
    result = command(*words)
    assert result.exit_code == 0
    assert "rankadaptor-plugin" in result.stdout


def test_without_a_run_file_the_embedded_default_goes_below_the_current_folder(
    tmp_path, monkeypatch
):
    from rankadaptor_plugin.pipeline.commands import load_config

    monkeypatch.chdir(tmp_path)
    assert load_config(None, None).output == str(tmp_path / "runs" / "embedded")
    assert load_config(None, Path("x")).output == str(tmp_path / "x")
    assert load_config(None, tmp_path / "y").output == str(tmp_path / "y")
    assert load_config(EMBEDDED_RUN_FILE, Path("x")).output == str(tmp_path / "x")


def test_ctrl_c_ends_a_run_in_one_line_that_says_how_to_go_on(tmp_path, write_run_file, command):
    class Impatient:
        @hookimpl
        def rankadaptor_on_progress(self, stage):
            if stage == "search":
                raise KeyboardInterrupt

    result = command("run", write_run_file(tmp_path / "r.toml"), plugin=Impatient())
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == ("Interrupted. Run the same command again to resume.")
