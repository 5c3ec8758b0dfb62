from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from rankadaptor_plugin.cli import build_cli
from rankadaptor_plugin.core.document_results import write_documents
from rankadaptor_plugin.core.errors import ArtifactError, ConfigError, OracleError, RankAdaptorError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.core.trials import Outcome
from rankadaptor_plugin.pipeline.commands import compare
from rankadaptor_plugin.plugins import plugin_manager
from rankadaptor_plugin.report.console import comparison_text
from rankadaptor_plugin.verdict.comparison import compare_runs
from rankadaptor_plugin.verdict.race import Confirmed, Entrant, Rules, run_path

TASKS = {"tiny_boolq": 1.0, "tiny_piqa": 1.0}
LEVELS = {"base": 0.8, "pruned": 0.4, "uniform": 0.6, "searched": 0.6}


def score(rng, level: float, tasks, documents: int, *, named: bool, offset: int) -> Score:
    found = {}
    for task in tasks:
        right = (rng.random(documents) < level).astype(float).tolist()
        nats = (level + 0.1 * rng.normal(size=documents)).tolist()
        keys = [f"{task}-{offset + j}" for j in range(documents)]
        found[task] = TaskScore(
            values={},
            stderr={},
            documents=documents,
            per_document={"accuracy": right, "choice_logprob": nats},
            keys=keys if named else [],
        )
    return Score(tasks=found)


@pytest.fixture
def write_run(tmp_path):
    """Writes what a finished run leaves for comparisons."""

    def write(
        name: str = "run",
        *,
        seeds=(1, 2, 3),
        levels=LEVELS,
        tasks=TASKS,
        documents: int = 40,
        offset: int = 0,
        delivered: str = "uniform",
        named: bool = True,
        trainable: int = 1000,
        **report,
    ) -> Path:
        folder = tmp_path / name
        rng = np.random.default_rng(0)  # the same documents are hard for all runs
        results = {}
        for model, level in levels.items():
            results[model] = []
            for seed in [None] if model in ("base", "pruned") else seeds:
                file = f"evaluations/{model}-{seed}.parquet"
                found = score(rng, level, tasks, documents, named=named, offset=offset)
                write_documents(folder / file, found)
                results[model].append({"file": file, "seed": seed})
        if delivered:
            results["recovered"] = results[delivered]
        recovered = [m for m in results if m not in ("base", "pruned")]
        content = {
            "results": results,
            "weights": dict(tasks),
            "confirm": {"confidence": 0.95},
            "parameters": {
                "base": 9000,
                "pruned": 5000,
                "trainable": dict.fromkeys(recovered, trainable),
            },
            "config": {"output": str(folder), "prune": {"ratio": 0.5}},
            **report,
        }
        (folder / "report.json").write_text(json.dumps(content))
        (folder / "inputs.json").write_text("{}")
        return folder

    return write


def labels(found) -> list[str]:
    return [model.label for model in found.models]


def change(folder: Path, **changes) -> None:
    file = folder / "report.json"
    report = json.loads(file.read_text())
    file.write_text(json.dumps({**report, **changes}))


