"""The search as a step of a run: its sampler, its limits in time, and random search beside it.

`layer_features` measures the layers of a pruned model, by which one model's studies can help
another's. The features of a slot, one column each:
    relative_depth: Place of its layer in the base model, 0 = bottom, 1 = top.
    parameters_pruned: Share of the parameters of the slot's matrices that pruning took, in [0, 1].
        Removed layers count with the next one above that stayed, or with the topmost.
    importance_lost: Share of the layer's importance that pruning took, in [0, 1], the mean over the
        layers that count with it.
    log_spectral_norm: Natural logarithm of the largest singular value, mean over its matrices.
    log_stable_rank: Natural logarithm of the stable rank, that is of the squared Frobenius norm
        over the squared spectral norm; mean over its matrices.
    cost_share: Share of the parameters of uniform LoRA that lie in the slot, in [0, 1].
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rankadaptor_plugin.core.errors import OracleError, RankSpaceError, RecoveryError
from rankadaptor_plugin.core.trials import Phase, TrialState
from rankadaptor_plugin.models.structures import (
    decoder_layers,
    group_matrices,
    is_transposed,
    structure_of,
)
from rankadaptor_plugin.recovery.methods.methods import parse_method
from rankadaptor_plugin.search.allocations import given_allocation
from rankadaptor_plugin.search.samplers import SamplerSettings
from rankadaptor_plugin.search.search import LEAST_TRIALS, SearchResult, StopReason, search
from rankadaptor_plugin.search.space import LayerFeatures
from rankadaptor_plugin.search.study import TrialStore
from rankadaptor_plugin.search.transfer.transfer import Knowledge, read_knowledge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from optuna.samplers import BaseSampler
    from torch import nn

    from rankadaptor_plugin.config.tables import RunConfig, SearchConfig
    from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
    from rankadaptor_plugin.core.run_folder import RunFolder
    from rankadaptor_plugin.core.trials import Trial
    from rankadaptor_plugin.models.modeling_rankadaptor import Structure
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.models.structures import ModelShape
    from rankadaptor_plugin.oracle.oracle import Objective
    from rankadaptor_plugin.pipeline.budget import Budget
    from rankadaptor_plugin.pipeline.context import RunContext
    from rankadaptor_plugin.pipeline.fine_tuning import FineTuner
    from rankadaptor_plugin.search.performance.performance_model import PriorEffects
    from rankadaptor_plugin.verdict.noise import Noise

logger = logging.getLogger(__name__)

_RANDOM = "random"  # the method, and the study of its trials


class SearchStep:
    """Searches as the run file says, in the studies of the run folder.

    Args:
        pruned: The pruned model.
        context: The run.
        folder: Its folder.
        space: The rank space.
        objective: What the search maximizes.
        tuner: Fine-tunes and scores.
        budget: The time of the run.

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
        budget: Budget,
    ) -> None:
        self._pruned, self._context, self._folder = pruned, context, folder
        self._space, self._objective, self._tuner = space, objective, tuner
        self._config, self._hook, self._budget = context.config, context.hook, budget
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
                given = given_ranks(
                    self._config, self._space, self._pruned.model.config.hidden_size
                )
                return _unsearched(store, StopReason.FIXED, given)
            if not self._config.searches:
                return _unsearched(store, StopReason.METHODS)
            self._go_on(store, noise)
            if len(store.trials()) == (len(noise.trials(self._space)) if noise else 0):
                self._start_from_squeeze(store)
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
            return self._search(store, add_seconds)

    def random_trials(self, count: int) -> SearchResult:
        """Makes as many trials of random allocations: what a search without any model finds.

        The seed of the fine-tunes is that of the search; that of the allocations is another one.
        """
        total = max(LEAST_TRIALS, count)
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
                partial(self._spent, _RANDOM),
            )

    def _spent(self, stage: str, trials: Sequence[Trial]) -> StopReason | None:
        """Returns the limit that one more trial would exceed, and all that must follow it."""
        complete = sum(trial.state is TrialState.COMPLETE for trial in trials)
        needed = complete < LEAST_TRIALS
        is_allowed = self._budget.allows(stage, trials=len(trials) + 1, needed=needed)
        return None if is_allowed else self._budget.stop

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

    def _start_from_squeeze(self, store: TrialStore) -> None:
        """Tries first what ``squeeze`` makes of the ranks, where that races and room is left."""
        names = [m for m in self._config.recovery.methods if parse_method(m).name == "squeeze"]
        trials = store.trials()
        if not names or len(trials) >= self._config.search.n_trials:
            return
        seed, uniform = self._config.seed, self._space.limited_uniform()
        try:
            self._tuner.search_run(replace(uniform, method=names[0]), seed)
            proposed = self._tuner.nearest(self._space)
            if any(trial.allocation == proposed for trial in trials):
                return
            made = self._tuner.search_run(proposed, seed)
        except (RecoveryError, OracleError) as error:
            logger.warning("The search does not start from squeeze: %s", error)
            return
        trial = made.trial(
            position=len(trials),
            phase=Phase.INITIALIZATION,
            allocation=proposed,
            seed=seed,
            parameters=self._space.parameters(proposed),
        )
        store.add(trial, self._space)
        self._hook.rankadaptor_after_trial(trial=trial, context=self._context)

    def _search(self, store: TrialStore, add_seconds: Callable[[], None]) -> SearchResult:
        config = self._config

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
            partial(self._spent, "search"),
        )

    def _progress(self, stage: str, done: int, total: int) -> None:
        self._hook.rankadaptor_on_progress(stage=stage, done=done, total=total)


