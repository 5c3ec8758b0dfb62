"""The search: initialization, iteration, convergence (paper, section 3.3).

It is handed a function that fine-tunes and scores an allocation and knows nothing else of models.
Each trial is a function of the seed and of the trials before it, so a search that was broken off
and called again ends as if it had not been.
"""

from __future__ import annotations

import enum
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from rankadaptor_plugin.errors import (
    ArtifactError,
    OracleError,
    RankAdaptorError,
    RankSpaceError,
    RecoveryError,
)
from rankadaptor_plugin.ranks import RankAllocation, allocation_of
from rankadaptor_plugin.samplers import untried
from rankadaptor_plugin.trials import Outcome, Phase, Trial, TrialState

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from optuna.samplers import BaseSampler

    from rankadaptor_plugin.config import SearchConfig
    from rankadaptor_plugin.ranks import RankSpace
    from rankadaptor_plugin.scores import Score
    from rankadaptor_plugin.study import TrialStore

Evaluate = Callable[[RankAllocation, float, int], Outcome]
"""Fine-tunes and scores: (allocation, fidelity in (0, 1], seed) -> outcome."""

logger = logging.getLogger(__name__)

_FIDELITY = 1.0  # Every trial runs all fine-tuning steps.
_LEAST_COMPLETE = 2  # Below this there is nothing to compare.


