"""Data of the seven tiny tasks, found beside this file from whatever folder lm-eval runs in."""

from __future__ import annotations

import json
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
    lines = (Path(data) / file).read_text(encoding="utf-8").splitlines()
    # Not `Dataset.from_json`: that would leave a copy in the user's cache.
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
