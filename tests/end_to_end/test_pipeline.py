"""One small run from end to end: what it leaves behind, and that it says the truth."""

from __future__ import annotations

import io
import json
import runpy
import shutil
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState as OptunaState
from peft import AutoPeftModelForCausalLM, PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.core.errors import OracleError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.scores import METRICS
from rankadaptor_plugin.core.trials import RECORD
from rankadaptor_plugin.oracle.lm_eval_oracle import LmEvalOracle
from rankadaptor_plugin.verdict.race import run_name

TASKS = ["tiny_boolq", "tiny_piqa"]


class FlakyOracle(LmEvalOracle):
    """lm-eval's scores, but the second recovered model cannot be measured."""

    searched = 0

    def score(self, model, documents):
        if documents == "search":
            self.searched += 1
            if self.searched == 2:
                raise OracleError("The meter broke. Buy another.")
        return super().score(model, documents)


class FlakyPlugin:
    @hookimpl
    def rankadaptor_register_oracles(self, register):
        register("flaky", FlakyOracle)


def report_of(folder):
    return json.loads((folder / "report.json").read_text("utf-8"))


def without_costs(report):
    return {key: value for key, value in report.items() if key != "cost"}


def test_every_artefact_is_there_and_nothing_half_written(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {
        *("inputs.json", "pruned", "evaluations", "study.db", "adapters", "adapter"),
        *("report.json", "report.md", "report.html", "timings.json", ".lock"),
        *("session.json", "run.log", "attention.json"),
    }
    assert not [p for p in finished.folder.rglob("*") if p.name.endswith((".partial", ".tmp"))]
    assert len(list((finished.folder / "evaluations").iterdir())) == 2 * (2 + 3 * 2)
    assert len(list((finished.folder / "adapters").iterdir())) == 2


@pytest.mark.filterwarnings(  # PEFT 0.21 asks for an attribute that transformers 5.23 renamed
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)
def test_the_delivered_adapter_loads_with_the_ordinary_api(finished):
    folder = finished.folder
    base = AutoModelForCausalLM.from_pretrained(folder / "pruned")
    tokenizer = AutoTokenizer.from_pretrained(folder / "pruned")
    tokens = tokenizer("the box is red", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        pruned = base(tokens).logits
        delivered = PeftModel.from_pretrained(base, folder / "adapter").eval()
        logits = delivered(tokens).logits
        auto = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
        assert torch.equal(auto(tokens).logits, logits)
        merged = delivered.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, logits)
    assert (pruned - logits).abs().max() > 1e-3  # the adapter does something

    # The adapter has the ranks that the report says, and is that of the first fresh seed.
    allocation = finished.report["allocations"]["recovered"]
    patterns = auto.peft_config["default"].rank_pattern
    assert patterns == {rf"model\.layers\.{i}\..*": rank for i, rank in enumerate(allocation)}
    source = folder / "adapters" / run_name(RankAllocation(tuple(allocation)), 1_000_000)
    weights = "adapter_model.safetensors"
    assert (source / weights).read_bytes() == (folder / "adapter" / weights).read_bytes()


def test_the_report_is_complete_and_agrees_with_itself(finished):
    report = finished.report
    assert report["tasks"] == TASKS
    assert report["scores"].keys() == {"base", "pruned", "uniform", "searched", "recovered"}
    for column in report["scores"].values():
        assert column.keys() == {*TASKS, "mean"}
        for metric in METRICS:
            values = [column[task][metric]["mean"] for task in TASKS]
            assert column["mean"][metric]["mean"] == pytest.approx(sum(values) / 2)

    verdict = report["verdict"]
    comparison = verdict["comparisons_of_ranks"]["accuracy"]
    assert verdict["delivered"] == ("searched" if comparison["low"] > 0 else "uniform")
    assert report["scores"]["recovered"] == report["scores"][verdict["delivered"]]
    assert report["allocations"]["recovered"] == report["allocations"][verdict["delivered"]]
    for metric in METRICS:
        means = [report["scores"][n]["mean"][metric]["mean"] for n in ("searched", "uniform")]
        ranks = verdict["comparisons_of_ranks"][metric]
        assert ranks["estimate"] == pytest.approx(means[0] - means[1])
    lines = [verdict[key] for key in ("headline", "sentence", "ranks")]
    assert finished.stdout.startswith("Verdict: " + "\n         ".join(lines) + "\nReport: ")

    trainable = report["parameters"]["trainable"]
    assert trainable["searched"] <= trainable["uniform"] == trainable["recovered"]
    assert report["parameters"]["pruned"] < report["parameters"]["base"]

    cost = report["cost"]
    parts = [cost["fine_tuning"], cost["evaluation"], cost["other"]]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(sum(cost["stages"].values()))

    assert [trial["position"] for trial in report["trials"]] == list(range(5))
    assert report["trials"] == [trial.to_json() for trial in finished.trials]
    search = {"complete": 5, "failed": 0, "interrupted": 0, "n_startup_trials": 3}
    assert report["search"] == {**search, "method": "bayes", "stop_reason": "n_trials"}


def test_plain_optuna_reads_every_trial(finished):
    url = f"sqlite:///{finished.folder / 'study.db'}"
    study = optuna.load_study(study_name="search", storage=url)
    assert [trial.state for trial in study.trials] == [OptunaState.COMPLETE] * 5
    for trial, ours in zip(study.trials, finished.report["trials"], strict=True):
        record = trial.user_attrs[RECORD]
        assert record == ours
        assert trial.value == record["objective"]
        assert record["ranks"] == [trial.params[name] for name in sorted(trial.params)]
        assert (record["seed"], record["state"]) == (0, "complete")
        assert record["score"].keys() == set(TASKS)
        assert all(task["values"].keys() == set(METRICS) for task in record["score"].values())
        assert (record["predicted"] is not None) == (record["phase"] == "iteration")
        assert record["seconds"].keys() == {"search", "recovery", "oracle"}
    confirmed = optuna.load_study(study_name="confirm", storage=url)
    assert sorted(t.user_attrs[RECORD]["seed"] for t in confirmed.trials) == sorted(
        [1_000_000, 1_000_001, 1_000_002] * 2
    )
    for study_ in (study, confirmed):
        study_._storage.remove_session()
        study_._storage._backend.engine.dispose()


def test_a_second_run_repeats_nothing_and_quiet_prints_the_verdict_alone(
    finished, finished_copy, command, observer
):
    result = command("run", finished_copy, "--quiet", plugin=observer)
    assert result.exit_code == 0, result.stderr
    verdict = finished.report["verdict"]
    lines = [verdict[key] for key in ("headline", "sentence", "ranks")]
    assert result.stdout == "\n".join(lines) + "\n"
    assert observer.trials == []
    again = report_of(finished_copy.parent / "out")
    assert without_costs(again) == {
        **without_costs(finished.report),
        "config": {**finished.report["config"], "output": str(finished_copy.parent / "out")},
    }
    for part in ("fine_tuning", "evaluation", "per_trial"):
        assert again["cost"][part] == finished.report["cost"][part]


def test_a_larger_max_trials_goes_on_in_the_same_folder(
    finished, finished_copy, write_run_file, command, observer
):
    write_run_file(finished_copy, search={"n_trials": 6})
    result = command("run", finished_copy, plugin=observer)
    assert result.exit_code == 0, result.stderr
    assert [trial.position for trial in observer.trials] == [5]
    report = report_of(finished_copy.parent / "out")
    assert report["trials"][:5] == finished.report["trials"]
    assert report["search"]["complete"] == 6


def test_a_failed_trial_is_recorded_with_its_reason_and_the_run_goes_on(
    tmp_path, write_run_file, command
):
    path = write_run_file(tmp_path / "r.toml", oracle={"name": "flaky"})
    result = command("run", path, plugin=FlakyPlugin())
    assert result.exit_code == 0, result.stderr
    assert "failed: The meter broke. Buy another" in result.stderr
    report = report_of(tmp_path / "out")
    states = [(trial["state"], trial["reason"]) for trial in report["trials"]]
    assert states[1] == ("failed", "The meter broke. Buy another.")
    assert {state for state, _ in states[:1] + states[2:]} == {"complete"}
    assert report["trials"][1]["objective"] is None
    assert (report["search"]["complete"], report["search"]["failed"]) == (4, 1)
    assert "The meter broke" in (tmp_path / "out" / "report.md").read_text("utf-8")


def test_a_free_budget_is_compared_with_uniform_lora_of_as_many_parameters(
    tmp_path, write_run_file, command
):
    path = write_run_file(
        tmp_path / "r.toml",
        rank_space={"budget": "free", "candidates": [2, 4]},
        oracle={"objective": "accuracy"},
        search={"n_startup_trials": 2, "n_trials": 3, "method": "tpe"},
    )
    result = command("run", path)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path / "out")
    trainable = report["parameters"]["trainable"]
    assert 0 <= trainable["searched"] - trainable["uniform"] < trainable["uniform"] / 16
    assert max(report["allocations"]["uniform"]) - min(report["allocations"]["uniform"]) <= 1
    assert report["objective"] == {"metric": "accuracy", "target": "mean"}
    for trial in report["trials"]:
        values = [trial["score"][task]["values"]["accuracy"] for task in TASKS]
        assert trial["objective"] == pytest.approx(sum(values) / 2)


