"""What the package search is handed by plugins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from rankadaptor_plugin.config.tables import (
        PerformanceModelConfig,
    )
    from rankadaptor_plugin.core.ranks import RankSpace
    from rankadaptor_plugin.search.performance.performance_model import (
        PerformanceModel,
        PriorEffects,
    )


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


PerformanceModelFactory = Callable[["RankSpace", "PerformanceModelConfig", int], "PerformanceModel"]


SamplerFactory = Callable[[SamplerSettings], "BaseSampler"]
