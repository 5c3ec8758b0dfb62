"""All that this package uses of lm-eval beyond its public interface.

`INTERNALS` names each piece and what stops working without it; a test looks for all of them, so
that a new version of lm-eval fails there first. lm-eval 0.4.13 has no public way to any of it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.registry import get_aggregation
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import env

from rankadaptor_plugin.core.errors import OracleError
from rankadaptor_plugin.core.files import write_file
from rankadaptor_plugin.oracle.task_names import lm_eval_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

INTERNALS = {
    "lm_eval.tasks._yaml_loader:load_yaml": "the tasks of commonsense7, which read lm-eval's own",
    "lm_eval.api.model:TemplateLM._encode_pair": "the oracle lm-eval, which tokenizes as lm-eval",
    "lm_eval.api.task:ConfigurableTask._aggregation_list": "the metric accuracy of commonsense7",
    "lm_eval.api.task:ConfigurableTask._higher_is_better": "the metric accuracy of commonsense7",
    "lm_eval.models.huggingface:HFLM._create_model": "adapters of the model type rankadaptor",
    "lm_eval.tasks._index:TaskIndex.build:paths": "lm-eval's own tasks within a second",
    "lm_eval.tasks._index:Entry": "the same",
    "lm_eval.tasks:TaskManager.__init__:include_path": "the command lm-eval with plugins' tasks",
    "lm_eval.utils:env.from_string": "building requests at ten times the speed",
}
"""Purpose of each piece, by ``module:object`` or ``module:function:parameter``."""


def task_file(path: Path) -> dict[str, Any]:
    """Reads one of lm-eval's task files, with what it includes."""
    content: dict[str, Any] = load_yaml(path)
    return content


def task_manager(
    paths: Sequence[Path], metadata: dict[str, Any] | None = None, *, include_defaults: bool = True
) -> TaskManager:
    """Returns a `TaskManager` that knows the tasks in some folders, and perhaps lm-eval's own.

    To index its own 14 000 takes lm-eval up to ten seconds: what comes out is kept in the user's
    cache folder, as long as none of the files changes.

    Args:
        paths: Task folders; later ones go before earlier ones, and all before lm-eval's own.
        metadata: Merged into the metadata of every task.
        include_defaults: Whether lm-eval's own tasks are among them.
    """
    plain, own = TaskIndex.build, lm_eval_folder()

    def build(paths: Iterable[Path], **options: Any) -> dict[str, Entry]:
        index: dict[str, Entry] = {}
        for path in paths:
            index |= _own_index(path, plain) if path == own else plain([path], **options)
        return index

    TaskIndex.build = staticmethod(build)
    try:
        return TaskManager(
            include_path=[str(path) for path in paths],
            include_defaults=include_defaults,
            metadata=metadata,
        )
    finally:
        TaskIndex.build = staticmethod(plain)


def _own_index(folder: Path, build: Callable[..., dict[str, Entry]]) -> dict[str, Entry]:
    """Returns lm-eval's index of its own tasks, from the cache if nothing has changed since.

    Entries from there hold no content: it is read from its file whenever a task is built.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    file = Path(cache, "rankadaptor-plugin", f"lm-eval-{version('lm_eval')}-tasks.json")
    state = _state(folder)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or of another kind
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["state"] == state:
            return {
                name: Entry(name, Kind[kind], folder / path if path else None, tags=set(tags))
                for name, (kind, path, tags) in kept["tasks"].items()
            }
    index = build([folder])
    tasks = {
        name: (
            entry.kind.name,
            entry.yaml_path and str(entry.yaml_path.relative_to(folder)),
            sorted(entry.tags),
        )
        for name, entry in index.items()
    }
    content = json.dumps({"state": state, "tasks": tasks})
    with contextlib.suppress(OSError):  # the next run takes as long again
        write_file(file, lambda p: p.write_text(content, encoding="utf-8"), shared=True)
    return index


def _state(folder: Path) -> str:
    """Returns a hash of the place, sizes and times of all files in a folder."""
    sha = hashlib.sha256()
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            path = os.path.join(parent, name)
            found = os.stat(path)
            sha.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode())
    return sha.hexdigest()


def add_mean_metric(task: Any, name: str) -> None:
    """Makes lm-eval report the mean of one more metric of a task, the higher the better."""
    task._aggregation_list[name] = get_aggregation("mean")
    task._higher_is_better[name] = True


def encoded(lm: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Returns the token ids of a request, as lm-eval's `loglikelihood` makes them.

    Raises:
        OracleError: If there is no token to score.
    """
    if context:
        before, after = lm._encode_pair(context, continuation)
    else:
        after = lm.tok_encode(continuation, add_special_tokens=False)
        before = [lm.prefix_token_id]
        if after and after[0] == before[0]:
            before, after = after[:1], after[1:]
    if not before or not after:
        raise OracleError(
            f"The request {continuation!r} after {context[-40:]!r} has no token to score. Correct "
            "the task's data."
        )
    return before, after


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Keeps compiled templates while lm-eval renders documents.

    lm-eval compiles a task's template anew for each of its documents, which takes ten times as long
    as rendering it.
    """
    compile_template = env.from_string
    env.from_string = functools.lru_cache(maxsize=64)(compile_template)
    try:
        yield
    finally:
        env.from_string = compile_template


@contextlib.contextmanager
def with_tasks(folders: Iterable[Path]) -> Iterator[None]:
    """Makes every `TaskManager` know the tasks in some folders, while the block lasts.

    lm-eval's command line takes one ``--include_path`` and hands it to a `TaskManager`, which takes
    several. Tasks in a folder that is given there go before those of the same name here, and these
    before lm-eval's own.
    """
    plain = TaskManager.__init__
    signature = inspect.signature(plain)
    ours = [str(folder) for folder in folders]

    @functools.wraps(plain)
    def with_ours(*args: Any, **named: Any) -> None:
        call = signature.bind(*args, **named)
        paths = call.arguments.get("include_path") or []
        several = isinstance(paths, (list, tuple))
        call.arguments["include_path"] = [*ours, *(paths if several else [paths])]
        plain(*call.args, **call.kwargs)

    TaskManager.__init__ = with_ours
    try:
        yield
    finally:
        TaskManager.__init__ = plain
