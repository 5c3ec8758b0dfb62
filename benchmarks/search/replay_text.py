"""The figures of a replay as tables in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from replay_methods import CHECKPOINTS
from replay_outcomes import MAIN, OTHERS, headline
from replay_table import TRUTHS

if TYPE_CHECKING:
    from collections.abc import Sequence

POINTS = {
    "report_accuracy": 100,
    "report_choice_logprob": 1,
}  # accuracy is printed in percentage points
SHOWN = ("random", "paper", "bayes")  # whose other rules of recommendation are printed


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table in Markdown; the first column is text."""
    print(f"\n{title}\n\n| {' | '.join(header)} |\n| --- |{' --: |' * (len(header) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def ends(values: Sequence[float], digits: int = 2) -> str:
    """Writes an estimate with its interval."""
    value, low, high = values
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def gain(found: dict[str, float], factor: float) -> str:
    """Writes a difference with its interval; a star where 0 is outside."""
    star = "*" if found["low"] > 0 or found["high"] < 0 else ""
    mean, low, high = (factor * found[end] for end in ("mean", "low", "high"))
    digits = 2 if factor > 1 else 4
    return f"{mean:+.{digits}f}{star} ({low:+.{digits}f} to {high:+.{digits}f})"


def print_scores(report: dict[str, Any]) -> None:
    """Prints reliability and fidelity."""
    table(
        "Reliability of one fine-tune; what explains its true part, and its rest",
        (
            *("kind, score", "reliability", "true sd", "rest sd"),
            *("parameters", "ranks", "rest by ranks"),
        ),
        [
            (
                f"{r['kind']}, {r['column']}",
                ends((r["icc"], r["low"], r["high"])),
                f"{r['between_sd']:.4f}",
                f"{r['seed_sd']:.4f}",
                f"{r['parameters_share']:.0%}",
                f"{r['ranks_share']:.0%}",
                f"{r['seed_share']:.0%}",
            )
            for r in report["reliability"]
        ],
    )
    table(
        "Spearman of one seed's score with the mean of the others; best tenth below its median",
        (
            "kind, score, target",
            "Spearman",
            "less that of search_choice_logprob",
            "best tenth dropped",
        ),
        [
            (
                f"{r['kind']}, {r['score']}, {r['target']}",
                ends(r["value"]),
                ends(r["difference"]),
                f"{r['dropped']:.0%}",
            )
            for r in report["fidelity"]
        ],
    )


def print_searches(report: dict[str, Any]) -> None:
    """Prints gains and differences, and says where nothing is gained."""
    for kind in dict.fromkeys(r["kind"] for r in report["reached"]):
        for metric in (MAIN, *OTHERS):
            for truth in TRUTHS:
                for true_seeds in dict.fromkeys(r["true_seeds"] for r in report["reached"]):
                    key = {
                        "kind": kind,
                        "metric": metric,
                        "truth": truth,
                        "true_seeds": true_seeds,
                    }
                    reached, differences = (
                        [r for r in report[part] if key.items() <= r.items()]
                        for part in ("reached", "differences")
                    )
                    if reached:
                        _print_gains(key, reached)
                        _print_differences(truth, reached, differences, full=metric == MAIN)


def _print_gains(key: dict[str, Any], reached: list[dict[str, Any]]) -> None:
    kind, metric, truth, true_seeds = key.values()
    factor, methods = POINTS[truth], dict.fromkeys(r["method"] for r in reached)
    rows = []
    for method in methods:
        for rule in dict.fromkeys(r["rule"] for r in reached if r["method"] == method):
            if rule != headline(method) and (method not in SHOWN or metric != MAIN):
                continue
            cells = {
                r["evaluations"]: gain(r["over_uniform"], factor)
                for r in reached
                if (r["method"], r["rule"]) == (method, rule)
            }
            name = method if rule == headline(method) else f"{method} ({rule})"
            rows.append((name, *(cells.get(c, "") for c in CHECKPOINTS)))
    table(
        f"{kind}, search by {metric}: {truth} of {true_seeds} seeds over uniform LoRA"
        f"{' in points' if factor > 1 else ''}, after so many evaluations",
        ("method", *map(str, CHECKPOINTS)),
        rows,
    )


def _print_differences(
    truth: str,
    reached: list[dict[str, Any]],
    differences: list[dict[str, Any]],
    *,
    full: bool,
) -> None:
    factor = POINTS[truth]
    names = dict.fromkeys((r["method"], r["against"]) for r in differences)
    rows = [
        (
            f"{method} less {against}",
            *(
                gain(r, factor)
                for r in differences
                if (r["method"], r["against"]) == (method, against)
            ),
        )
        for method, against in names
    ]
    if full:
        table("Paired differences", ("methods", *map(str, CHECKPOINTS)), rows)
    for checkpoint in CHECKPOINTS:
        over_random = [
            r["method"]
            for r in differences
            if (r["against"], r["evaluations"]) == ("random", checkpoint) and r["low"] > 0
        ]
        over_uniform = [
            r["method"]
            for r in reached
            if (r["evaluations"], r["rule"]) == (checkpoint, headline(r["method"]))
            and r["over_uniform"]["low"] > 0
        ]
        print(
            f"\nAfter {checkpoint}: better than random: {', '.join(over_random) or 'no method'}; "
            f"better than uniform LoRA: {', '.join(over_uniform) or 'no method'}."
        )
