"""The search as a step of a run: its sampler, its limits in time, and random search beside it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rankadaptor_plugin.models.device import device_count
from rankadaptor_plugin.pipeline.layer_features import layer_features
from rankadaptor_plugin.search.allocations import given_allocation
from rankadaptor_plugin.search.samplers import SamplerSettings
from rankadaptor_plugin.search.search import SearchResult, StopReason, search
from rankadaptor_plugin.search.space import LayerFeatures
from rankadaptor_plugin.search.study import TrialStore
from rankadaptor_plugin.search.transfer.transfer import Knowledge, read_knowledge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from optuna.samplers import BaseSampler

    from rankadaptor_plugin.config.tables import SearchConfig
    from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
    from rankadaptor_plugin.core.run_folder import RunFolder
    from rankadaptor_plugin.core.trials import Trial
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.oracle.oracle import Objective
    from rankadaptor_plugin.pipeline.context import RunContext
    from rankadaptor_plugin.pipeline.fine_tuning import FineTuner
    from rankadaptor_plugin.search.performance.performance_model import PriorEffects
    from rankadaptor_plugin.verdict.noise import Noise

logger = logging.getLogger(__name__)

_SECONDS = 3600.0
_RANDOM = "random"  # the method, and the study of its trials
_LEAST = 2  # trials that a search must complete


@dataclass(frozen=True, kw_only=True)
class TimeLimits:
    """Hard limits on time: no trial begins that may not end within them.

    Attributes:
        hours: Wall time, 0 for no limit.
        gpu_hours: Hours times devices, 0 for no limit.
        devices: Devices that a fine-tune occupies.
        spent: Seconds of fine-tunes and evaluations before the search.
        reserve: Fine-tunes that are to follow for sure.
        scoring: What scoring one of these takes, as a multiple of scoring a trial.
        twice: Whether as many trials again follow the search.
    """

    hours: float
    gpu_hours: float
    devices: int
    spent: float
    reserve: int
    scoring: float
    twice: bool

    def reached(self, trials: Sequence[Trial]) -> StopReason | None:
        """Returns the limit that one more trial, as long as the longest so far, may exceed."""
        wall = [sum(trial.seconds.values()) for trial in trials]
        device = [sum(v for k, v in t.seconds.items() if k != "search") for t in trials]
        scoring = max((t.seconds.get("oracle", 0.0) for t in trials), default=0.0)
        more = (self.scoring - 1) * scoring
        for limit, seconds, stop in (
            (self.hours, wall, StopReason.MAX_HOURS),
            (self.gpu_hours / self.devices, device, StopReason.MAX_GPU_HOURS),
        ):
            longest = max(seconds, default=0.0)
            made = (sum(seconds) + longest) * (2 if self.twice else 1)
            follow = self.reserve * (longest + more)
            if limit and self.spent + made + follow > limit * _SECONDS:
                return stop
        return None


class SearchStep:
    """Searches as the run file says, in the studies of the run folder.

    Args:
        pruned: The pruned model.
        context: The run.
        folder: Its folder.
        space: The rank space.
        objective: What the search maximizes.
        tuner: Fine-tunes and scores.

    Attributes:
        knowledge: What was believed before the search; nothing until `run` has read it.
    """

    def __init__(
        self,
        pruned: PrunedModel,
        context: RunContext,
        folder: RunFolder,
        space: RankSpace,
        objective: Objective,
        tuner: FineTuner,
    ) -> None:
        self._pruned, self._context, self._folder = pruned, context, folder
        self._space, self._objective, self._tuner = space, objective, tuner
        self._config, self._hook = context.config, context.hook
        self.knowledge = Knowledge(space=space, priors=())

    def run(self, noise: Noise | None) -> SearchResult:
        """Searches, unless there is nothing to search for.

        Args:
            noise: The noise floor, whose fine-tunes begin the search; None if not measured.
        """
        with (
            self._folder.timed("search") as add_seconds,
            TrialStore.open(self._folder.study_url, "search") as store,
        ):
            features = self._features(store)
            store.claim(self._space, features.to_json())
            if self._config.search.is_fixed:
                return _unsearched(store, StopReason.FIXED, self._given())
            if not self._config.searches:
                return _unsearched(store, StopReason.METHODS)
            self._go_on(store, noise)
            # A search that was begun already is brought to its end.
            hopeless = (
                noise is not None
                and noise.is_below_noise
                and all(trial.allocation in noise.runs for trial in store.trials())
            )
            if hopeless and not self._config.noise.search_despite_noise:
                return _unsearched(store, StopReason.NOISE, self._space.limited_uniform())
            self.knowledge = read_knowledge(
                self._space, features, self._config.search, self._objective.metric
            )
            return self._search(store, noise, add_seconds)

    def random_trials(self, count: int) -> SearchResult:
        """Makes as many trials of random allocations: what a search without any model finds.

        The seed of the fine-tunes is that of the search; that of the allocations is another one.
        """
        total = max(_LEAST, count)
        table = replace(
            self._config.search,
            method=_RANDOM,
            n_trials=total,
            n_startup_trials=0,
            pareto=False,
            meta="",
        )
        make = self._sampler_for(table, ())
        with (
            self._folder.timed(_RANDOM) as add_seconds,
            TrialStore.open(self._folder.study_url, _RANDOM) as store,
        ):

            def on_trial(trial: Trial) -> None:
                add_seconds()
                self._progress(_RANDOM, trial.position + 1, total)

            self._progress(_RANDOM, len(store.trials()), total)
            return search(
                self._space,
                self._tuner.search_run,
                store,
                lambda seed: make(seed ^ 1),
                table,
                self._config.seed,
                on_trial,
            )

    def _sampler_for(
        self, table: SearchConfig, priors: tuple[PriorEffects, ...]
    ) -> Callable[[int], BaseSampler]:
        """Returns the factory that makes the sampler of one trial from a seed."""
        registries, model = self._context.registries, self._config.performance_model
        make_sampler = registries.samplers.get(table.method)
        make_model = registries.performance_models.get(model.name)

        def make(seed: int) -> BaseSampler:
            return make_sampler(
                SamplerSettings(
                    space=self._space,
                    seed=seed,
                    n_startup_trials=table.n_startup_trials,
                    candidates=table.candidates,
                    final_candidates=table.final_candidates,
                    performance_model=lambda: make_model(self._space, model, seed),
                    metric=self._objective.metric,
                    priors=priors,
                    pareto=table.pareto,
                )
            )

        return make

    def _given(self) -> RankAllocation:
        """Returns the allocation that the run file names.

        Raises:
            RankSpaceError: If it does not fit the model, or exceeds a limit.
        """
        space, size = self._space, self._pruned.model.config.hidden_size
        allocation = given_allocation(self._config, space.slots, size)
        space.check_limits(allocation, "[search] allocation")
        return allocation

    def _features(self, store: TrialStore) -> LayerFeatures:
        kept = store.layers()
        if kept is None:
            return layer_features(self._pruned, self._space)
        return LayerFeatures.from_json(kept)

    def _go_on(self, store: TrialStore, noise: Noise | None) -> None:
        """Takes up earlier trials; a search begins with the fine-tunes of the noise floor."""
        total = self._config.search.n_trials
        earlier = store.trials()
        self._progress("search", len(earlier), total)
        if earlier:
            self._hook.rankadaptor_on_resume(trials=earlier, context=self._context)
        first = [] if noise is None else noise.trials(self._space)[:total]
        tried = [trial.allocation for trial in earlier]
        if tried == [trial.allocation for trial in first[: len(tried)]]:
            for trial in first[len(tried) :]:
                store.add(trial, self._space)
                self._hook.rankadaptor_after_trial(trial=trial, context=self._context)
            self._progress("search", len(store.trials()), total)

    def _search(
        self, store: TrialStore, noise: Noise | None, add_seconds: Callable[[], None]
    ) -> SearchResult:
        config = self._config
        before = own_seconds(noise, store.trials())
        limits = TimeLimits(
            hours=config.search.max_hours,
            gpu_hours=config.search.max_gpu_hours,
            devices=device_count(self._pruned.model),
            spent=sum(sum(seconds.values()) for seconds in before),
            reserve=config.race_fine_tunes,
            scoring=1 + self._report_share(),
            twice=config.confirm.best_random,
        )

        begun = store.trials()
        if limits.reached(begun) and all(
            t.allocation in (noise.runs if noise else ()) for t in begun
        ):
            logger.warning(
                "[search] max_hours or max_gpu_hours leave no time to search: the noise floor and "
                "the race, which always run, take as long. Raise the limit, or lower "
                "noise.seeds, confirm.seeds or confirm.finalists."
            )

        def on_trial(trial: Trial) -> None:
            add_seconds()
            self._progress("search", trial.position + 1, config.search.n_trials)
            self._hook.rankadaptor_after_trial(trial=trial, context=self._context)

        return search(
            self._space,
            self._tuner.search_run,
            store,
            self._sampler_for(config.search, self.knowledge.priors),
            config.search,
            config.seed,
            on_trial,
            limits.reached,
        )

    def _report_share(self) -> float:
        """Returns report documents per search document."""
        documents = self._context.oracle.describe()["documents"]
        search, report = (sum(map(len, documents[p].values())) for p in ("search", "report"))
        return float(report / max(1, search))

    def _progress(self, stage: str, done: int, total: int) -> None:
        self._hook.rankadaptor_on_progress(stage=stage, done=done, total=total)


def _unsearched(store: TrialStore, stop: StopReason, *allocations: RankAllocation) -> SearchResult:
    return SearchResult(
        trials=tuple(store.trials()), stop=stop, interrupted=0, recommended=allocations
    )


def own_seconds(noise: Noise | None, trials: Sequence[Trial]) -> list[dict[str, float]]:
    """Returns the seconds of the noise floor's runs that are not among the trials of the search.

    Those with the search's own seed are, where their allocations lie in its space.
    """
    tried = {trial.allocation for trial in trials}
    runs = {} if noise is None else noise.runs
    own = [several[1:] if allocation in tried else several for allocation, several in runs.items()]
    return [run.seconds for several in own for run in several]
