"""What our samplers have in common: all ranks of a trial are proposed together."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna

from rankadaptor_plugin.parameters import (
    Observations,
    distributions,
    parameters_of,
    require_untried,
    untried,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from rankadaptor_plugin.ranks import RankSpace


class RankSampler(optuna.samplers.BaseSampler):
    """A sampler of allocations; subclasses say in `propose` which row comes next.

    Args:
        space: The rank space S.
        seed: Seed, at least 0.
    """

    def __init__(self, space: RankSpace, *, seed: int) -> None:
        self.space = space
        self.seed = seed
        self._predicted: dict[int, float] = {}

    def predicted(self, number: int) -> float | None:
        """Returns Q of the paper for trial `number` of the study; None for random proposals."""
        return self._predicted.get(number)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Returns the parameters that are proposed together."""
        return distributions(self.space)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Proposes an allocation.

        Raises:
            RankSpaceError: If every allocation of the space was tried.
        """
        observed = Observations.of(study, self.space, trial.number)
        rng = np.random.default_rng([self.seed, observed.position])
        row = self.propose(study, trial, observed, rng)
        return parameters_of(self.space, self.space.allocation(row))

    def propose(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        observed: Observations,
        rng: np.random.Generator,
    ) -> Sequence[int]:
        """Returns the row to measure next; the sampler's own part."""
        raise NotImplementedError

    def random_row(self, observed: Observations, rng: np.random.Generator) -> Sequence[int]:
        """Returns a random row that was not tried."""
        rows = untried(self.space, observed.tried, 1, rng)
        require_untried(rows, observed.tried)
        return rows[0].tolist()  # type: ignore[no-any-return]

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draws a parameter that is no rank at random, as Optuna's `RandomSampler` does."""
        seed = zlib.crc32(f"{self.seed} {trial.number} {param_name}".encode())
        return optuna.samplers.RandomSampler(seed).sample_independent(
            study, trial, param_name, param_distribution
        )


def best_measured(observed: Observations) -> list[Sequence[int]]:
    """Returns the rows of complete trials, best first, the earlier of equal ones first."""
    order = np.argsort(-observed.values, kind="stable")
    complete = optuna.trial.TrialState.COMPLETE
    return [observed.rows[i].tolist() for i in order if observed.trials[i].state is complete]


def distinct(rows: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Returns rows without repetitions, in order."""
    return list({tuple(row): row for row in reversed(rows)}.values())[::-1]


def in_memory_study(
    name: str, direction: optuna.study.StudyDirection, sampler: optuna.samplers.BaseSampler
) -> optuna.Study:
    """Returns an empty study that nobody is told of."""
    # Optuna announces every study on stderr; there is no switch but the global one.
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(study_name=name, direction=direction, sampler=sampler)
    finally:
        optuna.logging.set_verbosity(verbosity)
