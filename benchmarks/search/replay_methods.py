"""Searches that are replayed on a table of fine-tunes instead of making new ones.

The allocations of one kind are the whole space: a method chooses among rows that it has not tried,
so its acquisition is maximized over these rows instead of by its own search. It sees the score of
one seed; what its choice is worth is the mean of the other seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rankadaptor_plugin.config.tables import PerformanceModelConfig
from rankadaptor_plugin.search.performance.ensemble import MLPEnsemble
from rankadaptor_plugin.search.performance.linear import BayesianRegression
from rankadaptor_plugin.search.performance.mlp import mlp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from replay_table import Array, Kind

    from rankadaptor_plugin.search.performance.performance_model import (
        PerformanceModel,
        Prediction,
        PriorEffects,
    )

CHECKPOINTS = (10, 20, 40, 80)
TURNS = 3
_ONE_BY_ONE = 20  # evaluations; above, models are refitted every _BATCH evaluations
_BATCH = 4
_TRUSTED = 5  # forecasts before models are compared by them, as in adaptive_sampler
_CONFIDENCE = 1.0  # standard deviations of the upper confidence bound
_FIRST_MEDIAN = 4  # whole fine-tunes before any is ended at its half


@dataclass(frozen=True)
class Method:
    """A way to search.

    Attributes:
        name: For the tables.
        models: Performance models; of several, the one whose forecasts were better is asked.
        acquires: How the next row is chosen: ``random``, ``mean``, ``bound`` (upper confidence
            bound) or ``draw`` (Thompson sampling), one per model.
        initial: Random rows first; with a prior none.
        prior: Which prior the models get: empty, ``proxy`` or ``meta``.
        rung: Whether fine-tunes below the median of the halves before them end there.
        turns: Whether `TURNS` seeds take turns. What all scores of a seed have in common is then
            taken off: their mean so far, drawn towards 0 as if there was one more, the difference
            of uniform LoRA's score, whose fine-tunes are not counted.
    """

    name: str
    models: tuple[str, ...] = ()
    acquires: tuple[str, ...] = ("random",)
    initial: int = 0
    prior: str = ""
    rung: bool = False
    turns: bool = False


LINEAR = ("linear",), ("draw",), 3
ENSEMBLE = ("ensemble",), ("bound",), 3
AUTO = ("linear", "ensemble"), ("draw", "bound"), 3
METHODS = (
    Method("random"),
    Method("random, linear's choice", ("linear",)),
    Method("paper", ("mlp",), ("mean",), 10),
    Method("linear", *LINEAR),
    Method("ensemble", *ENSEMBLE),
    Method("auto", *AUTO),
    Method("linear, proxy", *LINEAR, "proxy"),
    Method("auto, proxy", *AUTO, "proxy"),
    Method("linear, meta", *LINEAR, "meta"),
    Method("auto, meta", *AUTO, "meta"),
    Method("random, rung", rung=True),
    Method("linear, rung", *LINEAR, rung=True),
    Method("random, turns", turns=True),
    Method("random, linear's choice, turns", ("linear",), turns=True),
    Method("linear, turns", *LINEAR, turns=True),
)


def _model(name: str, kind: Kind, seed: int, priors: Sequence[PriorEffects]) -> PerformanceModel:
    config = PerformanceModelConfig()
    if name == "linear":
        return BayesianRegression(kind.space, tuple(priors))
    if name == "ensemble":
        return MLPEnsemble(kind.space, config, seed, tuple(priors))
    return mlp(kind.space, config, seed)


def _chosen(
    model: PerformanceModel, acquire: str, rows: NDArray[np.int64], rng: np.random.Generator
) -> int:
    """Returns the index of the row that the acquisition likes best."""
    if acquire == "draw" and isinstance(model, BayesianRegression):
        return int(model.drawn(rows, rng).argmax())
    expected = model.predict(rows)
    bonus = _CONFIDENCE * expected.stddev if acquire == "bound" else 0.0
    return int((expected.mean + bonus).argmax())


def turns(seed: int, seeds: int) -> tuple[int, ...]:
    """Returns the seeds that take turns, the given one first."""
    return tuple((seed + i) % seeds for i in range(min(TURNS, seeds - 1)))


class Reached(NamedTuple):
    """Where a search stands.

    Attributes:
        rows: Recommended rows: ``observed`` has the best score seen, ``model`` the best expectation
            of the model among the rows tried, ``any row`` among all.
        started: Fine-tunes that were started.
    """

    rows: dict[str, int]
    started: int


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
        self._halves = kind.values[f"half_{metric}"][:, seed]
        self._seen = kind.values[f"search_{metric}"]  # (n, k)
        self._seeds = turns(seed, kind.seeds) if method.turns else (seed,)
        if method.turns:
            self._seen = self._seen - self._seen[0]
        self._scores = np.full(len(kind.rows), np.nan)
        self._repetition = repetition
        self._order = np.random.default_rng([repetition, 1]).permutation(len(kind.rows))
        self._rng = np.random.default_rng([repetition, 2])
        self._tried: list[int] = []  # in order, those ended at their half included
        self._whole: list[int] = []
        self._evidence: list[Array] = []  # log densities of forecasts, one per model
        self._fitted: list[PerformanceModel] = []

    def run(self, most: int) -> dict[int, Reached]:
        """Returns what is reached, by number of evaluations, counted in whole fine-tunes."""
        cost = 0.0
        found: dict[int, Reached] = {}
        checkpoints = [c for c in CHECKPOINTS if c <= min(most, len(self._order) - 1)]
        while len(found) < len(checkpoints):
            batch = _BATCH if len(self._whole) >= _ONE_BY_ONE else 1
            if not self._at_random():
                self._refit()
            for row in self._proposals(batch):
                expected = [m.predict(self._kind.rows[[row]]) for m in self._rivals()]
                cost += self._measure(row)
                self._judge(row, expected)
                if len(found) < len(checkpoints) and cost >= checkpoints[len(found)]:
                    self._refit()
                    found[checkpoints[len(found)]] = self._recommended()
            if len(self._tried) == len(self._order):  # ended trials left some budget over
                self._refit()
                found |= {c: self._recommended() for c in checkpoints[len(found) :]}
        return found

    def _measure(self, row: int) -> float:
        """Fine-tunes a row, or its half; returns what it cost."""
        earlier = self._halves[self._tried]
        self._tried.append(row)
        if self._method.rung and len(earlier) >= _FIRST_MEDIAN:
            half = self._halves[row]
            if half < np.median(earlier):
                return 0.5
        self._scores[row] = self._seen[row, self._seeds[len(self._whole) % len(self._seeds)]]
        self._whole.append(row)
        return 1.0

    def _refit(self) -> None:
        rows = self._kind.rows[self._whole]
        self._fitted = [
            _model(name, self._kind, self._repetition, self._priors) for name in self._method.models
        ]
        for model in self._fitted if self._whole else ():
            model.fit(rows, self._values())

    def _values(self) -> Array:
        """Returns the scores of the whole fine-tunes, without the effects of their seeds."""
        values = self._scores[self._whole]
        if self._method.turns:
            turn = np.arange(len(values)) % len(self._seeds)
            for seed in range(min(len(self._seeds), len(values))):
                of_seed = values[turn == seed]
                values[turn == seed] -= of_seed.sum() / (len(of_seed) + 1)
        return values

    def _better(self) -> int:
        """Returns the position of the model to trust."""
        if len(self._evidence) < _TRUSTED:
            return 0
        return int(np.mean(self._evidence, axis=0).argmax())

    def _at_random(self) -> bool:
        initial = 0 if self._method.prior else self._method.initial
        return self._method.acquires[0] == "random" or len(self._tried) < initial

    def _rivals(self) -> list[PerformanceModel]:
        """Returns the models that are compared by their forecasts, none before they know some."""
        compared = len(self._fitted) > 1 and self._whole and not self._at_random()
        return self._fitted if compared else []

    def _judge(self, row: int, expected: list[Prediction]) -> None:
        if expected and row in self._whole:
            value = self._scores[[row]]
            self._evidence.append(np.array([e.log_density(value)[0] for e in expected]))

    def _proposals(self, count: int) -> list[int]:
        left = self._order[~np.isin(self._order, self._tried)]
        if self._at_random():
            return left[:count].tolist()  # type: ignore[no-any-return]
        better = self._better()
        model, acquire = self._fitted[better], self._method.acquires[better]
        found: list[int] = []
        for _ in range(min(count, len(left))):
            nth = _chosen(model, acquire, self._kind.rows[left], self._rng)
            found.append(int(left[nth]))
            left = np.delete(left, nth)
        return found

    def _recommended(self) -> Reached:
        whole, started = np.array(self._whole), len(self._tried)
        observed = int(whole[self._values().argmax()])
        if not self._fitted:
            return Reached({"observed": observed}, started)
        mean = self._fitted[self._better()].predict(self._kind.rows).mean
        best = {"model": int(whole[mean[whole].argmax()]), "any row": int(mean.argmax())}
        return Reached({"observed": observed} | best, started)
