"""Rates at which the noise floor skips a search, correctly and wrongly, in simulations.

    python benchmarks/noise_rule.py

Allocations and seeds are normal, residual sd 1; one score is both objective and verdict, on as many
documents in the final comparison as in the pilot. A search is worth it where its expected gain is
above what the comparison can tell from noise with an even chance.
"""

from __future__ import annotations

import argparse
import json
import math
from datetime import date
from pathlib import Path

import numpy as np

from rankadaptor_plugin.verdict.noise_floor import Design, assess, expected_best_gain, reliability

RESULTS = Path(__file__).parent / "results"
TRIALS, SEEDS = 30, 5


def simulated(icc: float, allocations: int, seeds: int, pilots: int) -> dict[str, float]:
    """Returns the shares of pilots by outcome, and the true gain over the true floor."""
    rng = np.random.default_rng(7)
    between = math.sqrt(icc / (1 - icc))
    counts = dict.fromkeys(("below the noise", "open", "detectable"), 0)
    for _ in range(pilots):
        table = between * rng.normal(size=(allocations, 1)) + rng.normal(size=(allocations, seeds))
        found = reliability(table)
        floor = assess(found, found, TRIALS, Design(seeds=SEEDS))
        counts[floor.outcome] += 1
    truth = expected_best_gain(TRIALS, between, icc) / float(Design(seeds=SEEDS).detectable(1.0))
    return {"gain / floor": truth} | {name: n / pilots for name, n in counts.items()}


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pilots", type=int, default=1000)
    pilots = parser.parse_args().pilots
    rows = []
    print("| pilot | true ICC | gain / floor | below the noise | open | detectable |")
    print("| --- | --: | --: | --: | --: | --: |")
    for allocations, seeds in ((4, 3), (8, 3)):
        for icc in (0.0, 0.3, 0.6, 0.9):
            found = simulated(icc, allocations, seeds, pilots)
            rows.append({"allocations": allocations, "seeds": seeds, "icc": icc, **found})
            cells = " | ".join(f"{value:.2f}" for value in found.values())
            print(f"| {allocations} x {seeds} | {icc:.1f} | {cells} |", flush=True)
    path = RESULTS / f"noise_rule-{date.today().isoformat()}.json"
    path.write_text(json.dumps({"pilots": pilots, "rows": rows}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
