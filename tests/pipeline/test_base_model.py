"""The base model: loaded once where there is room, and never changed for others."""

from __future__ import annotations

import pytest
import torch

from rankadaptor_plugin.pipeline import base_model
from rankadaptor_plugin.pipeline.base_model import BaseModel

CPU = torch.device("cpu")


@pytest.fixture
def loads(make_llama):
    """Loads a model, and counts how often."""

    def load():
        load.count += 1
        return make_llama()

    load.count = 0
    return load


def room(monkeypatch, free):
    monkeypatch.setattr(base_model, "free_memory_bytes", lambda device: free)


def test_it_is_loaded_once_and_a_copy_is_changed(loads, monkeypatch):
    room(monkeypatch, 2**30)
    base = BaseModel(loads, CPU)
    changed, kept = base.to_change(), base()
    with torch.no_grad():
        changed.lm_head.weight.zero_()
    assert kept.lm_head.weight.any()
    assert base.to_change() is not changed
    base.rest()
    assert base() is kept
    assert loads.count == 1


@pytest.mark.parametrize("free", [None, 1000])
def test_without_room_it_is_loaded_each_time(loads, monkeypatch, free):
    room(monkeypatch, free)
    base = BaseModel(loads, CPU)
    models = [base.to_change(), base(), base.to_change()]
    assert loads.count == len({id(model) for model in models}) == 3


def test_a_model_that_is_spread_over_devices_is_never_kept(loads, monkeypatch):
    room(monkeypatch, 2**30)
    base = BaseModel(loads, None)
    assert base() is not base()


def test_a_run_loads_it_once(tmp_path, write_run_file, command, monkeypatch):
    from rankadaptor_plugin.pipeline import run

    load, count = run.load_model, []

    def counting(*arguments, **options):
        count.append(arguments)
        return load(*arguments, **options)

    monkeypatch.setattr(run, "load_model", counting)
    outputs = []
    for name, free in (("kept", 2**40), ("loaded", None)):
        room(monkeypatch, free)
        count.clear()
        file = write_run_file(tmp_path / f"{name}.toml", output=str(tmp_path / name))
        assert command("run", file).exit_code == 0
        weights = tmp_path / name / "pruned" / "model.safetensors"
        outputs.append((len(count), weights.read_bytes()))
    assert outputs[0][0] == 1 < outputs[1][0]
    assert outputs[0][1] == outputs[1][1]
