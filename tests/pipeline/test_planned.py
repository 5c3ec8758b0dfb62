"""Fine-tunes that are due together go through the model together, and nothing else changes."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage
from transformers import OPTConfig, OPTForCausalLM

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.config.tables import (
    PerformanceModelConfig,
    RecoveryConfig,
    SearchConfig,
)
from rankadaptor_plugin.core.errors import ConfigError, OracleError, RecoveryError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.core.scores import Score, TaskScore, document_key
from rankadaptor_plugin.corpus.corpus import IGNORED, Corpus, TrainingSequence
from rankadaptor_plugin.pipeline import planned
from rankadaptor_plugin.pipeline.fine_tuning import FineTuner
from rankadaptor_plugin.pipeline.planned import PlannedFineTunes
from rankadaptor_plugin.recovery import adapters
from rankadaptor_plugin.recovery.candidates import Trained, train_together
from rankadaptor_plugin.recovery.pass_calibration import Choice
from rankadaptor_plugin.recovery.recover import adopt, recover
from rankadaptor_plugin.recovery.training import MicroBatch
from rankadaptor_plugin.search import adaptive as adaptive_sampler
from rankadaptor_plugin.search import optuna_samplers
from rankadaptor_plugin.search import paper as paper_samplers
from rankadaptor_plugin.search.contract import SamplerSettings
from rankadaptor_plugin.search.performance.performance_model import Prediction
from rankadaptor_plugin.search.search import search
from rankadaptor_plugin.search.study import TrialStore
from rankadaptor_plugin.testing.search import SPACE, planted_outcome

DOCUMENTS = {
    purpose: torch.randint(3, 213, (6, 9), generator=torch.Generator().manual_seed(len(purpose)))
    for purpose in ("search", "report")
}
NOISE, INITIAL, BATCH, TRIALS, SEEDS, TOGETHER = 2, 5, 2, 8, 2, 3
SMALL = {
    "corpus": {"limit": 32},
    "prune": {"importance": "magnitude"},
    "recovery": {
        "steps": 3,
        "learning_rate": 0.02,
        "candidates_per_pass": TOGETHER,
        "targets": ["v_proj", "down_proj"],  # fewer are attached faster
    },
    "oracle": {"name": "fluency", "tasks": []},
    "search": {"method": "linear", "max_trials": 4, "initial_trials": 3},
    "confirm": {"finalists": 1},
}
FLOOR = {"seeds": 2, "allocations": NOISE, "if_drowned": "search"}
WHOLE = {
    "noise": FLOOR,
    "search": {"max_trials": TRIALS, "initial_trials": INITIAL, "batch": BATCH},
    "confirm": {"finalists": 2, "seeds": SEEDS},
}
"""A run with everything that tells beforehand which fine-tunes are due."""


class Fluency:
    """A quick oracle: how likely a model finds a few documents. May break off once, as Ctrl-C."""

    left = None

    def __init__(self, settings):
        pass

    def score(self, model, documents):
        tokens = DOCUMENTS[documents]
        model.eval()
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits.float().log_softmax(-1)
        values = logits.gather(-1, tokens[:, 1:, None])[..., 0].mean(1).tolist()
        if Fluency.left is not None:
            Fluency.left -= 1
            if Fluency.left == 0:
                raise KeyboardInterrupt
        return Score(tasks={"toy": TaskScore.of({"clp": values}, keys=self._keys(documents))})

    def metrics(self, documents):
        return ("clp",)

    def weights(self, documents):
        return {"toy": 1.0}

    def describe(self):
        return {"documents": {p: {"toy": self._keys(p)} for p in DOCUMENTS}, "digest": "fluency"}

    def _keys(self, documents):
        return [document_key(str(row)) for row in DOCUMENTS[documents].tolist()]


class Plugin:
    """Registers the oracle and notes the trials."""

    def __init__(self):
        self.trials = []

    @hookimpl
    def rankadaptor_register_oracles(self, register):
        register("fluency", Fluency)

    @hookimpl
    def rankadaptor_after_trial(self, trial):
        self.trials.append(trial)


class Warnings(logging.Handler):
    """Notes what is warned of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def merged(*tables):
    found = {}
    for table in tables:
        for key, value in table.items():
            both = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = {**found[key], **value} if both else value
    return found


