"""The run file: TOML in, one frozen `RunConfig` out, and a commented template back.

Unknown keys are refused with a suggestion, wrong types and ranges with what is allowed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.config.recipes import with_preset
from rankadaptor_plugin.config.tables import EMBEDDED, GENERATE, SOURCE, RunConfig
from rankadaptor_plugin.config.values import build, checked, merged
from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Sequence

EMBEDDED_FOLDER = Path(__file__).resolve().parent.parent / "embedded"
EMBEDDED_RUN_FILE = EMBEDDED_FOLDER / "run.toml"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIXES = (".json", ".jsonl", ".txt", ".text", ".md", ".csv", ".parquet", ".gz", ".zst")
_MODEL_SUFFIXES = (".gguf", ".safetensors")


def load(path: Path | None, settings: Sequence[str] = ()) -> RunConfig:
    """Reads a run file; relative paths in it become absolute, seen from its folder.

    Args:
        path: The file; None for that of the embedded default, whose paths are seen from the current
            folder.
        settings: Keys with values that override those of the file, such as
            ``"search.n_trials=10"``; the last one wins. A value is TOML, or else text. Relative
            paths are seen from the current folder.

    Raises:
        ConfigError: If the file is missing or no TOML, or there are unknown keys or wrong values.
    """
    folder = path.resolve().parent if path else Path.cwd()
    data = _located(_read(path or EMBEDDED_RUN_FILE), folder)
    for setting in settings:
        data = merged(data, _located(_parsed(setting), Path.cwd()), RunConfig)
    config = from_dict(data)
    return dataclasses.replace(config, output=str(folder / config.output))


def from_dict(data: dict[str, Any]) -> RunConfig:
    """Builds a config from nested dictionaries, as a TOML parser gives them.

    A ``recipe`` fills the keys of its tables that are not given.

    Raises:
        ConfigError: On an unknown key (with a suggestion), a wrong type, or a wrong value, or if
            the run has a model of its own but no corpus or output.
    """
    if data.get("model", EMBEDDED) != EMBEDDED:
        # The defaults are the toy corpus and a folder that other runs write to.
        data = merged({"output": "", "corpus": {"path": ""}}, data, RunConfig)
    return build(RunConfig, with_preset(data))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns nested dictionaries that `from_dict` takes back, with lists for tuples."""
    return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(config)))


def toml_value(value: Any) -> str:
    """Returns a plain value as TOML on one line."""
    if isinstance(value, dict):
        items = (f"{toml_value(key)} = {toml_value(item)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def model_folder(model: str) -> Path:
    """Returns the folder of a model as a run file names it."""
    return EMBEDDED_FOLDER / "model" if model == EMBEDDED else Path(model)


def corpus_file(path: str) -> Path:
    """Returns the file of a corpus as a run file names it."""
    return EMBEDDED_FOLDER / "recovery.jsonl" if path == EMBEDDED else Path(path)


def run_folder(run: Path) -> RunFolder:
    """Returns the folder of a run that is named by its folder or its run file.

    Raises:
        ConfigError: If there is neither, or the run file is wrong.
    """
    if run.is_dir():
        return RunFolder(run)
    if not run.exists():
        raise ConfigError(
            f"The run {run} does not exist. Give a run folder, or the run file of a finished run."
        )
    return RunFolder(Path(load(run).output))


def is_named(source: str, folder: Path) -> bool:
    """True if a model or corpus is given by name: what is embedded, or what is on the Hub.

    Args:
        source: As a run file says it.
        folder: Where a relative path starts; what is there goes before the Hub.
    """
    return source == EMBEDDED or (is_hub_name(source) and not (folder / source).exists())


def is_hub_name(path: Path | str) -> bool:
    """True if a path reads as the name of a model or dataset on the Hub, ``owner/name``.

    A file that is there goes before; that is for the caller to look up.
    """
    name = str(path)
    return bool(_HUB_NAME.fullmatch(name)) and not name.lower().endswith(
        _FILE_SUFFIXES + _MODEL_SUFFIXES
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"The run file {path} does not exist. Write one with: rankadaptor-plugin init {path}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"The run file {path} cannot be read: {error.strerror}. Give the path of a TOML file."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The run file {path} is not valid TOML: {error}. Correct it.") from error


def _parsed(setting: str) -> dict[str, Any]:
    """Returns the nested values of a setting; what is no TOML value is text."""
    key, equals, text = setting.partition("=")
    data = _tables(setting) or _tables(f"{key} = {toml_value(text.strip())}")
    if not equals or not data:
        raise ConfigError(
            f"--set {setting} is not KEY=VALUE. Name the table and the key, as in "
            "--set search.n_trials=10."
        )
    try:
        checked(RunConfig, data)
    except ConfigError as error:
        raise ConfigError(f"--set {setting}: {error}") from error
    return data


def _tables(text: str) -> dict[str, Any]:
    """Returns what TOML says, or nothing if it is no TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def _located(data: dict[str, Any], folder: Path, cls: type = RunConfig) -> dict[str, Any]:
    """Returns the values with absolute paths, seen from `folder`."""
    hints = typing.get_type_hints(cls)
    kinds = {field.name: field.metadata.get("path") for field in dataclasses.fields(cls)}
    located = dict(data)
    for key, value in data.items():
        if isinstance(value, dict) and dataclasses.is_dataclass(hints.get(key)):
            located[key] = _located(value, folder, hints[key])
        elif kinds.get(key) and isinstance(value, list):
            located[key] = [_at(item, kinds[key], folder) for item in value]
        elif kinds.get(key):
            located[key] = _at(value, kinds[key], folder)
    return located


def _at(value: Any, kind: str | None, folder: Path) -> Any:
    """Returns a path as seen from `folder`; what is a name, or no text, stays as it is."""
    if not value or not isinstance(value, str):
        return value
    is_name = value == GENERATE or (kind == SOURCE and is_named(value, folder))
    return value if is_name else str(folder / value)
