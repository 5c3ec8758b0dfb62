"""The run folder: whole files or none, one process at a time, never other inputs."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from shutil import copytree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.core.files import write_file, write_folder
from rankadaptor_plugin.core.run_folder import RunFolder, digest

HOLDER = """
import sys, time
from pathlib import Path
from rankadaptor_plugin.core.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).opened():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def names(path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_json_is_written_whole_and_read_back(folder):
    assert folder.read_json("a/b.json") is None
    folder.write_json("a/b.json", {"x": [1, 2.5, None]})
    folder.write_json("a/b.json", {"x": 0.1})
    assert folder.read_json("a/b.json") == {"x": 0.1}
    assert names(folder.path / "a") == ["b.json"]


def test_a_failing_write_leaves_the_old_file(folder):
    folder.write_json("a.json", {"x": 1})
    with pytest.raises(TypeError):
        folder.write_json("a.json", {"x": object()})
    (folder.path / ".a.json.partial").mkdir()
    with pytest.raises(
        ArtifactError, match=r"a.json cannot be written: Is a directory\. Free some"
    ):
        folder.write_json("a.json", {"x": 2})
    assert folder.read_json("a.json") == {"x": 1}


def test_a_folder_with_files_of_others_is_left_alone(folder):
    folder.path.mkdir(parents=True)
    (folder.path / "thesis.txt").write_text("precious")
    with pytest.raises(ArtifactError, match=r"holds something else \(thesis.txt\).*Set output to"):
        folder.claim({"model": "abc"})
    assert names(folder.path) == ["thesis.txt"]


@pytest.mark.parametrize("content", [b"", b'{"x": 1', b"\xff", b"[]"])
def test_torn_json_names_the_file_and_the_remedy(folder, content):
    folder.write_json("a.json", 1)
    (folder.path / "a.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"a.json cannot be read .*Delete it and run again"):
        folder.read_json("a.json")


def test_a_folder_may_be_claimed_again_by_the_same_inputs(folder):
    inputs = {"config": {"candidates": (2, 4), "weights": {}, "ratio": 0.1}, "model": "abc"}
    folder.claim(inputs)
    folder.claim(inputs)
    assert folder.read_json("inputs.json")["config"]["candidates"] == [2, 4]


def test_other_inputs_are_named(folder):
    folder.claim({"config": {"prune": {"ratio": 0.5}, "seed": 0}, "model": "abc", "old": 1})
    with pytest.raises(ArtifactError) as error:
        folder.claim({"config": {"prune": {"ratio": 0.25}, "seed": 0}, "model": "abc", "new": 2})
    assert "(config.prune.ratio was 0.5, now 0.25; new was unset, now 2; old was 1, now unset)" in (
        str(error.value)
    )
    assert "Set another output, change the inputs back, or delete the folder." in str(error.value)
    assert folder.read_json("inputs.json")["config"]["prune"]["ratio"] == 0.5


def test_of_many_changes_three_are_shown(folder):
    folder.claim({str(i): 0 for i in range(5)})
    with pytest.raises(ArtifactError, match=r"2 was 0, now 1 and 2 more\)"):
        folder.claim({str(i): 1 for i in range(5)})


def test_a_second_process_waits_until_the_first_is_gone(folder):
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ArtifactError, match="is in use by another process"),
            folder.opened(),
        ):
            pytest.fail("two processes hold one run folder")
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with folder.opened():
        folder.write_json("a.json", 1)


def test_the_lock_ends_with_the_block_also_on_an_error(folder):
    with pytest.raises(ZeroDivisionError), folder.opened():
        _ = 1 / 0
    with folder.opened():
        pass


def test_a_folder_below_a_file_cannot_be_opened(tmp_path):
    (tmp_path / "file").write_text("")
    folder = RunFolder(tmp_path / "file" / "run")
    with (
        pytest.raises(ArtifactError, match=r"cannot be written: Not a directory\. Set"),
        folder.opened(),
    ):
        pytest.fail("a file is no folder")
    with pytest.raises(ArtifactError, match=r"a.json cannot be written: Not a directory"):
        folder.write_json("a.json", 1)
    with pytest.raises(ArtifactError, match="x cannot be written: Not a directory"):
        folder.write_folder("x", lambda path: None)


