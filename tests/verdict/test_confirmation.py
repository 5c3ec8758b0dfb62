"""Confirmation: fresh seeds, a race on the report documents, the same after an interruption."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from optuna.storages import InMemoryStorage

from rankadaptor_plugin.core.errors import OracleError, RecoveryError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.core.trials import Outcome, Phase, TrialState
from rankadaptor_plugin.search.study import TrialStore
from rankadaptor_plugin.verdict.race import (
    BEST_RANDOM,
    FINALIST,
    STACK,
    TUNED,
    Confirmation,
    Entrant,
    Reason,
    Rules,
    baseline_label,
    fresh_seeds,
    run_name,
)

A, B, C = (RankAllocation(ranks) for ranks in ((2, 12), (12, 2), (4, 10)))
UNIFORM, SMALL = RankAllocation((7, 7)), RankAllocation((5, 5))
SEEDS = fresh_seeds(5, 4)


def score(value: float, noise: float = 0.0, seed: int = 0) -> Score:
    values = value + noise * np.random.default_rng(seed).normal(size=40)
    other = {"choice_logprob": values.tolist(), "accuracy": (values / 3).tolist()}
    return Score(tasks={"toy": TaskScore.of(other)})


class BrokenOffError(Exception):
    """What ends a process in the middle of a race."""


class ToyRuns:
    """Fine-tunes that cost nothing; `worth` is the mean on the report documents."""

    def __init__(self, worth, breaks_at=None, diverges=(), noise=0.1):
        self.worth, self.breaks_at, self.noise = worth, breaks_at, noise
        self.diverges, self.calls = diverges, []

    def __call__(self, allocation, seed):
        if len(self.calls) == self.breaks_at:
            raise BrokenOffError
        self.calls.append((allocation, seed))
        if (allocation, seed) in self.diverges:
            raise RecoveryError("The training loss is nan at step 2 of 3.")
        value = self.worth[allocation] + (seed - SEEDS[0]) / 7
        own = 1000 * sum(allocation.ranks) + 10 * allocation.ranks[0] + seed
        return Outcome(
            search=score(-value),  # the other way round: it must not matter
            report=score(value, self.noise, own),
            objective=-value,
            train_loss=1 / 3,
            seconds={"recovery": 0.1, "oracle": 0.2},
        )


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


@pytest.fixture
def store():
    return TrialStore(InMemoryStorage(), "confirm")


RULES = Rules(seeds=SEEDS, confidence=0.95, metric="choice_logprob", weights={"toy": 1.0})


def race(
    folder, store, run, finalists=(A, B), baseline_for=lambda _: UNIFORM, best_random=None, **more
):
    labels = [(FINALIST, a) for a in finalists]
    labels += [(BEST_RANDOM, best_random)] if best_random else []
    entrants = [
        Entrant(label=label, allocation=a, baseline=baseline_for(a), is_ranks=True)
        for label, a in labels
    ]
    reference = more.pop("reference", UNIFORM)
    options = {"run": run, "folder": folder, "store": store, "rules": RULES}
    confirmation = Confirmation(**{**options, "on_run": lambda *_: None, **more})
    return confirmation.confirm(entrants, reference)


def rounds(*entries):
    """Calls in order: (seeds, allocations) after each other."""
    return [(a, s) for seeds, allocations in entries for s in seeds for a in allocations]


EQUAL = dict.fromkeys((A, B, C, UNIFORM, SMALL), 0.2)
ONE_GAINS = {**EQUAL, A: 0.19, B: 0.5, UNIFORM: 0.19}


def test_seeds_are_fresh():
    many = fresh_seeds(0, 100)
    assert len(set(many)) == 100
    assert set(many).isdisjoint(range(10_000))
    assert fresh_seeds(5, 9)[:4] == SEEDS


def test_the_race_runs_one_seed_after_the_other(folder, store):
    run, told = ToyRuns(EQUAL), []
    result = race(folder, store, run, on_run=lambda *args: told.append(args))
    assert run.calls == rounds((SEEDS, (UNIFORM, A, B)))
    assert told == [(done, 12) for done in range(1, 13)]
    assert result.fine_tunes == 12
    assert [c.reason for c in result.competitors] == [None, None]
    assert result.delivered == result.baseline == UNIFORM


def test_the_one_that_gains_is_delivered(folder, store):
    result = race(folder, store, ToyRuns(ONE_GAINS, noise=0.01))
    loser, winner = result.competitors
    assert (loser.is_gain, winner.is_gain) == (False, True)
    assert result.chosen is winner
    assert result.searched == result.delivered == B
    assert winner.comparison.estimate == pytest.approx(0.31, abs=0.02)
    assert (winner.comparison.confidence, winner.comparison.comparisons) == (0.95, 2)
    assert (result.seeds_of(B), len(result.reports(UNIFORM))) == (SEEDS, 4)


def test_where_all_are_worse_uniform_lora_has_won(folder, store):
    result = race(folder, store, ToyRuns({**EQUAL, A: -1.0, B: -2.0}))
    assert (result.searched, result.delivered) == (A, UNIFORM)
    assert result.chosen is None  # nothing was compared with the recipe but ranks
    assert result.ranks.comparison.is_loss
    ranks = result.differences_of_ranks(["choice_logprob"])
    assert ranks["choice_logprob"] == result.ranks.comparison


def test_of_several_gains_the_greatest_is_delivered(folder, store):
    worth = {**EQUAL, A: 0.55, B: 0.56, UNIFORM: 0.0}
    result = race(folder, store, ToyRuns(worth))
    assert [c.is_gain for c in result.competitors] == [True, True]
    estimates = {c.allocation: c.comparison.estimate for c in result.competitors}
    assert result.delivered == max(estimates, key=estimates.get)


def test_without_noise_equal_ones_are_no_gain(folder, store):
    result = race(folder, store, ToyRuns(EQUAL, noise=0.0))
    assert [c.comparison.half_width for c in result.competitors] == [0.0, 0.0]
    assert (result.searched, result.delivered) == (A, UNIFORM)


def test_the_best_random_allocation_races_along(folder, store):
    run = ToyRuns(EQUAL)
    result = race(folder, store, run, finalists=(A,), best_random=C)
    assert [(c.allocation, c.label) for c in result.competitors] == [
        (A, "finalist"),
        (C, "best random"),
    ]
    assert result.comparisons == 2
    assert run.calls == rounds((SEEDS, (UNIFORM, A, C)))


def test_a_best_random_allocation_that_is_a_finalist_runs_once(folder, store):
    result = race(folder, store, ToyRuns(EQUAL), best_random=B)
    assert [c.label for c in result.competitors] == ["finalist", "finalist"]


def test_each_competitor_may_have_a_baseline_of_its_own(folder, store):
    run = ToyRuns({**EQUAL, A: -1.0, B: 0.5, SMALL: 0.0})
    result = race(folder, store, run, baseline_for={A: UNIFORM, B: SMALL}.get)
    assert run.calls == rounds((SEEDS, (UNIFORM, SMALL, A, B)))
    assert (result.baseline, result.delivered) == (SMALL, B)


def test_a_competitor_may_be_the_baseline_of_another(folder, store):
    run = ToyRuns({**EQUAL, A: -1.0, B: 0.5})
    result = race(folder, store, run, baseline_for={A: UNIFORM, B: A}.get)
    assert run.calls == rounds((SEEDS, (UNIFORM, A, B)))
    assert (result.baseline, result.delivered) == (A, B)


def test_a_finalist_that_is_its_own_baseline_needs_no_runs(folder, store):
    run = ToyRuns(EQUAL)
    result = race(folder, store, run, finalists=(UNIFORM, A))
    assert run.calls == rounds((SEEDS, (UNIFORM, A)))
    assert (result.competitors[0].reason, result.searched) == (Reason.SAME, A)
    assert result.comparisons == 1
    assert result.to_json(lambda _: 1)["competitors"][0]["per_seed"] == []


@pytest.mark.parametrize("finalists", [(), (UNIFORM,)])
def test_where_nothing_differs_uniform_lora_runs_alone(folder, store, finalists):
    run, told = ToyRuns(EQUAL), []
    result = race(folder, store, run, finalists, on_run=lambda *args: told.append(args))
    assert run.calls == rounds((SEEDS, (UNIFORM,)))
    assert told[-1] == (4, 4)
    assert (result.chosen, result.searched, result.differences(["choice_logprob"])) == (
        None,
        None,
        {},
    )
    assert result.delivered == result.baseline == UNIFORM


# ---------------------------------------------------------------- the recipe, tuning, the stack

RECIPE = replace(UNIFORM, method="lora", settings=(("learning_rate", 0.001),))
PLAIN = replace(UNIFORM, method="lora")


def levers(folder, store, worth, noise=0.01, diverges=(), ranks=((A, UNIFORM),)):
    entrants = [
        Entrant(label=STACK, allocation=UNIFORM, baseline=RECIPE),
        Entrant(label=TUNED, allocation=PLAIN, baseline=RECIPE),
        *(Entrant(label=FINALIST, allocation=a, baseline=b, is_ranks=True) for a, b in ranks),
    ]
    run = ToyRuns({RECIPE: 0.0, PLAIN: 0.0, UNIFORM: 0.0, A: 0.0, **worth}, noise=noise)
    run.diverges = diverges
    confirmation = Confirmation(
        run=run, folder=folder, store=store, rules=RULES, on_run=lambda *_: None
    )
    return confirmation.confirm(entrants, RECIPE)


def test_the_stack_is_compared_with_the_recipe_and_ranks_with_even_ones_on_it(folder, store):
    result = levers(folder, store, {UNIFORM: 0.5, PLAIN: 0.2, A: 0.5})
    assert (result.delivered, result.chosen.label) == (UNIFORM, STACK)
    assert not result.ranks.is_gain
    assert result.comparisons == 2  # tuned LoRA takes no part of the error rate
    assert result.differences(["choice_logprob"])["choice_logprob"].estimate == pytest.approx(
        0.5, abs=0.02
    )
    assert result.models == {
        "recipe": RECIPE,
        "lora": PLAIN,
        "uniform": UNIFORM,
        "searched": A,
        "recovered": UNIFORM,
    }
    assert result.labels == {
        "recipe": "LoRA r=7 by the recipe",
        "lora": "LoRA r=7, tuned",
        "uniform": "LoRA r=7 on the stack",
    }


def test_ranks_that_gain_on_the_stack_are_delivered(folder, store):
    result = levers(folder, store, {UNIFORM: 0.5, A: 0.7})
    assert (result.delivered, result.chosen.label) == (A, FINALIST)
    over_recipe = result.differences(["choice_logprob"])["choice_logprob"]
    assert over_recipe.estimate == pytest.approx(0.7, abs=0.02)
    assert result.ranks.comparison.estimate == pytest.approx(0.2, abs=0.02)


def test_ranks_cannot_carry_a_stack_that_does_not_gain(folder, store):
    result = levers(folder, store, {UNIFORM: -0.5, A: -0.2})
    assert result.ranks.is_gain
    assert result.delivered == RECIPE


def test_tuned_lora_is_delivered_where_it_is_better_than_a_stack_that_gains(folder, store):
    assert levers(folder, store, {UNIFORM: 0.3, PLAIN: 0.6}).delivered == PLAIN


def test_tuned_lora_is_not_tested_behind_a_stack_that_does_not_gain(folder, store):
    result = levers(folder, store, {UNIFORM: -0.3, PLAIN: 0.6})
    assert result.delivered == RECIPE


def test_a_stack_that_diverges_is_out_with_the_ranks_on_it(folder, store):
    result = levers(folder, store, {A: 0.7}, diverges={(UNIFORM, SEEDS[1])})
    assert result.delivered == RECIPE
    assert [(c.label, c.reason) for c in result.competitors] == [
        (STACK, Reason.FAILED),
        (TUNED, None),
        (FINALIST, Reason.FAILED),
    ]


def test_even_ranks_of_another_size_have_a_column_of_their_own(folder, store):
    """With a free budget the baseline has the size of what was searched, not the default rank."""
    result = levers(folder, store, {UNIFORM: 0.5, A: 0.9, SMALL: 0.6}, ranks=((A, SMALL),))
    assert (result.models["uniform"], result.models["stack"]) == (SMALL, UNIFORM)
    assert result.delivered == A
    plain = result.to_json(lambda allocation: 10 * sum(allocation.ranks))
    assert [(b["name"], b["parameters"], b["is_recipe"]) for b in plain["baselines"]] == [
        ("uniform", 100, False),
        ("recipe", 140, True),
    ]
    entry = plain["competitors"][-1]
    assert (entry["model"], entry["baseline_model"]) == ("searched", "uniform")
    assert entry["baseline_label"] == "LoRA r=5 on the stack"


def test_the_recipe_comes_once_where_nothing_is_tuned(folder, store):
    result = race(folder, store, ToyRuns(EQUAL))
    assert result.labels == {"uniform": "LoRA r=7"}
    assert set(result.models) == {"uniform", "searched", "recovered"}
    assert [b["is_recipe"] for b in result.to_json(lambda _: 1)["baselines"]] == [True]


def test_ranks_that_are_mixed_are_named_by_their_ends():
    assert baseline_label([8, 8, 8]) == "LoRA r=8"
    assert baseline_label([6, 5, 6]) == "LoRA r=5 to 6"


# ---------------------------------------------------------------------------- failed fine-tunes


@pytest.mark.parametrize("failed", [0, 1, 3])
def test_a_competitor_that_diverges_is_out(folder, store, failed):
    run, told = ToyRuns(EQUAL, diverges={(A, SEEDS[failed])}), []
    result = race(folder, store, run, on_run=lambda *args: told.append(args))
    out, other = result.competitors
    assert out.reason is Reason.FAILED
    assert "loss is nan" in out.detail
    assert out.comparison is None
    assert (other.reason, result.searched) == (None, B)
    assert other.comparison.comparisons == 2  # as planned, whatever became of the other
    assert run.calls == rounds(
        (SEEDS[: failed + 1], (UNIFORM, A, B)), (SEEDS[failed + 1 :], (UNIFORM, B))
    )
    assert told[-1] == (9 + failed, 9 + failed)
    trials = [t for t in store.trials() if t.state is TrialState.FAILED]
    assert [(t.allocation, t.seed, t.reason) for t in trials] == [(A, SEEDS[failed], out.detail)]
    again = ToyRuns(EQUAL)
    assert race(folder, store, again) == result
    assert again.calls == []


def test_if_all_diverge_uniform_lora_is_delivered(folder, store):
    run = ToyRuns(EQUAL, diverges={(A, SEEDS[0]), (B, SEEDS[0])})
    result = race(folder, store, run)
    assert run.calls == rounds((SEEDS[:1], (UNIFORM, A, B)), (SEEDS[1:], (UNIFORM,)))
    assert (result.chosen, result.delivered) == (None, UNIFORM)
    plain = json.loads(json.dumps(result.to_json(lambda _: 1)))
    assert plain["competitors"][0]["comparison"] is None


def test_a_score_that_is_no_number_counts_as_diverged(folder, store):
    run = ToyRuns({**EQUAL, A: math.nan})
    result = race(folder, store, run)
    assert result.competitors[0].reason is Reason.FAILED
    assert "not a finite number" in result.competitors[0].detail


def test_a_competitor_that_cannot_be_scored_is_out(folder, store):
    class Unscored(ToyRuns):
        def __call__(self, allocation, seed):
            if allocation == A:
                raise OracleError("A score of task toy is not a number.")
            return super().__call__(allocation, seed)

    result = race(folder, store, Unscored(EQUAL))
    assert result.competitors[0].detail == "A score of task toy is not a number."
    with pytest.raises(OracleError, match="task toy"):
        race(RunFolder(folder.path / "other"), store, Unscored(EQUAL), reference=A)


def test_a_recipe_that_diverges_ends_the_run(folder, store):
    with pytest.raises(RecoveryError, match="loss is nan"):
        race(folder, store, ToyRuns(EQUAL, diverges={(UNIFORM, SEEDS[1])}))
    rest = ToyRuns(EQUAL)
    race(folder, store, rest)
    assert rest.calls[0] == (UNIFORM, SEEDS[1])


# ------------------------------------------------------------------------------------ resuming


def test_finished_runs_are_not_repeated(folder, store):
    first = race(folder, store, ToyRuns(ONE_GAINS))
    run = ToyRuns(ONE_GAINS)
    assert race(folder, store, run) == first
    assert run.calls == []
    assert len(store.trials()) == first.fine_tunes


def test_a_run_that_lost_its_adapter_is_made_again(folder, store):
    first = race(folder, store, ToyRuns(EQUAL))
    run, lost = ToyRuns(EQUAL), (UNIFORM, SEEDS[0])
    again = race(folder, store, run, is_whole=lambda *args: args != lost)
    assert again == first
    assert run.calls == [lost]
    assert len(store.trials()) == 12


@pytest.mark.parametrize("finished", range(0, 13, 2))
def test_an_interrupted_race_goes_on_to_the_same_result(tmp_path, finished):
    whole_store, store = (TrialStore(InMemoryStorage(), "confirm") for _ in range(2))
    options = {"noise": 0.01, "diverges": {(C, SEEDS[0])}}
    entrants = (C, A, B)
    run = ToyRuns(ONE_GAINS, **options)
    whole = race(RunFolder(tmp_path / "whole"), whole_store, run, entrants)
    folder = RunFolder(tmp_path / "broken")
    with pytest.raises(BrokenOffError):
        race(folder, store, ToyRuns(ONE_GAINS, finished, **options), entrants)
    rest = ToyRuns(ONE_GAINS, **options)
    assert race(folder, store, rest, entrants) == whole
    assert rest.calls == run.calls[finished:]
    assert store.trials() == whole_store.trials()


def test_a_run_whose_trial_was_not_stored_is_stored_later(folder, store):
    race(folder, TrialStore(InMemoryStorage(), "lost"), ToyRuns(EQUAL))
    run = ToyRuns(EQUAL)
    race(folder, store, run)
    assert run.calls == []
    trials = store.trials()
    assert [(t.allocation, t.seed) for t in trials] == rounds((SEEDS, (UNIFORM, A, B)))
    assert [t.position for t in trials] == list(range(12))
    assert {(t.phase, t.state) for t in trials} == {(Phase.CONFIRMATION, TrialState.COMPLETE)}


# ---------------------------------------------------------------------------- what is written


def test_the_report_keeps_its_documents_and_comes_back_equal(folder, store):
    result = race(folder, store, ToyRuns(EQUAL))
    (first, *_) = result.runs[B]
    name = f"evaluations/{run_name(B, SEEDS[0])}"
    again = Outcome.from_json(folder.read_json(f"{name}.json"))
    assert again.report.tasks["toy"].per_document == {}
    assert folder.with_documents(f"{name}.parquet", again.report) == first.report
    assert first.search.tasks["toy"].per_document == {}


def test_the_plain_values_say_all_of_the_race(folder, store):
    result = race(folder, store, ToyRuns(ONE_GAINS, noise=0.01))
    plain = json.loads(json.dumps(result.to_json(lambda _: 140), allow_nan=False))
    assert {
        key: plain[key] for key in plain if key not in ("competitors", "baselines", "files")
    } == {
        "error_rate": 0.05,
        "confidence": 0.95,
        "comparisons": 2,
        "metric": "choice_logprob",
        "seeds": list(SEEDS),
        "fine_tunes": 12,
    }
    assert [len(files) for files in plain["files"]] == [len(SEEDS)] * 3
    assert all((folder.path / file).is_file() for files in plain["files"] for file in files)
    loser, winner = plain["competitors"]
    assert (loser["reason"], winner["reason"], winner["chosen"]) == (None, None, True)
    assert (winner["ranks"], winner["baseline"]) == ([12, 2], [7, 7])
    assert (loser["model"], winner["model"], winner["baseline_model"]) == (
        None,
        "searched",
        "uniform",
    )
    assert len(winner["per_seed"]) == 4
    assert np.mean(winner["per_seed"]) == pytest.approx(winner["comparison"]["estimate"])
    assert winner["search_objective"] == pytest.approx(-0.5 - 1.5 / 7)


def test_other_metrics_are_compared_with_the_same_correction(folder, store):
    result = race(folder, store, ToyRuns(ONE_GAINS, noise=0.01))
    found = result.differences_of_ranks(["choice_logprob", "accuracy"])
    assert found["choice_logprob"] == result.ranks.comparison
    assert found["accuracy"].comparisons == found["choice_logprob"].comparisons
    assert found["accuracy"].estimate == pytest.approx(found["choice_logprob"].estimate / 3)


def test_searched_settings_stand_in_the_plain_values(folder, store):
    warm = replace(A, settings=(("learning_rate", 0.01),))
    result = race(folder, store, ToyRuns({**EQUAL, warm: 0.2}), finalists=(warm,))
    assert result.to_json(lambda _: 1)["competitors"][0]["settings"] == {"learning_rate": 0.01}


def test_names_of_runs_are_short_and_distinct():
    deep = RankAllocation((8,) * 200)
    seen = {run_name(a, s) for a in (A, B, C, UNIFORM, deep) for s in SEEDS}
    assert len(seen) == 20
    assert max(map(len, seen)) < 40


def test_seeds_for_which_there_is_no_time_are_left_out(folder, store):
    asked = []

    def allows(runs, *, needed):
        asked.append((runs, needed))
        return needed

    run = ToyRuns(ONE_GAINS, noise=0.0)
    confirmed = race(folder, store, run, allows=allows)
    assert confirmed.rules.seeds == SEEDS[:3]
    assert run.calls == rounds((SEEDS[:3], (UNIFORM, A, B)))
    assert asked == [(1, True)] * 9 + [(3, False)]
    assert confirmed.chosen.allocation == B
    # What is there is taken, whatever the time.
    asked.clear()
    race(folder, store, run)
    again = race(folder, store, run, allows=allows)
    assert again.rules.seeds == SEEDS
    assert not asked
