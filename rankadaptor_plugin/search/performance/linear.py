"""Bayesian linear regression on effects of columns, of total parameters, and of pairs of columns.

*Prior.* The value of a row is a sum of components, each normal about 0: effects of single columns,
which may be independent (own), smooth over depth, or the same everywhere (shared); effects of the
searched settings; a parabola in the total of trainable parameters; and products of two columns.

*Posterior.* Every cell of a grid of hyper-parameters has shares of the components and a noise; on
top of it come the weights of what is expected beforehand. All are weighted by their marginal
likelihood and averaged, which with few data does better than taking the likeliest. The work is done
on n x n covariances (Rasmussen and Williams 2006, ch. 2), so that the number of effects hardly
matters.

*Proposals* are Thompson samples: a function drawn from the posterior, and the highest row of that
function (`rankadaptor_plugin.search.performance.landscape`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg
import scipy.special

from rankadaptor_plugin.search.performance.landscape import Ascent, Codes, Landscape, take
from rankadaptor_plugin.search.performance.performance_model import Prediction, spread

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from rankadaptor_plugin.config.tables import PerformanceModelConfig
    from rankadaptor_plugin.core.ranks import Allocations, RankSpace
    from rankadaptor_plugin.search.performance.landscape import Floats, Ints
    from rankadaptor_plugin.search.performance.performance_model import (
        PerformanceModel,
        PriorEffects,
        Values,
    )

WEIGHTS = (0.0, 0.3, 0.6, 1.0)
"""Weights that each expectation may have."""

_INTERCEPT = 4.0  # Variance of the intercept relative to that of the values.
_SHAPE = 2.0  # Of the inverse gamma prior of the overall variance; as vague as a mean allows.
_EXPLAINED = 0.75  # Share of the variance that an expectation of weight 1 explains.
_MASS = 0.99  # Share of the posterior over cells that is averaged, in at most so many cells:
_CELLS = 32
_CORNER = 1e12  # Above any squared norm of whitened targets.
_MAIN = 4  # The first four components are effects of single columns.
_CURVATURE = 0.4  # What bends the effect of a rank, relative to what is monotone in it.
_LENGTH = 0.12  # Relative depth over which smooth effects change.
# Shares of the variance: of pairs in all of it, of settings in the rest, of others in what is left.
_PAIRS = (0.0, 0.2, 0.5)
_SETTINGS = (0.1, 0.5)
_SMOOTH = (0.0, 0.4)
_SHARED = (0.0, 0.3)
_TOTAL = (0.0, 0.2)
_NOISES = (0.03, 0.1, 0.3, 1.0, 3.0)
_TEMPERATURE = 0.7
_RANDOM_STARTS = 3
_BATCH = 4096  # Rows predicted at once; bounds the memory.


def noises() -> Floats:
    """Returns the variances of one measurement relative to that of the values, shape (k,)."""
    return np.array(_NOISES)


def structures(space: RankSpace) -> Floats:
    """Returns the shares of the components in the variance over random rows, shape (s, 6).

    Each structure adds up to 1, in the order own, smooth, shared, settings, total, pairs.
    """
    shares = []
    for settings, smooth, shared, total, pairs in itertools.product(
        _SETTINGS if space.settings else (0.0,), _SMOOTH, _SHARED, _TOTAL, _PAIRS
    ):
        ranks = (1 - pairs) * (1 - settings)
        own = ranks * (1 - smooth - shared - total)
        alone = (1 - pairs) * settings
        shares.append((own, ranks * smooth, ranks * shared, alone, ranks * total, pairs))
    return np.array(shares)


@dataclass(frozen=True)
class Effects:
    """Coefficients of all components together, for one function.

    Attributes:
        monotone: Of `Codes.monotone`, per column, shape (c,).
        curvature: Of the weighted `Codes.curvature`, shape (c,).
        total: Of the standardized total and of its centered square, shape (2,).
        pairs: Half of that of a product of two columns, shape (c, c), symmetric, diagonal 0.
    """

    monotone: Floats
    curvature: Floats
    total: Floats
    pairs: Floats

    @classmethod
    def none(cls, columns: int) -> Effects:
        """Returns the function that is 0 everywhere."""
        return cls(np.zeros(columns), np.zeros(columns), np.zeros(2), np.zeros((columns, columns)))

    def plus(self, other: Effects, factor: float) -> Effects:
        """Returns the sum with a multiple of others."""
        return Effects(
            self.monotone + factor * other.monotone,
            self.curvature + factor * other.curvature,
            self.total + factor * other.total,
            self.pairs + factor * other.pairs,
        )


class Rows:
    """The features of rows.

    Attributes:
        monotone: Shape (n, c).
        curvature: Weighted, shape (n, c).
        total: The standardized total of parameters and its centered square, shape (n, 2).
    """

    def __init__(self, prior: Prior, index: Ints) -> None:
        codes = prior.codes
        self.monotone = take(codes.monotone, index)
        self.curvature = take(prior.curvature, index)
        total = take(codes.total, index).sum(axis=1)
        self.total = np.stack([total, (total**2 - 1) / 2**0.5], axis=1) / 2**0.5

    def __len__(self) -> int:
        return len(self.monotone)

    def values(self, effects: Effects) -> Floats:
        """Returns the values of a function, shape (n,)."""
        value = self.monotone @ effects.monotone + self.curvature @ effects.curvature
        products = ((self.monotone @ effects.pairs) * self.monotone).sum(axis=1)
        return np.asarray(value + self.total @ effects.total + products)


class Prior:
    """The components over one space.

    Args:
        codes: The levels of the space.
    """

    def __init__(self, codes: Codes) -> None:
        space, c = codes.space, len(codes.monotone)
        self.codes = codes
        is_rank = np.arange(c) < space.slots
        self.curvature = codes.curvature * np.where(is_rank, _CURVATURE, 1.0)[:, None]
        searched = np.zeros(c, dtype=bool)
        searched[codes.searched] = True
        ranks = searched & is_rank
        groups = len(space.groups)
        depth = np.arange(c) // groups / max(space.layers - 1, 1)
        near = np.exp(-0.5 * (np.subtract.outer(depth, depth) / _LENGTH) ** 2)
        group = np.arange(c) % groups
        alike = np.where(np.equal.outer(group, group), 1.0, 0.5)
        both = np.multiply.outer(ranks, ranks)
        covariances = np.array(
            [np.diag(ranks * 1.0), both * near * alike, both * alike, np.diag(~is_rank & searched)]
        )
        traces = np.trace(covariances, axis1=1, axis2=2)
        # Covariance of the effects of columns, (4, c, c), with variance 1 over random rows.
        self._covariances = covariances / np.maximum(traces, 1)[:, None, None]
        count = int(searched.sum())
        self._pair_variance = 2 / max(count * (count - 1), 1)

    def grams(self, one: Rows, two: Rows) -> Floats:
        """Returns the covariance between the values of rows, by component, shape (6, n, m)."""
        main = [
            one.monotone @ covariance @ two.monotone.T
            + one.curvature @ covariance @ two.curvature.T
            for covariance in self._covariances
        ]
        product = one.monotone @ two.monotone.T
        squares = one.monotone**2 @ (two.monotone**2).T
        pairs = 0.5 * self._pair_variance * (product**2 - squares)
        return np.array([*main, one.total @ two.total.T, pairs])

    def variances(self, rows: Rows) -> Floats:
        """Returns the variance of the value of each row, by component, shape (6, n)."""
        main = [
            np.einsum("ni,ij,nj->n", part, covariance, part, optimize=True)
            for covariance in self._covariances
            for part in (rows.monotone, rows.curvature)
        ]
        squares = rows.monotone**2
        pairs = 0.5 * self._pair_variance * (squares.sum(axis=1) ** 2 - (squares**2).sum(axis=1))
        mains = np.array(main).reshape(_MAIN, 2, -1).sum(axis=1)
        return np.concatenate([mains, (rows.total**2).sum(axis=1)[None], pairs[None]])

    def expected(self, shares: Floats, rows: Rows, dual: Floats) -> Effects:
        """Returns the posterior mean of the effects.

        Args:
            shares: Variance of each component, shape (6,).
            rows: What was measured, n rows.
            dual: Inverse covariance of the measurements times their values, shape (n,).
        """
        covariance = np.tensordot(shares[:_MAIN], self._covariances, 1)
        products = (rows.monotone * dual[:, None]).T @ rows.monotone
        np.fill_diagonal(products, 0.0)
        return Effects(
            covariance @ (rows.monotone.T @ dual),
            covariance @ (rows.curvature.T @ dual),
            shares[_MAIN] * (rows.total.T @ dual),
            0.5 * shares[-1] * self._pair_variance * products,
        )

    def draw(self, shares: Floats, rng: np.random.Generator) -> Effects:
        """Draws effects from the prior."""
        covariance = np.tensordot(shares[:_MAIN], self._covariances, 1)
        c = len(covariance)
        # Rounding may leave a covariance of smooth effects short of definite.
        root = np.linalg.cholesky(covariance + 1e-9 * np.eye(c))
        monotone, curvature = (root @ rng.normal(size=(c, 2))).T
        upper = np.triu(rng.normal(size=(c, c)), 1)
        searched = np.zeros(c)
        searched[self.codes.searched] = 1.0
        upper *= 0.5 * (shares[-1] * self._pair_variance) ** 0.5
        upper *= np.multiply.outer(searched, searched)
        return Effects(
            monotone,
            curvature,
            shares[_MAIN] ** 0.5 * rng.normal(size=2),
            upper + upper.T,
        )

    def landscape(self, effects: Effects, tables: Floats | float = 0.0) -> Landscape:
        """Returns effects as a landscape, up to a constant, with more effects added, (c, h)."""
        codes = self.codes
        own = (
            effects.monotone[:, None] * codes.monotone + effects.curvature[:, None] * self.curvature
        )
        return Landscape(
            codes=codes,
            tables=own + tables,
            pairs=effects.pairs,
            linear=float(effects.total[0]) / 2**0.5,
            quadratic=float(effects.total[1]) / 2,
        )


@dataclass(frozen=True)
class Cell:
    """One of the cells that are averaged.

    Attributes:
        weight: Its share of the average.
        shares: Share of each component in the variance, shape (6,).
        root: Lower Cholesky factor of the covariance of the measurements, shape (n, n).
        expected: Expected weight of each expectation, shape (p,).
        covariance: Their covariance, shape (p, p).
        dual: Inverse covariance of the measurements times their deviation from what was
            expected, shape (n,).
        variance: Of the values, in squared standard deviations of the data.
        noise: Variance of one measurement, in the same unit.
    """

    weight: float
    shares: Floats
    root: Floats
    expected: Floats
    covariance: Floats
    dual: Floats
    variance: float
    noise: float


class Posterior:
    """Posterior of the function, given standardized values of n rows.

    Args:
        prior: The components.
        rows: What was measured; may be none.
        values: Standardized values, shape (n,).
        expected: What is expected of the rows beforehand, by p sources, shape (p, n).

    Attributes:
        choices: The combinations of weights of the sources, shape (a, p).
        weights: Probability of each cell and choice, shape (g, a), in all 1.
        log_evidence: Their log marginal likelihood, shape (g, a), in nats.
    """

    def __init__(self, prior: Prior, rows: Rows, values: Floats, expected: Floats) -> None:
        n, p = len(values), len(expected)
        self._prior, self._rows = prior, rows
        # A cell is a structure with a noise; cell g has structure g // k and noise g % k.
        self._structures, self._noises = structures(prior.codes.space), noises()
        self.choices = np.array(list(itertools.product(WEIGHTS, repeat=p)))
        self._targets = np.vstack([values, expected])  # (1 + p, n)
        self._grams = prior.grams(rows, rows)
        # With the targets as further rows, and a corner so large that the whole stays definite,
        # the last rows of a factor are the targets times the inverse root.
        joint = np.empty((n + p + 1, n + p + 1))
        whitened, half_log = [], []
        for gram in np.tensordot(self._structures, self._grams, 1) + _INTERCEPT:
            for noise in self._noises:
                joint[:n, :n] = gram
                joint[range(n), range(n)] += noise
                joint[n:, :n] = self._targets
                joint[n:, n:] = _CORNER * np.eye(p + 1)
                # In place, on the transpose since LAPACK wants columns: a fifth of numpy's time.
                scipy.linalg.lapack.dpotrf(joint.T, lower=0, clean=0, overwrite_a=1)
                whitened.append(joint[n:, :n].copy())
                half_log.append(np.log(np.diagonal(joint)[:n]).sum())
        self._weigh(np.array(whitened), np.array(half_log))
        self._averaged: list[Cell] | None = None

    def _weigh(self, whitened: Floats, half_log: Floats) -> None:
        """Computes the marginal likelihood of each cell and each choice of weights.

        Args:
            whitened: The targets times the inverse root of the covariance, shape (g, 1 + p, n).
            half_log: Half of the log determinant of the covariance, shape (g,).
        """
        n = whitened.shape[2]
        signs = np.hstack([np.ones((len(self.choices), 1)), -self.choices])
        products = whitened @ whitened.swapaxes(1, 2)
        squares = np.einsum("ai,gij,aj->ga", signs, products, signs, optimize=True)
        # The overall variance is integrated out. Its inverse gamma prior has the mean that makes
        # values and noise add up to 1.
        rate = (_SHAPE - 1) / (1 + np.tile(self._noises, len(self._structures)))[:, None]
        # What is expected beforehand with a great weight leaves less to be explained.
        rate = rate * (1 - _EXPLAINED * np.minimum((self.choices**2).sum(axis=1), 1.0))
        shape, posterior = _SHAPE + n / 2, rate + squares / 2
        self.log_evidence = (
            scipy.special.gammaln(shape)
            - scipy.special.gammaln(_SHAPE)
            + _SHAPE * np.log(rate)
            - shape * np.log(posterior)
            - half_log[:, None]
            - n / 2 * np.log(2 * np.pi)
        )
        self.weights = scipy.special.softmax(self.log_evidence)  # (g, a)
        self._variances = posterior / (shape - 1)

    @property
    def cells(self) -> list[Cell]:
        """The cells that matter, heaviest first; computed on first use."""
        if self._averaged is None:
            weights = self.weights.sum(axis=1)
            order = np.argsort(-weights, kind="stable")[:_CELLS]
            order = order[: int(np.searchsorted(weights[order].cumsum(), _MASS)) + 1]
            total = float(weights[order].sum())
            self._averaged = [self._cell(int(cell), total) for cell in order]
        return self._averaged

    def _cell(self, cell: int, total: float) -> Cell:
        weight = float(self.weights[cell].sum())
        choices = self.weights[cell] / weight
        expected = choices @ self.choices
        centered = self.choices - expected
        structure, noise = self._split(cell)
        variance, root = float(choices @ self._variances[cell]), self._root(cell)
        return Cell(
            weight=weight / total,
            shares=structure,
            root=root,
            expected=expected,
            covariance=(centered * choices[:, None]).T @ centered,
            dual=_solve(root, self._targets[0] - expected @ self._targets[1:]),
            variance=variance,
            noise=noise * variance,
        )

    def _split(self, cell: int) -> tuple[Floats, float]:
        """Returns shares and noise of a cell."""
        structure, noise = divmod(cell, len(self._noises))
        return self._structures[structure], float(self._noises[noise])

    def _root(self, cell: int) -> Floats:
        """Returns the lower Cholesky factor of a cell's covariance of the measurements, (n, n)."""
        shares, noise = self._split(cell)
        covariance = np.tensordot(shares, self._grams, 1) + _INTERCEPT
        root = np.linalg.cholesky(covariance + noise * np.eye(len(covariance)))
        return np.asarray(root, dtype=np.float64)

    def draw(self, rng: np.random.Generator, temperature: float) -> tuple[Effects, Floats]:
        """Draws a function by Matheron's rule.

        That is a draw from the prior, less what it says of the rows, plus what was measured there.

        Args:
            rng: All randomness.
            temperature: Factor on the deviation from the mean of the cell drawn.

        Returns:
            Effects, and the weight of each source, shape (p,).
        """
        flat = int(rng.choice(self.weights.size, p=self.weights.ravel()))
        cell, choice = divmod(flat, len(self.choices))
        structure, noise = self._split(cell)
        deviation = temperature * self._variances[cell, choice] ** 0.5
        drawn = self._prior.draw(structure, rng)
        measured = self._rows.values(drawn) + _INTERCEPT**0.5 * rng.normal()
        measured += noise**0.5 * rng.normal(size=len(self._rows))
        known = self._targets[0] - self.choices[choice] @ self._targets[1:]
        dual = _solve(self._root(cell), known - deviation * measured)
        effects = self._prior.expected(structure, self._rows, dual).plus(drawn, deviation)
        return effects, self.choices[choice]

    def mean(self) -> tuple[Effects, Floats]:
        """Returns the expected function: effects, and the weight of each source, shape (p,)."""
        effects = Effects.none(len(self._prior.codes.valid))
        for cell in self.cells:
            expected = self._prior.expected(cell.shares, self._rows, cell.dual)
            effects = effects.plus(expected, cell.weight)
        weights = np.array([cell.weight for cell in self.cells])
        return effects, weights @ np.array([cell.expected for cell in self.cells])

    def moments(self, rows: Rows, expected: Floats) -> Floats:
        """Returns mean and variance of the values of m rows.

        Args:
            rows: The rows.
            expected: What is expected of them beforehand, shape (p, m).

        Returns:
            Shape (2, m), of standardized values.
        """
        grams, own = self._prior.grams(self._rows, rows), self._prior.variances(rows)
        means, variances = [], []
        for cell in self.cells:
            covariance = np.tensordot(cell.shares, grams, 1) + _INTERCEPT  # (n, m)
            means.append(cell.dual @ covariance + cell.expected @ expected)
            known = (covariance * _solve(cell.root, covariance)).sum(axis=0)
            variance = cell.variance * np.maximum(cell.shares @ own + _INTERCEPT - known, 0)
            # What an uncertain weight of a prior moves there, given the measurements.
            lever = expected - _solve(cell.root, self._targets[1:].T).T @ covariance  # (p, m)
            variances.append(variance + (lever * (cell.covariance @ lever)).sum(axis=0))
        weights = np.array([cell.weight for cell in self.cells])
        mean = weights @ np.array(means)
        return np.array([mean, weights @ (np.array(variances) + (np.array(means) - mean) ** 2)])


