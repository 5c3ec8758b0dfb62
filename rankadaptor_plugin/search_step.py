"""The search as a step of a run: its sampler, its limits in time, and random search beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rankadaptor_plugin.context import SamplerSettings
from rankadaptor_plugin.knowledge import Knowledge
from rankadaptor_plugin.search import SearchResult, StopReason, search
from rankadaptor_plugin.trials import TrialState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from optuna.samplers import BaseSampler

    from rankadaptor_plugin.config import RunConfig
    from rankadaptor_plugin.context import Registries
    from rankadaptor_plugin.objective import Objective
    from rankadaptor_plugin.ranks import RankSpace
    from rankadaptor_plugin.search import Evaluate
    from rankadaptor_plugin.study import TrialStore
    from rankadaptor_plugin.trials import Trial

_SECONDS = 3600.0
RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Hard limits on time: no trial begins that may not end within them.

    Attributes:
        hours: Wall time, 0 for no limit.
        gpu_hours: Hours times devices, 0 for no limit.
        devices: Devices that a fine-tune occupies.
        spent: Seconds of fine-tunes and evaluations before the search.
        reserve: Fine-tunes that are to follow for sure.
        twice: Whether as many trials again follow the search.
    """

    hours: float
    gpu_hours: float
    devices: int
    spent: float
    reserve: int
    twice: bool

    def reached(self, trials: Sequence[Trial]) -> StopReason | None:
        """Tells whether one more trial, as long as the longest so far, may exceed a limit."""
        wall = [sum(trial.seconds.values()) for trial in trials]
        device = [sum(v for k, v in t.seconds.items() if k != "search") for t in trials]
        for limit, seconds, stop in (
            (self.hours, wall, StopReason.MAX_HOURS),
            (self.gpu_hours / self.devices, device, StopReason.MAX_GPU_HOURS),
        ):
            longest = max(seconds, default=0.0)
            made = (sum(seconds) + longest) * (2 if self.twice else 1)
            if limit and self.spent + made + self.reserve * longest > limit * _SECONDS:
                return stop
        return None


def sampler_for(
    space: RankSpace,
    config: RunConfig,
    registries: Registries,
    known: Knowledge,
    objective: Objective,
) -> Callable[[int], BaseSampler]:
    """Returns what makes the sampler of one trial from a seed."""
    table, model = config.search, config.performance_model
    make_sampler = registries.samplers.get(table.method)
    make_model = registries.performance_models.get(model.name)

    def make(seed: int) -> BaseSampler:
        return make_sampler(
            SamplerSettings(
                space=space,
                seed=seed,
                search_seed=config.seed,
                initial_trials=table.initial_trials,
                candidates=table.candidates,
                final_candidates=table.final_candidates,
                performance_model=lambda: make_model(space, model, seed),
                metric=objective.metric,
                model_config=model,
                priors=known.priors,
                pareto=table.pareto,
            )
        )

    return make


def random_search(
    space: RankSpace,
    evaluate: Evaluate,
    store: TrialStore,
    config: RunConfig,
    registries: Registries,
    objective: Objective,
    trials: int,
    on_trial: Callable[[Trial], None],
) -> SearchResult:
    """Makes as many trials of random allocations: what a search without any model finds.

    The seed of the fine-tunes is that of the search; that of the allocations is another one.
    """
    table = replace(
        config.search, method=RANDOM, max_trials=max(2, trials), rung=0.0, initial_trials=0
    )
    nothing = Knowledge(space=space, priors=())
    make = sampler_for(space, replace(config, search=table), registries, nothing, objective)
    return search(
        space, evaluate, store, lambda seed: make(seed ^ 1), table, objective, config.seed, on_trial
    )


def front(trials: Sequence[Trial], space: RankSpace) -> list[Trial]:
    """Returns the complete trials that none beats in both score and parameters, smallest first."""
    complete = [t for t in trials if t.state is TrialState.COMPLETE and t.objective is not None]

    def size(trial: Trial) -> tuple[int, float]:
        return space.parameters(trial.allocation), -(trial.objective or 0.0)

    found: list[Trial] = []
    for trial in sorted(complete, key=size):
        if not found or (trial.objective or 0.0) > (found[-1].objective or 0.0):
            found.append(trial)
    return found
