"""The race: intervals that hold with few seeds, who is out, and how the error rate is shared."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.verdict.race import Advantage, Reason, Rules, eliminated
from rankadaptor_plugin.verdict.statistics import compare

SURE = 0.99


def scores(*tables: np.ndarray) -> list[Score]:
    """One score per seed from values (S, J) per task."""
    tasks = [{f"t{i}": v[s].tolist() for i, v in enumerate(tables)} for s in range(len(tables[0]))]
    return [
        Score(
            tasks={name: TaskScore.of({"choice_logprob": values}) for name, values in task.items()}
        )
        for task in tasks
    ]


def constant(value: float, seeds: int = 3) -> Advantage:
    return Advantage((np.full((seeds, 4), value),), (1.0,))


def noisy(value: float, seeds: int = 3, seed: int = 0, noise: float = 0.1) -> Advantage:
    noises = np.random.default_rng(seed).normal(size=(seeds, 50))
    return Advantage((value + noise * noises,), (1.0,))


@st.composite
def advantages(draw):
    """Differences of any seeds, tasks, documents and sizes of noise."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    seeds = draw(st.integers(2, 6))
    sizes = draw(st.lists(st.integers(2, 20), min_size=1, max_size=3))
    scales = [draw(st.sampled_from([0.0, 1e-6, 1.0, 1e6])) for _ in range(3)]
    by_seed = scales[0] * rng.normal(size=(seeds, 1))
    tables = tuple(
        by_seed + scales[1] * rng.normal(size=(1, j)) + scales[2] * rng.normal(size=(seeds, j))
        for j in sizes
    )
    shares = rng.dirichlet(np.ones(len(sizes)))
    return Advantage(tables, tuple(shares.tolist()))


# ---------------------------------------------------------------------------------- intervals


def test_where_only_seeds_differ_it_is_students_interval() -> None:
    means = np.array([[1.0], [2.0], [4.0]])
    found = Advantage((np.repeat(means, 5, axis=1),), (1.0,)).interval(0.95)
    stderr = math.sqrt(np.var(means, ddof=1) / 3)
    assert found.estimate == pytest.approx(7 / 3)
    assert found.stderr == pytest.approx(stderr)
    assert found.half_width == pytest.approx(float(t.ppf(0.975, 2)) * stderr)
    assert (found.seeds, found.documents, found.confidence) == (3, 5, 0.95)


def test_where_only_documents_differ_it_is_students_interval() -> None:
    documents = np.array([[0.0, 1.0, 3.0, 4.0, 9.0]])
    found = Advantage((np.repeat(documents, 4, axis=0),), (1.0,)).interval(0.9)
    stderr = math.sqrt(np.var(documents, ddof=1) / 5)
    assert found.half_width == pytest.approx(float(t.ppf(0.95, 4)) * stderr)


def test_the_chance_of_a_pair_is_counted_once() -> None:
    rng = np.random.default_rng(0)
    stderrs = [
        Advantage((rng.normal(size=(6, 100)),), (1.0,)).interval(0.95).stderr for _ in range(300)
    ]
    # Documents are no better than 0, so a little is left above the true 1 / 600.
    assert 1 / 600 < np.mean(np.square(stderrs)) < 1.5 / 600
    assert compare(
        scores(rng.normal(size=(6, 100))), scores(np.zeros((6, 100))), "choice_logprob"
    ).stderr > (np.mean(stderrs))


@settings(max_examples=60)
@given(advantages(), st.sampled_from([0.8, 0.95, 0.99]))
def test_an_interval_is_no_narrower_than_that_of_the_seeds_alone(advantage, confidence) -> None:
    found = advantage.interval(confidence)
    seeds = len(advantage.per_seed)
    alone = t.ppf((1 + confidence) / 2, seeds - 1) * math.sqrt(
        advantage.per_seed.var(ddof=1) / seeds
    )
    assert found.half_width >= alone * (1 - 1e-9)
    assert found.low <= found.estimate <= found.high
    assert advantage.interval(0.999).half_width >= found.half_width


@settings(max_examples=60)
@given(advantages(), st.floats(0.1, 10))
def test_an_interval_turns_and_scales_with_the_values(advantage, factor) -> None:
    found = advantage.interval(0.95)
    other = Advantage(tuple(-factor * v for v in advantage.values), advantage.shares).interval(0.95)
    near = {"rel": 1e-6, "abs": 1e-9 * (1 + factor * abs(found.half_width))}
    assert other.estimate == pytest.approx(-factor * found.estimate, **near)
    assert other.half_width == pytest.approx(factor * found.half_width, **near)
    assert advantage.over(advantage).interval(0.95).half_width == 0


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_without_variance_the_interval_is_a_point(value) -> None:
    found = constant(value).interval(0.99)
    assert (found.low, found.high) == (pytest.approx(value), pytest.approx(value))
    assert found.is_gain is (value > 0)


@pytest.mark.parametrize("shape", [(1, 5), (3, 1)])
def test_one_seed_or_one_document_decides_nothing(shape) -> None:
    found = Advantage((np.full(shape, -1.0),), (1.0,)).interval(0.95)
    assert found.half_width == math.inf
    assert not found.is_gain
    assert not found.is_loss


