"""Recovery methods race uniform LoRA: what enters, what is compared, what the report says of it."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage
from safetensors.numpy import save_file

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.tables import (
    ConfirmConfig,
    OracleConfig,
    RankSpaceConfig,
    RecoveryConfig,
    SearchConfig,
)
from rankadaptor_plugin.config.tables import RunConfig as Config
from rankadaptor_plugin.core.errors import ConfigError, RankSpaceError, RecoveryError
from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.core.trials import Outcome, Phase, Trial, TrialState
from rankadaptor_plugin.pipeline.stage import (
    found_entrants,
    given_entrants,
    trained_parameters,
)
from rankadaptor_plugin.recovery.checks import check_methods
from rankadaptor_plugin.report import tables
from rankadaptor_plugin.report.report import markdown, page
from rankadaptor_plugin.report.words import METHODS, alone_sentence, verdict_sentence
from rankadaptor_plugin.search.study import TrialStore
from rankadaptor_plugin.verdict.comparison import compare_runs
from rankadaptor_plugin.verdict.race import (
    Confirmation,
    Entrant,
    Rules,
    check,
    fresh_seeds,
    run_name,
)
from rankadaptor_plugin.verdict.statistics import Difference, Seeds

UNIFORM = RankAllocation((8, 8))
FOUND = RankAllocation((2, 12))
ADALORA, NONE = replace(UNIFORM, method="adalora"), replace(UNIFORM, method="none")
SEEDS = fresh_seeds(0, 3)
SPACE = RankSpace(
    candidates=(2, 4, 8, 12), searchable=(True,) * 4, default_rank=8, costs=(10,) * 4, budget=320
)


def score(value: float, seed: int) -> Score:
    values = value + 0.01 * np.random.default_rng(seed).normal(size=30)
    return Score(tasks={"toy": TaskScore.of({"choice_logprob": values.tolist()})})


class Runs:
    """Fine-tunes that cost nothing."""

    def __init__(self, worth, fails=()):
        self.worth, self.fails, self.calls = worth, fails, []

    def __call__(self, allocation, seed):
        self.calls.append((allocation, seed))
        if allocation in self.fails:
            raise RecoveryError("The training loss is nan.")
        value = score(self.worth[allocation], seed + len(str(allocation)))
        return Outcome(
            search=value, report=value, objective=0.0, train_loss=1.0, seconds={"recovery": 1.0}
        )


WORTH = {UNIFORM: 0.0, FOUND: 0.0, ADALORA: 0.0, NONE: -1.0}
ENTRANTS = (
    Entrant(label="adalora", allocation=ADALORA, baseline=UNIFORM),
    Entrant(label="none", allocation=NONE, baseline=UNIFORM),
)


@pytest.fixture
def race(tmp_path):
    def confirmation(run, folder="run", store=None):
        return Confirmation(
            run=run,
            folder=RunFolder(tmp_path / folder),
            store=store or TrialStore(InMemoryStorage(), "confirm"),
            rules=Rules(
                seeds=SEEDS, confidence=0.95, metric="choice_logprob", weights={"toy": 1.0}
            ),
            on_run=lambda *_: None,
        )

    return confirmation


# ----------------------------------------------------------------------------------- allocations


@given(
    ranks=st.lists(st.integers(1, 64), min_size=1, max_size=6),
    method=st.sampled_from(["", "adalora", "eva+dora"]),
    rate=st.sampled_from([(), (("learning_rate", 1e-3),)]),
)
def test_an_allocation_keeps_its_method_as_plain_values(ranks, method, rate):
    allocation = RankAllocation(tuple(ranks), rate, method)
    assert RankAllocation.from_json(json.loads(json.dumps(allocation.to_json()))) == allocation
    assert ("method" in allocation.to_json()) == bool(method)


def test_an_allocation_shows_its_method_and_has_results_of_its_own():
    assert str(ADALORA) == "adalora 8-8"
    assert str(UNIFORM) == "8-8"
    assert len({run_name(a, 1) for a in (UNIFORM, ADALORA, NONE)}) == 3


def test_a_trial_keeps_its_method_and_old_records_have_none():
    trial = Trial(
        position=0,
        phase=Phase.CONFIRMATION,
        allocation=ADALORA,
        seed=1,
        state=TrialState.FAILED,
    )
    record = trial.to_json()
    assert Trial.from_json(record) == trial
    del record["method"]
    assert Trial.from_json(record).allocation == UNIFORM


# ------------------------------------------------------------------------------------ the run file


def config(*methods: str, **tables_) -> Config:
    return Config(
        recovery=RecoveryConfig(methods=methods), oracle=OracleConfig(tasks=("a",)), **tables_
    )


@pytest.mark.parametrize(
    ("methods", "competitors", "a_seed"),
    [
        (("rankadaptor",), 2, 3),
        (("rankadaptor", "lora"), 2, 3),
        (("rankadaptor", "adalora", "none"), 4, 5),
        (("adalora", "none"), 2, 3),
        (("pattern:4-12",), 1, 3),
        (("pattern:4-12", "dora"), 2, 4),
        (("rankadaptor", "pattern:4-12"), 3, 5),
        (("lora",), 1, 1),
    ],
)
def test_fine_tunes_of_all_methods_are_counted(methods, competitors, a_seed):
    found = config(*methods, confirm=ConfirmConfig(seeds=4))
    assert (found.competitors, found.race_fine_tunes) == (competitors, 4 * a_seed)


def test_finalists_with_baselines_of_their_own_are_counted_too():
    free = RankSpaceConfig(budget="free")
    # LoRA of the default rank runs beside them; as a method that races it is one more comparison.
    assert config("rankadaptor", rank_space=free).race_fine_tunes == 6 * 5
    assert config("rankadaptor", "dora", rank_space=free).race_fine_tunes == 6 * 6
    lora = config("rankadaptor", "lora", rank_space=free)
    assert (lora.competitors, lora.race_fine_tunes) == (3, 6 * 5)


@pytest.mark.parametrize(
    ("methods", "more", "message"),
    [
        ((), {}, "methods is empty"),
        (("dora", "dora"), {}, "names a method twice"),
        (("dora",), {"search": SearchConfig(allocation="4-8")}, r"\[search\] allocation has no"),
    ],
)
def test_methods_that_make_no_sense_are_refused(methods, more, message):
    with pytest.raises(ConfigError, match=message):
        config(*methods, **more)


@pytest.mark.parametrize(
    ("methods", "more", "message"),
    [
        (("lora",), {}, 'lacks "rankadaptor"'),
        (("rankadaptor",), {"search": SearchConfig(allocation="4-8")}, "names the ranks"),
    ],
)
def test_random_allocations_beside_no_search_are_refused(methods, more, message):
    with pytest.raises(ConfigError, match=message):
        check(config(*methods, confirm=ConfirmConfig(best_random=True), **more))
    check(config("rankadaptor", confirm=ConfirmConfig(best_random=True)))


def test_fewer_than_three_seeds_are_refused_for_a_verdict():
    with pytest.raises(ConfigError, match=r"confirm.seeds is 2; it must be at least 3"):
        run_file.from_dict({"confirm": {"seeds": 2}})


def test_methods_are_checked_by_name():
    check_methods(RecoveryConfig(methods=["rankadaptor", "lora", "dora", "adalora", "pattern:4-8"]))
    with pytest.raises(ConfigError, match="adalor"):
        check_methods(RecoveryConfig(methods=["adalor"]))
    with pytest.raises(ConfigError, match='"lora\\+dora" is the same as "dora"'):
        check_methods(RecoveryConfig(methods=["dora", "lora+dora"]))
    with pytest.raises(ConfigError, match='"LoRA" is the same as "lora"'):
        check_methods(RecoveryConfig(methods=["LoRA"]))
    with pytest.raises(ConfigError, match='takes the ranks of "rankadaptor"'):
        check_methods(RecoveryConfig(methods=["rankadaptor+dora"]))


# ------------------------------------------------------------------------------------ what enters


def test_a_method_has_the_ranks_of_uniform_lora():
    (found,) = given_entrants(["eva+dora"], SPACE)
    assert found.baseline == SPACE.uniform()
    assert found.allocation == replace(SPACE.uniform(), method="eva+dora")


def test_a_method_keeps_the_limits_of_uniform_lora():
    (found,) = given_entrants(["dora"], replace(SPACE, budget=None, max_rank_sum=20))
    assert sum(found.allocation.ranks) <= 20
    assert found.allocation.ranks == found.baseline.ranks


def test_a_list_of_ranks_is_lora_against_uniform_lora_of_its_size():
    (found,) = given_entrants(["pattern:2-6"], SPACE)
    assert found.allocation == RankAllocation((2, 2, 6, 6))
    assert found.baseline == RankAllocation((4, 4, 4, 4))


def test_a_list_of_ranks_may_have_a_method_on_top():
    (found,) = given_entrants(["pattern:2-6+dora"], SPACE)
    assert found.allocation == RankAllocation((2, 2, 6, 6), method="dora")
    assert found.baseline == RankAllocation((4, 4, 4, 4))


def test_a_list_of_ranks_by_layer_holds_for_every_group():
    space = replace(SPACE, groups=("attention", "mlp"))
    (found,) = given_entrants(["pattern:2-6"], space)
    assert found.allocation.ranks == (2, 2, 6, 6)
    (one,) = given_entrants(["pattern:4"], space)
    assert one.allocation == one.baseline


def test_a_method_may_take_the_ranks_that_were_found():
    methods = ["rankadaptor", "dora", "rankadaptor+dora", "lora"]
    best = Entrant(label="finalist", allocation=FOUND, baseline=UNIFORM)
    assert found_entrants(methods, best, UNIFORM) == [
        Entrant(
            label="rankadaptor+dora", allocation=replace(FOUND, method="dora"), baseline=UNIFORM
        )
    ]
    assert [e.label for e in given_entrants(methods, SPACE)] == ["dora"]


def test_lora_races_against_the_size_that_was_found_where_that_differs():
    small = RankAllocation((5, 5))
    best = Entrant(label="finalist", allocation=FOUND, baseline=small)
    assert found_entrants(["rankadaptor", "lora"], best, UNIFORM) == [
        Entrant(label="lora", allocation=UNIFORM, baseline=small)
    ]


def test_a_list_of_ranks_beyond_a_hard_limit_is_refused():
    with pytest.raises(RankSpaceError, match=r"160 trainable parameters .* max_parameters is 150"):
        given_entrants(["pattern:2-6"], replace(SPACE, budget=None, max_parameters=150))


# ------------------------------------------------------------------------------- what it trains


@pytest.fixture
def adapter(tmp_path):
    save_file(
        {
            "q.lora_A.weight": np.zeros((2, 5), np.float32),
            "q.lora_B.weight": np.zeros((7, 2), np.float32),
            "q.lora_magnitude_vector": np.zeros(7, np.float32),
        },
        tmp_path / "adapter_model.safetensors",
    )
    return tmp_path


@pytest.mark.parametrize(
    ("method", "count"),
    [("", 320), ("none", 0), ("adalora", 31), ("dora", 327), ("lora-fa", 14), ("pissa", 320)],
)
def test_parameters_are_those_that_are_trained(adapter, method, count):
    allocation = replace(SPACE.uniform(), method=method)
    assert trained_parameters(allocation, SPACE, RecoveryConfig(), adapter) == count
    if method == "dora":
        plain = SPACE.uniform()  # one that every fine-tune of the run turns into DoRA
        assert trained_parameters(plain, SPACE, RecoveryConfig(use_dora=True), adapter) == count


# --------------------------------------------------------------------------------------- the race


FINALIST = Entrant(label="finalist", allocation=FOUND, baseline=UNIFORM)


def test_methods_race_beside_the_finalists(race):
    run = Runs(WORTH)
    found = race(run).confirm([FINALIST, *ENTRANTS], UNIFORM)
    assert run.calls[:4] == [(a, SEEDS[0]) for a in (UNIFORM, FOUND, ADALORA, NONE)]
    assert [c.label for c in found.competitors] == ["finalist", "adalora", "none"]
    assert found.comparisons == 3
    assert found.competitors[2].comparison.is_loss
    assert found.methods == {"adalora": ADALORA, "none": NONE}


def test_methods_race_without_any_finalist(race):
    found = race(Runs({**WORTH, ADALORA: 0.5})).confirm(ENTRANTS, UNIFORM)
    assert (found.delivered, found.searched) == (ADALORA, None)
    assert found.to_json(lambda _: 1)["competitors"][0]["method"] == "adalora"


# ------------------------------------------------------------------------------------ the verdict

GAIN = Difference(
    estimate=0.012,
    low=0.004,
    high=0.020,
    half_width=0.008,
    confidence=0.95,
    comparisons=2,
    p=0.004,
    p_adjusted=0.008,
    seeds=Seeds(5, 5, paired=True, left_out=0),
    documents=600,
    left_out=0,
)
NO_GAIN = replace(GAIN, estimate=0.003, low=-0.006, high=0.012, half_width=0.009)


def test_the_verdict_names_the_method():
    assert verdict_sentence(GAIN, [8], subject="adalora") == (
        "gain of 1.2 +- 0.8 points over LoRA r=8 at equal parameters, by adalora"
    )
    assert verdict_sentence(NO_GAIN, [8], subject="eva") == (
        "no gain beyond noise: LoRA r=8 is delivered "
        "(0.3 +- 0.9 points over it at equal parameters, by eva)"
    )


def test_the_verdict_claims_equal_parameters_only_where_they_are():
    words = "with 6 % more trainable parameters"
    assert verdict_sentence(GAIN, [8], subject="dora", parameters=words) == (
        "gain of 1.2 +- 0.8 points over LoRA r=8 with 6 % more trainable parameters, by dora"
    )


def test_the_verdict_says_that_nothing_was_compared():
    assert alone_sentence([8, 8]) == ("nothing was compared: LoRA r=8 ran alone and is delivered")
    assert verdict_sentence(None, [8], subject=METHODS) == (
        "no recovery method is shown to be better than LoRA r=8, which is delivered"
    )


# ------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_run_file, command):
    def make(*methods, **changes):
        folder = tmp_path_factory.mktemp("methods")
        file = write_run_file(folder / "run.toml", recovery={"methods": [*methods]}, **changes)
        result = command("run", file)
        assert result.exit_code == 0, result.stderr
        return SimpleNamespace(
            file=file,
            folder=folder / "out",
            report=json.loads((folder / "out" / "report.json").read_text("utf-8")),
            markdown=(folder / "out" / "report.md").read_text("utf-8"),
            html=(folder / "out" / "report.html").read_text("utf-8"),
            stderr=result.stderr,
        )

    return make


@pytest.fixture(scope="module")
def methods_alone(run):
    return run("adalora", "none", "pattern:4-12")


def test_methods_race_without_a_search(methods_alone):
    report = methods_alone.report
    assert report["trials"] == []
    assert report["search"]["stop_reason"] == "recovery methods"
    assert "No search: the run file names only other recovery methods." in methods_alone.markdown
    labels = [entry["label"] for entry in report["confirm"]["competitors"]]
    assert labels == report["methods"] == ["adalora", "none", "pattern:4-12"]
    assert "searched" not in report["scores"]


def test_the_report_has_a_column_for_each_method(methods_alone):
    report = methods_alone.report
    header = tables.scores(report, "accuracy").header
    best = report["verdict"]["delivered"]
    shown = [name for name in report["methods"] if name != best]
    label = report["labels"].get(best, best)
    assert header == ("task", "base", "pruned", "LoRA r=8", *shown, f"recovered ({label})")
    for text in (methods_alone.markdown, methods_alone.html):
        assert "adalora, trainable" in text
        assert "no adapter" in text


def test_a_delivered_list_of_ranks_is_shown_by_layer(methods_alone):
    name, report = "pattern:4-12", deepcopy(methods_alone.report)
    report["verdict"]["delivered"] = name
    report["allocations"]["recovered"] = [4] * 4 + [12] * 4
    report["scores"]["recovered"] = report["scores"][name]
    assert "Delivered: pattern:4-12. " in markdown(report)
    assert re.search(f"LoRA r=8 +{name} ranks", markdown(report))
    assert "layer 7: searched rank 12" not in page(methods_alone.report)
    assert f"layer 7: {name} rank 12" in page(report)
    assert tables.scores(report, "accuracy").header[-1] == f"recovered ({name})"
    assert tables.scores(report, "accuracy").header.count(name) == 0


def test_a_delivered_method_of_uniform_ranks_shows_those_alone(methods_alone):
    report = deepcopy(methods_alone.report)
    report["verdict"]["delivered"] = "adalora"
    assert list(tables.allocations(report)) == ["uniform"]
    assert "Delivered: adalora. " in markdown(report)
    assert "<dd>adalora</dd>" in page(report)


def test_the_report_has_the_trained_parameters_of_each_method(methods_alone):
    trainable = methods_alone.report["parameters"]["trainable"]
    assert trainable["none"] == 0
    assert trainable["pattern:4-12"] == trainable["uniform"]
    assert trainable["adalora"] == pytest.approx(trainable["uniform"], rel=0.02)


def test_without_a_fine_tune_the_model_is_the_pruned_one(methods_alone):
    scores = methods_alone.report["scores"]
    for task, metrics in scores["none"].items():
        for metric, cell in metrics.items():
            assert cell["mean"] == pytest.approx(scores["pruned"][task][metric]["mean"], abs=1e-6)


def test_methods_of_a_finished_run_can_be_compared(methods_alone):
    folder = methods_alone.folder
    found = compare_runs([f"{folder}:adalora", f"{folder}:pattern:4-12", f"{folder}:none"])
    assert [model.model for model in found.models] == ["adalora", "pattern:4-12", "none"]
    every = [model.model for model in compare_runs([str(folder)]).models]
    assert every == ["adalora", "none", "pattern:4-12", "uniform"]


def test_methods_race_the_searched_ranks_in_one_report(run):
    found = run("rankadaptor", "rankadaptor+dora", search={"n_startup_trials": 2, "n_trials": 2})
    labels = [entry["label"] for entry in found.report["confirm"]["competitors"]]
    assert labels == ["finalist", "rankadaptor+dora"]
    ours, theirs = (entry["ranks"] for entry in found.report["confirm"]["competitors"])
    assert ours == theirs
    trainable = found.report["parameters"]["trainable"]
    assert trainable["rankadaptor+dora"] > trainable["searched"]


def test_uniform_lora_alone_is_delivered_and_nothing_is_claimed(run):
    found = run("lora")
    report = found.report
    assert report["verdict"]["sentence"] == alone_sentence([8])
    assert (report["verdict"]["delivered"], report["verdict"]["comparisons"]) == ("uniform", {})
    assert len(report["results"]["uniform"]) == 3
    assert "No race was run. LoRA ran alone, with 3 seeds." in found.markdown


def test_columns_of_lora_are_labeled_by_their_ranks_whatever_was_searched(run):
    """With a free budget the even allocation of equal size is not LoRA of the default rank."""
    free = {"budget": "free", "candidates": [2, 4], "default_rank": 8}
    report = run("rankadaptor", "lora", rank_space=free, search={"n_trials": 3}).report
    ranks = report["allocations"]
    assert ranks["lora"] == [8] * 8
    assert max(ranks["uniform"]) <= 4
    assert report["labels"]["lora"] == "LoRA r=8"
    header = tables.scores(report, "accuracy").header
    for name in ("lora", "uniform"):
        count = report["parameters"]["trainable"][name]
        assert f"{report['labels'][name]}, {count:,} parameters" in header
    assert "uniform LoRA" not in header
    labels = [c["label"] for c in report["confirm"]["competitors"]]
    assert labels == ["finalist", "lora"]
    assert len(report["results"]["lora"]) == 3
