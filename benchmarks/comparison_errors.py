"""How often two equally good models are found different, by `compare` and by a run's verdict.

    python benchmarks/comparison_errors.py

Simulated: 7 tasks of 300 documents, confidence 0.95, so 5 % is what is asked for. A value is the
document's difficulty, what the model makes of it, what the seed makes of all of them, and chance.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.verdict.bootstrap import compare_pairs
from rankadaptor_plugin.verdict.statistics import compare

RESULTS = Path(__file__).parent / "results"
TASKS, DOCUMENTS, RESAMPLES = 7, 300, 1000
METRIC = "value"
CASES: dict[str, dict[str, Any]] = {
    "nats, 5 paired, seeds change nothing": {"seed": 0.0},
    "nats, 5 paired, about as much as documents": {"seed": 0.01},
    "nats, 5 paired, much more": {"seed": 0.05},
    "accuracy, 5 paired, about as much": {"seed": 0.03, "binary": True},
    "accuracy, 5 paired, much more": {"seed": 0.1, "binary": True},
    "accuracy, 5 and 5 not paired, much more": {"seed": 0.1, "binary": True, "paired": False},
    "nats, 3 paired, much more": {"seed": 0.05, "seeds": 3},
    "nats, 2 paired, much more": {"seed": 0.05, "seeds": 2},
}


def models(
    rng: np.random.Generator,
    *,
    seed: float,
    seeds: int = 5,
    binary: bool = False,
    paired: bool = True,
) -> list[dict[int, list[Any]]]:
    """Returns two models: values of shape (documents,) by seed and task."""
    difficulty = rng.normal(size=(TASKS, DOCUMENTS))
    shared = 0.05 * rng.normal(size=(seeds, 1, 1))
    found = []
    for number in range(2):
        both = shared if paired else 0.05 * rng.normal(size=(seeds, 1, 1))
        own = 0.3 * rng.normal(size=(TASKS, DOCUMENTS)) + seed * rng.normal(size=(seeds, 1, 1))
        values = difficulty + both + own + 0.3 * rng.normal(size=(seeds, TASKS, DOCUMENTS))
        values = (values > 0).astype(float) if binary else values
        first = 0 if paired else 100 * number
        found.append({first + s: list(values[s]) for s in range(seeds)})
    return found


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comparisons", type=int, default=400)
    comparisons = parser.parse_args().comparisons
    keys = [str(i) for i in range(DOCUMENTS)]
    weights = {f"task{t}": 1.0 for t in range(TASKS)}
    rows = []
    print("| case | compare | verdict |\n| --- | --: | --: |")
    for name, case in CASES.items():
        rng, found = np.random.default_rng(1), {"compare": 0, "verdict": 0}
        for number in range(comparisons):
            pair = models(rng, **case)
            by_key = tuple(
                {
                    s: {t: (keys, v) for t, v in zip(weights, tasks, strict=True)}
                    for s, tasks in m.items()
                }
                for m in pair
            )
            (difference,) = compare_pairs([by_key], weights, resamples=RESAMPLES, seed=number)
            found["compare"] += difference.is_gain or difference.is_loss
            if case.get("paired", True):
                scores = [
                    [
                        Score(
                            tasks={
                                t: TaskScore.of({METRIC: v.tolist()})
                                for t, v in zip(weights, tasks, strict=True)
                            }
                        )
                        for tasks in m.values()
                    ]
                    for m in pair
                ]
                verdict = compare(*scores, METRIC, weights)
                found["verdict"] += verdict.is_gain or verdict.is_loss
        shares = {way: count / comparisons for way, count in found.items()}
        if not case.get("paired", True):
            del shares["verdict"]
        rows.append({"case": name, **shares})
        cells = (f"{100 * shares[way]:.1f}" if way in shares else "" for way in found)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    path = RESULTS / f"comparison_errors-{date.today().isoformat()}.json"
    content = {"comparisons": comparisons, "resamples": RESAMPLES, "rows": rows}
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
