"""Whole runs that tune, compensate and distill before they search."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rankadaptor_plugin.core.errors import UnsupportedModelError
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.core.trials import Outcome
from rankadaptor_plugin.lm_eval_model import locate
from rankadaptor_plugin.pipeline import tune_step
from rankadaptor_plugin.pruning import compensation
from rankadaptor_plugin.recovery.peft_internals import without_old_name

STACK = {
    "tune": {"learning_rates": [2e-3, 5e-3], "seeds": 1},
    "compensate": {"text": ["generate"]},
    "recovery": {"stack": ["compensate", "distill", "gradient"]},
    "search": {"n_startup_trials": 2, "n_trials": 2},
    "generation": {"max_new_tokens": 3},
}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, write_run_file, command):
    """A run whose tune stage keeps every part, so that the delivered one may be on any weights."""
    folder = tmp_path_factory.mktemp("tuned")
    file = write_run_file(folder / "run.toml", **STACK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_step.TuneStep, "_parts", every_part)
        result = command("run", file)
    assert result.exit_code == 0, result.stderr
    report = json.loads((folder / "out" / "report.json").read_text("utf-8"))
    return SimpleNamespace(file=file, folder=folder / "out", report=report, result=result)


PLAIN = tune_step.TuneStep._parts


def every_part(self, rate):
    _, tried = PLAIN(self, rate)
    return self._tried_parts, tried


def test_the_report_has_both_questions_and_all_arms(tuned):
    verdict, report = tuned.report["verdict"], tuned.report
    assert [c["label"] for c in report["confirm"]["competitors"]][:1] == ["stack"]
    assert {"base", "pruned", "compensated", "recipe", "uniform", "searched"} <= set(
        report["scores"]
    )
    assert "LoRA r=8 by the recipe" in verdict["sentence"]
    assert verdict["ranks"].startswith("ranks alone: ")
    assert verdict["headline"] in tuned.result.stdout
    assert report["tune"]["fine_tunes"] >= 2 + 3
    assert [entry["part"] for entry in report["tune"]["tried"]] == STACK["recovery"]["stack"]
    assert report["compensation"]["text"] == ["recovery corpus", "text of the unpruned model"]
    text = (tuned.folder / "report.md").read_text("utf-8")
    for heading in ("## Learning rate and stack", "### What the ranks alone gave"):
        assert heading in text
    assert {"tune", "compensate", "teacher"} <= set(report["cost"]["stages"])


def test_compensated_weights_are_those_of_their_own_folder(tuned):
    pruned, compensated = (
        AutoModelForCausalLM.from_pretrained(tuned.folder / name).state_dict()
        for name in ("pruned", "compensated")
    )
    record = json.loads((tuned.folder / "compensation.json").read_text("utf-8"))
    changed = {name for name in pruned if not torch.equal(pruned[name], compensated[name])}
    assert changed
    assert changed <= {
        f"model.layers.{e['layer']}.{e['matrix']}.weight" for e in record["matrices"]
    }


def test_each_adapter_names_the_model_that_it_was_trained_on(tuned):
    folder = RunFolder(tuned.folder)
    bases = {}
    for adapter in (tuned.folder / "adapters").iterdir():
        base = folder.base_of(adapter)
        bases[adapter.name] = base.name
        with without_old_name():
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        assert model.peft_config["default"].base_model_name_or_path == str(base.resolve())
    assert set(bases.values()) == {"pruned", "compensated"}


def test_the_delivered_model_is_exported_and_read_with_its_own_base(tuned, command, tmp_path):
    run = tmp_path / "out"
    shutil.copytree(tuned.folder, run)
    other = next(
        adapter
        for adapter in (run / "adapters").iterdir()
        if RunFolder(run).base_of(adapter).name == "compensated"
    )
    shutil.rmtree(run / "adapter")
    shutil.copytree(other, run / "adapter")  # as if the stack had gained
    model, adapter = locate(run, None)
    assert (model, adapter) == (run / "compensated", run / "adapter")
    result = command("export", run, "--format", "merged", "--output", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad(), without_old_name():
        merged = AutoModelForCausalLM.from_pretrained(
            tmp_path / "merged", trust_remote_code=True, dtype=torch.float32
        )
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
        torch.testing.assert_close(merged(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_ranks_of_squeeze_start_the_search(tmp_path, write_run_file, command):
    file = write_run_file(
        tmp_path / "run.toml",
        recovery={"methods": ["rankadaptor", "squeeze"], "learning_rate": 2e-2, "max_steps": 8},
        search={"n_startup_trials": 2, "n_trials": 3},
    )
    result = command("run", file)
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    first = report["trials"][0]["ranks"]
    assert set(first) <= {2, 4, 6, 8, 10, 12}
    assert len(report["trials"]) == 3
    labels = [entry["label"] for entry in report["confirm"]["competitors"]]
    assert labels == ["finalist", "squeeze"]
    trained = report["parameters"]["trainable"]
    assert 0.97 * trained["uniform"] <= trained["squeeze"] <= trained["uniform"]


def test_the_noise_floor_is_measured_on_the_tuned_stack(tmp_path, write_run_file, command):
    file = write_run_file(
        tmp_path / "run.toml", **{**STACK, "noise": {"seeds": 2, "allocations": 2}}
    )
    result = command("noise", file)
    assert result.exit_code == 0, result.stderr
    tune = json.loads((tmp_path / "out" / "tune.json").read_text("utf-8"))
    noise = json.loads((tmp_path / "out" / "noise.json").read_text("utf-8"))
    assert noise["seeds"][: len(tune["seeds"])] == tune["seeds"]
    stack = list((tmp_path / "out" / "tune").glob("*.json"))
    outcomes = [Outcome.from_json(json.loads(p.read_text("utf-8"))).objective for p in stack]
    assert noise["values"]["objective"][0][0] in outcomes  # not fine-tuned twice


def test_an_interrupted_run_goes_on_to_the_same_report(tuned, tmp_path, write_run_file, command):
    """What is there of the tune stage and the compensation is not made again."""
    file = write_run_file(tmp_path / "run.toml", **STACK)
    shutil.copytree(tuned.folder, tmp_path / "out")
    for name in ("report.json", "tune.json"):
        (tmp_path / "out" / name).unlink()
    next((tmp_path / "out" / "tune").glob("*.json")).unlink()
    shutil.rmtree(tmp_path / "out" / "compensated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_step.TuneStep, "_parts", every_part)
        result = command("run", file)
    assert result.exit_code == 0, result.stderr
    again = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    for key in ("verdict", "scores"):
        assert again[key] == tuned.report[key]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {"compensate": "least-sqares"}}, "Did you mean 'least-squares'"),
        ({"compensate": {"text": ["missing.txt"]}}, "missing.txt does not exist"),
        ({"recovery": {"stack": ["compensat"]}}, "Did you mean 'compensate'"),
        ({"recovery": {"stack": ["gradient", "eva"]}}, "two kinds of first weights"),
        ({"recovery": {"methods": ["squeeze:4"]}}, "trains at a lower rank than its budget"),
        (
            {"recovery": {"methods": ["compensate"]}, "prune": {"compensate": "none"}},
            "start from compensated weights",
        ),
    ],
)
def test_what_cannot_be_stacked_is_refused_at_once(
    changes, message, tmp_path, write_run_file, command
):
    result = command("run", write_run_file(tmp_path / "run.toml", **changes))
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "pruned").exists()


def test_where_compensation_does_not_apply_the_stack_goes_without(
    tmp_path, write_run_file, command, monkeypatch
):
    def refuses(*args, **kwargs):
        raise UnsupportedModelError("Layer 0 is not the sum of its parts.")

    monkeypatch.setattr(compensation, "compensate", refuses)
    stack = {"stack": ["compensate"]}
    result = command("run", write_run_file(tmp_path / "run.toml", recovery=stack))
    assert result.exit_code == 0, result.stderr
    log = (tmp_path / "out" / "run.log").read_text("utf-8")
    assert "Not compensated, so the stack goes without it: Layer 0" in log
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert "compensated" not in report["scores"]
    named = {"methods": ["compensate"], **stack}
    result = command("run", write_run_file(tmp_path / "b.toml", recovery=named, output="b"))
    assert result.exit_code == 1
    assert "Layer 0 is not the sum of its parts." in result.stderr
