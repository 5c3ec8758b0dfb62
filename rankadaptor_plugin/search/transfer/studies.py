"""Earlier studies to learn from: reading finished ones, and the file that holds several.

The file is safetensors. Its tensors are called ``N.rows``, ``N.values`` and ``N.features`` for
source number N; all else is JSON in its header. Studies that are read are never changed.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import sqlite3
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import optuna
from optuna.storages import RDBStorage
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool

from rankadaptor_plugin import __version__
from rankadaptor_plugin.core.errors import ArtifactError, ConfigError
from rankadaptor_plugin.core.files import write_file
from rankadaptor_plugin.core.trials import RECORD, Trial, TrialState
from rankadaptor_plugin.search.space import (
    LAYERS,
    OBJECTIVE,
    SPACE,
    LayerFeatures,
    space_from_json,
    space_to_json,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from rankadaptor_plugin.core.ranks import Allocations, RankSpace

log = logging.getLogger(__name__)

SEARCH = "search"
"""Name of the study that a run makes for its search."""

_LEAST = 2  # trials that can differ

META = "rankadaptor_meta"
"""Key of the header that holds our JSON."""

FORMAT = 1
"""Version of the format; raised with every change that an older reader would not understand."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceStudy:
    """The trials of one finished search.

    Attributes:
        name: Where it was read, for people.
        space: Its rank space.
        features: Features of its slots; without columns if the study has none.
        rows: Allocations of the trials, shape (n, c), int64, n >= 2.
        values: Their scores, shape (n, T), float64, finite, no column constant.
        columns: Names of the scores: `OBJECTIVE` and ``task/metric``.
    """

    name: str
    space: RankSpace
    features: LayerFeatures
    rows: Allocations
    values: NDArray[np.float64]
    columns: tuple[str, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, each once."""
        pairs = (name.rpartition("/")[0] for name in self.columns if name != OBJECTIVE)
        return tuple(dict.fromkeys(pairs))


def read_source(spec: str) -> list[SourceStudy]:
    """Reads the studies that a path or URL names.

    Args:
        spec: A run folder, an SQLite file or a storage URL of Optuna, and perhaps ``#STUDY``. Of
            several studies the one named "search" is read if no other is asked for, else all that
            say what their rank space was.

    Raises:
        ConfigError: If there is no such folder, file or study.
        ArtifactError: If it cannot be read, does not say what its rank space was, or its trials
            cannot be learned from.
    """
    place, _, wanted = (spec, "", "") if Path(spec).exists() else spec.rpartition("#")
    place, wanted = (place, wanted) if place else (spec, "")
    url, label, options = _located(place)
    storage = None
    try:
        # Without a pool, and without making tables: what is there is only looked at.
        options["poolclass"] = NullPool
        storage = RDBStorage(url, engine_kwargs=options, skip_table_creation=True)
        names = optuna.get_all_study_names(storage)
        studies = [optuna.load_study(study_name=name, storage=storage) for name in names]
        return [_read(study, label) for study in _chosen(studies, wanted, label)]
    except (ArtifactError, ConfigError):
        raise
    except Exception as error:  # every database driver has error types of its own
        cause = str(error.__cause__ or error).strip().partition("\n")[0].rstrip(".")
        raise ArtifactError(
            f"The studies of {label} cannot be read: {cause}. Name a run folder, an SQLite file "
            "or a storage URL with studies of Optuna."
        ) from error
    finally:
        if storage is not None:
            storage.remove_session()
            storage.engine.dispose()


def _located(place: str) -> tuple[str, str, dict[str, Any]]:
    """Returns the storage URL of a place, what to call it, and options of the engine."""
    label = place
    if "://" in place:
        try:
            url = make_url(place)
        except ArgumentError:
            raise ConfigError(
                f"{place!r} is not a storage URL. Write one such as sqlite:///runs/a/study.db."
            ) from None
        label = url.render_as_string(hide_password=True)
        if url.get_backend_name() != "sqlite" or url.query or not url.database:
            return place, label, {}
        place = url.database
    path = Path(place)
    file = path / "study.db" if path.is_dir() else path
    if not file.is_file():
        what = f"{path} has no study.db" if path.is_dir() else f"There is no study {path}"
        raise ConfigError(f"{what}. Give a run folder, an SQLite file or a storage URL of Optuna.")
    uri = f"file:{quote(str(file.resolve()))}?mode=ro"
    return "sqlite://", label, {"creator": partial(sqlite3.connect, uri, uri=True)}


def _chosen(studies: Sequence[optuna.Study], wanted: str, label: str) -> list[optuna.Study]:
    by_name = {study.study_name: study for study in studies}
    described = [study for study in studies if SPACE in study.user_attrs]
    if wanted and wanted not in by_name:
        raise ConfigError(
            f"There is no study {wanted!r} in {label}. It has: {', '.join(by_name) or 'none'}."
        )
    chosen = [by_name[wanted or SEARCH]] if (wanted or SEARCH) in by_name else described
    missing = [study.study_name for study in chosen if SPACE not in study.user_attrs]
    if missing or not chosen:
        which = f"The study {missing[0]!r}" if missing else "No study"
        raise ArtifactError(
            f"{which} in {label} says{' not' if missing else ''} what its rank space was. "
            "Only studies made by this version or a later one can be learned from."
        )
    return chosen


def _read(study: optuna.Study, label: str) -> SourceStudy:
    name = label if study.study_name == SEARCH else f"{label}#{study.study_name}"
    try:
        space = space_from_json(study.user_attrs[SPACE])
        features = _features(study.user_attrs.get(LAYERS), space)
    except ArtifactError as error:
        raise ArtifactError(f"{name}: {error}") from error
    stored = study.get_trials(deepcopy=False)
    records = [trial.user_attrs[RECORD] for trial in stored if RECORD in trial.user_attrs]
    try:
        trials = [Trial.from_json(record) for record in records]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{name}: the record of a trial cannot be read ({type(error).__name__}: {error}). "
            "Remove this study."
        ) from error
    complete = [t for t in trials if t.state is TrialState.COMPLETE]
    if trials and all(trial.state is TrialState.FAILED for trial in trials):
        raise ArtifactError(f"{name}: all {len(trials)} trials failed. Remove this study.")
    if len(complete) < _LEAST:
        raise ArtifactError(
            f"{name} has {len(complete)} complete trials; it takes {_LEAST}. "
            "Let its search go on, or leave it out."
        )
    if any(len(trial.allocation.ranks) != space.slots for trial in complete):
        raise ArtifactError(
            f"{name}: a trial does not have the {space.slots} ranks of its rank space. Leave this "
            "study out."
        )
    columns, values = _scores(complete, name)
    rows = np.array([space.row(trial.allocation) for trial in complete], dtype=np.int64)
    return SourceStudy(
        name=name, space=space, features=features, rows=rows, values=values, columns=columns
    )


def _features(data: Any, space: RankSpace) -> LayerFeatures:
    if data is None:
        return LayerFeatures((), np.zeros((space.slots, 0)))
    features = LayerFeatures.from_json(data)
    if len(features.values) != space.slots:
        raise ArtifactError(
            f"Features are stored for {len(features.values)} slots, but the rank space has "
            f"{space.slots}. Make the study again."
        )
    return features


def _scores(trials: Sequence[Trial], name: str) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Returns the scores that all trials have and in which they differ."""
    scores = [_values(trial) for trial in trials]
    common = [key for key in scores[0] if all(key in values for values in scores)]
    varied: list[str] = []
    constant: list[str] = []
    for key in common:
        column = [values[key] for values in scores]
        if not all(map(math.isfinite, column)):
            continue
        (varied if max(column) > min(column) else constant).append(key)
    if not varied:
        raise ArtifactError(
            f"{name}: all {len(trials)} trials have the same scores, so there is nothing to "
            "learn. Remove this study."
        )
    for key in constant:
        log.warning("%s: %s is the same in all trials and is ignored.", name, key)
    return tuple(varied), np.array([[values[key] for key in varied] for values in scores])


def _values(trial: Trial) -> dict[str, float]:
    tasks = {} if trial.score is None else trial.score.tasks
    own = {OBJECTIVE: math.nan if trial.objective is None else trial.objective}
    return own | {
        f"{task}/{metric}": value
        for task, score in tasks.items()
        for metric, value in score.values.items()
    }


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
        try:
            write_file(path, lambda partial: partial.write_bytes(content))
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
                f"The file {path} does not exist. Give one written by rankadaptor-plugin "
                "meta-learn."
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
        specs: What to read, see `read_source`.
        path: The file.

    Raises:
        ConfigError: If there is no such study, or two hold the same trials.
        ArtifactError: If a study cannot be learned from, or the file cannot be written.
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
    """Refuses a path that holds anything but meta-knowledge, which may be replaced.

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
        f"{path} is corrupt, or not written by rankadaptor-plugin meta-learn. Create it again with "
        "command."
    )
