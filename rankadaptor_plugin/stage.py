"""The recovery stage ``rankadaptor``: noise floor, search, confirm, deliver.

Each step is handed functions that fine-tune and score, and knows nothing else of models.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin import adapters
from rankadaptor_plugin.config import FIXED
from rankadaptor_plugin.confirmation import Confirmation, fresh_seeds
from rankadaptor_plugin.context import Recovered, RunContext
from rankadaptor_plugin.device import device_count
from rankadaptor_plugin.fine_tuning import FineTuner
from rankadaptor_plugin.knowledge import Knowledge, knowledge
from rankadaptor_plugin.layer_features import layer_features
from rankadaptor_plugin.noise import Noise, measure
from rankadaptor_plugin.objective import Objective, objective_metric, reported_target, spreads
from rankadaptor_plugin.paper_allocations import named_allocation
from rankadaptor_plugin.run_folder import RunFolder
from rankadaptor_plugin.scores import Score
from rankadaptor_plugin.search import SearchResult, StopReason, search
from rankadaptor_plugin.search_step import Limits, random_search, sampler_for
from rankadaptor_plugin.space_record import LayerFeatures
from rankadaptor_plugin.study import TrialStore
from rankadaptor_plugin.summary import stage_summary

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rankadaptor_plugin.pruned_model import PrunedModel
    from rankadaptor_plugin.race_result import Confirmed
    from rankadaptor_plugin.ranks import RankAllocation
    from rankadaptor_plugin.trials import Trial


def measure_noise(pruned: PrunedModel, context: RunContext) -> dict[str, Any] | None:
    """Takes the noise floor alone (`rankadaptor_plugin.noise`), which a later search goes on from.

    Returns:
        What `Noise.to_json` returns; None if too few allocations can be fine-tuned.
    """
    stage = _Stage(pruned, context)
    with stage.tuner.cleared():
        found = stage.noise()
    return found.to_json() if found else None


def recover_pruned(pruned: PrunedModel, context: RunContext) -> Recovered:
    """Searches the rank allocation of a pruned model, confirms it and delivers an adapter.

    The model comes back without adapter, as it was.

    Raises:
        RankSpaceError: If the run file's rank space does not fit the model.
        RecoveryError: If fine-tunes fail for good; finished trials stay.
    """
    return _Stage(pruned, context).run()


class _Stage:
    """One run of the stage; holds what its steps share."""

    def __init__(self, pruned: PrunedModel, context: RunContext) -> None:
        self.pruned = pruned
        self.context = context
        self.config = context.config
        self.folder = RunFolder(context.folder)
        self.space = adapters.rank_space(
            pruned.model, pruned.pruned_layers, self.config.rank_space, self.config.recovery
        )
        self.seeds = fresh_seeds(self.config.seed, self.config.confirm.seeds)
        self.verdict_metric = context.oracle.metrics("report")[0]
        self.objective = self._objective()
        self.tuner = FineTuner(pruned, context, self.folder, self.objective, self.seeds[0])
        self.known = Knowledge(space=self.space, priors=())

    def run(self) -> Recovered:
        with self.tuner.cleared():
            searches = self.config.search.method != FIXED
            noise = self.noise() if searches and self.config.noise.seeds else None
            with (
                self.folder.timed("search") as add_seconds,
                TrialStore.open(self.folder.study_url, "search") as store,
            ):
                found, finalists = self._found(store, noise, add_seconds)
            wanted = self.config.confirm.best_random and found.stop is not StopReason.NOISE
            others = self._random_trials(found) if wanted else None
            with (
                self.folder.timed("confirm") as add_seconds,
                TrialStore.open(self.folder.study_url, "confirm") as store,
            ):
                best = others.best.allocation if others else None
                confirmed = self._confirm(finalists, best, store, add_seconds)
            with self.folder.timed("deliver"):
                extra = [self.known.seconds, *_own_seconds(noise, found.trials)]
                extra += [trial.seconds for trial in others.trials] if others else []
                return self._deliver(found, confirmed, noise, extra)

    def noise(self) -> Noise | None:
        """Measures the noise floor and keeps what it says in noise.json."""
        oracle = self.context.oracle
        reported = oracle.describe()["documents"]["report"]
        with self.folder.timed("noise") as add_seconds:

            def progress(done: int, total: int) -> None:
                add_seconds()
                self.context.hook.rankadaptor_on_progress(stage="noise", done=done, total=total)

            found = measure(
                self.space,
                self.tuner.search_run,
                self.folder,
                self.config,
                oracle.metrics("search"),
                self.verdict_metric,
                oracle.weights("search"),
                {task: len(ids) for task, ids in reported.items()},
                progress,
            )
            if found is not None:
                self.folder.write_json("noise.json", found.to_json())
        return found

    def _objective(self) -> Objective:
        config, oracle = self.config.oracle, self.context.oracle
        metric = objective_metric(config, oracle)
        scales: dict[str, float] = {}
        if config.normalize == "spread":
            name = "evaluations/pruned-search"
            score = self.folder.read_result(name, Score.from_json, documents=False)
            if score is None:
                score = oracle.score(self.pruned.model, "search")
                self.folder.write_json(f"{name}.json", score.to_json())
            scales = spreads(score, metric)
        return Objective(
            metric=metric, target=config.target, weights=oracle.weights("search"), scales=scales
        )

    def _go_on(self, store: TrialStore, noise: Noise | None) -> None:
        """Takes up earlier trials; a search begins with the fine-tunes of the noise floor."""
        hook, total = self.context.hook, self.config.search.max_trials
        earlier = store.trials()
        hook.rankadaptor_on_progress(stage="search", done=len(earlier), total=total)
        if earlier:
            hook.rankadaptor_on_resume(trials=earlier, context=self.context)
        first = [] if noise is None else noise.trials(self.space)[:total]
        known = [trial.allocation for trial in earlier]
        if known == [trial.allocation for trial in first[: len(known)]]:
            for trial in first[len(known) :]:
                store.add(trial, self.space)
                hook.rankadaptor_after_trial(trial=trial, context=self.context)
            done = len(store.trials())
            hook.rankadaptor_on_progress(stage="search", done=done, total=total)

    def _found(
        self, store: TrialStore, noise: Noise | None, add_seconds: Callable[[], None]
    ) -> tuple[SearchResult, list[RankAllocation]]:
        """Searches, unless there is nothing to search for; returns the finalists too."""
        config = self.config
        features = self._features(store)
        store.claim(self.space, features.to_json())
        if config.search.method == FIXED:
            allocation = named_allocation(config.search.allocation)
            adapters.module_ranks(self.pruned.model, allocation)  # says whether it fits
            found = SearchResult(trials=tuple(store.trials()), stop=StopReason.FIXED, interrupted=0)
            return found, [allocation]
        self._go_on(store, noise)
        # A search that was begun already is brought to its end.
        drowned = (
            noise is not None
            and noise.is_drowned
            and all(trial.allocation in noise.runs for trial in store.trials())
        )
        if drowned and config.noise.if_drowned == "uniform":
            found = SearchResult(trials=tuple(store.trials()), stop=StopReason.NOISE, interrupted=0)
            return found, [self.space.uniform()]
        self.known = knowledge(
            self.space, features, config.search, self.folder, config.seed, self.tuner.proxies
        )
        found = self._search(store, noise, add_seconds)
        return found, found.finalists(config.confirm.finalists)

    def _features(self, store: TrialStore) -> LayerFeatures:
        kept = store.layers()
        return (
            layer_features(self.pruned, self.space)
            if kept is None
            else LayerFeatures.from_json(kept)
        )

    def _search(
        self, store: TrialStore, noise: Noise | None, add_seconds: Callable[[], None]
    ) -> SearchResult:
        config, hook = self.config, self.context.hook
        limits = Limits(
            hours=config.search.max_hours,
            gpu_hours=config.search.max_gpu_hours,
            devices=device_count(self.pruned.model),
            spent=sum(self.known.seconds.values())
            + sum(sum(seconds.values()) for seconds in _own_seconds(noise, store.trials())),
            reserve=config.race_fine_tunes,
            twice=config.confirm.best_random,
        )

        def on_trial(trial: Trial) -> None:
            add_seconds()
            hook.rankadaptor_on_progress(
                stage="search", done=trial.position + 1, total=config.search.max_trials
            )
            hook.rankadaptor_after_trial(trial=trial, context=self.context)

        return search(
            self.space,
            self.tuner.evaluate,
            store,
            sampler_for(self.space, config, self.context.registries, self.known, self.objective),
            config.search,
            self.objective,
            config.seed,
            on_trial,
            limits.reached,
            config.confirm.finalists,
        )

    def _random_trials(self, found: SearchResult) -> SearchResult:
        """Makes as many trials of random allocations as the search made."""
        hook, total = self.context.hook, max(2, len(found.trials))
        with (
            self.folder.timed("random") as add_seconds,
            TrialStore.open(self.folder.study_url, "random") as store,
        ):

            def on_trial(trial: Trial) -> None:
                add_seconds()
                hook.rankadaptor_on_progress(stage="random", done=trial.position + 1, total=total)

            hook.rankadaptor_on_progress(stage="random", done=len(store.trials()), total=total)
            return random_search(
                self.space,
                self.tuner.evaluate,
                store,
                self.config,
                self.context.registries,
                self.objective,
                total,
                on_trial,
            )

    def _confirm(
        self,
        finalists: Sequence[RankAllocation],
        best_random: RankAllocation | None,
        store: TrialStore,
        add_seconds: Callable[[], None],
    ) -> Confirmed:
        confirm, config = self.config.confirm, self.config

        def progress(done: int, total: int) -> None:
            add_seconds()
            self.context.hook.rankadaptor_on_progress(stage="confirm", done=done, total=total)

        def baseline_for(allocation: RankAllocation) -> RankAllocation:
            uniform = self.space.uniform()
            if config.common_baseline or allocation == uniform:
                return uniform
            return self.space.evenly(self.space.parameters(allocation))

        progress(0, config.race_fine_tunes)
        return Confirmation(
            run=self.tuner.report_run,
            folder=self.folder,
            store=store,
            seeds=self.seeds,
            least_seeds=confirm.least_seeds,
            confidence=confirm.confidence,
            metric=self.verdict_metric,
            weights=self._verdict_weights(),
            on_run=progress,
            is_whole=self.tuner.is_whole,
        ).confirm(finalists, baseline_for, best_random)

    def _verdict_weights(self) -> dict[str, float]:
        if target := reported_target(self.config.oracle, self.context.oracle):
            return {target: 1.0}
        return self.context.oracle.weights("report")

    def _deliver(
        self,
        found: SearchResult,
        confirmed: Confirmed,
        noise: Noise | None,
        extra: Sequence[Mapping[str, float]],
    ) -> Recovered:
        delivered = confirmed.delivered
        source = self.folder.path / self.tuner.adapter_name(delivered)
        adapter = self.folder.write_folder(
            "adapter", lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True)
        )
        summary = stage_summary(
            found,
            confirmed,
            self.space,
            self.config,
            self.context.oracle,
            self.objective,
            noise,
            self.known.worth(found.trials),
            extra,
        )
        named = {"uniform": confirmed.baseline, "searched": confirmed.searched}
        summary["adapters"] = {
            name: self.tuner.adapter_name(allocation)
            for name, allocation in named.items()
            if allocation is not None
        }
        return Recovered(adapter=adapter, allocation=delivered, summary=summary)


def _own_seconds(noise: Noise | None, trials: Sequence[Trial]) -> list[dict[str, float]]:
    """Returns the seconds of the noise floor's runs that are not among the trials of the search.

    Those with the search's own seed are, where their allocations lie in its space.
    """
    tried = {trial.allocation for trial in trials}
    runs = {} if noise is None else noise.runs
    return [run.seconds for a, several in runs.items() for run in several[a in tried :]]
