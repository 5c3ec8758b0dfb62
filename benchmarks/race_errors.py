"""How often the race of the finalists errs, what it finds, and how many fine-tunes it saves.

    OMP_NUM_THREADS=1 python benchmarks/race_errors.py

Simulated: competitors and uniform LoRA on the same seeds and 2 tasks of 100 documents. A score is
the allocation's own worth, what it makes of the document, what the seed makes of it, and chance.
Effects are in standard errors of a paired difference after six seeds, seed sd in multiples of what
documents add to that difference; accuracy is whether such a score is above 0. Three designs:

    race: ends for whoever is shown to be worse (`rankadaptor_plugin.verdict.race`);
    fixed: the same scores without elimination;
    halves: 3 seeds choose one competitor on other documents, 5 further ones compare it with uniform
        LoRA by the Welch-Satterthwaite interval of `rankadaptor_plugin.verdict.statistics`.

Errors: a gain claimed for a competitor that has none; the best competitor (the first of equal ones)
eliminated although it is no worse than uniform LoRA. Each may happen in 5 % of the races; as
intervals have two ends, 2.5 % is what to expect of the first. Power: a competitor with a gain is
delivered.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from rankadaptor_plugin.verdict.race import Advantage, Rules, eliminated

RESULTS = Path(__file__).parent / "results"
TASKS, DOCUMENTS, CONFIDENCE, FULL = 2, 100, 0.95, 6
CHOOSING, COMPARING = 3, 5  # seeds of the former design
SHARES = (1 / TASKS,) * TASKS
Worth = tuple[float, ...]  # of each competitor, uniform LoRA being 0
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """What is simulated.

    Attributes:
        name: What the competitors are worth, in words.
        worth: The same in standard errors.
        seed_sd: What seeds add to the difference, as a multiple of what documents add.
        seeds: Seeds of the race.
        least_seeds: Seeds before anyone may be eliminated.
        binary: Whether a document is right or wrong, as in accuracy.
        heavy: Whether some seeds are far off: their effects follow Student's t with 3 degrees of
            freedom in place of a normal distribution.
    """

    name: str
    worth: Worth
    seed_sd: float
    seeds: int = FULL
    least_seeds: int = 3
    binary: bool = False
    heavy: bool = False

    @property
    def stderr(self) -> float:
        """Standard error of a paired difference after six seeds of documents with sd 1."""
        documents = 2 * (1 + 1 / FULL) / (TASKS * DOCUMENTS)
        return math.sqrt(documents + 2 * self._own_seed_sd**2 / FULL)

    @property
    def _own_seed_sd(self) -> float:
        return self.seed_sd / math.sqrt(TASKS * DOCUMENTS)

    def draw(self, rng: np.random.Generator, seeds: int) -> Array:
        """Returns scores (allocations, seeds, tasks, documents), uniform LoRA first."""
        count, documents = 1 + len(self.worth), (TASKS, DOCUMENTS)
        worth = self.stderr * np.array([0.0, *self.worth]).reshape(-1, 1, 1, 1)
        own = rng.normal(size=(count, 1, *documents)) + rng.normal(size=(count, seeds, *documents))
        size = (count, seeds, 1, 1)
        by_seed = rng.standard_t(3, size) / math.sqrt(3) if self.heavy else rng.normal(size=size)
        own += self._own_seed_sd * by_seed
        own += 0.5 * self._own_seed_sd * rng.normal(size=(1, seeds, 1, 1))
        shared = 2.0 * rng.normal(size=(1, 1, *documents))
        found: Array = worth + own + shared
        return (found > 0).astype(float) if self.binary else found


CASES = [
    *(
        Case(name, worth, seed_sd)
        for seed_sd in (0.0, 0.5, 2.0, 5.0)
        for name, worth in (
            ("none of 1 gains", (0.0,)),
            ("none of 2 gains", (0.0, 0.0)),
            ("none of 4 gains", (0.0, 0.0, 0.0, 0.0)),
            ("1 of 2 gains", (4.0, 0.0)),
            ("1 of 4 gains", (4.0, 0.0, 0.0, 0.0)),
            ("2 of 3 gain", (4.0, 3.0, 0.0)),
            ("1 gains, 1 is bad", (4.0, -6.0)),
            ("both are bad", (-6.0, -8.0)),
        )
    ),
    *(
        Case("none of 2 gains", (0.0, 0.0), seed_sd, seeds, min(seeds, 3))
        for seeds in (2, 3, 4, 5)
        for seed_sd in (0.0, 5.0)
    ),
    *(
        Case(name, worth, seed_sd, FULL, 2)
        for seed_sd in (0.0, 5.0)
        for name, worth in (("none of 2 gains", (0.0, 0.0)), ("1 gains, 1 is bad", (4.0, -6.0)))
    ),
    *(
        Case(name, worth, seed_sd, binary=True)
        for seed_sd in (0.0, 5.0)
        for name, worth in (("none of 2 gains", (0.0, 0.0)), ("1 of 2 gains", (4.0, 0.0)))
    ),
    *(
        Case(name, worth, 5.0, heavy=True)
        for name, worth in (("none of 2 gains", (0.0, 0.0)), ("1 of 2 gains", (4.0, 0.0)))
    ),
]


def advantages(scores: Array, seeds: int) -> dict[int, Advantage]:
    """Returns the advantage of each competitor with the first seeds."""
    differences = scores[1:, :seeds] - scores[:1, :seeds]
    return {
        i: Advantage(tuple(d[:, task] for task in range(TASKS)), SHARES)
        for i, d in enumerate(differences)
    }


def race(scores: Array, case: Case) -> tuple[int | None, list[int], set[int], int]:
    """Returns the delivered competitor, all with a claimed gain, those out, and fine-tunes."""
    rules = Rules(
        competitors=len(case.worth),
        seeds=case.seeds,
        least_seeds=case.least_seeds,
        confidence=CONFIDENCE,
    )
    racing, runs = set(range(len(case.worth))), 0
    for seeds in range(1, case.seeds + 1):
        if not racing:
            break
        runs += len(racing) + 1
        if rules.is_look(seeds):
            found = {i: a for i, a in advantages(scores, seeds).items() if i in racing}
            racing -= eliminated(found, rules.confidence_after(seeds)).keys()
    every = advantages(scores, case.seeds)
    final = {i: every[i].interval(rules.confidence_after(case.seeds)) for i in racing}
    gains = [i for i in racing if final[i].is_gain]
    best = max(gains, key=lambda i: final[i].estimate) if gains else None
    return best, gains, set(range(len(case.worth))) - racing, runs


def halves(choosing: Array, comparing: Array) -> int | None:
    """Returns what the former design delivers."""
    several = len(choosing) > 2  # noqa: PLR2004  (with uniform LoRA)
    chosen = int(choosing[1:].mean(axis=(1, 2, 3)).argmax()) if several else 0
    low, _ = welch(advantages(comparing, COMPARING)[chosen])
    return chosen if low > 0 else None


def welch(advantage: Advantage) -> tuple[float, float]:
    """Returns the Welch-Satterthwaite interval, as `statistics.compare` does, from arrays."""
    per_seed = advantage.per_seed
    seeds = len(per_seed)
    parts = [(float(per_seed.var(ddof=1)) / seeds, seeds - 1)]
    for share, values in zip(advantage.shares, advantage.values, strict=True):
        documents = values.shape[1]
        variance = float(values.mean(axis=0).var(ddof=1)) / documents
        parts.append((share * share * variance, documents - 1))
    total = sum(part for part, _ in parts)
    freedom = 1 / sum((part / total) ** 2 / df for part, df in parts)
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(total)
    return float(per_seed.mean()) - half, float(per_seed.mean()) + half


def simulate(case: Case, races: int, rng: np.random.Generator) -> dict[str, Any]:
    """Returns the shares of errors and finds, and the mean numbers of fine-tunes."""
    worth, best = case.worth, max(case.worth)
    found = dict.fromkeys(("false", "out", "race", "fixed", "halves", "halves_false", "runs"), 0)
    for _ in range(races):
        scores = case.draw(rng, case.seeds)
        delivered, gains, out, runs = race(scores, case)
        fixed, *_ = race(scores, replace(case, least_seeds=case.seeds))
        former = halves(case.draw(rng, CHOOSING), case.draw(rng, COMPARING))
        found["false"] += any(worth[i] <= 0 for i in gains)
        found["out"] += best >= 0 and worth.index(best) in out
        found["race"] += delivered is not None and worth[delivered] > 0
        found["fixed"] += fixed is not None and worth[fixed] > 0
        found["halves"] += former is not None and worth[former] > 0
        found["halves_false"] += former is not None and worth[former] <= 0
        found["runs"] += runs
    means = {name: count / races for name, count in found.items()}
    count = len(worth)
    former_runs = 2 * COMPARING + (count * CHOOSING if count > 1 else 0)
    return {
        "case": case.name,
        "worth": worth,
        "seed_sd": case.seed_sd,
        "seeds": case.seeds,
        "least_seeds": case.least_seeds,
        "binary": case.binary,
        "heavy": case.heavy,
        "false_gain": means["false"],
        "best_eliminated": means["out"],
        "power": means["race"] if best > 0 else None,
        "fixed_power": means["fixed"] if best > 0 else None,
        "halves_power": means["halves"] if best > 0 else None,
        "halves_false_gain": means["halves_false"],
        "fine_tunes": means["runs"],
        "fixed_fine_tunes": case.seeds * (count + 1),
        "halves_fine_tunes": former_runs,
    }


def percent(value: float | None) -> str:
    """Returns a table cell."""
    return "" if value is None else f"{100 * value:.1f}"


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--races", type=int, default=1200)
    races = parser.parse_args().races
    print(
        "| case | seed sd | seeds | false gain % | best out % | power %: race | fixed | halves "
        "| halves: false gain % | fine-tunes: race | fixed | halves |\n|" + " --- |" * 12
    )
    rows = []
    for number, case in enumerate(CASES):
        row = simulate(case, races, np.random.default_rng([1, number]))
        rows.append(row)
        cells = (
            case.name + ", accuracy" * case.binary + ", seeds far off" * case.heavy,
            f"{case.seed_sd:g}",
            f"{case.least_seeds} to {case.seeds}",
            *map(percent, (row["false_gain"], row["best_eliminated"], row["power"])),
            *map(percent, (row["fixed_power"], row["halves_power"], row["halves_false_gain"])),
            *(f"{row[n]:.1f}" for n in ("fine_tunes", "fixed_fine_tunes", "halves_fine_tunes")),
        )
        print(f"| {' | '.join(cells)} |", flush=True)
    path = RESULTS / f"race_errors-{date.today().isoformat()}.json"
    content = {"races": races, "confidence": CONFIDENCE, "rows": rows}
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
