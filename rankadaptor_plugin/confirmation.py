"""Confirmation: the finalists and uniform LoRA again, on seeds and documents kept from the search.

First the finalists run with fresh seeds, and the one with the best mean objective on the *search*
documents goes on; a single finalist goes on as it is. Then that one and uniform LoRA at the same
parameter budget run with further fresh seeds and are compared on the *report* documents. Neither
the seeds nor the documents of this comparison chose anything, so it is not biased by the choice.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.scores import Score
from rankadaptor_plugin.trials import Phase, Trial, TrialState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rankadaptor_plugin.ranks import RankAllocation
    from rankadaptor_plugin.run_folder import RunFolder
    from rankadaptor_plugin.study import TrialStore

FRESH = 1_000_000
"""Distance of the confirmation's seeds from the seed of the search, and of its two halves."""


@dataclass(frozen=True, kw_only=True)
class ConfirmationRun:
    """One fine-tune of an allocation with a fresh seed.

    Attributes:
        search: Scores on the search documents.
        report: Scores on the report documents; None where the run only chooses among the
            finalists.
        objective: What the search maximizes, on the search documents.
        train_loss: See `rankadaptor_plugin.trials.Outcome`.
        seconds: Wall time by part: ``recovery`` and ``oracle``.
    """

    search: Score
    report: Score | None
    objective: float
    train_loss: float
    seconds: dict[str, float]

    def with_search(self, score: Score) -> ConfirmationRun:
        """Returns the run with other scores on the search documents."""
        return replace(self, search=score)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, without those per document."""
        return {
            "search": self.search.to_json(),
            "report": self.report and self.report.to_json(),
            "objective": self.objective,
            "train_loss": self.train_loss,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ConfirmationRun:
        """Builds a run from what `to_json` returned."""
        search = Score.from_json(data["search"])
        report = data["report"] and Score.from_json(data["report"])
        return cls(**{**data, "search": search, "report": report})


Runs = tuple[ConfirmationRun, ...]  # one per seed


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Fresh seeds of the two halves.

    Attributes:
        choosing: They choose among several finalists.
        comparing: They compare the chosen one with uniform LoRA.
    """

    choosing: tuple[int, ...]
    comparing: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """What the fresh seeds say.

    Attributes:
        seeds: The fresh seeds.
        choosing: Runs of the finalists with the choosing seeds; empty if there is one finalist.
        comparing: Runs of the chosen one and of the baseline with the comparing seeds.
        searched: The finalist that was chosen; None if it is the baseline itself.
        baseline: Uniform LoRA at equal parameters.
    """

    seeds: Seeds
    choosing: dict[RankAllocation, Runs]
    comparing: dict[RankAllocation, Runs]
    searched: RankAllocation | None
    baseline: RankAllocation

    def reports(self, allocation: RankAllocation) -> list[Score]:
        """Returns an allocation's scores on the report documents, one per comparing seed."""
        return [run.report for run in self.comparing[allocation] if run.report]


def fresh_seeds(seed: int, choosing: int, comparing: int) -> Seeds:
    """Returns seeds that no trial of the search used, as many as asked for."""
    return Seeds(
        choosing=tuple(seed + 2 * FRESH + i for i in range(choosing)),
        comparing=tuple(seed + FRESH + i for i in range(comparing)),
    )


def fine_tunes(finalists: int, seeds: Seeds) -> int:
    """Returns the most fine-tunes that a confirmation takes."""
    choosing = finalists * len(seeds.choosing) if finalists > 1 else 0
    return choosing + 2 * len(seeds.comparing)


def mean_objective(runs: Runs) -> float:
    """Returns the mean objective on the search documents over the seeds."""
    return sum(run.objective for run in runs) / len(runs)


def run_name(allocation: RankAllocation, seed: int) -> str:
    """Returns the file name, without ending, of a run; ranks of many layers would be too long."""
    return f"{hashlib.sha256(str(allocation).encode()).hexdigest()[:12]}-{seed}"


