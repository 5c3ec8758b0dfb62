"""The recovery stage ``rankadaptor``: search, confirm, deliver.

The one place where the search meets models, adapters and oracles: it hands `search` a function
that fine-tunes and scores, and nothing else.
"""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from rankadaptor_plugin import adapters
from rankadaptor_plugin.confirmation import (
    ConfirmationRun,
    Confirmed,
    confirm,
    fresh_seeds,
    run_name,
)
from rankadaptor_plugin.context import Recovered, RunContext, SamplerSettings
from rankadaptor_plugin.ranks import RankAllocation, RankSpace
from rankadaptor_plugin.recovery import recover
from rankadaptor_plugin.run_folder import RunFolder
from rankadaptor_plugin.scores import METRICS, Score
from rankadaptor_plugin.search import SearchResult, search
from rankadaptor_plugin.statistics import Comparison, compare
from rankadaptor_plugin.study import TrialStore
from rankadaptor_plugin.summary import stage_summary
from rankadaptor_plugin.trials import Outcome, Trial

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from optuna.samplers import BaseSampler

    from rankadaptor_plugin.pruned_model import PrunedModel


def recover_pruned(pruned: PrunedModel, context: RunContext) -> Recovered:
    """Searches the rank allocation of a pruned model, confirms it and delivers an adapter.

    The model comes back without adapter, as it was.

    Raises:
        RankSpaceError: If the run file's rank space does not fit the model.
        RecoveryError: If fine-tunes fail for good; finished trials stay.
    """
    return _Stage(pruned, context).run()


def rank_space(pruned: PrunedModel, context: RunContext) -> RankSpace:
    """Returns the rank space S of a pruned model as the run file describes it."""
    config = context.config.rank_space
    costs = adapters.rank_costs(pruned.model)
    everywhere = config.search == "all"
    return RankSpace(
        candidates=config.candidates,
        searchable=tuple(everywhere or cut for cut in pruned.pruned_layers),
        default_rank=config.default_rank,
        costs=costs,
        budget=config.default_rank * sum(costs) if config.budget == "uniform" else None,
    )


