"""The run file: TOML in, one frozen `RunConfig` out, and a commented template back.

Unknown keys are refused with a suggestion, wrong types and ranges with what is allowed.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.config.hub_names import is_hub_name
from rankadaptor_plugin.config.recipes import with_preset
from rankadaptor_plugin.config.tables import EMBEDDED, RunConfig
from rankadaptor_plugin.config.values import build
from rankadaptor_plugin.core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def load(path: Path) -> RunConfig:
    """Reads a run file; relative paths in it become absolute, seen from its folder.

    Raises:
        ConfigError: If the file is missing, no TOML, or has unknown keys or wrong values.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
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
    config = from_dict(data)
    folder = path.resolve().parent
    return dataclasses.replace(
        config,
        model=_absolute(config.model, folder),
        output=str(folder / config.output),
        prune=dataclasses.replace(
            config.prune, calibration=_seen_from(folder, config.prune.calibration)
        ),
        corpus=dataclasses.replace(config.corpus, path=_corpus(config.corpus.path, folder)),
        oracle=dataclasses.replace(
            config.oracle,
            task_path=_seen_from(folder, config.oracle.task_path),
            data_dir=_seen_from(folder, config.oracle.data_dir),
            text=_seen_from(folder, config.oracle.text),
        ),
        search=dataclasses.replace(config.search, meta=_seen_from(folder, config.search.meta)),
    )


def from_dict(data: dict[str, Any]) -> RunConfig:
    """Builds a config from nested dictionaries, as a TOML parser gives them.

    A ``recipe`` fills the keys of its tables that are not given.

    Raises:
        ConfigError: On an unknown key (with a suggestion), a wrong type, or a wrong value.
    """
    return build(RunConfig, with_preset(data), table="")


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns nested dictionaries that `from_dict` takes back, with lists for tuples."""
    return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _absolute(path: str, folder: Path) -> str:
    return path if path == EMBEDDED else str(folder / path)


def _corpus(path: str, folder: Path) -> str:
    """Returns a file's path, or the name of a dataset of the hub as it is."""
    on_hub = is_hub_name(path) and not (folder / path).exists()
    return path if on_hub else _absolute(path, folder)


def _seen_from(folder: Path, path: str) -> str:
    """Returns an optional path, empty if it is not set."""
    return str(folder / path) if path else ""