def call(*words):
    result = CliRunner().invoke(compare, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# --------------------------------------------------------------------------- which models are meant


def test_one_run_alone_compares_its_recovered_models(write_run):
    assert labels(compare_runs([str(write_run())])) == ["searched", "uniform"]


def test_the_same_run_twice_is_one_run(write_run):
    run = str(write_run())
    assert labels(compare_runs([run, run + "/."])) == ["searched", "uniform"]


def test_two_runs_compare_what_they_deliver(write_run):
    runs = [str(write_run("a")), str(write_run("b", delivered="searched"))]
    found = compare_runs(runs)
    assert labels(found) == ["a:recovered", "b:recovered"]
    assert [model.files[1].name for model in found.models] == [
        "uniform-1.parquet",
        "searched-1.parquet",
    ]


def test_models_after_a_colon(write_run):
    run = write_run()
    found = compare_runs([f"{run}:base", f"{run}:searched", f"{run}:pruned"])
    assert labels(found) == ["base", "searched", "pruned"]
    assert list(found.pairs) == [(0, 1), (0, 2), (1, 2)]


def test_all_compares_every_recovered_model(write_run):
    runs = [str(write_run("a")), str(write_run("b"))]
    found = compare_runs(runs, every_model=True)
    assert labels(found) == ["a:searched", "a:uniform", "b:searched", "b:uniform"]
    assert len(found.pairs) == 6


def test_all_keeps_a_model_that_was_named(write_run):
    runs = [str(write_run("a")), f"{write_run('b')}:base"]
    assert labels(compare_runs(runs, every_model=True)) == [
        "a:searched",
        "a:uniform",
        "b:base",
    ]


def test_a_delivered_model_of_its_own_is_compared_too(write_run):
    run = write_run(levels={**LEVELS, "recovered": 0.6}, delivered="")
    assert labels(compare_runs([str(run)])) == ["recovered", "searched", "uniform"]


def test_a_run_file_stands_for_its_output(write_run, write_run_file, tmp_path):
    write_run("out")
    file = write_run_file(tmp_path / "run.toml", output="out")
    assert compare_runs([str(file)]).models[0].folder == tmp_path / "out"
    assert labels(compare_runs([f"{file}:base", f"{file}:pruned"])) == ["base", "pruned"]


def test_a_path_may_hold_colons_and_brackets(write_run):
    odd, named = write_run("a[b]:c"), write_run("x:uniform")
    found = compare_runs([f"{odd}:uniform", str(named)])
    assert labels(found) == ["a[b]:c:uniform", "x:uniform:recovered"]
    assert "a[b]:c:uniform" in comparison_text(found, 80)


def test_runs_of_the_same_name_are_told_apart(write_run):
    runs = [str(write_run("one/out")), str(write_run("two/out"))]
    assert labels(compare_runs(runs)) == ["one/out:recovered", "two/out:recovered"]


# ----------------------------------------------------------------------------------- what comes out


def test_the_difference_is_that_of_the_means(write_run):
    run = write_run()
    found = compare_runs([f"{run}:base", f"{run}:pruned"], metric="choice_logprob")
    difference = found.pairs[0, 1]
    assert difference.estimate == pytest.approx(0.4, abs=0.05)
    assert difference.is_gain
    assert (difference.documents, difference.left_out) == (80, 0)


def test_one_task_alone(write_run):
    found = compare_runs([str(write_run())], task="tiny_piqa")
    assert found.weights == {"tiny_piqa": 1.0}
    assert found.pairs[0, 1].documents == 40


def test_tasks_without_weight_are_left_out(write_run):
    found = compare_runs([str(write_run(weights={"tiny_boolq": 0.0, "tiny_piqa": 2.0}))])
    assert found.weights == {"tiny_piqa": 2.0}


def test_the_confidence_is_the_runs_own_unless_given(write_run):
    run = str(write_run(confirm={"confidence": 0.8}))
    assert compare_runs([run]).pairs[0, 1].confidence == 0.8
    assert compare_runs([run], confidence=0.9).pairs[0, 1].confidence == 0.9


def test_a_model_of_fewer_than_three_fine_tunes_is_compared_without_a_verdict(write_run):
    runs = [
        str(write_run("a", levels={**LEVELS, "uniform": 0.0})),
        str(write_run("b", seeds=(1, 2))),
    ]
    result = compare_runs(runs)
    assert result.pairs[0, 1].high < 0
    assert not result.pairs[0, 1].is_loss
    assert "none: fewer than 3 seeds" in comparison_text(result, 80)


# ------------------------------------------------------------------------- the verdict of a run

SPACE_RANKS = {"uniform": (8, 8), "lora": (10, 10), "searched": (4, 12), "other": (12, 4)}


@st.composite
def races(draw):
    """A race on planted scores: two finalists, a method, and LoRA of another size or not."""
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    seeds = tuple(range(7, 7 + draw(st.integers(3, 5))))
    tasks = {f"t{i}": draw(st.integers(2, 9)) for i in range(draw(st.integers(1, 3)))}
    weights = {task: draw(st.floats(0.1, 3.0)) for task in tasks}
    allocations = {name: RankAllocation(ranks) for name, ranks in SPACE_RANKS.items()}
    allocations["adalora"] = replace(allocations["uniform"], method="adalora")
    keys = {task: [f"{task}-{k}" for k in rng.permutation(count)] for task, count in tasks.items()}

    def run(level):
        tables = {t: (rng.random(count) < level).astype(float) for t, count in tasks.items()}
        nats = {t: rng.normal(level, 0.1, count) for t, count in tasks.items()}
        per_task = {
            t: TaskScore.of(
                {"accuracy": v.tolist(), "choice_logprob": nats[t].tolist()}, keys=keys[t]
            )
            for t, v in tables.items()
        }
        return Outcome(
            search=Score(tasks=per_task),
            report=Score(tasks=per_task),
            objective=0.0,
            train_loss=1.0,
            seconds={},
        )

    worth = {name: draw(st.sampled_from([0.1, 0.5, 0.9])) for name in allocations}
    runs = {a: tuple(run(worth[name]) for _ in seeds) for name, a in allocations.items()}
    uniform = allocations["uniform"]
    reference = allocations[draw(st.sampled_from(["uniform", "lora"]))]
    entrants = [
        Entrant(label="finalist", allocation=allocations[name], baseline=uniform, is_ranks=True)
        for name in ("searched", "other")
    ]
    entrants.append(Entrant(label="adalora", allocation=allocations["adalora"], baseline=reference))
    rules = Rules(seeds=seeds, confidence=0.9, metric="accuracy", weights=weights)
    return Confirmed.of(rules, runs, entrants, reference, {})


@given(races(), st.sampled_from(["accuracy", "choice_logprob"]))
@settings(max_examples=25)
def test_the_verdict_of_a_run_and_its_comparison_agree_to_the_bit(confirmed, metric):
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = {}
        for allocation in confirmed.runs:
            files[allocation] = []
            for seed, score in zip(
                confirmed.rules.seeds, confirmed.reports(allocation), strict=True
            ):
                file = f"{run_path(allocation, seed)}.parquet"
                write_documents(folder / file, score)
                files[allocation].append({"file": file, "seed": seed})
        results = {model: files[allocation] for model, allocation in confirmed.models.items()}
        report = {
            "results": results,
            "weights": confirmed.rules.weights,
            "confirm": confirmed.to_json(lambda _: 1),
            "parameters": {"base": 9, "pruned": 5, "trainable": {}},
            "methods": list(confirmed.methods),
        }
        (folder / "report.json").write_text(json.dumps(report))
        result = compare_runs([str(folder)], metric=metric)
    names = [model.model for model in result.models]
    recipe = "recipe" if "recipe" in names else "uniform"
    pairs = {(names[a], names[b]): difference for (a, b), difference in result.pairs.items()}
    raced = {("searched", "uniform"): confirmed.differences_of_ranks([metric])[metric]}
    if confirmed.chosen is not None and confirmed.chosen.label == "adalora":
        raced["adalora", recipe] = confirmed.differences([metric])[metric]
    assert {pair: pairs[pair] for pair in raced} == raced
    assert {difference.comparisons for difference in raced.values()} == {3}
    # Pairs that the race did not compare are corrected for their own number.
    met = {("searched", "uniform"), ("adalora", recipe)}
    others = [difference for pair, difference in pairs.items() if pair not in met]
    assert {difference.comparisons for difference in others} == {len(others)}


# -------------------------------------------------------------------------------------------- notes


def test_like_with_like_needs_no_note(write_run):
    assert compare_runs([str(write_run("a")), str(write_run("b"))]).notes == []


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"weights": {"tiny_boolq": 1.0, "tiny_piqa": 3.0}}, "weight their tasks differently"),
        ({"tasks": {**TASKS, "arc": 1.0}}, "compared: tiny_boolq, tiny_piqa. Left out: arc."),
        ({"confirm": {"confidence": 0.9}}, "different confidences (0.9, 0.95); 0.95 is used"),
        ({"parameters": {"base": 1, "pruned": 5000}}, "base models of different sizes: 9,000, 1"),
        ({"parameters": {"base": 9000, "pruned": 6000}}, "pruned models of different sizes"),
        ({"config": {"prune": {"ratio": 0.2}}}, "Settings that differ between the runs: prune.ra"),
        ({"trainable": 1030}, "b:recovered has 1,030 trainable parameters, a:recovered 1,000"),
        ({"seeds": (1,)}, "No verdict on b:recovered: it was fine-tuned with 1 seed, and"),
        ({"seeds": (1, 2)}, "No verdict on b:recovered: it was fine-tuned with 2 seeds, and"),
        ({"seeds": (None,)}, "No verdict on b:recovered: it was fine-tuned with 1 seed, and"),
    ],
)
def test_a_note_says_how_the_runs_differ(changes, note, write_run):
    runs = [str(write_run("a")), str(write_run("b", **changes))]
    notes = compare_runs(runs).notes
    assert len(notes) == 1
    assert note in notes[0]


