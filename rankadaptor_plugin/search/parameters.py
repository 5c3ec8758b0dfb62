"""A rank space as the parameters of an Optuna study, and what such a study has observed."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.trials import RECORD

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from rankadaptor_plugin.core.ranks import Allocations, RankSpace

PROPOSED = "rankadaptor_proposed"
"""System attribute of a trial: the row that a sampler proposed, which may have been moved."""

REPLACED = "rankadaptor_replaced"
"""System attribute of a trial: whether another row took the place of a repeated proposal."""

UNASKED = "rankadaptor_unasked"
"""System attribute of a trial that no sampler proposed, as those of the noise floor."""

_LISTED = 20_000  # Spaces up to this size are listed in full.
_DRAWN = 1000  # If so many draws from a larger space were all tried, it counts as exhausted.
_LEAST_PAIRS = 3  # complete trials with a value at the rung, to tell what the rung is worth


def slot_names(space: RankSpace) -> list[str]:
    """Returns ``layer_04``, or ``layer_04.attention`` and so on, one name per slot."""
    return [
        f"layer_{layer:02d}{group and f'.{group}'}"
        for layer in range(space.layers)
        for group in space.groups
    ]


def distributions(space: RankSpace) -> dict[str, BaseDistribution]:
    """Returns the parameters of a study: one per searchable slot, and one per setting."""
    candidates = space.candidates
    steps = {high - low for low, high in itertools.pairwise(candidates)}
    one: BaseDistribution
    if len(steps) <= 1:
        one = IntDistribution(candidates[0], candidates[-1], step=max(steps, default=1))
    else:
        one = CategoricalDistribution(candidates)
    names = zip(slot_names(space), space.searchable, strict=True)
    return {
        **{name: one for name, searched in names if searched},
        **{setting.name: CategoricalDistribution(setting.values) for setting in space.settings},
    }


def allocation_from(space: RankSpace, params: Mapping[str, Any]) -> RankAllocation:
    """Returns the allocation of a study's parameters; those of `distributions` must be there."""
    names = zip(slot_names(space), space.searchable, strict=True)
    return RankAllocation(
        tuple(int(params[name]) if s else space.default_rank for name, s in names),
        tuple((setting.name, float(params[setting.name])) for setting in space.settings),
    )


def proposed(space: RankSpace, params: Mapping[str, Any]) -> RankAllocation:
    """Returns what a sampler proposes that knows nothing of adapters.

    Rank 0 everywhere becomes the smallest allocation.
    """
    searched = [params[name] for name in distributions(space) if name in slot_names(space)]
    if any(searched) or not all(space.searchable):
        return allocation_from(space, params)
    lowest = parameters_of(space, space.lowest())
    return allocation_from(space, {**params, **{n: lowest[n] for n in slot_names(space)}})


def parameters_of(space: RankSpace, allocation: RankAllocation) -> dict[str, Any]:
    """Returns an allocation under the names of `distributions`."""
    named = zip(slot_names(space), allocation.ranks, space.searchable, strict=True)
    chosen = space.allocation(space.row(allocation)).settings
    return {name: rank for name, rank, searched in named if searched} | dict(chosen)


def untried(
    space: RankSpace, tried: Collection[tuple[int, ...]], count: int, rng: np.random.Generator
) -> Allocations:
    """Draws random allocations that were not tried; small spaces are listed and shuffled.

    Returns:
        Rows, shape (n, c), n <= count. None at all if the space is exhausted.
    """
    if space.size <= _LISTED:
        rows = rng.permutation(space.every())
    else:
        rows = space.sample(max(count, _DRAWN), rng)
    return rows[[tuple(row) not in tried for row in rows.tolist()]][:count]


def require_untried(rows: Allocations, tried: Collection[tuple[int, ...]]) -> None:
    """Ends a search that has nothing left.

    Raises:
        RankSpaceError: If there are no rows.
    """
    if not len(rows):
        raise RankSpaceError(
            f"All allocations of the rank space were tried, {len(tried)} in number. "
            "Stop here or add candidates."
        )


