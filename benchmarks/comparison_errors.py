"""Error rates and power of the verdict of a run and of `compare`, in simulations.

    OMP_NUM_THREADS=1 python benchmarks/comparison_errors.py

Simulated: 2 tasks of 100 documents, confidence 0.95 of all comparisons together, so 5 % is what is
asked for. A value is the document's difficulty, what the model makes of it, what the seed makes of
all of them, and chance; accuracy is whether it is above 0. "seeds" is the standard deviation that a
seed adds, in multiples of what documents and chance add to a mean. Each of several models is
compared with one baseline, as in a race. False: any of equally good models differs from it. Power:
the first model, better by four standard errors of the paired difference with six seeds, is found
better.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankadaptor_plugin.verdict.statistics import Difference, Model, compare

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESULTS = Path(__file__).parent / "results"
TASKS, DOCUMENTS, EFFECT = ("a", "b"), 100, 4.0
KEYS = [str(i) for i in range(DOCUMENTS)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Settings of a simulation.

    Attributes:
        seeds: Seeds of each model; of one that no seed changes None.
        by_seed: What seeds add, as a multiple of what documents add.
        comparisons: Models that are compared with the baseline.
        paired: True if all have the same seeds.
        seedless: True if no seed changes the baseline.
        binary: True if a document is right or wrong, as in accuracy.
        heavy: True if some seeds are far off: Student's t with 3 degrees of freedom.
        uneven: True if seeds move the first model twice as far as the others.
    """

    seeds: int
    by_seed: float
    comparisons: int = 1
    paired: bool = True
    seedless: bool = False
    binary: bool = False
    heavy: bool = False
    uneven: bool = False

    @property
    def name(self) -> str:
        """The case in words."""
        parts = [f"{self.seeds} seeds"]
        parts += [f"{self.comparisons} comparisons"] if self.comparisons > 1 else []
        parts += ["not paired"] if not self.paired else []
        parts += ["baseline without seeds"] if self.seedless else []
        parts += ["accuracy"] if self.binary else []
        parts += ["seeds far off"] if self.heavy else []
        parts += ["first model moved twice as far"] if self.uneven else []
        return ", ".join(parts)

    def draw(self, rng: np.random.Generator, effect: float) -> list[Model]:
        """Returns the models, the baseline last."""
        size = len(TASKS) * DOCUMENTS
        sd = self.by_seed / math.sqrt(size)
        difficulty = 2 * rng.normal(size=size)
        shared = 0.5 * sd * rng.normal(size=(self.seeds, 1))
        models = []
        for number in range(self.comparisons + 1):
            last = number == self.comparisons
            count = 1 if last and self.seedless else self.seeds
            drawn = rng.standard_t(3, (count, 1)) / math.sqrt(3) if self.heavy else None
            by_seed = rng.normal(size=(count, 1)) if drawn is None else drawn
            values = difficulty + rng.normal(size=size) + rng.normal(size=(count, size))
            if not (last and self.seedless):
                far = 2 if self.uneven and number == 0 else 1
                values += far * sd * by_seed + (shared[:count] if self.paired else 0)
            values += effect if number == 0 else 0.0
            values = (values > 0).astype(float) if self.binary else values
            seeds = [None] if count == 1 else range(count * number * (not self.paired), 10**9)
            models.append(named(values, seeds))
        return models

    @property
    def stderr(self) -> float:
        """Standard error of a paired difference after six seeds."""
        return math.sqrt((2 * (1 + 1 / 6) + 2 * self.by_seed**2 / 6) / len(TASKS) / DOCUMENTS)


CASES = [
    *(
        Case(seeds=seeds, by_seed=by_seed)
        for seeds in (2, 3, 4, 6)
        for by_seed in (0.0, 0.5, 2.0, 5.0)
    ),
    *(Case(seeds=seeds, by_seed=5.0, paired=False) for seeds in (3, 6)),
    *(Case(seeds=seeds, by_seed=5.0, seedless=True, paired=False) for seeds in (3, 6)),
    *(
        Case(seeds=seeds, by_seed=by_seed, comparisons=count)
        for seeds in (3, 6)
        for by_seed in (0.0, 5.0)
        for count in (2, 4)
    ),
    *(Case(seeds=seeds, by_seed=b, binary=True) for seeds in (3, 6) for b in (0.0, 5.0)),
    *(Case(seeds=seeds, by_seed=5.0, heavy=True) for seeds in (3, 6)),
    *(Case(seeds=seeds, by_seed=5.0, comparisons=3, uneven=True) for seeds in (3, 6)),
    *(Case(seeds=seeds, by_seed=5.0, comparisons=3, heavy=True) for seeds in (3, 6)),
]


def named(values: NDArray[np.float64], seeds: Any) -> Model:
    """Returns a model of values (S, tasks x documents)."""
    return {
        seed: {
            task: (KEYS, row[i * DOCUMENTS : (i + 1) * DOCUMENTS]) for i, task in enumerate(TASKS)
        }
        for seed, row in zip(seeds, values, strict=False)
    }


def differences(case: Case, rng: np.random.Generator, effect: float) -> list[Difference]:
    """Returns the difference of each model from the baseline."""
    *models, baseline = case.draw(rng, effect)
    weights = dict.fromkeys(TASKS, 1.0)
    metric = "accuracy" if case.binary else "margin"
    race = [*models, baseline] if case.paired else []
    return [
        compare(model, baseline, metric, weights, comparisons=case.comparisons, race=race)
        for model in models
    ]


def simulate(case: Case, runs: int, rng: np.random.Generator) -> dict[str, Any]:
    """Returns the shares of false findings and of effects that were found."""
    false = found = 0
    for _ in range(runs):
        false += any(d.low > 0 or d.high < 0 for d in differences(case, rng, 0.0))
        found += differences(case, rng, EFFECT * case.stderr)[0].low > 0
    return {"case": case.name, **asdict(case), "false": false / runs, "power": found / runs}


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1200)
    runs = parser.parse_args().runs
    rows = []
    print("| case | seeds | false % | power % |\n| --- | --: | --: | --: |")
    for number, case in enumerate(CASES):
        row = simulate(case, runs, np.random.default_rng([1, number]))
        rows.append(row)
        shares = " | ".join(f"{100 * row[key]:.1f}" for key in ("false", "power"))
        print(f"| {case.name} | {case.by_seed:g} | {shares} |", flush=True)
    path = RESULTS / f"comparison_errors-{date.today().isoformat()}.json"
    path.write_text(json.dumps({"runs": runs, "rows": rows}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
