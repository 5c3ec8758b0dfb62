"""The search: initialization, iteration, convergence (paper, section 3.3).

It is handed a function that fine-tunes and scores an allocation and knows nothing else of models.
Each trial is a function of the seed and of the trials before it, so a search that was interrupted
and called again ends as if it had not been.
"""

from __future__ import annotations

import enum
import logging
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from rankadaptor_plugin.core.errors import OracleError, RankAdaptorError, RecoveryError
from rankadaptor_plugin.core.trials import Outcome, Phase, Trial, TrialState
from rankadaptor_plugin.search.samplers import N_STARTUP_TRIALS, RecommendingSampler
from rankadaptor_plugin.search.space import untried

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from optuna.samplers import BaseSampler

    from rankadaptor_plugin.config.tables import SearchConfig
    from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
    from rankadaptor_plugin.search.study import TrialStore

logger = logging.getLogger(__name__)

PAPER = "paper"
"""The method that ends when prediction and measurement agree."""

LEAST_TRIALS = 2
"""Fewest complete trials of a search: below this there is nothing to compare."""


class StopReason(enum.StrEnum):
    """Why a search ended."""

    CONVERGED = "converged"  # |Q - P| stayed below the tolerance
    N_TRIALS = "n_trials"
    MAX_HOURS = "max_hours"
    MAX_GPU_HOURS = "max_gpu_hours"
    EXHAUSTED = "exhausted"  # every allocation of the space was tried
    NOISE = "noise floor"  # no plausible gain rises above the noise, so nothing was searched
    FIXED = "fixed allocation"  # the run file names it
    METHODS = "recovery methods"  # the run file names others alone


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Result of a search.

    Attributes:
        trials: All finished trials in order of position, no allocation twice.
        stop: Why the search ended.
        interrupted: Trials that a killed process left behind; they are not among `trials`.
        recommended: What the sampler believes in, best first; empty if it has no opinion.
        n_startup_trials: Random allocations that the method takes first, those of the noise floor
            included.
    """

    trials: tuple[Trial, ...]
    stop: StopReason
    interrupted: int
    recommended: tuple[RankAllocation, ...] = ()
    n_startup_trials: int = 0

    @property
    def is_searched(self) -> bool:
        """True if allocations were searched at all."""
        return self.stop not in (StopReason.NOISE, StopReason.FIXED, StopReason.METHODS)

    @property
    def best(self) -> Trial:
        """The complete trial with the highest objective, the earliest if there are several."""
        return _ranked(self.trials)[0]

    def finalists(self, count: int) -> list[RankAllocation]:
        """Returns distinct allocations, best first; fewer if fewer are complete.

        They are the sampler's, filled up with those that scored best.
        """
        measured = (trial.allocation for trial in _ranked(self.trials))
        return list(dict.fromkeys([*self.recommended, *measured]))[:count]


def search(
    space: RankSpace,
    evaluate: Callable[[RankAllocation, int], Outcome],
    store: TrialStore,
    sampler_for: Callable[[int], BaseSampler],
    config: SearchConfig,
    seed: int,
    on_trial: Callable[[Trial], None] = lambda trial: None,
    is_spent: Callable[[Sequence[Trial]], StopReason | None] = lambda trials: None,
) -> SearchResult:
    """Searches the rank space, going on from the trials that the store holds.

    Args:
        space: The rank space S.
        evaluate: Fine-tunes and scores an allocation. An error of this package makes a failed
            trial; any other exception ends the search and leaves the trial as interrupted.
        store: Where the trials live. Nobody else may write to it meanwhile.
        sampler_for: Makes the sampler of a single trial from a seed.
        config: The ``[search]`` table.
        seed: Seed of the search, and of every fine-tune: equal seeds for all allocations keep
            the noise that they share out of the comparison.
        on_trial: Called after each trial that this call finishes.
        is_spent: Says before each trial whether time is up for it.

    Raises:
        ArtifactError: If the store holds trials of another rank space.
        RecoveryError: If too many trials in a row failed, or fewer than 2 are complete.
    """
    store.settle()
    store.claim(space)
    trials = store.trials()
    failures = 0
    while (stop := _stop_reason(trials, config) or is_spent(trials)) is None:
        position = len(trials)
        began = time.perf_counter()
        tried = {tuple(space.row(trial.allocation)) for trial in trials}
        spare = untried(space, tried, 1, np.random.default_rng([seed, position]))
        if not len(spare):
            stop = StopReason.EXHAUSTED
            break
        drawn_seed = _sampler_seed(seed, position)
        sampler = sampler_for(drawn_seed)
        place = partial(_placed, space, tried, space.allocation(spare[0]), drawn_seed)
        pending = store.begin(sampler, space, place)
        initial = position < _n_startup_trials(config, sampler)
        trial = _run(
            Trial(
                position=position,
                phase=Phase.INITIALIZATION if initial else Phase.ITERATION,
                allocation=pending.allocation,
                seed=seed,
                state=TrialState.FAILED,
                predicted=pending.predicted,
                seconds={"search": time.perf_counter() - began},
                parameters=space.parameters(pending.allocation),
            ),
            evaluate,
        )
        store.finish(pending, trial)
        trials.append(trial)
        on_trial(trial)
        failures = failures + 1 if trial.state is TrialState.FAILED else 0
        if failures >= config.max_failures:
            raise RecoveryError(
                f"{failures} trials in a row failed, the last one (trial {position + 1}, ranks "
                f"{trial.allocation}) because: {trial.reason} Remove the cause and run the same "
                "command again; the trials made so far are kept."
            )
    _check_enough(trials, stop)
    sampler = sampler_for(_sampler_seed(seed, len(trials)))
    rows: list[Sequence[int]] = []
    if isinstance(sampler, RecommendingSampler):
        rows = sampler.recommend(store.as_seen_by(sampler), len(trials))
    return SearchResult(
        trials=tuple(trials),
        stop=stop,
        interrupted=store.interrupted(),
        recommended=tuple(space.allocation(row) for row in rows),
        n_startup_trials=_n_startup_trials(config, sampler),
    )


def pareto_front(trials: Sequence[Trial], space: RankSpace) -> list[Trial]:
    """Returns the complete trials that none beats in both score and parameters, smallest first."""
    complete = [t for t in trials if t.state is TrialState.COMPLETE and t.objective is not None]

    def size(trial: Trial) -> tuple[int, float]:
        return space.parameters(trial.allocation), -(trial.objective or 0.0)

    front: list[Trial] = []
    for trial in sorted(complete, key=size):
        if not front or (trial.objective or 0.0) > (front[-1].objective or 0.0):
            front.append(trial)
    return front


def _n_startup_trials(config: SearchConfig, sampler: BaseSampler) -> int:
    """Returns the number of random allocations that a search begins with."""
    return config.n_startup_trials or int(getattr(sampler, "n_startup_trials", N_STARTUP_TRIALS))


def _sampler_seed(seed: int, position: int) -> int:
    """Returns the seed of one trial's sampler, below 2 ** 32."""
    return int(np.random.SeedSequence([seed, position]).generate_state(1)[0])