def test_nearly_equal_parameters_count_as_equal(write_run):
    runs = [str(write_run("a")), str(write_run("b", trainable=1020))]
    assert compare_runs(runs).notes == []


def test_documents_without_names_are_paired_by_position_with_a_note(write_run):
    runs = [str(write_run(name, named=False)) for name in ("a", "b")]
    assert "no names" in compare_runs(runs).notes[0]
    assert compare_runs(runs[:1]).notes == []


# -------------------------------------------------------------------------------------- the command


def test_the_table_is_for_people(write_run):
    a, b = write_run("a"), write_run("b", levels={**LEVELS, "uniform": 0.95}, offset=10)
    done = call(a, b)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "Difference A - B in accuracy, weighted mean of tiny_boolq, tiny_piqa:"
    assert "difference (points)" in lines[2]
    assert "95 % interval" in lines[2]
    assert lines[3].startswith("a:recovered  b:recovered")
    assert lines[3].endswith("B is better")
    assert "a:recovered                 1,000      3" in lines
    assert "3 paired seeds; 60 paired documents, 40 of one model alone left out." in lines
    assert all(line == line.rstrip() for line in lines)


def test_several_pairs_say_how_they_were_corrected(write_run):
    run = write_run()
    done = call(f"{run}:base", f"{run}:uniform", f"{run}:searched", "--metric", "choice_logprob")
    assert "difference (nats)" in done.stdout
    assert "hold for 3 comparisons together (Bonferroni)." in done.stdout
    assert "base and uniform; base and searched: seeds not paired (none and 3);" in done.stdout
    assert "uniform and searched: 3 paired seeds; 80 paired documents." in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("base ")]
    assert rows[0].endswith("A is better")


