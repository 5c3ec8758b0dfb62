"""Whole small runs of every way to search: limits, settings, what is known, what is reported."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.scores import Score, TaskScore, document_key
from rankadaptor_plugin.models.families import LLAMA
from rankadaptor_plugin.pipeline.budget import Budget
from rankadaptor_plugin.recovery.files import adapter_parameters
from rankadaptor_plugin.verdict.race import run_name

LAYERS = 8  # of the embedded model
DOCUMENTS = {
    purpose: torch.randint(3, 213, (6, 9), generator=torch.Generator().manual_seed(len(purpose)))
    for purpose in ("search", "report")
}
QUICK = {
    "corpus": {"max_train_samples": 64},
    "prune": {"importance": "magnitude"},
    "recovery": {"max_steps": 4, "learning_rate": 0.02},
    "oracle": {"name": "fluency", "tasks": []},
    "search": {"n_trials": 6, "n_startup_trials": 0},
    "confirm": {"finalists": 1},
}


class Fluency:
    """A quick oracle: how likely a model finds a few documents; counts what it scores."""

    scored = 0

    def __init__(self, settings):
        pass

    def value(self, model, tokens):
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits.float().log_softmax(-1)
        return logits.gather(-1, tokens[:, 1:, None])[..., 0].mean(1).tolist()

    def score(self, model, documents):
        type(self).scored += 1
        was_training = model.training
        model.eval()
        values = self.value(model, DOCUMENTS[documents])
        model.train(was_training)
        return Score(
            tasks={"toy": TaskScore.of({"choice_logprob": values}, keys=self._keys(documents))}
        )

    def metrics(self, documents):
        return ("choice_logprob",)

    def weights(self, documents):
        return {"toy": 1.0}

    def describe(self):
        return {"documents": {p: {"toy": self._keys(p)} for p in DOCUMENTS}, "digest": "fluency"}

    def _keys(self, documents):
        return [document_key(str(row)) for row in DOCUMENTS[documents].tolist()]


class Constant(Fluency):
    """Says the same of every model."""

    def value(self, model, tokens):
        return [-1.5] * len(tokens)


class Oracles:
    @hookimpl
    def rankadaptor_register_oracles(self, register):
        for kind in (Fluency, Constant):
            register(kind.__name__.lower(), kind)


class Watcher(Oracles):
    """Notes the trials and how long they took."""

    def __init__(self):
        self.trials, self.stages = [], []

    @hookimpl
    def rankadaptor_after_trial(self, trial):
        self.trials.append(trial)

    @hookimpl
    def rankadaptor_on_progress(self, stage, done, total):
        self.stages.append((stage, done, total))


def merged(*tables):
    found = {}
    for table in tables:
        for key, value in table.items():
            both = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = {**found[key], **value} if both else value
    return found


@pytest.fixture(scope="module")
def start(write_run_file, command):
    """Calls ``run`` in a folder."""

    def call(folder, **changes):
        file = write_run_file(folder / "r.toml", **merged(QUICK, changes))
        watcher = Watcher()
        return command("run", file, plugin=watcher), watcher

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory, start):
    """Makes a run that ends well; returns its folder, report, trials and output."""

    def make(**changes):
        folder = tmp_path_factory.mktemp("run")
        result, watcher = start(folder, **changes)
        assert result.exit_code == 0, result.stderr
        out = folder / "out"
        report = json.loads((out / "report.json").read_text("utf-8"))
        return SimpleNamespace(
            folder=out, report=report, trials=watcher.trials, watcher=watcher, result=result
        )

    return make


def assert_error(result, *fragments, codes=(1, 2)):
    assert result.exit_code in codes, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for fragment in fragments:
        assert fragment in lines[0]


def assert_rendered(found, *words):
    for suffix in ("md", "html"):
        text = (found.folder / f"report.{suffix}").read_text("utf-8")
        for word in words:
            assert word in text, (suffix, word)


class Study:
    """A study of a run, closed at the end."""

    def __init__(self, found, name="search"):
        self.url, self.name = f"sqlite:///{found.folder / 'study.db'}", name

    def __enter__(self):
        self.storage = optuna.storages.RDBStorage(self.url)
        return optuna.load_study(study_name=self.name, storage=self.storage)

    def __exit__(self, *_):
        self.storage.remove_session()
        self.storage.engine.dispose()


# ------------------------------------------------------------------------------------- the default


@pytest.fixture(scope="module")
def default(run):
    return run(search={"n_trials": 10}, performance_model={"epochs": 5})


def test_bayes_is_the_default(default):
    search = default.report["search"]
    assert (search["method"], search["complete"], search["stop_reason"]) == (
        "bayes",
        10,
        "n_trials",
    )
    assert_rendered(default, "bayes")
    predicted = [trial["predicted"] for trial in default.report["trials"]]
    assert predicted[:3] == [None] * 3
    assert None not in predicted[3:]


def test_slice_plots_work_on_the_study(default):
    with Study(default) as study:
        figure = optuna.visualization.plot_slice(study)
    assert len(figure.data) == LAYERS
    assert all(len(trace.x) == 10 for trace in figure.data)


def test_a_run_that_ended_repeats_nothing(default, tmp_path, start):
    shutil.copytree(default.folder, tmp_path / "out")
    result, watcher = start(tmp_path, search={"n_trials": 10}, performance_model={"epochs": 5})
    assert result.exit_code == 0, result.stderr
    assert watcher.trials == []
    again = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    for key in ("trials", "search", "verdict", "knowledge", "front", "confirm"):
        assert again[key] == default.report[key]


# --------------------------------------------------------------------------------- no search at all


@pytest.fixture(scope="module")
def fixed(run):
    return run(search={"allocation": "4-6-8-12-10-8-6-10"}, noise={"seeds": 2, "allocations": 2})


def test_a_given_allocation_is_raced_without_a_search(fixed):
    report = fixed.report
    assert fixed.trials == []
    assert report["search"]["stop_reason"] == "fixed allocation"
    assert report["trials"] == []
    assert report["allocations"]["searched"] == [4, 6, 8, 12, 10, 8, 6, 10]
    assert_rendered(fixed, "4-6-8-12-10-8-6-10")


def test_a_given_allocation_makes_no_trials_that_random_ones_could_equal(tmp_path, start):
    result, _ = start(
        tmp_path, search={"allocation": "-".join(["8"] * LAYERS)}, confirm={"best_random": True}
    )
    assert_error(result, "best_random", "allocation", codes=(2,))


# ------------------------------------------------------------------- rank 0, groups and projections


@pytest.fixture(scope="module")
def grouped(run):
    return run(
        rank_space={
            "per": "group",
            "candidates": [0, 4, 8, 12],
            "alpha_over_rank": [1.0, 2.0, 4.0],
            "learning_rate": [0.005, 0.02],
        },
        search={"n_trials": 6},
    )


@pytest.fixture(scope="module")
def projected(run):
    return run(
        rank_space={"per": "projection", "candidates": [0, 2, 12], "budget": "free"},
        search={"method": "random", "n_trials": 3},
        confirm={"finalists": 2},
    )


GROUPS = {"grouped": (4, 3), "projected": (1,) * 7}  # matrices per slot of a layer


def expected_ranks(allocation, groups):
    """Ranks by module, those without adapter left out."""
    sizes = groups * LAYERS
    spread = [r for r, size in zip(allocation, sizes, strict=True) for _ in range(size)]
    names = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in LLAMA.matrices]
    return {name: rank for name, rank in zip(names, spread, strict=True) if rank}


def loaded(found, folder):
    """The ranks and scalings that plain PEFT finds in an adapter."""
    base = AutoModelForCausalLM.from_pretrained(found.folder / "pruned")
    model = PeftModel.from_pretrained(base, folder)
    modules = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    ranks = {name: len(module.lora_A["default"].weight) for name, module in modules.items()}
    assert all(module.lora_B["default"].weight.abs().max() > 0 for module in modules.values()), (
        "nothing was trained, or the weights were not found"
    )
    return ranks, {module.scaling["default"] for module in modules.values()}


@pytest.mark.filterwarnings(  # PEFT 0.21 asks for an attribute that transformers 5.23 renamed
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)
@pytest.mark.parametrize("which", GROUPS)
def test_adapters_on_disk_have_the_ranks_and_load_with_plain_peft(which, request):
    found = request.getfixturevalue(which)
    competitors = found.report["confirm"]["competitors"]
    raced = {
        RankAllocation(tuple(c["ranks"]), tuple(sorted(c["settings"].items())))
        for c in [*competitors, *found.report["confirm"]["baselines"]]
    }
    folders = {found.folder / "adapters" / run_name(a, 1_000_000): a for a in raced}
    assert set((found.folder / "adapters").iterdir()) == set(folders)
    for folder, allocation in folders.items():
        ranks, scalings = loaded(found, folder)
        # Modules of rank 0 are absent.
        assert ranks == expected_ranks(allocation.ranks, GROUPS[which])
        scaling = dict(allocation.settings).get("alpha_over_rank", 2.0)
        assert scalings == {scaling}
    assert any(0 in allocation.ranks for allocation in raced)
    ranks, _ = loaded(found, found.folder / "adapter")
    assert ranks == expected_ranks(found.report["allocations"]["recovered"], GROUPS[which])


def test_slots_are_named_in_the_report(grouped, projected):
    assert grouped.report["slots"][:2] == ["layer_00.attention", "layer_00.mlp"]
    assert projected.report["slots"][:2] == ["layer_00.q_proj", "layer_00.k_proj"]
    for found in (grouped, projected):
        for trial in found.report["trials"]:
            assert len(trial["ranks"]) == len(found.report["slots"])
        assert any(0 in trial["ranks"] for trial in found.report["trials"])


def test_searched_settings_are_in_trials_report_and_study(grouped):
    chosen = [trial["settings"] for trial in grouped.report["trials"]]
    assert all(set(c) == {"alpha_over_rank", "learning_rate"} for c in chosen)
    assert {c["alpha_over_rank"] for c in chosen} <= {1.0, 2.0, 4.0}
    assert {c["learning_rate"] for c in chosen} == {0.005, 0.02}
    assert len({c["alpha_over_rank"] for c in chosen}) > 1
    with Study(grouped) as study:
        for trial, settings in zip(study.trials, chosen, strict=True):
            assert {name: trial.params[name] for name in settings} == settings
    first = chosen[0]
    assert_rendered(grouped, f"learning_rate {first['learning_rate']:g}")


def test_every_trial_counts_its_parameters_on_the_uneven_matrices(grouped):
    budget = grouped.report["parameters"]["trainable"]["uniform"]
    for trial in grouped.report["trials"]:
        assert 0 < trial["parameters"] <= budget
        assert trial["parameters"] > 0.8 * budget
    for folder in (grouped.folder / "adapters").iterdir():
        assert 0.8 * budget < adapter_parameters(folder) <= budget


# ------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(("key", "method"), [("max_hours", "bayes"), ("max_gpu_hours", "random")])
def test_time_ends_a_search_and_says_so(run, monkeypatch, key, method):
    def allows(budget, stage, runs=1, *, trials=0, needed=False):
        fits = needed or stage != "search" or trials <= 4
        if not fits:
            budget.refused.add(stage)
        return fits

    monkeypatch.setattr(Budget, "allows", allows)
    found = run(search={"method": method, key: 100.0, "n_trials": 60})
    assert found.report["search"]["stop_reason"] == key
    assert len(found.report["trials"]) == 4
    assert found.report["cuts"] == ["search: 4 of 60 trials"]
    assert_rendered(found, key, f"Cut to fit {key} 100: search: 4 of 60 trials.")


# ------------------------------------------------------------------- pareto, random


@pytest.fixture(scope="module")
def everything(run):
    """Pareto with random search beside it."""
    return run(
        rank_space={"budget": "free", "candidates": [0, 4, 12]},
        search={"pareto": True, "n_trials": 12},
        confirm={"finalists": 1, "best_random": True},
    )


def test_the_front_is_in_every_form_of_the_report(everything):
    front = everything.report["front"]
    assert front
    points = [(trial["parameters"], trial["objective"]) for trial in front]
    assert points == sorted(points)
    assert [value for _, value in points] == sorted(value for _, value in points)
    for trial in everything.report["trials"]:
        if trial["state"] == "complete":
            size, value = trial["parameters"], trial["objective"]
            assert any(s <= size and v >= value for s, v in points)
    assert_rendered(everything, "front of score against trainable parameters")


def test_pareto_needs_a_free_budget(tmp_path, start):
    result, _ = start(tmp_path, search={"pareto": True})
    assert_error(result, 'Set budget = "free"', codes=(2,))


def test_the_best_random_allocation_races_too(everything):
    labels = [c["label"] for c in everything.report["confirm"]["competitors"]]
    assert "best random" in " ".join(labels)
    with Study(everything, "random") as study:
        records = [trial.user_attrs["rankadaptor_trial"] for trial in study.trials]
    searched = everything.report["trials"]
    assert len(records) == len(searched)
    assert {record["seed"] for record in records} == {trial["seed"] for trial in searched}
    ranks = [record["ranks"] for record in records]
    assert ranks != [trial["ranks"] for trial in searched]
    assert len({tuple(r) for r in ranks}) == len(ranks)


def test_random_search_beside_a_random_search_is_another_one(run):
    found = run(
        search={"method": "random", "n_trials": 3}, confirm={"finalists": 1, "best_random": True}
    )
    with Study(found, "random") as study:
        ranks = [tuple(t.user_attrs["rankadaptor_trial"]["ranks"]) for t in study.trials]
    assert not set(ranks) & {tuple(trial["ranks"]) for trial in found.report["trials"]}


# ------------------------------------------------------------------------------- earlier studies


@pytest.fixture(scope="module")
def meta(default, tmp_path_factory, command):
    out = tmp_path_factory.mktemp("meta") / "meta.safetensors"
    done = command("meta-learn", default.folder, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert "10 trials of 8 layers" in done.stdout
    return out


def test_a_run_begins_with_what_an_earlier_one_taught(run, meta):
    found = run(
        seed=1,
        rank_space={"candidates": [4, 8, 12]},
        search={"n_trials": 5, "meta": str(meta)},
    )
    (entry,) = found.report["knowledge"]
    assert entry["name"] == "earlier studies"
    assert 0 <= entry["weight"] <= 1
    assert -1 <= entry["correlation"] <= 1
    assert np.isfinite(entry["gain"])
    assert {trial["phase"] for trial in found.report["trials"]} == {"iteration"}
    assert_rendered(found, "earlier studies", "known before the search")


def test_the_paper_uses_earlier_studies_too(run, meta):
    found = run(
        search={"method": "paper", "n_startup_trials": 2, "n_trials": 3, "meta": str(meta)},
        performance_model={"meta_epochs": 5, "epochs": 5},
    )
    assert [entry["name"] for entry in found.report["knowledge"]] == ["earlier studies"]


# ------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def constant(run):
    return run(
        oracle={"name": "constant"},
        search={"n_trials": 10},
        performance_model={"epochs": 5},
        noise={"seeds": 2, "allocations": 2, "search_despite_noise": True},
    )


def test_equal_scores_deliver_uniform_lora(constant):
    report = constant.report
    assert {trial["objective"] for trial in report["trials"]} == {-1.5}
    assert report["search"]["complete"] == 10
    assert report["verdict"]["delivered"] == "uniform"
    json.loads((constant.folder / "report.json").read_text("utf-8"), parse_constant=pytest.fail)
