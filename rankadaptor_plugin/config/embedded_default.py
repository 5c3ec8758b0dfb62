"""Where the embedded default lies: a tiny Llama, its recovery corpus and its run file."""

from __future__ import annotations

from pathlib import Path

from rankadaptor_plugin.config.tables import EMBEDDED

EMBEDDED_FOLDER = Path(__file__).resolve().parent.parent / "embedded"
EMBEDDED_RUN_FILE = EMBEDDED_FOLDER / "run.toml"


def model_folder(model: str) -> Path:
    """Returns the folder of a model as a run file names it."""
    return EMBEDDED_FOLDER / "model" if model == EMBEDDED else Path(model)


def corpus_file(path: str) -> Path:
    """Returns the file of a corpus as a run file names it."""
    return EMBEDDED_FOLDER / "recovery.jsonl" if path == EMBEDDED else Path(path)
