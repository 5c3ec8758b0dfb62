"""The posterior of the Bayesian regression over a grid of hyper-parameters.

Every cell of the grid has shares of the components
(`rankadaptor_plugin.search.performance.linear_prior`) and a noise; on top of it come the weights of
what is expected beforehand. All are weighted by their marginal likelihood and averaged. The work is
done on n x n covariances (Rasmussen and Williams 2006, ch. 2), so that the number of effects hardly
matters.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg
import scipy.special

from rankadaptor_plugin.search.performance.linear_prior import Effects, noises, structures

if TYPE_CHECKING:
    from rankadaptor_plugin.search.performance.landscape import Floats
    from rankadaptor_plugin.search.performance.linear_prior import Prior, Rows

WEIGHTS = (0.0, 0.3, 0.6, 1.0)
"""Weights that each expectation may have."""

_INTERCEPT = 4.0  # Variance of the intercept relative to that of the values.
_SHAPE = 2.0  # Of the inverse gamma prior of the overall variance; as vague as a mean allows.
_EXPLAINED = 0.75  # Share of the variance that an expectation of weight 1 explains.
_MASS = 0.99  # Share of the posterior over cells that is averaged, in at most so many cells:
_CELLS = 32
_CORNER = 1e12  # Above any squared norm of whitened targets.


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
    """What standardised values of n rows teach.

    Args:
        prior: The components.
        rows: What was measured; may be none.
        values: Standardised values, shape (n,).
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
        """The cells that matter, heaviest first; found when they are first asked for."""
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
        centred = self.choices - expected
        structure, noise = self._split(cell)
        variance, root = float(choices @ self._variances[cell]), self._root(cell)
        return Cell(
            weight=weight / total,
            shares=structure,
            root=root,
            expected=expected,
            covariance=(centred * choices[:, None]).T @ centred,
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
            Shape (2, m), of standardised values.
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
