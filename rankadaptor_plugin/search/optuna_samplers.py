"""Optuna's samplers in our harness, by name.

They know nothing of budgets; what they propose is moved within them by `RankSpace.within_budget`.
"""

from __future__ import annotations

import itertools
import warnings
from typing import TYPE_CHECKING

import optuna
from optuna.exceptions import ExperimentalWarning

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.search.paper import INITIAL_TRIALS
from rankadaptor_plugin.search.parameters import (
    PROPOSED,
    REPLACED,
    UNASKED,
    Observations,
    distributions,
    proposed,
    value_of,
)
from rankadaptor_plugin.search.rank_sampler import RankSampler, quiet_study

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from optuna.trial import FrozenTrial

    from rankadaptor_plugin.core.ranks import RankSpace
    from rankadaptor_plugin.search.contract import SamplerSettings


class ReplayedSampler(RankSampler):
    """A sampler of Optuna whose state is more than its trials, rebuilt by playing them again.

    CMA-ES would keep its state as a pickle in the study, and Sobol's sequence its place outside
    of the trials. Both follow from the seed and from the values told, so neither is stored. Trials
    that are not marked as `UNASKED` count as proposed by this sampler.

    Args:
        space: The rank space S.
        make: Makes the sampler, with one and the same seed for the whole search.
        seed: Seed of the trial.
    """

    def __init__(
        self,
        space: RankSpace,
        make: Callable[[], optuna.samplers.BaseSampler],
        *,
        seed: int,
    ) -> None:
        super().__init__(space, seed=seed)
        self._make = make

    def propose(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        observed: Observations,
        rng: np.random.Generator,
    ) -> Sequence[int]:
        """Proposes what the sampler says after all trials before this one."""
        parameters = distributions(self.space)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            again = quiet_study(study.study_name, study.direction, sampler=self._make())
        for other in study.get_trials(deepcopy=False):
            if other.number == trial.number or UNASKED in other.system_attrs:
                continue
            asked = again.ask(parameters)
            value = value_of(other)
            # A proposal that was moved within the limits gets the value of where it was moved. In
            # a batch, proposals came without the values of those before: what is asked now may
            # be another one, of which no value is known.
            same = self.space.row(proposed(self.space, asked.params))
            meant = not other.system_attrs.get(REPLACED, False)
            if value is not None and meant and other.system_attrs.get(PROPOSED, same) == same:
                again.tell(asked, value)
            elif other.state.is_finished():
                again.tell(asked, state=optuna.trial.TrialState.FAIL)
        return self.space.row(proposed(self.space, again.ask(parameters).params))


def random(settings: SamplerSettings) -> optuna.samplers.BaseSampler:
    """Random search: every layer draws its rank from the candidates, all equally likely."""
    return optuna.samplers.RandomSampler(seed=settings.seed)


def tpe(settings: SamplerSettings) -> optuna.samplers.BaseSampler:
    """Optuna's tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011)."""
    return optuna.samplers.TPESampler(
        seed=settings.seed, n_startup_trials=settings.initial_trials or INITIAL_TRIALS
    )


def gp(settings: SamplerSettings) -> optuna.samplers.BaseSampler:
    """Optuna's Gaussian process with expected improvement."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.samplers.GPSampler(
            seed=settings.seed, n_startup_trials=settings.initial_trials or INITIAL_TRIALS
        )


def cmaes(settings: SamplerSettings) -> optuna.samplers.BaseSampler:
    """Optuna's CMA-ES (Hansen and Ostermeier, 2001), with margin for whole numbers.

    Raises:
        ConfigError: If the candidates are not evenly spaced.
    """
    _check_even(settings.space, "cmaes")

    def make() -> optuna.samplers.BaseSampler:
        return optuna.samplers.CmaEsSampler(
            seed=settings.search_seed,
            n_startup_trials=settings.initial_trials or 1,
            with_margin=True,
            warn_independent_sampling=False,
        )

    return ReplayedSampler(settings.space, make, seed=settings.seed)


def qmc(settings: SamplerSettings) -> optuna.samplers.BaseSampler:
    """Optuna's quasi-Monte Carlo: a scrambled Sobol sequence.

    Raises:
        ConfigError: If the candidates are not evenly spaced.
    """
    _check_even(settings.space, "qmc")

    def make() -> optuna.samplers.BaseSampler:
        return optuna.samplers.QMCSampler(
            seed=settings.search_seed, scramble=True, warn_independent_sampling=False
        )

    return ReplayedSampler(settings.space, make, seed=settings.seed)


def _check_even(space: RankSpace, method: str) -> None:
    if len({high - low for low, high in itertools.pairwise(space.candidates)}) > 1:
        raise ConfigError(
            f"Method {method} takes evenly spaced rank candidates, not {list(space.candidates)}. "
            "Change [rank_space] candidates or [search] method."
        )
