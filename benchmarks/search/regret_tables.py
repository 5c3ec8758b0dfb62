"""Means, comparisons and Markdown tables of the searches that `regret` made."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

CHECKS = (10, 20, 40, 80)
"""Evaluations after which regret is taken."""

DEFAULT = "bayes"
REFERENCES = ("paper", "paper-nometa", "tpe", "gp", "random")
ORDER = ("bayes", "bayes-nometa")
_EARLY, _LATE = 20, 80  # evaluations of the default, and of what it is compared with
_CLEAR = 2.0  # standard errors


@dataclass(frozen=True)
class Cell:
    """One search: a method on a problem."""

    kind: str
    noise: float
    method: str
    repeat: int


@dataclass(frozen=True)
class Result:
    """Result of a search: CPU seconds, and regret by evaluations and rule."""

    cell: Cell
    seconds: float
    regret: Mapping[str, Mapping[str, float]]


def read(path: Path) -> list[Result]:
    """Reads the lines that were written so far; a torn last line counts as none."""
    found: dict[Cell, Result] = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            data = json.loads(line)
        except json.JSONDecodeError:
            continue
        cell = Cell(data["kind"], data["noise"], data["method"], data["repeat"])
        found[cell] = Result(cell, data["seconds"], data["regret"])
    return list(found.values())


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Summarizes searches.

    Returns:
        ``rows``: by kind, noise, method and rule the mean regret, its standard error and the number
        of repetitions, at each of `CHECKS`. ``aims``: the default after 20 evaluations against each
        reference after 80. ``seconds``: mean CPU seconds of a search, by method.
    """
    values: dict[tuple[str, float, str, str], dict[int, list[float]]] = defaultdict(dict)
    seconds: dict[str, list[float]] = defaultdict(list)
    for result in results:
        cell = result.cell
        seconds[cell.method].append(result.seconds)
        for rule in result.regret[str(CHECKS[0])]:
            taken = [result.regret[str(check)][rule] for check in CHECKS]
            values[cell.kind, cell.noise, cell.method, rule][cell.repeat] = taken
    rows: list[dict[str, Any]] = []
    for (kind, noise, method, rule), by_repeat in values.items():
        table = np.array([by_repeat[repeat] for repeat in sorted(by_repeat)])
        rows.append(
            {
                "kind": kind,
                "noise": noise,
                "method": method,
                "rule": rule,
                "repeats": len(table),
                "mean": dict(zip(map(str, CHECKS), table.mean(axis=0).tolist(), strict=True)),
                "stderr": dict(zip(map(str, CHECKS), _stderr(table), strict=True)),
            }
        )
    rows.sort(key=lambda r: (r["kind"], r["noise"], _place(r["method"]), r["rule"]))
    return {
        "rows": rows,
        "aims": _aims(values),
        "seconds": {name: float(np.mean(seconds[name])) for name in sorted(seconds, key=_place)},
    }


def markdown(found: Mapping[str, Any]) -> str:
    """Writes the tables of a `summary`."""
    lines = []
    for kind, noise in dict.fromkeys((r["kind"], r["noise"]) for r in found["rows"]):
        lines += [
            "",
            f"**{kind}, noise {noise:g}**",
            "",
            f"| method | rule | {' | '.join(map(str, CHECKS))} | repetitions |",
            f"| --- | --- |{' --: |' * (len(CHECKS) + 1)}",
        ]
        for row in found["rows"]:
            if (row["kind"], row["noise"]) == (kind, noise):
                cells = [
                    f"{row['mean'][str(c)]:.2f} +- {row['stderr'][str(c)]:.2f}" for c in CHECKS
                ]
                lines.append(
                    f"| {row['method']} | {row['rule']} | {' | '.join(cells)} | {row['repeats']} |"
                )
    lines += [
        "",
        f"{DEFAULT} after {_EARLY} evaluations less another method after {_LATE}, in sigma_b, the",
        "same problems; at least as good where that is not above 0, unclear within 2 s.e. above:",
        "",
        "| kind | noise | against | rule | difference | at least as good |",
        "| --- | --: | --- | --- | --: | --- |",
    ]
    for aim in found["aims"]:
        lines.append(
            f"| {aim['kind']} | {aim['noise']:g} | {aim['against']} | {aim['rule']} | "
            f"{aim['difference']:+.2f} +- {aim['stderr']:.2f} | {aim['holds']} |"
        )
    lines += ["", "| method | CPU seconds of a search |", "| --- | --: |"]
    lines += [f"| {name} | {value:.1f} |" for name, value in found["seconds"].items()]
    return "\n".join(lines)


def _aims(
    values: Mapping[tuple[str, float, str, str], Mapping[int, Sequence[float]]],
) -> list[dict[str, Any]]:
    early, late = CHECKS.index(_EARLY), CHECKS.index(_LATE)
    found = []
    for kind, noise, method, rule in sorted(values, key=lambda k: (k[0], k[1], _place(k[2]), k[3])):
        own = values.get((kind, noise, DEFAULT, "model"), {})
        other = values[kind, noise, method, rule]
        shared = sorted(own.keys() & other.keys())
        if method not in REFERENCES or not shared:
            continue
        differences = np.array([own[r][early] - other[r][late] for r in shared])
        mean, error = float(differences.mean()), _stderr(differences[:, None])[0]
        above = "unclear" if mean <= _CLEAR * error else "no"
        found.append(
            {
                "kind": kind,
                "noise": noise,
                "against": method,
                "rule": rule,
                "difference": mean,
                "stderr": error,
                "repeats": len(shared),
                "holds": "yes" if mean <= 0 else above,
            }
        )
    return found


def _stderr(table: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """Standard errors of the means of columns; 0 for a single row, which has none."""
    if len(table) == 1:
        return [0.0] * table.shape[1]
    errors: list[float] = (table.std(axis=0, ddof=1) / math.sqrt(len(table))).tolist()
    return errors


def _place(method: str) -> tuple[int, str]:
    known = [*ORDER, *REFERENCES]
    return (known.index(method) if method in known else len(known), method)
