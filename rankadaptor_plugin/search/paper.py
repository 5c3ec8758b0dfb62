"""The paper's search step (section 3.3), as a sampler of Optuna.

Our own step is in `rankadaptor_plugin.search.adaptive`; Optuna's samplers are named in
`rankadaptor_plugin.search.optuna_samplers`. A sampler is made anew for every trial, so that a
search that was broken off goes on exactly as if it had not been.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
from optuna.trial import TrialState

from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.core.trials import RECORD
from rankadaptor_plugin.search.candidate_scan import best_of_random
from rankadaptor_plugin.search.parameters import Observations
from rankadaptor_plugin.search.performance.performance_model import MetaLearner
from rankadaptor_plugin.search.rank_sampler import RankSampler, best_measured, distinct

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import optuna
    from optuna.trial import FrozenTrial

    from rankadaptor_plugin.core.ranks import RankSpace
    from rankadaptor_plugin.search.contract import SamplerSettings
    from rankadaptor_plugin.search.performance.performance_model import (
        PerformanceModel,
        PriorEffects,
    )

TASK_VALUES = "task_values"
"""User attribute from which `PerformanceModelSampler` learns in a study that is not ours."""

INITIAL_TRIALS = 10
"""Random allocations of the initialization phase where the run file leaves it to the method."""

_PRIOR_ROWS = 512  # random allocations from which the network learns what a prior expects


class PerformanceModelSampler(RankSampler):
    """The paper's search step: random allocations first, then the performance model's favourite.

    The first `initial_trials` proposals are random. Each later one trains a fresh performance
    model, offline on the initial trials' values per task and then on the target values of all
    complete trials, and proposes the best predicted of many random allocations not yet tried. A
    proposal depends on the seed and the content of the study alone.

    It serves any single-objective study whose parameters are those of `distributions`. Values per
    task, where there are any, are taken from the user attribute ``task_values``:

        >>> import optuna
        >>> from rankadaptor_plugin.config.tables import PerformanceModelConfig
        >>> from rankadaptor_plugin.search.performance.mlp import mlp
        >>> from rankadaptor_plugin.core.ranks import RankSpace
        >>> from rankadaptor_plugin.search.paper import PerformanceModelSampler
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
        priors: What earlier studies expect; the model learns it before all else.
        final_candidates: Random allocations of which the last model names the first finalist.

    Raises:
        RankSpaceError: On sampling, if every allocation of the space was tried.
    """

    def __init__(
        self,
        space: RankSpace,
        performance_model: Callable[[], PerformanceModel],
        *,
        seed: int,
        initial_trials: int = INITIAL_TRIALS,
        candidates: int = 10_000,
        metric: str | None = None,
        priors: Sequence[PriorEffects] = (),
        final_candidates: int = 0,
    ) -> None:
        super().__init__(space, seed=seed)
        self._performance_model = performance_model
        self.initial_trials = initial_trials
        self._final_candidates = final_candidates
        self._candidates = candidates
        self._metric = metric
        self._priors = priors

    def propose(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        observed: Observations,
        rng: np.random.Generator,
    ) -> Sequence[int]:
        """Proposes a random row, or the favourite of the model; see the class."""
        if observed.position < self.initial_trials or len(observed.values) < 2:  # noqa: PLR2004
            return self.random_row(observed, rng)
        model = self._trained(study, observed)
        spare = self.random_row(observed, rng)
        try:
            row, mean = best_of_random(self.space, model, self._candidates, rng, observed.tried)
        except RankSpaceError:  # all that were drawn were tried
            row, mean = list(spare), float(model.predict(np.array([spare])).mean[0])
        self._predicted[trial.number] = observed.sign * mean
        return row

    def recommend(self, study: optuna.Study, count: int) -> list[Sequence[int]]:
        """Convergence phase: the best predicted of many random rows, then the best measured.

        Args:
            study: The study.
            count: Most rows to return.
        """
        observed = Observations.of(study, self.space)
        rows: list[Sequence[int]] = []
        if self._final_candidates and len(observed.values) > 1:
            rng = np.random.default_rng([self.seed, observed.position])
            model = self._trained(study, observed)
            with contextlib.suppress(RankSpaceError):  # all that were drawn have failed
                drawn = self._final_candidates, rng, observed.failed
                rows.append(best_of_random(self.space, model, *drawn)[0])
        return distinct([*rows, *best_measured(observed)])[:count]

    def _trained(self, study: optuna.Study, observed: Observations) -> PerformanceModel:
        """Trains a fresh model on all observations, the initial ones first task by task."""
        others = study.get_trials(deepcopy=False)
        first = {other.number for other in others[: self.initial_trials]}
        # The scores of a trial that ended at its rung are those of another length.
        initial = np.array(
            [t.number in first and t.state is TrialState.COMPLETE for t in observed.trials]
        )
        tasks = [self._task_values(t) for t, i in zip(observed.trials, initial, strict=True) if i]
        names = sorted(set.intersection(*(set(task) for task in tasks))) if tasks else []
        model = self._performance_model()
        if isinstance(model, MetaLearner):
            if self._priors:
                rows = self.space.sample(_PRIOR_ROWS, np.random.default_rng(self.seed))
                expected = [prior(self.space, rows) for prior in self._priors]
                model.pretrain(rows, np.array(expected).T)
            if names:
                values = np.array([[task[name] for name in names] for task in tasks], dtype=float)
                model.pretrain(observed.rows[initial], observed.sign * values)
        model.fit(observed.rows, observed.values)
        return model

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


def paper(settings: SamplerSettings) -> PerformanceModelSampler:
    """The paper's search step; see `PerformanceModelSampler`."""
    return PerformanceModelSampler(
        settings.space,
        settings.performance_model,
        seed=settings.seed,
        initial_trials=settings.initial_trials or INITIAL_TRIALS,
        candidates=settings.candidates,
        metric=settings.metric,
        priors=settings.priors,
        final_candidates=settings.final_candidates,
    )
