"""The run file that ``rankadaptor-plugin init`` writes: what a person sets, or every setting."""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.run_file import EMBEDDED_RUN_FILE
from rankadaptor_plugin.config.tables import EMBEDDED, PruneConfig, RunConfig, SearchConfig
from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.files import write_file

HEADER = """\
# A run of rankadaptor-plugin: prune, search ranks, recover, evaluate, report.
# Start it, or continue it, with:  rankadaptor-plugin run {name}
# Paths are relative to this file.
"""
SHORT = "# What is left out has its default, or the recipe's value; init --full writes all of it.\n"
FULL = """\
# Every setting is here with its value; remove what you do not change. Where a value differs from
# the paper's (arXiv 2406.15734), the comment gives the paper's.
"""


def write_template(
    path: Path,
    *,
    model: str | None = None,
    corpus: str | None = None,
    recipe: str | None = None,
    full: bool = False,
    force: bool = False,
) -> list[str]:
    """Writes a run file whose settings fit the model, and what they mean.

    Paths are given as seen from the current folder, and written as seen from the file.

    Args:
        path: File to write.
        model: Folder of a Hugging Face model, a name on the Hub, or a GGUF file. Without it the
            file describes the embedded default, and runs as it is.
        corpus: What to fine-tune on: a file, or a dataset on the Hub. Without it, that of the
            embedded default, or an empty value to fill in.
        recipe: A preset, whose values are then in force.
        full: Write every setting rather than the few that a person sets.
        force: Overwrite an existing file.

    Returns:
        Sentences on what to know before the run is started.

    Raises:
        ConfigError: If the file exists or cannot be written, or there is no such model.
    """
    draft = _embedded(recipe) if model in (None, EMBEDDED) else _own(path, str(model))
    data, notes = draft.data, draft.notes
    data |= {"recipe": recipe or "", "output": f"runs/{path.stem}"}
    if corpus:
        data["corpus"]["path"] = _seen_from(path, corpus)
        draft.remarks.extend(_whereabouts(corpus))
    elif "path" in data["corpus"]:
        notes["corpus.path"] = "required: {help}"
        draft.remarks.append("Set [corpus] path in it first.")
    values = _every_setting(data) if full else data
    header = HEADER.format(name=path.name) + (FULL if full else SHORT)
    text = header + "\n".join(_table(RunConfig, values, notes)) + "\n"
    _write(path, text, force)
    return draft.remarks


def layers_to_keep(layers: int) -> tuple[int, int]:
    """Returns how many first and last layers to leave unpruned: an eighth and a sixteenth.

    These are the shares of the paper, 4 and 2 of 32 layers; halves are rounded up.
    """
    return (layers + 4) // 8, (layers + 8) // 16


@dataclass(frozen=True)
class _Draft:
    """Content of a run file.

    Attributes:
        data: Values by table and key.
        notes: Comments that say more than the help of a key, with ``{help}`` where that belongs.
        remarks: Sentences for the person who starts the run.
    """

    data: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def _embedded(recipe: str | None) -> _Draft:
    """Returns the embedded default, without the settings that a recipe is for."""
    data = tomllib.loads(EMBEDDED_RUN_FILE.read_text("utf-8"))
    return _Draft(data | {"corpus": {}, "recovery": {}} if recipe else data)


def _own(path: Path, model: str) -> _Draft:
    """Returns the settings for a model, with an empty path of the corpus."""
    config = _config(model)
    sizes = (config.get(key) for key in ("num_hidden_layers", "n_layer"))
    layers = next((size for size in sizes if isinstance(size, int)), None)
    first, last = layers_to_keep(layers or 32)
    draft = _Draft(
        {
            "model": _seen_from(path, model),
            "prune": {
                "pruning_ratio": PruneConfig.pruning_ratio,
                "keep_first": first,
                "keep_last": last,
            },
            "corpus": {"path": ""},
            "oracle": {"tasks": ["arc_easy", "piqa"]},
            "search": {"method": SearchConfig.method, "n_trials": SearchConfig.n_trials},
        }
    )
    depth = f"the model has {layers}" if layers else "as for 32, since the depth is not known here"
    for key in ("keep_first", "keep_last"):
        draft.notes[f"prune.{key}"] = f"{{help}}; {depth}"
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype in ("float32", "bfloat16", "float16"):
        draft.data["dtype"] = dtype
        draft.notes["dtype"] = "the model's own; {help}"
    if run_file.is_named(model, Path()):
        draft.notes["model"] = "on the Hugging Face Hub"
    draft.remarks.extend(_whereabouts(model))
    return draft


def _config(model: str) -> dict[str, Any]:
    """Returns config.json of a model's folder; nothing for a name on the Hub or a GGUF file."""
    folder = Path(model)
    if run_file.is_named(model, Path()) or (folder.suffix.lower() == ".gguf" and folder.is_file()):
        return {}
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        return {**config, **config.get("text_config", {})}  # where there is more than text
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"The model {model} has no readable config.json. Give a Hugging Face folder or a .gguf "
            'file as seen from the current folder, or a name on the Hub such as "owner/name".'
        ) from error


def _seen_from(path: Path, source: str) -> str:
    """Returns a name, or a path given from the current folder, as the run file must say it."""
    if os.path.isabs(source) or run_file.is_named(source, Path()):
        return source
    return os.path.relpath(Path(source), path.resolve().parent)


def _whereabouts(source: str) -> list[str]:
    """Returns a sentence on a model or corpus that is not here."""
    if source == EMBEDDED or Path(source).exists():
        return []
    if run_file.is_named(source, Path()):
        return [f"{source} is not here, so it is taken as a name on the Hub."]
    return [f"{source} does not exist yet."]


def _every_setting(data: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of all settings, the recipe's among them; the corpus may be missing."""
    corpus = data["corpus"].get("path", EMBEDDED)
    given = {**data, "corpus": {**data["corpus"], "path": corpus or EMBEDDED}}
    values = run_file.to_dict(run_file.from_dict(given))
    values["corpus"]["path"] = corpus
    return values


def _table(cls: Any, values: dict[str, Any], notes: dict[str, str], table: str = "") -> list[str]:
    """Returns the lines of a table, and of those inside it, for the keys in `values`."""
    hints = typing.get_type_hints(cls)
    lines = ["", f"# {cls.__doc__.splitlines()[0]}", f"[{table}]"] if table else []
    for key, field_ in cls.__dataclass_fields__.items():
        if not dataclasses.is_dataclass(hints[key]):
            if key in values:
                note = notes.get(f"{table}.{key}" if table else key, "{help}")
                comment = note.format(help=field_.metadata["help"])
                lines.append(f"{key} = {run_file.toml_value(values[key])}  # {comment}")
        elif values.get(key):
            lines += _table(hints[key], values[key], notes, key)
    return lines


def _write(path: Path, text: str, force: bool) -> None:
    try:
        if not path.name or path.is_dir():
            raise ConfigError(f"{path} is a folder. Name a file, such as {path / 'RUN.toml'}.")
        if path.exists() and not force:
            raise ConfigError(
                f"{path} already exists. Give another name, or --force to overwrite it."
            )
        write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Choose a folder where you may write."
        ) from error
