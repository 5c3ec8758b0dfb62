"""The noise floor before the search, on planted values instead of fine-tunes."""

from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pytest

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.core.errors import RecoveryError
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.core.trials import Outcome
from rankadaptor_plugin.report.console import noise_text
from rankadaptor_plugin.testing.search import SPACE
from rankadaptor_plugin.verdict.noise import Question, measure, noise_allocations, noise_seeds
from rankadaptor_plugin.verdict.noise_floor import document_sd, reliability, seed_scale

METRICS = ("accuracy", "choice_logprob")


def planted(allocation, seed, *, between=1.0, noise=0.1):
    """Four documents whose mean follows the rank of layer 5, and the seed."""
    rng = np.random.default_rng([seed, *allocation.ranks])
    value = between * allocation.ranks[5] / 8 + noise * rng.normal()
    per_document = {
        "choice_logprob": [value - 1, value + 1, value, value],
        "accuracy": [0.0, 1.0, 1.0, 0.0],
    }
    return Outcome(
        search=Score(tasks={"toy": TaskScore.of(per_document, keys=list("abcd"))}),
        report=None,
        objective=value,
        train_loss=1.0,
        seconds={"recovery": 2.0, "oracle": 1.0},
    )


@pytest.fixture
def config():
    return run_file.from_dict(
        {
            "oracle": {"tasks": ["toy"]},
            "noise": {"seeds": 3, "allocations": 5, "gains": [0.1]},
            "search": {"n_startup_trials": 4, "n_trials": 10},
            "confirm": {"finalists": 2, "seeds": 4},
        }
    )


def measured(
    path, config, run=planted, *, space=SPACE, on_run=lambda done, total: None, allows=None, **asked
):
    defaults = {"metrics": METRICS, "decisive": "choice_logprob", "weights": {"toy": 1.0}}
    question = Question(**{**defaults, "report_documents": {"toy": 40}, **asked})
    more = [allows] if allows else []
    return measure(space, run, RunFolder(path), config, question, on_run, *more)


def test_a_strong_effect_is_told_from_noise(tmp_path, config):
    found = measured(tmp_path, config)
    assert len(found.runs) == 5
    assert found.scores["objective"].icc > 0.8
    assert found.scores["objective"].icc == pytest.approx(found.scores["choice_logprob"].icc)
    assert not found.floor.below_noise
    assert found.seconds == 3.0
    assert found.left == (10 - 5) + 4 * (2 + 3)  # two finalists, the stack, tuned LoRA, the recipe


def test_no_effect_is_below_the_noise(tmp_path, config):
    def noisy(allocation, seed):
        return planted(allocation, seed, between=0.0)

    below = [
        measured(tmp_path / str(i), dataclasses.replace(config, seed=i), noisy).floor.below_noise
        for i in range(12)
    ]
    assert sum(below) >= 7


def test_finished_runs_are_read_back(tmp_path, config):
    calls = []

    def run(allocation, seed):
        calls.append((allocation, seed))
        return planted(allocation, seed)

    first = measured(tmp_path, config, run)
    assert len(calls) == len(set(calls)) == 15
    assert measured(tmp_path, config, run).to_json() == first.to_json()
    assert len(calls) == 15


def test_runs_with_the_seed_of_the_search_become_its_first_trials(tmp_path, config):
    found = measured(tmp_path, config)
    trials = found.trials(SPACE)
    assert [trial.position for trial in trials] == list(range(5))
    assert {trial.seed for trial in trials} == {config.seed}
    assert trials[0].allocation == SPACE.uniform()
    assert trials[1].objective == found.tables["objective"][1][0]


def test_uniform_ranks_outside_the_space_are_measured_but_are_no_trial(tmp_path, config):
    space = dataclasses.replace(SPACE, default_rank=5)
    found = measured(tmp_path, config, space=space)
    assert space.uniform() in found.runs
    assert space.uniform() not in [trial.allocation for trial in found.trials(space)]


def test_an_allocation_that_diverges_is_left_out(tmp_path, config, caplog):
    bad = noise_allocations(SPACE, 5, config.seed)[2]

    def run(allocation, seed):
        if allocation == bad:
            raise RecoveryError("The loss is not finite.")
        return planted(allocation, seed)

    with caplog.at_level(logging.WARNING):
        found = measured(tmp_path, config, run)
    assert bad not in found.runs
    assert len(found.runs) == 4
    assert "is left out of the noise floor: The loss is not finite." in caplog.text