class StopReason(enum.StrEnum):
    """Why a search ended."""

    CONVERGED = "converged"  # |Q - P| stayed below the tolerance
    MAX_TRIALS = "max_trials"
    EXHAUSTED = "exhausted"  # every allocation of the space was tried
    NOISE = "noise floor"  # no plausible gain rises above the noise, so nothing was searched


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        trials: All finished trials in order of position, no allocation twice.
        stop: Why the search ended.
        interrupted: Trials that a killed process left behind; they are not among `trials`.
    """

    trials: tuple[Trial, ...]
    stop: StopReason
    interrupted: int

    @property
    def best(self) -> Trial:
        """The complete trial with the highest objective, the earliest if there are several."""
        return _ranked(self.trials)[0]

    def finalists(self, count: int) -> list[RankAllocation]:
        """Returns the best distinct allocations, best first; fewer if fewer are complete."""
        return [trial.allocation for trial in _ranked(self.trials)[:count]]


def search(
    space: RankSpace,
    evaluate: Evaluate,
    store: TrialStore,
    sampler_for: Callable[[int], BaseSampler],
    config: SearchConfig,
    objective: Callable[[Score], float],
    seed: int,
    on_trial: Callable[[Trial], None] | None = None,
) -> SearchResult:
    """Searches the rank space, going on from the trials that the store holds.

    Args:
        space: The rank space S.
        evaluate: Fine-tunes and scores an allocation. An error of this package makes a failed
            trial; any other exception ends the search and leaves the trial as interrupted.
        store: Where the trials live. Nobody else may write to it meanwhile.
        sampler_for: Makes the sampler of a single trial from a seed.
        config: The ``[search]`` table.
        objective: What to maximize, P of the paper.
        seed: Seed of the search, and of every fine-tune: equal seeds for all allocations keep
            the noise that they share out of the comparison.
        on_trial: Called after each trial that this call finishes.

    Raises:
        ArtifactError: If the store holds trials of another rank space.
        RecoveryError: If too many trials in a row failed, or fewer than 2 are complete.
    """
    store.settle()
    trials = store.trials()
    _check_same_space(space, trials)
    tried = {trial.allocation.ranks for trial in trials}
    failures = 0
    while (stop := _stop_reason(trials, config)) is None:
        position = len(trials)
        spare = untried(space, tried, 1, np.random.default_rng([seed, position]))
        if not len(spare):
            stop = StopReason.EXHAUSTED
            break
        started = time.perf_counter()
        sampler_seed = _derived(seed, position)
        place = partial(_placed, space, tried, allocation_of(spare[0]), sampler_seed)
        pending = store.begin(sampler_for(sampler_seed), space, place)
        seconds = time.perf_counter() - started
        trial = _run(
            Trial(
                position=position,
                phase=_phase(position, config),
                allocation=pending.allocation,
                seed=seed,
                fidelity=_FIDELITY,
                state=TrialState.FAILED,
                predicted=pending.predicted,
                seconds={"search": seconds},
            ),
            evaluate,
            objective,
        )
        store.finish(pending, trial)
        trials.append(trial)
        tried.add(trial.allocation.ranks)
        if on_trial is not None:
            on_trial(trial)
        failures = failures + 1 if trial.state is TrialState.FAILED else 0
        if failures >= config.max_failures:
            raise RecoveryError(
                f"{failures} trials in a row failed, the last one (trial {position + 1}, ranks "
                f"{trial.allocation}) because: {trial.reason} Remove the cause and run the same "
                "command again; the trials made so far are kept."
            )
    _check_enough(trials)
    return SearchResult(trials=tuple(trials), stop=stop, interrupted=store.interrupted())


def _run(trial: Trial, evaluate: Evaluate, objective: Callable[[Score], float]) -> Trial:
    """Evaluates a trial; returns it complete, or failed with its reason."""
    try:
        outcome = evaluate(trial.allocation, trial.fidelity, trial.seed)
        value = float(objective(outcome.score))
        if not (outcome.score.is_finite() and math.isfinite(value)):
            raise OracleError(
                f"A score is not a finite number (objective {value}). Lower [recovery] "
                "learning_rate or check the oracle's tasks."
            )
    except RankAdaptorError as error:
        logger.warning("Trial %d (%s) failed: %s", trial.position + 1, trial.allocation, error)
        return replace(trial, reason=str(error))
    logger.info("Trial %d (%s): %.4f", trial.position + 1, trial.allocation, value)
    return replace(
        trial,
        state=TrialState.COMPLETE,
        score=outcome.score,
        objective=value,
        train_loss=outcome.train_loss,
        seconds=trial.seconds | outcome.seconds,
    )


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
    return spare if allocation.ranks in tried else allocation


def _phase(position: int, config: SearchConfig) -> Phase:
    return Phase.INITIALIZATION if position < config.initial_trials else Phase.ITERATION


def _stop_reason(trials: Sequence[Trial], config: SearchConfig) -> StopReason | None:
    last = trials[-config.patience :]
    if len(last) == config.patience and all(_is_close(trial, config.tolerance) for trial in last):
        return StopReason.CONVERGED
    return StopReason.MAX_TRIALS if len(trials) >= config.max_trials else None


def _is_close(trial: Trial, tolerance: float) -> bool:
    """Tells whether |Q - P| < tolerance; never for tolerance 0, initial and failed trials."""
    if trial.predicted is None or trial.objective is None or trial.phase is not Phase.ITERATION:
        return False
    return abs(trial.predicted - trial.objective) < tolerance


def _ranked(trials: Sequence[Trial]) -> list[Trial]:
    def objective(trial: Trial) -> float:
        return -math.inf if trial.objective is None else trial.objective

    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    return sorted(complete, key=objective, reverse=True)


def _derived(seed: int, position: int) -> int:
    """Returns the seed of one trial's sampler, below 2 ** 32."""
    return int(np.random.SeedSequence([seed, position]).generate_state(1)[0])


def _check_same_space(space: RankSpace, trials: Sequence[Trial]) -> None:
    for trial in trials:
        try:
            space.check(trial.allocation)
        except RankSpaceError as error:
            raise ArtifactError(
                f"Trial {trial.position + 1} of the store belongs to another rank space: {error} "
                "Or choose another run folder."
            ) from error


def _check_enough(trials: Sequence[Trial]) -> None:
    complete = sum(trial.state is TrialState.COMPLETE for trial in trials)
    if complete < _LEAST_COMPLETE:
        reasons = [trial.reason for trial in trials if trial.reason]
        raise RecoveryError(
            f"Only {complete} of {len(trials)} trials are complete; {_LEAST_COMPLETE} are needed. "
            f"{f'The last failure: {reasons[-1]} ' if reasons else ''}"
            "Remove the cause and raise [search] max_trials."
        )