def test_a_full_disk_while_a_folder_is_copied_is_one_plain_reason(folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a", "b"):
        (source / name).write_text("")

    def copy(one, other):
        raise OSError(errno.ENOSPC, "No space left on device", one)

    with pytest.raises(ArtifactError) as failure:
        folder.write_folder(
            "x", lambda path: copytree(source, path, copy_function=copy, dirs_exist_ok=True)
        )
    assert "No space left on device" in str(failure.value)
    assert not any(part in str(failure.value) for part in "[(")
    assert not (folder.path / "x").exists()


def test_a_folder_is_replaced_as_a_whole(folder):
    folder.write_folder("deep/x", lambda path: (path / "old").write_text(""))
    path = folder.write_folder("deep/x", lambda path: (path / "new").write_text(""))
    assert path == folder.path / "deep" / "x"
    assert names(path) == ["new"]
    assert names(path.parent) == ["x"]


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("no errno"), "no errno"),
        (SafetensorError("I/O error: No space left"), "I/O error: No space left"),
        (ValueError("a bug"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_a_folder_that_fails_halfway_leaves_the_old_one(folder, error, shown):
    def failing(path):
        (path / "half").write_text("")
        raise error

    folder.write_folder("x", lambda path: (path / "old").write_text(""))
    with pytest.raises(ArtifactError if shown else type(error), match=shown):
        folder.write_folder("x", failing)
    assert names(folder.path / "x") == ["old"]
    folder.write_folder("x", lambda path: (path / "new").write_text(""))
    assert names(folder.path) == ["x"]
    assert names(folder.path / "x") == ["new"]


def test_seconds_add_up_over_sessions(folder):
    assert folder.timings() == {}
    folder.add_seconds("search", 1.5)
    with RunFolder(folder.path).timed("search"):
        pass
    assert 1.5 < folder.timings()["search"] < 2.5
    with pytest.raises(ZeroDivisionError), folder.timed("prune"):
        _ = 1 / 0
    assert set(folder.timings()) == {"search"}


def test_a_digest_follows_the_files_of_a_folder(tmp_path):
    model = tmp_path / "model"
    (model / "below").mkdir(parents=True)
    (model / "a").write_bytes(b"12")
    first = digest(model)
    assert digest(model) == first
    (model / "below" / "x").write_bytes(b"not counted")
    assert digest(model) == first
    seen = {first}
    for name, content in (("a", b"13"), ("a", b"123"), ("b", b""), ("b", b"1")):
        (model / name).write_bytes(content)
        seen.add(digest(model))
    assert len(seen) == 5
    assert all(len(value) == 16 for value in seen)


@given(contents=st.lists(st.binary(max_size=4), min_size=2, max_size=2, unique=True))
def test_different_contents_have_different_digests(tmp_path_factory, contents):
    path = tmp_path_factory.getbasetemp() / "digested"
    digests = []
    for content in contents:
        path.write_bytes(content)
        digests.append(digest(path))
    assert digests[0] != digests[1]


def test_a_large_file_is_hashed_at_three_places(tmp_path):
    path = tmp_path / "large"
    size = 300 * 2**20
    with path.open("wb") as stream:
        stream.truncate(size)  # takes no room on disk
    seen = {digest(path)}
    for position in (0, size // 2, size - 1):
        with path.open("r+b") as stream:
            stream.seek(position)
            stream.write(b"x")
        seen.add(digest(path))
    assert len(seen) == 4


def test_a_folder_survives_a_write_that_fails_and_a_process_that_was_killed(tmp_path, monkeypatch):
    folder = tmp_path / "kept"

    def fill(text):
        return lambda partial: (partial / "file").write_text(text)

    write_folder(folder, fill("old"))
    replace = os.replace

    def fail_to_move_in(source, target):
        if str(source).endswith(".partial"):
            raise OSError("No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_to_move_in)
    with pytest.raises(OSError, match="No space"):
        write_folder(folder, fill("new"))
    monkeypatch.undo()
    assert (folder / "file").read_text() == "old"
    folder.rename(tmp_path / ".kept.outdated")  # killed between the two moves
    with pytest.raises(ZeroDivisionError):
        write_folder(folder, lambda partial: 1 / 0)
    assert (folder / "file").read_text() == "old"
    write_folder(folder, fill("new"))
    assert (folder / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["kept"]


def test_two_writers_of_a_shared_file_do_not_meet(tmp_path):
    path = tmp_path / "file"

    def fill(partial):
        partial.write_text("first")
        write_file(path, lambda other: other.write_text("second"), shared=True)
        assert path.read_text() == "second"

    write_file(path, fill, shared=True)
    assert path.read_text() == "first"
    assert names(tmp_path) == ["file"]
