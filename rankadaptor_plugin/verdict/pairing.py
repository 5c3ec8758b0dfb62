"""What two models have in common: the seeds that they were fine-tuned with, and the documents.

Seeds that both have are paired, if there are two of them or neither model has others. Otherwise the
seeds of each model stand alone, and all of them are used. Documents are paired by their key within
a task, and where a key comes more than once in order of appearance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankadaptor_plugin.core.errors import OracleError

Documents = Mapping[str, tuple[Sequence[str], Sequence[float] | NDArray[np.float64]]]
"""By task: the keys of the J documents, and one value for each."""

Model = Mapping[int | None, Documents]
"""Documents by seed; the one key None for a model that no seed changes, such as the base."""

SeedList = list[int | None]
"""Seeds in ascending order, or None alone."""

_Name = tuple[str, int]  # a key, and how often it came before


@dataclass(frozen=True)
class Seeds:
    """The seeds behind a difference.

    Attributes:
        first: Number of seeds of the first model; 0 for a model that no seed changes.
        second: The same of the second model.
        paired: Whether they are the same seeds, and drawn jointly.
        left_out: Number of seeds that only one of both models has, while others are paired.
    """

    first: int
    second: int
    paired: bool
    left_out: int


def seeds_to_compare(first: Model, second: Model) -> tuple[Seeds, tuple[SeedList, SeedList]]:
    """Chooses the seeds to compare.

    Returns:
        What is said of them, and the seeds of each model; where they are paired, the same twice.

    Raises:
        OracleError: If a model has no seed, or None beside others.
    """
    for model in (first, second):
        if not model or (None in model and len(model) > 1):
            raise OracleError(
                f"A model has the seeds {list(model)}; give one or more numbers, or None alone."
            )
    common = _in_order(seed for seed in first if seed is not None and seed in second)
    if len(common) > 1 or (common and first.keys() == second.keys()):
        alone = len(first.keys() ^ second.keys())
        return Seeds(len(common), len(common), paired=True, left_out=alone), (common, common)
    used = (_in_order(first), _in_order(second))
    first_count, second_count = (0 if None in seeds else len(seeds) for seeds in used)
    return Seeds(first_count, second_count, paired=False, left_out=0), used


def _in_order(seeds: Iterable[int | None]) -> SeedList:
    return sorted(seeds, key=lambda seed: -1 if seed is None else seed)


def paired_values(
    task: str, models: tuple[Model, Model], used: tuple[SeedList, SeedList]
) -> tuple[list[NDArray[np.float64]], int]:
    """Brings the values of a task into one order of documents.

    Args:
        task: Name of the task.
        models: The two models.
        used: The seeds to compare of each.

    Returns:
        The values of each model, shape (S, J) with its own S, and the number of documents that
        only some of the compared scores have.

    Raises:
        OracleError: If the task is absent, fewer than 2 documents are common, or values are not
            finite.
    """
    places: list[tuple[list[str], dict[_Name, int]]] = []  # of each list of keys that differs
    scores = []
    for model, seeds in zip(models, used, strict=True):
        scores.append([_named(model[seed], task, places) for seed in seeds])
    names = [set(found) for _, found in places]
    common = sorted(set.intersection(*names))
    left_out = len(set.union(*names)) - len(common)
    if len(common) < 2:  # noqa: PLR2004  (one document shows nothing of how documents differ)
        raise OracleError(
            f"The models have {len(common)} documents of task {task} in common, and {left_out} "
            "that only one of them has; at least 2 are needed. Give both runs the same seed and "
            "numbers of documents: they then split a task alike."
        )
    order = {id(place): [place[name] for name in common] for _, place in places}
    values = [np.stack([column[order[id(place)]] for column, place in group]) for group in scores]
    if not all(np.isfinite(rows).all() for rows in values):
        raise OracleError(f"Task {task} has values that are not finite numbers. Evaluate it anew.")
    return values, left_out


def _named(
    documents: Documents, task: str, places: list[tuple[list[str], dict[_Name, int]]]
) -> tuple[NDArray[np.float64], dict[_Name, int]]:
    """Returns the values of a task and their positions by name.

    Args:
        documents: The documents of a score.
        task: Name of the task.
        places: Positions by name for each list of keys met so far; a new one is added.
    """
    if task not in documents:
        raise OracleError(
            f"Task {task} is absent from a model, which has {', '.join(documents) or 'none'}. "
            "Compare tasks that both have."
        )
    keys, values = list(documents[task][0]), np.asarray(documents[task][1], dtype=np.float64)
    if len(keys) != len(values):
        raise OracleError(
            f"Task {task} has {len(keys)} keys for {len(values)} values. Give one for each."
        )
    for known, place in places:
        if known == keys:
            return values, place
    before: Counter[str] = Counter()
    place = {}
    for position, key in enumerate(keys):
        place[key, before[key]] = position
        before[key] += 1
    places.append((keys, place))
    return values, place
