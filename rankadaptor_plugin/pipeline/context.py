"""The types that plugins and stages hand to each other.

Protocols, not base classes: a plugin needs no import from here to satisfy them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    from rankadaptor_plugin.config.tables import (
        RunConfig,
    )
    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.corpus.sequences import Corpus
    from rankadaptor_plugin.models.modeling_rankadaptor import Structure
    from rankadaptor_plugin.oracle.oracle import Oracle, OracleFactory
    from rankadaptor_plugin.pruning.cutting import Pruner
    from rankadaptor_plugin.recovery.teacher import LiveTeacher
    from rankadaptor_plugin.report.schema import (
        Column,
        Confirm,
        Objective,
        Result,
        SearchSummary,
        Verdict,
    )
    from rankadaptor_plugin.search.samplers import (
        PerformanceModelFactory,
        SamplerFactory,
    )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Part of the report that a recovery stage knows, plain values only.

    A field that `rankadaptor_plugin.report.schema.ReportData` has too is explained there; what is
    left out was not done.

    Attributes:
        trainable: Numbers of trainable parameters by model.
        fine_tuning_seconds: Seconds in fine-tunes.
        evaluation_seconds: Seconds in evaluations.
        seconds_per_trial: Mean of a complete trial.
        adapters: Folders of the adapters by name of the model, relative to the run folder.
    """

    verdict: Verdict
    objective: Objective
    search: SearchSummary
    confirm: Confirm
    allocations: dict[str, list[int]]
    trainable: dict[str, int]
    seeds: dict[str, int | list[int]]
    adapters: dict[str, str]
    scores: dict[str, Column] = field(default_factory=dict)
    results: dict[str, list[Result]] = field(default_factory=dict)
    settings: dict[str, dict[str, float]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    slots: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    trials: list[dict[str, Any]] = field(default_factory=list)
    front: list[dict[str, Any]] = field(default_factory=list)
    knowledge: list[dict[str, Any]] = field(default_factory=list)
    noise: dict[str, Any] | None = None
    fine_tuning_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    seconds_per_trial: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """Result of a recovery stage.

    Attributes:
        adapter: PEFT folder of the delivered adapter.
        allocation: Its ranks.
        summary: What the report says of it; without one, that nothing was compared.
    """

    adapter: Path
    allocation: RankAllocation
    summary: Summary | None = None


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
