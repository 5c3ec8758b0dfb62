"""What earlier studies taught, in one file: their trials, rank spaces and features of layers.

The file is safetensors. Its tensors are called ``N.rows``, ``N.values`` and ``N.features`` for
source number N; all else is JSON in its header.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rankadaptor_plugin import __version__
from rankadaptor_plugin.core.errors import ArtifactError, ConfigError
from rankadaptor_plugin.search.record import LayerFeatures, space_from_json, space_to_json
from rankadaptor_plugin.search.transfer.source_studies import SourceStudy, read_source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

META = "rankadaptor_meta"
"""Key of the header that holds our JSON."""

FORMAT = 1
"""Version of the format; raised with every change that an older reader would not understand."""


@dataclass(frozen=True)
class MetaKnowledge:
    """The trials of earlier studies.

    Attributes:
        sources: At least one study.
    """

    sources: tuple[SourceStudy, ...]

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all; meta-knowledge already there is replaced.

        Raises:
            ArtifactError: If the file is something else, or cannot be written.
        """
        tensors: dict[str, NDArray[Any]] = {}
        for number, source in enumerate(self.sources):
            tensors[f"{number}.rows"] = source.rows
            tensors[f"{number}.values"] = source.values
            tensors[f"{number}.features"] = source.features.values
        header = {
            "format": FORMAT,
            "version": __version__,
            "sources": [
                {
                    "name": source.name,
                    "space": space_to_json(source.space),
                    "columns": list(source.columns),
                    "features": list(source.features.names),
                }
                for source in self.sources
            ],
        }
        content = save(
            {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
            metadata={META: json.dumps(header)},
        )
        check_free(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            os.replace(partial, path)
        except OSError as error:
            raise ArtifactError(
                f"{path} cannot be written: {error.strerror or error}. Choose a file where you may "
                "write."
            ) from error

    @classmethod
    def load(cls, path: Path) -> MetaKnowledge:
        """Reads what `save` wrote.

        Raises:
            ArtifactError: If the file is missing, torn, something else, or of another format.
        """
        if not path.is_file():
            raise ArtifactError(
                f"There is no file {path}. Give one that rankadaptor-plugin meta-learn has written."
            )
        try:
            with safe_open(path, framework="numpy") as stored:
                header = json.loads((stored.metadata() or {})[META])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            version = header["format"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise _no_meta(path) from error
        if version != FORMAT:
            raise ArtifactError(
                f"{path} has format {version} of rankadaptor-plugin {header.get('version')}; this "
                f"is {__version__}, which reads format {FORMAT}. Make the file again with "
                "rankadaptor-plugin meta-learn."
            )
        try:
            sources = tuple(
                _source(entry, tensors, number) for number, entry in enumerate(header["sources"])
            )
            if not sources:
                raise ValueError("no source")
        except (KeyError, IndexError, TypeError, ValueError, ArtifactError) as error:
            raise _no_meta(path) from error
        return cls(sources)


def collect(specs: Sequence[str], path: Path) -> MetaKnowledge:
    """Reads studies and writes them into one file.

    Args:
        specs: What to read, see `rankadaptor_plugin.search.transfer.source_studies.read_source`.
        path: The file.

    Raises:
        ConfigError: If there is no such study, or two hold the same trials.
        ArtifactError: If a study cannot be learnt from, or the file cannot be written.
    """
    check_free(path)
    sources = tuple(source for spec in specs for source in read_source(spec))
    for one, other in itertools.combinations(sources, 2):
        if np.array_equal(one.rows, other.rows) and np.array_equal(one.values, other.values):
            raise ConfigError(
                f"{other.name} holds the same trials as {one.name} and would count double. Name "
                "one of the two."
            )
    knowledge = MetaKnowledge(sources)
    knowledge.save(path)
    return knowledge


def check_free(path: Path) -> None:
    """Sees to it that a path is free, or holds meta-knowledge, which may be replaced.

    Raises:
        ArtifactError: If it is something else.
    """
    if not (path.exists() or path.is_symlink()):
        return
    try:
        with safe_open(path, framework="numpy") as stored:
            ours = META in (stored.metadata() or {})
    except (OSError, SafetensorError):
        ours = False
    if not ours:
        raise ArtifactError(
            f"{path} holds something other than meta-knowledge and is left alone. Choose another "
            "--out."
        )


def _source(entry: Mapping[str, Any], tensors: Mapping[str, Any], number: int) -> SourceStudy:
    """Builds a source; a ValueError says that its parts do not fit each other."""
    space = space_from_json(entry["space"])
    columns, names = tuple(entry["columns"]), tuple(entry["features"])
    rows, values, features = (tensors[f"{number}.{key}"] for key in ("rows", "values", "features"))
    shapes = [
        (rows, (len(rows), space.columns), np.int64),
        (values, (len(rows), len(columns)), np.float64),
        (features, (space.slots, len(names)), np.float64),
    ]
    fitting = all(part.shape == shape and part.dtype == kind for part, shape, kind in shapes)
    if not fitting or not np.isfinite(values).all() or not len(columns):
        raise ValueError("the parts of a source do not fit each other")
    for row in rows:
        space.allocation(row)  # an IndexError or RankSpaceError if it is none
    return SourceStudy(
        name=str(entry["name"]),
        space=space,
        features=LayerFeatures(names, features),
        rows=rows,
        values=values,
        columns=columns,
    )


def _no_meta(path: Path) -> ArtifactError:
    return ArtifactError(
        f"{path} is torn, or not written by rankadaptor-plugin meta-learn. Make it again with that "
        "command."
    )
