"""All that this package uses of lm-eval beyond its public interface.

`INTERNALS` names each piece and what stops working without it; a test looks for all of them, so
that a new version of lm-eval fails there first. lm-eval 0.4.13 has no public way to any of it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import TYPE_CHECKING, Any

from lm_eval.api.registry import get_aggregation
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import env

from rankadaptor_plugin.core.errors import OracleError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

INTERNALS = {
    "lm_eval.tasks._yaml_loader:load_yaml": "the tasks of commonsense7, which read lm-eval's own",
    "lm_eval.api.model:TemplateLM._encode_pair": "the oracle lm-eval, which tokenizes as lm-eval",
    "lm_eval.api.task:ConfigurableTask._aggregation_list": "the metric accuracy of commonsense7",
    "lm_eval.api.task:ConfigurableTask._higher_is_better": "the metric accuracy of commonsense7",
    "lm_eval.models.huggingface:HFLM._create_model": "adapters of the model type rankadaptor",
    "lm_eval.tasks:TaskManager.__init__:include_path": "the command lm-eval with plugins' tasks",
    "lm_eval.utils:env.from_string": "building requests at ten times the speed",
}
"""Purpose of each piece, by ``module:object`` or ``module:function:parameter``."""


def task_file(path: Path) -> dict[str, Any]:
    """Reads one of lm-eval's task files, with what it includes."""
    content: dict[str, Any] = load_yaml(path)
    return content


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
