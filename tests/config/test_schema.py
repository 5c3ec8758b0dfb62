"""The JSON schema of the run file says what the run file says."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from rankadaptor_plugin.config.run_file import EMBEDDED_RUN_FILE
from rankadaptor_plugin.config.schema import json_schema
from rankadaptor_plugin.config.tables import RunConfig
from rankadaptor_plugin.config.template import write_template
from rankadaptor_plugin.config.values import checked
from rankadaptor_plugin.core.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
SCHEMA = json_schema()
VALIDATOR = Draft202012Validator(SCHEMA)


def leaves(cls, *table):
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], field.name)
        else:
            yield (*table, field.name), field.metadata


LEAVES = list(leaves(RunConfig))


def nested(path, value):
    return {path[0]: nested(path[1:], value)} if path else value


def at(path):
    schema = SCHEMA
    for key in path:
        schema = schema["properties"][key]
    return schema


def test_it_is_a_schema_that_allows_no_other_keys():
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    tables = [table for table in SCHEMA["properties"].values() if table["type"] == "object"]
    assert all(table["additionalProperties"] is False for table in [SCHEMA, *tables])


@pytest.mark.parametrize("path", [EMBEDDED_RUN_FILE, *EXAMPLES], ids=lambda path: path.name)
def test_the_run_files_of_the_project_are_valid(path):
    VALIDATOR.validate(tomllib.loads(path.read_text("utf-8")))


@pytest.mark.parametrize("full", [False, True])
def test_what_init_writes_is_valid_once_the_corpus_is_set(tmp_path, full):
    path = tmp_path / "run.toml"
    write_template(path, model="owner/name", full=full)
    (error,) = VALIDATOR.iter_errors(tomllib.loads(path.read_text()))
    assert list(error.absolute_path) == ["corpus", "path"]
    write_template(path, model="owner/name", full=full, corpus="owner/rows", force=True)
    VALIDATOR.validate(tomllib.loads(path.read_text()))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sed": 1}, "'sed' was unexpected"),
        ({"recovery": {"lr": 1e-4}}, "'lr' was unexpected"),  # an alias
        ({"seed": "x"}, "'x' is not of type 'integer'"),
        ({"seed": True}, "True is not of type 'integer'"),
        ({"recovery": 3}, "3 is not of type 'object'"),
        ({"prune": {"pruning_ratio": 1}}, "1 is greater than or equal to the maximum of 1"),
        ({"oracle": {"weights": {"a": -1}}}, "-1 is less than the minimum of 0"),
        ({"rank_space": {"candidates": [2, "4"]}}, "'4' is not of type 'integer'"),
        ({"dtype": "int8"}, "'int8' is not one of ['auto',"),
        ({"output": ""}, "'' should be non-empty"),
        ({"model": "m", "output": "o"}, "'corpus' is a required property"),
        ({"model": "m", "output": "o", "corpus": {}}, "'path' is a required property"),
        ({"model": "m", "corpus": {"path": "c"}}, "'output' is a required property"),
    ],
)
def test_what_is_wrong_is_found(data, message):
    assert [message in error.message for error in VALIDATOR.iter_errors(data)] == [True]


def test_each_key_has_its_help_and_its_default():
    for path, rules in LEAVES:
        schema = at(path)
        assert schema["description"] == rules["help"]
        if path != ("corpus", "path"):
            assert Draft202012Validator(schema).is_valid(schema["default"]), path


@given(data=st.data())
def test_it_allows_for_a_key_what_the_run_file_allows(data):
    path, rules = data.draw(st.sampled_from(LEAVES))
    limits = [rules[rule] for rule in ("low", "high", "above", "below") if rule in rules]
    numbers = st.sampled_from([limit + step for limit in limits or [0] for step in (-1, 0, 1)])
    item = st.one_of(
        numbers,
        numbers.map(lambda number: number + 0.5),
        st.sampled_from(["", "x", *rules.get("choices", ())]),
        st.booleans(),
    )
    value = data.draw(st.one_of(item, st.lists(item), st.dictionaries(st.text(), item)))
    try:
        checked(RunConfig, nested(path, value))
    except ConfigError:
        allowed = False
    else:
        allowed = True
    assert Draft202012Validator(at(path)).is_valid(value) == allowed