class _Stage:
    """One run of the stage; holds what its steps share."""

    def __init__(self, pruned: PrunedModel, context: RunContext) -> None:
        self.pruned = pruned
        self.context = context
        self.config = context.config
        self.folder = RunFolder(context.folder)
        self.space = rank_space(pruned, context)
        self.seeds = fresh_seeds(self.config.seed, self.config.confirm.seeds)
        self.resident: Any = pruned.model  # wrapped by PEFT from the first adapter on

    def run(self) -> Recovered:
        try:
            with (
                self.folder.timed("search") as add_seconds,
                TrialStore.open(self.folder.study_url, "search") as store,
            ):
                found = self._search(store, add_seconds)
            with (
                self.folder.timed("confirm") as add_seconds,
                TrialStore.open(self.folder.study_url, "confirm") as store,
            ):
                confirmed = self._confirm(found, store, add_seconds)
            with self.folder.timed("deliver"):
                return self._deliver(found, confirmed)
        finally:
            if isinstance(self.resident, PeftModel):
                self.resident.unload()

    def _search(self, store: TrialStore, add_seconds: Callable[[], None]) -> SearchResult:
        config = self.config.search
        hook, earlier = self.context.hook, store.trials()
        hook.rankadaptor_on_progress(stage="search", done=len(earlier), total=config.max_trials)
        if earlier:
            hook.rankadaptor_on_resume(trials=earlier, context=self.context)

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
                    metric=self.config.oracle.objective,
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
            self._evaluate,
            store,
            sampler_for,
            config,
            self._objective,
            self.config.seed,
            on_trial,
        )

    def _evaluate(self, allocation: RankAllocation, fidelity: float, seed: int) -> Outcome:
        if not isinstance(self.resident, PeftModel):
            # Wrapped here already: a first fine-tune that diverges must not leave an adapter
            # behind in a model that passes for a plain one.
            alpha = self.config.recovery.alpha_over_rank
            self.resident = adapters.attach(
                self.resident, allocation, seed=seed, alpha_over_rank=alpha
            )
        recovered = recover(
            self.resident,
            allocation,
            self.context.corpus,
            self.config.recovery,
            seed=seed,
            fidelity=fidelity,
        )
        self.resident = recovered.model
        began = time.perf_counter()
        score = self.context.oracle.score(recovered.model, "search")
        return Outcome(
            score=score,
            train_loss=recovered.train_loss,
            seconds={"recovery": recovered.seconds, "oracle": time.perf_counter() - began},
        )

    def _objective(self, score: Score) -> float:
        oracle = self.config.oracle
        if oracle.target:
            return score.tasks[oracle.target].values[oracle.objective]
        return score.mean(oracle.objective, self.context.oracle.weights())

    def _confirm(
        self, found: SearchResult, store: TrialStore, add_seconds: Callable[[], None]
    ) -> Confirmed:
        finalists = found.finalists(self.config.confirm.finalists)
        uniform_budget = self.config.rank_space.budget == "uniform"

        def progress(done: int, total: int) -> None:
            add_seconds()
            self.context.hook.rankadaptor_on_progress(stage="confirm", done=done, total=total)

        def baseline_for(allocation: RankAllocation) -> RankAllocation:
            if uniform_budget:
                return self.space.uniform()
            return self.space.evenly(self.space.parameters(allocation))

        progress(0, (len(finalists) + 1) * len(self.seeds))
        return confirm(
            finalists,
            baseline_for,
            self._confirmation_run,
            self.folder,
            store,
            self.seeds,
            progress,
        )

    def _confirmation_run(self, allocation: RankAllocation, seed: int) -> ConfirmationRun:
        outcome = self._evaluate(allocation, 1.0, seed)
        began = time.perf_counter()
        report = self.context.oracle.score(self.resident, "report")
        oracle_seconds = outcome.seconds["oracle"] + time.perf_counter() - began
        if seed == self.seeds[0]:
            self.folder.write_folder(f"adapters/{run_name(allocation, seed)}", self._save_adapter)
        return ConfirmationRun(
            search=outcome.score,
            report=report,
            objective=self._objective(outcome.score),
            train_loss=outcome.train_loss,
            seconds={**outcome.seconds, "oracle": oracle_seconds},
        )

    def _save_adapter(self, folder: Path) -> None:
        # The model was pruned in memory; PEFT needs telling where its base lies on disk.
        base = str(self.folder.pruned.resolve())
        self.resident.peft_config[adapters.ADAPTER].base_model_name_or_path = base
        self.resident.save_pretrained(folder)

    def _deliver(self, found: SearchResult, confirmed: Confirmed) -> Recovered:
        comparisons = self._comparisons(confirmed)
        accuracy = comparisons.get("accuracy")
        gain = accuracy is not None and accuracy.is_gain
        delivered = confirmed.searched if gain and confirmed.searched else confirmed.baseline
        source = self.folder.path / "adapters" / run_name(delivered, confirmed.seeds[0])
        adapter = self.folder.write_folder(
            "adapter", lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True)
        )
        return Recovered(
            adapter=adapter,
            allocation=delivered,
            summary=stage_summary(
                found,
                confirmed,
                comparisons,
                delivered,
                self.space,
                self.config,
                self.context.oracle.weights(),
            ),
        )

    def _comparisons(self, confirmed: Confirmed) -> dict[str, Comparison]:
        if confirmed.searched is None:
            return {}
        searched, baseline = (
            [run.report for run in confirmed.runs[a]]
            for a in (confirmed.searched, confirmed.baseline)
        )
        target, confidence = self.config.oracle.target, self.config.confirm.confidence
        weights = {target: 1.0} if target else self.context.oracle.weights()
        return {
            metric: compare(searched, baseline, metric, weights, confidence=confidence)
            for metric in METRICS
        }
