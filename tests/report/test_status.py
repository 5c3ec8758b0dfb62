"""The state of a run, as its folder shows it."""

from __future__ import annotations

import json
import os
import socket
import time

import pytest

from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.report.status import read_status


@pytest.fixture
def changed(finished_copy):
    """Rewrites what the last session of a finished run noted, perhaps without a report."""
    folder = RunFolder(finished_copy.parent / "out")

    def change(*, reported=False, **values):
        if not reported:
            for suffix in ("html", "md", "json"):
                (folder.path / f"report.{suffix}").unlink(missing_ok=True)
        folder.write_json("session.json", folder.read_json("session.json") | values)
        return folder

    return change


def printed(command, *words):
    result = command("status", *words)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    return {name: text.strip() for name, _, text in (line.partition(":") for line in lines)}


def test_a_finished_run_shows_its_verdict(finished, command, tmp_path):
    lines = printed(command, finished.folder, "--report")
    best = max(finished.trials, key=lambda trial: trial.objective)
    assert lines["state"] == "finished"
    assert lines["trials"] == (
        f"5 of 5, best: trial {best.position + 1}, gold_logprob {best.objective:.4f}, "
        f"ranks {best.allocation}"
    )
    verdict = finished.report["verdict"]
    assert lines["verdict"].startswith(f"{verdict['headline']}; {verdict['sentence']}; ranks alone")
    assert lines["time"].endswith(" s used")
    assert lines["log"].endswith(" finished")
    assert lines["report"].endswith("report.html")
    assert not (finished.folder / "provisional.html").exists()


def test_a_run_file_stands_for_its_folder_and_json_for_people(finished_copy, finished, command):
    shown = json.loads(command("status", finished_copy, "--json").stdout)
    assert shown["state"] == "finished"
    assert (shown["trials"], shown["planned"]) == (5, 5)
    best = max(finished.trials, key=lambda trial: trial.objective)
    assert shown["best"] == {
        "trial": best.position + 1,
        "objective": best.objective,
        "ranks": list(best.allocation.ranks),
        "settings": {},
    }
    assert shown["seconds"] > finished.report["cost"]["fine_tuning"]


def test_a_run_that_works_shows_what_goes_on_inside(changed, command):
    work = {
        **{"what": "steps", "done": 120, "total": 2000},
        **{"figures": {"loss": 2.3112, "tokens_per_second": 1840.4}, "seconds_left": 130.0},
    }
    folder = changed(
        **{"state": "running", "stage": "search", "done": 3, "total": 5, "work": work},
        **{"pid": os.getpid(), "seconds_left": 3730.0, "began": time.time() - 60},
        seconds_before=0.0,
    )
    with folder.opened():
        lines = printed(command, folder.path)
        status = read_status(folder.path)
    assert lines["state"] == (
        f"running, search 3/5, process {os.getpid()} on {socket.gethostname()}"
    )
    assert lines["inside"] == ("120 of 2,000 steps, loss 2.311, 1,840 tokens/s, 2:10 left")
    assert lines["time"].endswith(" used, about 1:02:10 left")
    assert (status.alive, status.verdict) == (True, "")
    assert 60 <= status.seconds < 120


def test_states_of_runs_that_do_not_work(changed, command):
    folder = changed(state="running", stage="confirm", done=2, total=6)
    assert printed(command, folder.path)["state"] == "interrupted, confirm 2/6"  # killed
    changed(state="interrupted")
    assert read_status(folder.path).state == "interrupted"
    changed(state="finished")
    assert read_status(folder.path).state == "paused"  # as after the command noise
    changed(state="failed", error="No space left on device.")
    lines = printed(command, folder.path)
    assert (lines["state"], lines["error"]) == (
        "failed, confirm 2/6",
        "No space left on device.",
    )


def test_the_next_session_is_loading_until_it_says_more(changed, command):
    for state in ("interrupted", "running"):  # the latter was killed
        folder = changed(state=state, stage="confirm", pid=2**22 + 1)
        with folder.opened():
            lines = printed(command, folder.path)
        assert lines["state"] == "running, load"
        assert lines["trials"].startswith("5 of 5, best")