def test_no_difference_is_said_plainly(write_run):
    assert "no difference beyond noise" in call(write_run()).stdout


@pytest.mark.parametrize("width", [20, 100])
def test_a_long_label_is_not_cut(width, write_run):
    name = "n" * 60
    found = compare_runs([str(write_run(name)), str(write_run("b"))])
    assert "…" not in comparison_text(found, width)
    assert f"{name}:recovered" in comparison_text(found, width)


def test_json_holds_all(write_run):
    done = call(write_run("a"), write_run("b"), "--json")
    found = json.loads(done.stdout)
    assert (found["metric"], found["correction"]) == ("accuracy", "bonferroni")
    assert found["weights"] == TASKS
    assert [m["trainable_parameters"] for m in found["models"]] == [1000, 1000]
    assert [m["seeds"] for m in found["models"]] == [[1, 2, 3]] * 2
    (pair,) = found["pairs"]
    assert (pair["first"], pair["second"]) == ("a:recovered", "b:recovered")
    assert pair.keys() >= {"estimate", "low", "high", "p", "p_adjusted", "is_gain", "is_loss"}
    assert pair["seeds"] == {"first": 3, "second": 3, "paired": True, "left_out": 0}


def test_every_option_has_a_help_text():
    assert all(option.help for option in compare.params if isinstance(option, click.Option))


