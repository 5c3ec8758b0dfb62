"""Simulated tasks on which searches for ranks can be compared with the truth known.

A family is one target task and six source tasks that resemble it, over 26 layers whose ranks are
2, 4, 6, 8, 10 or 12. True scores are in sigma_b: standard deviations over random allocations, the
mean of which is 0. Four kinds, none of which is the form of the package's linear model (levels of
single layers, products of the log ranks of two layers, a square of the total):

- ``saturating``: gains of single layers that saturate at a scale of their own, less a penalty for
  overfitting; a smooth trend over depth; pairs of values that saturate at ranks of the pair's own;
  a sum that saturates; a total rank above which the score falls.
- ``interactions``: 60 % of the variance is interactions, all main effects taken out of them: the
  least of three neighboring layers, sigmoids of the sum of four layers, and thresholds that two
  or three layers have to pass together.
- ``non-monotone``: a best rank for each layer, low in some, that moves with the rank of the next
  layer; the sum saturates.
- ``heteroscedastic``: scores as in ``saturating``; the noise has Student-t tails (4 degrees of
  freedom) and either grows with the total rank or is four times as large in one half of the space.

Noise is given as the ratio of its standard deviation to sigma_b. Raw values have the offset and the
spread of accuracies. Everything follows from the kind and the seed.
"""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

LAYERS = 26
RANKS = (2, 4, 6, 8, 10, 12)
KINDS = ("saturating", "interactions", "non-monotone", "heteroscedastic")
NOISES = (0.3, 1.0, 2.0)
SOURCES = 6
SOURCE_ALLOCATIONS = 50
CORRELATION = 0.6  # of the parameters of two tasks of a family

_LEVELS = len(RANKS)
_RANK = np.array(RANKS, dtype=np.float64)
_LOG = np.log(_RANK) - np.log(_RANK).mean()
_DEGREES = 4  # of freedom of the tails


@dataclass(frozen=True)
class Terms:
    """Interactions of k layers each: `layers` (t, k), and their values `tables` (t, 6 ** k)."""

    layers: Rows
    tables: Floats

    def __call__(self, index: Rows) -> Floats:
        """Returns the sum of the interactions, shape (n,), of level indices (n, 26)."""
        place = np.zeros((len(index), len(self.layers)), dtype=np.int64)
        for column in self.layers.T:
            place = place * _LEVELS + index[:, column]
        found: Floats = self.tables[np.arange(len(self.layers)), place].sum(axis=1)
        return found