def test_a_run_that_cannot_be_loaded_has_failed(tmp_path, write_run_file, command):
    path = write_run_file(tmp_path / "small.toml", prune={"calibration_tokens": 64})
    assert command("run", path).exit_code == 1
    lines = printed(command, path)
    assert lines["state"] == "failed, load"
    assert lines["error"].startswith("The calibration text is too short")
    assert "failed: The calibration text is too short" in lines["log"]


def test_a_refused_command_leaves_the_state_of_the_run_alone(
    finished_copy, write_run_file, command
):
    folder = finished_copy.parent / "out"
    write_run_file(finished_copy, seed=1)
    assert "different inputs" in command("run", finished_copy).stderr
    lines = printed(command, folder)
    assert lines["state"] == "finished"
    assert "failed: The run folder" in lines["log"]


def test_where_the_lock_cannot_be_looked_at_the_process_counts(changed):
    folder = changed(state="running", pid=os.getpid())
    (folder.path / ".lock").unlink()
    (folder.path / ".lock").mkdir()
    assert read_status(folder.path).state == "running"
    changed(pid=2**22 + 1)  # more than Linux gives away
    assert read_status(folder.path).state == "interrupted"


def test_a_run_on_another_machine_is_not_called_dead(changed, command):
    folder = changed(state="running", host="elsewhere", pid=7, updated=time.time() - 90)
    lines = printed(command, folder.path)
    assert "as process 7 on elsewhere said 1 min 3" in lines["state"]
    assert lines["state"].endswith("ago; whether it still works cannot be seen from here")
    assert read_status(folder.path).alive is None


def test_a_run_that_is_older_than_the_record_has_a_state(changed, finished_copy):
    folder = RunFolder(finished_copy.parent / "out")
    (folder.path / "session.json").unlink()
    (folder.path / "run.log").unlink()
    status = read_status(folder.path)
    assert (status.state, status.trials, status.planned, status.log) == ("finished", 5, None, "")
    assert "trials:  5, best: trial" in str(status)


def test_a_provisional_report_says_what_is_known_and_no_verdict(changed, finished, command):
    folder = changed(state="interrupted", stage="confirm", done=2, total=6)
    result = command("status", folder.path, "--report")
    assert result.stdout.splitlines()[-2:] == [
        f"report:  {folder.path / 'provisional.md'}",
        f"report:  {folder.path / 'provisional.html'}",
    ]
    page = (folder.path / "provisional.html").read_text("utf-8")
    text = (folder.path / "provisional.md").read_text("utf-8")
    for written in (page, text):
        assert "Provisional: interrupted, confirm 2/6, no verdict yet" in written
        assert "base" in written
        for trial in finished.trials:
            assert str(trial.allocation) in written
    assert finished.report["verdict"]["sentence"] not in page + text
    assert "searched" not in text
    assert text.count("| tiny_piqa |") == len(finished.report["metrics"])


def test_early_in_a_run_the_provisional_report_says_that_nothing_is_there(changed, command):
    folder = changed(state="running", stage="prune", done=0, total=1)
    for path in (folder.path / "evaluations").iterdir():
        path.unlink()
    (folder.path / "study.db").unlink()
    assert command("status", folder.path, "--report").exit_code == 0
    text = (folder.path / "provisional.md").read_text("utf-8")
    assert "No model is scored yet." in text
    assert "No trial is finished yet." in text
    changed(measures=None)
    result = command("status", folder.path, "--report")
    assert result.exit_code == 1
    assert "has nothing to report yet" in result.stderr


def test_the_report_takes_the_place_of_the_provisional_one(changed, finished_copy, command):
    folder = changed(state="interrupted")
    command("status", folder.path, "--report")
    result = command("run", finished_copy)
    assert result.exit_code == 0, result.stderr
    assert not list(folder.path.glob("provisional.*"))


def test_what_is_no_run_is_said(tmp_path, write_run_file, command):
    for path in (tmp_path, write_run_file(tmp_path / "small.toml")):
        result = command("status", path)
        assert result.exit_code == 2
        assert "No run has begun in" in result.stderr
    result = command("status", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
