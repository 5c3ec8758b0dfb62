"""The types that plugins and stages hand to each other, and what plugins register.

Protocols, not base classes: a plugin needs no import from here to satisfy them.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.config.tables import GENERATE, LEAST_SQUARES, NO_COMPENSATION
from rankadaptor_plugin.core.errors import ConfigError, PluginError, UnknownNameError
from rankadaptor_plugin.core.registry import Registry, suggestion
from rankadaptor_plugin.oracle import task_names

if TYPE_CHECKING:
    import pluggy

    from rankadaptor_plugin.config.tables import (
        RunConfig,
    )
    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.corpus.sequences import Corpus
    from rankadaptor_plugin.models.modeling_rankadaptor import Structure
    from rankadaptor_plugin.oracle.oracle import Oracle, OracleFactory
    from rankadaptor_plugin.pipeline.budget import Budget
    from rankadaptor_plugin.pruning.compensation import Compensation
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

GROUP = "rankadaptor_plugin"
"""Entry-point group of third-party plugins."""


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
    tune: dict[str, Any] | None = None
    fine_tuning_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    seconds_per_trial: float | None = None
    cuts: list[str] = field(default_factory=list)


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
    """Context of a run for stages and plugins.

    Attributes:
        config: The run file.
        folder: The run folder.
        registries: All registered names.
        hook: The relay to call further hooks.
        oracle: P of the paper.
        corpus: The recovery corpus, with what the unpruned model predicts where it is distilled.
        teacher: The unpruned model, where it predicts on the way; None otherwise.
        budget: The time that the run may take; None where nothing is known of it.
        attention: Attention kernels of the fine-tunes; empty for those that the model has.
        compensation: Weights that fine-tunes with ``compensate`` start from; None where none do.
    """

    config: RunConfig
    folder: Path
    registries: Registries
    hook: Any
    oracle: Oracle
    corpus: Corpus
    teacher: LiveTeacher | None = None
    budget: Budget | None = None
    attention: str = ""
    compensation: Compensation | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the stack that the run can try, with what it has."""
        has = self.compensation is not None
        return tuple(part for part in self.config.parts if has or part != "compensate")


def registries(manager: pluggy.PluginManager) -> Registries:
    """Returns all names that the plugins register."""
    found = Registries()
    manager.hook.rankadaptor_register_pruners(register=found.pruners)
    manager.hook.rankadaptor_register_families(register=found.families)
    manager.hook.rankadaptor_register_oracles(register=found.oracles)
    manager.hook.rankadaptor_register_performance_models(register=found.performance_models)
    manager.hook.rankadaptor_register_samplers(register=found.samplers)
    return found


def check_early(manager: pluggy.PluginManager, config: RunConfig) -> None:
    """Checks within a second what needs no heavy import: names of plugins, and of tasks.

    Raises:
        UnknownNameError: If no plugin registers a name.
        ConfigError: If a task is unknown.
    """
    found = registries(manager)
    for registry, name in _named(found, config):
        registry.check(name)
    check_compensation(manager, config)
    task_names.check(config.oracle, manager.hook.rankadaptor_lm_eval_task_paths())


def _named(found: Registries, config: RunConfig) -> list[tuple[Registry[Any], str]]:
    """Returns the names in a run file that plugins register, with where they are looked up."""
    oracles = filter(None, (config.oracle.name, config.oracle.search_name))
    return [
        (found.pruners, config.prune.method),
        *((found.oracles, name) for name in oracles),
        *([] if config.search.is_fixed else [(found.samplers, config.search.method)]),
        (found.performance_models, config.performance_model.name),
    ]


def check_compensation(manager: pluggy.PluginManager, config: RunConfig) -> None:
    """Checks ``[prune] compensate``; a plugin's hook may know other names than the built-in one.

    Raises:
        UnknownNameError: If it is not built in, and no other plugin has the hook.
        ConfigError: If a file of calibration text is missing.
    """
    name, known = config.prune.compensate, [NO_COMPENSATION, LEAST_SQUARES]
    others = [i for i in manager.hook.rankadaptor_compensate.get_hookimpls() if not i.trylast]
    if name not in known and not others:
        raise UnknownNameError(
            f"[prune] compensate names {name!r}, which no plugin knows.{suggestion(name, known)} "
            f"Known: {', '.join(known)}."
        )
    for text in config.compensate.text:
        if text != GENERATE and not Path(text).is_file():
            raise ConfigError(
                f"The calibration text {text} does not exist. Correct [compensate] text; it names "
                f'files, or "{GENERATE}".'
            )


def check_names(found: Registries, config: RunConfig) -> None:
    """Checks, by loading it, everything that a run file names, and makes all families known.

    Raises:
        UnknownNameError: If no plugin registers a name.
        PluginError: If what is registered cannot be loaded, or is no map of its model type.
    """
    register_families(found)
    for registry, name in _named(found, config):
        registry.get(name)


def register_families(found: Registries) -> None:
    """Makes the families of all plugins known, so that their models can be pruned and loaded.

    Raises:
        PluginError: If what is registered cannot be loaded, or is no map of its model type.
    """
    from rankadaptor_plugin.models.families import (
        register_family,  # loads torch, unlike a mere list
    )

    for model_type in found.families.names():
        structure = found.families.get(model_type)
        if getattr(structure, "model_type", None) != model_type:
            raise PluginError(
                f'The model family "{model_type}" is registered with {structure!r}. Register a '
                "Structure of that model_type."
            )
        register_family(structure)


def describe(manager: pluggy.PluginManager) -> dict[str, Any]:
    """Returns the active plugins and their registered names.

    Returns:
        ``plugins``: name, provider and hooks of each plugin, in the order of their calls;
        ``registered``: names by kind.
    """
    providers = {point.name: provider(point) for point in entry_points(group=GROUP)}
    version = importlib.metadata.version("rankadaptor-plugin")
    active = [
        {
            "name": name,
            "provider": providers.get(name, f"rankadaptor-plugin {version}, built in"),
            "hooks": sorted(caller.name for caller in manager.get_hookcallers(plugin) or []),
        }
        for name, plugin in manager.list_name_plugin()
        if plugin is not None
    ]
    found = registries(manager)
    return {
        "plugins": active,
        "registered": {
            "pruners": found.pruners.names(),
            "model families": found.families.names(),
            "oracles": found.oracles.names(),
            "performance models": found.performance_models.names(),
            "samplers": found.samplers.names(),
        },
    }


def provider(point: EntryPoint) -> str:
    """Returns name and version of the distribution that an entry point belongs to."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