@dataclass(frozen=True, kw_only=True)
class Task:
    """The true scores of one task.

    Attributes:
        effects: Effects of single layers, (26, 6).
        terms: Interactions.
        penalty: Of the squared excess of the total rank over `threshold`.
        threshold: As a share of the greatest total rank.
        ceiling: Value at which the sum saturates; infinity for none.
        center: Subtracted from the sum, mean over random allocations.
        scale: The sum is divided by it.
        offset: Raw value of a random allocation.
        spread: sigma_b in raw units.
        noise_shape: ``equal``, ``total`` or ``region``; see `noise_scale`.
    """

    effects: Floats
    terms: tuple[Terms, ...]
    penalty: float
    threshold: float
    ceiling: float
    offset: float
    spread: float
    noise_shape: str
    center: float = 0.0
    scale: float = 1.0

    def __call__(self, rows: Rows) -> Floats:
        """Returns true scores in sigma_b, shape (n,), of ranks (n, 26)."""
        return (self._sum(np.searchsorted(RANKS, rows)) - self.center) / self.scale

    def _sum(self, index: Rows) -> Floats:
        value = self.effects[np.arange(LAYERS), index].sum(axis=1)
        for terms in self.terms:
            value = value + terms(index)
        share = _RANK[index].mean(axis=1) / RANKS[-1]
        value = value - self.penalty * np.maximum(0.0, share - self.threshold) ** 2
        if math.isfinite(self.ceiling):
            value = self.ceiling * -np.expm1(-value / self.ceiling)
        return np.asarray(value)

    def noise_scale(self, rows: Rows) -> Floats:
        """Returns the standard deviation of the noise, shape (n,); about 1 in the root mean square.

        ``total`` doubles it for every 1.4 standard deviations of the total rank of a random
        allocation; ``region`` is 1.37 where the upper third of the layers has a mean rank above 7,
        else 0.34.
        """
        if self.noise_shape == "total":
            deviation = _RANK.std() / math.sqrt(LAYERS)
            total = (rows.mean(axis=1) - _RANK.mean()) / deviation
            return np.asarray(np.clip(np.exp(0.5 * total), 0.3, 4.0) / math.exp(0.25))
        if self.noise_shape == "region":
            high = rows[:, -(LAYERS // 3) :].mean(axis=1) > _RANK.mean()
            return np.where(high, 4.0, 1.0) / math.sqrt(8.5)
        return np.ones(len(rows))


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A target task to search, and what is known of its sources.

    Attributes:
        target: The true scores.
        noise: Standard deviation of the noise in sigma_b.
        seed: Seed of the noise.
        optimum: Greatest true score that a long search found.
        source_rows: Ranks measured on the sources, (6, 50, 26).
        source_values: Their noisy raw values, (6, 50).
    """

    target: Task
    noise: float
    seed: int
    optimum: float
    source_rows: Rows
    source_values: Floats

    def measure(self, row: Rows, number: int) -> float:
        """Returns the noisy raw value of ranks (26,); evaluation `number` has noise of its own."""
        rng = np.random.default_rng([self.seed, number])
        return float(_measured(self.target, row[None], self.noise, rng)[0])

    def regret(self, row: Rows) -> float:
        """Returns how far ranks (26,) stay below the optimum, in sigma_b."""
        return self.optimum - float(self.target(row[None])[0])


def problem(kind: str, noise: float, seed: int, correlation: float = CORRELATION) -> Problem:
    """Builds a problem; the family is the same for all noise ratios."""
    tasks = family(kind, seed, correlation)
    rng = np.random.default_rng([seed, zlib.crc32(b"sources")])
    rows = random_rows(SOURCES * SOURCE_ALLOCATIONS, rng).reshape(SOURCES, -1, LAYERS)
    values = [_measured(t, r, noise, rng) for t, r in zip(tasks[1:], rows, strict=True)]
    return Problem(
        target=tasks[0],
        noise=noise,
        seed=seed,
        optimum=_optimum(kind, seed, correlation),
        source_rows=rows,
        source_values=np.array(values),
    )


@lru_cache(maxsize=8)
def family(kind: str, seed: int, correlation: float = CORRELATION) -> tuple[Task, ...]:
    """Returns the target and the sources."""
    make = {
        "saturating": _saturating,
        "interactions": _interactions,
        "non-monotone": _non_monotone,
        "heteroscedastic": _saturating,
    }[kind]
    rows = random_rows(20_000, np.random.default_rng(0))
    return tuple(
        _standardized(make(_Parameters(kind, seed, number, correlation)), rows)
        for number in range(1 + SOURCES)
    )


def random_rows(count: int, rng: np.random.Generator) -> Rows:
    """Draws ranks, shape (count, 26), all equally likely."""
    drawn: Rows = np.array(RANKS)[rng.integers(0, _LEVELS, (count, LAYERS))]
    return drawn


def climb(task: Task, starts: Rows) -> tuple[Rows, Floats]:
    """Improves ranks (n, 26) one layer at a time until no single change helps."""
    rows, values = starts.copy(), task(starts)
    improved = True
    while improved:
        improved = False
        for layer in range(LAYERS):
            tried = np.repeat(rows, _LEVELS, axis=0)
            tried[:, layer] = np.tile(RANKS, len(rows))
            scores = task(tried).reshape(len(rows), _LEVELS)
            best, better = scores.argmax(axis=1), scores.max(axis=1) > values + 1e-12
            rows[better, layer] = np.array(RANKS)[best[better]]
            values = np.where(better, scores.max(axis=1), values)
            improved |= bool(better.any())
    return rows, values


def optimize(task: Task, rng: np.random.Generator, restarts: int = 256) -> tuple[Rows, float]:
    """Searches the true scores: climbs from random ranks, then changes two layers at a time.

    Returns:
        The best ranks, (26,), and their true score.
    """
    rows, values = climb(task, random_rows(restarts, rng))
    best = np.argsort(-values)[:4]
    rows, values = rows[best], values[best]
    for _ in range(8):  # kicks of five layers, kept where they help
        kicked = np.repeat(rows, 12, axis=0)
        for row in kicked:
            row[rng.choice(LAYERS, 5, replace=False)] = rng.choice(RANKS, 5)
        kicked, scores = climb(task, kicked)
        rows, values = np.vstack([rows, kicked]), np.concatenate([values, scores])
        best = np.argsort(-values)[:4]
        rows, values = rows[best], values[best]
    row, value = rows[0], float(values[0])
    pairs = list(itertools.combinations(range(LAYERS), 2))
    while True:
        tried = np.repeat(row[None], len(pairs) * _LEVELS**2, axis=0)
        changed = np.repeat(pairs, _LEVELS**2, axis=0)
        levels = np.tile(list(itertools.product(RANKS, repeat=2)), (len(pairs), 1))
        np.put_along_axis(tried, changed, levels, axis=1)
        scores = task(tried)
        if scores.max() <= value + 1e-12:
            return row, value
        found, top = climb(task, tried[scores.argmax()][None])
        row, value = found[0], float(top[0])


@lru_cache(maxsize=8)
def _optimum(kind: str, seed: int, correlation: float) -> float:
    return optimize(family(kind, seed, correlation)[0], np.random.default_rng(seed))[1]


def _measured(task: Task, rows: Rows, noise: float, rng: np.random.Generator) -> Floats:
    if task.noise_shape == "equal":
        drawn = rng.normal(size=len(rows))
    else:
        drawn = rng.standard_t(_DEGREES, size=len(rows)) * math.sqrt((_DEGREES - 2) / _DEGREES)
    return task.offset + task.spread * (task(rows) + noise * task.noise_scale(rows) * drawn)


class _Parameters:
    """Random parameters of a task; those of the same name correlate within a family."""

    def __init__(self, kind: str, seed: int, task: int, correlation: float) -> None:
        self.kind, self.seed, self.task, self.correlation = kind, seed, task, correlation

    def shared(self, name: str) -> np.random.Generator:
        """Returns a generator that is the same for all tasks of the family."""
        return np.random.default_rng([self.seed, zlib.crc32(f"{self.kind} {name}".encode())])

    def normal(self, name: str, *shape: int) -> Floats:
        """Draws standard normal numbers."""
        own = np.random.default_rng([self.seed, self.task + 1, zlib.crc32(name.encode())])
        common = math.sqrt(self.correlation) * self.shared(name).normal(size=shape)
        return common + math.sqrt(1 - self.correlation) * own.normal(size=shape)

    def uniform(self, name: str, low: float, high: float, *shape: int) -> Floats:
        """Draws uniform numbers."""
        return low + (high - low) * np.asarray(ndtr(self.normal(name, *shape)))

    def trend(self, name: str) -> Floats:
        """Draws a smooth function of depth, shape (26,)."""
        depth, waves = np.linspace(0, 1, LAYERS), np.arange(1, 4)
        return np.asarray(np.cos(np.pi * np.outer(depth, waves)) @ (self.normal(name, 3) / waves))

    def groups(self, name: str, count: int, size: int) -> Rows:
        """Draws distinct layers, shape (count, size), the same for all tasks."""
        rng = self.shared(name)
        return np.array([rng.choice(LAYERS, size, replace=False) for _ in range(count)])


def _saturating(parameters: _Parameters) -> Task:
    gain = np.exp(0.6 * parameters.normal("gain", LAYERS) + 0.6 * parameters.trend("trend"))
    overfit = 0.4 * np.exp(0.8 * parameters.normal("overfit", LAYERS))
    saturated = -np.expm1(-_RANK / _scales(parameters)[:, None])  # (26, 6)
    effects = gain[:, None] * saturated - overfit[:, None] * (_RANK / RANKS[-1]) ** 2
    pairs = parameters.groups("pairs", 30, 2)
    weights = parameters.normal("weights", 30)
    enough = np.exp(math.log(5.0) + 0.5 * parameters.normal("enough", 30, 2))
    one, two = -np.expm1(-((_RANK / enough.T[..., None]) ** 3))  # (30, 6) each
    tables = np.einsum("t,ta,tb->tab", weights, one, two)
    shape = "equal"
    if parameters.kind == "heteroscedastic":
        shape = ("total", "region")[parameters.seed % 2]
    parts = [(pairs, tables)]
    return _task(parameters, effects, parts, interactions=0.3, ceiling=10.0, noise_shape=shape)


def _interactions(parameters: _Parameters) -> Task:
    gain = parameters.normal("gain", LAYERS) + 0.5 * parameters.trend("trend")
    effects = gain[:, None] * -np.expm1(-_RANK / _scales(parameters)[:, None])
    # The least of three neighbors, each measured against a need of its own.
    neighbors = np.arange(LAYERS - 2)[:, None] + np.arange(3)
    need = parameters.uniform("need", 5.0, 14.0, LAYERS)
    met = np.minimum(1.0, _RANK / need[:, None])[neighbors]  # (24, 3, 6)
    least = np.minimum(
        np.minimum(met[:, 0, :, None, None], met[:, 1, None, :, None]), met[:, 2, None, None, :]
    )
    least = least * (0.7 + 0.7 * parameters.normal("least", len(least)))[:, None, None, None]
    fours = parameters.groups("fours", 8, 4)
    center = parameters.uniform("center", 5.5, 8.5, len(fours))
    mean = np.stack(np.meshgrid(*[_RANK] * 4, indexing="ij")).mean(axis=0)
    sigmoids = expit((mean[None] - center[:, None, None, None, None]) / 0.5)
    sigmoids = sigmoids * parameters.normal("fours", len(fours))[:, None, None, None, None]
    parts = [(neighbors, least), (fours, sigmoids)]
    for size, count in ((2, 24), (3, 12)):
        layers = parameters.groups(f"passed {size}", count, size)
        threshold = parameters.uniform(f"threshold {size}", 3.0, 11.0, count, size)
        upward = parameters.shared(f"upward {size}").integers(0, 2, (count, size, 1))
        passed = (threshold[:, :, None] < _RANK) == upward  # (count, size, 6)
        together = passed[:, 0].astype(np.float64)
        for i in range(1, size):
            inner = passed[:, i].reshape(count, *[1] * i, _LEVELS)
            together = together[..., None] * inner
        weights = parameters.normal(f"weights {size}", count)
        parts.append((layers, together * weights.reshape(count, *[1] * size)))
    return _task(parameters, effects, parts, interactions=0.6)


def _non_monotone(parameters: _Parameters) -> Task:
    place = 0.6 * parameters.trend("trend") + 0.5 * parameters.normal("optimum", LAYERS)
    optimum = np.log(np.clip(5.0 * np.exp(place), 1.5, 14.0))
    width = np.exp(math.log(0.55) + 0.3 * parameters.normal("width", LAYERS))
    gain = np.exp(0.5 * parameters.normal("gain", LAYERS))
    # The best rank of a layer moves with the rank of the next one: [layer, rank, next rank].
    shift = 0.6 * parameters.normal("shift", LAYERS)[:, None] * _LOG
    distance = np.log(_RANK)[None, :, None] - optimum[:, None, None] - shift[:, None, :]
    bumps = gain[:, None, None] * np.exp(-0.5 * (distance / width[:, None, None]) ** 2)
    neighbors = np.arange(LAYERS - 1)[:, None] + np.arange(2)
    parts = [(neighbors, bumps[:-1])]
    return _task(parameters, bumps.mean(axis=2), parts, interactions=0.3, ceiling=6.0)


def _scales(parameters: _Parameters) -> Floats:
    """Ranks at which the gains of the layers saturate, shape (26,)."""
    return np.exp(math.log(4.0) + 0.5 * parameters.normal("scales", LAYERS))


def _task(
    parameters: _Parameters,
    effects: Floats,
    parts: list[tuple[Rows, Floats]],
    *,
    interactions: float,
    ceiling: float = math.inf,
    noise_shape: str = "equal",
) -> Task:
    """Gives effects, and the pure interactions of all parts alike, their shares of a variance 1."""
    effects = effects - effects.mean(axis=1, keepdims=True)
    effects = effects * math.sqrt((1 - interactions) / effects.var(axis=1).sum())
    index = np.random.default_rng(0).integers(0, _LEVELS, (20_000, LAYERS))
    terms = []
    for layers, tables in parts:
        pure = Terms(layers, _pure(tables).reshape(len(tables), -1))
        scale = math.sqrt(interactions / len(parts)) / float(pure(index).std())
        terms.append(Terms(layers, pure.tables * scale))
    penalized = parameters.kind != "non-monotone"
    return Task(
        effects=effects,
        terms=tuple(terms),
        penalty=float(parameters.uniform("penalty", 10.0, 30.0)) if penalized else 0.0,
        threshold=float(parameters.uniform("from", 0.5, 0.65)),
        ceiling=ceiling,
        offset=float(parameters.uniform("offset", 0.35, 0.8)),
        spread=float(parameters.uniform("spread", 0.005, 0.02)),
        noise_shape=noise_shape,
    )


def _pure(tables: Floats) -> Floats:
    """Takes the mean and all main effects out of tables (t, 6, ..., 6)."""
    axes = tuple(range(1, tables.ndim))
    mean = tables.mean(axis=axes, keepdims=True)
    pure = tables - mean
    for axis in axes:
        others = tuple(a for a in axes if a != axis)
        pure = pure - (tables.mean(axis=others, keepdims=True) - mean)
    return np.asarray(pure)


def _standardized(task: Task, rows: Rows) -> Task:
    """Sets center and scale so that random `rows` have mean 0 and standard deviation 1."""
    values = task(rows)
    return Task(
        **{**vars(task), "center": float(values.mean()), "scale": float(values.std())},
    )
