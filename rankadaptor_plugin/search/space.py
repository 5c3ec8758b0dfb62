"""A rank space in an Optuna study: its parameters, its record, and what the study has observed.

A study keeps its rank space and the features of its slots beside the trials, as JSON values. With
these it says by itself what its trials are worth to later searches, also of other models.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from rankadaptor_plugin.core.errors import ArtifactError, RankSpaceError
from rankadaptor_plugin.core.ranks import WHOLE_LAYER, RankAllocation, RankSpace, Setting
from rankadaptor_plugin.core.trials import RECORD

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from rankadaptor_plugin.core.ranks import Allocations

SPACE = "rankadaptor_space"
"""User attribute of an Optuna study that holds its rank space."""

LAYERS = "rankadaptor_layers"
"""User attribute of an Optuna study that holds the features of its slots."""

OBJECTIVE = "objective"
"""Name of what a search maximized, beside the scores ``task/metric`` of its trials."""

_SHOWN = 4  # numbers of layers that a message lists
_LISTED = 20_000  # Spaces up to this size are listed in full.
_DRAWN = 1000  # If so many draws from a larger space were all tried, it counts as exhausted.


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
    """Returns the proposal of a sampler that knows nothing about adapters.

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
    """Measurements of a study, higher values being better.

    Attributes:
        trials: Trials with a value, in order.
        rows: Their allocations, shape (n, c).
        values: Their values, shape (n,).
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
        measured = [
            (t, row, sign * value)
            for t, row in placed
            if len(row) == space.columns and (value := value_of(t)) is not None
        ]
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


@dataclass(frozen=True, eq=False)
class LayerFeatures:
    """Features of the slots of a rank space, known before anything is fine-tuned.

    Attributes:
        names: What the columns are, see `rankadaptor_plugin.pipeline.search_step`.
        values: Shape (slots, features), float64; NaN where a feature is unknown.
    """

    names: tuple[str, ...]
    values: NDArray[np.float64]

    def column(self, name: str) -> NDArray[np.float64] | None:
        """Returns a feature, shape (slots,), or None if it is not there."""
        return self.values[:, self.names.index(name)] if name in self.names else None

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values; what is unknown is null."""
        rows = self.values.tolist()
        return {
            "names": list(self.names),
            "values": [[v if math.isfinite(v) else None for v in row] for row in rows],
        }

    @classmethod
    def from_json(cls, data: Any) -> LayerFeatures:
        """Builds features from what `to_json` returned.

        Raises:
            ArtifactError: If it is something else.
        """
        try:
            names = tuple(_text(name) for name in data["names"])
            rows = [[math.nan if v is None else float(v) for v in row] for row in data["values"]]
            values = np.array(rows, dtype=np.float64).reshape(len(rows), len(names))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                "Stored features of layers cannot be read: they are not a table of numbers with a "
                "name per column. Make the study or file again."
            ) from error
        return cls(names, values)


def space_to_json(space: RankSpace) -> dict[str, Any]:
    """Returns a rank space as plain JSON values."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(space).items()
    } | {"settings": [{**asdict(s), "values": list(s.values)} for s in space.settings]}


def space_from_json(data: Any) -> RankSpace:
    """Builds a space from what `space_to_json` returned.

    Raises:
        ArtifactError: If it is something else.
    """
    try:
        return RankSpace(
            candidates=tuple(_whole(rank) for rank in data["candidates"]),
            searchable=tuple(_flag(searched) for searched in data["searchable"]),
            default_rank=_whole(data["default_rank"]),
            costs=tuple(_whole(cost) for cost in data["costs"]),
            groups=tuple(_text(name) for name in data["groups"]),
            settings=tuple(_setting(setting) for setting in data["settings"]),
            **{
                key: None if data[key] is None else _whole(data[key])
                for key in ("budget", "max_parameters", "max_rank_sum")
            },
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RankSpaceError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise ArtifactError(
            f"A stored rank space cannot be read: {reason}. Make the study or file again."
        ) from error


def space_difference(stored: RankSpace, now: RankSpace) -> str | None:
    """Returns the difference that makes the trials of one space useless in another.

    Budget and limits may differ: they only say which allocations are looked at.

    Returns:
        A clause such as "it has 8 layers, now there are 12", or None if nothing differs.
    """
    if stored.layers != now.layers:
        return f"it has {stored.layers} layers, now there are {now.layers}"
    if stored.groups != now.groups:
        return f"it has {_parts(stored.groups)}, now {_parts(now.groups)}"
    if stored.candidates != now.candidates:
        return f"its rank candidates are {list(stored.candidates)}, now {list(now.candidates)}"
    if stored.searchable != now.searchable:
        return f"it searches {_searched(stored)}, now {_searched(now)}"
    if stored.default_rank != now.default_rank:
        return f"its default rank is {stored.default_rank}, now {now.default_rank}"
    for slot, (then, cost) in enumerate(zip(stored.costs, now.costs, strict=True)):
        if then != cost:
            return (
                f"a unit of rank costs {then} parameters in {_slot(stored, slot)}, now {cost}: it "
                "was made with another pruned model"
            )
    if stored.settings != now.settings:
        return f"it searches {_settings(stored.settings)}, now {_settings(now.settings)}"
    return None


def _parts(groups: Sequence[str]) -> str:
    if tuple(groups) == WHOLE_LAYER:
        return "one rank per layer"
    return f"one rank per layer for each of {', '.join(groups)}"


def _slot(space: RankSpace, slot: int) -> str:
    layer, group = divmod(slot, len(space.groups))
    return f"layer {layer} {space.groups[group]}".rstrip()


def _searched(space: RankSpace) -> str:
    slots = [_slot(space, slot) for slot, searched in enumerate(space.searchable) if searched]
    if len(slots) == space.slots:
        return "all layers"
    shown = ", ".join(slots[:_SHOWN])
    return shown if len(slots) <= _SHOWN else f"{shown} and {len(slots) - _SHOWN} more"


def _settings(settings: Sequence[Setting]) -> str:
    return (
        "; ".join(f"{s.name} among {list(s.values)} (default {s.default:g})" for s in settings)
        or "no settings"
    )


def _setting(data: Mapping[str, Any]) -> Setting:
    values = tuple(float(value) for value in data["values"])
    default = float(data["default"])
    if not values or not all(0 < value < math.inf for value in (*values, default)):
        raise ValueError(f"the setting {data['name']} has the values {[*values]}, {default:g}")
    return Setting(name=_text(data["name"]), values=values, default=default)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a name")
    return value
