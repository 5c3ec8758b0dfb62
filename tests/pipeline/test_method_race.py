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
    TuneConfig,
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
    race_entrants,
    trained_parameters,
)
from rankadaptor_plugin.pipeline.tune_step import Tuned
from rankadaptor_plugin.recovery.checks import check_methods
from rankadaptor_plugin.report import tables
from rankadaptor_plugin.report.report import markdown, page
from rankadaptor_plugin.search.search import SearchResult, StopReason
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


RECIPE = RankAllocation((8, 8), (("learning_rate", 1e-4),), "lora")
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
        recovery=RecoveryConfig(methods=methods, stack=()),
        oracle=OracleConfig(tasks=("a",)),
        **{"tune": TuneConfig(learning_rates=()), **tables_},
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
    assert (found.comparisons, found.race_fine_tunes) == (competitors, 4 * a_seed)


def test_tuned_lora_and_the_stack_are_counted_too():
    found = Config(oracle=OracleConfig(tasks=("a",)))
    assert found.race_fine_tunes == 6 * (1 + 2 + 2)  # the recipe, both levers, two finalists
    assert found.comparisons == 1 + 2  # tuned LoRA behind the stack takes no error rate
    assert config("lora", tune=TuneConfig()).race_fine_tunes == 6 * 2


def test_finalists_with_baselines_of_their_own_are_counted_too():
    free = RankSpaceConfig(budget="free")
    # LoRA by the recipe, of the default rank, runs beside them.
    assert config("rankadaptor", rank_space=free).race_fine_tunes == 6 * 5
    assert config("rankadaptor", "dora", rank_space=free).race_fine_tunes == 6 * 6
    lora = config("rankadaptor", "lora", rank_space=free)
    assert (lora.comparisons, lora.race_fine_tunes) == (2, 6 * 5)


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
    (found,) = given_entrants(["eva+dora"], SPACE, RECIPE)
    assert (found.baseline, found.is_ranks) == (RECIPE, False)
    assert found.allocation == replace(SPACE.uniform(), method="eva+dora")


def test_a_method_keeps_the_limits_of_uniform_lora():
    (found,) = given_entrants(["dora"], replace(SPACE, budget=None, max_rank_sum=20), RECIPE)
    assert sum(found.allocation.ranks) <= 20


def test_a_list_of_ranks_is_lora_against_uniform_lora_of_its_size():
    (found,) = given_entrants(["pattern:2-6"], SPACE, RECIPE)
    assert found.allocation == RankAllocation((2, 2, 6, 6))
    assert (found.baseline, found.is_ranks) == (RankAllocation((4, 4, 4, 4)), True)


def test_a_list_of_ranks_may_have_a_method_on_top():
    (found,) = given_entrants(["pattern:2-6+dora"], SPACE, RECIPE)
    assert found.allocation == RankAllocation((2, 2, 6, 6), method="dora")
    assert found.baseline == RankAllocation((4, 4, 4, 4), method="dora")


def test_a_list_of_ranks_by_layer_holds_for_every_group():
    space = replace(SPACE, groups=("attention", "mlp"))
    (found,) = given_entrants(["pattern:2-6"], space, RECIPE)
    assert found.allocation.ranks == (2, 2, 6, 6)
    (one,) = given_entrants(["pattern:4"], space, RECIPE)
    assert one.allocation == one.baseline


def test_a_method_may_take_the_ranks_that_were_found():
    methods = ["rankadaptor", "dora", "rankadaptor+dora", "lora"]
    assert found_entrants(methods, FOUND, RECIPE) == [
        Entrant(label="rankadaptor+dora", allocation=replace(FOUND, method="dora"), baseline=RECIPE)
    ]
    assert [e.label for e in given_entrants(methods, SPACE, RECIPE)] == ["dora"]


def entrants_of(tuned, *methods, trials=(FOUND,), **more):
    store = SearchResult(trials=(), stop=StopReason.N_TRIALS, interrupted=0, recommended=trials)
    return race_entrants(config(*methods, **more), SPACE, tuned, store)


def test_the_stack_and_ranks_on_it_race_with_the_recipe():
    tuned = Tuned(recipe=1e-3, learning_rate=1e-2, parts=("gradient",))
    even = SPACE.uniform()
    reference, entrants = entrants_of(tuned, "rankadaptor")
    assert reference == replace(even, method="lora", settings=(("learning_rate", 1e-3),))
    assert [(e.label, e.allocation, e.baseline, e.is_ranks) for e in entrants] == [
        ("stack", even, reference, False),
        ("LoRA, tuned", replace(even, method="lora"), reference, False),
        ("finalist", FOUND, even, True),
    ]


