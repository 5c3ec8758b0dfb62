"""Expectations of the ranks before the search, from studies of other tasks and models.

Another space may have other depth and other candidates.

Rows and features become codes and points; `shared_effects` does the statistics. A rank r is coded
by log(1 + r), on one scale for all spaces, and by the curvature of that. In a space of l slots an
effect counts 1 / sqrt(l), so that the sum over slots weighs the same in models of any depth.

The statistics are additive Gaussian-process regression over studies, which finds the effects of
ranks that they share. In each study the score is a sum over the columns of a row: a code of the
rank, and a second one for its curvature, times weights of the column. The weights are a smooth
function of where the column is, its *point*: one function that all studies share, plus one of each
study's own. How much is shared, and which features of a point matter, is decided by the marginal
likelihood; where studies disagree, little is shared, and the shared function comes out small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from rankadaptor_plugin.core.trials import TrialState
from rankadaptor_plugin.search.performance.linear import BayesianRegression
from rankadaptor_plugin.search.performance.performance_model import PriorEffects
from rankadaptor_plugin.search.space import OBJECTIVE, LayerFeatures
from rankadaptor_plugin.search.transfer.studies import MetaKnowledge

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rankadaptor_plugin.config.tables import SearchConfig
    from rankadaptor_plugin.core.ranks import Allocations, RankSpace
    from rankadaptor_plugin.core.trials import Trial
    from rankadaptor_plugin.search.transfer.studies import SourceStudy

Array = NDArray[np.float64]

_DEPTH = "relative_depth"
_RANK = ""  # the quantity that slots vary; searched settings go by their names
_GROUPS = 0.5  # how alike the module groups of one place are
_SETTING = 0.5  # what a searched setting counts, where a slot counts 1 / sqrt(l)
_LEAST_TRIALS = 3  # trials below which a rank correlation says nothing
_CLIPPED = 3.0  # standard deviations: a single fine-tune that went astray shall not decide

Code = Callable[[Array], tuple[Array, Array]]


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """Beliefs before the search, and what they turned out to be worth.

    Attributes:
        space: The rank space.
        priors: The beliefs.
    """

    space: RankSpace
    priors: tuple[PriorEffects, ...]

    def worth(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """Returns the contribution of each prior to the prediction of the trials.

        Returns:
            One entry per prior: ``name``; ``weight``, the share of it that the measurements bear
            out; ``correlation`` (Spearman) of what it alone expects with what was measured, None
            if that cannot be told; ``gain``, in nats per trial, of the log evidence of the linear
            model with this prior over that without.
        """
        measured = [t for t in trials if t.state is TrialState.COMPLETE]
        if not self.priors or len(measured) < _LEAST_TRIALS:
            return []
        rows = np.array([self.space.row(t.allocation) for t in measured], dtype=np.int64)
        values = np.array([t.objective for t in measured], dtype=np.float64)
        entries = []
        for prior in self.priors:
            model = BayesianRegression(self.space, (prior,))
            model.fit(rows, values)
            expected = prior(self.space, rows)
            varies = np.ptp(expected) > 0 and np.ptp(values) > 0
            entries.append(
                {
                    "name": prior.name,
                    "weight": model.prior_weights[prior.name],
                    "correlation": (
                        float(spearmanr(expected, values).statistic) if varies else None
                    ),
                    "gain": (model.evidence - model.evidence_without_priors) / len(measured),
                }
            )
        return entries


def read_knowledge(
    space: RankSpace, features: LayerFeatures, config: SearchConfig, metric: str
) -> Knowledge:
    """Reads the file of meta-knowledge that the run file names, if any.

    Args:
        space: The rank space.
        features: Features of its slots.
        config: The ``[search]`` table.
        metric: What the search maximizes; earlier studies are asked for the same.

    Raises:
        ArtifactError: If the file cannot be used.
    """
    if not config.meta:
        return Knowledge(space=space, priors=())
    studies = MetaKnowledge.load(Path(config.meta))
    return Knowledge(space=space, priors=(prior_effects(studies, space, features, metric=metric),))


def prior_effects(
    knowledge: MetaKnowledge,
    space: RankSpace,
    features: LayerFeatures,
    *,
    metric: str | None = None,
    name: str = "earlier studies",
) -> PriorEffects:
    """Returns the effects of the ranks of a space that earlier studies suggest.

    Args:
        knowledge: The earlier studies.
        space: The space of the coming search.
        features: Features of its slots.
        metric: The metric of the tasks to learn from; None takes all. Of a study without it, the
            objective is taken.
        name: Name of what is returned.

    Returns:
        Effects in standard deviations of the scores of a study, about 0 in every column; small
        where studies disagree or have nothing to say of this space.
    """
    spaces = [(source.space, source.features) for source in knowledge.sources]
    data = [(source.rows, task_mean(source, metric)) for source in knowledge.sources]
    return _effects(name, spaces, data, space, features)


def task_mean(source: SourceStudy, metric: str | None = None) -> Array:
    """Returns one score per trial: the mean of the standardized scores of the tasks, (n,)."""
    wanted = [
        column
        for column, name in enumerate(source.columns)
        if name != OBJECTIVE and metric in (None, name.rpartition("/")[2])
    ]
    if not wanted:
        wanted = [source.columns.index(OBJECTIVE)] if OBJECTIVE in source.columns else [0]
    scores = [_robust_standardized(source.values[:, column]) for column in wanted]
    return _robust_standardized(np.mean(scores, axis=0))


def _effects(
    name: str,
    spaces: Sequence[tuple[RankSpace, LayerFeatures]],
    data: Sequence[tuple[Allocations, Array]],
    space: RankSpace,
    features: LayerFeatures,
) -> PriorEffects:
    together = [*spaces, (space, features)]
    codes = _codes([own for own, _ in together])
    points, places = _points(together)
    studies = [
        _observations(own, codes, place, rows, values)
        for (own, _), place, (rows, values) in zip(spaces, places[:-1], data, strict=True)
    ]
    linear, curved = shared_effects(points, studies)
    effects = []
    quantities = _quantities(space)
    for column, point in enumerate(places[-1]):
        quantity, levels, amplitude = quantities[column]
        first, second = codes[quantity](levels)
        effect = amplitude * (linear[point] * first + curved[point] * second)
        effects.append(effect - effect.mean())
    return PriorEffects(name, tuple(effects))


class _Quantity(NamedTuple):
    """Quantity that a column varies: its name, the values of its levels, and its weight."""

    name: str
    levels: Array
    amplitude: float


def _quantities(space: RankSpace) -> list[_Quantity]:
    levels = [np.array(level, dtype=np.float64) for level in space.levels()]
    amplitude = 1 / math.sqrt(sum(space.searchable))
    slots = [_Quantity(_RANK, np.log1p(level), amplitude) for level in levels[: space.slots]]
    return slots + [_Quantity(s.name, np.log(np.array(s.values)), _SETTING) for s in space.settings]


def _codes(spaces: Sequence[RankSpace]) -> Mapping[str, Code]:
    """Returns for each quantity the two codes of its values, about 0 with variance 1 over all."""
    pool: dict[str, list[Array]] = {}
    for space in spaces:
        pool.setdefault(_RANK, []).append(np.log1p(np.array(space.candidates, dtype=np.float64)))
        for setting in space.settings:
            pool.setdefault(setting.name, []).append(np.log(np.array(setting.values)))
    return {name: _code(np.concatenate(values)) for name, values in pool.items()}


def _code(pool: Array) -> Code:
    mean, spread = pool.mean(), pool.std() or 1.0

    def bend(values: Array) -> Array:
        return values**2 - 1 - skew * values

    first = (pool - mean) / spread
    skew = float((first**3).mean())
    # Two levels alone have no curvature, only a rounding error that must not be blown up.
    size = float(bend(first).std())
    scale = 1 / size if size > 1e-6 else 0.0  # noqa: PLR2004

    def code(values: Array) -> tuple[Array, Array]:
        linear = (values - mean) / spread
        return linear, bend(linear) * scale

    return code


def _points(
    together: Sequence[tuple[RankSpace, LayerFeatures]],
) -> tuple[Points, list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]]:
    """Returns the distinct points of all columns, and the point of each column of each space."""
    every = (name for _, features in together for name in features.names if name != _DEPTH)
    names = list(dict.fromkeys(every))
    numbers: dict[tuple[object, ...], int] = {}
    places = []
    for space, features in together:
        table = _table(space, features, names)
        group = [space.groups[slot % len(space.groups)] for slot in range(space.slots)]
        keys = [
            (_RANK, group[slot], *np.where(np.isnan(row), math.inf, row).tolist())
            for slot, row in enumerate(table)
        ]
        unknown = [math.inf] * (1 + len(names))
        keys += [(setting.name, "", *unknown) for setting in space.settings]
        places.append(np.array([numbers.setdefault(key, len(numbers)) for key in keys]))
    kinds = [key[:2] for key in numbers]
    values = np.array([key[2:] for key in numbers], dtype=np.float64)
    values[np.isinf(values)] = np.nan
    alike = {(a, b): _similarity(a, b) for a in set(kinds) for b in set(kinds)}
    similarity = np.array([[alike[a, b] for a in kinds] for b in kinds])
    return Points(similarity=similarity, depth=values[:, 0], features=values[:, 1:]), places


def _similarity(one: tuple[object, ...], other: tuple[object, ...]) -> float:
    if one[0] != other[0]:
        return 0.0
    return 1.0 if one == other else _GROUPS


def _table(space: RankSpace, features: LayerFeatures, names: Sequence[str]) -> Array:
    """Returns depth and features of the slots, (slots, 1 + F); the latter standardized.

    Features are compared within a model: how much larger a norm is than in its other layers.
    """
    known = features.column(_DEPTH)
    place = np.arange(space.slots) // len(space.groups) / max(space.layers - 1, 1)
    columns = [place if known is None else np.where(np.isnan(known), place, known)]
    searched = np.array(space.searchable)
    for name in names:
        column = features.column(name)
        if column is None or np.isnan(column[searched]).all():
            columns.append(np.full(space.slots, np.nan))
            continue
        mean, spread = np.nanmean(column[searched]), np.nanstd(column[searched])
        alike = spread <= 1e-9 * abs(mean)  # a rounding error must not be blown up
        scaled = np.zeros(space.slots) if alike else (column - mean) / spread
        columns.append(np.where(np.isnan(column), np.nan, np.clip(scaled, -_CLIPPED, _CLIPPED)))
    return np.column_stack(columns)


def _observations(
    space: RankSpace,
    codes: Mapping[str, Code],
    place: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    rows: Allocations,
    values: Array,
) -> StudyValues:
    linear, curved = [], []
    for column, (quantity, levels, amplitude) in enumerate(_quantities(space)):
        own = rows[:, column]
        # Trials outside of the candidates, such as uniform LoRA, count as well.
        value = np.log1p(own) if quantity == _RANK else levels[own]
        first, second = codes[quantity](value)
        linear.append(amplitude * (first - first.mean()))
        curved.append(amplitude * (second - second.mean()))
    return StudyValues(
        linear=np.column_stack(linear),
        curved=np.column_stack(curved),
        points=place,
        values=values,
    )


def _robust_standardized(values: Array) -> Array:
    """Returns values about 0 with standard deviation 1; all zero if they are all the same."""
    away = values - np.median(values)
    usual = 1.4826 * np.median(np.abs(away))  # the standard deviation, if the values are normal
    values = np.clip(away, -_CLIPPED * usual, _CLIPPED * usual) if usual else away
    return np.asarray((values - values.mean()) / (values.std() or 1.0))


_LENGTHS = (0.4, 0.1, 0.01)
"""Length scales in relative depth; the shortest tells apart the layers of one model."""

_WEIGHTS = (0.0, 0.5, 2.0)  # of a part of the kernel, before they are scaled to sum to 1
_SHARED = (0.05, 0.2, 0.5, 0.8, 0.95)
_CURVATURE = (0.1, 0.4)
_SIGNAL = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # variance of the effects over that of the noise
_GAIN = 0.5  # nats of evidence that a change of the kernel must bring
_ROUNDS = 3
_KERNEL_RANK = 64  # of the factor of the kernel
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
    factor = np.zeros((count, min(_KERNEL_RANK, count)))
    for column in range(factor.shape[1]):
        pivot = int(left.argmax())
        if left[pivot] < 1e-6:  # noqa: PLR2004  (of a variance of 1)
            return factor[:, :column]
        row = points.kernel(scaled, pivot) - factor[:, :column] @ factor[pivot, :column]
        factor[:, column] = row / np.sqrt(left[pivot])
        left = np.maximum(left - factor[:, column] ** 2, 0.0)
        left[pivot] = 0.0
    return factor
