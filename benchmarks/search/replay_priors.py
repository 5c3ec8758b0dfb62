"""Priors for replayed searches, from another table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rankadaptor_plugin.search.space import LayerFeatures
from rankadaptor_plugin.search.transfer.studies import OBJECTIVE, MetaKnowledge, SourceStudy
from rankadaptor_plugin.search.transfer.transfer import prior_effects

if TYPE_CHECKING:
    from replay_table import Kind

    from rankadaptor_plugin.core.ranks import RankSpace
    from rankadaptor_plugin.search.performance.performance_model import PriorEffects

EARLIER = 60
"""Trials of the earlier study that the meta prior is learned from."""


def priors(
    kind: Kind, others: list[Kind], metric: str, repetition: int
) -> tuple[PriorEffects, ...]:
    """Returns what a search learns from a random search on another table.

    One seed of that table and the relative depth of the layers are known.

    Args:
        kind: The allocations to search.
        others: The same kind of the other table.
        metric: The score seen.
        repetition: Makes the random choices.
    """
    sources = []
    for other in others:
        drawn = np.random.default_rng([repetition, 3]).permutation(len(other.rows))[:EARLIER]
        scores = other.values[f"search_{metric}"][drawn, repetition % other.seeds]
        sources.append(
            SourceStudy(
                name="meta",
                space=other.space,
                features=_depths(other.space),
                rows=other.rows[drawn],
                values=scores[:, None],
                columns=(OBJECTIVE,),
            )
        )
    return (prior_effects(MetaKnowledge(tuple(sources)), kind.space, _depths(kind.space)),)


def _depths(space: RankSpace) -> LayerFeatures:
    return LayerFeatures(("relative_depth",), np.linspace(0, 1, space.slots)[:, None])