def test_without_a_stack_tuned_lora_is_what_ranks_are_compared_with():
    _, entrants = entrants_of(Tuned(recipe=1e-3, learning_rate=1e-2, parts=()), "rankadaptor")
    assert [(e.label, e.allocation) for e in entrants] == [
        ("LoRA, tuned", SPACE.uniform()),
        ("finalist", FOUND),
    ]


def test_where_the_recipe_was_right_ranks_are_compared_with_it():
    reference, entrants = entrants_of(
        Tuned(recipe=1e-3, learning_rate=1e-3, parts=()), "rankadaptor"
    )
    assert reference == SPACE.uniform()
    assert [(e.label, e.baseline) for e in entrants] == [("finalist", reference)]


def test_settings_that_were_searched_along_are_not_credited_to_ranks():
    """Even ranks get the same learning rate and alpha."""
    settings = (("alpha_over_rank", 4.0), ("learning_rate", 5e-3))
    warm = replace(FOUND, settings=settings)
    _, entrants = entrants_of(
        Tuned(recipe=1e-3, learning_rate=1e-3, parts=()), "rankadaptor", trials=(warm,)
    )
    (found,) = entrants
    assert dict(found.baseline.settings) == dict(settings)
    assert found.baseline.ranks == SPACE.uniform().ranks


def test_a_list_of_ranks_beyond_a_hard_limit_is_refused():
    with pytest.raises(RankSpaceError, match=r"160 trainable parameters .* max_parameters is 150"):
        given_entrants(["pattern:2-6"], replace(SPACE, budget=None, max_parameters=150), RECIPE)


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
    assert [name.removesuffix(" (delivered)") for name in header] == [
        *("task", "base", "pruned", "LoRA r=8", *report["methods"])
    ]
    assert sum(name.endswith(" (delivered)") for name in header) == 1
    for text in (methods_alone.markdown, methods_alone.html):
        assert "adalora, trainable" in text
        assert "no adapter" in text


def test_a_delivered_list_of_ranks_is_shown_by_layer(methods_alone):
    name, report = "pattern:4-12", deepcopy(methods_alone.report)
    report["verdict"]["delivered"] = name
    report["allocations"]["recovered"] = [4] * 4 + [12] * 4
    report["scores"]["recovered"] = report["scores"][name]
    assert "Delivered: pattern:4-12, an adapter of pruned/. " in markdown(report)
    assert re.search(f"LoRA r=8 +{name} ranks", markdown(report))
    assert "layer 7: searched rank 12" not in page(methods_alone.report)
    assert f"layer 7: {name} rank 12" in page(report)
    assert tables.scores(report, "accuracy").header[-1] == f"{name} (delivered)"


def test_a_delivered_method_of_uniform_ranks_shows_those_alone(methods_alone):
    report = deepcopy(methods_alone.report)
    report["verdict"]["delivered"] = "adalora"
    assert list(tables.allocations(report)) == ["uniform"]
    assert "Delivered: adalora, an adapter of pruned/. " in markdown(report)
    assert "<dd>adalora, an adapter of pruned/</dd>" in page(report)


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
    assert report["verdict"]["sentence"] == "LoRA r=8 is delivered"
    assert (report["verdict"]["delivered"], report["verdict"]["comparisons"]) == ("uniform", {})
    assert len(report["results"]["uniform"]) == 3
    assert "No race was run. LoRA ran alone, with 3 seeds." in found.markdown


def test_columns_of_lora_are_labeled_by_their_ranks_whatever_was_searched(run):
    """With a free budget the even allocation of equal size is not LoRA of the default rank."""
    free = {"budget": "free", "candidates": [2, 4], "default_rank": 8}
    report = run("rankadaptor", "lora", rank_space=free, search={"n_trials": 3}).report
    ranks = report["allocations"]
    assert ranks["recipe"] == [8] * 8
    assert max(ranks["uniform"]) <= 4
    assert report["labels"]["recipe"] == "LoRA r=8"
    header = " | ".join(tables.scores(report, "accuracy").header)
    for name in ("recipe", "uniform"):
        count = report["parameters"]["trainable"][name]
        assert f"{report['labels'][name]}, {count:,} parameters" in header
    assert "uniform LoRA" not in header
    labels = [c["label"] for c in report["confirm"]["competitors"]]
    assert labels == ["finalist"]
    assert len(report["results"]["recipe"]) == 3
