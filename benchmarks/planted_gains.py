"""Whole runs on simulated fine-tunes: how often a gain is claimed that is none, or found that is.

    OMP_NUM_THREADS=1 python benchmarks/planted_gains.py

Tune stage, noise floor, search and race are those of a run of the embedded default; only fine-tunes
and their scores are drawn. A document is answered rightly if its difficulty, what the fine-tune is
worth, what its seed makes of it, and chance add up to more than zero; `gold_logprob` is that sum.
The spreads are those of the embedded model's accuracies on its 7 x 220 report documents: 72 % are
right, and the difference of two fine-tunes with the same seed has a standard deviation of 1.15
points, 0.8 of which are chance.

* null: no learning rate, no part of the stack and no ranks change anything.
* stack: a part of the stack is worth two points.
* ranks: allocations that give the last layer more than the first are worth two points.

A run claims a gain if it delivers anything but LoRA by the recipe, or says that ranks alone gain.
Printed and written to ``results/planted_gains-DATE.json``, with 95 % intervals (Wilson).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import zlib
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.storages import InMemoryStorage

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.core.trials import Outcome
from rankadaptor_plugin.oracle.oracle import Objective
from rankadaptor_plugin.pipeline.stage import race_entrants
from rankadaptor_plugin.pipeline.tune_step import TuneStep
from rankadaptor_plugin.search.bayes import bayes
from rankadaptor_plugin.search.performance.linear import bayes as bayes_model
from rankadaptor_plugin.search.samplers import SamplerSettings
from rankadaptor_plugin.search.search import search
from rankadaptor_plugin.search.study import TrialStore
from rankadaptor_plugin.verdict.noise import Question, measure
from rankadaptor_plugin.verdict.race import Confirmation, Confirmed, Rules, fresh_seeds

if TYPE_CHECKING:
    from collections.abc import Mapping

RESULTS = Path(__file__).resolve().parent / "results"
TASKS = tuple(f"task{i}" for i in range(7))
SPREAD, MEAN = 3.87, 2.25  # of difficulties, in units of chance: 72 % right, 0.049 of chance
POINT = 0.01 / 0.081  # what a point of accuracy is in these units, near two points
BY_SEED, BY_DOCUMENT = 0.58 * POINT, 0.3
SPACE = RankSpace(
    candidates=(2, 4, 6, 8, 10, 12),
    searchable=(True,) * 8,
    default_rank=8,
    costs=(468,) * 8,
    budget=8 * 8 * 468,
)
"""That of the embedded model."""


@dataclass(frozen=True)
class World:
    """What fine-tunes are worth.

    Attributes:
        number: Seed of all that is drawn.
        parts: Points of the parts of the stack.
        ranks: Points of allocations that give the last layer more than the first.
    """

    number: int
    parts: Mapping[str, float]
    ranks: float = 0.0

    def worth(self, allocation: RankAllocation, method: str) -> float:
        """Returns what an arm is worth, in points."""
        parts = sum(self.parts.get(part, 0.0) for part in method.split("+"))
        return parts + self.ranks * (allocation.ranks[-1] > allocation.ranks[0])

    def fine_tune(self, stack: str, allocation: RankAllocation, seed: int) -> Outcome:
        """Draws the scores of a fine-tune."""
        method = allocation.method or stack
        arm = zlib.crc32(f"{method} {allocation}".encode())
        own = np.random.default_rng([self.number, arm, seed])
        quality = POINT * self.worth(allocation, method) + BY_SEED * own.normal()
        scores = {
            purpose: self._score(purpose, quality, arm, own) for purpose in ("search", "report")
        }
        objective = scores["search"].mean("gold_logprob")
        return Outcome(
            **scores, objective=objective, train_loss=1.0, seconds={"recovery": 1.0, "oracle": 0.2}
        )

    def _score(self, purpose: str, quality: float, arm: int, own: np.random.Generator) -> Score:
        size = 100 if purpose == "search" else 220
        tasks = {}
        for number, task in enumerate(TASKS):
            place = [self.number, number, size]
            difficulty = np.random.default_rng(place).normal(MEAN, SPREAD, size)
            taste = BY_DOCUMENT * np.random.default_rng([*place, arm]).normal(size=size)
            values = difficulty + taste + quality + own.normal(size=size)
            tasks[task] = TaskScore.of(
                {"accuracy": (values > 0).astype(float).tolist(), "gold_logprob": values.tolist()},
                keys=[str(i) for i in range(size)],
            )
        return Score(tasks=tasks)


def run(world: World, folder: Path) -> Confirmed:
    """Makes one run of the embedded default on simulated fine-tunes."""
    config = run_file.load(None, [f"seed={world.number}"])
    weights = dict.fromkeys(TASKS, 1.0)
    objective = Objective(metric="gold_logprob", target=None, weights=weights)
    files, uniform, quiet = RunFolder(folder), SPACE.limited_uniform(), lambda *_: None
    plain = partial(world.fine_tune, "lora")
    step = TuneStep(plain, files, config, objective, uniform, parts=config.parts, on_run=quiet)
    tuned = step.run()
    made = partial(world.fine_tune, tuned.stack)
    question = Question(
        metrics=("accuracy", "gold_logprob"),
        decisive="accuracy",
        weights=weights,
        report_documents=dict.fromkeys(TASKS, 220),
    )
    noise = measure(SPACE, made, files, config, question, quiet)
    store = TrialStore(InMemoryStorage(), "search")
    for trial in noise.trials(SPACE) if noise else ():
        store.add(trial, SPACE)

    def sampler(seed: int) -> Any:
        settings = SamplerSettings(
            space=SPACE,
            seed=seed,
            n_startup_trials=0,
            candidates=config.search.candidates,
            final_candidates=config.search.final_candidates,
            performance_model=lambda: bayes_model(SPACE, config.performance_model, seed),
            metric="gold_logprob",
            priors=(),
            pareto=False,
        )
        return bayes(settings)

    found = search(SPACE, made, store, sampler, config.search, config.seed)
    reference, entrants = race_entrants(config, SPACE, tuned, found)
    rules = Rules(
        seeds=fresh_seeds(config.seed, config.confirm.seeds),
        confidence=config.confirm.confidence,
        metric="accuracy",
        weights=weights,
    )
    race = Confirmation(
        run=made,
        folder=files,
        store=TrialStore(InMemoryStorage(), "confirm"),
        rules=rules,
        on_run=quiet,
    )
    return race.confirm(entrants, reference)


def claims(confirmed: Confirmed) -> SimpleNamespace:
    """Returns what a run claims: that something gains over the recipe, that ranks alone do."""
    ranks = confirmed.ranks
    return SimpleNamespace(
        recovered=confirmed.delivered != confirmed.reference,
        ranks=ranks is not None and ranks.is_gain,
    )


CASES: dict[str, dict[str, Any]] = {
    "null": {"parts": {}},
    "stack": {"parts": {"compensate": 2.0}},
    "ranks": {"parts": {}, "ranks": 2.0},
}


def wilson(count: int, total: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share."""
    share, z = count / total, 1.96
    middle = share + z * z / 2 / total
    half = z * math.sqrt(share * (1 - share) / total + z * z / 4 / total**2)
    return (middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = {}
    print("| case | claims a gain over the recipe, % | claims a gain of ranks, % | any, % |")
    print("| --- | --: | --: | --: |")
    for case, settings in CASES.items():
        made = []
        for number in range(options.runs):
            with tempfile.TemporaryDirectory() as folder:
                made.append(claims(run(World(number, **settings), Path(folder))))
        counts = {
            "recipe": sum(one.recovered for one in made),
            "ranks": sum(one.ranks for one in made),
            "any": sum(one.recovered or one.ranks for one in made),
        }
        rows[case] = {
            name: {"count": count, "share": count / len(made), "interval": wilson(count, len(made))}
            for name, count in counts.items()
        }
        cells = [
            f"{100 * row['share']:.1f} ({100 * row['interval'][0]:.1f} to "
            f"{100 * row['interval'][1]:.1f})"
            for row in rows[case].values()
        ]
        print(f"| {case} | " + " | ".join(cells) + " |", flush=True)
    path = RESULTS / f"planted_gains-{date.today().isoformat()}.json"
    path.write_text(json.dumps({"runs": options.runs, "cases": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
