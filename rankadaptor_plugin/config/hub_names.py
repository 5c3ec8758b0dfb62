"""Names of datasets on the hub."""

from __future__ import annotations

import re
from pathlib import Path  # noqa: TC003

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIXES = (".json", ".jsonl", ".txt", ".text", ".md", ".csv", ".parquet", ".gz", ".zst")


def is_hub_name(path: Path | str) -> bool:
    """Whether a path reads as the name of a dataset on the hub, ``owner/name``.

    A file that is there goes before; that is for the caller to look up.
    """
    name = str(path)
    return bool(_HUB_NAME.fullmatch(name)) and not name.lower().endswith(_FILE_SUFFIXES)
