"""Samplers of rank allocations: what they are built from, what ours have in common, Optuna's own.

Our own step is in `rankadaptor_plugin.search.bayes`, the paper's in
`rankadaptor_plugin.search.paper`. A sampler is made anew for every trial, so that an interrupted
search goes on exactly as if it had not been. Optuna's samplers know nothing of budgets; what they
propose is moved within them by `RankSpace.within_budget`.
"""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning

from rankadaptor_plugin.core.trials import RECORD
from rankadaptor_plugin.search.space import (
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

    from rankadaptor_plugin.config.tables import PerformanceModelConfig
    from rankadaptor_plugin.core.ranks import RankSpace
    from rankadaptor_plugin.search.performance.performance_model import (
        PerformanceModel,
        PriorEffects,
    )

logger = logging.getLogger(__name__)

N_STARTUP_TRIALS = 10
"""Random allocations in the beginning where neither run file nor method says how many."""


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Settings that a sampler is built from, anew for every trial.

    Attributes:
        space: The rank space.
        seed: A seed of this trial alone.
        n_startup_trials: Random allocations before the method's own; 0 leaves it to the method.
        candidates: Allocations that the performance model scores per proposal.
        final_candidates: Allocations of which the last performance model names a finalist.
        performance_model: Makes a fresh, untrained performance model.
        metric: Metric of the tasks that meta-learning takes; None takes all of them.
        priors: What earlier studies expect of the ranks.
        pareto: Whether the Pareto front of score against parameters is searched, not its top alone.
    """

    space: RankSpace
    seed: int
    n_startup_trials: int
    candidates: int
    final_candidates: int = 0
    performance_model: Callable[[], PerformanceModel]
    metric: str | None = None
    priors: tuple[PriorEffects, ...] = ()
    pareto: bool = False


PerformanceModelFactory = Callable[["RankSpace", "PerformanceModelConfig", int], "PerformanceModel"]
"""Builds a performance model for a space from its table and a seed."""

SamplerFactory = Callable[[SamplerSettings], optuna.samplers.BaseSampler]
"""Builds the sampler of one trial."""


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
        """Draws a parameter other than a rank at random, as Optuna's `RandomSampler` does."""
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


def random(settings: SamplerSettings) -> optuna.samplers.BaseSampler:
    """Random search: every layer draws its rank from the candidates, all equally likely."""
    return optuna.samplers.RandomSampler(seed=settings.seed)


def tpe(settings: SamplerSettings) -> optuna.samplers.BaseSampler:
    """Optuna's tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011)."""
    return optuna.samplers.TPESampler(
        seed=settings.seed, n_startup_trials=settings.n_startup_trials or N_STARTUP_TRIALS
    )


def gp(settings: SamplerSettings) -> optuna.samplers.BaseSampler:
    """Optuna's Gaussian process with expected improvement."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.samplers.GPSampler(
            seed=settings.seed, n_startup_trials=settings.n_startup_trials or N_STARTUP_TRIALS
        )
