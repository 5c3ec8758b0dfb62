"""What samplers may say beyond their proposals, and what our own have in common."""

from __future__ import annotations

import logging
import zlib
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import optuna

from rankadaptor_plugin.core.trials import RECORD
from rankadaptor_plugin.search.parameters import (
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

    from rankadaptor_plugin.core.ranks import RankSpace


logger = logging.getLogger(__name__)


@runtime_checkable
class PredictingSampler(Protocol):
    """A sampler that can say which value it expects of what it proposed."""

    def predicted(self, number: int) -> float | None:
        """Returns the value expected of trial `number`, None if nothing was predicted."""
        ...


@runtime_checkable
class RecommendingSampler(Protocol):
    """A sampler with an opinion on what is best, which need not be what scored best."""

    def recommend(self, study: optuna.Study, count: int) -> list[Sequence[int]]:
        """Returns up to `count` rows of the rank space, best first."""
        ...


@runtime_checkable
class ForecastingSampler(Protocol):
    """A sampler that keeps score of how well its models forecast."""

    def scores(self, study: optuna.Study) -> dict[str, float]:
        """Returns by model the mean log density of its forecasts, in nats per trial."""
        ...


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
        self._warned = False

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
        self._check_names(study)
        rng = np.random.default_rng([self.seed, observed.position])
        row = self.propose(study, trial, observed, rng)
        return parameters_of(self.space, self.space.allocation(row))

    def _check_names(self, study: optuna.Study) -> None:
        """Warns, once, of a study whose trials have other parameters than those proposed."""
        complete = optuna.trial.TrialState.COMPLETE
        done = study.get_trials(deepcopy=False, states=(complete,))
        names = distributions(self.space).keys()
        if (
            self._warned
            or not done
            or names <= done[-1].params.keys()
            or RECORD in done[-1].user_attrs
        ):
            return
        self._warned = True
        logger.warning(
            "Trial %d has the parameters %s, but the sampler proposes %s: what it has under other "
            "names is drawn at random, without limits, and teaches nothing.",
            done[-1].number,
            ", ".join(sorted(done[-1].params)) or "none",
            ", ".join(names),
        )

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


def quiet_study(
    name: str,
    direction: optuna.study.StudyDirection,
    *,
    sampler: optuna.samplers.BaseSampler | None = None,
    storage: optuna.storages.BaseStorage | None = None,
) -> optuna.Study:
    """Returns a study without a word on stderr: that of the storage, or a new one in memory."""
    # Optuna announces every study on stderr; there is no switch but the global one.
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(
            study_name=name,
            direction=direction,
            sampler=sampler,
            storage=storage,
            load_if_exists=True,
        )
    finally:
        optuna.logging.set_verbosity(verbosity)
