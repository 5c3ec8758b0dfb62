"""The recovery stage ``rankadaptor``: noise floor, search, confirm, deliver.

Each step is handed functions that fine-tune and score, and knows nothing else of models.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.config.tables import SEARCHED_RANKS, UNIFORM_LORA
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.oracle.oracle import Objective, objective_metric, reported_target
from rankadaptor_plugin.pipeline.budget import Budget
from rankadaptor_plugin.pipeline.context import Recovered, RunContext
from rankadaptor_plugin.pipeline.fine_tuning import FineTuner
from rankadaptor_plugin.pipeline.search_step import SearchStep, given_ranks, own_seconds
from rankadaptor_plugin.pipeline.summary import StageResults, stage_summary
from rankadaptor_plugin.pipeline.tune_step import TuneStep
from rankadaptor_plugin.recovery.files import adapter_parameters
from rankadaptor_plugin.recovery.methods.methods import Method, parse_method, pattern_allocation
from rankadaptor_plugin.recovery.slots import rank_space
from rankadaptor_plugin.search.search import StopReason
from rankadaptor_plugin.search.study import TrialStore
from rankadaptor_plugin.verdict.noise import Noise, Question, measure
from rankadaptor_plugin.verdict.race import (
    BEST_RANDOM,
    FINALIST,
    RECOVERED,
    STACK,
    TUNED,
    Confirmation,
    Entrant,
    Rules,
    fresh_seeds,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from rankadaptor_plugin.config.tables import RecoveryConfig, RunConfig
    from rankadaptor_plugin.core.ranks import RankSpace
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.pipeline.tune_step import Tuned
    from rankadaptor_plugin.search.search import SearchResult
    from rankadaptor_plugin.verdict.race import Confirmed


def measure_noise(pruned: PrunedModel, context: RunContext) -> dict[str, Any] | None:
    """Takes the noise floor alone, which a later search goes on from.

    Returns:
        What `Noise.to_json` returns; None if too few allocations can be fine-tuned.
    """
    stage = _Stage(pruned, context)
    with stage.tuner.cleared():
        stage.tune()
        with stage.progressing("noise") as on_run:
            noise = stage.noise(on_run)
    return noise.to_json() if noise else None


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
        stage.tune()
        noise = None
        if config.searches and config.noise.seeds:
            with stage.progressing("noise") as on_run:
                noise = stage.noise(on_run)
        searched = stage.step.run(noise)
        drawn = None
        if searched.is_searched and config.confirm.best_random:
            drawn = stage.step.random_trials(len(searched.trials))
        with (
            stage.progressing("confirm") as on_run,
            TrialStore.open(folder.study_url, "confirm") as store,
        ):
            confirmed = stage.confirm(searched, drawn, store, on_run)
        with folder.timed("deliver"):
            return stage.deliver(searched, drawn, confirmed, noise)


def check_ranks(pruned: PrunedModel, config: RunConfig) -> None:
    """Checks what a run file says of ranks and targets against the shape of a pruned model.

    Raises:
        RankSpaceError: If ranks do not fit the model, or there is nothing to search.
        ConfigError: If a target is not a matrix of the model.
    """
    space = rank_space(pruned.model, pruned.pruned_layers, config.rank_space, config.recovery)
    given_entrants(config.recovery.methods, space, space.limited_uniform())
    if config.search.is_fixed:
        given_ranks(config, space, pruned.model.config.hidden_size)


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
        self.seeds = fresh_seeds(self.config.seed, self.config.confirm.seeds)
        self.verdict_metric = context.oracle.metrics("report")[0]
        self.objective = self._objective()
        self.budget = context.budget or Budget(self.config)
        self.tuner = FineTuner(
            pruned, context, self.folder, self.objective, self.seeds[0], self.budget
        )
        self.step = SearchStep(
            pruned, context, self.folder, self.space, self.objective, self.tuner, self.budget
        )

    @contextlib.contextmanager
    def progressing(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Times a step; yields what it tells the number of finished runs and of all runs."""
        with self.folder.timed(name) as add_seconds:

            def progress(done: int, total: int) -> None:
                add_seconds()
                self.context.hook.rankadaptor_on_progress(stage=name, done=done, total=total)

            yield progress

    def tune(self) -> None:
        """Chooses the learning rate and the parts of the stack."""
        if not self.config.tune.learning_rates:
            return
        with self.progressing("tune") as on_run:
            step = TuneStep(
                self.tuner.search_run,
                self.folder,
                self.config,
                self.objective,
                self.space.limited_uniform(),
                parts=self.context.parts,
                on_run=on_run,
                allows=partial(self.budget.allows, "tune"),
            )
            self.tuner.tuned = step.run()

    @property
    def noise(self) -> Callable[[Callable[[int, int], None]], Noise | None]:
        """`measure` with all arguments but the last."""
        oracle = self.context.oracle
        reported = oracle.describe()["documents"]["report"]
        question = Question(
            metrics=oracle.metrics("search"),
            decisive=self.verdict_metric,
            weights=oracle.weights("search"),
            report_documents={task: len(ids) for task, ids in reported.items()},
        )
        return partial(
            measure,
            self.space,
            self.tuner.search_run,
            self.folder,
            self.config,
            question,
            allows=partial(self.budget.allows, "noise"),
        )

    def _objective(self) -> Objective:
        config, oracle = self.config.oracle, self.context.oracle
        metric = objective_metric(config, oracle)
        return Objective(metric=metric, target=config.target, weights=oracle.weights("search"))

    def confirm(
        self,
        found: SearchResult,
        others: SearchResult | None,
        store: TrialStore,
        on_run: Callable[[int, int], None],
    ) -> Confirmed:
        confirm, config = self.config.confirm, self.config

        seeds = fresh_seeds(config.seed, confirm.seeds + self._more_seeds(found))
        on_run(0, config.race_fine_tunes)
        race = Confirmation(
            run=self.tuner.report_run,
            folder=self.folder,
            store=store,
            rules=Rules(
                seeds=seeds,
                confidence=confirm.confidence,
                metric=self.verdict_metric,
                weights=self._verdict_weights(),
            ),
            on_run=on_run,
            is_whole=self.tuner.is_whole,
            allows=partial(self.budget.allows, "confirm"),
        )
        reference, entrants = race_entrants(
            config, self.space, self.tuner.tuned, found, others.best.allocation if others else None
        )
        return race.confirm(entrants, reference)

    def _more_seeds(self, found: SearchResult) -> int:
        """Returns the seeds that the fine-tunes of a skipped search pay for, at most as many again.

        Of a search that could not rise above the noise, that is: the race then tells smaller gains.
        """
        if found.stop is not StopReason.NOISE:
            return 0
        saved = self.config.search.n_trials - len(found.trials)
        arms = 1 + self.config.levers + len(self.config.recovery.methods) - 1
        return max(0, min(self.config.confirm.seeds, saved // arms))

    def _verdict_weights(self) -> dict[str, float]:
        if target := reported_target(self.config.oracle, self.context.oracle):
            return {target: 1.0}
        return self.context.oracle.weights("report")

    def deliver(
        self,
        found: SearchResult,
        others: SearchResult | None,
        confirmed: Confirmed,
        noise: Noise | None,
    ) -> Recovered:
        others_trials = others.trials if others else ()
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
            seconds=[*own_seconds(noise, found.trials), *(t.seconds for t in others_trials)],
            trained=self._trained,
            random=len(others_trials),
            tuned=self.tuner.tuned,
            cut=self.budget.refused,
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
        resolved = self.tuner.tuned.resolved(allocation)
        return trained_parameters(resolved, self.space, self.config.recovery, adapter)


def race_entrants(
    config: RunConfig,
    space: RankSpace,
    tuned: Tuned,
    found: SearchResult,
    random: RankAllocation | None = None,
) -> tuple[RankAllocation, list[Entrant]]:
    """Returns LoRA by the recipe, and what races beside it.

    Args:
        config: The run file.
        space: The rank space.
        tuned: Learning rate and stack.
        found: The search.
        random: The best random allocation, if it races.
    """
    finalists = found.finalists(config.confirm.finalists if found.is_searched else 1)
    ranks = [(FINALIST, allocation) for allocation in finalists if config.races_ranks]
    ranks += [(BEST_RANDOM, random)] if random else []
    uniform = space.limited_uniform()
    reference, plain = tuned.by_recipe(uniform), tuned.plain(uniform)
    levers = [Entrant(label=STACK, allocation=uniform, baseline=reference)] if tuned.parts else []
    levers.append(Entrant(label=TUNED, allocation=plain, baseline=reference))
    entrants = [entrant for entrant in levers if entrant.allocation != reference]
    entrants += [
        Entrant(label=label, allocation=a, baseline=_even(a, space, config), is_ranks=True)
        for label, a in ranks
    ]
    entrants += given_entrants(config.recovery.methods, space, reference)
    if ranks:
        entrants += found_entrants(config.recovery.methods, ranks[0][1], reference)
    return reference, entrants


def _even(allocation: RankAllocation, space: RankSpace, config: RunConfig) -> RankAllocation:
    """Returns even ranks of the same size, on the same stack and with the same settings."""
    uniform = space.uniform()
    if config.common_baseline or allocation.ranks == uniform.ranks:
        even = uniform
    else:
        even = space.evenly(space.parameters(allocation), everywhere=config.search.is_fixed)
    return replace(even, settings=allocation.settings)


def given_entrants(
    methods: Sequence[str], space: RankSpace, reference: RankAllocation
) -> list[Entrant]:
    """Returns the fine-tunes of each recovery method, and their baselines.

    A method has the ranks of uniform LoRA and is compared with LoRA by the recipe; a pattern, which
    gives the ranks by layer, with the most even allocation of as many parameters on the same stack.
    The searched ranks, what takes them, and uniform LoRA itself are left out.

    Raises:
        ConfigError: If a method is unknown.
        RankSpaceError: If ranks do not fit the model, or exceed a limit.
    """
    parsed = map(parse_method, methods)
    plain = parse_method(UNIFORM_LORA)
    return [
        _entrant(method, space, reference)
        for method in parsed
        if method.name != SEARCHED_RANKS and method != plain
    ]


def found_entrants(
    methods: Sequence[str], best: RankAllocation, reference: RankAllocation
) -> list[Entrant]:
    """Returns the same for methods such as ``rankadaptor+dora``, which take the best ranks.

    Raises:
        ConfigError: If a method is unknown.
    """
    return [
        Entrant(label=str(method), allocation=_with(best, method), baseline=reference)
        for method in map(parse_method, methods)
        if method.name == SEARCHED_RANKS and method != parse_method(SEARCHED_RANKS)
    ]


def _with(allocation: RankAllocation, method: Method) -> RankAllocation:
    """Returns ranks with what is left of a method beside its ranks; the stack if nothing is."""
    rest = str(replace(method, name=UNIFORM_LORA, ranks=()))
    return replace(allocation, method="" if rest == UNIFORM_LORA else rest)


def _entrant(method: Method, space: RankSpace, reference: RankAllocation) -> Entrant:
    text, uniform = str(method), space.limited_uniform()
    if method.name != "pattern":
        allocation = replace(uniform, method=text)
        return Entrant(label=text, allocation=allocation, baseline=reference)
    by_layer = pattern_allocation(method.ranks, space.layers).ranks
    ranks = tuple(rank for rank in by_layer for _ in space.groups)
    plain = space.with_defaults(RankAllocation(ranks))
    space.check_limits(plain, f'[recovery] methods: "{text}"')
    allocation = _with(plain, method)
    even = space.evenly(space.parameters(plain), everywhere=True)
    return Entrant(
        label=text,
        allocation=allocation,
        baseline=replace(even, method=allocation.method),
        is_ranks=True,
    )


def trained_parameters(
    allocation: RankAllocation, space: RankSpace, config: RecoveryConfig, adapter: Path
) -> int:
    """Returns the number of parameters that the fine-tune of an allocation trains.

    Of AdaLoRA, those that are left in the end; it begins with half as many again.

    Args:
        allocation: The ranks, and the method.
        space: The rank space.
        config: The ``[recovery]`` table.
        adapter: Folder of its adapter: some methods choose the ranks themselves.
    """
    method = parse_method(allocation.method or UNIFORM_LORA)
    if method.name == "none":
        return 0
    if method.name == "lora-fa":  # the other half keeps its first weights
        return adapter_parameters(adapter, "lora_B")
    if method.name != UNIFORM_LORA:
        return adapter_parameters(adapter)
    # PiSSA is saved with twice the ranks, as what it adds to the unchanged weights.
    if not (method.dora or config.use_dora):
        return space.parameters(allocation)
    return space.parameters(allocation) + adapter_parameters(adapter, "lora_magnitude_vector")
