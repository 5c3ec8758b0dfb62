"""The run file: TOML in, one frozen `RunConfig` out, and a commented template back.

Unknown keys are refused with a suggestion, wrong types and ranges with what is allowed.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

from rankadaptor_plugin.config.recipes import with_preset
from rankadaptor_plugin.config.tables import EMBEDDED, RunConfig
from rankadaptor_plugin.config.values import build
from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.run_folder import RunFolder

EMBEDDED_FOLDER = Path(__file__).resolve().parent.parent / "embedded"
EMBEDDED_RUN_FILE = EMBEDDED_FOLDER / "run.toml"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIXES = (".json", ".jsonl", ".txt", ".text", ".md", ".csv", ".parquet", ".gz", ".zst")


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
            include_path=_seen_from(folder, config.oracle.include_path),
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


def is_hub_name(path: Path | str) -> bool:
    """True if a path reads as the name of a dataset on the Hub, ``owner/name``.

    A file that is there goes before; that is for the caller to look up.
    """
    name = str(path)
    return bool(_HUB_NAME.fullmatch(name)) and not name.lower().endswith(_FILE_SUFFIXES)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _absolute(path: str, folder: Path) -> str:
    return path if path == EMBEDDED else str(folder / path)


def _corpus(path: str, folder: Path) -> str:
    """Returns a file's path, or the unchanged name of a dataset on the Hub."""
    on_hub = is_hub_name(path) and not (folder / path).exists()
    return path if on_hub else _absolute(path, folder)


def _seen_from(folder: Path, path: str) -> str:
    """Returns an optional path, empty if it is not set."""
    return str(folder / path) if path else ""