def test_a_single_target_is_searched_and_judged_alone(tmp_path, write_run_file, command):
    path = write_run_file(
        tmp_path / "r.toml",
        oracle={"target": "tiny_piqa"},
        search={"n_startup_trials": 2, "n_trials": 3},
    )
    result = command("run", path)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path / "out")
    assert report["objective"] == {"metric": "gold_logprob", "target": "tiny_piqa"}
    for trial in report["trials"]:
        assert trial["objective"] == trial["score"]["tiny_piqa"]["values"]["gold_logprob"]
    comparison = report["verdict"]["comparisons_of_ranks"]["gold_logprob"]
    cells = [
        report["scores"][n]["tiny_piqa"]["gold_logprob"]["mean"] for n in ("searched", "uniform")
    ]
    assert comparison["estimate"] == pytest.approx(cells[0] - cells[1])
    assert comparison["documents"] == 20


def test_off_a_terminal_progress_is_plain_lines(finished):
    lines = finished.stderr.splitlines()
    assert any(line.endswith("] load") for line in lines)
    trials = [line for line in lines if "] trial " in line]
    assert len(trials) == 5
    for line, trial in zip(trials, finished.trials, strict=True):
        assert f"trial {trial.position + 1}/5 ({trial.phase.value})" in line
        assert f"ranks {trial.allocation} measured {trial.objective:.4f}" in line
        assert ", best " in line
        assert " left" in line
    assert sum("] confirm " in line for line in lines) == 7
    assert "\x1b" not in finished.stderr


