"""Data of the seven tiny tasks, found beside this file from whatever folder lm-eval runs in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

DATA = Path(__file__).resolve().parent / "data"


def load(*, file: str, data: str | Path = DATA, **_: Any) -> dict[str, Dataset]:
    """Reads one task's documents, as lm-eval's ``custom_dataset`` wants them.

    Args:
        file: Name of the JSONL file, from the YAML's ``dataset_kwargs``.
        data: Folder of the file; a `TaskManager` made with ``metadata={"data": ...}`` names
            another one.
        **_: The rest of what lm-eval passes along.
    """
    return {"test": Dataset.from_json(str(Path(data) / file), keep_in_memory=True)}