def allocation_in(space: RankSpace, trial: FrozenTrial) -> RankAllocation | None:
    """Returns the allocation of a trial; None if it was only started, or has no ranks."""
    # The record has the ranks that were really used; parameters are what a sampler asked for.
    if RECORD in trial.user_attrs:
        return RankAllocation.from_json(trial.user_attrs[RECORD])
    if not distributions(space).keys() <= trial.params.keys():
        return None
    searched = zip(slot_names(space), space.searchable, strict=True)
    if all(space.searchable) and not any(trial.params[name] for name, _ in searched):
        return None  # no adapter at all is no allocation
    return allocation_from(space, trial.params)


@dataclass(frozen=True, kw_only=True)
class Observations:
    """What a study has measured, higher values being better.

    Attributes:
        trials: Trials with a value, in order; those that ended at a rung come last.
        rows: Their allocations, shape (n, c).
        values: Their values, shape (n,); for a trial that ended at a rung, what its value there
            lets expect at the end.
        tried: Rows of all other trials, running and failed ones included.
        failed: Rows of failed trials.
        position: Trials before the one that is asked for.
        sign: 1 if the study maximizes, -1 if it minimizes.
    """

    trials: tuple[FrozenTrial, ...]
    rows: Allocations
    values: NDArray[np.float64]
    tried: frozenset[tuple[int, ...]]
    failed: frozenset[tuple[int, ...]]
    position: int
    sign: int

    @classmethod
    def of(cls, study: Study, space: RankSpace, number: int | None = None) -> Observations:
        """Reads a study, leaving out the trial `number` that is being asked for."""
        sign = 1 if study.direction == StudyDirection.MAXIMIZE else -1
        others = [t for t in study.get_trials(deepcopy=False) if t.number != number]
        placed = [(t, space.row(a)) for t in others if (a := allocation_in(space, t))]
        # A study may hold allocations of another space, such as uniform LoRA beyond the candidates.
        known = [(t, row) for t, row in placed if len(row) == space.columns]
        measured = [(t, row, sign * v) for t, row in known if (v := value_of(t)) is not None]
        for trial, row in known:
            if trial.state is TrialState.PRUNED:
                guess = _expected(trial, [t for t, _ in known])
                if guess is not None:
                    measured.append((trial, row, sign * guess))
        return cls(
            trials=tuple(t for t, _, _ in measured),
            rows=np.array([row for _, row, _ in measured], dtype=np.int64).reshape(
                -1, space.columns
            ),
            values=np.array([value for _, _, value in measured], dtype=np.float64),
            tried=frozenset(tuple(row) for _, row in placed),
            failed=frozenset(tuple(row) for t, row in placed if t.state is TrialState.FAIL),
            position=sum(number is None or t.number < number for t in others),
            sign=sign,
        )


def value_of(trial: FrozenTrial) -> float | None:
    """Returns the finite value of a complete trial, else None."""
    if trial.state is not TrialState.COMPLETE or trial.value is None:
        return None
    return trial.value if math.isfinite(trial.value) else None


def _expected(trial: FrozenTrial, others: list[FrozenTrial]) -> float | None:
    """Returns the value at the end that a trial's last rung lets expect, by linear regression."""
    if not trial.intermediate_values:
        return None
    step = max(trial.intermediate_values)
    here = trial.intermediate_values[step]
    pairs = [
        (look, value)
        for o in others
        if (value := value_of(o)) is not None
        and math.isfinite(look := o.intermediate_values.get(step, math.nan))
    ]
    if len(pairs) < _LEAST_PAIRS or not math.isfinite(here):
        return None
    rung, end = np.array(pairs).T
    spread = float(((rung - rung.mean()) ** 2).sum())
    slope = float(((rung - rung.mean()) * (end - end.mean())).sum()) / spread if spread else 0.0
    return float(end.mean() + max(0.0, slope) * (here - rung.mean()))
