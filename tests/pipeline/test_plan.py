"""The plan of a run, on the embedded model: what is left, what is refused, and what is cut."""

from __future__ import annotations

import json
import shutil

import pytest

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.config.run_file import EMBEDDED_FOLDER
from rankadaptor_plugin.config.tables import PruneConfig
from rankadaptor_plugin.models.checkpoints import load_model, load_tokenizer, meta_model
from rankadaptor_plugin.oracle.oracle import Cost
from rankadaptor_plugin.pipeline import plan as plan_module
from rankadaptor_plugin.pipeline.plan import _Timed
from rankadaptor_plugin.pruning.checks import shape_after
from rankadaptor_plugin.report.console import plan_text

SECONDS = _Timed(
    begin=100.0,
    step=300.0,
    per_token=0.0,
    search=Cost(seconds=1000.0, tokens=100, logits=10),
    report=Cost(seconds=2000.0, tokens=100, logits=10),
    token=0.1,
)
"""A fine-tune of three steps takes 1000 s, a trial 2000, a fine-tune of the comparison 4000: far
more than the tests."""


@pytest.fixture
def timed(monkeypatch):
    monkeypatch.setattr(_Timed, "of", classmethod(lambda cls, *_: SECONDS))


@pytest.fixture
def planned(tmp_path, write_run_file, command):
    """Calls ``plan --json``; returns what it printed, or its error."""

    def call(**changes):
        result = command("plan", write_run_file(tmp_path / "run.toml", **changes), "--json")
        if result.exit_code:
            assert result.stdout == ""
            return result.stderr.splitlines()[-1]
        return json.loads(result.stdout)

    return call


def stages(plan):
    return {stage["name"]: stage for stage in plan["stages"]}


def test_a_plan_says_what_a_run_takes_and_leaves_nothing_behind(planned, tmp_path):
    plan = planned(noise={"seeds": 2, "allocations": 2})
    by_name = stages(plan)
    assert list(by_name) == [
        "prune",
        "evaluate",
        "noise",
        "search",
        "confirm",
        "texts",
    ]
    counts = {name: stage["fine_tunes"] for name, stage in by_name.items() if stage["fine_tunes"]}
    assert counts == {"noise": 4, "search": 3, "confirm": 6}
    assert plan["fine_tunes"] == 13
    assert all(stage["seconds"] > 0 and stage["memory"] > 0 for stage in plan["stages"])
    assert plan["hours"] == pytest.approx(sum(s["seconds"] for s in plan["stages"]) / 3600)
    assert plan["device_hours"] == plan["hours"]
    assert plan["gpu_hours"] == 0  # of a CPU
    assert plan["disk"] > 100_000
    assert plan["cuts"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


def test_the_table_has_all_of_it(planned, timed):
    plan = planned()
    text = plan_text(plan, 80)
    rows = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert rows["search"].split()[1:5] == ["5", "2", "h", "46"]
    assert rows["comparison"].split()[1:5] == ["6", "6", "h", "40"]
    assert "GPU hours" not in text
    assert "A fine-tune takes 16 min 40 s, 33 min 20 s with its evaluation" in text
    on_gpus = plan_text({**plan, "device": "cuda", "devices": 4}, 80)
    assert "GPU hours" in on_gpus
    assert "   27 " in next(line for line in on_gpus.splitlines() if line.startswith("comparison"))


class Order:
    def __init__(self):
        self.calls, self.plans = [], []

    @hookimpl
    def rankadaptor_on_progress(self, stage, done, total):
        if stage not in self.calls:
            self.calls.append(stage)

    @hookimpl
    def rankadaptor_on_plan(self, plan):
        self.calls.append("the plan")
        self.plans.append(plan)


def test_a_run_shows_its_plan_before_it_prunes(tmp_path, write_run_file, command, timed):
    order, path = Order(), write_run_file(tmp_path / "run.toml")
    result = command("run", path, plugin=order)
    assert order.calls[:4] == ["load", "plan", "the plan", "prune"]
    assert "A fine-tune takes 16 min 40 s" in result.stderr
    log = (tmp_path / "out" / "run.log").read_text("utf-8")
    assert " at most 11 fine-tunes, 11 h " in log
    # Nothing is left of a finished run.
    again = Order()
    assert command("run", path, plugin=again).exit_code == 0
    assert not again.plans


def test_what_is_done_is_not_planned_again(tmp_path, write_run_file, command, timed):
    changes = {"noise": {"seeds": 2, "allocations": 2}}
    path = write_run_file(tmp_path / "run.toml", **changes)
    assert command("noise", path, "--json").exit_code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    plan = json.loads(command("plan", path, "--json").stdout)
    assert "prune" not in stages(plan)
    assert "noise" not in stages(plan)
    assert plan["spent"] > 0
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    shutil.rmtree(tmp_path / "out" / "noise")
    # With other settings and nothing to lose a run would begin anew.
    other = write_run_file(tmp_path / "run.toml", **changes, prune={"pruning_ratio": 0.3})
    assert "prune" in stages(json.loads(command("plan", other, "--json").stdout))


def test_a_plan_that_times_the_pruned_model_writes_nothing(finished_copy, write_run_file, command):
    out = finished_copy.parent / "out"
    for name in ("report.json", "attention.json"):
        (out / name).unlink()
    before = {path.name for path in out.iterdir()}
    result = command("plan", write_run_file(finished_copy), "--json")
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in out.iterdir()} == before


