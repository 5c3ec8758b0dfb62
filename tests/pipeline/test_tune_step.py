"""The tune stage on fine-tunes that cost nothing: curve, wider look, ties, parts, failures."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.core.errors import ConfigError, RecoveryError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.core.trials import Outcome
from rankadaptor_plugin.oracle.oracle import Objective
from rankadaptor_plugin.pipeline.tune_step import Tuned, TuneStep, fine_tunes, learning_rates

UNIFORM = RankAllocation((8, 8))
OBJECTIVE = Objective(metric="gold_logprob", target=None, weights={"toy": 1.0})


def config_of(rate=1e-3, tune=(), **recovery):
    data = {"oracle": {"tasks": ["toy"]}, "recovery": {"learning_rate": rate, **recovery}}
    return run_file.from_dict({**data, "tune": dict(tune)})


class Runs:
    """Fine-tunes whose score is a parabola of the logarithm of the rate, plus that of parts."""

    def __init__(self, best=1e-3, parts=(), noise=0.0, diverges=lambda method, rate: False):
        self.best, self.parts, self.noise, self.diverges = best, dict(parts), noise, diverges
        self.calls: list[tuple[str, float, int]] = []

    def __call__(self, allocation, seed):
        rate = dict(allocation.settings)["learning_rate"]
        self.calls.append((allocation.method, rate, seed))
        if self.diverges(allocation.method, rate):
            raise RecoveryError("The training loss is nan at step 2 of 3.")
        value = -(math.log10(rate / self.best) ** 2)
        value += sum(self.parts.get(part, 0.0) for part in allocation.method.split("+"))
        rng = np.random.default_rng(zlib.crc32(f"{rate} {seed} {allocation.method}".encode()))
        values = value + self.noise * rng.normal(size=50)
        score = Score(tasks={"toy": TaskScore.of({"gold_logprob": values.tolist()})})
        return Outcome(
            search=score,
            objective=float(values.mean()),
            train_loss=1.0,
            seconds={"recovery": 1.0, "oracle": 0.5},
        )


def tune(path, runs, config, **more):
    options = {"on_run": lambda *_: None, "parts": config.parts, **more}
    step = TuneStep(runs, RunFolder(path), config, OBJECTIVE, UNIFORM, **options)
    return step.run()


def rates_of(tuned, method="lora"):
    return [point["learning_rate"] for point in tuned.curves[method]]


def test_rates_are_those_of_the_recipe_and_up_to_ten_times_it():
    assert learning_rates(config_of(rate=1e-4)) == (1e-4, 2.2e-4, 4.6e-4, 1e-3)
    assert learning_rates(config_of(tune={"learning_rates": [0.5, 1.0]})) == (0.5, 1.0)
    assert learning_rates(config_of(tune={"learning_rates": []})) == ()


def test_the_best_rate_is_chosen(tmp_path):
    tuned = tune(tmp_path, Runs(best=2.2e-3), config_of(stack=[]))
    assert (tuned.learning_rate, tuned.recipe, tuned.at_edge) == (2.2e-3, 1e-3, False)
    assert rates_of(tuned) == [1e-3, 2.2e-3, 4.6e-3, 1e-2]
    assert len(tuned.seconds) == 8
    assert RunFolder(tmp_path).read_json("tune.json") == tuned.to_json()


def test_the_recipe_may_have_been_right(tmp_path):
    tuned = tune(tmp_path, Runs(best=1e-3), config_of(stack=[]))
    assert tuned.learning_rate == tuned.recipe
    assert rates_of(tuned)[0] == 4.6e-4  # a look below, as the best was the first


def test_at_an_edge_it_looks_on_and_says_where_that_ends(tmp_path, caplog):
    tuned = tune(tmp_path / "a", Runs(best=2e-2), config_of(stack=[]))
    assert (tuned.learning_rate, tuned.at_edge) == (2.2e-2, False)
    tuned = tune(tmp_path / "b", Runs(best=1e3), config_of(stack=[]))
    assert tuned.at_edge
    assert len(rates_of(tuned)) == 8
    assert "is at the edge of those that were tried" in caplog.text


def test_of_rates_that_cannot_be_told_apart_the_smallest_is_taken(tmp_path):
    runs = Runs(best=3e-3, noise=3.0)  # 2.2e-3 and 4.6e-3 are nearly equal, and noise is great
    tuned = tune(tmp_path, runs, config_of(stack=[]))
    means = {point["learning_rate"]: point["mean"] for point in tuned.curves["lora"]}
    assert tuned.learning_rate <= max(means, key=means.get)


def test_a_single_rate_is_taken_at_once(tmp_path):
    tuned = tune(tmp_path, Runs(), config_of(tune={"learning_rates": [1e-3]}, stack=[]))
    assert rates_of(tuned)[1] == 1e-3
    assert tuned.learning_rate == 1e-3


def test_rates_that_diverge_are_lost_and_end_the_look(tmp_path):
    runs = Runs(best=1e-2, diverges=lambda method, rate: rate > 4e-3)
    tuned = tune(tmp_path, runs, config_of(stack=[]))
    assert tuned.learning_rate == 2.2e-3
    reasons = {p["learning_rate"]: p["reason"] for p in tuned.curves["lora"]}
    assert "loss is nan" in reasons[4.6e-3]
    assert reasons[2.2e-3] == ""


def test_if_all_diverge_smaller_rates_are_tried_and_then_it_is_an_error(tmp_path):
    tuned = tune(
        tmp_path / "a", Runs(diverges=lambda method, rate: rate > 3e-4), config_of(stack=[])
    )
    assert tuned.learning_rate == 2.1e-4
    with pytest.raises(RecoveryError, match="cannot be fine-tuned at any of the learning rates"):
        tune(tmp_path / "b", Runs(diverges=lambda method, rate: True), config_of(stack=[]))


def test_parts_that_help_are_added_in_their_order(tmp_path):
    runs = Runs(parts={"compensate": 0.2, "distill": -0.1, "gradient": 0.1})
    tuned = tune(tmp_path, runs, config_of())
    assert tuned.parts == ("compensate", "gradient")
    assert tuned.stack == "gradient+compensate"
    assert [(e["part"], e["stays"]) for e in tuned.tried] == [
        ("compensate", True),
        ("distill", False),
        ("gradient", True),
    ]
    assert tuned.tried[0]["by_seed"] == pytest.approx([0.2, 0.2])
    assert {method for method, _, _ in runs.calls} == {
        "lora",
        "compensate",
        "distill+compensate",
        "gradient+compensate",
    }


def test_a_part_that_diverges_is_out(tmp_path):
    runs = Runs(parts={"compensate": 0.2}, diverges=lambda method, rate: "distill" in method)
    tuned = tune(tmp_path, runs, config_of(stack=["compensate", "distill"]))
    assert tuned.parts == ("compensate",)
    assert "loss is nan" in tuned.tried[1]["reason"]


def test_a_method_may_have_a_rate_of_its_own(tmp_path):
    class Other(Runs):
        def __call__(self, allocation, seed):
            self.best = 4.6e-3 if allocation.method == "adalora" else 1e-3
            return super().__call__(allocation, seed)

    config = config_of(tune={"methods": ["adalora"]}, methods=["rankadaptor", "adalora"], stack=[])
    tuned = tune(tmp_path, Other(), config)
    assert dict(tuned.rates) == {"adalora": 4.6e-3}
    resolved = tuned.resolved(RankAllocation((8, 8), method="adalora"))
    assert dict(resolved.settings) == {"learning_rate": 4.6e-3}


def test_finished_fine_tunes_are_not_repeated(tmp_path):
    whole = tune(tmp_path, Runs(best=2.2e-3), config_of())
    again = Runs(best=2.2e-3)
    assert tune(tmp_path, again, config_of()).to_json() == whole.to_json()
    assert again.calls == []
    name = next((tmp_path / "tune").glob("*.json"))
    name.unlink()
    assert tune(tmp_path, again, config_of()).to_json() == whole.to_json()
    assert len(again.calls) == 1


def test_without_time_nothing_is_tuned(tmp_path, caplog):
    tuned = tune(tmp_path, Runs(), config_of(), allows=lambda runs: False)
    assert (tuned.learning_rate, tuned.parts) == (1e-3, ())
    assert "it does not fit into the time of the run" in caplog.text


def test_the_number_of_fine_tunes_is_known_beforehand():
    assert fine_tunes(config_of()) == 2 * (4 + 3)
    assert fine_tunes(config_of(stack=["distill"], tune={"seeds": 3})) == 3 * 5
    assert fine_tunes(config_of(tune={"learning_rates": []})) == 0
    off = run_file.from_dict({"oracle": {"tasks": ["toy"]}, "prune": {"compensate": "none"}})
    assert fine_tunes(off) == 2 * (4 + 2)


# ------------------------------------------------------------------------------- what arms are


def test_equal_arms_are_equal_allocations():
    same = Tuned(recipe=1e-3, learning_rate=1e-3, parts=())
    assert same.by_recipe(UNIFORM) == same.plain(UNIFORM) == UNIFORM
    faster = Tuned(recipe=1e-3, learning_rate=1e-2, parts=())
    assert faster.plain(UNIFORM) == UNIFORM
    assert faster.by_recipe(UNIFORM) != UNIFORM
    stacked = Tuned(recipe=1e-3, learning_rate=1e-3, parts=("gradient",))
    assert stacked.by_recipe(UNIFORM) == stacked.plain(UNIFORM) != UNIFORM


def test_an_allocation_without_a_method_is_on_the_stack_at_the_tuned_rate():
    tuned = Tuned(recipe=1e-3, learning_rate=1e-2, parts=("compensate", "distill"))
    resolved = tuned.resolved(UNIFORM)
    assert (resolved.method, dict(resolved.settings)) == (
        "distill+compensate",
        {"learning_rate": 1e-2},
    )
    assert dict(tuned.resolved(tuned.by_recipe(UNIFORM)).settings) == {"learning_rate": 1e-3}
    searched = RankAllocation((8, 8), (("learning_rate", 5.0), ("alpha_over_rank", 1.0)))
    assert dict(tuned.resolved(searched).settings) == {"learning_rate": 5.0, "alpha_over_rank": 1.0}


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": {"learning_rates": [2e-3, 1e-3]}}, "are not ascending and distinct"),
        ({"tune": {"learning_rates": [1e-3, 1e-3]}}, "are not ascending and distinct"),
        ({"tune": {"learning_rates": [0.0]}}, "must be more than 0"),
        ({"tune": {"learning_rates": "automatic"}}, 'must be "auto" or a list'),
        ({"tune": {"seeds": 0}}, "must be at least 1"),
        ({"tune": {"methods": ["adalora"]}}, "'adalora', which is not raced"),
        ({"tune": {"learning_rates": [], "methods": ["lora"]}}, "have no rates to try"),
        ({"recovery": {"learning_rate": 0.0}}, "learning_rate is 0, which there are no rates"),
        ({"rank_space": {"learning_rate": [1e-3, 2e-3]}}, r"\[tune\] chooses it beforehand"),
    ],
)
def test_what_cannot_be_tuned_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        run_file.from_dict({"oracle": {"tasks": ["toy"]}, **changes})
