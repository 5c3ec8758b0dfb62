"""Additive Gaussian-process regression over studies: the effects of ranks that they share.

In each study the score is a sum over the columns of a row: a code of the rank, and a second one for
its curvature, times weights of the column. The weights are a smooth function of where the column
is, its *point*: one function that all studies share, plus one of each study's own. How much is
shared, and which features of a point matter, is decided by the marginal likelihood; where studies
disagree, little is shared, and the shared function comes out small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = NDArray[np.float64]

_LENGTHS = (0.4, 0.1, 0.01)
"""Length scales in relative depth; the shortest tells apart the layers of one model."""

_WEIGHTS = (0.0, 0.5, 2.0)  # of a part of the kernel, before they are scaled to sum to 1
_SHARED = (0.05, 0.2, 0.5, 0.8, 0.95)
_CURVATURE = (0.1, 0.4)
_SIGNAL = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # variance of the effects over that of the noise
_GAIN = 0.5  # nats of evidence that a change of the kernel must bring
_ROUNDS = 3
_RANK = 64  # of the factor of the kernel
_CHOOSING = 8  # studies that choose the kernel; more would not change it, but take longer


@dataclass(frozen=True, kw_only=True)
class Points:
    """Points of the weights to be learned.

    Attributes:
        similarity: How alike the points are apart from what follows, shape (P, P), in [0, 1],
            positive semi-definite.
        depth: Relative depth, shape (P,), in [0, 1]; NaN for what is no layer.
        features: Further features, shape (P, F), each about 0 with standard deviation 1; NaN if
            unknown.
    """

    similarity: Array
    depth: Array
    features: Array

    def kernel(self, weights: Sequence[float], point: int) -> Array:
        """Returns the covariances of all points with one, shape (P,).

        Args:
            weights: Of a constant, of each length scale in depth, and of each feature.
            point: Number of the one.
        """
        total = np.full(len(self.depth), weights[0])
        parts = [(self.depth, length) for length in _LENGTHS]
        parts += [(column, 1.0) for column in self.features.T]
        for weight, (column, length) in zip(weights[1:], parts, strict=True):
            if weight:
                distance = (column - column[point]) / length
                # What is unknown of one of two points makes them neither alike nor unlike.
                total += weight * np.nan_to_num(np.exp(-0.5 * distance**2), nan=0.0)
        return np.asarray(total * self.similarity[:, point])

    def variances(self, weights: Sequence[float]) -> Array:
        """Returns the variances of all points, shape (P,)."""
        known = np.column_stack([self.depth[:, None].repeat(len(_LENGTHS), 1), self.features])
        total = weights[0] + ~np.isnan(known) @ np.array(weights[1:])
        return np.asarray(total * np.diag(self.similarity))


@dataclass(frozen=True, kw_only=True)
class StudyValues:
    """The trials of one study.

    Attributes:
        linear: First code of each column, shape (n, c), no column with a mean.
        curved: Second code, the same.
        points: Point of each column, shape (c,), int64.
        values: Scores, shape (n,), about 0 with standard deviation 1.
    """

    linear: Array
    curved: Array
    points: NDArray[np.int64]
    values: Array


class _Setting(NamedTuple):
    """The prior: share in common, variance of the curvature, weights of the kernel's parts."""

    shared: float
    curvature: float
    weights: tuple[float, ...]

    def with_value(self, number: int, value: float) -> _Setting:
        """Returns a copy with another value of one of all parameters."""
        values = [self.shared, self.curvature, *self.weights]
        values[number] = value
        return _Setting(values[0], values[1], tuple(values[2:]))


