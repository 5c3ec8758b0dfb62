"""What a study keeps beside its trials, as JSON values: the rank space, and features of its slots.

With these a study says by itself what its trials are worth to later searches, also of other models.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rankadaptor_plugin.core.errors import ArtifactError, RankSpaceError
from rankadaptor_plugin.core.ranks import WHOLE_LAYER, RankSpace, Setting

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

SPACE = "rankadaptor_space"
"""User attribute of an Optuna study that holds its rank space."""

LAYERS = "rankadaptor_layers"
"""User attribute of an Optuna study that holds the features of its slots."""

OBJECTIVE = "objective"
"""Name of what a search maximized, beside the scores ``task/metric`` of its trials."""

_SHOWN = 4  # numbers of layers that a message lists


@dataclass(frozen=True, eq=False)
class LayerFeatures:
    """What is known of the slots of a rank space before anything is fine-tuned.

    Attributes:
        names: What the columns are, see `rankadaptor_plugin.pipeline.layer_features`.
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
        """Takes back what `to_json` returned.

        Raises:
            ArtifactError: If it is something else.
        """
        try:
            names = tuple(_text(name) for name in data["names"])
            rows = [[math.nan if v is None else float(v) for v in row] for row in data["values"]]
            values = np.array(rows, dtype=np.float64).reshape(len(rows), len(names))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                "Stored features of layers cannot be read: they are no table of numbers with a "
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
    """Takes back what `space_to_json` returned.

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
    """Says what makes the trials of one space useless in another.

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
        raise ValueError(f"{value!r} is no whole number")
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no name")
    return value
