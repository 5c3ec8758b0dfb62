"""The recovery stage ``rankadaptor``: noise floor, search, confirm, deliver.

Each step is handed functions that fine-tune and score, and knows nothing else of models.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.oracle.oracle import Objective, objective_metric, reported_target
from rankadaptor_plugin.pipeline.context import Recovered, RunContext
from rankadaptor_plugin.pipeline.fine_tuning import FineTuner
from rankadaptor_plugin.pipeline.method_race import (
    found_entrants,
    given_entrants,
    trained_parameters,
)
from rankadaptor_plugin.pipeline.search_step import SearchStep, own_seconds
from rankadaptor_plugin.pipeline.summary import StageResults, stage_summary
from rankadaptor_plugin.recovery.slots import rank_space
from rankadaptor_plugin.search.study import TrialStore
from rankadaptor_plugin.verdict.confirmation import Confirmation, fresh_seeds
from rankadaptor_plugin.verdict.noise import Noise, Question, measure
from rankadaptor_plugin.verdict.race import BEST_RANDOM, FINALIST, RECOVERED, Entrant, Rules

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.search.search import SearchResult
    from rankadaptor_plugin.verdict.race import Confirmed


def measure_noise(pruned: PrunedModel, context: RunContext) -> dict[str, Any] | None:
    """Takes the noise floor alone, which a later search goes on from.

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
    stage = _Stage(pruned, context)
    config, folder = context.config, stage.folder
    with stage.tuner.cleared():
        noise = stage.noise() if config.searches and config.noise.seeds else None
        searched = stage.step.run(noise)
        drawn = None
        if searched.is_searched and config.confirm.best_random:
            drawn = stage.step.random_trials(len(searched.trials))
        with (
            folder.timed("confirm") as add_seconds,
            TrialStore.open(folder.study_url, "confirm") as store,
        ):
            confirmed = stage.confirm(searched, drawn, store, add_seconds)
        with folder.timed("deliver"):
            extra = own_seconds(noise, searched.trials)
            extra += [trial.seconds for trial in drawn.trials] if drawn else []
            return stage.deliver(searched, confirmed, noise, extra)


class _Stage:
    """The steps of the stage, and what they share."""

    def __init__(self, pruned: PrunedModel, context: RunContext) -> None:
        self.pruned = pruned
        self.context = context
        self.config = context.config
        self.folder = RunFolder(context.folder)
        self.space = rank_space(
            pruned.model, pruned.pruned_layers, self.config.rank_space, self.config.recovery
        )
        self.methods = given_entrants(self.config.recovery.methods, self.space)
        self.seeds = fresh_seeds(self.config.seed, self.config.confirm.seeds)
        self.verdict_metric = context.oracle.metrics("report")[0]
        self.objective = self._objective()
        self.tuner = FineTuner(pruned, context, self.folder, self.objective, self.seeds[0])
        self.step = SearchStep(pruned, context, self.folder, self.space, self.objective, self.tuner)

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
                Question(
                    metrics=oracle.metrics("search"),
                    decisive=self.verdict_metric,
                    weights=oracle.weights("search"),
                    report_documents={task: len(ids) for task, ids in reported.items()},
                ),
                progress,
            )
            if found is not None:
                self.folder.write_json("noise.json", found.to_json())
        return found

    def _objective(self) -> Objective:
        config, oracle = self.config.oracle, self.context.oracle
        metric = objective_metric(config, oracle)
        return Objective(metric=metric, target=config.target, weights=oracle.weights("search"))

    def confirm(
        self,
        found: SearchResult,
        others: SearchResult | None,
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
            return self.space.evenly(
                self.space.parameters(allocation), everywhere=config.search.is_fixed
            )

        progress(0, config.race_fine_tunes)
        race = Confirmation(
            run=self.tuner.report_run,
            folder=self.folder,
            store=store,
            rules=Rules(
                seeds=self.seeds,
                confidence=confirm.confidence,
                metric=self.verdict_metric,
                weights=self._verdict_weights(),
            ),
            on_run=progress,
            is_whole=self.tuner.is_whole,
        )
        finalists = found.finalists(confirm.finalists if found.is_searched else 1)
        ranks = [(FINALIST, allocation) for allocation in finalists if config.races_ranks]
        ranks += [(BEST_RANDOM, others.best.allocation)] if others else []
        entrants = [
            Entrant(label=label, allocation=allocation, baseline=baseline_for(allocation))
            for label, allocation in ranks
        ]
        methods, reference = list(self.methods), self.space.limited_uniform()
        if entrants:
            methods += found_entrants(config.recovery.methods, entrants[0], reference)
        return race.confirm([*entrants, *methods], reference)

    def _verdict_weights(self) -> dict[str, float]:
        if target := reported_target(self.config.oracle, self.context.oracle):
            return {target: 1.0}
        return self.context.oracle.weights("report")

    def deliver(
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
        results = StageResults(
            search=found,
            confirmed=confirmed,
            noise=noise,
            knowledge=self.step.knowledge.worth(found.trials),
            seconds=extra,
            trained=self._trained,
            adapters={
                name: self.tuner.adapter_name(allocation)
                for name, allocation in confirmed.models.items()
                if name != RECOVERED
            },
        )
        summary = stage_summary(results, self.context, self.space, self.objective)
        return Recovered(adapter=adapter, allocation=delivered, summary=summary)

    def _trained(self, allocation: RankAllocation) -> int:
        adapter = self.folder.path / self.tuner.adapter_name(allocation)
        return trained_parameters(allocation, self.space, self.config.recovery, adapter)
