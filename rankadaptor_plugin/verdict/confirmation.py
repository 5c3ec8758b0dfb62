"""Confirmation: what entered the race runs against LoRA, on seeds and documents of its own.

The best allocations of the search, perhaps the best of as many random ones, recovery methods, and
LoRA at the same parameters run with fresh seeds, one seed after the other, and are scored on the
*report* documents. Neither the seeds nor the documents chose the finalists, and the intervals hold
for all that entered together, so the verdict is not biased by any choice.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.errors import ConfigError, OracleError, RecoveryError
from rankadaptor_plugin.core.trials import Outcome, Phase, Trial, TrialState
from rankadaptor_plugin.verdict.race import Confirmed, run_name, stored_run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.core.run_folder import RunFolder
    from rankadaptor_plugin.search.study import TrialStore
    from rankadaptor_plugin.verdict.race import Entrant, Rules

logger = logging.getLogger(__name__)

FRESH = 1_000_000
"""Distance of the race's seeds from the seed of the search."""


def check(config: RunConfig) -> None:
    """Checks the tables ``[noise]`` and ``[confirm]`` against the rest of the run file.

    Raises:
        ConfigError: If a setting cannot have an effect.
    """
    if config.confirm.best_random and not config.searches:
        why = "[search] allocation names the ranks"
        if not config.races_ranks:
            why = f'[recovery] methods {list(config.recovery.methods)} lacks "rankadaptor"'
        raise ConfigError(
            "[confirm] best_random takes as many random allocations as the search makes trials, "
            f"but nothing is searched: {why}. Leave one of them out."
        )


def fresh_seeds(seed: int, count: int) -> tuple[int, ...]:
    """Returns seeds that no trial of the search used, as many as asked for."""
    return tuple(seed + FRESH + i for i in range(count))


class Confirmation:
    """Runs the race; finished runs are read from the run folder, failed ones from the store.

    Args:
        run: Fine-tunes an allocation with a seed and scores it on both sets of documents.
        folder: Run folder, where each run's scores are kept.
        store: Study that records each run as a trial.
        rules: What the race is about.
        on_run: Told the number of finished runs and of all runs, after each.
        is_whole: Tells of a run whose scores are kept whether all else that it left is there too.
    """

    def __init__(
        self,
        *,
        run: Callable[[RankAllocation, int], Outcome],
        folder: RunFolder,
        store: TrialStore,
        rules: Rules,
        on_run: Callable[[int, int], None],
        is_whole: Callable[[RankAllocation, int], bool] = lambda allocation, seed: True,
    ) -> None:
        self._run, self._folder, self._store, self._rules = run, folder, store, rules
        self._on_run, self._is_whole = on_run, is_whole
        self._recorded = {(trial.allocation, trial.seed): trial for trial in store.trials()}

    def confirm(self, entrants: Sequence[Entrant], reference: RankAllocation) -> Confirmed:
        """Runs the race; without entrants the reference runs alone.

        An entrant that is its own baseline needs no runs and cannot gain. One of which a fine-tune
        diverges or cannot be scored is out.

        Args:
            entrants: What enters; of several with the same allocation the first.
            reference: LoRA of the default rank, which runs in any case.

        Raises:
            RecoveryError: If a fine-tune of a baseline diverges; there is no other to take.
            OracleError: If it cannot be scored.
        """
        distinct = list({entrant.allocation: entrant for entrant in reversed(entrants)}.values())
        distinct.sort(key=entrants.index)
        racing = [entrant for entrant in distinct if entrant.allocation != entrant.baseline]
        needed = [entrant.baseline for entrant in racing or distinct[:1]] or [reference]
        every = dict.fromkeys([*needed, reference, *(entrant.allocation for entrant in racing)])
        runs: dict[RankAllocation, list[Outcome]] = {a: [] for a in every}
        failed: dict[RankAllocation, str] = {}
        seeds = self._rules.seeds
        done, total = 0, len(every) * len(seeds)
        for left, seed in zip(reversed(range(len(seeds))), seeds, strict=True):
            for allocation in [a for a in every if a not in failed]:
                try:
                    if allocation not in needed:
                        self._check_not_failed(allocation, seed)
                    runs[allocation].append(self._result(allocation, seed))
                except (RecoveryError, OracleError) as error:
                    # Baselines ran first: what fails now is no fault of the corpus or the oracle.
                    if allocation in needed:
                        raise
                    logger.warning("Out: %s with seed %d failed: %s", allocation, seed, error)
                    self._record(allocation, seed, str(error))
                    failed[allocation] = str(error)
                    total -= left
                done += 1
                self._on_run(done, total)
        finished = {allocation: tuple(several) for allocation, several in runs.items()}
        return Confirmed.of(self._rules, finished, distinct, reference, failed)

    def _result(self, allocation: RankAllocation, seed: int) -> Outcome:
        """Returns a run, made anew only where it was not finished."""

        def make() -> Outcome:
            run = self._run(allocation, seed)
            if run.report is None or not run.is_finite():
                raise RecoveryError(
                    "A score on the report documents is absent or not a finite number. Lower "
                    "[recovery] learning_rate or check the oracle's tasks."
                )
            return run

        name = f"evaluations/{run_name(allocation, seed)}"
        is_whole = self._is_whole(allocation, seed)
        result = stored_run(self._folder, name, make, "report", is_whole=is_whole)
        self._record(allocation, seed, result)
        return result

    def _check_not_failed(self, allocation: RankAllocation, seed: int) -> None:
        earlier = self._recorded.get((allocation, seed))
        if earlier is not None and earlier.state is TrialState.FAILED:
            raise RecoveryError(earlier.reason)

    def _record(self, allocation: RankAllocation, seed: int, result: Outcome | str) -> None:
        """Stores a run as a trial, once; the text is the reason of a failed one."""
        place: dict[str, Any] = {
            "position": len(self._recorded),
            "phase": Phase.CONFIRMATION,
            "allocation": allocation,
            "seed": seed,
        }
        if isinstance(result, str):
            trial = Trial(state=TrialState.FAILED, reason=result, **place)
        else:
            trial = result.trial(**place)
        earlier = self._recorded.get((allocation, seed))
        if earlier is None or earlier.state is not trial.state:
            self._store.add(trial)
            self._recorded[allocation, seed] = trial
