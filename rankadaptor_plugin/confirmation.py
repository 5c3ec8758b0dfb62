"""Confirmation: finalists and uniform LoRA again, with seeds and documents the search never saw.

The finalists run first; the one with the best mean objective on the *search* documents over the
fresh seeds goes on. It alone is compared with uniform LoRA at the same parameter budget, on the
*report* documents. So the report documents decide one comparison and select nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.scores import Score
from rankadaptor_plugin.trials import Phase, Trial, TrialState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rankadaptor_plugin.ranks import RankAllocation
    from rankadaptor_plugin.run_folder import RunFolder
    from rankadaptor_plugin.study import TrialStore

FRESH = 1_000_000
"""Distance of the confirmation's seeds from the seed of the search."""


@dataclass(frozen=True, kw_only=True)
class ConfirmationRun:
    """One fine-tune of an allocation with a fresh seed.

    Attributes:
        search: Scores on the search documents.
        report: Scores on the report documents, with per-document values.
        objective: What the search maximizes, on the search documents.
        train_loss: See `rankadaptor_plugin.trials.Outcome`.
        seconds: Wall time by part: ``recovery`` and ``oracle``.
    """

    search: Score
    report: Score
    objective: float
    train_loss: float
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "search": self.search.to_json(),
            "report": self.report.to_json(per_document=True),
            "objective": self.objective,
            "train_loss": self.train_loss,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ConfirmationRun:
        """Builds a run from what `to_json` returned."""
        scores = {key: Score.from_json(data[key]) for key in ("search", "report")}
        return cls(**{**data, **scores})


Run = Callable[["RankAllocation", int], ConfirmationRun]
"""Fine-tunes an allocation with a seed and scores it on both kinds of documents."""


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """What the fresh seeds say.

    Attributes:
        seeds: The fresh seeds.
        runs: One run per seed, by allocation: the finalists, then the baseline.
        searched: The finalist that goes on; None if it is the baseline itself.
        baseline: Uniform LoRA at equal parameters.
    """

    seeds: tuple[int, ...]
    runs: dict[RankAllocation, tuple[ConfirmationRun, ...]]
    searched: RankAllocation | None
    baseline: RankAllocation

    def mean_objective(self, allocation: RankAllocation) -> float:
        """Returns an allocation's mean objective on the search documents, over the seeds."""
        runs = self.runs[allocation]
        return sum(run.objective for run in runs) / len(runs)


def fresh_seeds(seed: int, count: int) -> tuple[int, ...]:
    """Returns seeds that no trial of the search used."""
    return tuple(seed + FRESH + i for i in range(count))


def run_name(allocation: RankAllocation, seed: int) -> str:
    """Returns the file name, without ending, of a run; ranks of many layers would be too long."""
    return f"{hashlib.sha256(str(allocation).encode()).hexdigest()[:12]}-{seed}"


def confirm(
    finalists: Sequence[RankAllocation],
    baseline_for: Callable[[RankAllocation], RankAllocation],
    run: Run,
    folder: RunFolder,
    store: TrialStore,
    seeds: Sequence[int],
    on_run: Callable[[int, int], None],
) -> Confirmed:
    """Runs finalists and baseline with fresh seeds; finished runs are read from the folder.

    Args:
        finalists: Best allocations of the search, at least one.
        baseline_for: Uniform LoRA at the parameters of an allocation.
        run: Fine-tunes and scores.
        folder: Run folder, where each run's scores are kept.
        store: Study that records each run as a trial.
        seeds: Fresh seeds, the same for all allocations.
        on_run: Told the number of finished runs and of all runs, after each.

    Raises:
        RecoveryError: If a fine-tune diverges; unlike in the search there is no other to take.
    """
    recorded = {(trial.allocation, trial.seed) for trial in store.trials()}
    runs: dict[RankAllocation, tuple[ConfirmationRun, ...]] = {}
    others = {baseline_for(finalists[0])} - set(finalists)
    total = (len(finalists) + len(others)) * len(seeds)

    def all_seeds(allocation: RankAllocation) -> None:
        if allocation in runs:
            return
        done = []
        for seed in seeds:
            name = f"evaluations/{run_name(allocation, seed)}.json"
            if (kept := folder.read_json(name)) is None:
                kept = run(allocation, seed).to_json()
                folder.write_json(name, kept)
            # Always as it reads back, so that a run broken off ends like one that was not.
            result = ConfirmationRun.from_json(kept)
            if (allocation, seed) not in recorded:
                store.add(_trial(allocation, seed, len(recorded), result))
                recorded.add((allocation, seed))
            done.append(result)
            on_run(len(runs) * len(seeds) + len(done), total)
        runs[allocation] = tuple(done)

    for finalist in finalists:
        all_seeds(finalist)
    order = sorted(
        runs, key=lambda a: sum(r.objective for r in runs[a]), reverse=True
    )  # stable: of equal ones the better in the search comes first
    baseline = baseline_for(order[0])
    all_seeds(baseline)
    searched = None if order[0] == baseline else order[0]
    return Confirmed(seeds=tuple(seeds), runs=runs, searched=searched, baseline=baseline)


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
