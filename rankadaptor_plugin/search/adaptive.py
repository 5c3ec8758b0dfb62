"""Our own search step: models that know how uncertain they are, and which of them to trust.

``linear`` is Thompson sampling on Bayesian linear regression, ``ensemble`` an upper confidence
bound on a deep ensemble of the paper's network, and ``auto`` asks whichever has predicted the
measurements of this study better, one step ahead. Every proposal stores what each model expected of
it, so that the comparison takes no refit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from rankadaptor_plugin.config.tables import PerformanceModelConfig
from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.core.ranks import RankSpace
from rankadaptor_plugin.core.registry import Registry
from rankadaptor_plugin.search.contract import SamplerFactory, SamplerSettings
from rankadaptor_plugin.search.parameters import Observations, require_untried, untried
from rankadaptor_plugin.search.performance.ensemble import MLPEnsemble
from rankadaptor_plugin.search.performance.linear_model import BayesianRegression
from rankadaptor_plugin.search.performance.performance_model import Prediction
from rankadaptor_plugin.search.rank_sampler import RankSampler, distinct

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import optuna
    from optuna.trial import FrozenTrial

    from rankadaptor_plugin.search.performance.performance_model import PriorEffects, ProposingModel

    Factory = Callable[[], ProposingModel]

FORECAST = "rankadaptor_forecast"
"""System attribute of a trial: ``row``, and by model ``[mean, standard deviation]`` expected."""

INITIAL_TRIALS = 3
"""Random allocations where the run file leaves it to the method; none if there is a prior."""

_LEAST_FORECASTS = 5  # Before so many, the first model is asked.


class AdaptiveSampler(RankSampler):
    """Proposes by the model that has predicted best so far.

    It serves any single-objective study whose parameters are those of
    `rankadaptor_plugin.search.parameters.distributions`; other parameters are drawn at random.

    Args:
        space: The rank space S.
        models: Makes fresh models, by name; the first is asked until there is evidence.
        seed: Seed of the proposals, at least 0.
        initial_trials: Random allocations before the first proposal of a model.
        pareto: Whether to search the front of score against parameters: every proposal is the best
            within a random number of parameters.

    Raises:
        RankSpaceError: On sampling, if every allocation of the space was tried.
    """

    def __init__(
        self,
        space: RankSpace,
        models: Mapping[str, Factory],
        *,
        seed: int,
        initial_trials: int = INITIAL_TRIALS,
        pareto: bool = False,
    ) -> None:
        super().__init__(space, seed=seed)
        self._models = models
        self.initial_trials = initial_trials
        self._pareto = pareto

    def propose(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        observed: Observations,
        rng: np.random.Generator,
    ) -> Sequence[int]:
        """Proposes a random row, or that of the better model; see the class."""
        if observed.position < self.initial_trials:
            return self.random_row(observed, rng)
        require_untried(untried(self.space, observed.tried, 1, rng), observed.tried)
        models, better = self._fitted(observed), self._better(observed)
        limit = self._random_limit(rng) if self._pareto else None
        try:
            row = models[better].propose(rng, tried=observed.tried, most_parameters=limit)
        except RankSpaceError:  # every row within the limit that it looked at was tried
            return self.random_row(observed, rng)
        if not len(observed.values):
            return row
        forecast: dict[str, Any] = {"row": [int(value) for value in row]}
        for name, model in models.items():
            expected = model.predict(np.array([row], dtype=np.int64))
            stddev = float(np.hypot(expected.stddev[0], expected.noise))
            forecast[name] = [observed.sign * float(expected.mean[0]), stddev]
        # Optuna's own samplers keep their notes on a running trial the same way.
        study._storage.set_trial_system_attr(trial._trial_id, FORECAST, forecast)
        self._predicted[trial.number] = forecast[better][0]
        return row

    def recommend(self, study: optuna.Study, count: int) -> list[Sequence[int]]:
        """Returns the rows to believe in, best first, by the better model's expectation.

        Rows measured so far compete with the row that the model likes best of all.

        Args:
            study: The study.
            count: Most rows to return.
        """
        observed = Observations.of(study, self.space)
        if not len(observed.values):
            return []
        model = self._fitted(observed)[self._better(observed)]
        rng = np.random.default_rng([self.seed, observed.position])
        rows = distinct([model.best(rng), *observed.rows.tolist()])
        rows = [row for row in rows if tuple(row) not in observed.failed]
        mean = model.predict(np.array(rows, dtype=np.int64)).mean
        order = np.argsort(-mean, kind="stable")
        return [[int(value) for value in rows[i]] for i in order[:count]]

    def scores(self, study: optuna.Study) -> dict[str, float]:
        """Returns by model the mean log density of one-step-ahead forecasts, in nats per trial."""
        return _mean_log_density(Observations.of(study, self.space), list(self._models))

    def _fitted(self, observed: Observations) -> dict[str, ProposingModel]:
        models = {name: make() for name, make in self._models.items()}
        if len(observed.values):
            for model in models.values():
                model.fit(observed.rows, observed.values)
        return models

    def _better(self, observed: Observations) -> str:
        names = list(self._models)
        found = _mean_log_density(observed, names)
        return max(names, key=lambda name: found.get(name, 0.0))

    def _random_limit(self, rng: np.random.Generator) -> int:
        """Draws a number of parameters between the fewest and the most that the space has."""
        space = self.space
        ranks = [space.candidates[-1] if s else space.default_rank for s in space.searchable]
        most = sum(rank * cost for rank, cost in zip(ranks, space.costs, strict=True))
        most = most if space.limit is None else min(most, space.limit)
        return int(rng.integers(space.parameters(space.lowest()), most + 1))


def _mean_log_density(observed: Observations, names: Sequence[str]) -> dict[str, float]:
    """Returns the mean log density by model; empty below `_LEAST_FORECASTS`."""
    found = []
    for trial, row, value in zip(observed.trials, observed.rows, observed.values, strict=True):
        forecast = trial.system_attrs.get(FORECAST, {})
        # What was placed elsewhere, or stopped on its way, was not forecast.
        if forecast.get("row") != row.tolist() or trial.state.name != "COMPLETE":
            continue
        if all(name in forecast for name in names):
            mean, stddev = np.array([forecast[name] for name in names]).T
            density = Prediction(mean, stddev).log_density(observed.sign * value)
            found.append(density)
    if len(found) < _LEAST_FORECASTS:
        return {}
    return dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))


def _linear(settings: SamplerSettings) -> Factory:
    return lambda: BayesianRegression(settings.space, settings.priors)


def _ensemble(settings: SamplerSettings) -> Factory:
    return lambda: MLPEnsemble(
        settings.space, settings.model_config, settings.seed, settings.priors
    )


def _sampler(settings: SamplerSettings, models: Mapping[str, Factory]) -> AdaptiveSampler:
    own: Sequence[PriorEffects] = settings.priors
    return AdaptiveSampler(
        settings.space,
        models,
        seed=settings.seed,
        initial_trials=settings.initial_trials or (0 if own else INITIAL_TRIALS),
        pareto=settings.pareto,
    )


def linear(settings: SamplerSettings) -> AdaptiveSampler:
    """Thompson sampling on Bayesian linear regression."""
    return _sampler(settings, {"linear": _linear(settings)})


def ensemble(settings: SamplerSettings) -> AdaptiveSampler:
    """An upper confidence bound on a deep ensemble of the paper's network."""
    return _sampler(settings, {"ensemble": _ensemble(settings)})


