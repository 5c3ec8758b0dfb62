"""Whatever is wrong with a run is said in one line, with what to do; the folder stays usable."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from rankadaptor_plugin.config.run_file import EMBEDDED_FOLDER
from rankadaptor_plugin.tasks import task_dir

TOY_CORPUS = {"corpus": {"path": "embedded"}}  # which a model of its own must name
TASK = {"tasks": ["tiny_boolq"]}  # one task is loaded faster than two


def assert_error(result, code, *fragments):
    assert result.exit_code == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == lines[0]
    assert result.stdout == ""
    for fragment in fragments:
        assert fragment in lines[0]


def file_of(folder, name, content):
    (folder / name).write_text(content, "utf-8")
    return str(folder / name)


def task_without_data(folder):
    yaml = (task_dir() / "tiny" / "tiny_boolq.yaml").read_text("utf-8")
    yaml = yaml.replace("!function tiny.load", "!function lost.load").replace("tiny_boolq", "lost")
    (folder / "lost.yaml").write_text(yaml, "utf-8")
    shutil.copy(task_dir() / "tiny" / "tiny.py", folder / "lost.py")
    return {"tasks": ["lost"], "include_path": str(folder)}


# What is changed in a small run (perhaps with files in its folder), the exit code, and what the
# error says: what is wrong, and what to do.
BAD = {
    "unknown key in a table": (
        {"recovery": {"max_stepz": 1}},
        2,
        "recovery.max_stepz",
        "'max_steps'",
    ),
    "device map and device": (
        {"device_map": "auto", "device": "cpu"},
        *(2, "device_map is", 'Set device = "auto"'),
    ),
    "short calibration text": (
        {"prune": {"calibration_tokens": 99}},
        *(1, "longest document has 16 tokens", "calibration_tokens is 99", "Lower it"),
    ),
    "no calibration file": (
        {"prune": {"calibration": "nowhere.txt"}},
        *(2, "nowhere.txt does not exist", "Correct [prune] calibration"),
    ),
    "too many blocks": (
        {"prune": {"method": "depth", "blocks": 9}},
        *(2, "9 blocks, but only 8 of 8", "Lower it"),
    ),
    "no budget": ({"rank_space": {"default_rank": 1}}, 2, "budget", "Add a smaller candidate"),
    "task path that is no folder": (
        {"oracle": {"include_path": "nowhere"}},
        *(2, "is not a folder", "Name the folder"),
    ),
    "rank above a matrix": (
        {"rank_space": {"candidates": [2, 5000], "budget": "free"}},
        *(2, "full rank at 12", "Lower"),
    ),
    "a single allocation": (
        {"rank_space": {"candidates": [8]}},
        *(2, "leaves a single allocation", "Add a greater candidate"),
    ),
    "empty output": ({"output": ""}, 2, "output is empty", "Name a folder"),
    "one report document": ({"oracle": {"report_documents": 1}}, 2, "no interval", "at least 2"),
    "unknown method": ({"search": {"method": "papre"}}, 2, "'papre'", "'paper'", "random"),
    "unknown pruner": ({"prune": {"method": "widht"}}, 2, "'widht'", "Did you mean 'width'?"),
    "unknown oracle": ({"oracle": {"name": "lm_eval"}}, 2, "'lm_eval'", "mean 'lm-eval'?"),
    "unknown model": ({"performance_model": {"name": "mpl"}}, 2, "'mpl'", "mean 'mlp'?"),
    "unknown importance": ({"prune": {"importance": "x"}}, 2, '"x" is unknown', "Use one of"),
    "unknown task": ({"oracle": {"tasks": ["tiny_bolq"]}}, 2, "'tiny_bolq'", "'tiny_boolq'?"),
    "task without data": (
        lambda folder: {"oracle": task_without_data(folder)},
        *(1, "data of the task 'lost' cannot be loaded", "Check the task's data files"),
    ),
    "no model": ({"model": "nowhere", **TOY_CORPUS}, 2, "nowhere does not exist", "Set model"),
    "config.json is a list": (
        lambda folder: {"model": file_of(folder, "config.json", "[1]")[:-11], **TOY_CORPUS},
        *(2, "no readable config.json", "Set model"),
    ),
    "no corpus for an own model": (
        {"model": "nowhere"},
        *(2, "corpus.path is empty or missing", "a JSON, JSONL or text file"),
    ),
    "no corpus": ({"corpus": {"path": "nowhere.jsonl"}}, 2, "cannot be read", "Correct"),
    "corpus with other keys": (
        lambda folder: {"corpus": {"path": file_of(folder, "c.jsonl", '{"prompt": "x"}')}},
        *(1, "row 1 is {'prompt'", "Correct the row"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_one_line_with_a_remedy(name, tmp_path, write_run_file, command):
    changes, code, *fragments = BAD[name]
    changes = changes(tmp_path) if callable(changes) else changes
    oracle = changes.get("oracle", {})
    if not {"weights", "tasks"} & oracle.keys():
        changes = {**changes, "oracle": {**TASK, **oracle}}
    assert_error(command("run", write_run_file(tmp_path / "r.toml", **changes)), code, *fragments)


def test_the_installed_command_says_one_line_and_ends_with_its_exit_code(tmp_path):
    command = Path(sysconfig.get_path("scripts")) / "rankadaptor-plugin"
    done = subprocess.run([command, "run", tmp_path / "no.toml"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"Error: The run file {tmp_path / 'no.toml'} does not exist. Write one with: "
        f"rankadaptor-plugin init {tmp_path / 'no.toml'}\n"
    )


@pytest.mark.parametrize("words", [("rum",), ("run", "--outptu", "x"), ("plugins", "--jsno")])
def test_unknown_commands_and_options_are_clicks_to_report(words, command):
    result = command(*words)
    assert result.exit_code == 2
    assert re.search(r"^Error: No such (command|option)", result.stderr, re.MULTILINE)
    assert "Usage: " in result.stderr


def test_an_output_below_a_file_is_refused(tmp_path, write_run_file, command):
    (tmp_path / "file").write_text("keep me", "utf-8")
    run_file = write_run_file(tmp_path / "r.toml")
    result = command("run", run_file, "--output", tmp_path / "file" / "out")
    assert_error(result, 1, "cannot be written", "Set output to a folder where you may write")
    result = command("run", write_run_file(tmp_path / "r.toml", output="file"))
    assert_error(result, 1, "cannot be written")
    assert (tmp_path / "file").read_text("utf-8") == "keep me"


def test_a_run_folder_in_use_is_refused(tmp_path, write_run_file, command):
    run_file = write_run_file(tmp_path / "r.toml")
    (tmp_path / "out").mkdir()
    hold = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path / "out" / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()  # it holds the lock
        result = command("run", run_file)
        other.communicate(b"\n")
    assert_error(result, 1, "is in use by another process", "Wait for it")


def test_a_missing_corpus_is_told_before_a_model_is_downloaded(tmp_path, write_run_file, command):
    run_file = write_run_file(
        tmp_path / "r.toml", model="owner/name", corpus={"path": "missing.jsonl"}
    )
    assert_error(command("run", run_file), 2, "missing.jsonl cannot be read")


def test_a_diverging_loss_is_reported_and_a_lower_learning_rate_goes_on(
    tmp_path, write_run_file, command, observer
):
    run_file = write_run_file(tmp_path / "r.toml", recovery={"learning_rate": 1e30})
    result = command("run", run_file, plugin=observer)
    assert_error(result, 1, "3 trials in a row failed", "loss is nan", "Lower [recovery] learning")
    assert [trial.state.value for trial in observer.trials] == ["failed"] * 3
    # The same settings go on from the failed trials, which are kept.
    assert_error(command("run", run_file, plugin=observer), 1, "Only 0 of 5 trials are complete")
    assert [trial.position for trial in observer.trials] == [0, 1, 2, 3, 4]
    write_run_file(run_file)
    result = command("run", run_file)
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert report["search"]["complete"] == 5


def test_a_finished_folder_is_not_continued_with_other_inputs(
    finished_copy, finished, write_run_file, command, observer, tmp_path
):
    write_run_file(finished_copy, prune={"pruning_ratio": 0.25})
    remedy = "Set another output, change the inputs back, or delete the folder"
    result = command("run", finished_copy, plugin=observer)
    assert_error(result, 1, "config.prune.pruning_ratio was 0.5, now 0.25", remedy)

    # Neither is one that another recovery stage finished, without a study of ours.
    study = tmp_path / "out" / "study.db"
    study.rename(tmp_path / "study.db")
    assert_error(command("run", finished_copy), 1, "was made from different inputs")
    assert (tmp_path / "out" / "adapter").is_dir()
    (tmp_path / "study.db").rename(study)

    rows = (EMBEDDED_FOLDER / "recovery.jsonl").read_text("utf-8").splitlines()
    other = file_of(tmp_path, "other.jsonl", "\n".join(rows[:-1]))
    write_run_file(finished_copy, corpus={"path": other})
    assert_error(command("run", finished_copy, plugin=observer), 1, "corpus was ", remedy)

    write_run_file(finished_copy)
    result = command("run", finished_copy, plugin=observer)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == finished.stdout.splitlines()[0]
    assert observer.trials == []
