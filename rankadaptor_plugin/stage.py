"""The recovery stage ``rankadaptor``: noise floor, search, confirm, deliver.

Each step is handed functions that fine-tune and score, and knows nothing else of models.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin import adapters
from rankadaptor_plugin.confirmation import Confirmation, Confirmed, fine_tunes, fresh_seeds
from rankadaptor_plugin.context import Recovered, RunContext, SamplerSettings
from rankadaptor_plugin.fine_tuning import FineTuner
from rankadaptor_plugin.noise import Noise, measure
from rankadaptor_plugin.objective import Objective, objective_metric, reported_target, spreads
from rankadaptor_plugin.run_folder import RunFolder
from rankadaptor_plugin.scores import Score
from rankadaptor_plugin.search import SearchResult, StopReason, search
from rankadaptor_plugin.statistics import Comparison, compare
from rankadaptor_plugin.study import TrialStore
from rankadaptor_plugin.summary import stage_summary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from optuna.samplers import BaseSampler

    from rankadaptor_plugin.pruned_model import PrunedModel
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
            pruned.model, pruned.pruned_layers, context.config.rank_space
        )
        confirm = self.config.confirm
        self.seeds = fresh_seeds(self.config.seed, confirm.choosing_seeds, confirm.seeds)
        self.verdict_metric = context.oracle.metrics("report")[0]
        self.objective = self._objective()
        self.tuner = FineTuner(
            pruned, context, self.folder, self.objective, self.seeds.comparing[0]
        )

    def run(self) -> Recovered:
        with self.tuner.cleared():
            noise = self.noise() if self.config.noise.seeds else None
            with (
                self.folder.timed("search") as add_seconds,
                TrialStore.open(self.folder.study_url, "search") as store,
            ):
                self._go_on(store, noise)
                # A search that was begun already is brought to its end.
                drowned = (
                    noise is not None
                    and noise.is_drowned
                    and all(trial.allocation in noise.runs for trial in store.trials())
                )
                if drowned and self.config.noise.if_drowned == "uniform":
                    found = SearchResult(
                        trials=tuple(store.trials()), stop=StopReason.NOISE, interrupted=0
                    )
                    finalists = [self.space.uniform()]
                else:
                    found = self._search(store, add_seconds)
                    finalists = found.finalists(self.config.confirm.finalists)
            with (
                self.folder.timed("confirm") as add_seconds,
                TrialStore.open(self.folder.study_url, "confirm") as store,
            ):
                confirmed = self._confirm(finalists, store, add_seconds)
            with self.folder.timed("deliver"):
                return self._deliver(found, confirmed, noise)

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

    def _search(self, store: TrialStore, add_seconds: Callable[[], None]) -> SearchResult:
        config, hook = self.config.search, self.context.hook

        def sampler_for(seed: int) -> BaseSampler:
            registries, model = self.context.registries, self.config.performance_model
            make_model = registries.performance_models.get(model.name)
            return registries.samplers.get(config.sampler)(
                SamplerSettings(
                    space=self.space,
                    seed=seed,
                    initial_trials=config.initial_trials,
                    candidates=config.candidates,
                    performance_model=lambda: make_model(self.space, model, seed),
                    metric=self.objective.metric,
                )
            )

        def on_trial(trial: Trial) -> None:
            add_seconds()
            hook.rankadaptor_on_progress(
                stage="search", done=trial.position + 1, total=config.max_trials
            )
            hook.rankadaptor_after_trial(trial=trial, context=self.context)

        return search(
            self.space,
            self.tuner.evaluate,
            store,
            sampler_for,
            config,
            self.objective,
            self.config.seed,
            on_trial,
        )

    def _confirm(
        self,
        finalists: Sequence[RankAllocation],
        store: TrialStore,
        add_seconds: Callable[[], None],
    ) -> Confirmed:
        uniform_budget = self.config.rank_space.budget == "uniform"

        def progress(done: int, total: int) -> None:
            add_seconds()
            self.context.hook.rankadaptor_on_progress(stage="confirm", done=done, total=total)

        def baseline_for(allocation: RankAllocation) -> RankAllocation:
            if uniform_budget:
                return self.space.uniform()
            return self.space.evenly(self.space.parameters(allocation))

        progress(0, fine_tunes(len(finalists), self.seeds))
        return Confirmation(
            choose=self.tuner.search_run,
            compare=self.tuner.report_run,
            folder=self.folder,
            store=store,
            seeds=self.seeds,
            on_run=progress,
            is_whole=self.tuner.is_whole,
        ).confirm(finalists, baseline_for)

    def _deliver(self, found: SearchResult, confirmed: Confirmed, noise: Noise | None) -> Recovered:
        comparisons = self._comparisons(confirmed)
        deciding = comparisons.get(self.verdict_metric)
        gain = deciding is not None and deciding.is_gain
        delivered = confirmed.searched if gain and confirmed.searched else confirmed.baseline
        source = self.folder.path / self.tuner.adapter_name(delivered)
        adapter = self.folder.write_folder(
            "adapter", lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True)
        )
        summary = stage_summary(
            found,
            confirmed,
            comparisons,
            delivered,
            self.space,
            self.config,
            self.context.oracle,
            self.objective,
            noise,
        )
        named = {"uniform": confirmed.baseline, "searched": confirmed.searched}
        summary["adapters"] = {
            name: self.tuner.adapter_name(allocation)
            for name, allocation in named.items()
            if allocation is not None
        }
        return Recovered(adapter=adapter, allocation=delivered, summary=summary)

    def _comparisons(self, confirmed: Confirmed) -> dict[str, Comparison]:
        if confirmed.searched is None:
            return {}
        searched, baseline = (
            confirmed.reports(a) for a in (confirmed.searched, confirmed.baseline)
        )
        confidence = self.config.confirm.confidence
        weights = self.context.oracle.weights("report")
        if target := reported_target(self.config.oracle, self.context.oracle):
            weights = {target: 1.0}
        return {
            metric: compare(searched, baseline, metric, weights, confidence=confidence)
            for metric in self.context.oracle.metrics("report")
        }
