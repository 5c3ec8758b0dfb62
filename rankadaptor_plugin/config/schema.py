"""JSON schema of the run file, with which editors complete and check it."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from rankadaptor_plugin.config.tables import EMBEDDED, RunConfig

_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}
_LIMITS = {
    "low": "minimum",
    "high": "maximum",
    "above": "exclusiveMinimum",
    "below": "exclusiveMaximum",
}
"""Keywords of the schema by the limits of a field."""


def json_schema() -> dict[str, Any]:
    """Returns the schema (draft 2020-12): every key by itself, and what a model of its own needs.

    The rules across keys are not in it.
    """
    own_model = {"properties": {"model": {"not": {"const": EMBEDDED}}}, "required": ["model"]}
    needed = {"properties": {"corpus": {"required": ["path"]}}, "required": ["output", "corpus"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Run file of rankadaptor-plugin",
        **_table(RunConfig),
        "if": own_model,
        "then": needed,
    }


def _table(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {
        "description": cls.__doc__.splitlines()[0],
        "type": "object",
        "properties": {
            field.name: _table(hints[field.name])
            if dataclasses.is_dataclass(hints[field.name])
            else _key(field, hints[field.name])
            for field in dataclasses.fields(cls)
        },
        "additionalProperties": False,
    }


def _key(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    rules = field.metadata
    value: dict[str, Any] = {word: rules[rule] for rule, word in _LIMITS.items() if rule in rules}
    if "choices" in rules:
        value["enum"] = list(rules["choices"])
    if "needed" in rules:
        value["minLength"] = 1
    word = rules.get("word")
    hint = hint if word is None else typing.get_args(hint)[-1]
    origin, items = typing.get_origin(hint), typing.get_args(hint)
    value["type"] = _TYPES[items[-1] if origin is dict else items[0] if origin else hint]
    default: Any = field.default
    kind = value
    if origin is tuple:
        kind = {"type": "array", "items": value}
        kind = kind if word is None else {"anyOf": [{"const": word}, kind]}
        default = default if word is not None else list(default)
    elif origin is dict:
        kind, default = {"type": "object", "additionalProperties": value}, {}
    return {"description": rules["help"], **kind, "default": default}
