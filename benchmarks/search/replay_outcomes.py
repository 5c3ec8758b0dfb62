"""Replayed searches on a table, and what they reached."""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from replay_methods import METHODS, Method, Replay, turns
from replay_priors import priors
from replay_table import TRUTHS, Kind
from scipy.stats import t as student

from rankadaptor_plugin.verdict.noise_floor import reliability

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from replay_methods import Reached
    from replay_table import Array

    Result = dict[int, Reached]
    Found = dict[tuple[str, str, str], list[Result]]

MAIN = "choice_logprob"
"""The score with which all methods are replayed."""

OTHERS = ("gold_logprob", "margin")
"""Scores with which some methods are replayed, too."""

BY_OTHERS = ("random", "random, bayes's choice", "bayes")

TURNED = ", turns"
MOST = 80
CONFIDENCE = 0.95
_NORMAL = 1.96


def searches(
    tables: list[Kind], others: list[Kind], repetitions: int, only: Collection[str], jobs: int
) -> Found:
    """Replays methods on every kind.

    Args:
        tables: The kinds of the table.
        others: Those of the table that the meta prior is learned from; empty to do without.
        repetitions: Searches per method, a multiple of the number of seeds.
        only: Names of methods; empty takes all.
        jobs: Processes.

    Returns:
        By kind, metric and method: by repetition, number of evaluations and rule the row.
    """
    chosen = [m for m in METHODS if not only or m.name in only]
    chosen = [m for m in chosen if others or not m.meta]
    # Two seeds or more take turns, and one or more are left over.
    chosen = [m for m in chosen if tables[0].seeds > 2 or not m.turns]  # noqa: PLR2004
    work = [
        (kind, [o for o in others if o.name == kind.name], metric, method, repetitions)
        for metric in (MAIN, *OTHERS)
        for method in chosen
        for kind in tables
        if metric == MAIN or method.name in BY_OTHERS
    ]
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(_replayed, work))
    return {
        (kind.name, metric, method.name): results
        for (kind, _, metric, method, _), results in zip(work, found, strict=True)
    }


def _replayed(work: tuple[Kind, list[Kind], str, Method, int]) -> list[Result]:
    kind, others, metric, method, repetitions = work
    found = []
    for repetition in range(repetitions):
        seed = repetition % kind.seeds
        known = priors(kind, others, metric, repetition) if method.meta else ()
        replay = Replay(kind, method, metric=metric, seed=seed, repetition=repetition, priors=known)
        found.append(replay.run(MOST))
    return found


def summary(values: Array, seeds: int, shared_error: float = 0.0) -> dict[str, float]:
    """Returns mean, standard error over repetitions, and the interval over the seeds seen.

    Args:
        values: One per repetition; repetition r saw seed r modulo `seeds`.
        seeds: Number of seeds.
        shared_error: Standard error that all repetitions have in common.
    """
    means = np.array([values[seed::seeds].mean() for seed in range(seeds)])
    factor = float(student.ppf((1 + CONFIDENCE) / 2, seeds - 1))
    half = factor * float(means.std(ddof=1)) / math.sqrt(seeds)
    half = math.hypot(half, _NORMAL * shared_error)
    mean = float(means.mean())
    return {
        "mean": mean,
        "stderr": float(values.std(ddof=1)) / math.sqrt(len(values)),
        "low": mean - half,
        "high": mean + half,
    }


def headline(method: str) -> str:
    """Returns the rule of recommendation that is compared: that of the method in the package."""
    without_model = method in ("random", "random, turns")
    return "observed" if without_model or method.startswith("paper") else "model"


def pairs(names: Collection[str]) -> list[tuple[str, str]]:
    """Returns which methods are compared."""
    found = [(name, base) for base in ("random", "paper") for name in names if name != base]
    found += [(f"{n}, {added}", n) for n in names for added in ("meta", "turns")]
    found += [("bayes", "random, bayes's choice")]
    return [p for p in dict.fromkeys(found) if p[0] in names and p[1] in names]


def outcomes(tables: list[Kind], found: Found) -> dict[str, list[dict[str, Any]]]:
    """Returns what each method reached (``reached``), and paired differences (``differences``).

    Gains are those of the recommended row's true score over uniform LoRA and over the mean
    allocation, ``below_best`` what it lacks to the best row by the same truth; that best is chosen
    from noisy scores, so a small lack is no fault.
    """
    reached: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    for kind in tables:
        for metric in (MAIN, *OTHERS):
            of = {m: r for (k, s, m), r in found.items() if (k, s) == (kind.name, metric)}
            for names, hidden in _groups(kind, list(of)):
                group = {name: of[name] for name in names}
                for truth in TRUTHS:
                    key = {
                        "kind": kind.name,
                        "metric": metric,
                        "truth": truth,
                        "true_seeds": kind.seeds - len(hidden[0]),
                    }
                    levels = [
                        np.delete(kind.values[truth], list(seen), axis=1).mean(axis=1)
                        for seen in hidden
                    ]
                    values = dict(_values(group, levels))
                    reached += [key | entry for entry in _reached(kind, truth, levels, values)]
                    differences += [
                        key
                        | {"method": one, "against": other, "evaluations": checkpoint}
                        | summary(
                            values[one, headline(one), checkpoint]
                            - values[other, headline(other), checkpoint],
                            kind.seeds,
                        )
                        for one, other in pairs(names)
                        for checkpoint in group[one][0]
                    ]
    return {"reached": reached, "differences": differences}


def _groups(kind: Kind, names: list[str]) -> Iterator[tuple[list[str], list[tuple[int, ...]]]]:
    """Yields methods that share a truth, and by repetition the seeds that are no part of it."""
    turned = [name for name in names if name.endswith(TURNED)]
    alike = [name.removesuffix(TURNED) for name in turned]
    if plain := [name for name in names if name not in turned]:
        yield plain, [(seed,) for seed in range(kind.seeds)]
    if turned:
        both = [*(name for name in alike if name in names), *turned]
        yield both, [turns(seed, kind.seeds) for seed in range(kind.seeds)]


def _values(
    of: dict[str, list[Result]], levels: list[Array]
) -> Iterator[tuple[tuple[str, str, int], Array]]:
    """Yields by method, rule and evaluations the true scores, one per repetition."""
    for method, results in of.items():
        for checkpoint, reached in results[0].items():
            for rule in reached:
                rows = [result[checkpoint][rule] for result in results]
                truths = [levels[r % len(levels)][row] for r, row in enumerate(rows)]
                yield (method, rule, checkpoint), np.array(truths)


def _reached(
    kind: Kind,
    truth: str,
    levels: list[Array],
    values: dict[tuple[str, str, int], Array],
) -> Iterator[dict[str, Any]]:
    error = reliability(kind.values[truth]).seed_sd / math.sqrt(kind.seeds)
    for (method, rule, checkpoint), value in values.items():
        of_seed = [levels[r % kind.seeds] for r in range(len(value))]
        uniform, mean, best = (
            np.array([f(level) for level in of_seed])
            for f in (lambda level: level[0], np.mean, np.max)
        )
        yield {
            "method": method,
            "rule": rule,
            "evaluations": checkpoint,
            "score": summary(value, kind.seeds),
            "over_uniform": summary(value - uniform, kind.seeds, error),
            "over_mean": summary(value - mean, kind.seeds),
            "below_best": summary(best - value, kind.seeds),
        }
