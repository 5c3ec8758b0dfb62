"""The seven benchmarks of the paper as lm-eval tasks, on lm-eval's own definitions.

Our YAML files name one of lm-eval's own and this class, which reads it: prompts, choices, answers
and versions stay lm-eval's. Added are the metric `accuracy`, which repeats `acc` or `acc_norm` as
fixed for each benchmark (those of arXiv 2406.15734), the choice of search or report documents, and
local copies of the data.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.oracle.lm_eval_internals import add_mean_metric, task_file
from rankadaptor_plugin.oracle.local_data import load_split

if TYPE_CHECKING:
    from collections.abc import Mapping

ACCURACY_METRICS = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
"""lm-eval's metric that counts as the accuracy of each benchmark."""

DOCUMENTS = ("report", "search")
_OWN_KEYS = ("class", "stock", "benchmark", "documents")
_NAMING_KEYS = ("tag", "group", "task_alias", "group_alias")


def task_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns lm-eval's own definition of a benchmark under our name.

    Args:
        config: Our YAML: `task`; `stock`, lm-eval's YAML file, relative to its task folder;
            `benchmark`, one of `ACCURACY_METRICS`; `documents`, ``report`` for the split that
            lm-eval evaluates or ``search`` for the training split. Other keys replace lm-eval's;
            `metadata` is merged into lm-eval's.

    Raises:
        ConfigError: If a key is missing or has another value.
        OracleError: If lm-eval has no such file.
    """
    for key, allowed in (("benchmark", tuple(ACCURACY_METRICS)), ("documents", DOCUMENTS)):
        if config.get(key) not in allowed:
            raise ConfigError(
                f"The task {config.get('task')!r} has {key} {config.get(key)!r}. Allowed are "
                f"{', '.join(allowed)}."
            )
    path = Path(lm_eval.tasks.__file__).parent / str(config.get("stock"))
    if not path.is_file():
        raise OracleError(
            f"lm-eval {version('lm-eval')} has no task file {path}, which {config.get('task')!r} "
            "is built on. Install lm-eval 0.4.13."
        )
    stock = {key: value for key, value in task_file(path).items() if key not in _NAMING_KEYS}
    given = {key: value for key, value in config.items() if key not in _OWN_KEYS}
    merged = {**stock, **given}
    merged["metadata"] = {**(stock.get("metadata") or {}), **(given.get("metadata") or {})}
    if config["documents"] == "search":
        merged |= {"test_split": merged["training_split"], "validation_split": None}
    return merged


def local_documents(config: Mapping[str, Any], benchmark: str) -> dict[str, Dataset] | None:
    """Returns the evaluated split from local copies, held in memory alone.

    Args:
        config: A configuration as `task_config` returns it.
        benchmark: One of `ACCURACY_METRICS`.

    Returns:
        The split by its name, or None if the metadata names no ``data_dir``.

    Raises:
        ConfigError: If the folder or the file is missing.
        OracleError: If the file cannot be read.
    """
    data_dir = config["metadata"].get("data_dir")
    if data_dir is None:
        return None
    split = config.get("test_split") or config["validation_split"]
    rows = load_split(Path(str(data_dir)).expanduser(), benchmark, split)
    # Not `load_dataset`: that would leave a copy in the user's cache.
    return {split: Dataset.from_list(rows)}


class Commonsense7Task(ConfigurableTask):  # type: ignore[misc]
    """One of the seven benchmarks, zero-shot.

    Args:
        config: As `task_config` takes it. A ``data_dir`` in its metadata names a folder of local
            copies; nothing then touches the network.

    Attributes:
        accuracy_metric: ``acc`` or ``acc_norm``, whichever `accuracy` repeats.

    Raises:
        ConfigError: If the configuration or the folder of copies is wrong.
        OracleError: If lm-eval has no such task, or a copy cannot be read.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        merged = task_config(config)
        self.accuracy_metric = ACCURACY_METRICS[config["benchmark"]]
        self._local = local_documents(merged, config["benchmark"])
        self._documents: Any = None
        super().__init__(config=merged)
        if self.config.num_fewshot:
            raise ConfigError(
                f"The task {self.config.task!r} has num_fewshot {self.config.num_fewshot}. It is "
                "zero-shot: leave it at 0, or use lm-eval's own task."
            )
        add_mean_metric(self, "accuracy")

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Takes the local copies, or the hub's data set as lm-eval does."""
        if self._local is None:
            super().download(dataset_kwargs, **kwargs)
        else:
            self.dataset = self._local

    def fewshot_docs(self) -> None:
        """Returns none: the examples would need a second split, and could be search documents."""

    @property
    def eval_docs(self) -> Any:
        """The evaluated documents, processed once; lm-eval would do it again at each use."""
        if self._documents is None:
            self._documents = super().eval_docs
        return self._documents

    def process_results(self, doc: dict[str, Any], results: Any) -> dict[str, Any]:
        """Returns lm-eval's metrics of one document, and `accuracy`."""
        metrics: dict[str, Any] = super().process_results(doc, results)
        # lm-eval replaces all metrics where it only collects answers.
        if "accuracy" in self.aggregation():
            metrics["accuracy"] = metrics[self.accuracy_metric]
        return metrics