def test_a_run_that_does_not_fit_its_hours_is_cut_and_said(planned, timed):
    # Evaluations of 5640 s and six fine-tunes of 4000 leave time for 4 trials and a half.
    plan = planned(search={"max_hours": 38_600 / 3600})
    assert plan["size"] == {"noise_seeds": 0, "trials": 4, "seeds": 3, "tune": 0}
    (said,) = plan["cuts"]
    assert said == "search: 4 of 5 trials fit into max_hours 10.7222"
    assert f"Cut: {said}." in plan_text(plan, 80)


def test_a_run_that_does_not_fit_even_in_its_smallest_form_is_refused(planned, timed, tmp_path):
    line = planned(search={"max_hours": 9})
    assert line.startswith("Error: [search] max_hours 9 is too short: ")
    assert "2 trials of 33 min 20 s, 6 fine-tunes of 1 h 06 min for the comparison" in line
    assert "Raise it to 10, or lower" in line
    assert not (tmp_path / "out").exists()


def test_a_run_that_does_not_fit_into_memory_is_refused(planned, monkeypatch):
    monkeypatch.setattr(plan_module, "free_memory_bytes", lambda device: 500_000)
    line = planned()
    assert "the pruned model and one training sequence of 16 tokens need 970.9 KiB on cpu" in line
    assert "and 488.3 KiB are free. Free some; or set dtype" in line
    assert "or set [recovery] gradient_checkpointing = true; or set [corpus] max_length" in line
    monkeypatch.setattr(plan_module, "free_memory_bytes", lambda device: 100_000)
    assert "the weights of the base model need" in planned()
    monkeypatch.setattr(plan_module, "free_memory_bytes", lambda device: None)
    assert planned()["free_memory"] is None


def test_ranks_and_targets_are_checked_before_the_pruning(planned):
    assert "is too high for Layer" in planned(rank_space={"candidates": [2, 300], "budget": "free"})
    assert 'names "q_projj"' in planned(recovery={"target_modules": ["q_projj"]})
    assert "Error: " in planned(search={"allocation": "4-4"})


@pytest.mark.parametrize("method", ["width", "channel", "depth"])
def test_the_shape_that_pruning_leaves_is_known_without_weights(method):
    import torch

    from rankadaptor_plugin.core.registry import Registry
    from rankadaptor_plugin.hooks import builtin

    pruners = Registry("pruner")
    builtin.rankadaptor_register_pruners(register=pruners)
    source, pruner = EMBEDDED_FOLDER / "model", pruners.get(method)
    config = PruneConfig(
        method=method, pruning_ratio=0.3, importance="magnitude", keep_first=1, keep_last=1
    )
    tokenizer = load_tokenizer(source)
    cut = pruner(
        load_model(source, device=torch.device("cpu"), dtype=torch.float32), tokenizer, [], config
    )
    shape = shape_after(pruner, meta_model(source), tokenizer, config)
    assert (shape.shape, shape.parameters) == (cut.shape, cut.parameters)
    assert shape.model.device.type == "meta"
    assert shape_after(pruner, meta_model(source), tokenizer, PruneConfig(method="mine")) is None