def test_the_log_of_a_run_says_what_its_lines_say(finished):
    shown = [line.split("] ", 1)[1] for line in finished.stderr.splitlines() if "] " in line]
    log = (finished.folder / "run.log").read_text("utf-8").splitlines()
    started, device, *logged = [line.split(" ", 2)[2] for line in log]
    assert started.startswith("started: rankadaptor-plugin ")
    assert device == "device: cpu (1 threads), float32"
    assert shown[0] == "load"
    assert logged == [*shown[1:], "finished"]


def test_on_a_terminal_there_is_a_live_display(
    finished, finished_copy, write_run_file, command, monkeypatch
):
    screen = io.StringIO()
    monkeypatch.setattr(
        "rich.console.Console", lambda **_: Console(file=screen, force_terminal=True, width=100)
    )
    write_run_file(finished_copy, search={"n_trials": 6})
    result = command("run", finished_copy)
    assert result.exit_code == 0, result.stderr
    shown = screen.getvalue()
    assert "\x1b[" in shown
    assert "] load" not in shown
    for word in ("predicted", "measured", "ranks, first layer to last"):
        assert word in shown


def test_the_example_of_recover_in_the_docs_runs(finished, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "recovery.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    assert len(code.strip().splitlines()) <= 15
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    shutil.copytree(finished.folder / "pruned", tmp_path / "runs" / "embedded" / "pruned")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("example.py")
    assert "down_proj" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "adapter" / "rankadaptor.json").is_file()


def test_the_loss_on_held_out_rows_is_in_the_report(tmp_path, write_run_file, command):
    file = write_run_file(
        tmp_path / "run.toml",
        corpus={"val_set_size": 40},
        recovery={"load_best_model_at_end": False},
        search={"n_trials": 2, "n_startup_trials": 2},
    )
    result = command("run", file)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path / "out")
    assert all(trial["validation_loss"] > 0 for trial in report["trials"])
    assert "held-out loss" in (tmp_path / "out" / "report.md").read_text("utf-8")
