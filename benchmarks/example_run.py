"""Runs a run file, or takes over its finished run, and keeps the figures of its report.

    python benchmarks/example_run.py benchmarks/run_files/stories260k.toml

Writes ``results/NAME-DATE.json`` (scores with intervals, verdict, allocations, costs; no paths) and
prints a table of accuracies.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

from rankadaptor_plugin.config import run_file

RESULTS = Path(__file__).resolve().parent / "results"
KEPT = (
    *("verdict", "scores", "allocations", "parameters", "objective", "search", "confirm"),
    *("cost", "versions", "documents", "device"),
)
COLUMNS = ("base", "pruned", "uniform", "searched")


def cell(value: dict[str, float | None]) -> str:
    """Returns an accuracy in percent with the half width of its interval."""
    return f"{100 * value['mean']:.1f} +- {100 * (value['half_width'] or 0):.1f}"


def main() -> None:
    """Runs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_file", type=Path)
    path = parser.parse_args().run_file
    subprocess.run([sys.executable, "-m", "rankadaptor_plugin", "run", path], check=True)
    report = json.loads((Path(run_file.load(path).output) / "report.json").read_text("utf-8"))
    columns = [name for name in COLUMNS if name in report["scores"]]
    print(f"\n| accuracy in % | {' | '.join(columns)} |\n| --- |{' --: |' * len(columns)}")
    for task in (*report["tasks"], "mean"):
        row = (cell(report["scores"][name][task]["accuracy"]) for name in columns)
        print(f"| {task} | {' | '.join(row)} |")
    print(f"\nVerdict: {report['verdict']['sentence']}")
    RESULTS.mkdir(exist_ok=True)
    kept = {key: report[key] for key in KEPT}
    target = RESULTS / f"{path.stem}-{date.today().isoformat()}.json"
    target.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
