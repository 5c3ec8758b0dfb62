"""Time of the embedded default by stage: repeats the whole run and sums up its reports.

    python benchmarks/embedded_default.py --repeat 3

Every repetition is a process of its own with an empty run folder, so imports count. Writes
``results/embedded_default-DATE.json`` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
STAGES = ("load", "evaluate", "prune", "noise", "search", "confirm", "deliver", "texts")


def run_once(folder: Path) -> dict[str, object]:
    """Runs the embedded default and returns its costs, all times in seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "rankadaptor_plugin", "run", "--quiet", "--output", folder]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - began
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    cost = report["cost"]
    # What happens before the first stage and after the last one counts as everything else.
    other = wall - cost["fine_tuning"] - cost["evaluation"]
    return {
        "wall": wall,
        "stages": cost["stages"],
        "seconds_per_trial": cost["per_trial"],
        "trials": len(report["trials"]),
        "share_fine_tuning": cost["fine_tuning"] / wall,
        "share_evaluation": cost["evaluation"] / wall,
        "share_other": other / wall,
        "peak_memory_bytes": cost["peak_memory_bytes"],
        "verdict": report["verdict"]["sentence"],
    }


def processor() -> str:
    """Returns the name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def main() -> None:
    """Repeats the run, prints the medians and writes all values."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as scratch:
        runs = [run_once(Path(scratch) / str(i)) for i in range(repeat)]
    machine = f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}; median of {repeat} runs (lowest to highest)\n")
    print("| what | value |\n| --- | --: |")

    def row(name: str, values: list[float], form: str) -> None:
        low, high = (form.format(f(values)) for f in (min, max))
        print(f"| {name} | {form.format(statistics.median(values))} ({low} to {high}) |")

    row("whole command, wall time", [r["wall"] for r in runs], "{:.1f} s")
    for stage in STAGES:
        row(f"stage {stage}", [r["stages"][stage] for r in runs], "{:.1f} s")
    row("one trial of the search", [r["seconds_per_trial"] for r in runs], "{:.2f} s")
    for part in ("fine_tuning", "evaluation", "other"):
        row(f"share of {part.replace('_', '-')}", [r[f"share_{part}"] for r in runs], "{:.1%}")
    row("peak memory", [r["peak_memory_bytes"] / 2**20 for r in runs], "{:.0f} MiB")
    print(f"\nVerdict: {runs[0]['verdict']}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"embedded_default-{date.today().isoformat()}.json"
    path.write_text(json.dumps({"machine": machine, "runs": runs}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
