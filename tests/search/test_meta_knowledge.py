"""The file of meta-knowledge: it comes back as it was, and no other file is taken for one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rankadaptor_plugin import __version__
from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.core.ranks import RankSpace, Setting
from rankadaptor_plugin.search.space import LayerFeatures
from rankadaptor_plugin.search.transfer.studies import META, MetaKnowledge, SourceStudy

numbers = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def studies(draw):
    slots, trials = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    choices = (Setting("learning_rate", (1e-4, 1e-3), 1e-4),)
    space = RankSpace(
        candidates=(0, 4, 8),
        searchable=(True,) * slots,
        default_rank=4,
        costs=(3,) * slots,
        settings=draw(st.sampled_from([(), choices])),
    )
    names = draw(st.lists(st.text(max_size=4), max_size=3, unique=True))
    columns = draw(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return SourceStudy(
        name=draw(st.text(max_size=9)),
        space=space,
        features=LayerFeatures(
            tuple(names),
            draw(arrays(np.float64, (slots, len(names)), elements=numbers | st.just(np.nan))),
        ),
        rows=space.sample(trials, rng),
        values=draw(arrays(np.float64, (trials, len(columns)), elements=numbers)),
        columns=tuple(columns),
    )


def example():
    space = RankSpace(candidates=(2, 4), searchable=(True,) * 3, default_rank=4, costs=(3,) * 3)
    return SourceStudy(
        name="runs/a",
        space=space,
        features=LayerFeatures(("relative_depth",), np.array([[0.0], [0.5], [1.0]])),
        rows=space.sample(4, np.random.default_rng(0)),
        values=np.arange(4.0)[:, None],
        columns=("objective",),
    )


def saved(path, sources=None):
    MetaKnowledge((example(),) if sources is None else sources).save(path)
    return path


@given(st.lists(studies(), min_size=1, max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_studies_come_back_as_they_were(tmp_path, sources):
    path = saved(tmp_path / "meta.safetensors", tuple(sources))
    back = MetaKnowledge.load(path).sources
    assert len(back) == len(sources)
    for one, other in zip(back, sources, strict=True):
        assert (one.name, one.space, one.columns) == (other.name, other.space, other.columns)
        assert one.features.names == other.features.names
        np.testing.assert_array_equal(one.features.values, other.features.values)
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_array_equal(one.values, other.values)


def test_the_file_is_plain_safetensors_and_the_same_every_time(tmp_path):
    path = saved(tmp_path / "below" / "meta.safetensors")
    assert sorted(load_file(path)) == ["0.features", "0.rows", "0.values"]
    with safe_open(path, framework="numpy") as stored:
        header = json.loads(stored.metadata()[META])
    assert (header["format"], header["version"]) == (1, __version__)
    assert header["sources"][0]["name"] == "runs/a"
    assert saved(tmp_path / "again").read_bytes() == path.read_bytes()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_meta_knowledge_is_replaced_and_nothing_else(tmp_path):
    path = saved(tmp_path / "meta.safetensors")
    saved(path, (example(), example()))
    assert len(MetaKnowledge.load(path).sources) == 2
    weights = tmp_path / "model.safetensors"
    save_file({"w": np.zeros(2)}, weights)
    note = tmp_path / "note.txt"
    note.write_text("mine")
    for other in (weights, note, tmp_path):
        with pytest.raises(ArtifactError, match="something other than meta-knowledge"):
            saved(other)
    assert note.read_text() == "mine"
    with pytest.raises(ArtifactError, match="cannot be written"):
        saved(note / "meta.safetensors")


def edited(path, change, tensors=None):
    with safe_open(path, framework="numpy") as stored:
        header = json.loads(stored.metadata()[META])
    data = load_file(path)
    change(header, data)
    save_file(data, path, metadata={META: json.dumps(header)})


def test_another_format_is_refused_by_its_version(tmp_path):
    path = saved(tmp_path / "meta.safetensors")
    edited(path, lambda header, _: header.update(format=2, version="9.1"))
    with pytest.raises(
        ArtifactError, match=r"has format 2 of rankadaptor-plugin 9.1; this is .* reads format 1"
    ):
        MetaKnowledge.load(path)
    saved(path)  # and may be replaced
    assert MetaKnowledge.load(path).sources


@pytest.mark.parametrize(
    "change",
    [
        lambda header, data: data.pop("0.rows"),
        lambda header, data: data.update({"0.rows": data["0.rows"][:-1]}),
        lambda header, data: data.update({"0.rows": data["0.rows"] - 9}),
        lambda header, data: data.update({"0.rows": data["0.rows"].astype(np.float64)}),
        lambda header, data: data.update({"0.values": data["0.values"] * np.nan}),
        lambda header, data: data.update({"0.features": data["0.features"][:2]}),
        lambda header, data: header.pop("format"),
        lambda header, data: header.pop("sources"),
        lambda header, data: header.update(sources=[]),
        lambda header, data: header.update(sources=3),
        lambda header, data: header["sources"][0].pop("columns"),
        lambda header, data: header["sources"][0].update(columns=[]),
        lambda header, data: header["sources"][0]["space"].update(candidates=[4, 2]),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(tmp_path, change):
    path = saved(tmp_path / "meta.safetensors")
    edited(path, change)
    with pytest.raises(ArtifactError, match="is corrupt, or not written by"):
        MetaKnowledge.load(path)


def test_what_is_no_such_file_is_refused_in_one_line(tmp_path):
    path = saved(tmp_path / "meta.safetensors")
    content = path.read_bytes()
    other = tmp_path / "other"
    save_file({"w": np.zeros(2)}, tmp_path / "weights")
    cases = [content[:20], content[:-5], content[: len(content) // 2], b"", b"text" * 99]
    for bad in [*cases, (tmp_path / "weights").read_bytes()]:
        other.write_bytes(bad)
        with pytest.raises(ArtifactError, match="is corrupt, or not written by") as caught:
            MetaKnowledge.load(other)
        assert "\n" not in str(caught.value)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(ArtifactError, match=r"does not exist\. Give one written"):
            MetaKnowledge.load(missing)
