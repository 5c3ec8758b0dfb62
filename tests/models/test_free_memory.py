"""Memory that is free, also within the limit of a container."""

from __future__ import annotations

import sys

import pytest
import torch

from rankadaptor_plugin.models.device import _free_in_container, free_memory_bytes, resident_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_memory_of_the_machine_is_known():
    assert 2**20 < free_memory_bytes(torch.device("cpu")) < 2**60
    assert 2**20 < resident_bytes() < 2**60


def test_a_container_has_what_its_limit_leaves(tmp_path):
    assert _free_in_container(tmp_path) == sys.maxsize
    for name, content in (
        ("memory.max", "1000\n"),
        ("memory.current", "700\n"),
        ("memory.stat", "anon 500\ninactive_file 150\nactive_file 50\n"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert _free_in_container(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert _free_in_container(tmp_path) == sys.maxsize
