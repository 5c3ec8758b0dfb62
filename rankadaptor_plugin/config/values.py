"""From plain values, as a TOML parser gives them, to the dataclasses of the config.

Unknown keys are refused with a suggestion, wrong types and ranges with what is allowed.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any, TypeVar

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.registry import suggestion

T = TypeVar("T")


def build(cls: type[T], data: dict[str, Any], table: str = "") -> T:
    """Builds a dataclass of the config, and those inside it.

    Args:
        cls: The dataclass.
        data: Values by key, lists for tuples.
        table: Name of the table, for messages; empty for the whole run file.

    Raises:
        ConfigError: On an unknown key (with a suggestion), a wrong type, or a wrong value.
    """
    return _construct(cls, checked(cls, data, table))


def checked(
    cls: type, data: dict[str, Any], table: str = "", root: type | None = None
) -> dict[str, Any]:
    """Returns the values in their types; each key by itself is then right.

    Args:
        cls: Dataclass of the config that the values are for.
        data: Values by key, lists for tuples.
        table: Name of the table, for messages; empty for the whole run file.
        root: Dataclass of the whole run file, whose tables a misplaced key is looked for in; `cls`
            if left out.

    Raises:
        ConfigError: On an unknown key (with a suggestion), a wrong type, or a wrong value.
    """
    root = root or cls
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{table}.{key}" if table else key
        if key not in fields:
            raise ConfigError(
                f"Unknown key {name} in the run file.{key_suggestion(key, cls, root)} "
                f"Allowed here: {', '.join(fields)}."
            )
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{name} is {value!r}; it must be a table, written as [{name}].")
            values[key] = checked(typing.cast("type", hints[key]), value, name, root)
        else:
            values[key] = _word_or_value(name, value, hints[key], fields[key].metadata)
            _check_range(name, values[key], fields[key].metadata)
    return values


def merged(lower: dict[str, Any], upper: dict[str, Any], cls: type) -> dict[str, Any]:
    """Returns the values of both for a dataclass of the config; those of `upper` win.

    They also win over another key of `lower` that would overrule them: ``max_steps`` over the
    ``num_train_epochs`` of a recipe, say. What is no table where one must be is left for the checks
    that follow.
    """
    hints = typing.get_type_hints(cls)
    values = {**upper, **lower, **upper}  # own keys first, so that their errors come first
    for field in dataclasses.fields(cls):
        key = field.name
        below, above = lower.get(key), upper.get(key)
        if field.metadata.get("overrules") in upper and key not in upper:
            values.pop(key, None)
        elif isinstance(below, dict) and isinstance(above, dict):
            table = dataclasses.is_dataclass(hints[key])
            values[key] = merged(below, above, hints[key]) if table else {**below, **above}
    return values


def key_suggestion(key: str, cls: type, root: type | None = None) -> str:
    """Returns `` Did you mean ...?`` for an unknown key, or nothing.

    Args:
        key: The key.
        cls: Dataclass of the table that it is in.
        root: Dataclass of the whole run file, in whose other tables it may belong.
    """
    fields = dataclasses.fields(cls)
    for field in fields:
        if key in field.metadata.get("aliases", ()):
            return f" Did you mean {field.name!r}?"
    if near := suggestion(key, [field.name for field in fields]):
        return near
    for table, fields in _tables(root).items() if root else ():
        for field in fields:
            if key in (field.name, *field.metadata.get("aliases", ())):
                place = f"[{table}] {field.name}" if table else f"{field.name}, above all tables"
                return f" Did you mean {place}?"
    return ""


def _construct(cls: type[T], values: dict[str, Any]) -> T:
    hints = typing.get_type_hints(cls)
    inner = {key for key in values if dataclasses.is_dataclass(hints[key])}
    return cls(**{k: _construct(hints[k], v) if k in inner else v for k, v in values.items()})


def _tables(root: type) -> dict[str, tuple[dataclasses.Field[Any], ...]]:
    """Returns the fields of the run file by table; the table of the top level is empty."""
    hints = typing.get_type_hints(root)
    top = dataclasses.fields(root)
    inner = {f.name: hints[f.name] for f in top if dataclasses.is_dataclass(hints[f.name])}
    plain = tuple(field for field in top if field.name not in inner)
    return {"": plain} | {name: dataclasses.fields(cls) for name, cls in inner.items()}


def _word_or_value(name: str, value: Any, hint: Any, rule: Any) -> Any:
    """Returns the value in its type, where a certain word may take the place of a list."""
    word = rule.get("word")
    if word is None:
        return _value(name, value, hint)
    if isinstance(value, str) and value != word:
        raise ConfigError(f'{name} is {value!r}; it must be "{word}" or a list, as in [1, 2].')
    return value if value == word else _value(name, value, typing.get_args(hint)[-1])


def _value(name: str, value: Any, hint: Any) -> Any:
    """Returns the value in its annotated type, or says what type it must have."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (tuple, dict):
        item = typing.get_args(hint)[0 if origin is tuple else 1]
        if origin is tuple and isinstance(value, list):
            return tuple(_value(f"{name}[{i}]", v, item) for i, v in enumerate(value))
        if origin is dict and isinstance(value, dict):
            return {k: _value(f"{name}.{k}", v, item) for k, v in value.items()}
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    word = {
        int: "a whole number",
        float: "a number",
        str: 'text in quotes, as in "text"',
        bool: "true or false",
        tuple: 'a list, as in ["a"]' if str in typing.get_args(hint) else "a list, as in [1, 2]",
        dict: "a table, as in {name = 1.0}",
    }[origin or hint]
    raise ConfigError(f"{name} is {value!r}; it must be {word}. Change it.")


def _check_range(name: str, value: Any, rule: Any) -> None:
    if value == rule.get("word", math.nan):
        return
    if value == "" and "needed" in rule:
        raise ConfigError(f"{name} is empty or missing. {rule['needed']}")
    items = value.values() if isinstance(value, dict) else value
    for item in items if isinstance(value, (tuple, dict)) else [value]:
        low, high, choices = rule.get("low"), rule.get("high"), rule.get("choices")
        if choices is not None and item not in choices:
            raise ConfigError(
                f"{name} is {item!r}.{suggestion(item, list(choices))} "
                f"Allowed: {', '.join(choices)}."
            )
        if isinstance(item, float) and not math.isfinite(item):
            raise ConfigError(f"{name} is {item}; it must be a finite number. Change it.")
        if low is not None and item < low:
            raise ConfigError(f"{name} is {item}; it must be at least {low}. Raise it.")
        if high is not None and item > high:
            raise ConfigError(f"{name} is {item}; it must be at most {high}. Lower it.")
        above, below = rule.get("above"), rule.get("below")
        if above is not None and item <= above:
            raise ConfigError(f"{name} is {item}; it must be more than {above:g}. Raise it.")
        if below is not None and item >= below:
            raise ConfigError(f"{name} is {item}; it must be less than {below:g}. Lower it.")