@pytest.mark.parametrize("seeds", [2, 3, 6])
@pytest.mark.parametrize("confidence", [0.95, 0.9875])
def test_the_interval_keeps_its_confidence_where_seeds_dominate(seeds, confidence) -> None:
    rng, races = np.random.default_rng(3), 2000
    missed = 0
    for _ in range(races):
        values = rng.normal(size=(seeds, 1)) + rng.normal(size=(seeds, 20))
        missed += abs(values.mean()) > Advantage((values,), (1.0,)).interval(confidence).half_width
    rate = 1 - confidence
    assert missed <= races * rate + 3 * math.sqrt(races * rate * confidence)


# ------------------------------------------------------------------------------ from scores


def test_an_advantage_is_the_paired_difference_in_the_tasks_that_weigh() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = ((rng.normal(size=(3, 5)), rng.normal(size=(3, 7))) for _ in range(2))
    first, second = scores(*ours), scores(*theirs)
    weights = {"t0": 0.0, "t1": 2.0}
    found = Advantage.of(first, second, "choice_logprob", weights)
    assert found.shares == (1.0,)
    np.testing.assert_allclose(found.values[0], ours[1] - theirs[1])
    both = Advantage.of(first, second, "choice_logprob")
    assert both.shares == (0.5, 0.5)
    expected = compare(first, second, "choice_logprob")
    assert both.interval(0.95).estimate == pytest.approx(expected.estimate)
    assert both.interval(0.95).documents == expected.documents == 12


def test_scores_that_do_not_pair_up_are_refused() -> None:
    one, two = scores(np.zeros((2, 3))), scores(np.zeros((2, 4)))
    with pytest.raises(OracleError, match="3 documents for one model and 4"):
        Advantage.of(one, two, "choice_logprob")
    with pytest.raises(ConfigError, match="at least 2 seeds"):
        Advantage.of(one[:1], one[:1], "choice_logprob")


# ------------------------------------------------------------------------------ elimination


def test_who_is_worse_than_uniform_lora_is_out() -> None:
    assert eliminated({"a": noisy(-1.0)}, SURE) == {"a": Reason.UNIFORM}


def test_who_is_worse_than_the_leader_is_out() -> None:
    found = eliminated({"a": noisy(0.1), "b": noisy(2.0, seed=1)}, SURE)
    assert found == {"a": Reason.LEADER}


def test_who_is_worse_than_both_is_worse_than_uniform_lora() -> None:
    found = eliminated({"a": noisy(-1.0), "b": noisy(2.0, seed=1)}, SURE)
    assert found == {"a": Reason.UNIFORM}


def test_all_may_be_out() -> None:
    found = eliminated({"a": noisy(-1.0), "b": noisy(-2.0, seed=1)}, SURE)
    assert found == dict.fromkeys("ab", Reason.UNIFORM)
    assert eliminated({}, SURE) == {}


def test_equal_ones_stay() -> None:
    assert eliminated({"a": constant(0.2), "b": constant(0.2)}, SURE) == {}
    assert eliminated({"a": constant(0.0)}, SURE) == {}


def test_without_variance_any_difference_eliminates() -> None:
    found = eliminated({"a": constant(0.2), "b": constant(0.3), "c": constant(-0.1)}, SURE)
    assert found == {"a": Reason.LEADER, "c": Reason.UNIFORM}


def test_two_seeds_that_differ_much_eliminate_nobody() -> None:
    values = np.array([[-1.0], [-3.0]]) + 0.01 * np.arange(50.0)
    assert eliminated({"a": Advantage((values,), (1.0,))}, 0.95) == {}


# ------------------------------------------------------------------------------------- rules


@given(
    st.integers(1, 8), st.integers(2, 12), st.integers(2, 12), st.sampled_from([0.5, 0.9, 0.999])
)
def test_the_error_rate_is_shared_out_whole(competitors, seeds, least, confidence) -> None:
    rules = Rules(
        competitors=competitors, seeds=seeds, least_seeds=min(least, seeds), confidence=confidence
    )
    looks = [s for s in range(1, seeds + 1) if rules.is_look(s)]
    assert looks == list(range(rules.least_seeds, seeds))
    # One end of each interval can eliminate the best one, at each look and in each comparison.
    spent = sum(competitors * (1 - rules.confidence_after(s)) / 2 for s in looks)
    assert spent == pytest.approx(1 - confidence if looks else 0.0)
    assert competitors * (1 - rules.confidence_after(seeds)) == pytest.approx(1 - confidence)
    assert sorted(looks, key=rules.confidence_after) == looks  # the earliest gets most


def test_rules_by_hand() -> None:
    rules = Rules(competitors=2, seeds=6, least_seeds=3, confidence=0.95)
    assert rules.error_rate == 0.05
    assert rules.confidence_after(6) == pytest.approx(0.975)
    assert rules.confidence_after(3) == pytest.approx(1 - 2 * 0.05 * (3 / 6) / 2)
    assert rules.confidence_after(5) == pytest.approx(1 - 2 * 0.05 * (1 / 6) / 2)


def test_seeds_that_agree_by_luck_are_no_certainty():
    """Both seeds gain one document of 48, each another one."""
    values = np.zeros((2, 48))
    values[0, 3] = values[1, 7] = 1.0
    found = Advantage((values,), (1.0,)).interval(0.95)
    assert found.estimate > 0
    assert not found.is_gain