@pytest.fixture(scope="module")
def start(write_run_file, command):
    """Calls ``run`` in a folder; notes what it warns of and which fine-tunes it makes together."""

    def call(folder, train=train_together, **changes):
        groups, warnings = [], Warnings()
        logging.getLogger("rankadaptor_plugin").addHandler(warnings)

        def noting(base, candidates, *rest, **named):
            groups.append(list(candidates))
            return train(base, candidates, *rest, **named)

        plugin = Plugin()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planned, "train_together", noting)
            result = command(
                "run", write_run_file(folder / "r.toml", **merged(SMALL, changes)), plugin=plugin
            )
        logging.getLogger("rankadaptor_plugin").removeHandler(warnings)
        return SimpleNamespace(
            result=result,
            groups=groups,
            warnings=warnings.texts,
            trials=plugin.trials,
            folder=folder / "out",
        )

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory, start):
    """Makes a run that ends well."""

    def make(**changes):
        found = start(tmp_path_factory.mktemp("run"), **changes)
        assert found.result.exit_code == 0, found.result.stderr
        found.report = report_of(found.folder)
        return found

    return make


def report_of(folder):
    return json.loads((folder / "report.json").read_text("utf-8"))


def lasting(report):
    """Returns what does not depend on time, place and interruptions."""
    kept = {key: value for key, value in report.items() if key != "cost"}
    kept["trials"] = [{**trial, "seconds": None} for trial in report["trials"]]
    kept["search"] = {**report["search"], "interrupted": None}
    kept["config"] = {**report["config"], "output": None}
    noise = report["noise"]
    kept["noise"] = noise and {**noise, "seconds_per_fine_tune": None}
    return kept


def weights(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")
    }


def ranks_of(group):
    return [list(allocation.ranks) for allocation, _ in group]