def given_ranks(config: RunConfig, space: RankSpace, hidden_size: int) -> RankAllocation:
    """Returns the allocation that the run file names.

    Raises:
        RankSpaceError: If it does not fit the model, or exceeds a limit.
    """
    allocation = given_allocation(config, space.slots, hidden_size)
    space.check_limits(allocation, "[search] allocation")
    return allocation


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


FEATURE_NAMES = (
    "relative_depth",
    "parameters_pruned",
    "importance_lost",
    "log_spectral_norm",
    "log_stable_rank",
    "cost_share",
)

_EXACT = 512
"""Up to so many rows or columns all singular values are computed, 0.1 s a matrix at most."""

_SKETCH, _PASSES = 12, 4
"""Directions and power iterations for larger matrices: the norm comes out at most 6 % too low, in
matrices of noise alone, and exact to six digits where it stands out."""


def layer_features(pruned: PrunedModel, space: RankSpace) -> LayerFeatures:
    """Measures the slots of a pruned model's rank space.

    The memory holds one matrix at a time in float32, on the CPU. A matrix of LLaMA-7B takes about
    half a second on one core.

    Args:
        pruned: The pruned model; weights that are quantized or offloaded make features unknown.
        space: Its rank space.

    Returns:
        The features `FEATURE_NAMES` of each slot.

    Raises:
        RankSpaceError: If the space is not that of this model.
    """
    structure = structure_of(pruned.model)
    groups = next((g for g in group_matrices(structure).values() if tuple(g) == space.groups), None)
    layers = decoder_layers(pruned.model)
    if groups is None or space.layers != len(layers):
        raise RankSpaceError(
            f"A rank space of {space.layers} layers with the groups {list(space.groups)} is not "
            f"that of this model: it has {len(layers)} layers of type {structure.model_type}."
        )
    spans = _spans(pruned.kept_layers, len(pruned.base_shape.layers))
    lost = pruned.importance_lost
    rows = []
    for index, (layer, number, span) in enumerate(
        zip(layers, pruned.kept_layers, spans, strict=True)
    ):
        depth = number / max(len(pruned.base_shape.layers) - 1, 1)
        importance = math.nan if lost is None else float(np.mean([lost[i] for i in span]))
        norms = {name: _norms(layer.get_submodule(name)) for name in structure.matrices}
        for names in groups.values():
            share = _share_pruned(pruned, structure, index, layer, span, names)
            spectral, stable = np.mean([norms[name] for name in names], axis=0)
            rows.append([depth, share, importance, spectral, stable])
    costs = np.array(space.costs, dtype=np.float64)
    return LayerFeatures(FEATURE_NAMES, np.column_stack([np.array(rows), costs / costs.sum()]))


def _spans(kept: Sequence[int], total: int) -> list[range]:
    """Returns for each kept layer the layers of the base model that count with it."""
    ends = [*(number + 1 for number in kept[:-1]), total]
    return [range(start, end) for start, end in zip((0, *ends[:-1]), ends, strict=True)]


def _share_pruned(
    pruned: PrunedModel,
    structure: Structure,
    index: int,
    layer: nn.Module,
    span: Sequence[int],
    names: Sequence[str],
) -> float:
    def parameters(shape: ModelShape, number: int) -> int:
        shapes = structure.shapes(layer, shape.layers[number], shape.hidden)
        return sum(math.prod(shapes[name]) for name in names)

    before = sum(parameters(pruned.base_shape, number) for number in span)
    return 1 - parameters(pruned.shape, index) / before


@torch.no_grad()
def _norms(matrix: Any) -> tuple[float, float]:
    """Returns the logarithms of spectral norm and stable rank; NaN if they cannot be had."""
    weight = matrix.weight
    if weight.is_meta or not weight.is_floating_point():
        return math.nan, math.nan
    weight = weight.detach().to("cpu", torch.float32)
    weight = weight.T if is_transposed(matrix) else weight
    spectral, frobenius = _spectral_norm(weight), float(torch.linalg.vector_norm(weight))
    if not (0 < spectral < math.inf and frobenius < math.inf):
        return math.nan, math.nan
    return math.log(spectral), max(2 * math.log(frobenius / spectral), 0.0)


def _spectral_norm(weight: torch.Tensor) -> float:
    """Returns the largest singular value; of large matrices by a randomized decomposition."""
    if not weight.isfinite().all():
        return math.nan
    if min(weight.shape) <= _EXACT:
        return float(torch.linalg.matrix_norm(weight, ord=2))
    with torch.random.fork_rng(devices=[]):  # torch's sketch takes the global generator
        torch.manual_seed(0)
        return float(torch.svd_lowrank(weight, q=_SKETCH, niter=_PASSES)[1][0])
