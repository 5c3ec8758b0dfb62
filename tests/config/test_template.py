"""The run file that ``init`` writes: it fits the model, says what it means, and loads."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.recipes import RECIPES, recipe
from rankadaptor_plugin.config.run_file import EMBEDDED_RUN_FILE
from rankadaptor_plugin.config.tables import RunConfig
from rankadaptor_plugin.config.template import layers_to_keep, write_template
from rankadaptor_plugin.core.errors import ConfigError

HINTS = typing.get_type_hints(RunConfig)
TABLES = {f.name for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(HINTS[f.name])}
LAYERS_TO_KEEP = {1: (0, 0), 4: (1, 0), 8: (1, 1), 12: (2, 1), 24: (3, 2), 30: (4, 2), 32: (4, 2)}
LAYERS_TO_KEEP |= {40: (5, 3), 80: (10, 5)}


def keys(path):
    """Keys of the file by table, and the comment of each line."""
    text = path.read_text("utf-8")
    data = tomllib.loads(text)
    lines = [line for line in text.splitlines() if " = " in line and not line.startswith("#")]
    assert len(lines) == sum(len(value) if key in TABLES else 1 for key, value in data.items())
    assert all(line.partition("  # ")[2].strip() for line in lines), lines
    return {key: set(value) if key in TABLES else value for key, value in data.items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, values in {
        "tiny": {"num_hidden_layers": 8, "dtype": "float32"},
        "llama-30": {"num_hidden_layers": 30, "torch_dtype": "bfloat16"},
        "llama-32": {"num_hidden_layers": 32, "torch_dtype": "float16"},
        "gpt2": {"n_layer": 12},
        "gemma3": {"text_config": {"num_hidden_layers": 34}, "dtype": "bfloat16"},
        "odd": {"num_hidden_layers": "all", "dtype": "float8_e4m3fn"},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    return tmp_path


@pytest.mark.parametrize("name", ["", *RECIPES])
@pytest.mark.parametrize(
    ("model", "kept", "dtype"),
    [
        (None, (0, 0), "float32"),
        ("embedded", (0, 0), "float32"),
        ("tiny", (1, 1), "float32"),
        ("llama-30", (4, 2), "bfloat16"),
        ("llama-32", (4, 2), "float16"),
        ("gpt2", (2, 1), "auto"),
        ("gemma3", (4, 2), "bfloat16"),
        ("odd", (4, 2), "auto"),
        ("owner/name", (4, 2), "auto"),
    ],
)
def test_short_and_full_are_the_same_run_with_the_recipe_in_force(folder, name, model, kept, dtype):
    path = folder / "mine.toml"
    corpus = None if model in (None, "embedded") else "rows.jsonl"
    write_template(path, model=model, corpus=corpus, recipe=name)
    config, short, lines = run_file.load(path), keys(path), len(path.read_text().splitlines())
    write_template(path, model=model, corpus=corpus, recipe=name, full=True, force=True)
    assert run_file.load(path) == config
    assert {key: value for key, value in keys(path).items() if key in TABLES} == {
        table: {field.name for field in dataclasses.fields(HINTS[table])} for table in TABLES
    }
    assert set(keys(path)) == set(HINTS)

    assert (config.recipe, config.output) == (name, str(folder / "runs" / "mine"))
    assert (config.prune.keep_first, config.prune.keep_last) == kept
    assert config.dtype == dtype
    if name:
        made = recipe(name, path=str(folder / corpus) if corpus else "embedded")
        assert (config.corpus, config.recovery) == (made.corpus, made.recovery)
    if corpus:
        assert 22 <= lines <= 28
        assert {key: len(value) for key, value in short.items() if key in TABLES} == {
            "prune": 3,
            "corpus": 1,
            "oracle": 1,
            "search": 2,
        }
    elif not name:
        default = run_file.load(EMBEDDED_RUN_FILE)
        assert dataclasses.replace(config, output=default.output) == default


@pytest.mark.parametrize(("layers", "kept"), LAYERS_TO_KEEP.items())
def test_the_layers_to_keep_are_the_shares_of_the_paper(layers, kept):
    assert layers_to_keep(layers) == kept


@given(layers=st.integers(1, 999))
def test_some_layers_are_always_left_to_prune(layers):
    first, last = layers_to_keep(layers)
    assert 0 <= last <= first
    assert first + last < layers


def test_what_is_known_of_the_model_is_said(folder):
    path = folder / "run.toml"
    (folder / "c.jsonl").touch()
    assert write_template(path, model="llama-30", corpus="c.jsonl") == []
    text = path.read_text()
    assert "first layers, which are not pruned (paper: 4 of 32); the model has 30\n" in text
    assert 'dtype = "bfloat16"  # the model\'s own; type of' in text
    remarks = write_template(path, model="owner/name", force=True)
    assert remarks == [
        "owner/name is not here, so it is taken as a name on the Hub.",
        "Set [corpus] path in it first.",
    ]
    text = path.read_text()
    assert 'model = "owner/name"  # on the Hugging Face Hub\n' in text
    assert "(paper: 4 of 32); as for 32, since the depth is not known here\n" in text
    assert 'path = ""  # required: JSON, JSONL or text file' in text
    remarks = write_template(path, corpus="data/rows", force=True)
    assert remarks == ["data/rows is not here, so it is taken as a name on the Hub."]
    assert write_template(path, corpus="d.jsonl", force=True) == ["d.jsonl does not exist yet."]
    assert write_template(path, model="tiny", corpus="", force=True) == [
        "Set [corpus] path in it first."
    ]
    (folder / "m.GGUF").touch()
    assert write_template(path, model="m.GGUF", corpus="c.jsonl", force=True) == []
    assert run_file.load(path).model == str(folder / "m.GGUF")


@pytest.mark.parametrize("full", [False, True])
def test_a_model_without_a_corpus_is_refused_until_one_is_set(folder, full):
    path = folder / "run.toml"
    write_template(path, model="tiny", full=full)
    with pytest.raises(ConfigError, match=r"corpus\.path is empty or missing\. Set it to a JSON,"):
        run_file.load(path)
    path.write_text(path.read_text().replace('path = ""', 'path = "rows.jsonl"'))
    assert run_file.load(path).corpus.path == str(folder / "rows.jsonl")


def test_paths_are_given_from_here_and_written_as_seen_from_the_file(folder):
    names = ('mödels/"x"\\y', 'dätä/"x"\\y.txt')
    (folder / names[0]).mkdir(parents=True)
    (folder / names[0] / "config.json").write_text("{}")
    path = folder / "runs" / "run.toml"
    write_template(Path("runs/run.toml"), model=names[0], corpus=names[1])
    data = tomllib.loads(path.read_text("utf-8"))
    assert (data["model"], data["corpus"]["path"]) == (f"../{names[0]}", f"../{names[1]}")
    config = run_file.load(path)
    assert Path(config.model).resolve() == folder / names[0]
    assert Path(config.corpus.path).resolve() == folder / names[1]

    write_template(path, model=str(folder / "tiny"), corpus="owner/rows", force=True)
    data = tomllib.loads(path.read_text())
    assert (data["model"], data["corpus"]["path"]) == (str(folder / "tiny"), "owner/rows")
    (folder / "owner" / "rows").mkdir(parents=True)  # what is there goes before the Hub
    write_template(path, model="tiny", corpus="owner/rows", force=True)
    assert tomllib.loads(path.read_text())["corpus"]["path"] == "../owner/rows"


@pytest.mark.parametrize("model", ["", "./nowhere", "gpt3", "models/m.gguf", "list", "text", "."])
def test_a_model_that_is_not_there_is_refused(folder, model):
    for name, content in {"list": "[1]", "text": "{"}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"has no readable config\.json\. Give a Hugging Face"):
        write_template(folder / "run.toml", model=model)
    assert not (folder / "run.toml").exists()


def test_the_template_overwrites_only_when_told(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"already exists\. Give another name, or --force"):
        write_template(path)
    assert path.read_text() == "mine"
    write_template(path, force=True)
    assert run_file.load(path).oracle.tasks


def test_the_template_is_not_written_over_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path, Path()):
        with pytest.raises(ConfigError, match=r"is a folder\. Name a file, such as .*RUN\.toml"):
            write_template(place, force=True)


@pytest.mark.parametrize("place", ["file/run.toml", "n" * 300])
def test_a_place_that_cannot_be_written_is_a_config_error(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written: .*Choose a folder where you may"):
        write_template(tmp_path / place)
