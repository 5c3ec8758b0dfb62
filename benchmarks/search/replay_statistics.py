"""Statistics of scores in a table of fine-tunes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from replay_table import TRUTHS, Kind
from scipy.stats import rankdata

from rankadaptor_plugin.core.scores import METRICS
from rankadaptor_plugin.verdict.noise_floor import reliability

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from replay_table import Array

DRAWS = 1000  # bootstrap resamples
TENTH = 0.1
MAIN = "search_choice_logprob"
_SEED = 11


def spearman(one: Array, other: Array) -> Array:
    """Returns Spearman's correlation along the last axis, ties at their mean rank."""
    ranks = [rankdata(values, axis=-1) for values in (one, other)]
    a, b = (r - r.mean(axis=-1, keepdims=True) for r in ranks)
    scale = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return np.asarray((a * b).sum(axis=-1) / np.where(scale > 0, scale, 1))


def intervals(
    statistics: dict[str, Callable[[NDArray[np.int64]], Array]], count: int, against: str
) -> dict[str, dict[str, list[float]]]:
    """Bootstraps statistics over allocations, all on the same resamples.

    Args:
        statistics: Each takes resampled indices (b, n) and returns values (b,).
        count: Allocations, n.
        against: Name of the statistic that the others are compared with.

    Returns:
        Per name ``value`` and ``difference``: estimate, lower and upper end of the 95 % interval.
    """
    draws = np.random.default_rng(_SEED).integers(count, size=(DRAWS, count))
    whole = np.arange(count)[None]
    found = {n: np.concatenate([f(whole), f(draws)]) for n, f in statistics.items()}

    def ends(values: Array) -> list[float]:
        return [float(values[0]), *np.quantile(values[1:], (0.025, 0.975)).tolist()]

    return {
        name: {"value": ends(values), "difference": ends(values - found[against])}
        for name, values in found.items()
    }


def one_seed(kind: Kind, score: str, target: str) -> Callable[[NDArray[np.int64]], Array]:
    """Spearman of one seed's score with the mean target of the others, the mean over the seeds."""

    def statistic(draws: NDArray[np.int64]) -> Array:
        found = [
            spearman(kind.values[score][:, s][draws], kind.truth(target, s)[draws])
            for s in range(kind.seeds)
        ]
        return np.asarray(np.mean(found, axis=0))

    return statistic


def reliabilities(kind: Kind) -> list[dict[str, Any]]:
    """Returns per column its reliability, and what parameters and ranks explain.

    ``parameters_share`` and ``ranks_share`` are shares of the variance between allocations that is
    not noise: how much less one seed's score varies about what a regression of the other seeds'
    mean predicts for allocations that it has not seen, over the reliability. The regression is on
    the logarithm of the parameters and its square, or of every layer's rank. ``seed_share`` is the
    share of the rest, what one seed's scores have beyond the mean of all, that a regression on the
    ranks predicts for other allocations: noise that more allocations do not average out.
    """
    logs = np.log2(kind.rows[:, np.asarray(kind.space.searchable)])
    ranks = np.hstack([logs, logs**2])
    logged = np.log(kind.parameters)[:, None]
    found = []
    for column, values in kind.values.items():
        result = reliability(values)
        centered = values - values.mean(axis=0)
        others = [np.delete(centered, s, axis=1).mean(axis=1) for s in range(kind.seeds)]
        rest = centered - centered.mean(axis=1, keepdims=True)
        shares = {
            name: float(np.mean([_explained(x, o, centered[:, s]) for s, o in enumerate(others)]))
            / max(result.icc, np.finfo(float).tiny)
            for name, x in (("parameters", np.hstack([logged, logged**2])), ("ranks", ranks))
        }
        of_rest = [_explained(ranks, rest[:, s], rest[:, s]) for s in range(kind.seeds)]
        found.append(
            {
                "kind": kind.name,
                "column": column,
                "uniform": float(values[0].mean()),
                "mean": float(values.mean()),
                "seed_effect_sd": float(values.mean(axis=0).std(ddof=1)),
                **result.to_json(),
                "parameters_share": float(np.clip(shares["parameters"], 0, 1)),
                "ranks_share": float(np.clip(shares["ranks"], 0, 1)),
                "seed_share": max(0.0, float(np.mean(of_rest))),
            }
        )
    return found


def _explained(features: Array, learned: Array, values: Array, folds: int = 10) -> float:
    """Returns R squared of ridge regression on held-out tenths.

    Args:
        features: Shape (n, f).
        learned: What the regression learns, shape (n,).
        values: What it is to predict, shape (n,).
        folds: Parts, each of which is held out once.
    """
    folded = np.random.default_rng(_SEED).permutation(len(values)) % folds
    scaled = (features - features.mean(axis=0)) / np.maximum(features.std(axis=0), 1e-12)
    errors = np.empty(len(values))
    for fold in range(folds):
        held = folded == fold
        x, center = scaled[~held], learned[~held].mean()
        weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (learned[~held] - center))
        errors[held] = values[held] - center - scaled[held] @ weights
    return 1 - float(np.mean(errors**2) / max(np.var(values), np.finfo(float).tiny))


def fidelity(kind: Kind) -> list[dict[str, Any]]:
    """Returns how well one seed's scores, and the number of parameters, rank allocations.

    ``dropped`` is the share of the best tenth, by the mean of the other seeds, that lies below the
    median of one seed's score; the mean over the seeds.
    """
    found = []
    kind.values["parameters"] = np.repeat(kind.parameters[:, None], kind.seeds, axis=1)
    for target in (MAIN, *TRUTHS):
        scores = ["parameters", *(f"search_{metric}" for metric in METRICS)]
        statistics = {score: one_seed(kind, score, target) for score in scores}
        ends = intervals(statistics, len(kind.rows), MAIN)
        for score in scores:
            dropped = []
            for seed in range(kind.seeds):
                seen, truth = kind.values[score][:, seed], kind.truth(target, seed)
                best = np.argsort(-truth)[: max(1, round(TENTH * len(truth)))]
                dropped.append(float(np.mean(seen[best] < np.median(seen))))
            found.append(
                {"kind": kind.name, "target": target, "score": score}
                | ends[score]
                | {"dropped": float(np.mean(dropped))}
            )
    return found
