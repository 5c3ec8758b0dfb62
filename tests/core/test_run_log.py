"""run.log: lines of all sessions, with their times; never a reason to fail."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from rankadaptor_plugin.core.run_log import logged, said

log = logging.getLogger("anybody")


def lines(folder):
    written = (folder / "run.log").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} ", line) for line in written)
    return [line[25:] for line in written]


def test_lines_and_warnings_of_all_sessions_are_appended(tmp_path):
    (tmp_path / "inputs.json").write_text("{}")
    for session in (1, 2):
        with logged(tmp_path):
            said.info("session %d", session)
            assert lines(tmp_path)[-1] == f"session {session}"
            log.warning("Out of memory:\n  \x1b half as many")
            logging.getLogger().error("lost")
            log.info("not for the file")
        said.info("outside")
        log.warning("outside")
    once = ["WARNING: Out of memory: \x1b half as many", "ERROR: lost"]
    assert lines(tmp_path) == ["session 1", *once, "session 2", *once]


def test_nothing_is_written_into_a_folder_that_may_be_of_others(tmp_path):
    with logged(tmp_path):
        said.info("started")
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "inputs.json").write_text("{}")
        said.info("pruned")
        assert lines(tmp_path) == ["started", "pruned"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_and_a_bad_message_end_nothing(tmp_path):
    (tmp_path / "inputs.json").write_text("{}")
    (tmp_path / "run.log").symlink_to("/dev/full")
    with logged(tmp_path):
        said.info("no space for this")
        (tmp_path / "run.log").unlink()
        handler = said.handlers[-1]  # asked by itself: other handlers stumble over such records
        bad = log.makeRecord(log.name, logging.ERROR, "file", 1, "a number: %d", ("none",), None)
        odd = said.makeRecord(said.name, logging.INFO, "file", 1, "space again \udcff", (), None)
        for record in (bad, odd):
            handler.handle(record)
    assert lines(tmp_path) == ["space again \\udcff"]
