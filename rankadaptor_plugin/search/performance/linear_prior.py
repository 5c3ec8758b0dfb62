"""What the Bayesian regression takes to be possible: components of effects, in function space.

The value of a row is a sum of components, each normal about 0: effects of single columns, which may
be independent (own), smooth over depth, or the same everywhere (shared); effects of the searched
settings; a parabola in the total of trainable parameters; and products of two columns.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rankadaptor_plugin.search.performance.landscape import Landscape, take

if TYPE_CHECKING:
    from rankadaptor_plugin.core.ranks import RankSpace
    from rankadaptor_plugin.search.performance.landscape import Codes, Floats, Ints

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


def noises() -> Floats:
    """Returns the variances of one measurement relative to that of the values, shape (k,)."""
    return np.array(_NOISES)


def structures(space: RankSpace) -> Floats:
    """Returns the shares of the components in the variance over random rows, shape (s, 6).

    Each structure adds up to 1, in the order own, smooth, shared, settings, total, pairs.
    """
    found = []
    for settings, smooth, shared, total, pairs in itertools.product(
        _SETTINGS if space.settings else (0.0,), _SMOOTH, _SHARED, _TOTAL, _PAIRS
    ):
        ranks = (1 - pairs) * (1 - settings)
        own = ranks * (1 - smooth - shared - total)
        alone = (1 - pairs) * settings
        found.append((own, ranks * smooth, ranks * shared, alone, ranks * total, pairs))
    return np.array(found)


@dataclass(frozen=True)
class Effects:
    """Coefficients of all components together, for one function.

    Attributes:
        monotone: Of `Codes.monotone`, per column, shape (c,).
        curvature: Of the weighted `Codes.curvature`, shape (c,).
        total: Of the standardised total and of its centred square, shape (2,).
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
        total: The standardised total of parameters and its centred square, shape (n, 2).
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
