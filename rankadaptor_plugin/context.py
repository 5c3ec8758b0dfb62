"""The types that plugins and stages hand to each other.

Protocols, not base classes: a plugin needs no import from here to satisfy them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from rankadaptor_plugin.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from optuna.samplers import BaseSampler
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.config import (
        OracleConfig,
        PerformanceModelConfig,
        PruneConfig,
        RunConfig,
    )
    from rankadaptor_plugin.corpus import Corpus
    from rankadaptor_plugin.modeling_rankadaptor import Structure
    from rankadaptor_plugin.performance_model import PerformanceModel, PriorEffects
    from rankadaptor_plugin.pruned_model import PrunedModel
    from rankadaptor_plugin.ranks import RankAllocation, RankSpace
    from rankadaptor_plugin.scores import Score
    from rankadaptor_plugin.teacher import LiveTeacher


class Pruner(Protocol):
    """Removes units from a model."""

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        samples: Sequence[torch.Tensor],
        config: PruneConfig,
    ) -> PrunedModel:
        """Prunes a model, in place or not.

        Args:
            model: The base model.
            tokenizer: Its tokenizer.
            samples: Calibration sequences, each of shape (t,), int64.
            config: The ``[prune]`` table.
        """
        ...


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


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """What a sampler is built from, anew for every trial.

    Attributes:
        space: The rank space.
        seed: A seed of this trial alone.
        search_seed: A seed that all trials of the search have in common.
        initial_trials: Random allocations before the method's own; 0 leaves it to the method.
        candidates: Allocations that the performance model scores per proposal.
        final_candidates: Allocations of which the last performance model names a finalist.
        performance_model: Makes a fresh, untrained performance model.
        metric: Metric of the tasks that meta-learning takes; None takes all of them.
        model_config: The ``[performance_model]`` table.
        priors: What earlier studies and proxies expect of the ranks.
        pareto: Whether the front of score against parameters is searched, not its top alone.
    """

    space: RankSpace
    seed: int
    search_seed: int
    initial_trials: int
    candidates: int
    final_candidates: int = 0
    performance_model: Callable[[], PerformanceModel]
    metric: str | None = None
    model_config: PerformanceModelConfig
    priors: tuple[PriorEffects, ...] = ()
    pareto: bool = False


OracleFactory = Callable[[OracleSettings], Oracle]
PerformanceModelFactory = Callable[["RankSpace", "PerformanceModelConfig", int], "PerformanceModel"]
SamplerFactory = Callable[[SamplerSettings], "BaseSampler"]


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What a recovery stage hands back.

    Attributes:
        adapter: PEFT folder of the delivered adapter.
        allocation: Its ranks.
        summary: What the report needs, plain values only.
    """

    adapter: Path
    allocation: RankAllocation
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Registries:
    """All names that plugins registered."""

    pruners: Registry[Pruner] = field(default_factory=lambda: Registry("pruner"))
    families: Registry[Structure] = field(default_factory=lambda: Registry("model family"))
    oracles: Registry[OracleFactory] = field(default_factory=lambda: Registry("oracle"))
    performance_models: Registry[PerformanceModelFactory] = field(
        default_factory=lambda: Registry("performance model")
    )
    samplers: Registry[SamplerFactory] = field(default_factory=lambda: Registry("search method"))


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a stage or plugin may know of the run.

    Attributes:
        config: The run file.
        folder: The run folder.
        registries: All registered names.
        hook: The relay to call further hooks.
        oracle: P of the paper.
        corpus: The recovery corpus, with what the unpruned model predicts where it is distilled.
        teacher: The unpruned model, where it predicts on the way; None otherwise.
    """

    config: RunConfig
    folder: Path
    registries: Registries
    hook: Any
    oracle: Oracle
    corpus: Corpus
    teacher: LiveTeacher | None = None
