"""The trial store: an Optuna study, one record per trial.

By default an SQLite file in the run folder; any storage that Optuna can open will do. There is one
writer, the driver of the search. A process that is killed leaves a trial running; it is marked
when the search goes on, and counts as if it had never been.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import sqlite3
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState as OptunaState
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from rankadaptor_plugin.core.errors import ArtifactError, RankSpaceError
from rankadaptor_plugin.core.trials import RECORD, Trial, TrialState
from rankadaptor_plugin.search.samplers import PredictingSampler
from rankadaptor_plugin.search.space import (
    LAYERS,
    SPACE,
    distributions,
    parameters_of,
    proposed,
    space_difference,
    space_from_json,
    space_to_json,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

    from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace

logger = logging.getLogger(__name__)

REASON = "reason"
"""User attribute of a failed Optuna trial that has no record; its only value is `INTERRUPTED`."""

INTERRUPTED = "interrupted"

_PATIENCE = 2.0  # seconds to wait for the end of a write


@dataclass(frozen=True, kw_only=True)
class PendingTrial:
    """A trial that was begun.

    Attributes:
        allocation: What is to be fine-tuned.
        predicted: The value that the sampler expects of it, None if it said nothing, or proposed
            another allocation.
        number: Number of the trial in the Optuna study.
    """

    allocation: RankAllocation
    predicted: float | None
    number: int


class TrialStore:
    """The trials of one search. A context manager: leaving it closes the database.

    Errors of the database that leave the context become an `ArtifactError`.

    Args:
        storage: Optuna's storage.
        name: Name of the study in it; made if absent.

    Raises:
        ArtifactError: If the study is there and does not maximize one value.
    """

    def __init__(self, storage: BaseStorage, name: str) -> None:
        self._storage = storage
        self._study = quiet_study(name, StudyDirection.MAXIMIZE, storage=storage)
        if self._study.directions != [StudyDirection.MAXIMIZE]:
            raise ArtifactError(
                f"The study {name!r} was not made by this plugin: its directions are "
                f"{[d.name.lower() for d in self._study.directions]}, not maximize. Remove it or "
                "choose another run folder."
            )

    @classmethod
    def open(cls, storage_url: str, name: str) -> TrialStore:
        """Opens the study of a storage, making what is absent.

        Args:
            storage_url: Any storage URL of Optuna, for example ``sqlite:///runs/a/trials.db``.
            name: Name of the study.

        Raises:
            ArtifactError: If the storage cannot be opened or its study is not ours.
        """
        storage = None
        try:
            # Without a pool, a connection to a file that turns out torn is closed at once.
            storage = RDBStorage(storage_url, engine_kwargs={"poolclass": NullPool})
            return cls(storage, name)
        except Exception as error:  # every database driver has error types of its own
            if storage is not None:
                storage.engine.dispose()
            if isinstance(error, ArtifactError):
                raise
            cause = str(error).strip().partition("\n")[0].rstrip(".")
            raise ArtifactError(
                f"The trial store {_without_password(storage_url)!r} cannot be opened: {cause}. "
                "If it is damaged, delete it (its trials are lost); if it cannot be written, free "
                "some space or correct the permissions. Then run again."
            ) from error

    def close(self) -> None:
        """Closes the database; nothing may be called afterwards."""
        self._storage.remove_session()
        if isinstance(self._storage, RDBStorage):
            self._storage.engine.dispose()

    def __enter__(self) -> TrialStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        if isinstance(error, (StorageInternalError, SQLAlchemyError)):
            cause = str(error.__cause__ or error).strip().partition("\n")[0].rstrip(".")
            raise ArtifactError(
                f"The trial store cannot be read or written: {cause}. Free some space or repair "
                "the disk, then run the same command again; the trials made so far are kept."
            ) from error

    def claim(self, space: RankSpace, layers: Mapping[str, Any] | None = None) -> None:
        """Stores in the study the space of its trials, and features of its layers.

        Args:
            space: The rank space S.
            layers: What `rankadaptor_plugin.search.space.LayerFeatures.to_json` returned.

        Raises:
            ArtifactError: If the study was made with another space.
        """
        stored = self._study.user_attrs.get(SPACE)
        if stored is not None:
            difference = space_difference(space_from_json(stored), space)
            if difference is not None and self.trials():
                raise ArtifactError(
                    f"The study {self._study.study_name!r} was made with a different rank space: "
                    f"{difference}. Choose another run folder or storage, or take the former "
                    "[rank_space] and [prune] settings back."
                )
        else:
            self._check_trials(space)
        self._study.set_user_attr(SPACE, space_to_json(space))
        if layers is not None:
            self._study.set_user_attr(LAYERS, dict(layers))

    def layers(self) -> dict[str, Any] | None:
        """Returns the features of the layers as `claim` noted them, None if it did not."""
        features: dict[str, Any] | None = self._study.user_attrs.get(LAYERS)
        return features

    def _check_trials(self, space: RankSpace) -> None:
        """Checks the trials of a study that does not say what space it was made with."""
        for trial in self.trials():
            try:
                space.check(trial.allocation)
            except RankSpaceError as error:
                raise ArtifactError(
                    f"Trial {trial.position + 1} of the study {self._study.study_name!r} belongs "
                    f"to another rank space: {error} Or choose another run folder."
                ) from error

    def trials(self) -> list[Trial]:
        """Returns the finished trials in order of position."""
        done = filter(_is_ours, self._study.get_trials(deepcopy=False))
        records = [trial.user_attrs[RECORD] for trial in done]
        return sorted(map(Trial.from_json, records), key=lambda trial: trial.position)

    def interrupted(self) -> int:
        """Returns the number of trials that killed processes left unfinished."""
        return sum(
            trial.state == OptunaState.RUNNING or trial.user_attrs.get(REASON) == INTERRUPTED
            for trial in self._study.get_trials(deepcopy=False)
        )

    def settle(self) -> None:
        """Ends the trials that a killed process left running. For the one driver only.

        A trial whose record was written already is finished; all others are marked as
        interrupted, which is told apart from failures by the user attribute ``reason``.
        """
        for trial in self._study.get_trials(deepcopy=False, states=(OptunaState.RUNNING,)):
            if RECORD in trial.user_attrs:
                self._tell(trial.number, Trial.from_json(trial.user_attrs[RECORD]))
                continue
            logger.info("Optuna trial %d was interrupted and is left out.", trial.number)
            self._set_attribute(trial.number, REASON, INTERRUPTED)
            self._study.tell(trial.number, state=OptunaState.FAIL)

    def begin(
        self,
        sampler: BaseSampler,
        space: RankSpace,
        place: Callable[[RankAllocation], RankAllocation] = lambda proposal: proposal,
    ) -> PendingTrial:
        """Asks a sampler for the next allocation, and stores that its trial is running.

        The sampler sees a copy of the study in memory, without interrupted trials. Asked in the
        study itself, it would store each layer's rank in a transaction of its own.

        Args:
            sampler: Proposes.
            space: The rank space S.
            place: Turns what was proposed into what is fine-tuned, such as within the budget; the
                parameters stored are those of the latter, so that samplers learn the right pairs.
        """
        copy = self.as_seen_by(sampler)
        asked = copy.ask(distributions(space))
        wanted = proposed(space, asked.params)
        allocation = place(wanted)
        predicted = None
        if isinstance(sampler, PredictingSampler) and allocation == wanted:
            predicted = sampler.predicted(asked.number)
        self._study.add_trial(
            optuna.trial.create_trial(
                state=OptunaState.RUNNING,
                params=parameters_of(space, allocation),
                distributions=asked.distributions,
                # Some samplers keep their state here.
                system_attrs=copy.get_trials(deepcopy=False)[-1].system_attrs,
            )
        )
        number = self._study.get_trials(deepcopy=False)[-1].number
        return PendingTrial(allocation=allocation, predicted=predicted, number=number)

    def as_seen_by(self, sampler: BaseSampler) -> optuna.Study:
        """Returns a copy of the study in memory, without interrupted trials."""
        copy = quiet_study(self._study.study_name, StudyDirection.MAXIMIZE, sampler=sampler)
        copy.add_trials(t for t in self._study.get_trials(deepcopy=False) if _is_ours(t))
        return copy

    def finish(self, pending: PendingTrial, trial: Trial) -> None:
        """Stores the record of a trial that was begun."""
        self._set_attribute(pending.number, RECORD, trial.to_json())
        self._tell(pending.number, trial)

    def _set_attribute(self, number: int, key: str, value: Any) -> None:
        # Optuna's study has no way to write to a running trial that another process began.
        study_id = self._storage.get_study_id_from_name(self._study.study_name)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)
        self._storage.set_trial_user_attr(trial_id, key, value)

    def add(self, trial: Trial, space: RankSpace | None = None) -> None:
        """Stores a finished trial that no sampler proposed, in one transaction.

        Args:
            trial: The trial.
            space: Its rank space if samplers shall learn from it, as from one of their own.
        """
        complete = trial.state is TrialState.COMPLETE
        self._study.add_trial(
            optuna.trial.create_trial(
                state=OptunaState.COMPLETE if complete else OptunaState.FAIL,
                value=trial.objective,
                params=None if space is None else parameters_of(space, trial.allocation),
                distributions=None if space is None else distributions(space),
                user_attrs={RECORD: trial.to_json()},
            )
        )

    def _tell(self, number: int, trial: Trial) -> None:
        if trial.state is TrialState.COMPLETE:
            self._study.tell(number, trial.objective)
        else:
            self._study.tell(number, state=OptunaState.FAIL)


def stored_trials(database: Path, name: str) -> list[Trial]:
    """Returns the finished trials of a study that a run may be writing; the run takes no notice.

    A copy is read. Making it takes SQLite's lock for readers, for milliseconds. Where a process was
    killed or stopped in the middle of a write, the file and its journal are copied as they are.

    Raises:
        ArtifactError: If it cannot be read.
    """
    if not database.exists():
        return []
    journal = f"{database.name}-journal"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / database.name
        try:
            uri = f"{database.resolve().as_uri()}?mode=ro"
            with (
                contextlib.closing(sqlite3.connect(uri, _PATIENCE, uri=True)) as source,
                contextlib.closing(sqlite3.connect(copy)) as target,
            ):
                source.backup(target, progress=_give_up_if_busy)
        except sqlite3.Error:
            shutil.copy(database, copy)
            if database.with_name(journal).exists():
                shutil.copy(database.with_name(journal), folder)
        with TrialStore.open(f"sqlite:///{copy.as_posix()}", name) as store:
            return store.trials()


def _give_up_if_busy(status: int, *_: object) -> None:
    """Ends a backup, which else would wait without end."""
    if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        raise sqlite3.OperationalError("database is locked")


def _is_ours(trial: FrozenTrial) -> bool:
    return RECORD in trial.user_attrs and trial.state.is_finished()


def _without_password(url: str) -> str:
    return re.sub(r"://[^@/]*@", "://***@", url)


def quiet_study(
    name: str,
    direction: optuna.study.StudyDirection,
    *,
    sampler: optuna.samplers.BaseSampler | None = None,
    storage: optuna.storages.BaseStorage | None = None,
) -> optuna.Study:
    """Returns a study without a word on stderr: that of the storage, or a new one in memory."""
    # Optuna announces every study on stderr; there is no switch but the global one.
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(
            study_name=name,
            direction=direction,
            sampler=sampler,
            storage=storage,
            load_if_exists=True,
        )
    finally:
        optuna.logging.set_verbosity(verbosity)
