"""The noise floor before the search: a few allocations, each fine-tuned with several seeds.

Uniform LoRA and some random allocations show how much of what differs between allocations is more
than seed noise, for each score, and whether any gain that a search could plausibly find would rise
above the noise of the final comparison (`rankadaptor_plugin.verdict.noise_floor`).
The fine-tunes with the search's own seed become its first trials, so they are not made twice.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from rankadaptor_plugin.core.errors import OracleError, RecoveryError
from rankadaptor_plugin.core.scores import unit_of_difference
from rankadaptor_plugin.core.trials import Phase
from rankadaptor_plugin.search.space import untried
from rankadaptor_plugin.verdict.noise_floor import (
    Design,
    Floor,
    Reliability,
    assess,
    document_sd,
    fine_tunes_to_detect,
    reliability,
    seed_scale,
)
from rankadaptor_plugin.verdict.race import FRESH, is_stored, run_name, stored_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
    from rankadaptor_plugin.core.run_folder import RunFolder
    from rankadaptor_plugin.core.trials import Outcome, Trial
    from rankadaptor_plugin.verdict.race import Runs

logger = logging.getLogger(__name__)

OBJECTIVE = "objective"
"""Name of the search objective among the names of the scores."""

_LEAST = 2  # allocations, and seeds: fewer show no variance


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Reliability of each score and the noise floor, from the fine-tunes before the search.

    Attributes:
        runs: Runs by allocation, one per seed.
        tables: Values by score, one row per allocation and one column per seed.
        seeds: The seeds; the first is that of the search.
        scores: Reliability by score: the objective, and the mean over the tasks of each metric.
        decisive: The metric of the verdict, in which gains are meant.
        floor: The noise floor and the gain to expect; None if the search documents do not have
            the metric of the verdict, as with another oracle for the search.
        needed: Fine-tunes that a comparison takes to show a gain, by gain in the unit of
            `decisive`; None where the documents do not suffice. Empty along with the floor.
        seconds: Mean wall time of a fine-tune and its evaluation.
        left: Fine-tunes of the run file that are still to be made, at most.
    """

    runs: Mapping[RankAllocation, Runs]
    tables: Mapping[str, list[list[float]]]
    seeds: tuple[int, ...]
    scores: Mapping[str, Reliability]
    decisive: str
    floor: Floor | None
    needed: Mapping[float, int | None]
    seconds: float
    left: int

    @property
    def is_below_noise(self) -> bool:
        """True if no plausible gain rises above the noise."""
        return self.floor is not None and self.floor.below_noise

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, for noise.json and the report."""
        return {
            "allocations": [list(allocation.ranks) for allocation in self.runs],
            "seeds": list(self.seeds),
            "values": dict(self.tables),
            "scores": {name: score.to_json() for name, score in self.scores.items()},
            "decisive": self.decisive,
            "floor": self.floor and self.floor.to_json(),
            "sentence": self.sentence(),
            "needed": [{"gain": g, "fine_tunes": count} for g, count in self.needed.items()],
            "seconds_per_fine_tune": self.seconds,
            "fine_tunes_left": self.left,
        }

    def sentence(self) -> str:
        """Says in plain English what the floor means for the search."""
        if self.floor is None:
            return (
                f"The verdict is about {self.decisive} of other tasks, or of another oracle, than "
                "the search asks: whether a gain in that can rise above the noise is not known "
                "beforehand."
            )
        factor = 100.0 if self.decisive == "accuracy" else 1.0
        unit = unit_of_difference(self.decisive) or f"in {self.decisive}"
        return self.floor.sentence(unit=f" {unit}", factor=factor)

    def trials(self, space: RankSpace) -> list[Trial]:
        """Returns the runs with the search's seed as trials; only those that lie in the space."""
        return [
            runs[0].trial(
                position=position,
                phase=Phase.INITIALIZATION,
                allocation=allocation,
                seed=self.seeds[0],
                parameters=space.parameters(allocation),
            )
            for position, (allocation, runs) in enumerate(
                (a, several) for a, several in self.runs.items() if space.contains(a)
            )
        ]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Metrics and documents of the run.

    Attributes:
        metrics: Metrics of the search documents.
        decisive: The metric of the verdict.
        weights: Weight per task in the mean.
        report_documents: Documents of the final comparison by task.
    """

    metrics: Sequence[str]
    decisive: str
    weights: Mapping[str, float]
    report_documents: Mapping[str, int]


def measure(
    space: RankSpace,
    run: Callable[[RankAllocation, int], Outcome],
    folder: RunFolder,
    config: RunConfig,
    question: Question,
    on_run: Callable[[int, int], None],
    allows: Callable[[int], bool] = lambda runs: True,
) -> Noise | None:
    """Fine-tunes and scores every allocation with every seed; finished runs are read back.

    An allocation that diverges is left out, with a warning.

    Args:
        space: The rank space.
        run: Fine-tunes an allocation with a seed and scores it on the search documents.
        folder: Run folder, where each run's scores are kept.
        config: The run file.
        question: What the run is asked.
        on_run: Told the number of finished runs and of all runs, before each and at the end.
        allows: Says whether there is time for more runs; if not, there are fewer seeds.

    Returns:
        What ``noise.json`` of the run folder says; None if fewer than two allocations can be
        fine-tuned, or there is no time for two seeds.
    """
    seeds = noise_seeds(config.seed, config.noise.seeds)
    allocations = noise_allocations(space, config.noise.allocations, config.seed)
    runs: dict[RankAllocation, Runs] = dict.fromkeys(allocations, ())
    done, total, whole = 0, len(seeds) * len(runs), len(seeds)
    for index, seed in enumerate(seeds):
        for allocation in list(runs):
            # Of one seed alone nothing can be said.
            together = seeds[:_LEAST] if index < _LEAST else (seed,)
            missing = _missing(runs, together, folder)
            if missing and not allows(missing):
                whole = min(whole, index)
                break
            on_run(done, total)
            name = f"noise/{run_name(allocation, seed)}"
            try:
                made = stored_run(folder, name, partial(run, allocation, seed), "search")
            except (RecoveryError, OracleError) as error:
                logger.warning("%s is left out of the noise floor: %s", allocation, error)
                del runs[allocation]
                continue
            runs[allocation] += (made,)
            done += 1
    on_run(total, total)
    if whole < min(_LEAST, len(seeds)):
        logger.warning("The noise floor is not measured: it does not fit into the time of the run")
        return None
    if len(runs) < _LEAST:
        logger.warning("Fewer than two allocations could be fine-tuned; no noise floor is known")
        return None
    runs = {allocation: several[:whole] for allocation, several in runs.items()}
    made_trials = sum(space.contains(allocation) for allocation in runs)
    noise = assessed(runs, seeds[:whole], config, question, made_trials)
    folder.write_json("noise.json", noise.to_json())
    return noise


def _missing(allocations: Iterable[RankAllocation], seeds: Sequence[int], folder: RunFolder) -> int:
    """Returns the number of runs that are still to be made."""
    names = (f"noise/{run_name(a, seed)}" for seed in seeds for a in allocations)
    return sum(not is_stored(folder, name) for name in names)


def assessed(
    runs: Mapping[RankAllocation, Runs],
    seeds: tuple[int, ...],
    config: RunConfig,
    question: Question,
    made: int,
) -> Noise:
    """Draws the conclusions from finished runs; arguments as those of `measure`.

    `made` is how many of the allocations are trials of the search as well.
    """
    confirm, target = config.confirm, config.oracle.target
    decisive, report_documents = question.decisive, question.report_documents
    weights = {target: 1.0} if target else question.weights
    judged = {target} if target in report_documents else report_documents.keys()
    tables = {OBJECTIVE: [[run.objective for run in several] for several in runs.values()]}
    for metric in question.metrics:
        tables[metric] = [[r.search.mean(metric, weights) for r in row] for row in runs.values()]
    scores = {
        name: reliability(table, confidence=confirm.confidence) for name, table in tables.items()
    }
    floor, needed = None, {}
    # Of other tasks, or another metric, the search documents say nothing.
    if decisive in scores and judged == weights.keys():
        tried = [[run.search for run in several] for several in runs.values()]
        scale = seed_scale(tried, decisive, weights, report_documents, scores[decisive].seed_sd)
        design = Design(
            seeds=confirm.seeds,
            # The race's intervals hold for all comparisons together.
            confidence=1 - (1 - confirm.confidence) / config.comparisons,
            document_sd=document_sd(tried, decisive, weights, report_documents),
            models=max(2, config.race_models),
        )
        floor = assess(
            scores[decisive], scores[OBJECTIVE], config.search.n_trials, design, seed_scale=scale
        )
        seed_sd = scale * scores[decisive].seed_sd
        needed = {gain: fine_tunes_to_detect(gain, seed_sd, design) for gain in config.noise.gains}
    seconds = [sum(run.seconds.values()) for several in runs.values() for run in several]
    return Noise(
        runs=runs,
        tables=tables,
        seeds=seeds,
        scores=scores,
        decisive=decisive,
        floor=floor,
        needed=needed,
        seconds=sum(seconds) / len(seconds),
        left=fine_tunes_left(config, made),
    )


def fine_tunes_left(config: RunConfig, made: int) -> int:
    """Returns the most fine-tunes that search and race still take after `made` trials."""
    trials = config.search.n_trials
    again = trials if config.confirm.best_random else 0
    return max(0, trials - made) + again + config.race_fine_tunes


def noise_seeds(seed: int, count: int) -> tuple[int, ...]:
    """Returns the seeds: that of the search, then others that no trial or confirmation uses."""
    return (seed, *(seed + 3 * FRESH + i for i in range(count - 1)))


def noise_allocations(space: RankSpace, count: int, seed: int) -> list[RankAllocation]:
    """Returns uniform LoRA and random allocations, `count` together if the space has so many."""
    uniform = space.uniform()
    tried = {tuple(space.row(uniform))}
    drawn = untried(space, tried, count - 1, np.random.default_rng([seed, FRESH]))
    return list(dict.fromkeys([uniform, *(space.allocation(row) for row in drawn)]))
