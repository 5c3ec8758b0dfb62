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
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rankadaptor_plugin.core.errors import (
    OracleError,
    RankAdaptorError,
    RecoveryError,
)
from rankadaptor_plugin.core.trials import Outcome, Phase, Trial, TrialState
from rankadaptor_plugin.search.proposals import Proposals, initial_trials, sampler_seed
from rankadaptor_plugin.search.rank_sampler import ForecastingSampler, RecommendingSampler

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from optuna.samplers import BaseSampler

    from rankadaptor_plugin.config.tables import SearchConfig
    from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
    from rankadaptor_plugin.core.scores import Score
    from rankadaptor_plugin.search.study import TrialStore

logger = logging.getLogger(__name__)

PAPER = "paper"
"""The method that ends when prediction and measurement agree."""

_LEAST_COMPLETE = 2  # Below this there is nothing to compare.
_LEAST_LOOKS = 4  # Before so many values at the rung, nothing is ended there.


class Evaluate(Protocol):
    """Fine-tunes and scores an allocation."""

    def __call__(
        self,
        allocation: RankAllocation,
        fidelity: float,
        seed: int,
        goes_on: Callable[[float], bool] | None = None,
    ) -> Outcome:
        """Returns the outcome.

        Args:
            allocation: The ranks.
            fidelity: Share of the steps, in (0, 1].
            seed: Seed of the fine-tune.
            goes_on: Told what the search maximizes at the rung; False ends the fine-tune there.
        """
        ...


class Expect(Protocol):
    """Is told which fine-tunes come next, so that some may be made together."""

    def __call__(self, jobs: Sequence[tuple[RankAllocation, int]]) -> None:
        """Takes allocations and seeds in order, those that were made before included."""
        ...


class StopReason(enum.StrEnum):
    """Why a search ended."""

    CONVERGED = "converged"  # |Q - P| stayed below the tolerance
    MAX_TRIALS = "max_trials"
    MAX_HOURS = "max_hours"
    MAX_GPU_HOURS = "max_gpu_hours"
    EXHAUSTED = "exhausted"  # every allocation of the space was tried
    NOISE = "noise floor"  # no plausible gain rises above the noise, so nothing was searched
    FIXED = "fixed allocation"  # the run file names it
    METHODS = "recovery methods"  # the run file names others alone


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        trials: All finished trials in order of position, no allocation twice.
        stop: Why the search ended.
        interrupted: Trials that a killed process left behind; they are not among `trials`.
        recommended: What the sampler believes in, best first; empty if it has no opinion.
        initial_trials: Random allocations that the method takes first, those of the noise floor
            included.
        forecasts: By model of the sampler the mean log density of what was measured, one step
            ahead, in nats per trial; empty if it keeps no score, or too few were forecast.
    """

    trials: tuple[Trial, ...]
    stop: StopReason
    interrupted: int
    recommended: tuple[RankAllocation, ...] = ()
    initial_trials: int = 0
    forecasts: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_searched(self) -> bool:
        """Whether allocations were searched at all."""
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
    evaluate: Evaluate,
    store: TrialStore,
    sampler_for: Callable[[int], BaseSampler],
    config: SearchConfig,
    objective: Callable[[Score], float],
    seed: int,
    on_trial: Callable[[Trial], None] | None = None,
    is_spent: Callable[[Sequence[Trial]], StopReason | None] = lambda trials: None,
    finalists: int = 1,
    expect: Expect = lambda jobs: None,
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
        is_spent: Says before each trial whether time is up for it.
        finalists: Allocations that the sampler is asked to recommend.
        expect: Told the fine-tunes of each group that is proposed at once: the random ones in the
            beginning, and each batch.

    Raises:
        ArtifactError: If the store holds trials of another rank space.
        RecoveryError: If too many trials in a row failed, or fewer than 2 are complete.
    """
    store.settle()
    store.claim(space)
    trials = store.trials()
    failures = 0
    proposals = Proposals(space, store, sampler_for, config, seed)
    while (stop := _stop_reason(trials, config) or is_spent(trials)) is None:
        position = len(trials)
        if not proposals.ready:
            proposals.draw(trials)
            expect([(allocation, seed) for allocation in proposals.group])
        if not proposals.ready:
            stop = StopReason.EXHAUSTED
            break
        proposal, seconds = proposals.ready.popleft()
        pending = store.begin(proposal)
        initial = proposals.initial_trials
        trial = _run(
            Trial(
                position=position,
                phase=Phase.INITIALIZATION if position < initial else Phase.ITERATION,
                allocation=pending.allocation,
                seed=seed,
                fidelity=1.0,
                state=TrialState.FAILED,
                predicted=proposal.predicted,
                seconds={"search": seconds},
                parameters=space.parameters(pending.allocation),
            ),
            evaluate,
            objective,
            partial(_goes_on, trials, config.rung) if config.rung else None,
        )
        store.finish(pending, trial)
        trials.append(trial)
        if on_trial is not None:
            on_trial(trial)
        failures = failures + 1 if trial.state is TrialState.FAILED else 0
        if failures >= config.max_failures:
            raise RecoveryError(
                f"{failures} trials in a row failed, the last one (trial {position + 1}, ranks "
                f"{trial.allocation}) because: {trial.reason} Remove the cause and run the same "
                "command again; the trials made so far are kept."
            )
    _check_enough(trials, stop)
    sampler = sampler_for(sampler_seed(seed, len(trials)))
    study = store.as_seen_by(sampler)
    rows = sampler.recommend(study, finalists) if isinstance(sampler, RecommendingSampler) else []
    return SearchResult(
        trials=tuple(trials),
        stop=stop,
        interrupted=store.interrupted(),
        recommended=tuple(space.allocation(row) for row in rows),
        initial_trials=initial_trials(config, sampler),
        forecasts=sampler.scores(study) if isinstance(sampler, ForecastingSampler) else {},
    )


