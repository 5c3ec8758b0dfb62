"""How much priors are to be trusted, by the evidence of the values measured so far."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rankadaptor_plugin.search.performance.performance_model import Values

_GRID = np.array([0.0, 0.3, 0.6, 1.0])
_RATIOS = (0.1, 0.3, 1.0, 3.0)  # noise variance over the variance of the linear part
_SWEEPS = 2


def prior_weights(inputs: Values, targets: Values, expected: Values) -> Values:
    """Returns the weight of each prior, from 0 to 1.

    What a weighted prior leaves of the targets is modelled by Bayesian linear regression on the
    inputs, whose scale is integrated out. A weight is the mean of 0, 0.3, 0.6 and 1 by their
    evidence, so that it starts in the middle while data are few. Several priors take turns.

    Args:
        inputs: Standardised rows, shape (n, c).
        targets: Standardised values, shape (n,).
        expected: What the priors expect, shape (n, p).

    Returns:
        Shape (p,).
    """
    count, priors = expected.shape
    weights = np.zeros(priors)
    if not priors:
        return weights
    linear = inputs.astype(np.float64) @ inputs.T / inputs.shape[1]
    level, eye = np.full((count, count), 100.0), np.eye(count)  # the level is anything

    def evidence(ratio: float, left: Values) -> Values:
        # left (n, k): residuals under k weights; inverse gamma prior of one observation
        covariance = linear + level + ratio * eye
        squares = (left * np.linalg.solve(covariance, left)).sum(axis=0)
        logdet = float(np.linalg.slogdet(covariance)[1])
        return np.asarray(-0.5 * logdet - 0.5 * (count + 1) * np.log1p(squares))

    for _ in range(_SWEEPS):
        for prior in range(priors):
            others = targets - np.delete(expected, prior, 1) @ np.delete(weights, prior)
            left = others[:, None] - expected[:, [prior]] * _GRID
            logs = np.array([evidence(ratio, left) for ratio in _RATIOS])
            shares = np.exp(logs - logs.max()).sum(axis=0)
            weights[prior] = float(shares @ _GRID / shares.sum())
    return weights
