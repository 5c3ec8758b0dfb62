"""Searches that are replayed on a table of fine-tunes instead of making new ones.

The allocations of one kind are the whole space: a method chooses among rows that it has not tried,
so its acquisition is maximized over these rows instead of by its own search. It sees the score of
one seed; what its choice is worth is the mean of the other seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rankadaptor_plugin.config.tables import PerformanceModelConfig
from rankadaptor_plugin.search.performance.linear import BayesianRegression
from rankadaptor_plugin.search.performance.mlp import mlp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from replay_table import Array, Kind

    from rankadaptor_plugin.search.performance.performance_model import (
        PerformanceModel,
        PriorEffects,
    )

CHECKPOINTS = (10, 20, 40, 80)
TURNS = 3
_ONE_BY_ONE = 20  # evaluations; above, models are refitted every _BATCH evaluations
_BATCH = 4


@dataclass(frozen=True)
class Method:
    """A way to search.

    Attributes:
        name: For the tables.
        model: Performance model; empty for none.
        acquires: How the next row is chosen: ``random``, ``mean``, or ``draw`` (Thompson sampling).
        initial: Random rows first; with a prior none.
        meta: Whether the model gets a prior from another table.
        turns: Whether `TURNS` seeds take turns. What all scores of a seed have in common is then
            taken off: their mean so far, drawn towards 0 as if there was one more, the difference
            of uniform LoRA's score, whose fine-tunes are not counted.
    """

    name: str
    model: str = ""
    acquires: str = "random"
    initial: int = 0
    meta: bool = False
    turns: bool = False


METHODS = (
    Method("random"),
    Method("random, bayes's choice", "bayes"),
    Method("paper", "mlp", "mean", 10),
    Method("bayes", "bayes", "draw", 3),
    Method("bayes, meta", "bayes", "draw", 3, meta=True),
    Method("random, turns", turns=True),
    Method("random, bayes's choice, turns", "bayes", turns=True),
    Method("bayes, turns", "bayes", "draw", 3, turns=True),
)


def _model(name: str, kind: Kind, seed: int, priors: Sequence[PriorEffects]) -> PerformanceModel:
    if name == "bayes":
        return BayesianRegression(kind.space, tuple(priors))
    return mlp(kind.space, PerformanceModelConfig(), seed)


def _chosen(
    model: PerformanceModel, acquire: str, rows: NDArray[np.int64], rng: np.random.Generator
) -> int:
    """Returns the index of the row that the acquisition likes best."""
    if acquire == "draw" and isinstance(model, BayesianRegression):
        return int(model.drawn(rows, rng).argmax())
    return int(model.predict(rows).mean.argmax())


def turns(seed: int, seeds: int) -> tuple[int, ...]:
    """Returns the seeds that take turns, the given one first."""
    return tuple((seed + i) % seeds for i in range(min(TURNS, seeds - 1)))


Reached = dict[str, int]
"""Recommended rows: ``observed`` has the best score seen, ``model`` the best expectation of the
model among the rows tried, ``any row`` among all."""


class Replay:
    """One search with one seed's scores.

    Args:
        kind: The allocations.
        method: How to search.
        metric: The score seen, such as ``choice_logprob``.
        seed: Whose scores are seen, a column of the table.
        repetition: Makes the random choices; methods share them.
        priors: What is known beforehand.
    """

    def __init__(
        self,
        kind: Kind,
        method: Method,
        *,
        metric: str,
        seed: int,
        repetition: int,
        priors: Sequence[PriorEffects] = (),
    ) -> None:
        self._kind, self._method, self._priors = kind, method, priors
        self._seen = kind.values[f"search_{metric}"]  # (n, k)
        self._seeds = turns(seed, kind.seeds) if method.turns else (seed,)
        if method.turns:
            self._seen = self._seen - self._seen[0]
        self._scores = np.full(len(kind.rows), np.nan)
        self._repetition = repetition
        self._order = np.random.default_rng([repetition, 1]).permutation(len(kind.rows))
        self._rng = np.random.default_rng([repetition, 2])
        self._tried: list[int] = []  # in order
        self._fitted: PerformanceModel | None = None

    def run(self, most: int) -> dict[int, Reached]:
        """Returns the rows recommended, by number of evaluations."""
        reached: dict[int, Reached] = {}
        checkpoints = [c for c in CHECKPOINTS if c <= min(most, len(self._order) - 1)]
        while len(reached) < len(checkpoints):
            batch = _BATCH if len(self._tried) >= _ONE_BY_ONE else 1
            if not self._at_random():
                self._refit()
            for row in self._proposals(batch):
                self._scores[row] = self._seen[
                    row, self._seeds[len(self._tried) % len(self._seeds)]
                ]
                self._tried.append(row)
                if (
                    len(reached) < len(checkpoints)
                    and len(self._tried) >= checkpoints[len(reached)]
                ):
                    self._refit()
                    reached[checkpoints[len(reached)]] = self._recommended()
        return reached

    def _refit(self) -> None:
        if not self._method.model:
            return
        self._fitted = _model(self._method.model, self._kind, self._repetition, self._priors)
        if self._tried:
            self._fitted.fit(self._kind.rows[self._tried], self._values())

    def _values(self) -> Array:
        """Returns the scores of the fine-tunes, without the effects of their seeds."""
        values = self._scores[self._tried]
        if self._method.turns:
            turn = np.arange(len(values)) % len(self._seeds)
            for seed in range(min(len(self._seeds), len(values))):
                of_seed = values[turn == seed]
                values[turn == seed] -= of_seed.sum() / (len(of_seed) + 1)
        return values

    def _at_random(self) -> bool:
        initial = 0 if self._method.meta else self._method.initial
        return self._method.acquires == "random" or len(self._tried) < initial

    def _proposals(self, count: int) -> list[int]:
        left = self._order[~np.isin(self._order, self._tried)]
        if self._fitted is None or self._at_random():
            return left[:count].tolist()  # type: ignore[no-any-return]
        proposals: list[int] = []
        for _ in range(min(count, len(left))):
            nth = _chosen(self._fitted, self._method.acquires, self._kind.rows[left], self._rng)
            proposals.append(int(left[nth]))
            left = np.delete(left, nth)
        return proposals

    def _recommended(self) -> Reached:
        tried = np.array(self._tried)
        observed = int(tried[self._values().argmax()])
        if self._fitted is None:
            return {"observed": observed}
        mean = self._fitted.predict(self._kind.rows).mean
        return {
            "observed": observed,
            "model": int(tried[mean[tried].argmax()]),
            "any row": int(mean.argmax()),
        }