def test_no_torch_is_loaded(write_run):
    code = (
        "import sys\n"
        "from rankadaptor_plugin.pipeline.commands import compare\n"
        "compare([sys.argv[1]], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'peft', 'lm_eval'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, write_run()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------- errors


def fails(kind: type[RankAdaptorError], message: str, *runs: object, **options) -> None:
    with pytest.raises(kind, match=message) as caught:
        compare_runs([str(run) for run in runs], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "message", "runs", "options"),
    [
        (ConfigError, "does not exist. Give a run folder", ["{}-none"], {}),
        (ConfigError, "does not exist. Give a run folder", ["{}-none:uniform"], {}),
        (ConfigError, "does not exist. Give a run folder", [r"C:\runs\none"], {}),
        (ArtifactError, "is not a run folder", ["{}/evaluations"], {}),
        (ConfigError, "no model 'serched'.* Did you mean 'searched'", ["{}:serched"], {}),
        (ConfigError, "are the same model", ["{}:base", "{}:base"], {}),
        (ConfigError, "uniform and recovered are the same", ["{}:uniform", "{}:recovered"], {}),
        (ConfigError, "It has: accuracy, choice_logprob", ["{}"], {"metric": "margin"}),
        (ConfigError, "'tiny_pica'.* Did you mean 'tiny_piqa'", ["{}"], {"task": "tiny_pica"}),
    ],
)
def test_what_cannot_be_compared_is_one_line(kind, message, runs, options, write_run):
    run = write_run()
    fails(kind, message, *(text.format(run) for text in runs), **options)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("report.json", None, "not finished"),
        ("report.json", '{"results": ', "cannot be read"),
        ("evaluations/uniform-2.parquet", None, r"uniform-2\.parquet is missing"),
    ],
)
def test_a_missing_or_torn_file_is_one_line(file, content, message, write_run):
    run = write_run()
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    fails(ArtifactError, message, run)


def test_a_report_of_an_earlier_version(write_run):
    run = write_run(results=None)
    fails(ArtifactError, "earlier version", run)


@pytest.mark.parametrize(
    "changes",
    [
        {"results": []},
        {"results": {"uniform": []}},
        {"results": {"uniform": [{"file": "x.parquet"}]}},
        {"results": {"uniform": [{"file": "x", "seed": 1}, {"file": "y", "seed": 1}]}},
        {"results": {"uniform": [{"file": "x", "seed": "1"}]}},
        {"weights": {"tiny_piqa": "1"}},
        {"weights": {"tiny_piqa": -1.0}},
        {"weights": None},
        {"parameters": None},
    ],
)
def test_a_report_that_was_tampered_with(changes, write_run):
    run = write_run()
    change(run, **changes)
    fails(ArtifactError, "no usable results", run)


def test_a_model_that_the_run_does_not_have(write_run):
    run = write_run(levels={"base": 0.8, "uniform": 0.6})
    fails(ConfigError, "has no model 'searched'. It has: base, uniform", f"{run}:searched", run)


def test_a_single_model(write_run):
    run = write_run(levels={"base": 0.8, "uniform": 0.6})
    fails(ConfigError, "only uniform to compare", run)
    fails(ConfigError, "only base to compare", f"{run}:base")


def test_no_common_task(write_run):
    fails(OracleError, "no task in common", write_run("a"), write_run("b", tasks={"arc": 1.0}))


def test_no_common_documents(write_run):
    runs = write_run("a"), write_run("b", offset=100)
    fails(OracleError, "0 documents of task tiny_boolq in common", *runs)


def test_errors_are_one_line_with_an_exit_code(write_run, tmp_path):
    cli = build_cli(plugin_manager(third_party=False))
    cli.add_command(compare)
    for run, code in ((f"{write_run()}:best", 2), (tmp_path, 1)):
        done = CliRunner().invoke(cli, ["compare", str(run)])
        assert (done.exit_code, done.stderr.count("\n")) == (code, 1)
        assert done.stderr.startswith("Error: ")


@pytest.mark.parametrize(
    "words", [[], ["--resamples", "300"], ["--confidence", "1"], ["--seed", "1"]]
)
def test_wrong_options_are_refused_by_the_command(words, write_run):
    assert call(*([write_run(), *words] if words else [])).exit_code == 2
