"""The table of real fine-tunes, by kind of allocation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rankadaptor_plugin.core.ranks import RankSpace
from rankadaptor_plugin.core.scores import METRICS

if TYPE_CHECKING:
    from pathlib import Path

    from rankadaptor_plugin.core.ranks import Allocations

Array = NDArray[np.float64]

KINDS = ("free", "equal")
TRUTHS = ("report_accuracy", "report_choice_logprob")
_MISSING = 0.5  # a seed that fewer of the allocations have is left out


@dataclass(frozen=True)
class Kind:
    """The allocations of one kind, all fine-tuned with the same seeds.

    Attributes:
        name: ``free`` or ``equal`` total.
        space: The rank space that they were drawn from, without budget.
        rows: Ranks, shape (n, l); the first is uniform LoRA.
        parameters: Trainable parameters, shape (n,).
        values: Mean over the tasks per column such as ``search_choice_logprob``, shape (n, k) each.
    """

    name: str
    space: RankSpace
    rows: Allocations
    parameters: Array
    values: dict[str, Array]

    @property
    def seeds(self) -> int:
        """Number of seeds, k."""
        return int(self.values[TRUTHS[0]].shape[1])

    def truth(self, column: str, seed: int) -> Array:
        """Returns the mean over all seeds but one, shape (n,)."""
        return np.asarray(np.delete(self.values[column], seed, axis=1).mean(axis=1))


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a table, finished (Parquet) or growing (JSON lines)."""
    if path.suffix == ".parquet":
        lines: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return lines
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def kinds(lines: list[dict[str, Any]]) -> list[Kind]:
    """Sorts a table by kind, allocation and seed; what lacks seeds is left out.

    Raises:
        ValueError: If fewer than two seeds, or no allocations, are left.
    """
    numbers = {line["number"] for line in lines}
    by_key = {(line["number"], line["seed"]): line for line in lines}
    seeds = [
        seed
        for seed in sorted({line["seed"] for line in lines})
        if sum((n, seed) in by_key for n in numbers) > _MISSING * len(numbers)
    ]
    whole = sorted(n for n in numbers if all((n, seed) in by_key for seed in seeds))
    if len(seeds) < 2 or not whole:  # noqa: PLR2004  (a truth takes a seed besides the one seen)
        raise ValueError(f"The table has {len(whole)} allocations with {len(seeds)} seeds.")
    every = [by_key[n, seeds[0]] for n in sorted(numbers) if (n, seeds[0]) in by_key]
    space = _space(every)
    columns = [f"{p}_{m}" for p in ("search", "report") for m in METRICS]
    found = []
    for name in KINDS:
        of_kind = [n for n in whole if by_key[n, seeds[0]]["kind"] == name]
        found.append(
            Kind(
                name=name,
                space=space,
                rows=np.array([_ranks(by_key[n, seeds[0]]) for n in of_kind]),
                parameters=np.array([by_key[n, seeds[0]]["parameters"] for n in of_kind], float),
                values={
                    c: np.array([[by_key[n, s][c] for s in seeds] for n in of_kind])
                    for c in columns
                },
            )
        )
    return found


def _ranks(line: dict[str, Any]) -> list[int]:
    return [int(rank) for rank in line["ranks"].split("-")]


def _space(lines: list[dict[str, Any]]) -> RankSpace:
    """Returns the space that the allocations of a table lie in; the first is uniform LoRA."""
    rows = np.array([_ranks(line) for line in lines])
    parameters = np.array([line["parameters"] for line in lines])
    costs = np.linalg.lstsq(rows.astype(float), parameters, rcond=None)[0].round().astype(int)
    if (rows @ costs != parameters).any():
        raise ValueError("The parameters of the table are no multiples of its ranks.")
    return RankSpace(
        candidates=tuple(np.unique(rows).tolist()),
        searchable=tuple((rows != rows[0]).any(axis=0).tolist()),
        default_rank=int(rows[0, 0]),
        costs=tuple(costs.tolist()),
    )
