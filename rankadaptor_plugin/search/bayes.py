"""Our own search step: Thompson sampling on Bayesian linear regression."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.core.ranks import RankSpace
from rankadaptor_plugin.search.performance.linear import BayesianRegression
from rankadaptor_plugin.search.samplers import RankSampler, distinct
from rankadaptor_plugin.search.space import Observations, require_untried, untried

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import optuna
    from optuna.trial import FrozenTrial

    from rankadaptor_plugin.search.performance.performance_model import ProposingModel
    from rankadaptor_plugin.search.samplers import SamplerSettings

N_STARTUP_TRIALS = 3
"""Random allocations where the run file leaves it to the method; none if there is a prior."""


class BayesSampler(RankSampler):
    """Proposes what a performance model proposes that knows how uncertain it is.

    It serves any single-objective study whose parameters are those of
    `rankadaptor_plugin.search.space.distributions`; other parameters are drawn at random.

    Args:
        space: The rank space S.
        model: Makes a fresh model.
        seed: Seed of the proposals, at least 0.
        n_startup_trials: Random allocations before the first proposal of the model.
        pareto: Whether to search the Pareto front of score against parameters: every proposal is
            the best within a random number of parameters.

    Raises:
        RankSpaceError: On sampling, if every allocation of the space was tried.
    """

    def __init__(
        self,
        space: RankSpace,
        model: Callable[[], ProposingModel],
        *,
        seed: int,
        n_startup_trials: int = N_STARTUP_TRIALS,
        pareto: bool = False,
    ) -> None:
        super().__init__(space, seed=seed)
        self._model = model
        self.n_startup_trials = n_startup_trials
        self._pareto = pareto

    def propose(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        observed: Observations,
        rng: np.random.Generator,
    ) -> Sequence[int]:
        """Proposes a random row, or that of the model; see the class."""
        if observed.position < self.n_startup_trials:
            return self.random_row(observed, rng)
        require_untried(untried(self.space, observed.tried, 1, rng), observed.tried)
        model = self._fitted(observed)
        limit = self._random_limit(rng) if self._pareto else None
        try:
            row = model.propose(rng, tried=observed.tried, most_parameters=limit)
        except RankSpaceError:  # every row within the limit that it looked at was tried
            return self.random_row(observed, rng)
        if len(observed.values):
            expected = model.predict(np.array([row], dtype=np.int64)).mean[0]
            self._predicted[trial.number] = observed.sign * float(expected)
        return row

    def recommend(self, study: optuna.Study, count: int) -> list[Sequence[int]]:
        """Returns the rows to believe in, best first, by the model's expectation.

        Rows measured so far compete with the row that the model likes best of all.

        Args:
            study: The study.
            count: Most rows to return.
        """
        observed = Observations.of(study, self.space)
        if not len(observed.values):
            return []
        model = self._fitted(observed)
        rng = np.random.default_rng([self.seed, observed.position])
        rows = distinct([model.best(rng), *observed.rows.tolist()])
        rows = [row for row in rows if tuple(row) not in observed.failed]
        mean = model.predict(np.array(rows, dtype=np.int64)).mean
        order = np.argsort(-mean, kind="stable")
        return [[int(value) for value in rows[i]] for i in order[:count]]

    def _fitted(self, observed: Observations) -> ProposingModel:
        model = self._model()
        if len(observed.values):
            model.fit(observed.rows, observed.values)
        return model

    def _random_limit(self, rng: np.random.Generator) -> int:
        """Draws a number of parameters between the fewest and the most that the space has."""
        space = self.space
        ranks = [space.candidates[-1] if s else space.default_rank for s in space.searchable]
        most = sum(rank * cost for rank, cost in zip(ranks, space.costs, strict=True))
        most = most if space.limit is None else min(most, space.limit)
        return int(rng.integers(space.parameters(space.lowest()), most + 1))


def bayes(settings: SamplerSettings) -> BayesSampler:
    """Thompson sampling on Bayesian linear regression."""
    return BayesSampler(
        settings.space,
        lambda: BayesianRegression(settings.space, settings.priors),
        seed=settings.seed,
        n_startup_trials=settings.n_startup_trials or (0 if settings.priors else N_STARTUP_TRIALS),
        pareto=settings.pareto,
    )


def rank_sampler(
    layers: int,
    candidates: Sequence[int],
    *,
    max_rank_sum: int | None = None,
    seed: int = 0,
) -> BayesSampler:
    """Returns our sampler for a study of your own.

    Its parameters are ``layer_00``, ``layer_01`` and so on, whole numbers if the candidates are
    evenly spaced, else categorical.

    Args:
        layers: Number of layers.
        candidates: Ranks that each may take, ascending.
        max_rank_sum: Most that the ranks of a proposal may add up to; None for no limit.
        seed: Seed of the proposals, at least 0.

    Raises:
        RankSpaceError: If there is no such space.
    """
    ranks = tuple(candidates)
    if layers < 1 or seed < 0 or not ranks or tuple(sorted(set(ranks))) != ranks or ranks[0] < 0:
        raise RankSpaceError(
            f"layers is {layers}, candidates {list(ranks)} and seed {seed}. Give at least one "
            "layer, ascending distinct ranks of 0 or more, and a seed of 0 or more."
        )
    space = RankSpace(
        candidates=ranks,
        searchable=(True,) * layers,
        default_rank=max(1, ranks[0]),
        costs=(1,) * layers,
        max_rank_sum=max_rank_sum,
    )
    return BayesSampler(space, lambda: BayesianRegression(space), seed=seed)