def test_without_two_allocations_no_floor_is_known(tmp_path, config, caplog):
    def run(allocation, seed):
        raise RecoveryError("The loss is not finite.")

    assert measured(tmp_path, config, run) is None


def test_allocations_are_distinct_and_seeds_fresh(config):
    allocations = noise_allocations(SPACE, 6, 0)
    assert len(set(allocations)) == 6
    assert noise_allocations(SPACE, 6, 0) == allocations
    assert noise_allocations(SPACE, 6, 1) != allocations
    assert len(set(noise_seeds(0, 4))) == 4
    assert noise_seeds(0, 4)[0] == 0


def test_the_documents_share_of_the_noise_shrinks_with_their_number(config):
    rng = np.random.default_rng(0)
    several = [
        [
            Score(tasks={"toy": TaskScore.of({"choice_logprob": list(rng.normal(size=50))})})
            for _ in range(2)
        ]
        for _ in range(3)
    ]
    few, many = (
        document_sd(several, "choice_logprob", {"toy": 1.0}, {"toy": n}) for n in (50, 200)
    )
    assert few == pytest.approx(2 * many)
    assert few == pytest.approx((2 / 2 / 50) ** 0.5, rel=0.3)  # var of a difference of two means


def test_it_is_plain_data_and_reads_well(tmp_path, config):
    plain = json.loads(json.dumps(measured(tmp_path, config, decisive="accuracy").to_json()))
    text = noise_text(plain, 80)
    assert text.startswith("A search of 10 trials is expected to gain")
    for line in (
        "objective",
        "accuracy",
        "choice_logprob",
        "10.00 points",
        "A fine-tune with its evaluation",
    ):
        assert line in text
    assert plain["fine_tunes_left"] == 25


def scored(values):
    """Scores of one task from values of shape (allocations, seeds, documents)."""
    return [
        [Score(tasks={"toy": TaskScore.of({"choice_logprob": row.tolist()})}) for row in several]
        for several in values
    ]


def test_what_a_seed_does_to_single_answers_shrinks_with_more_documents():
    rng = np.random.default_rng(0)
    single = rng.normal(size=(8, 5, 100))  # nothing but the chance of single answers
    sd = reliability(single.mean(2)).seed_sd
    scale = seed_scale(scored(single), "choice_logprob", {"toy": 1.0}, {"toy": 10_000}, sd)
    assert scale == pytest.approx(0.1, abs=0.15)
    assert seed_scale(
        scored(single), "choice_logprob", {"toy": 1.0}, {"toy": 100}, sd
    ) == pytest.approx(1.0, rel=0.2)


def test_what_a_seed_does_to_all_answers_does_not():
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(8, 5, 1)) + 0.01 * rng.normal(size=(8, 5, 100))
    sd = reliability(whole.mean(2)).seed_sd
    scale = seed_scale(scored(whole), "choice_logprob", {"toy": 1.0}, {"toy": 10_000}, sd)
    assert scale == pytest.approx(1.0, abs=0.01)


def test_of_other_tasks_than_the_verdicts_no_floor_is_known(tmp_path, config):
    found = measured(tmp_path, config, report_documents={"other": 40})
    assert found.floor is None
    assert not found.is_below_noise
    assert "of other tasks" in found.sentence()


def test_seeds_for_which_there_is_no_time_are_left_out(tmp_path, config):
    asked = []

    def allows(runs):
        asked.append(runs)
        return len(asked) <= 10 + 2

    noise = measured(tmp_path, config, allows=allows)
    assert noise.seeds == noise_seeds(config.seed, 3)[:2]
    assert all(len(several) == 2 for several in noise.runs.values())
    # Two seeds are asked for together, then the third.
    assert asked == [*range(10, 0, -1), 5, 4, 3]
    again = measured(tmp_path, config, run=pytest.fail, allows=lambda runs: False)
    assert again.seeds == noise.seeds
    assert measured(tmp_path, config).seeds == noise_seeds(config.seed, 3)


def test_without_time_for_two_seeds_no_noise_floor_is_measured(tmp_path, config, caplog):
    assert measured(tmp_path, config, allows=lambda runs: runs < 10) is None
    assert "does not fit into the time" in caplog.text
    assert not (tmp_path / "noise.json").exists()
