"""The calibration: the faster is taken only if it is clearly so, and a real one leaves no trace."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM

from rankadaptor_plugin.config.tables import RecoveryConfig
from rankadaptor_plugin.core.errors import ArtifactError, RecoveryError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.corpus.sequences import IGNORED, TrainingSequence
from rankadaptor_plugin.recovery import adapters, pass_calibration
from rankadaptor_plugin.recovery.batches import LAYOUTS
from rankadaptor_plugin.recovery.pass_calibration import Choice, calibrate, measure

CONFIG = RecoveryConfig(
    steps=6, batch_size=4, micro_batch_size=4, learning_rate=0.01, warmup_steps=2, layout="auto"
)
ALLOCATIONS = [RankAllocation((4, 2)), RankAllocation((1, 7)), RankAllocation((3, 3))]
COUNTS = (1, 2, 4)
TIMES = st.floats(1e-6, 1e6) | st.just(math.inf)


@pytest.fixture(scope="module")
def sequences():
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in (3, 5, 6, 8, 4, 7, 5, 6, 9, 4):
        tokens = torch.randint(3, 40, (length,), generator=generator)
        labels = tokens.clone()
        labels[: length // 2] = IGNORED
        found.append(TrainingSequence(tokens, labels))
    return found


@st.composite
def times(draw):
    layouts = draw(st.permutations(LAYOUTS)), draw(st.integers(1, 3))
    table = {(layout, k): draw(TIMES) for layout in LAYOUTS for k in COUNTS}
    return layouts[0][: layouts[1]], table


# -------------------------------------------------------------------------------------- the choice


@given(times(), st.floats(1, 3))
def test_the_first_that_takes_about_the_least_time_is_taken(drawn, margin):
    layouts, table = drawn
    choice = calibrate(lambda *key: table[key], layouts, COUNTS, margin=margin)
    assert choice.layout in layouts
    assert choice.together in COUNTS
    for taken, offered in (
        (choice.layout, {layout: table[layout, 1] for layout in layouts}),
        (choice.together, {count: table[choice.layout, count] for count in COUNTS}),
    ):
        if len(offered) > 1:
            limit = margin * min(offered.values())
            assert taken == next(name for name, seconds in offered.items() if seconds <= limit)


@given(times(), st.floats(1, 3))
def test_what_is_clearly_faster_is_taken(drawn, margin):
    layouts, table = drawn
    choice = calibrate(lambda *key: table[key], layouts, COUNTS, margin=margin)
    if any(table[layout, 1] * margin < table[layouts[0], 1] for layout in layouts):
        assert choice.layout != layouts[0]
    if any(table[choice.layout, k] * margin < table[choice.layout, 1] for k in COUNTS):
        assert choice.together != 1


@given(times())
def test_nothing_is_timed_twice_and_all_that_was_is_kept(drawn):
    layouts, table = drawn
    asked = []

    def seconds_of(layout, count):
        asked.append((layout, count))
        return table[layout, count]

    choice = calibrate(seconds_of, layouts, COUNTS)
    assert len(set(asked)) == len(asked) <= len(layouts) + len(COUNTS) - 1
    finite = {f"{n}, {k}": table[n, k] for n, k in asked if math.isfinite(table[n, k])}
    assert choice.seconds == finite


@given(times())
def test_a_choice_comes_back_from_json(drawn):
    layouts, table = drawn
    choice = calibrate(lambda *key: table[key], layouts, COUNTS)
    text = json.dumps(choice.to_json(), allow_nan=False)
    assert Choice.from_json(json.loads(text)) == choice


def test_without_a_choice_nothing_is_timed():
    def seconds_of(layout, count):
        raise NotImplementedError

    assert calibrate(seconds_of, ["packed"], [3]) == Choice("packed", 3, {})


def test_a_tie_leaves_the_default():
    assert calibrate(lambda *key: 1.0, LAYOUTS, COUNTS, margin=1.0).to_json() == {
        "layout": "padded",
        "together": 1,
        "seconds": dict.fromkeys(
            ["padded, 1", "sorted, 1", "packed, 1", "padded, 2", "padded, 4"], 1
        ),
    }


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        None,
        {"layout": "sorted", "together": "many", "seconds": {}},
        {"layout": "sorted", "together": 1, "seconds": None},
        {"layout": "sorted", "together": 1, "seconds": {"sorted, 1": "fast"}},
        {"layout": "heaped", "together": 1, "seconds": {}},
        {"layout": "sorted", "together": 0, "seconds": {}},
    ],
)
def test_what_is_no_choice_is_refused(data):
    with pytest.raises(ArtifactError, match="calibration of this run"):
        Choice.from_json(data)


# ------------------------------------------------------------------------------- a real measurement


def test_a_real_model_is_timed_and_left_as_it_was(make_llama, sequences):
    base = make_llama()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    random = torch.get_rng_state()
    choice = measure(base, sequences, CONFIG, ALLOCATIONS, seed=0)
    kept = {"sorted, 1", "packed, 1", "padded, 1", f"{choice.layout}, 2", f"{choice.layout}, 4"}
    assert choice.seconds.keys() == kept
    assert min(choice.seconds.values()) > 0
    assert choice.layout in LAYOUTS
    assert choice.together in COUNTS
    assert torch.get_rng_state().equal(random)
    after = base.state_dict()
    assert after.keys() == state.keys()
    assert all(after[name].equal(state[name]) for name in state)
    assert not base.training


def test_what_the_run_file_fixes_is_not_timed(make_llama, sequences):
    config = dataclasses.replace(CONFIG, layout="padded", candidates_per_pass=3)
    choice = measure(make_llama(), sequences, config, ALLOCATIONS, seed=0)
    assert choice == Choice("padded", 3, {})


def test_fine_tunes_that_run_one_by_one_are_timed_so(make_llama, sequences):
    config = dataclasses.replace(CONFIG, dora=True, candidates_per_pass=4, layout="sorted")
    assert measure(make_llama(), sequences, config, ALLOCATIONS, seed=0).together == 1


def test_a_wrapped_model_is_timed_too(make_llama, sequences):
    model = adapters.attach(make_llama(), ALLOCATIONS[0], seed=0, alpha_over_rank=2.0)
    config = dataclasses.replace(CONFIG, layout="sorted")
    choice = measure(model, sequences, config, ALLOCATIONS, seed=0)
    assert choice.seconds.keys() == {"sorted, 1", "sorted, 2", "sorted, 4"}


def test_a_count_that_memory_does_not_suffice_for_is_not_taken(make_llama, sequences, monkeypatch):
    def train_together(base, candidates, *rest, **named):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(pass_calibration, "train_together", train_together)
    config = dataclasses.replace(CONFIG, layout="sorted")
    choice = measure(make_llama(), sequences, config, ALLOCATIONS, seed=0)
    assert choice.together == 1
    assert choice.seconds.keys() == {"sorted, 1"}


def test_a_fine_tune_that_diverges_is_told(make_llama, sequences):
    base = make_llama()
    modules = {name: id(module) for name, module in base.named_modules()}
    config = dataclasses.replace(CONFIG, learning_rate=1e30)
    with pytest.raises(RecoveryError, match="training loss is nan"):
        measure(base, sequences, config, ALLOCATIONS, seed=0)
    assert {name: id(module) for name, module in base.named_modules()} == modules


def test_packing_is_not_timed_where_sequences_would_mix(sequences):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 4}
        model = BloomForCausalLM(BloomConfig(**sizes))
    config = dataclasses.replace(CONFIG, candidates_per_pass=1)
    choice = measure(model, sequences, config, ALLOCATIONS, seed=0)
    assert choice.seconds.keys() == {"sorted, 1", "padded, 1"}