def assert_close(one, other, within=1e-4):
    """Compares nested values; numbers to rounding."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key], within)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_close(*pair, within)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=within)
    else:
        assert one == other


# ------------------------------------------------------------------------- together and one by one


@pytest.fixture(scope="module")
def together(run):
    return run(**WHOLE)


@pytest.fixture(scope="module")
def apart(run):
    return run(**merged(WHOLE, {"recovery": {"candidates_per_pass": 1}}))


def test_one_by_one_nothing_is_trained_together(apart):
    assert apart.groups == []


def test_trials_have_the_same_allocations_and_scores(together, apart):
    assert len(together.report["trials"]) == TRIALS
    for one, other in zip(together.report["trials"], apart.report["trials"], strict=True):
        assert one["ranks"] == other["ranks"]
        assert one["state"] == other["state"] == "complete"
        for key in ("objective", "train_loss", "score"):
            assert_close(one[key], other[key])


def test_the_noise_floor_is_the_same(together, apart):
    one, other = together.report["noise"], apart.report["noise"]
    for key in ("allocations", "seeds", "values"):
        assert_close(one[key], other[key])


def test_the_race_is_the_same(together, apart):
    keys = ("ranks", "label", "baseline")
    one, other = (
        [[c[key] for key in keys] for c in found.report["confirm"]["competitors"]]
        for found in (together, apart)
    )
    assert one == other
    one, other = together.report["scores"], apart.report["scores"]
    assert one.keys() == other.keys()
    assert one["pruned"] == other["pruned"]
    for name in one:
        assert_close(one[name]["mean"]["clp"]["mean"], other[name]["mean"]["clp"]["mean"])
    assert together.report["verdict"]["delivered"] == apart.report["verdict"]["delivered"]


def test_every_fine_tune_of_the_run_is_made_once(together):
    jobs = [job for group in together.groups for job in group]
    assert len(set(jobs)) == len(jobs)
    race = together.report["confirm"]["competitors"]
    assert len(race) == 2
    alone = 1  # the first batch begins with the trials before it, and one is left of it
    assert len(jobs) == NOISE * 2 + TRIALS - NOISE - alone + SEEDS * (len(race) + 1)


def test_every_time_is_a_share_of_its_group(together):
    for trial in together.report["trials"]:
        assert trial["seconds"]["recovery"] > 0
    timings = json.loads((together.folder / "timings.json").read_text("utf-8"))
    recovery = sum(trial["seconds"]["recovery"] for trial in together.report["trials"])
    assert recovery < timings["search"] + timings["noise"]


# ------------------------------------------------------------------------------ what goes together


def test_runs_of_the_noise_floor_go_together(together):
    floor = together.report["noise"]
    expected = [tuple(job) for job in product(map(tuple, floor["allocations"]), floor["seeds"])]
    groups = together.groups[:2]
    assert [(a.ranks, seed) for group in groups for a, seed in group] == expected
    assert list(map(len, groups)) == [2, 2]


def test_initial_trials_go_together(together):
    ranks = [trial["ranks"] for trial in together.report["trials"]]
    assert ranks_of(together.groups[2]) == ranks[NOISE:INITIAL]
    assert {seed for _, seed in together.groups[2]} == {0}


def test_the_trials_of_a_batch_go_together(together):
    ranks = [trial["ranks"] for trial in together.report["trials"]]
    assert ranks_of(together.groups[3]) == ranks[TRIALS - BATCH :]


def test_a_round_of_the_race_goes_together(together):
    competitors = together.report["confirm"]["competitors"]
    uniform = together.report["allocations"]["uniform"]
    for number, group in enumerate(together.groups[4:]):
        assert ranks_of(group) == [uniform, *(c["ranks"] for c in competitors)]
        assert {seed for _, seed in group} == {1_000_000 + number}


def test_random_trials_beside_the_search_go_together(run):
    found = run(search={"max_trials": 3}, confirm={"best_random": True})
    with TrialStore.open(RunFolder(found.folder).study_url, "random") as store:
        trials = store.trials()
    assert [(trial.allocation, trial.seed) for trial in trials] in found.groups


def test_uniform_lora_alone_runs_with_all_seeds_together(run):
    found = run(recovery={"methods": ["lora"]}, confirm={"seeds": 3, "least_seeds": 3})
    (group,) = found.groups
    assert [seed for _, seed in group] == [1_000_000, 1_000_001, 1_000_002]


# ----------------------------------------------------------------------------------- broken off


# Two scores are of plain models; then the noise floor has 4, the search 6, and each fine-tune of
# the race 2. Ends inside a group: of the floor, of the initial trials, of a batch, of a round.
@pytest.mark.parametrize("scores", [4, 8, 12, 22])
def test_a_run_broken_off_within_a_group_ends_as_if_it_had_not_been(
    together, tmp_path, start, scores
):
    Fluency.left = scores
    broken = start(tmp_path, **WHOLE)
    Fluency.left = None
    assert broken.result.exit_code == 130, broken.result.stderr
    again = start(tmp_path, **WHOLE)
    assert again.result.exit_code == 0, again.result.stderr
    assert lasting(report_of(again.folder)) == lasting(together.report)
    assert weights(again.folder) == weights(together.folder)
    # The group that was broken off was made once more, as it was.
    assert [*broken.groups, *again.groups[1:]] == together.groups
    assert again.groups[0] == broken.groups[-1]


def test_a_run_that_ended_trains_nothing_again(together, start):
    again = start(together.folder.parent, **WHOLE)
    assert again.result.exit_code == 0, again.result.stderr
    assert again.groups == []


# -------------------------------------------------------------------------- what goes one by one


def test_trials_that_are_looked_at_on_their_way_go_one_by_one(run):
    found = run(search={"rung": 0.5}, confirm={"finalists": 1, "seeds": 2})
    assert len(found.report["trials"]) == 4
    # Only the race is left.
    assert [{seed for _, seed in group} for group in found.groups] == [{1_000_000}, {1_000_001}]


def test_trials_go_one_by_one_where_time_is_limited(run):
    found = run(search={"max_hours": 1.0}, noise=FLOOR)
    assert len(found.report["trials"]) == 4
    # The fine-tunes that are made in any case are not concerned.
    seeds = [{seed for _, seed in group} for group in found.groups]
    assert seeds == [{0, 3_000_000}, {0, 3_000_000}, {1_000_000}, {1_000_001}]


def test_methods_beside_lora_go_one_by_one(run):
    found = run(
        recovery={"methods": ["rankadaptor", "lora-fa", "rslora"]}, confirm={"finalists": 2}
    )
    race = [group for group in found.groups if group[0][1] >= 1_000_000]
    assert all(not allocation.method for group in found.groups for allocation, _ in group)
    assert list(map(len, race)) == [3, 3]  # uniform LoRA and two finalists
    labels = [c["label"] for c in found.report["confirm"]["competitors"]]
    assert {"lora-fa", "rslora"} < set(labels)


# ----------------------------------------------------------------------- one fine-tuner at a time


CONFIG = RecoveryConfig(
    steps=4,
    batch_size=4,
    micro_batch_size=4,
    learning_rate=0.02,
    warmup_steps=1,
    candidates_per_pass=TOGETHER,
)
JOBS = [(RankAllocation((rank, 2)), 0) for rank in range(1, 6)]


def sequences_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        tokens = torch.randint(3, 40, (4 + number % 5,), generator=generator)
        labels = tokens.clone()
        labels[: len(tokens) // 2] = IGNORED
        found.append(TrainingSequence(tokens, labels))
    return found


@pytest.fixture(scope="module")
def corpus():
    return Corpus(sequences=sequences_of(10), validation=sequences_of(5, seed=1), dropped=0)


@pytest.fixture
def tuner(make_llama, corpus, tmp_path, monkeypatch):
    """Makes fine-tuners; notes which fine-tunes they made together."""
    groups = []

    def noting(base, candidates, *rest, **named):
        groups.append(list(candidates))
        return train_together(base, candidates, *rest, **named)

    monkeypatch.setattr(planned, "train_together", noting)

    class Meter:
        def score(self, model, documents):
            with torch.no_grad():
                value = model(torch.arange(9)[None]).logits.square().mean().item()
            return Score(tasks={"toy": TaskScore.of({"clp": [value]}, keys=["1"])})

    def make(model=None, **changes):
        table = replace(CONFIG, **changes)
        context = SimpleNamespace(
            config=SimpleNamespace(recovery=table, search=SearchConfig(rung=0.5)),
            corpus=corpus,
            teacher=None,
            oracle=Meter(),
        )
        pruned = SimpleNamespace(model=model or make_llama(), tokenizer=None)
        found = FineTuner(
            pruned,
            context,
            RunFolder(tmp_path),
            lambda score: score.tasks["toy"].values["clp"],
            1_000_000,
        )
        return found, groups

    return make


@pytest.mark.parametrize(
    "table", [{"pissa": True}, {"dora": True}, {"keep_best": True}, {"validate_every": 2}], ids=str
)
def test_settings_that_cannot_be_trained_together_go_one_by_one(tuner, table):
    one, groups = tuner(**table)
    one.expect(JOBS[:2])
    for job in JOBS[:2]:
        assert math.isfinite(one.evaluate(job[0], 1.0, job[1]).train_loss)
    assert groups == []


def test_a_share_of_the_steps_goes_one_by_one(tuner):
    one, groups = tuner()
    one.expect(JOBS)
    assert one.evaluate(*JOBS[0][:1], 0.5, 0).fidelity == 0.5
    assert groups == []


def test_a_fine_tune_with_a_rung_goes_one_by_one(tuner):
    one, groups = tuner()
    one.expect(JOBS)
    outcome = one.evaluate(JOBS[0][0], 1.0, 0, lambda value: True)
    assert (outcome.fidelity, list(outcome.rungs)) == (1.0, [0.5])
    assert groups == []


def test_what_nobody_expected_goes_one_by_one(tuner):
    one, groups = tuner()
    one.expect(JOBS[1:])
    one.evaluate(JOBS[0][0], 1.0, 0)
    one.evaluate(JOBS[1][0], 1.0, seed=7)
    assert groups == []


def test_what_is_expected_anew_replaces_what_was(tuner):
    one, groups = tuner()
    one.expect(JOBS[:2])
    one.evaluate(JOBS[0][0], 1.0, 0)
    one.expect(JOBS[2:])
    one.evaluate(JOBS[1][0], 1.0, 0)
    assert groups == [JOBS[:2]]


def test_each_outcome_is_that_of_a_fine_tune_by_itself(tuner):
    (one, groups), (other, _) = tuner(), tuner(candidates_per_pass=1)
    for each in (one, other):
        each.expect(JOBS)
    for allocation, seed in JOBS:
        found, alone = (each.evaluate(allocation, 1.0, seed) for each in (one, other))
        assert found.score.tasks["toy"].values["clp"] == pytest.approx(
            alone.score.tasks["toy"].values["clp"], abs=1e-4
        )
        assert found.train_loss == pytest.approx(alone.train_loss, abs=1e-5)
        assert found.seconds.keys() == alone.seconds.keys()
        assert min(found.seconds.values()) > 0
    assert groups == [JOBS[:3], JOBS[3:]]


def test_afterwards_the_model_is_bare(tuner):
    one, _ = tuner()
    one.expect(JOBS)
    with one.cleared():
        one.evaluate(JOBS[0][0], 1.0, 0)
        model = one._resident.get_base_model()
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_diverging_one_of_a_group_fails_alone_and_says_where(tuner):
    jobs = list(JOBS[:3])
    jobs[1] = (RankAllocation((2, 2), (("learning_rate", 1e30),)), 0)
    one, groups = tuner()
    one.expect(jobs)
    first = one.evaluate(jobs[0][0], 1.0, 0)
    with pytest.raises(RecoveryError, match=r"at step 2 of 4\. Lower \[recovery\] learning_rate"):
        one.evaluate(jobs[1][0], 1.0, 0)
    last = one.evaluate(jobs[2][0], 1.0, 0)
    assert groups == [jobs]
    other, _ = tuner(candidates_per_pass=1)
    for outcome, (allocation, seed) in ((first, jobs[0]), (last, jobs[2])):
        alone = other.evaluate(allocation, 1.0, seed)
        assert outcome.train_loss == pytest.approx(alone.train_loss, abs=1e-5)


@pytest.mark.parametrize("changes", [{}, {"layout": "packed"}, {"layout": "padded"}], ids=str)
def test_an_adopted_fine_tune_is_what_recover_makes(make_llama, corpus, changes):
    config, jobs = replace(CONFIG, **changes), JOBS[1:3]
    made = train_together(make_llama(), jobs, corpus.sequences, config, steps=config.steps)
    base = make_llama()
    for (allocation, seed), trained in zip(jobs, made, strict=True):
        alone = recover(make_llama(), None, allocation, corpus, config, seed)
        micro = MicroBatch.of(config)
        one = adopt(base, allocation, trained, corpus, config, seed, seconds=2.0, micro=micro)
        base = one.model
        assert one.validation_loss == pytest.approx(alone.validation_loss, abs=1e-5)
        assert one.losses == pytest.approx(alone.losses, abs=1e-5)
        assert one.seconds > 2
        assert not one.model.training
        assert one.ranks == alone.ranks
        assert_close(one.provenance, alone.provenance)
        for name, weight in adapters.whole_adapter(one.model).items():
            other = adapters.whole_adapter(alone.model)[name]
            torch.testing.assert_close(weight, other, atol=2e-3, rtol=0)


def test_packed_sequences_that_a_model_mixes_are_refused_before_any_fine_tune(tuner):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        opt = OPTForCausalLM(OPTConfig(vocab_size=40, word_embed_proj_dim=16, dropout=0.0, **sizes))
    with pytest.raises(ConfigError, match="mixes the sequences of a row"):
        tuner(model=opt, layout="packed")


def test_what_failed_is_not_adopted(make_llama, corpus):
    base, failed = make_llama(), Trained({}, [], "The training loss is nan.")
    with pytest.raises(RecoveryError, match="The training loss is nan"):
        adopt(
            base, *JOBS[0][:1], failed, corpus, CONFIG, 0, seconds=0.0, micro=MicroBatch.of(CONFIG)
        )
    assert not any("lora" in name for name, _ in base.named_parameters())


# ---------------------------------------------------------------------------------- the groups


def planner(folder, together):
    context = SimpleNamespace(
        config=SimpleNamespace(recovery=replace(CONFIG, candidates_per_pass=together)),
        corpus=Corpus(sequences=sequences_of(4), dropped=0),
        teacher=None,
    )
    return PlannedFineTunes(context, RunFolder(folder))


def groups_of(monkeypatch, base, planned_, jobs):
    """Takes jobs one after the other; returns the groups that were made for them."""
    found = []

    def noting(base, candidates, *rest, **named):
        found.append(list(candidates))
        return [Trained({}, [0.0]) for _ in candidates]

    monkeypatch.setattr(planned, "train_together", noting)
    for job in jobs:
        if planned_.take(base, *job) is None:
            found.append([job])
    return found


@given(count=st.integers(1, 40), most=st.integers(1, 9), data=st.data())
@settings(max_examples=60)
def test_groups_partition_a_plan_evenly_and_do_not_depend_on_what_is_left(
    make_llama, tmp_path_factory, count, most, data
):
    jobs = [(RankAllocation((1, rank)), 0) for rank in range(1, count + 1)]
    base, folder = make_llama(), tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        whole = planner(folder, most)
        whole.expect(jobs)
        groups = groups_of(patch, base, whole, jobs)
        assert [job for group in groups for job in group] == jobs
        sizes = list(map(len, groups))
        assert max(sizes) <= most
        assert max(sizes) - min(sizes) <= 1
        assert len(groups) == math.ceil(count / most)
        # What was made before is not asked for again, in whatever order that was.
        left = data.draw(st.lists(st.sampled_from(jobs), unique=True, min_size=1))
        rest = planner(folder, most)
        rest.expect(jobs)
        again = groups_of(patch, base, rest, sorted(left, key=jobs.index))
        assert again == [group for group in groups if set(group) & set(left)]


def test_a_plan_names_a_fine_tune_once(make_llama, tmp_path, monkeypatch):
    one = planner(tmp_path, 9)
    one.expect([*JOBS, *JOBS[::-1]])
    assert groups_of(monkeypatch, make_llama(), one, JOBS) == [JOBS]


def test_another_method_is_no_part_of_a_plan(make_llama, tmp_path, monkeypatch):
    other = (RankAllocation((2, 2), method="adalora"), 0)
    one = planner(tmp_path, 9)
    one.expect([JOBS[0], other, JOBS[1]])
    found = groups_of(monkeypatch, make_llama(), one, [JOBS[0], other, JOBS[1]])
    assert found == [JOBS[:2], [other]]


# ------------------------------------------------------------------------------ the calibration


OPEN = {"recovery": {"candidates_per_pass": 0}, "search": {"initial_trials": 4}}
KEPT = {"layout": "packed", "together": 2, "seconds": {"sorted, 1": 0.5}}


@pytest.fixture
def measured(monkeypatch):
    """Makes the outcome of the calibration known; counts how often it was asked for."""
    calls = []

    def measure(base, sequences, config, allocations, **named):
        calls.append(allocations)
        return Choice.from_json(KEPT)

    monkeypatch.setattr(planned, "measure", measure)
    return calls


def test_what_is_left_open_is_measured_once_and_kept(tmp_path, start, measured):
    found = start(tmp_path, **OPEN)
    assert found.result.exit_code == 0, found.result.stderr
    kept = json.loads((found.folder / "passes.json").read_text("utf-8"))
    assert kept == {**KEPT, "open": [False, True]}  # layout, candidates per pass
    assert len(measured) == 1
    ranks = [trial["ranks"] for trial in report_of(found.folder)["trials"]]
    assert [list(allocation.ranks) for allocation in measured[0]] == ranks
    assert {len(group) for group in found.groups} == {2}


@pytest.mark.parametrize(("layout", "taken"), [("auto", "packed"), ("padded", "padded")])
def test_only_a_layout_that_is_left_open_is_the_one_measured(tuner, measured, layout, taken):
    one, groups = tuner(layout=layout, candidates_per_pass=0)
    one.expect(JOBS[:4])
    one.evaluate(JOBS[0][0], 1.0, 0)
    assert one._planned.micro.layout == taken
    assert groups == [JOBS[:2]]


def test_a_number_of_the_run_file_stands_whatever_was_measured(tuner, measured):
    one, groups = tuner(layout="auto", candidates_per_pass=3)
    one.expect(JOBS[:3])
    one.evaluate(JOBS[0][0], 1.0, 0)
    assert len(measured) == 1
    assert groups == [JOBS[:3]]


def test_nothing_is_measured_where_the_run_file_leaves_nothing_open(together):
    assert not (together.folder / "passes.json").exists()


def test_nothing_is_measured_where_fine_tunes_have_to_go_one_by_one(tuner, measured, tmp_path):
    one, _ = tuner(dora=True, candidates_per_pass=0)
    one.expect(JOBS)
    one.evaluate(JOBS[0][0], 1.0, 0)
    assert measured == []
    assert not (tmp_path / "passes.json").exists()


@pytest.fixture(scope="module")
def broken(tmp_path_factory, start):
    """A run that was broken off within the search, after the calibration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned, "measure", lambda *_, **__: Choice.from_json(KEPT))
        Fluency.left = 4
        found = start(tmp_path_factory.mktemp("broken"), **OPEN)
        Fluency.left = None
    assert found.result.exit_code == 130, found.result.stderr
    return found


