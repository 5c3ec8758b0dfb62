"""Contract of oracles, the objective that the search maximizes, and two oracles as one.

Plugins hand an `OracleFactory` to ``rankadaptor_register_oracles``.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from rankadaptor_plugin.config.run_file import corpus_file
from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.registry import suggestion
from rankadaptor_plugin.core.scores import metric_suggestion

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.config.tables import OracleConfig, RunConfig
    from rankadaptor_plugin.core.scores import Score


class Oracle(Protocol):
    """P of the paper: measures a model.

    `documents` is ``"search"`` or ``"report"`` everywhere: what the search sees, and what the
    verdict is made from. The two sets of documents must be disjoint.
    """

    def score(self, model: PreTrainedModel, documents: str) -> Score:
        """Scores a model; higher is better for every metric.

        `TaskScore.of` makes the score of a task from its values per document.
        """
        ...

    def metrics(self, documents: str) -> tuple[str, ...]:
        """Returns the metrics that every task of a score has.

        The first one on the report documents decides the verdict.
        """
        ...

    def weights(self, documents: str) -> dict[str, float]:
        """Returns the weight of each task in the mean, in the order of the tables."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns the inputs that determine the scores.

        Returns:
            ``documents``: ids by purpose (``search``, ``report``) and task; ``digest``: a hash of
            their content.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class OracleSettings:
    """Settings that an oracle is built from.

    Attributes:
        config: The ``[oracle]`` table.
        tokenizer: Tokenizer of the model.
        task_paths: Folders with lm-eval task YAML.
        seed: Seed of the run; decides which documents are drawn.
        window: Context window of the model in tokens, None if it has no limit.
        purposes: What it is asked for; ``search`` or ``report`` alone beside another oracle.
    """

    config: OracleConfig
    tokenizer: PreTrainedTokenizerBase
    task_paths: tuple[Path, ...]
    seed: int
    window: int | None = None
    purposes: tuple[str, ...] = ("search", "report")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an evaluation takes.

    Attributes:
        seconds: Seconds of all documents.
        tokens: Most tokens of one forward pass.
        logits: Most predictions of one forward pass.
    """

    seconds: float
    tokens: int = 0
    logits: int = 0


def evaluation_cost(oracle: Oracle, model: PreTrainedModel, documents: str) -> Cost:
    """Forecasts an evaluation by a batch of its own documents.

    An oracle may have a method `cost` of the same arguments; without one, all documents are scored.
    """
    forecast = getattr(oracle, "cost", None)
    if forecast is not None:
        return cast("Cost", forecast(model, documents))
    began = time.perf_counter()
    oracle.score(model, documents)
    return Cost(seconds=time.perf_counter() - began)


OracleFactory = Callable[[OracleSettings], Oracle]


PREFERRED = "gold_logprob"
"""Objective of an oracle that has it and whose run file names none."""


class TwoOracles:
    """Asks one oracle for the search and another one for the report.

    Args:
        search: Scores the search documents.
        report: Scores the report documents.
    """

    def __init__(self, search: Oracle, report: Oracle) -> None:
        self._oracles = {"search": search, "report": report}

    def score(self, model: PreTrainedModel, documents: str) -> Score:
        """Scores a model with the oracle of these documents."""
        return self._oracles[documents].score(model, documents)

    def cost(self, model: PreTrainedModel, documents: str) -> Cost:
        """Forecasts an evaluation by the oracle of these documents."""
        return evaluation_cost(self._oracles[documents], model, documents)

    def metrics(self, documents: str) -> tuple[str, ...]:
        """Returns the metrics of the oracle of these documents."""
        return self._oracles[documents].metrics(documents)

    def weights(self, documents: str) -> dict[str, float]:
        """Returns the weights of the oracle of these documents."""
        return self._oracles[documents].weights(documents)

    def describe(self) -> dict[str, Any]:
        """Returns the documents of each oracle for its purpose, and both digests."""
        parts = {purpose: oracle.describe() for purpose, oracle in self._oracles.items()}
        return {
            "documents": {p: parts[p]["documents"][p] for p in parts},
            "digest": "-".join(parts[p]["digest"] for p in parts),
        }


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A metric's weighted mean over the tasks, or its value on one task.

    Attributes:
        metric: Name of the metric.
        target: The one task; empty for the mean.
        weights: Weight per task in the mean.
    """

    metric: str
    target: str = ""
    weights: Mapping[str, float]

    def __call__(self, score: Score) -> float:
        """Returns the value of a score on the search documents."""
        return score.mean(self.metric, {self.target: 1.0} if self.target else self.weights)


def objective_metric(config: OracleConfig, oracle: Oracle) -> str:
    """Returns the metric that the search maximizes.

    Raises:
        ConfigError: If the oracle does not have the metric that the run file names, or its search
            documents do not have the target.
    """
    metrics = oracle.metrics("search")
    if config.target and config.target not in oracle.weights("search"):
        raise ConfigError(
            f"[oracle] target names {config.target!r}, which has no search documents."
            f"{suggestion(config.target, list(oracle.weights('search')))} Tasks that have: "
            f"{', '.join(oracle.weights('search'))}."
        )
    if not config.objective:
        return PREFERRED if PREFERRED in metrics else metrics[0]
    if config.objective not in metrics:
        hint = metric_suggestion(config.objective, metrics)
        raise ConfigError(
            f"oracle.objective is {config.objective!r}.{hint} Allowed for the oracle "
            f"{config.search_name or config.name}: {', '.join(metrics)}."
        )
    return config.objective


def check_task_names(config: OracleConfig, known: Collection[str]) -> None:
    """Refuses a target or a weight of an unknown task.

    Raises:
        ConfigError: With the names that there are.
    """
    named = {"target": [config.target] if config.target else [], "weights": list(config.weights)}
    for key, names in named.items():
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"[oracle] {key} names {name!r}, which is not among the tasks."
                    f"{suggestion(name, list(known))} Tasks: {', '.join(known)}."
                )


def reported_target(config: OracleConfig, oracle: Oracle) -> str:
    """Returns the one task that the verdict is about, empty for the mean.

    A target that only the search documents have guides the search alone.
    """
    return config.target if config.target in oracle.weights("report") else ""


def check(config: RunConfig) -> None:
    """Checks the table ``[oracle]`` before a tokenizer or task is loaded.

    Raises:
        ConfigError: If a folder is missing, or the held-out text is the recovery corpus.
    """
    for key, what in (("include_path", "task YAML files"), ("data_dir", "local copies")):
        value = getattr(config.oracle, key)
        if value and not Path(value).is_dir():
            raise ConfigError(
                f"[oracle] {key} {value} is not a folder. Name the folder of the {what}, or leave "
                "it empty."
            )
    text, corpus = Path(config.oracle.text), corpus_file(config.corpus.path)
    if config.oracle.text and corpus.is_file() and text.is_file() and text.samefile(corpus):
        raise ConfigError(
            f"[oracle] text {text} is the recovery corpus, which models are trained on. Name "
            "held-out text."
        )


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Hides messages below an error of a library at work; trials would repeat them endlessly."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