class Confirmation:
    """Runs finalists and baseline; finished runs are read from the run folder.

    Args:
        choose: Fine-tunes an allocation with a seed and scores it on the search documents.
        compare: The same, with scores on the report documents too.
        folder: Run folder, where each run's scores are kept.
        store: Study that records each run as a trial.
        seeds: Fresh seeds, the same for all allocations.
        on_run: Told the number of finished runs and of all runs, after each.
        is_whole: Tells of a run whose scores are kept whether all else that it left is there too.
    """

    def __init__(
        self,
        *,
        choose: Callable[[RankAllocation, int], ConfirmationRun],
        compare: Callable[[RankAllocation, int], ConfirmationRun],
        folder: RunFolder,
        store: TrialStore,
        seeds: Seeds,
        on_run: Callable[[int, int], None],
        is_whole: Callable[[RankAllocation, int], bool] = lambda allocation, seed: True,
    ) -> None:
        self._choose, self._compare = choose, compare
        self._folder, self._store, self._seeds = folder, store, seeds
        self._on_run, self._is_whole = on_run, is_whole
        self._recorded = {(trial.allocation, trial.seed) for trial in store.trials()}
        self._done = self._total = 0

    def confirm(
        self,
        finalists: Sequence[RankAllocation],
        baseline_for: Callable[[RankAllocation], RankAllocation],
    ) -> Confirmed:
        """Chooses one of the finalists and compares it with the baseline.

        Args:
            finalists: Best allocations of the search, best first, at least one.
            baseline_for: Uniform LoRA at the parameters of an allocation.

        Raises:
            RecoveryError: If a fine-tune diverges; unlike in the search there is no other to take.
        """
        self._done, self._total = 0, fine_tunes(len(finalists), self._seeds)
        choosing: dict[RankAllocation, Runs] = {}
        if len(finalists) > 1:
            for finalist in finalists:
                choosing[finalist] = self._runs(finalist, self._seeds.choosing, self._choose)
        # Of equal ones the better in the search comes first.
        chosen = max(finalists, key=lambda a: mean_objective(choosing[a]) if choosing else 0.0)
        baseline = baseline_for(chosen)
        if chosen == baseline:
            self._total -= len(self._seeds.comparing)
        comparing = {
            allocation: self._runs(allocation, self._seeds.comparing, self._compare)
            for allocation in dict.fromkeys((chosen, baseline))
        }
        return Confirmed(
            seeds=self._seeds,
            choosing=choosing,
            comparing=comparing,
            searched=None if chosen == baseline else chosen,
            baseline=baseline,
        )

    def _runs(
        self,
        allocation: RankAllocation,
        seeds: Sequence[int],
        run: Callable[[RankAllocation, int], ConfirmationRun],
    ) -> Runs:
        runs = []
        for seed in seeds:
            name = f"evaluations/{run_name(allocation, seed)}"
            reports = seeds == self._seeds.comparing
            result = self._folder.read_result(name, ConfirmationRun.from_json, documents=reports)
            if result is None or not self._is_whole(allocation, seed):
                done = run(allocation, seed)
                if done.report is not None:
                    self._folder.write_score(f"{name}.parquet", done.report)
                self._folder.write_json(f"{name}.json", done.to_json())
                # As it reads back, so that a run broken off ends like one that was not.
                result = ConfirmationRun.from_json(json.loads(json.dumps(done.to_json())))
            if result.report is not None:
                report = self._folder.with_documents(f"{name}.parquet", result.report)
                result = replace(result, report=report)
            if (allocation, seed) not in self._recorded:
                self._store.add(_trial(allocation, seed, len(self._recorded), result))
                self._recorded.add((allocation, seed))
            runs.append(result)
            self._done += 1
            self._on_run(self._done, self._total)
        return tuple(runs)


def _trial(allocation: RankAllocation, seed: int, position: int, result: ConfirmationRun) -> Trial:
    return Trial(
        position=position,
        phase=Phase.CONFIRMATION,
        allocation=allocation,
        seed=seed,
        fidelity=1.0,
        state=TrialState.COMPLETE,
        score=result.search,
        objective=result.objective,
        train_loss=result.train_loss,
        seconds=result.seconds,
    )
