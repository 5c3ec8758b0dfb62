"""Whole runs with other oracles, objectives and documents, and what becomes of their results."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from rankadaptor_plugin.config.run_file import corpus_file
from rankadaptor_plugin.core.document_results import read_documents

QUICK = {
    "corpus": {"max_train_samples": 64},
    "prune": {"importance": "magnitude"},
    "recovery": {"max_steps": 1},
    "search": {"method": "random", "n_trials": 3},
}
TASKS = ["tiny_boolq", "tiny_piqa"]
LAST_ROWS = 40  # of the corpus; the runs train on the first ones


def report_of(folder):
    return json.loads((folder / "report.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def held_out(tmp_path_factory):
    rows = corpus_file("embedded").read_text("utf-8").splitlines()[-LAST_ROWS:]
    path = tmp_path_factory.mktemp("text") / "held-out.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_run_file, command):
    """Makes a run; returns its folder, run file, report and what was printed."""

    def make(plugin=None, **changes):
        folder = tmp_path_factory.mktemp("run")
        file = write_run_file(folder / "r.toml", **{**QUICK, **changes})
        result = command("run", file, plugin=plugin)
        assert result.exit_code == 0, result.stderr
        out = folder / "out"
        return SimpleNamespace(folder=out, file=file, report=report_of(out), stdout=result.stdout)

    return make


def copied(found, tmp_path, write_run_file, **changes):
    """Copies a run to where its files may be changed; returns folder and run file."""
    out = shutil.copytree(found.folder, tmp_path / "out")
    return out, write_run_file(tmp_path / "r.toml", **{**QUICK, **changes})


def assert_rendered(folder, *words):
    for suffix in ("md", "html"):
        text = (folder / f"report.{suffix}").read_text("utf-8")
        for word in words:
            assert word in text


def assert_error(result, code, *fragments):
    assert result.exit_code == code, result.stderr
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Error: ")
    assert sum(line.startswith("Error: ") for line in lines) == 1
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for fragment in fragments:
        assert fragment in lines[-1]


# ------------------------------------------------------------------------------------- perplexity


@pytest.fixture(scope="module")
def two_oracles(run, held_out):
    return run(oracle={"tasks": TASKS, "search_name": "perplexity", "text": held_out})


def test_a_search_by_perplexity_is_judged_by_accuracy(two_oracles):
    report = two_oracles.report
    assert report["objective"] == {"metric": "log_likelihood", "target": "mean"}
    for trial in report["trials"]:
        values = trial["score"]["text"]["values"]
        assert trial["objective"] == values["log_likelihood"] < 0
    assert report["tasks"] == TASKS
    assert report["metrics"] == ["accuracy", "choice_logprob", "margin", "gold_logprob"]
    assert report["verdict"]["comparisons_of_ranks"].keys() == set(report["metrics"])
    assert "points" in report["verdict"]["ranks"]
    assert report["documents"] == {"search": {"text": 12}, "report": dict.fromkeys(TASKS, 20)}
    assert_rendered(two_oracles.folder, "log_likelihood, mean of the tasks (nats per token)")


def test_then_nothing_is_said_of_the_noise_floor_of_the_verdict(
    two_oracles, held_out, tmp_path, write_run_file, command
):
    table = {"tasks": TASKS, "search_name": "perplexity", "text": held_out}
    _, file = copied(two_oracles, tmp_path, write_run_file, oracle=table)
    result = command("noise", file, "--seeds", 2, "--allocations", 2, "--json")
    assert result.exit_code == 0, result.stderr
    noise = json.loads(result.stdout)
    assert (noise["decisive"], noise["floor"], noise["needed"]) == ("accuracy", None, [])
    assert noise["values"].keys() == {"objective", "log_likelihood"}
    assert "The verdict is about accuracy of other tasks, or of another oracle" in noise["sentence"]


@pytest.fixture(scope="module")
def perplexity_alone(run, held_out):
    return run(oracle={"tasks": [], "name": "perplexity", "text": held_out, "report_documents": 0})


def test_perplexity_alone_is_judged_in_nats_per_token(perplexity_alone):
    report = perplexity_alone.report
    assert report["metrics"] == ["log_likelihood"]
    assert report["tasks"] == ["text"]
    assert "nats per token" in report["verdict"]["headline"] + report["verdict"]["ranks"]
    assert report["verdict"]["comparisons_of_ranks"].keys() == {"log_likelihood"}
    documents = report["documents"]
    assert documents["search"] == {"text": 12}
    assert 0 < documents["report"]["text"] <= LAST_ROWS - 12  # rows may repeat
    for column in report["scores"].values():
        assert column["text"] == column["mean"]
        assert column["text"]["log_likelihood"]["mean"] < 0
    assert_rendered(perplexity_alone.folder, "log_likelihood in nats per token", "text")


def test_the_unpruned_model_finds_held_out_text_most_probable(perplexity_alone):
    scores = perplexity_alone.report["scores"]
    base, pruned = (scores[name]["mean"]["log_likelihood"]["mean"] for name in ("base", "pruned"))
    assert base > pruned


def test_runs_are_compared_by_log_likelihood(perplexity_alone, command):
    words = ("compare", perplexity_alone.folder, "--metric", "log_likelihood")
    plain = command(*words)
    assert plain.exit_code == 0, plain.stderr
    assert "nats per token" in plain.stdout
    (pair,) = json.loads(command(*words, "--json").stdout)["pairs"]
    uniform, searched = (
        perplexity_alone.report["scores"][name]["mean"]["log_likelihood"]["mean"]
        for name in ("uniform", "searched")
    )
    assert (pair["first"], pair["second"]) == ("searched", "uniform")
    assert pair["estimate"] == pytest.approx(searched - uniform)


def test_a_comparison_in_a_metric_that_the_run_lacks_is_one_line(perplexity_alone, command):
    result = command("compare", perplexity_alone.folder, "--metric", "accuracy")
    assert_error(result, 2, "accuracy", "log_likelihood")
    assert "log_likelihood" in command("compare", perplexity_alone.folder).stdout


# ------------------------------------------------------------------------------------ local copies

COMMONSENSE = ["rankadaptor_arc_easy", "rankadaptor_boolq"]
SIZES = {"arc_easy": {"train": 24, "test": 10}, "boolq": {"train": 20, "validation": 16}}
NAMES = ["ada", "ben", "cleo", "dora", "eli", "finn", "gwen", "hugo"]
PLACES = ["coast", "cave", "field", "pond"]


def question(benchmark, number):
    name, place = NAMES[number % 8], PLACES[number // 8 % 4]
    if benchmark == "boolq":
        passage = f"{name} lives in the {place} . {number}"
        return {"question": f"is {name} brave ?", "passage": passage, "label": number % 2}
    texts = [PLACES[(number + i) % 4] for i in range(4)]
    return {
        "question": f"{name} met {NAMES[(number + 3) % 8]} in the {place} {number}",
        "choices": {"text": texts, "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[number % 4],
    }


def write_copies(folder, shared=0):
    """Writes local copies; so many questions of each report split are trained on as well."""
    for benchmark, splits in SIZES.items():
        (folder / benchmark).mkdir(parents=True)
        report = next(name for name in splits if name != "train")
        for split, count in splits.items():
            first = 0 if split == report else splits[report] - shared
            rows = [question(benchmark, first + i) for i in range(count)]
            text = "\n".join(map(json.dumps, rows))
            (folder / benchmark / f"{split}.jsonl").write_text(text, "utf-8")
    return str(folder)


def with_copies(folder, **changes):
    table = {"tasks": COMMONSENSE, "data_dir": folder, "report_documents": 0, **changes}
    return {"oracle": {"search_documents": 8, **table}}


@pytest.fixture(scope="module")
def from_copies(run, tmp_path_factory):
    return run(**with_copies(write_copies(tmp_path_factory.mktemp("copies"))))


def test_local_copies_are_searched_on_train_and_reported_on_all_of_the_rest(from_copies):
    report = from_copies.report
    assert report["documents"] == {
        "search": dict.fromkeys(COMMONSENSE, 8),
        "report": {"rankadaptor_arc_easy": 10, "rankadaptor_boolq": 16},
    }
    for task in COMMONSENSE:
        files = {f["file"] for several in report["results"].values() for f in several}
        keys = {tuple(read_documents(from_copies.folder / f)[task].keys) for f in files}
        assert len(keys) == 1
        assert all(task in trial["score"] for trial in report["trials"])


def test_search_tasks_that_are_report_tasks_are_cut(run, tmp_path):
    """And shared documents of the other one are left out of the search where that is asked for."""
    changes = {
        "search_tasks": ["rankadaptor_boolq", "rankadaptor_arc_easy_search"],
        "overlap": "drop",
        "search_documents": 10,
        "weights": {"rankadaptor_arc_easy": 2.0},
    }
    copies = write_copies(tmp_path / "copies", shared=3)
    report = run(**with_copies(copies, **changes)).report
    assert report["documents"] == {
        "search": {"rankadaptor_arc_easy": 10, "rankadaptor_boolq": 10},
        "report": {"rankadaptor_arc_easy": 10, "rankadaptor_boolq": 16 - 10},
    }
    for trial in report["trials"]:
        arc, boolq = (trial["score"][task]["values"]["gold_logprob"] for task in COMMONSENSE)
        assert trial["objective"] == pytest.approx((2 * arc + boolq) / 3)


# -------------------------------------------------------------------------------------- bad input


BAD = {
    "no text": (
        lambda folder, text: {"oracle": {"search_name": "perplexity"}},
        *(2, "needs held-out text", "[oracle] text"),
    ),
    "text that is not there": (
        lambda folder, text: {"oracle": {"search_name": "perplexity", "text": "nowhere.txt"}},
        *(2, "nowhere.txt"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    name, tmp_path, held_out, write_run_file, command
):
    make, code, *fragments = BAD[name]
    changes = make(tmp_path, held_out)
    changes = {**changes, "oracle": {"tasks": ["tiny_piqa"], **changes["oracle"]}}
    file = write_run_file(tmp_path / "r.toml", **{**QUICK, **changes})
    assert_error(command("run", file), code, *fragments)
    left = {path.name for path in (tmp_path / "out").glob("*")}
    assert left <= {".lock"}


# ---------------------------------------------------------------------------- results by document


def test_every_model_has_its_results_by_document(two_oracles):
    report = two_oracles.report
    assert report["results"].keys() == report["scores"].keys()
    for model, files in report["results"].items():
        seeds = [None] if model in ("base", "pruned") else report["confirm"]["seeds"]
        assert [entry["seed"] for entry in files] == seeds
        documents = [read_documents(two_oracles.folder / entry["file"]) for entry in files]
        for task in TASKS:
            count = report["documents"]["report"][task]
            assert all(len(found[task].keys) == count for found in documents)
            for metric in report["metrics"]:
                values = [found[task].values[metric] for found in documents]
                assert {len(row) for row in values} == {count}
                assert np.mean(values) == pytest.approx(
                    report["scores"][model][task][metric]["mean"]
                )
