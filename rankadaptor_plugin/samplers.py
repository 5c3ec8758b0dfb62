"""Samplers: what to fine-tune next. All of them are samplers of Optuna.

`PerformanceModelSampler` is the step of the paper's search (section 3.3); ``random`` and ``tpe``
are Optuna's own. A sampler is made anew for every trial, so that a search that was broken off goes
on exactly as if it had not been.
"""

from __future__ import annotations

import itertools
import math
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, IntDistribution

from rankadaptor_plugin.errors import RankSpaceError
from rankadaptor_plugin.ranks import RankAllocation, allocation_of
from rankadaptor_plugin.trials import RECORD

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from rankadaptor_plugin.context import SamplerSettings
    from rankadaptor_plugin.performance_model import PerformanceModel
    from rankadaptor_plugin.ranks import Allocations, RankSpace

TASK_VALUES = "task_values"
"""User attribute from which `PerformanceModelSampler` learns in a study that is not ours."""

_LISTED = 20_000  # Spaces up to this size are listed in full.
_DRAWN = 1000  # If so many draws from a larger space were all tried, it counts as exhausted.


def distributions(space: RankSpace) -> dict[str, BaseDistribution]:
    """Returns the parameters of a study: ``layer_04`` and so on, one per searchable layer."""
    candidates = space.candidates
    steps = {high - low for low, high in itertools.pairwise(candidates)}
    one: BaseDistribution
    if len(steps) <= 1:
        one = IntDistribution(candidates[0], candidates[-1], step=max(steps, default=1))
    else:
        one = CategoricalDistribution(candidates)
    return {_name(layer): one for layer, searched in enumerate(space.searchable) if searched}


def allocation_from(space: RankSpace, params: Mapping[str, int]) -> RankAllocation:
    """Returns the allocation of a study's parameters; those of `distributions` must be there."""
    return allocation_of(
        params[_name(layer)] if searched else space.default_rank
        for layer, searched in enumerate(space.searchable)
    )


def untried(
    space: RankSpace, tried: Collection[tuple[int, ...]], count: int, rng: np.random.Generator
) -> Allocations:
    """Draws random allocations that were not tried; small spaces are listed and shuffled.

    Returns:
        Ranks, shape (n, l), n <= count. None at all if the space is exhausted.
    """
    if space.size <= _LISTED:
        rows = rng.permutation(space.every())
    else:
        rows = space.sample(max(count, _DRAWN), rng)
    return rows[[tuple(row) not in tried for row in rows.tolist()]][:count]