def _placed(
    space: RankSpace,
    tried: Collection[tuple[int, ...]],
    spare: RankAllocation,
    seed: int,
    proposal: RankAllocation,
) -> RankAllocation:
    """Returns a proposal within the budget, or `spare` if that was tried already."""
    allocation = space.within_budget(proposal, seed)
    # Samplers such as TPE repeat themselves; a fine-tune is too dear for that.
    return spare if tuple(space.row(allocation)) in tried else allocation


def _run(trial: Trial, evaluate: Callable[[RankAllocation, int], Outcome]) -> Trial:
    """Evaluates a trial; returns it complete, or failed with its reason."""
    began = time.perf_counter()
    try:
        outcome = evaluate(trial.allocation, trial.seed)
        if not outcome.is_finite():
            raise OracleError(
                f"A score is not a finite number (objective {outcome.objective}). Lower [recovery] "
                "learning_rate or check the oracle's tasks."
            )
    except RankAdaptorError as error:
        logger.warning("Trial %d (%s) failed: %s", trial.position + 1, trial.allocation, error)
        took = {"recovery": time.perf_counter() - began}  # limits on time count it
        return replace(trial, reason=str(error), seconds=trial.seconds | took)
    logger.info("Trial %d (%s): %.4f", trial.position + 1, trial.allocation, outcome.objective)
    made = ("position", "phase", "allocation", "seed", "predicted", "seconds", "parameters")
    return outcome.trial(**{name: getattr(trial, name) for name in made})


def _stop_reason(trials: Sequence[Trial], config: SearchConfig) -> StopReason | None:
    last = trials[-config.patience :] if config.method == PAPER else []
    if len(last) == config.patience and all(_is_close(trial, config.tolerance) for trial in last):
        return StopReason.CONVERGED
    return StopReason.N_TRIALS if len(trials) >= config.n_trials else None


def _is_close(trial: Trial, tolerance: float) -> bool:
    """True if |Q - P| < tolerance; never for tolerance 0, initial and failed trials."""
    if trial.predicted is None or trial.objective is None or trial.phase is not Phase.ITERATION:
        return False
    return abs(trial.predicted - trial.objective) < tolerance


def _ranked(trials: Sequence[Trial]) -> list[Trial]:
    def objective(trial: Trial) -> float:
        return -math.inf if trial.objective is None else trial.objective

    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    return sorted(complete, key=objective, reverse=True)


def _check_enough(trials: Sequence[Trial], stop: StopReason) -> None:
    complete = sum(trial.state is TrialState.COMPLETE for trial in trials)
    if complete >= LEAST_TRIALS:
        return
    reasons = [trial.reason for trial in trials if trial.reason]
    limits = (StopReason.MAX_HOURS, StopReason.MAX_GPU_HOURS)
    key = stop.value if stop in limits else StopReason.N_TRIALS.value
    remedy = f"raise [search] {key}"
    if stop is StopReason.EXHAUSTED:
        remedy = "add [rank_space] candidates"
    raise RecoveryError(
        f"Only {complete} of {len(trials)} trials are complete; {LEAST_TRIALS} are needed. "
        f"{f'The last failure: {reasons[-1]} ' if reasons else ''}"
        f"Remove the cause and {remedy}."
    )