def auto(settings: SamplerSettings) -> AdaptiveSampler:
    """The better of the two, judged by their forecasts in this study."""
    models = {"linear": _linear(settings), "ensemble": _ensemble(settings)}
    return _sampler(settings, models)


def rank_sampler(
    layers: int,
    candidates: Sequence[int],
    *,
    max_rank_sum: int | None = None,
    method: str = "auto",
    seed: int = 0,
) -> AdaptiveSampler:
    """Returns our sampler for a study of your own.

    Its parameters are ``layer_00``, ``layer_01`` and so on, whole numbers if the candidates are
    evenly spaced, else categorical.

    Args:
        layers: Number of layers.
        candidates: Ranks that each may take, ascending.
        max_rank_sum: Most that the ranks of a proposal may add up to; None for no limit.
        method: ``auto``, ``linear`` or ``ensemble``.
        seed: Seed of the proposals, at least 0.

    Raises:
        RankSpaceError: If there is no such space.
        UnknownNameError: If there is no such method.
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
    methods = Registry[SamplerFactory]("method")
    for name, make in (("auto", auto), ("linear", linear), ("ensemble", ensemble)):
        methods(name, make)
    config = PerformanceModelConfig()
    settings = SamplerSettings(
        space=space,
        seed=seed,
        search_seed=seed,
        initial_trials=0,
        candidates=1,
        performance_model=lambda: BayesianRegression(space),
        model_config=config,
    )
    return cast("AdaptiveSampler", methods.get(method)(settings))
