"""The commented run file that ``rankadaptor-plugin init`` writes."""

from __future__ import annotations

import dataclasses
import os
import typing
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.run_file import EMBEDDED_RUN_FILE
from rankadaptor_plugin.config.tables import EMBEDDED
from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.files import write_file

if TYPE_CHECKING:
    from pathlib import Path

HEADER = """\
# A run of rankadaptor-plugin: prune, search ranks, recover, evaluate, report.
# Start it, or continue it, with:  rankadaptor-plugin run {name}
# Every setting is here with its value; remove what you do not change. Paths are relative to this
# file. Where a value differs from the paper's (arXiv 2406.15734), the comment gives the paper's.
"""


def write_template(path: Path, *, model: str | None = None, force: bool = False) -> None:
    """Writes a run file with every setting and what it means.

    Args:
        path: File to write.
        model: Folder of a Hugging Face model; settings are then those for 32 layers. Without it
            the file describes the embedded default, and runs as it is.
        force: Overwrite an existing file.

    Raises:
        ConfigError: If the file exists or cannot be written.
    """
    if not path.name:
        raise ConfigError(f"{path} is a folder. Name a file, such as {path / 'RUN.toml'}.")
    if model is None:
        config = dataclasses.replace(run_file.load(EMBEDDED_RUN_FILE), output=f"runs/{path.stem}")
    else:
        config = run_file.from_dict(
            {
                "model": _from(path, model),
                "output": f"runs/{path.stem}",
                "corpus": {"path": "corpus.jsonl"},
                "oracle": {"tasks": ["arc_easy", "piqa"]},
            }
        )
    text = HEADER.format(name=path.name) + "\n".join(_table(config, ""))
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder. Name a file, such as {path / 'RUN.toml'}.")
        if path.exists() and not force:
            raise ConfigError(
                f"{path} already exists. Give another name, or --force to overwrite it."
            )
        write_file(path, lambda partial: partial.write_text(text + "\n", encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Choose a folder where you may write."
        ) from error


def _from(path: Path, model: str) -> str:
    """Returns a model's path, given from the current folder, as the run file must say it."""
    if model == EMBEDDED or os.path.isabs(model):
        return model
    return os.path.relpath(model, path.resolve().parent)


def _table(config: Any, name: str) -> list[str]:
    lines: list[str] = []
    tables: list[str] = []
    if name:
        summary = (type(config).__doc__ or "").splitlines()[0]
        lines += ["", f"# {summary}", f"[{name}]"]
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            tables += _table(value, field.name)
        else:
            lines.append(f"{field.name} = {run_file.toml_value(value)}  # {field.metadata['help']}")
    return lines + tables
