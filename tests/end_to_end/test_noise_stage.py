"""The noise floor in whole runs: measured once, gone on from, believed."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.config.run_file import corpus_file
from rankadaptor_plugin.oracle.lm_eval_oracle import LmEvalOracle
from rankadaptor_plugin.oracle.perplexity import PerplexityOracle

QUICK = {
    "corpus": {"max_train_samples": 64},
    "prune": {"importance": "magnitude"},
    "recovery": {"max_steps": 2},
    "oracle": {"name": "counting", "tasks": ["tiny_boolq"], "search_documents": 8},
    "search": {"method": "random", "n_trials": 4},
    "noise": {"seeds": 2, "allocations": 3},
}
FINE_TUNES = 6  # of the noise floor
CONFIRMED = 6  # fine-tunes of the confirmation


class Counter:
    """Registers an oracle that counts fine-tunes: each is scored once on the search documents."""

    def __init__(self, stop_after=None):
        self.fine_tunes, self.stop_after, self.stages, self.resumed = 0, stop_after, [], None

    @hookimpl
    def rankadaptor_register_oracles(self, register):
        counter = self

        def counting(kind):
            class CountingOracle(kind):
                def score(self, model, documents):
                    if documents == "search":
                        if counter.fine_tunes == counter.stop_after:
                            raise KeyboardInterrupt
                        counter.fine_tunes += 1
                    return super().score(model, documents)

            return CountingOracle

        register("counting", counting(LmEvalOracle))
        register("counting-text", counting(PerplexityOracle))

    @hookimpl
    def rankadaptor_on_progress(self, stage, done, total):
        self.stages.append((stage, done, total))

    @hookimpl
    def rankadaptor_on_resume(self, trials):
        self.resumed = list(trials)


@pytest.fixture
def counter():
    return Counter()


def report_of(folder):
    return json.loads((folder / "report.json").read_text("utf-8"))


def lasting(report):
    """What depends neither on time nor on place, nor on interruptions."""
    kept = {key: value for key, value in report.items() if key != "cost"}
    kept["noise"] = report["noise"] and {**report["noise"], "seconds_per_fine_tune": None}
    kept["trials"] = [{**trial, "seconds": None} for trial in report["trials"]]
    kept["search"] = {**report["search"], "interrupted": None}
    kept["config"] = {**report["config"], "output": None}
    return kept


def noise_files(folder):
    return {path.name: path.read_bytes() for path in (folder / "noise").iterdir()}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, write_run_file, command):
    """The command ``noise`` in an empty folder; for reading only."""
    folder = tmp_path_factory.mktemp("measured")
    counter = Counter()
    result = command("noise", write_run_file(folder / "r.toml", **QUICK), plugin=counter)
    assert result.exit_code == 0, result.stderr
    return SimpleNamespace(folder=folder / "out", result=result, counter=counter)


@pytest.fixture(scope="module")
def run_after(measured, tmp_path_factory, write_run_file, command):
    """A run that goes on from there; for reading only."""
    folder = tmp_path_factory.mktemp("after")
    shutil.copytree(measured.folder, folder / "out")
    counter = Counter()
    settings = {**QUICK, "noise": {**QUICK["noise"], "search_despite_noise": True}}
    result = command("run", write_run_file(folder / "r.toml", **settings), plugin=counter)
    assert result.exit_code == 0, result.stderr
    report = report_of(folder / "out")
    return SimpleNamespace(folder=folder / "out", counter=counter, report=report, settings=settings)


@pytest.fixture
def copy_of(tmp_path):
    """Copies a run folder to where a run file of `tmp_path` looks for it."""

    def copy(run):
        return shutil.copytree(run.folder, tmp_path / "out")

    return copy


# ---------------------------------------------------------------------------------- the command


def test_the_command_tells_what_the_fine_tunes_say(measured):
    text = measured.result.stdout
    noise = json.loads((measured.folder / "noise.json").read_text("utf-8"))
    assert text.startswith(noise["sentence"][:40])
    for word in (
        "ICC",
        "objective",
        "accuracy",
        "choice_logprob",
        "gain",
        "fine-tunes",
        "are left",
    ):
        assert word in " ".join(text.split())
    assert noise["fine_tunes_left"] == (4 - 3) + CONFIRMED
    assert measured.counter.fine_tunes == FINE_TUNES
    counts = [(done, total) for stage, done, total in measured.counter.stages if stage == "noise"]
    assert counts == [(done, FINE_TUNES) for done in range(FINE_TUNES + 1)]
    assert f"noise 3/{FINE_TUNES}" in measured.result.stderr


def test_the_command_leaves_the_pruned_model_and_the_fine_tunes_and_no_search(measured):
    names = {path.name for path in measured.folder.iterdir()}
    assert names == {
        *("inputs.json", "pruned", "noise", "noise.json", "timings.json", ".lock"),
        *("session.json", "run.log", "attention.json"),
    }
    files = sorted(path.suffix for path in (measured.folder / "noise").iterdir())
    assert files == [".json"] * FINE_TUNES + [".parquet"] * FINE_TUNES


def test_json_is_all_that_is_printed_and_repeats_no_fine_tune(
    measured, copy_of, tmp_path, write_run_file, command, counter
):
    out = copy_of(measured)
    before = noise_files(out)
    result = command(
        "noise", write_run_file(tmp_path / "r.toml", **QUICK), "--json", plugin=counter
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((out / "noise.json").read_text("utf-8"))
    assert counter.fine_tunes == 0
    assert noise_files(out) == before


def test_options_replace_the_run_file(
    measured, copy_of, tmp_path, write_run_file, command, counter
):
    copy_of(measured)
    options = ("--seeds", 3, "--allocations", 2, "--gain", 0.03, "--gain", 0.1, "--json")
    result = command(
        "noise", write_run_file(tmp_path / "r.toml", **QUICK), *options, plugin=counter
    )
    noise = json.loads(result.stdout)
    assert (len(noise["allocations"]), len(noise["seeds"])) == (2, 3)
    assert [entry["gain"] for entry in noise["needed"]] == [0.03, 0.1]
    assert counter.fine_tunes == 2  # the third seed of two allocations; the others were kept


@pytest.mark.parametrize(
    ("options", "fragment"),
    [(("--seeds", 1), "noise.seeds is 1"), (("--gain", "nan"), "noise.gains is nan")],
)
def test_a_bad_option_is_one_line(options, fragment, tmp_path, write_run_file, command):
    result = command("noise", write_run_file(tmp_path / "r.toml", **QUICK), *options)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert_error(result, 2, fragment)
    assert not (tmp_path / "out").exists()


def assert_error(result, code, *fragments):
    assert result.exit_code == code, result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for fragment in fragments:
        assert fragment in line


# ----------------------------------------------------------------------------- a run with the step


def test_a_run_goes_on_from_the_command(measured, run_after):
    trials = run_after.report["trials"]
    same = run_after.report["allocations"].keys() == {"uniform", "recovered"}
    assert run_after.counter.fine_tunes == 1 + (CONFIRMED // 2 if same else CONFIRMED)
    noise = run_after.report["noise"]
    assert [trial["ranks"] for trial in trials[:3]] == noise["allocations"]
    assert [trial["objective"] for trial in trials[:3]] == [
        row[0] for row in noise["values"]["objective"]
    ]
    assert {trial["phase"] for trial in trials[:3]} == {"initialization"}
    assert len(trials) == 4
    assert [trial.to_json() for trial in run_after.counter.resumed or trials[:0]] in (
        [],
        trials[:3],
    )
    assert noise_files(run_after.folder) == noise_files(measured.folder)


def test_every_form_of_the_report_has_the_section(run_after):
    noise = run_after.report["noise"]
    assert noise == json.loads((run_after.folder / "noise.json").read_text("utf-8"))
    for suffix in ("md", "html"):
        text = (run_after.folder / f"report.{suffix}").read_text("utf-8")
        assert "Noise floor" in text
        assert noise["sentence"][:40] in text
    assert run_after.report["seeds"]["noise"] == noise["seeds"]


def test_the_fine_tunes_of_the_step_are_among_the_costs(run_after):
    cost = run_after.report["cost"]
    assert cost["stages"]["noise"] > 0
    parts = [cost[name] for name in ("fine_tuning", "evaluation", "other")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(sum(cost["stages"].values()))
    kept = [
        json.loads(path.read_text("utf-8"))["seconds"]["recovery"]
        for path in (run_after.folder / "noise").glob("*.json")
    ]
    trials = sum(trial["seconds"]["recovery"] for trial in run_after.report["trials"])
    assert cost["fine_tuning"] > trials + sum(kept) / len(kept)


def test_changed_settings_of_the_step_are_no_other_inputs(
    run_after, copy_of, tmp_path, write_run_file, command, counter
):
    out = copy_of(run_after)
    table = {"seeds": 2, "allocations": 4, "gains": [0.2], "search_despite_noise": True}
    result = command(
        "run", write_run_file(tmp_path / "r.toml", **{**QUICK, "noise": table}), plugin=counter
    )
    assert result.exit_code == 0, result.stderr
    report = report_of(out)
    assert counter.fine_tunes == 2  # two seeds of the fourth allocation
    assert report["trials"] == run_after.report["trials"]
    assert report["verdict"] == run_after.report["verdict"]
    assert [entry["gain"] for entry in report["noise"]["needed"]] == [0.2]
    assert len(report["noise"]["allocations"]) == 4


def test_without_seeds_the_step_is_skipped(finished):
    assert finished.report["noise"] is None
    assert not (finished.folder / "noise").exists()
    assert not (finished.folder / "noise.json").exists()
    assert "Noise floor" not in (finished.folder / "report.md").read_text("utf-8")
    assert finished.report["seeds"]["noise"] == []


@pytest.mark.parametrize("word", ["noise", "run"])
def test_an_interrupted_step_goes_on(word, run_after, measured, tmp_path, write_run_file, command):
    run_file = write_run_file(tmp_path / "r.toml", **run_after.settings)
    first = Counter(stop_after=3)
    result = command(word, run_file, plugin=first)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("Interrupted. Run the same command")
    out = tmp_path / "out"
    assert len(list((out / "noise").glob("*.json"))) == 3
    assert not (out / "noise.json").exists()

    second = Counter()
    assert command(word, run_file, plugin=second).exit_code == 0
    if word == "noise":
        assert second.fine_tunes == FINE_TUNES - 3
        whole = json.loads((measured.folder / "noise.json").read_text("utf-8"))
        resumed = json.loads((out / "noise.json").read_text("utf-8"))
        assert {**resumed, "seconds_per_fine_tune": 0} == {**whole, "seconds_per_fine_tune": 0}
    else:
        assert second.fine_tunes == FINE_TUNES - 3 + run_after.counter.fine_tunes
        assert lasting(report_of(out)) == lasting(run_after.report)


def test_a_torn_fine_tune_is_named_and_made_anew(
    measured, copy_of, tmp_path, write_run_file, command, counter
):
    out, file = copy_of(measured), write_run_file(tmp_path / "r.toml", **QUICK)
    torn = min((out / "noise").glob("*.parquet"))
    torn.write_bytes(torn.read_bytes()[:-40])
    result = command("noise", file, plugin=counter)
    assert result.exit_code == 1
    assert str(torn) in result.stderr.splitlines()[-1]
    assert "Delete it and run again" in result.stderr.splitlines()[-1]
    torn.unlink()  # what the message says
    result = command("noise", file, plugin=counter)
    assert result.exit_code == 0, result.stderr
    assert counter.fine_tunes == 1
    before, after = (
        json.loads((folder / "noise.json").read_text("utf-8")) for folder in (measured.folder, out)
    )
    assert after["values"] == before["values"]


# -------------------------------------------------------------------------- below the noise


@pytest.fixture(scope="module")
def below(tmp_path_factory, write_run_file, command):
    """A run whose three seeds for the comparison could not tell any gain from noise."""
    folder = tmp_path_factory.mktemp("below")
    counter = Counter()
    held_out = corpus_file("embedded").read_text("utf-8").splitlines()[-40:]
    (folder / "text.jsonl").write_text("\n".join(held_out) + "\n", encoding="utf-8")
    oracle = {"name": "counting-text", "tasks": [], "text": str(folder / "text.jsonl")}
    settings = {
        **QUICK,
        "oracle": {**QUICK["oracle"], **oracle},
        "confirm": {"confidence": 0.99},
    }
    result = command("run", write_run_file(folder / "r.toml", **settings), plugin=counter)
    assert result.exit_code == 0, result.stderr
    return SimpleNamespace(
        folder=folder / "out",
        result=result,
        counter=counter,
        report=report_of(folder / "out"),
        settings=settings,
    )


def test_a_gain_below_the_noise_ends_without_a_search(below):
    report = below.report
    floor = report["noise"]["floor"]
    assert floor["below_noise"]
    assert floor["plausible_gain_high"] < floor["detectable_gain"]
    assert report["search"]["stop_reason"] == "noise floor"
    assert report["verdict"]["sentence"] == "LoRA r=8 is delivered"
    assert report["verdict"]["ranks"] == (
        "ranks alone: no search, as no plausible gain rises above the noise"
    )
    assert "ranks alone: no search" in below.result.stdout
    assert report["verdict"]["delivered"] == "uniform"
    assert report["verdict"]["comparisons"] == {}
    assert [trial["ranks"] for trial in report["trials"]] == report["noise"]["allocations"]
    # What the search would have taken goes into a seed more.
    assert below.counter.fine_tunes == FINE_TUNES + CONFIRMED // 2 + 1
    assert len(report["confirm"]["seeds"]) == 4


def test_a_search_can_be_asked_for_all_the_same(
    below, copy_of, tmp_path, write_run_file, command, counter
):
    out = copy_of(below)
    noise = {**QUICK["noise"], "search_despite_noise": True}
    settings = {**below.settings, "noise": noise}
    result = command("run", write_run_file(tmp_path / "r.toml", **settings), plugin=counter)
    assert result.exit_code == 0, result.stderr
    report = report_of(out)
    assert report["search"]["stop_reason"] == "n_trials"
    assert report["trials"][:3] == below.report["trials"]
    assert len(report["trials"]) == 4
    assert report["noise"]["floor"]["below_noise"]
    assert counter.fine_tunes <= 1 + CONFIRMED // 2  # uniform LoRA was confirmed already

    # A search that was made is not unmade.
    write_run_file(tmp_path / "r.toml", **below.settings)
    result = command("run", tmp_path / "r.toml", plugin=counter)
    assert result.exit_code == 0, result.stderr
    assert report_of(out)["verdict"] == report["verdict"]
    assert report_of(out)["search"] == report["search"]


# ------------------------------------------------------------------- other settings, damaged files


def test_the_comparison_may_be_enlarged_after_the_noise_floor(
    measured, copy_of, tmp_path, write_run_file, command, counter
):
    before = noise_files(copy_of(measured))
    settings = {**QUICK, "confirm": {"seeds": 7}}
    result = command("noise", write_run_file(tmp_path / "r.toml", **settings), plugin=counter)
    assert result.exit_code == 0, result.stderr
    assert counter.fine_tunes == 0
    assert noise_files(tmp_path / "out") == before


def test_not_after_it_was_seen(run_after, copy_of, tmp_path, write_run_file, command, counter):
    copy_of(run_after)
    settings = {**run_after.settings, "confirm": {"seeds": 7}}
    result = command("run", write_run_file(tmp_path / "r.toml", **settings), plugin=counter)
    assert_error(result, 1, "config.confirm.seeds was 3, now 7")