def shared_effects(points: Points, studies: Sequence[StudyValues]) -> tuple[Array, Array]:
    """Returns the expected weights of both codes at each point, two arrays of shape (P,).

    Args:
        points: All points, those of the studies and those that are asked for.
        studies: At least one.
    """
    depth, further = 1 + len(_LENGTHS), points.features.shape[1]
    weights = (_WEIGHTS[1],) * depth + (_WEIGHTS[0],) * further
    setting = _Setting(0.5, _CURVATURE[0], weights)
    some = studies[:: -(-len(studies) // _CHOOSING)]
    choices = [_SHARED if len(some) > 1 else (), _CURVATURE, *(_WEIGHTS for _ in weights)]
    model = _Model(points, some, setting)
    best = model.evidence(setting)
    for _ in range(_ROUNDS):
        before = setting
        # What is shared is quick to try, and depends on all else: it comes first and last.
        for number in (*range(len(choices)), 0):
            for tried in [setting.with_value(number, value) for value in choices[number]]:
                if tried == setting or not any(tried.weights):
                    continue
                trial = model if number == 0 else _Model(points, some, tried)
                evidence = trial.evidence(tried)
                if evidence > best + _GAIN:
                    best, setting, model = evidence, tried, trial
        if setting == before:
            break
    return _Model(points, studies, setting).weights(setting)


class _Model:
    """The studies as linear models in the factor of a kernel.

    With D = 2 m coordinates of the factor, S studies: study s has the values
    ``sqrt(signal_s) psi_s (b + b_s) + noise``, with b ~ N(0, shared), b_s ~ N(0, 1 - shared).
    """

    def __init__(self, points: Points, studies: Sequence[StudyValues], setting: _Setting) -> None:
        self._factor = _factor(points, setting.weights)
        rows = [_projected(study, self._factor, setting.curvature) for study in studies]
        moment = np.stack([p.T @ s.values for p, s in zip(rows, studies, strict=True)])
        # In the axes of its own psi^T psi a study is a sum of independent parts.
        lengths, self._axes = np.linalg.eigh(np.stack([psi.T @ psi for psi in rows]))
        self._lengths = np.maximum(lengths, 0.0)  # (S, D)
        self._moment = np.einsum("sde,sd->se", self._axes, moment)
        self._square = np.array([s.values @ s.values for s in studies])
        self._count = np.array([len(s.values) for s in studies])

    def signal(self) -> tuple[Array, Array]:
        """Returns the likeliest variance of effects and noise of each study by itself, (S,)."""
        best = np.full(len(self._count), -np.inf)
        ratio, noise = np.zeros_like(best), np.ones_like(best)
        for signal in _SIGNAL:
            fitted, logdet = self._fitted(np.full(len(best), signal))
            residual = np.maximum(self._square - signal * fitted, 1e-9 * self._square)
            evidence = -0.5 * (self._count * np.log(residual / self._count) + logdet)
            better = evidence > best
            best = np.where(better, evidence, best)
            ratio = np.where(better, signal, ratio)
            noise = np.where(better, residual / self._count, noise)
        return ratio * noise, noise

    def evidence(self, setting: _Setting) -> float:
        """Returns the log marginal likelihood up to a constant, in nats."""
        signal, noise = self.signal()
        own = signal * (1 - setting.shared) / noise
        fitted, logdet = self._fitted(own)
        square = (self._square - own * fitted) / noise
        matrix, vector = self._posterior(setting, signal, noise)
        lower = np.linalg.cholesky(matrix)
        white = np.linalg.solve(lower, vector)
        alone = square + logdet + self._count * np.log(noise)
        return float(0.5 * (white @ white) - np.log(np.diag(lower)).sum() - 0.5 * alone.sum())

    def weights(self, setting: _Setting) -> tuple[Array, Array]:
        """Returns the expected weights of both codes at each point, in the units of values."""
        signal, noise = self.signal()
        matrix, vector = self._posterior(setting, signal, noise)
        mean = np.sqrt(setting.shared) * np.linalg.solve(matrix, vector)
        mean *= np.sqrt(signal).mean()  # what a study at random would show of it
        m = self._factor.shape[1]
        return self._factor @ mean[:m], np.sqrt(setting.curvature) * self._factor @ mean[m:]

    def _fitted(self, ratio: Array) -> tuple[Array, Array]:
        """Explained part of the values and log determinants, by variance of the effects."""
        scale = 1 + ratio[:, None] * self._lengths
        return (self._moment**2 / scale).sum(1), np.log(scale).sum(1)

    def _posterior(self, setting: _Setting, signal: Array, noise: Array) -> tuple[Array, Array]:
        """Returns precision and precision times mean of ``b / sqrt(shared)``."""
        scale = noise[:, None] + (signal * (1 - setting.shared))[:, None] * self._lengths
        halves = self._axes * np.sqrt(signal[:, None] * self._lengths / scale)[:, None, :]
        half = np.hstack(list(halves))
        parts = np.sqrt(signal)[:, None] * self._moment / scale
        moment = np.einsum("sde,se->d", self._axes, parts)
        return setting.shared * half @ half.T + np.eye(len(half)), np.sqrt(setting.shared) * moment


def _projected(study: StudyValues, factor: Array, curvature: float) -> Array:
    own = factor[study.points]
    return np.hstack([study.linear @ own, np.sqrt(curvature) * (study.curved @ own)])


def _factor(points: Points, weights: Sequence[float]) -> Array:
    """Returns F, shape (P, m), with ``F F^T`` close to the kernel: a pivoted Cholesky factor."""
    scaled = [weight / sum(weights) for weight in weights]
    count = len(points.depth)
    left = points.variances(scaled)
    factor = np.zeros((count, min(_RANK, count)))
    for column in range(factor.shape[1]):
        pivot = int(left.argmax())
        if left[pivot] < 1e-6:  # noqa: PLR2004  (of a variance of 1)
            return factor[:, :column]
        row = points.kernel(scaled, pivot) - factor[:, :column] @ factor[pivot, :column]
        factor[:, column] = row / np.sqrt(left[pivot])
        left = np.maximum(left - factor[:, column] ** 2, 0.0)
        left[pivot] = 0.0
    return factor
