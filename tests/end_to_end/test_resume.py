"""A process that is killed at any stage costs what it was working on, and changes no result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.verdict.race import run_name

COMMAND = Path(sysconfig.get_path("scripts")) / "rankadaptor-plugin"
LIMIT = 120.0  # seconds until a test gives up; a session takes about ten

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Session:
    """A run in a process of its own, which can be waited for and killed."""

    def __init__(self, run_file):
        self.log = run_file.with_suffix(".log")
        self.out = run_file.parent / "out"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([COMMAND, "run", run_file], stderr=log, stdout=log)

    def wait_for(self, ready):
        end = time.monotonic() + LIMIT
        while not ready():
            assert self.process.poll() is None, self.log.read_text("utf-8")
            assert time.monotonic() < end, self.log.read_text("utf-8")
            time.sleep(0.01)

    def wait_for_line(self, part):
        self.wait_for(lambda: part in self.log.read_text("utf-8"))

    def in_the_middle_of_a_trial(self):
        """Stops the process; lets it go on unless it is in a trial and two are finished."""
        self.process.send_signal(signal.SIGSTOP)
        states = trial_states(self.out / "study.db")
        if states.count("COMPLETE") >= 2 and states.count("RUNNING") == 1:
            return True
        self.process.send_signal(signal.SIGCONT)
        return False

    def kill(self):
        self.process.kill()
        assert self.process.wait(LIMIT) == -signal.SIGKILL


@contextlib.contextmanager
def session(run_file):
    running = Session(run_file)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait(LIMIT)


@contextlib.contextmanager
def blocked(path):
    """Makes whoever opens a file for writing wait for a reader that never comes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    try:
        yield
    finally:
        path.unlink()


def partial(path):
    return path.with_name(f".{path.name}.partial")


def trial_states(database, study="search"):
    if not database.exists():
        return []
    query = (
        "SELECT state FROM trials JOIN studies USING (study_id) WHERE study_name = ? "
        "ORDER BY number"
    )
    try:
        uri = f"file:{database}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=0)) as connection:
            return [state for (state,) in connection.execute(query, (study,))]
    except sqlite3.OperationalError:  # not complete yet, or locked
        return []


def lasting(report):
    """Returns what does not depend on time, place and interruptions."""
    kept = {key: value for key, value in report.items() if key != "cost"}
    kept["trials"] = [{**trial, "seconds": None} for trial in report["trials"]]
    kept["search"] = {**report["search"], "interrupted": None}
    kept["config"] = {**report["config"], "output": None}
    return kept


def report_of(folder):
    return json.loads((folder / "report.json").read_text("utf-8"))


def read_log(folder):
    """Returns the lines of run.log without their times."""
    lines = (folder / "run.log").read_text("utf-8").splitlines()
    return [line.split(" ", 2)[2] for line in lines]


def scores(folder):
    """Returns everything that was measured, by file."""
    found = {}
    for path in (folder / "evaluations").glob("*.json"):
        data = json.loads(path.read_text("utf-8"))
        del data["seconds"]
        found[path.name] = data
    return found


def weights(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")
    }