def _solve(root: Floats, values: Floats) -> Floats:
    """Returns the inverse covariance times values, shape (n,) or (n, m)."""
    if not len(values):  # SciPy before 1.14 cannot
        return values
    return np.asarray(scipy.linalg.cho_solve((root, True), values, check_finite=False))


class BayesianRegression:
    """Predicts and proposes rows; before the first `fit`, by what is expected beforehand.

    Args:
        space: The rank space.
        priors: What is expected beforehand. Each has a weight in [0, 1] that the data choose; the
            work grows fourfold with each.
        temperature: Factor on the deviation of a Thompson sample from the mean; 1 draws from the
            posterior, 0 exploits it.
    """

    def __init__(
        self,
        space: RankSpace,
        priors: Sequence[PriorEffects] = (),
        *,
        temperature: float = _TEMPERATURE,
    ) -> None:
        self._codes = Codes(space)
        self._prior = Prior(self._codes)
        self._names = tuple(prior.name for prior in priors)
        self._tables = np.zeros((len(priors), *self._codes.valid.shape))  # (p, c, h)
        for table, prior in zip(self._tables, priors, strict=True):
            for column, effect in enumerate(prior.effects):
                table[column, : len(effect)] = effect
        self._temperature = temperature
        self.fit(np.zeros((0, space.columns), dtype=np.int64), np.zeros(0))

    def fit(self, ranks: Allocations, values: Values) -> None:
        """Conditions on all measurements; see `PerformanceModel`."""
        self._center = float(np.mean(values)) if len(values) else 0.0
        self._scale = spread(values)
        self._index = self._codes.index(ranks)
        self._posterior = Posterior(
            self._prior,
            Rows(self._prior, self._index),
            (values - self._center) / self._scale,
            self._expected(self._index),
        )

    @property
    def evidence(self) -> float:
        """Log marginal likelihood of the standardized values, averaged over all cells, in nats."""
        return _log_mean(self._posterior.log_evidence)

    @property
    def evidence_without_priors(self) -> float:
        """The same with all priors at weight 0."""
        unused = ~self._posterior.choices.any(axis=1)
        return _log_mean(self._posterior.log_evidence[:, unused])

    @property
    def prior_weights(self) -> dict[str, float]:
        """Posterior mean of the weight of each prior, in [0, 1]."""
        expected = self._posterior.weights.sum(axis=0) @ self._posterior.choices
        return dict(zip(self._names, expected.tolist(), strict=True))

    def predict(self, ranks: Allocations) -> Prediction:
        """Predicts; in standard deviations about 0 as long as nothing was fitted."""
        parts = [np.zeros((2, 0))]
        for start in range(0, len(ranks), _BATCH):
            index = self._codes.index(ranks[start : start + _BATCH])
            rows = Rows(self._prior, index)
            parts.append(self._posterior.moments(rows, self._expected(index)))
        mean, variance = np.concatenate(parts, axis=1)
        noise = sum(cell.weight * cell.noise for cell in self._posterior.cells)
        return Prediction(
            mean=self._center + self._scale * mean,
            stddev=self._scale * np.sqrt(variance),
            noise=self._scale * noise**0.5,
        )

    def propose(
        self,
        rng: np.random.Generator,
        *,
        tried: Collection[tuple[int, ...]] = (),
        most_parameters: int | None = None,
    ) -> list[int]:
        """Returns the highest row of a Thompson sample; see `ProposingModel`.

        Raises:
            RankSpaceError: If no allocation is as small as `most_parameters`.
        """
        drawn = self._posterior.draw(rng, self._temperature)
        return self._highest(drawn, rng, set(tried), most_parameters)

    def best(self, rng: np.random.Generator, *, most_parameters: int | None = None) -> list[int]:
        """Returns the row with the highest mean that ascent finds; see `ProposingModel`.

        Raises:
            RankSpaceError: If no allocation is as small as `most_parameters`.
        """
        return self._highest(self._posterior.mean(), rng, set(), most_parameters)

    def drawn(self, ranks: Allocations, rng: np.random.Generator) -> Values:
        """Returns the values of rows of shape (n, c) under one Thompson sample, shape (n,)."""
        landscape = self._landscape(self._posterior.draw(rng, self._temperature))
        return self._center + self._scale * landscape.values(self._codes.index(ranks))

    def _landscape(self, function: tuple[Effects, Floats]) -> Landscape:
        effects, weights = function
        return self._prior.landscape(effects, np.tensordot(weights, self._tables, 1))

    def _highest(
        self,
        function: tuple[Effects, Floats],
        rng: np.random.Generator,
        tried: set[tuple[int, ...]],
        most_parameters: int | None,
    ) -> list[int]:
        landscape = self._landscape(function)
        ascent = Ascent(landscape, rng, most_parameters)
        starts = [landscape.without_pairs()]
        if len(self._index):
            starts.append(self._index[landscape.values(self._index).argmax()])
        highest = ascent.highest(np.array(starts), random=_RANDOM_STARTS)
        highest = ascent.next_highest(highest, tried)
        return [int(value) for value in self._codes.rows(highest[None])[0]]

    def _expected(self, index: Ints) -> Floats:
        """Returns the expectation of each prior for n rows, shape (p, n)."""
        expected = [take(table, index).sum(axis=1) for table in self._tables]
        return np.array(expected).reshape(len(expected), len(index))


def bayes(space: RankSpace, config: PerformanceModelConfig, seed: int) -> PerformanceModel:
    """Builds the regression; it has no settings to read and draws nothing by itself."""
    return BayesianRegression(space)


def _log_mean(logs: Floats) -> float:
    return float(scipy.special.logsumexp(logs) - np.log(logs.size))
