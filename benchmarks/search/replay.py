"""Statistics of scores in a table of real fine-tunes, and searches replayed on it.

    OMP_NUM_THREADS=1 python benchmarks/search/replay.py embedded --meta stories260K

Reads ``results/search/fine_tunes-NAME.parquet`` of `fine_tunes.py`, prints tables in Markdown, and
writes all figures to ``results/search/replay-NAME-DATE.json``, with a plot beside it if matplotlib
is installed. ``--meta`` names the table that the meta prior is learned from.

What the figures are:

* reliability of each score (`rankadaptor_plugin.verdict.noise_floor`); what the number of
  parameters, and an additive function of the ranks, explain of what truly differs between
  allocations, and what the latter explains of a seed's own rest;
* fidelity: Spearman's correlation of one seed's score, and of the number of parameters, with the
  mean of the other seeds;
* replayed searches: the score seen is that of one seed, the truth the mean report score of the
  others. An evaluation is one fine-tune. With "turns", three seeds take turns, the score seen is
  the difference from uniform LoRA with the same seed, and the truth is that of the seeds left over.

Intervals of correlations are percentiles of a bootstrap over the allocations. Intervals of searches
are t intervals over the means of the seeds seen: repetitions that see the same seed share its
noise. Those of gains over uniform LoRA add the error of uniform LoRA's own score. All speak of this
table alone, whose best allocation no search can exceed. Optuna's samplers are left out: they
propose allocations that are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import date
from pathlib import Path
from typing import Any

from replay_methods import CHECKPOINTS, METHODS
from replay_outcomes import MAIN, headline, outcomes, searches
from replay_statistics import fidelity, reliabilities
from replay_table import kinds, read
from replay_text import print_scores, print_searches

RESULTS = Path(__file__).resolve().parent.parent / "results" / "search"
PLOTTED = ("random", "paper", "bayes", "bayes, meta")


def plot(report: dict[str, Any], path: Path) -> bool:
    """Draws the gain over uniform LoRA; False without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = path.stem
    from matplotlib import pyplot

    names = list(dict.fromkeys(r["kind"] for r in report["reached"]))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for ax, kind in zip(axes[0], names, strict=True):
        for method in PLOTTED:
            found = [
                r
                for r in report["reached"]
                if (r["kind"], r["metric"], r["truth"]) == (kind, MAIN, "report_accuracy")
                and (r["method"], r["rule"]) == (method, headline(method))
                and r["true_seeds"] == report["seeds"] - 1
            ]
            ax.errorbar(
                [r["evaluations"] for r in found],
                [100 * r["over_uniform"]["mean"] for r in found],
                [100 * r["over_uniform"]["stderr"] for r in found],
                label=method,
                capsize=2,
            )
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(title=f"{kind} total", xlabel="fine-tunes", xscale="log")
        ax.set_xticks(CHECKPOINTS, map(str, CHECKPOINTS))
        ax.minorticks_off()
    axes[0][0].set_ylabel("report accuracy over uniform LoRA, points")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    return True


def main() -> None:
    """Analyses a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="NAME of results/search/fine_tunes-NAME.parquet")
    parser.add_argument("--file", type=Path, help="another place of the table, also JSON lines")
    parser.add_argument("--meta", help="name or file of the table that a prior is learned from")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--methods", nargs="*", choices=[m.name for m in METHODS], default=[])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    began = time.perf_counter()
    tables = kinds(read(options.file or RESULTS / f"fine_tunes-{options.name}.parquet"))
    others = []
    if options.meta:
        given = Path(options.meta)
        others = kinds(read(given if given.exists() else RESULTS / f"fine_tunes-{given}.parquet"))
    seeds = tables[0].seeds
    repetitions = -(-options.repetitions // seeds) * seeds
    report: dict[str, Any] = {
        "name": options.name,
        "meta": options.meta,
        "allocations": {kind.name: len(kind.rows) for kind in tables},
        "seeds": seeds,
        "repetitions": repetitions,
        "reliability": [r for kind in tables for r in reliabilities(kind)],
        "fidelity": [r for kind in tables for r in fidelity(kind)],
    }
    print(f"{report['allocations']} allocations, {seeds} seeds, {repetitions} repetitions")
    print_scores(report)
    report |= outcomes(tables, searches(tables, others, repetitions, options.methods, options.jobs))
    report["seconds"] = time.perf_counter() - began
    print_searches(report)
    path = options.out / f"replay-{options.name}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(report, separators=(",", ":")) + "\n", "utf-8")
    print(f"\nWritten to {path}, {report['seconds']:.0f} s.")
    if not plot(report, path.with_suffix(".svg")):
        print("No plot: matplotlib is not installed.")


if __name__ == "__main__":
    main()