class PerformanceModelSampler(optuna.samplers.BaseSampler):
    """The paper's search step: random allocations first, then the performance model's favourite.

    The first `initial_trials` proposals are random. Each later one trains a fresh performance
    model, offline on the initial trials' values per task and then on the target values of all
    complete trials, and proposes the best predicted of many random allocations not yet tried. A
    proposal depends on the seed and the content of the study alone.

    It serves any single-objective study whose parameters are those of `distributions`. Values per
    task, where there are any, are taken from the user attribute ``task_values``:

        >>> import optuna
        >>> from rankadaptor_plugin.config import PerformanceModelConfig
        >>> from rankadaptor_plugin.performance_model import mlp
        >>> from rankadaptor_plugin.ranks import RankSpace
        >>> from rankadaptor_plugin.samplers import PerformanceModelSampler
        >>> four = {"searchable": (True,) * 4, "costs": (1,) * 4}
        >>> space = RankSpace(candidates=(2, 4, 8), default_rank=4, **four)
        >>> def objective(trial):
        ...     ranks = [trial.suggest_categorical(f"layer_{i:02d}", [2, 4, 8]) for i in range(4)]
        ...     trial.set_user_attr("task_values", {"boolq": ranks[0], "piqa": ranks[1]})
        ...     return ranks[0] + ranks[1]
        >>> model = lambda: mlp(space, PerformanceModelConfig(), seed=0)
        >>> sampler = PerformanceModelSampler(space, model, seed=0, initial_trials=5)
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> study = optuna.create_study(direction="maximize", sampler=sampler)
        >>> study.optimize(objective, n_trials=10)
        >>> study.best_value
        16.0

    Args:
        space: The rank space S.
        performance_model: Makes a fresh, untrained performance model.
        seed: Seed of the random allocations, at least 0.
        initial_trials: Random allocations of the initialization phase.
        candidates: Allocations that the performance model scores per proposal.
        metric: Metric of the tasks to learn from offline, where the study is ours; None takes
            every metric of every task as a task of its own.

    Raises:
        RankSpaceError: On sampling, if every allocation of the space was tried.
    """

    def __init__(
        self,
        space: RankSpace,
        performance_model: Callable[[], PerformanceModel],
        *,
        seed: int,
        initial_trials: int = 10,
        candidates: int = 10_000,
        metric: str | None = None,
    ) -> None:
        self._space = space
        self._performance_model = performance_model
        self._seed = seed
        self._initial_trials = initial_trials
        self._candidates = candidates
        self._metric = metric
        self._predicted: dict[int, float] = {}

    def predicted(self, number: int) -> float | None:
        """Returns Q of the paper for trial `number` of the study; None for random proposals."""
        return self._predicted.get(number)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Returns the parameters that are proposed together: all ranks."""
        return distributions(self._space)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Proposes an allocation; see the class."""
        sign = 1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        data = [o for o in others if self._allocation(o) and math.isfinite(_value(o))]
        tried = {a.ranks for other in others if (a := self._allocation(other))}
        position = sum(other.number < trial.number for other in others)
        rng = np.random.default_rng([self._seed, position])
        learns = position >= self._initial_trials and len(data) > 1
        rows = untried(self._space, tried, self._candidates if learns else 1, rng)
        if not len(rows):
            raise RankSpaceError(
                f"All allocations of the rank space were tried, {len(tried)} in number. "
                "Stop here or add candidates."
            )
        best = 0
        if learns:
            first = {other.number for other in others[: self._initial_trials]}
            mean = self._train(data, first, sign).predict(rows).mean
            best = int(mean.argmax())
            self._predicted[trial.number] = sign * float(mean[best])
        return {
            _name(layer): int(rank)
            for layer, rank in enumerate(rows[best])
            if self._space.searchable[layer]
        }

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draws a parameter that is no rank at random, as Optuna's `RandomSampler` does."""
        seed = zlib.crc32(f"{self._seed} {trial.number} {param_name}".encode())
        return optuna.samplers.RandomSampler(seed).sample_independent(
            study, trial, param_name, param_distribution
        )

    def _train(self, data: Sequence[FrozenTrial], first: set[int], sign: int) -> PerformanceModel:
        """Trains a fresh model on `data`; `first` are the numbers of the initial trials."""
        ranks = np.array([a.ranks for trial in data if (a := self._allocation(trial))])
        values = sign * np.array([_value(trial) for trial in data])
        initial = np.array([trial.number in first for trial in data])
        tasks = [self._task_values(t) for t, i in zip(data, initial, strict=True) if i]
        names = sorted(set.intersection(*(set(task) for task in tasks))) if tasks else []
        model = self._performance_model()
        if names:
            task_values = np.array([[task[name] for name in names] for task in tasks], dtype=float)
            model.pretrain(ranks[initial], sign * task_values)
        model.fit(ranks, values)
        return model

    def _allocation(self, trial: FrozenTrial) -> RankAllocation | None:
        # The record has the ranks that were really used; parameters are what a sampler asked for.
        if RECORD in trial.user_attrs:
            return RankAllocation(tuple(trial.user_attrs[RECORD]["ranks"]))
        # A trial of another study may have been started only, or be without ranks.
        known = distributions(self._space).keys() <= trial.params.keys()
        return allocation_from(self._space, trial.params) if known else None

    def _task_values(self, trial: FrozenTrial) -> dict[str, float]:
        record = trial.user_attrs.get(RECORD)
        if record is None:
            return dict(trial.user_attrs.get(TASK_VALUES, {}))
        return {
            f"{task}/{metric}": value
            for task, score in record["score"].items()
            for metric, value in score["values"].items()
            if self._metric in (None, metric)
        }


def paper(settings: SamplerSettings) -> optuna.samplers.BaseSampler:
    """The paper's search step; see `PerformanceModelSampler`."""
    return PerformanceModelSampler(
        settings.space,
        settings.performance_model,
        seed=settings.seed,
        initial_trials=settings.initial_trials,
        candidates=settings.candidates,
        metric=settings.metric,
    )


def random(settings: SamplerSettings) -> optuna.samplers.BaseSampler:
    """Random search: every layer draws its rank from the candidates, all equally likely."""
    return optuna.samplers.RandomSampler(seed=settings.seed)


def tpe(settings: SamplerSettings) -> optuna.samplers.BaseSampler:
    """Optuna's tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011)."""
    return optuna.samplers.TPESampler(seed=settings.seed, n_startup_trials=settings.initial_trials)


def _name(layer: int) -> str:
    return f"layer_{layer:02d}"


def _value(trial: FrozenTrial) -> float:
    complete = trial.state == optuna.trial.TrialState.COMPLETE
    return math.nan if not complete or trial.value is None else trial.value
