"""The paper's search step (section 3.3), as a sampler of Optuna.

Random allocations are scored by a performance model, and the best one is fine-tuned. Our own step
is in `rankadaptor_plugin.search.bayes`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from rankadaptor_plugin.core.errors import RankSpaceError
from rankadaptor_plugin.core.trials import RECORD
from rankadaptor_plugin.search.performance.mlp import MLPPerformanceModel, one_thread
from rankadaptor_plugin.search.performance.performance_model import MetaLearner
from rankadaptor_plugin.search.samplers import (
    N_STARTUP_TRIALS,
    RankSampler,
    best_measured,
    distinct,
)
from rankadaptor_plugin.search.space import Observations

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import optuna
    from optuna.trial import FrozenTrial

    from rankadaptor_plugin.core.ranks import RankSpace
    from rankadaptor_plugin.search.performance.performance_model import (
        PerformanceModel,
        PriorEffects,
    )
    from rankadaptor_plugin.search.samplers import SamplerSettings

TASK_VALUES = "task_values"
"""User attribute from which `PerformanceModelSampler` learns in a study that is not ours."""

_BATCH = 2048  # Candidates that are drawn and scored at once; they stay in the cache.
_PRIOR_ROWS = 512  # random allocations from which the network learns what a prior expects


class PerformanceModelSampler(RankSampler):
    """The paper's search step: random allocations first, then the performance model's favorite.

    The first `n_startup_trials` proposals are random. Each later one trains a fresh performance
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
        >>> sampler = PerformanceModelSampler(space, model, seed=0, n_startup_trials=5)
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> study = optuna.create_study(direction="maximize", sampler=sampler)
        >>> study.optimize(objective, n_trials=10)
        >>> study.best_value
        16.0

    Args:
        space: The rank space S.
        performance_model: Makes a fresh, untrained performance model.
        seed: Seed of the random allocations, at least 0.
        n_startup_trials: Random allocations of the initialization phase.
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
        n_startup_trials: int = N_STARTUP_TRIALS,
        candidates: int = 10_000,
        metric: str | None = None,
        priors: Sequence[PriorEffects] = (),
        final_candidates: int = 0,
    ) -> None:
        super().__init__(space, seed=seed)
        self._performance_model = performance_model
        self.n_startup_trials = n_startup_trials
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
        """Proposes a random row, or the favorite of the model; see the class."""
        if observed.position < self.n_startup_trials or len(observed.values) < 2:  # noqa: PLR2004
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
        first = {other.number for other in others[: self.n_startup_trials]}
        initial = np.array([trial.number in first for trial in observed.trials])
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
        n_startup_trials=settings.n_startup_trials or N_STARTUP_TRIALS,
        candidates=settings.candidates,
        metric=settings.metric,
        priors=settings.priors,
        final_candidates=settings.final_candidates,
    )


def best_of_random(
    space: RankSpace,
    model: PerformanceModel,
    count: int,
    rng: np.random.Generator,
    tried: Collection[tuple[int, ...]] = (),
) -> tuple[list[int], float]:
    """Returns the untried row with the highest predicted mean among random ones, and that mean.

    Candidates are drawn, scored and forgotten in batches, so that memory does not grow. For the
    paper's network in a space of evenly spaced levels without limits they are drawn as indices of
    levels, from 16 random bits each: k levels are equally likely to within k in 65536.

    Args:
        space: The rank space.
        model: A fitted model.
        count: Number of random rows, at least 1.
        rng: Draws the rows.
        tried: Rows not to return.

    Raises:
        RankSpaceError: If all rows drawn were tried.
    """
    levels = [np.array(values) for values in space.levels()]
    start, step = np.zeros(len(levels)), np.ones(len(levels))
    even = all(len(set(np.diff(values).tolist())) < 2 for values in levels)  # noqa: PLR2004
    scores_of = None
    if isinstance(model, MLPPerformanceModel) and even and not space.is_limited:
        start = np.array([float(values[0]) for values in levels])
        step = np.array(
            [float(values[-1] - values[0]) / max(len(values) - 1, 1) for values in levels]
        )
        scores_of = model.fast_scores(start, step)
    bits = np.random.SFC64(int(rng.integers(2**63)))
    share = np.array([[len(values) / 2**16] for values in levels], dtype=np.float32)
    index = np.empty((len(levels), min(_BATCH, count)), dtype=np.float32)
    excluded, best, highest = frozenset(tried), list[int](), -np.inf
    with one_thread(), torch.inference_mode():
        for done in range(0, count, _BATCH):
            index = index[:, : count - done]
            if scores_of is not None:
                drawn = bits.random_raw(-(-index.size // 4)).view(np.uint16)[: index.size]
                np.multiply(drawn.reshape(index.shape), share, out=index)
                rows, scores = index.T, scores_of(np.floor(index, out=index))
            else:
                sampled = space.sample(index.shape[1], rng)
                rows, scores = (
                    sampled.astype(np.float32),
                    model.predict(sampled).mean.astype(np.float32),
                )
            while scores[top := int(scores.argmax())] > highest:
                row = [int(value) for value in start + step * rows[top]]
                if tuple(row) not in excluded and any(row[: space.slots]):
                    best, highest = row, float(scores[top])
                scores[top] = -np.inf
    if not best:
        raise RankSpaceError(
            f"All {count} random allocations drawn were tried before; {len(excluded)} were tried. "
            "Stop here or add candidates."
        )
    return best, float(model.predict(np.array([best])).mean[0])
