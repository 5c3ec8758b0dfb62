"""What the package oracle is handed by plugins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.config.tables import (
        OracleConfig,
    )
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
        """Returns what fixes the scores.

        Returns:
            ``documents``: ids by purpose (``search``, ``report``) and task; ``digest``: a hash of
            their content.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class OracleSettings:
    """What an oracle is built from.

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


OracleFactory = Callable[[OracleSettings], Oracle]
