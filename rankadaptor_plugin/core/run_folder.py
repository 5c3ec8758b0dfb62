"""The run folder: one artifact per stage, written whole or not at all.

    inputs.json       what the run was made from; another run may not continue it
    pruned/           the pruned model
    compensated/      the same, refitted to the unpruned one; compensation.json says how well
    tune.json         learning rate and parts of the stack; tune/ the scores behind them
    evaluations/      scores, one JSON file per evaluated model and seed; beside it, as Parquet,
                      the values per document
    noise/            scores of the fine-tunes before the search; noise.json what they say
    generations.json  texts that the models wrote
    study.db          every trial, an Optuna study in SQLite
    adapters/         adapters of the finalists and of uniform LoRA
    adapter/          the delivered adapter, a PEFT folder
    report.{md,json,html}
    .teacher/         predictions of the unpruned model, under a hash of what they depend on
    timings.json      wall seconds per stage, over all sessions
    session.json      the last session: its process, and how far it is or how it ended
    run.log           what all sessions said and warned of

A stage whose artifact exists is skipped, so running again *is* resuming.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from rankadaptor_plugin.core.document_results import with_documents, write_documents
from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.core.files import write_file, write_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rankadaptor_plugin.core.scores import Score


T = TypeVar("T")
_HASHED_WHOLE = 256 * 2**20
_BLOCK = 2**20
_GLANCE = 0.5  # seconds that `is_open` of another process may hold the lock, and far more
SESSION = "session.json"
"""File that says of the last session how far it is, or how it ended."""

PREDICTIONS = ".teacher"
"""Folder with the predictions of the unpruned model."""
_FILES = (
    "report.md",
    "report.json",
    "report.html",
    "noise.json",
    "tune.json",
    "compensation.json",
    "compensation.safetensors",
    "generations.json",
    "study.db",
    "timings.json",
    SESSION,
)


class RunFolder:
    """Paths in a run folder, and atomic reading and writing there.

    Attributes:
        is_claimed: True once `claim` has shown that the folder is of this run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pruned = path / "pruned"
        self.compensated = path / "compensated"
        self.adapter = path / "adapter"
        self.is_claimed = False
        self.study_url = f"sqlite:///{(path / 'study.db').resolve().as_posix()}"

    def base_of(self, adapter: Path) -> Path:
        """Returns the folder of the model that an adapter of the run was trained on."""
        try:
            config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
            name = Path(config["base_model_name_or_path"]).name
        except (OSError, ValueError, TypeError, KeyError):
            name = ""  # what reads the adapter says what is wrong with it
        return self.compensated if name == self.compensated.name else self.pruned

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Creates the folder and holds its lock; the lock ends with the process, however it ends.

        Raises:
            ArtifactError: If the folder cannot be written or is in use.
        """
        if "?" in str(self.path):  # begins the options in a database URL
            raise ArtifactError(
                f"The run folder {self.path} has a ? in its path. Set output to a path without."
            )
        made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            lock = self._lock
            lock.acquire(timeout=_GLANCE)
        except Timeout:
            raise ArtifactError(
                f"The run folder {self.path} is in use by another process. Wait for it, or set "
                "another output."
            ) from None
        except OSError as error:
            raise ArtifactError(
                f"The run folder {self.path} cannot be written: {error.strerror or error}. Set "
                "output to a folder where you may write."
            ) from error
        try:
            yield
        finally:
            lock.release()
            if made and all(path.name == ".lock" for path in self.path.iterdir()):
                shutil.rmtree(self.path, ignore_errors=True)  # refused before anything was done

    @property
    def _lock(self) -> FileLock:
        return FileLock(self.path / ".lock")

    def is_open(self) -> bool | None:
        """True if a process works in the folder, None if the lock is not ours to look at.

        On a disk that several machines share, those of the others may not be seen.
        """
        if not (self.path / ".lock").exists():
            return False
        try:
            with self._lock.acquire(timeout=0):
                return False
        except Timeout:
            return True
        except OSError:
            return None

    def claim(
        self, inputs: dict[str, Any], free: tuple[str, ...] = (), *, writes: bool = True
    ) -> None:
        """Records what the run is made from, or checks that it is the same as before.

        Args:
            inputs: Nested dictionaries of plain values.
            free: Beginnings of the names that may still change, as in ``"config.confirm."``.
            writes: False only checks.

        Raises:
            ArtifactError: If the folder was made from different inputs; the message names them.
        """
        before = self.read_json("inputs.json")
        if before is None:
            # Until here a run leaves hidden files only: its lock and unfinished writes.
            others = sorted(p.name for p in self.path.glob("*") if not p.name.startswith("."))
            if others:
                raise ArtifactError(
                    f"The folder {self.path} holds something else ({others[0]}) and is left alone. "
                    "Set output to a new or empty folder."
                )
            if writes:
                self.write_json("inputs.json", inputs)
            self.is_claimed = True
            return
        then, now = flat(before), flat(json.loads(json.dumps(inputs)))
        changed = [
            f"{key} was {then.get(key, 'unset')!s:.40}, now {now.get(key, 'unset')!s:.40}"
            for key in sorted(then.keys() | now.keys())
            if then.get(key) != now.get(key) and not key.startswith(free)
        ]
        if writes and not changed and then != now:
            self.write_json("inputs.json", inputs)
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""  # noqa: PLR2004
            raise ArtifactError(
                f"The run folder {self.path} was made from different inputs "
                f"({'; '.join(changed[:3])}"
                f"{more}). Set another output, change the inputs back, or delete the folder."
            )
        self.is_claimed = True

    def clear(self) -> None:
        """Deletes the results that a run left here, and nothing else; inputs and log stay."""
        for name in (
            "pruned",
            "compensated",
            "tune",
            "noise",
            "evaluations",
            "adapters",
            "adapter",
        ):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Returns the content of a JSON file, or None if it is not there.

        Raises:
            ArtifactError: If the file is torn.
        """
        path = self.path / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("it is not a JSON object")
            return content
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"The file {path} cannot be read ({error}). Delete it and run again."
            ) from error

    def read_result(
        self, name: str, build: Callable[[dict[str, Any]], T], *, documents: bool = True
    ) -> T | None:
        """Returns the object built from ``NAME.json``, or None if it is incomplete.

        Args:
            name: Path in the folder, without ending.
            build: Makes the result from the content of the file.
            documents: Whether ``NAME.parquet`` belongs to it.

        Raises:
            ArtifactError: If the file is torn, or holds something else.
        """
        content = self.read_json(f"{name}.json")
        if content is None or (documents and not (self.path / f"{name}.parquet").is_file()):
            return None
        try:
            return build(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"The file {self.path / name}.json does not hold what a run writes there "
                f"({type(error).__name__}: {error}). Delete it and run again."
            ) from error

    def write_json(self, name: str, data: Any) -> None:
        """Writes a JSON file whole or not at all.

        Raises:
            ArtifactError: If it cannot be written.
        """
        path = self.path / name
        try:
            write_file(path, lambda partial: partial.write_text(json.dumps(data), encoding="utf-8"))
        except OSError as error:
            raise ArtifactError(
                f"The file {path} cannot be written: {error.strerror or error}. Free some space or "
                "set another output, then run again."
            ) from error

    def write_score(self, name: str, score: Score) -> None:
        """Writes the values per document of a score; its means are the caller's to keep.

        Raises:
            ArtifactError: If they cannot be written.
        """
        write_documents(self.path / name, score)

    def with_documents(self, name: str, score: Score) -> Score:
        """Returns a score with the values per document that `write_score` wrote.

        Raises:
            ArtifactError: If the file is missing or torn.
        """
        return with_documents(score, self.path / name)

    def write_folder(self, name: str, fill: Callable[[Path], object]) -> Path:
        """Fills a temporary folder and moves it into place, replacing what is there.

        Raises:
            ArtifactError: If it cannot be written.
        """
        path = self.path / name
        try:
            write_folder(path, fill)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ArtifactError(
                f"The folder {path} cannot be written: {reason}. Free some space or set another "
                "output, then run again."
            ) from error
        return path

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[Callable[[], None]]:
        """Adds the wall seconds of a block to a stage's; nothing is added if the block fails.

        Calling what it yields adds those so far, so that a killed process loses few.
        """
        began = time.perf_counter()

        def add_so_far() -> None:
            nonlocal began
            now = time.perf_counter()
            self.add_seconds(stage, now - began)
            began = now

        yield add_so_far
        add_so_far()

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Adds wall seconds to a stage."""
        timings = self.timings()
        timings[stage] = timings.get(stage, 0.0) + seconds
        self.write_json("timings.json", timings)

    def timings(self) -> dict[str, float]:
        """Returns the wall seconds per stage, over all sessions."""
        return dict(self.read_json("timings.json") or {})


def digest(path: Path) -> str:
    """Returns a hash of a file, or of the files right inside a folder.

    Files above 256 MiB are hashed at their beginning, middle and end, with their size.
    """
    sha = hashlib.sha256()
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        sha.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= _HASHED_WHOLE:
                while block := stream.read(_BLOCK):
                    sha.update(block)
            else:
                for position in (0, size // 2, size - _BLOCK):
                    stream.seek(position)
                    sha.update(stream.read(_BLOCK))
    return sha.hexdigest()[:16]


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested dictionaries under names such as ``config.prune.ratio``."""
    if not isinstance(data, dict):
        return {prefix: data}
    return {
        key: value
        for name, item in data.items()
        for key, value in flat(item, f"{prefix}.{name}" if prefix else str(name)).items()
    }