def test_a_run_that_goes_on_does_not_measure_again(broken, tmp_path, start, monkeypatch):
    shutil.copytree(broken.folder, tmp_path / "out")
    before = (tmp_path / "out" / "passes.json").read_bytes()

    def measure(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(planned, "measure", measure)
    again = start(tmp_path, **OPEN)
    assert again.result.exit_code == 0, again.result.stderr
    assert (tmp_path / "out" / "passes.json").read_bytes() == before
    assert again.groups[0] == broken.groups[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"layout": "sor', "passes.json cannot be read"),
        ('{"layout": "sorted"}', "The calibration of this run is torn"),
    ],
)
def test_a_torn_calibration_is_one_error_and_spoils_no_trial(
    broken, tmp_path, start, measured, text, message
):
    shutil.copytree(broken.folder, tmp_path / "out")
    (tmp_path / "out" / "passes.json").write_text(text, "utf-8")
    again = start(tmp_path, **OPEN)
    assert again.result.exit_code == 1, again.result.stderr
    lines = [line for line in again.result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "trials in a row failed" not in lines[0]
    assert not any(trial.state.value == "failed" for trial in again.trials)
    assert again.groups == []


def test_a_run_begun_anew_measures_anew(tmp_path, start, measured):
    Fluency.left = 3
    start(tmp_path, **OPEN)
    Fluency.left = None
    # Before anything is complete, a folder is taken over by other settings.
    again = start(tmp_path, **merged(OPEN, {"prune": {"ratio": 0.25}}))
    assert again.result.exit_code == 0, again.result.stderr
    assert any("begins anew" in text for text in again.warnings)
    assert len(measured) == 2


def test_another_method_is_measured_as_plain_lora(make_llama, tmp_path, monkeypatch):
    found = []

    def measure(base, sequences, config, allocations, **named):
        found.append(allocations)
        return Choice("sorted", 1, {})

    monkeypatch.setattr(planned, "measure", measure)
    one = planner(tmp_path, 0)
    one.expect(JOBS)
    one.choice(make_llama(), (RankAllocation((2, 2), method="adalora"), 0))
    assert not any(allocation.method for allocation in found[0])


# ------------------------------------------------------------------------------ too little memory


class Narrow:
    """Trains no two fine-tunes together, for want of memory."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self, *_, **__):
        self.calls += 1
        raise self.error


@pytest.fixture(scope="module")
def narrow(tmp_path_factory, start):
    """A run whose memory does not suffice for two fine-tunes."""
    train = Narrow(torch.OutOfMemoryError("CUDA out of memory"))
    found = start(tmp_path_factory.mktemp("narrow"), train)
    assert found.result.exit_code == 0, found.result.stderr
    found.calls = train.calls
    return found


def test_too_little_memory_gives_the_results_of_one_by_one(narrow, run):
    alone = run(recovery={"candidates_per_pass": 1})
    one, other = lasting(report_of(narrow.folder)), lasting(alone.report)
    other["config"]["recovery"]["candidates_per_pass"] = TOGETHER
    assert one == other
    assert weights(narrow.folder) == weights(alone.folder)


def test_what_did_not_fit_is_told_once_and_not_tried_again(narrow):
    assert narrow.warnings == ["Out of memory: from now on fine-tunes run one by one"]
    assert narrow.calls == 1


def test_the_words_of_a_cpu_without_memory_are_understood(tuner, monkeypatch):
    one, _ = tuner()
    train = Narrow(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    monkeypatch.setattr(planned, "train_together", train)
    one.expect(JOBS)
    assert math.isfinite(one.evaluate(JOBS[0][0], 1.0, 0).train_loss)
    assert train.calls == 1


def test_another_error_is_not_taken_for_memory(tuner, monkeypatch):
    one, _ = tuner()
    monkeypatch.setattr(planned, "train_together", Narrow(RuntimeError("shapes do not fit")))
    one.expect(JOBS)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        one.evaluate(JOBS[0][0], 1.0, 0)


# ----------------------------------------------------------------------- one candidate diverges


def test_a_trial_that_diverges_fails_alone_with_its_step(run):
    found = run(
        rank_space={"learning_rate": [0.02, 1e30]},
        recovery={"candidates_per_pass": 6, "targets": []},
        search={"initial_trials": 6, "max_trials": 6, "max_failures": 6},
    )
    assert len(found.groups[0]) == 6
    assert {trial["state"] for trial in found.report["trials"]} == {"failed", "complete"}
    for trial in found.report["trials"]:
        failed = trial["settings"]["learning_rate"] > 1
        assert (trial["state"] == "failed") == failed
        if failed:
            assert "is nan at step 2 of 3. Lower [recovery] learning_rate" in trial["reason"]


# ----------------------------------------------------------------------- the search that proposes


class Nearest:
    """A quick performance model: the value of the nearest allocation measured so far."""

    def pretrain(self, ranks, task_values):
        pass

    def fit(self, ranks, values):
        self.ranks, self.values = ranks, values

    def predict(self, ranks):
        distance = abs(ranks[:, None] - self.ranks[None]).sum(axis=2)
        mean = self.values[distance.argmin(axis=1)]
        return Prediction(mean=mean, stddev=0 * mean)


class Killed(BaseException):
    """Ends the process, as far as the search can tell."""


METHODS = {
    "paper": paper_samplers.paper,
    "linear": adaptive_sampler.linear,
    "tpe": optuna_samplers.tpe,
}
PROPOSING = SearchConfig(method="paper", initial_trials=4, max_trials=9, candidates=50)


def searched(name, config, store=None, expect=None, evaluate=None):
    def sampler_for(seed):
        return METHODS[name](
            SamplerSettings(
                space=SPACE,
                seed=seed,
                search_seed=5,
                initial_trials=config.initial_trials,
                candidates=config.candidates,
                performance_model=Nearest,
                model_config=PerformanceModelConfig(meta_epochs=5, epochs=5),
            )
        )

    more = {} if expect is None else {"expect": expect}
    return search(
        SPACE,
        evaluate or (lambda allocation, fidelity, seed: planted_outcome(allocation.ranks)),
        store or TrialStore(InMemoryStorage(), "study"),
        sampler_for,
        config,
        lambda score: score.tasks["exact"].values["clp"],
        3,
        **more,
    )


def records(result):
    return [{**trial.to_json(), "seconds": None} for trial in result.trials]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", METHODS)
def test_to_tell_what_comes_next_changes_no_proposal(name, batch):
    config, told = replace(PROPOSING, batch=batch), []
    assert records(searched(name, config, expect=told.append)) == records(searched(name, config))
    jobs = list(dict.fromkeys(job for group in told for job in group))
    assert jobs == [(t.allocation, t.seed) for t in searched(name, config).trials]


@pytest.mark.parametrize("name", ["paper", "linear"])
def test_the_random_beginning_and_each_batch_are_told_at_once(name):
    told = []
    searched(name, replace(PROPOSING, batch=3), expect=told.append)
    assert list(map(len, told)) == [4, 2, 3]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_a_search_broken_off_anywhere_tells_the_same_groups_again(name, batch):
    config, told = replace(PROPOSING, batch=batch), []
    whole = searched(name, config, expect=told.append)
    group_of = {job: group for group in told for job in group}
    for break_at in range(config.max_trials):
        store, calls = TrialStore(InMemoryStorage(), "study"), []

        def evaluate(allocation, fidelity, seed, calls=calls, break_at=break_at):
            calls.append(allocation)
            if len(calls) == break_at + 1:
                raise Killed
            return planted_outcome(allocation.ranks)

        with pytest.raises(Killed):
            searched(name, config, store, evaluate=evaluate)
        again = []
        resumed = searched(name, config, store, expect=again.append)
        assert records(resumed) == records(whole)
        assert again == told[told.index(group_of[calls[-1], 3]) :]


def test_trials_that_were_made_before_the_search_are_in_no_group():
    store, told = TrialStore(InMemoryStorage(), "study"), []
    made = searched("linear", PROPOSING).trials
    for trial in made[:2]:
        store.add(trial, SPACE)
    result = searched("linear", PROPOSING, store, expect=told.append)
    assert told[0] == [(trial.allocation, trial.seed) for trial in result.trials[2:4]]


def test_a_failed_trial_changes_no_group():
    told, again = [], []
    searched("linear", PROPOSING, expect=told.append)

    def evaluate(allocation, fidelity, seed):
        if allocation == told[0][1][0]:
            raise OracleError("No task.")
        return planted_outcome(allocation.ranks)

    searched("linear", PROPOSING, expect=again.append, evaluate=evaluate)
    assert again[0] == told[0]
