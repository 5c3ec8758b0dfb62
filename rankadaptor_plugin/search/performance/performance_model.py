"""Interface of the performance models Q (paper, section 3.2), and their predictions.

The models themselves: the paper's network (`rankadaptor_plugin.search.performance.mlp`) and
Bayesian linear regression (`rankadaptor_plugin.search.performance.linear`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from rankadaptor_plugin.core.ranks import Allocations, RankSpace

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Prediction:
    """Expectation of a performance model for n allocations.

    Attributes:
        mean: Expected value, shape (n,), float64, in the units of the values of the last `fit`.
        stddev: Standard deviation of that expectation, shape (n,): what more data would take away.
        noise: Standard deviation of one measurement about its expectation, 0 or more.
    """

    mean: Values
    stddev: Values
    noise: float = 0.0


@dataclass(frozen=True)
class PriorEffects:
    """Effects of the ranks that are expected before the first fine-tune, column by column.

    Attributes:
        name: Where it comes from, for the report.
        effects: For each column of a row of the space, the effect of each of its levels (in the
            order of `RankSpace.levels`), in standard deviations of the scores of random
            allocations, about 0.
    """

    name: str
    effects: tuple[Values, ...]

    def __call__(self, space: RankSpace, rows: Allocations) -> Values:
        """Returns the expected values of rows (n, c), shape (n,)."""
        total = np.zeros(len(rows))
        for column, (levels, effect) in enumerate(zip(space.levels(), self.effects, strict=True)):
            # Uniform LoRA's rank need not be a level.
            total += np.interp(rows[:, column], levels, effect)
        return total


@runtime_checkable
class PerformanceModel(Protocol):
    """Q of the paper. Higher values are better."""

    def fit(self, ranks: Allocations, values: Values) -> None:
        """Learns the target: online incremental learning.

        All data are given on every call, and the order of calls does not matter.

        Args:
            ranks: All rows measured so far, shape (n, c), int64, n >= 1.
            values: Their values on the target, shape (n,), float64.
        """
        ...

    def predict(self, ranks: Allocations) -> Prediction:
        """Predicts the target's values of rows of shape (n, c), int64."""
        ...


@runtime_checkable
class MetaLearner(Protocol):
    """A performance model that learns from several tasks before the target is looked at."""

    def pretrain(self, ranks: Allocations, task_values: Values) -> None:
        """Learns what tasks have in common: offline meta-learning.

        Args:
            ranks: Rows, shape (n, c), int64.
            task_values: Their values per task, shape (n, T), float64, each task in its own units.
        """
        ...


@runtime_checkable
class ProposingModel(PerformanceModel, Protocol):
    """A performance model that knows how to search by itself."""

    def propose(
        self,
        rng: np.random.Generator,
        *,
        tried: Collection[tuple[int, ...]] = (),
        most_parameters: int | None = None,
    ) -> Sequence[int]:
        """Returns the row to measure next, weighing what is likely good against what is unknown.

        Args:
            rng: All randomness.
            tried: Rows not to propose.
            most_parameters: Trainable parameters that the proposal must not exceed, at least
                those of `RankSpace.lowest`; None for the limits of the space alone.
        """
        ...

    def best(
        self, rng: np.random.Generator, *, most_parameters: int | None = None
    ) -> Sequence[int]:
        """Returns the row with the highest expected value that a thorough search finds."""
        ...


def spread(values: Values) -> float:
    """Returns the standard deviation, or 1 where it is unknown, or 0 up to rounding."""
    if len(values) < 2:  # noqa: PLR2004
        return 1.0
    stddev = float(np.std(values))
    return stddev if stddev > 1e-12 * float(np.abs(values).max()) else 1.0