def _goes_on(trials: Sequence[Trial], share: float, value: float) -> bool:
    """Tells whether a trial is not below the median of those before it at the rung."""
    looks = (trial.rungs[share] for trial in trials if share in trial.rungs)
    before = [look for look in looks if math.isfinite(look)]
    return len(before) < _LEAST_LOOKS or value >= float(np.median(before))


def _run(
    trial: Trial,
    evaluate: Evaluate,
    objective: Callable[[Score], float],
    goes_on: Callable[[float], bool] | None,
) -> Trial:
    """Evaluates a trial; returns it complete, stopped at its rung, or failed with its reason."""
    began = time.perf_counter()
    try:
        extra = () if goes_on is None else (goes_on,)
        outcome = evaluate(trial.allocation, trial.fidelity, trial.seed, *extra)
        value = float(objective(outcome.score))
        if not (outcome.score.is_finite() and math.isfinite(value)):
            raise OracleError(
                f"A score is not a finite number (objective {value}). Lower [recovery] "
                "learning_rate or check the oracle's tasks."
            )
    except RankAdaptorError as error:
        logger.warning("Trial %d (%s) failed: %s", trial.position + 1, trial.allocation, error)
        took = {"recovery": time.perf_counter() - began}  # limits on time count it
        return replace(trial, reason=str(error), seconds=trial.seconds | took)
    stopped = outcome.fidelity < trial.fidelity
    logger.info("Trial %d (%s): %.4f", trial.position + 1, trial.allocation, value)
    return replace(
        trial,
        state=TrialState.STOPPED if stopped else TrialState.COMPLETE,
        fidelity=outcome.fidelity,
        score=outcome.score,
        objective=None if stopped else value,
        train_loss=outcome.train_loss,
        validation_loss=outcome.validation_loss,
        seconds=trial.seconds | outcome.seconds,
        rungs=outcome.rungs,
    )


def _stop_reason(trials: Sequence[Trial], config: SearchConfig) -> StopReason | None:
    last = trials[-config.patience :] if config.method == PAPER else []
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


def _check_enough(trials: Sequence[Trial], stop: StopReason) -> None:
    complete = sum(trial.state is TrialState.COMPLETE for trial in trials)
    if complete >= _LEAST_COMPLETE:
        return
    reasons = [trial.reason for trial in trials if trial.reason]
    limits = (StopReason.MAX_HOURS, StopReason.MAX_GPU_HOURS)
    key = stop.value if stop in limits else StopReason.MAX_TRIALS.value
    remedy = f"raise [search] {key}"
    if stop is StopReason.EXHAUSTED:
        remedy = "add [rank_space] candidates"
    raise RecoveryError(
        f"Only {complete} of {len(trials)} trials are complete; {_LEAST_COMPLETE} are needed. "
        f"{f'The last failure: {reasons[-1]} ' if reasons else ''}"
        f"Remove the cause and {remedy}."
    )