@pytest.fixture
def heard():
    """Processes hear signals, also where the tests run in the background, which ignores some."""
    ignored = [n for n in ENDS if signal.getsignal(n) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.usefixtures("heard")
def test_a_run_ended_by_signals_says_how_to_go_on_and_does(
    finished, tmp_path, write_run_file, command
):
    run_file, out = write_run_file(tmp_path / "small.toml"), tmp_path / "out"
    for number, line in (
        (signal.SIGTERM, "] evaluate base"),
        (signal.SIGHUP, "] trial 2/5"),
        (signal.SIGINT, "] confirm 2/6"),
    ):
        with session(run_file) as running:
            running.wait_for_line(line)
            command("status", out)  # changes nothing of what is compared below
            running.process.send_signal(number)
            assert running.process.wait(LIMIT) == 128 + number
        last = running.log.read_text("utf-8").splitlines()[-1]
        assert last == "Interrupted. Run the same command again to resume."
        assert not [path for path in out.rglob("*") if path.name.endswith(".partial")]
        assert read_log(out)[-1] == f"interrupted by {number.name}"
        assert json.loads((out / "session.json").read_text("utf-8"))["state"] == "interrupted"
    result = command("run", run_file)
    assert result.exit_code == 0, result.stderr
    assert lasting(report_of(out)) == lasting(finished.report)
    lines = read_log(out)
    assert sum(line.startswith("started: rankadaptor-plugin ") for line in lines) == 4
    assert "resuming after 5 finished trials" in lines
    assert lines[-1] == "finished"


def test_under_nohup_a_run_outlives_its_terminal(tmp_path, write_run_file):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with session(write_run_file(tmp_path / "small.toml", search={"n_trials": 3})) as running:
            running.wait_for_line("] evaluate base")
            running.process.send_signal(signal.SIGHUP)
            assert running.process.wait(LIMIT) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_killed_at_four_stages_ends_as_if_it_had_not_been(
    finished, tmp_path, write_run_file, command, observer
):
    run_file, out = write_run_file(tmp_path / "small.toml"), tmp_path / "out"
    evaluations = out / "evaluations"

    with session(run_file) as first:
        first.wait_for((out / "inputs.json").exists)
        with blocked(partial(evaluations / "base.json")):
            first.wait_for_line("] evaluate base")
            first.kill()
    assert (out / "pruned" / "model.safetensors").is_file()
    assert not (out / "study.db").exists()

    with session(run_file) as second:
        second.wait_for(second.in_the_middle_of_a_trial)
        shown = json.loads(command("status", run_file, "--json", "--report").stdout)
        assert (shown["state"], shown["alive"]) == ("running", True)
        assert shown["pid"] == second.process.pid
        assert shown["trials"] >= 2
        second.kill()
    shown = json.loads(command("status", out, "--json").stdout)
    assert (shown["state"], shown["alive"], shown["stage"]) == ("interrupted", False, "search")
    assert (out / "provisional.html").is_file()
    before = trial_states(out / "study.db")
    assert before[-1] == "RUNNING"
    assert set(before[:-1]) == {"COMPLETE"}
    assert len(before) < 6

    finalist = RankAllocation(tuple(finished.report["allocations"]["searched"]))
    last = evaluations / f"{run_name(finalist, 1_000_000)}.json"
    with blocked(partial(last)), session(run_file) as third:
        third.wait_for_line("] confirm 1/6")
        third.kill()
    # One interrupted trial, and none of the finished ones a second time.
    searched = trial_states(out / "study.db")
    assert sorted(searched) == ["COMPLETE"] * 5 + ["FAIL"]
    assert searched.index("FAIL") == len(before) - 1
    assert trial_states(out / "study.db", "confirm") == ["COMPLETE"]
    assert not last.exists()

    with session(run_file) as fourth, blocked(partial(out / "report.json")):
        fourth.wait_for_line("] report")
        fourth.kill()
    assert not (out / "report.json").exists()
    assert trial_states(out / "study.db", "confirm") == ["COMPLETE"] * 6
    # As if it had been killed between two moves while it delivered the adapter.
    (out / "adapter").rename(out / ".adapter.partial")

    result = command("run", run_file, plugin=observer)
    assert result.exit_code == 0, result.stderr
    assert observer.trials == []
    assert trial_states(out / "study.db") == searched
    report = report_of(out)
    assert report["search"]["interrupted"] == 1
    assert report["cost"]["other"] > 0  # the stages' seconds hold those of the killed sessions
    assert lasting(report) == lasting(finished.report)
    assert scores(out) == scores(finished.folder)
    assert weights(out) == weights(finished.folder)
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in finished.folder.iterdir()}
    assert result.stdout.splitlines()[0] == finished.stdout.splitlines()[0]
