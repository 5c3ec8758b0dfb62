"""Expectations of the ranks before the search, from studies of other tasks and models.

Another space may have other depth and other candidates.

`rankadaptor_plugin.search.transfer.shared_effects` does the statistics; here rows and features
become its codes and points. A rank r is coded by log(1 + r), on one scale for all spaces, and by
the curvature of that. In a space of l slots an effect counts 1 / sqrt(l), so that the sum over
slots weighs the same in models of any depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from rankadaptor_plugin.core.trials import TrialState
from rankadaptor_plugin.search.performance.linear import BayesianRegression
from rankadaptor_plugin.search.performance.performance_model import PriorEffects
from rankadaptor_plugin.search.space import OBJECTIVE, LayerFeatures
from rankadaptor_plugin.search.transfer.shared_effects import (
    Array,
    Points,
    StudyValues,
    shared_effects,
)
from rankadaptor_plugin.search.transfer.studies import MetaKnowledge

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rankadaptor_plugin.config.tables import SearchConfig
    from rankadaptor_plugin.core.ranks import Allocations, RankSpace
    from rankadaptor_plugin.core.trials import Trial
    from rankadaptor_plugin.search.transfer.studies import SourceStudy

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
