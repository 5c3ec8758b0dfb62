"""Confirmation: the finalists race uniform LoRA, on seeds and documents kept from the search.

The best allocations of the search, perhaps the best of as many random ones, and uniform LoRA at
the same parameters run with fresh seeds, one seed after the other, and are scored on the *report*
documents. Those that are shown to be worse drop out on the way (`rankadaptor_plugin.verdict.race`);
what is left after the last seed is compared with uniform LoRA. Neither the seeds nor the documents
chose the finalists, and the intervals hold for all that entered together, so the verdict is not
biased by any choice.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.errors import OracleError, RecoveryError
from rankadaptor_plugin.core.scores import Score
from rankadaptor_plugin.core.trials import Phase, Trial, TrialState
from rankadaptor_plugin.verdict.race import Advantage, Reason, Rules, eliminated
from rankadaptor_plugin.verdict.race_result import (
    BEST_RANDOM,
    FINALIST,
    Competitor,
    Confirmed,
    Entrant,
    Exit,
    Standing,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.core.run_folder import RunFolder
    from rankadaptor_plugin.search.study import TrialStore

logger = logging.getLogger(__name__)

FRESH = 1_000_000
"""Distance of the race's seeds from the seed of the search."""


@dataclass(frozen=True, kw_only=True)
class ConfirmationRun:
    """One fine-tune of an allocation with a fresh seed.

    Attributes:
        search: Scores on the search documents.
        report: Scores on the report documents; None of a run outside the race.
        objective: What the search maximizes, on the search documents.
        train_loss: See `rankadaptor_plugin.core.trials.Outcome`.
        seconds: Wall time by part: ``recovery`` and ``oracle``.
        validation_loss: See `rankadaptor_plugin.core.trials.Outcome`.
    """

    search: Score
    report: Score | None
    objective: float
    train_loss: float
    seconds: dict[str, float]
    validation_loss: float | None = None

    def with_search(self, score: Score) -> ConfirmationRun:
        """Returns the run with other scores on the search documents."""
        return replace(self, search=score)

    def is_finite(self) -> bool:
        """Tells whether every score is a finite number."""
        return self.search.is_finite() and (self.report is None or self.report.is_finite())

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, without those per document."""
        return {
            "search": self.search.to_json(),
            "report": self.report and self.report.to_json(),
            "objective": self.objective,
            "train_loss": self.train_loss,
            "validation_loss": self.validation_loss,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ConfirmationRun:
        """Builds a run from what `to_json` returned."""
        search = Score.from_json(data["search"])
        report = data["report"] and Score.from_json(data["report"])
        return cls(**{**data, "search": search, "report": report})


Runs = tuple[ConfirmationRun, ...]  # one per seed


def fresh_seeds(seed: int, count: int) -> tuple[int, ...]:
    """Returns seeds that no trial of the search used, as many as asked for."""
    return tuple(seed + FRESH + i for i in range(count))


def run_name(allocation: RankAllocation, seed: int) -> str:
    """Returns the file name, without ending, of a run; ranks of many layers would be too long."""
    return f"{hashlib.sha256(str(allocation).encode()).hexdigest()[:12]}-{seed}"


class Confirmation:
    """Runs the race; finished runs are read from the run folder, failed ones from the store.

    Args:
        run: Fine-tunes an allocation with a seed and scores it on both sets of documents.
        folder: Run folder, where each run's scores are kept.
        store: Study that records each run as a trial.
        seeds: Fresh seeds, the same for all allocations, at least two.
        least_seeds: Seeds before anyone may be eliminated, at least two.
        confidence: One less the error rate, in (0, 1).
        metric: The decisive metric.
        weights: Weight per task of the verdict; None weighs all equally.
        on_run: Told the number of finished runs and of the most that there will be, after each.
        is_whole: Tells of a run whose scores are kept whether all else that it left is there too.
        expect: Told the runs of each round beforehand, so that some may be made together.
    """

    def __init__(
        self,
        *,
        run: Callable[[RankAllocation, int], ConfirmationRun],
        folder: RunFolder,
        store: TrialStore,
        seeds: Sequence[int],
        least_seeds: int,
        confidence: float,
        metric: str,
        weights: Mapping[str, float] | None,
        on_run: Callable[[int, int], None],
        is_whole: Callable[[RankAllocation, int], bool] = lambda allocation, seed: True,
        expect: Callable[[Sequence[tuple[RankAllocation, int]]], None] = lambda jobs: None,
    ) -> None:
        self._run, self._folder, self._store = run, folder, store
        self._seeds, self._least_seeds, self._confidence = seeds, least_seeds, confidence
        self._metric, self._weights = metric, weights
        self._on_run, self._is_whole, self._expect = on_run, is_whole, expect
        self._recorded = {(trial.allocation, trial.seed): trial for trial in store.trials()}

    def confirm(
        self,
        finalists: Sequence[RankAllocation],
        baseline_for: Callable[[RankAllocation], RankAllocation],
        best_random: RankAllocation | None = None,
        methods: Sequence[Entrant] = (),
    ) -> Confirmed:
        """Runs the race.

        A finalist that is its own baseline needs no runs and cannot gain. A competitor is out if
        one of its fine-tunes diverges or cannot be scored. If all are out, uniform LoRA has won and
        the race ends.

        Args:
            finalists: Best allocations of the search, best first.
            baseline_for: Uniform LoRA at the parameters of an allocation.
            best_random: The best of the random allocations, if it is to enter too.
            methods: Recovery methods that enter too. One whose allocation is among the former
                enters once.

        Raises:
            RecoveryError: If a fine-tune of uniform LoRA diverges; there is no other to take.
            OracleError: If it cannot be scored.
        """
        labels = dict.fromkeys(finalists, FINALIST)
        if best_random is not None:
            labels.setdefault(best_random, BEST_RANDOM)
        baselines = {allocation: baseline_for(allocation) for allocation in labels}
        for entrant in methods:
            labels.setdefault(entrant.allocation, entrant.label)
            baselines.setdefault(entrant.allocation, entrant.baseline)
        standing = Standing(baselines)
        rules = self._rules(max(1, len(standing.racing)))
        for count, seed in enumerate(self._seeds, 1):
            last = rules.seeds if standing.racing else rules.least_seeds
            self._expect([(allocation, seed) for allocation in standing.in_race])
            most = self._round(standing, seed, last - count)
            if rules.is_look(count):
                self._eliminate(standing, count, rules.confidence_after(count))
            if not standing.racing and count >= rules.least_seeds:
                if standing.done < most:
                    self._on_run(standing.done, standing.done)
                break
        confidence = rules.confidence_after(rules.seeds)
        for allocation in standing.racing:
            standing.compared[allocation] = self._advantage(standing, allocation).interval(
                confidence
            )
        runs = {allocation: tuple(several) for allocation, several in standing.runs.items()}
        return Confirmed(
            seeds=tuple(self._seeds[: max(map(len, runs.values()))]),
            runs=runs,
            competitors=tuple(
                Competitor(
                    allocation=allocation,
                    baseline=baselines[allocation],
                    label=label,
                    exit=standing.exits.get(allocation),
                    comparison=standing.compared.get(allocation),
                )
                for allocation, label in labels.items()
            ),
            rules=rules,
            metric=self._metric,
            weights=self._weights,
        )

    def alone(self, uniform: RankAllocation) -> Confirmed:
        """Runs uniform LoRA alone with all seeds, to be compared with nothing.

        Raises:
            RecoveryError: If a fine-tune diverges.
            OracleError: If it cannot be scored.
        """
        standing = Standing({})
        standing.runs[uniform] = []
        self._expect([(uniform, seed) for seed in self._seeds])
        for count, seed in enumerate(self._seeds, 1):
            self._round(standing, seed, len(self._seeds) - count)
        return Confirmed(
            seeds=tuple(self._seeds),
            runs={uniform: tuple(standing.runs[uniform])},
            competitors=(),
            rules=self._rules(1),
            metric=self._metric,
            weights=self._weights,
        )

    def _rules(self, competitors: int) -> Rules:
        return Rules(
            competitors=competitors,
            seeds=len(self._seeds),
            least_seeds=self._least_seeds,
            confidence=self._confidence,
        )

    def _round(self, standing: Standing, seed: int, rounds_left: int) -> int:
        """Runs all that are in the race with one seed.

        Returns:
            The most runs of the whole race, with `rounds_left` more rounds like this one.
        """
        baselines = standing.running_baselines
        in_race = standing.in_race
        most = standing.done + len(in_race) * (1 + rounds_left)
        for allocation in in_race:
            several = standing.runs.setdefault(allocation, [])
            try:
                if allocation not in baselines:
                    self._check_not_failed(allocation, seed)
                several.append(self._result(allocation, seed))
            except (RecoveryError, OracleError) as error:
                # Uniform LoRA ran first: what fails now is no fault of the corpus or the oracle.
                if allocation in baselines:
                    raise
                logger.warning("Out: %s with seed %d failed: %s", allocation, seed, error)
                self._record(allocation, seed, str(error))
                standing.exits[allocation] = Exit(
                    after=len(several), reason=Reason.FAILED, detail=str(error)
                )
            standing.done += 1
            self._on_run(standing.done, most)
        return most

    def _eliminate(self, standing: Standing, count: int, confidence: float) -> None:
        found = {
            allocation: self._advantage(standing, allocation) for allocation in standing.racing
        }
        for allocation, reason in eliminated(found, confidence).items():
            logger.info("Out after %d seeds: %s, %s", count, allocation, reason.value)
            standing.compared[allocation] = found[allocation].interval(confidence)
            standing.exits[allocation] = Exit(after=count, reason=reason)

    def _advantage(self, standing: Standing, allocation: RankAllocation) -> Advantage:
        ours, theirs = (
            [run.report for run in standing.runs[a] if run.report is not None]
            for a in (allocation, standing.baselines[allocation])
        )
        return Advantage.of(ours, theirs, self._metric, self._weights)

    def _result(self, allocation: RankAllocation, seed: int) -> ConfirmationRun:
        """Returns a run, made anew only where it was not finished."""
        name = f"evaluations/{run_name(allocation, seed)}"
        result = self._folder.read_result(name, ConfirmationRun.from_json)
        if result is None or not self._is_whole(allocation, seed):
            done = self._run(allocation, seed)
            if done.report is None or not done.is_finite():
                raise RecoveryError(
                    "A score on the report documents is absent or not a finite number. Lower "
                    "[recovery] learning_rate or check the oracle's tasks."
                )
            self._folder.write_score(f"{name}.parquet", done.report)
            self._folder.write_json(f"{name}.json", done.to_json())
            # As it reads back, so that a run broken off ends like one that was not.
            result = ConfirmationRun.from_json(json.loads(json.dumps(done.to_json())))
        if result.report is not None:
            report = self._folder.with_documents(f"{name}.parquet", result.report)
            result = replace(result, report=report)
        self._record(allocation, seed, result)
        return result

    def _check_not_failed(self, allocation: RankAllocation, seed: int) -> None:
        earlier = self._recorded.get((allocation, seed))
        if earlier is not None and earlier.state is TrialState.FAILED:
            raise RecoveryError(earlier.reason)

    def _record(self, allocation: RankAllocation, seed: int, result: ConfirmationRun | str) -> None:
        """Stores a run as a trial, once; the text is the reason of a failed one."""
        trial = Trial(
            position=len(self._recorded),
            phase=Phase.CONFIRMATION,
            allocation=allocation,
            seed=seed,
            state=TrialState.FAILED,
        )
        if isinstance(result, str):
            trial = replace(trial, reason=result)
        else:
            trial = replace(
                trial,
                state=TrialState.COMPLETE,
                score=result.search,
                objective=result.objective,
                train_loss=result.train_loss,
                validation_loss=result.validation_loss,
                seconds=result.seconds,
            )
        earlier = self._recorded.get((allocation, seed))
        if earlier is not None and earlier.state is trial.state:
            return
        self._store.add(trial)
        self._recorded[allocation, seed] = trial
