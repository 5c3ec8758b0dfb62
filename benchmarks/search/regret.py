"""Regret of searches on simulated tasks, by number of evaluations.

    python benchmarks/search/regret.py
    python benchmarks/search/regret.py --methods gp --kinds saturating --noise 1.0 --repeats 30

Every method proposes 80 allocations through the package's own study, with a fresh sampler for every
trial, as `rankadaptor-plugin run` does. Simple regret, in sigma_b, is taken of what a method would
deliver after 10, 20, 40 and 80 evaluations: ``model`` is the performance model's recommendation
(that of ``paper`` is its favorite among 100,000 random allocations), ``observed`` the best value
measured. All methods meet the same problems with the same noise. See `simulators`.

``bayes`` takes a prior from the six source tasks, and the network of ``paper`` is trained on them
offline; methods in ``-nometa`` know nothing of the sources.

Every search adds a line to ``results/search/regret.jsonl``, and what has a line there is not
searched again: delete the file after a change of the code. Tables and pictures are made of all
lines.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import optuna
import plots
import regret_tables
import simulators
import torch
from optuna.storages import InMemoryStorage

from rankadaptor_plugin.config.tables import PerformanceModelConfig, SearchConfig
from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
from rankadaptor_plugin.core.scores import Score, TaskScore
from rankadaptor_plugin.core.trials import Phase, Trial, TrialState
from rankadaptor_plugin.pipeline.context import registries
from rankadaptor_plugin.plugins import plugin_manager
from rankadaptor_plugin.search.samplers import SamplerSettings
from rankadaptor_plugin.search.space import LayerFeatures, untried
from rankadaptor_plugin.search.study import TrialStore
from rankadaptor_plugin.search.transfer.studies import OBJECTIVE, MetaKnowledge, SourceStudy
from rankadaptor_plugin.search.transfer.transfer import prior_effects

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from optuna.samplers import BaseSampler

    from rankadaptor_plugin.core.ranks import Allocations
    from rankadaptor_plugin.pipeline.context import Registries
    from rankadaptor_plugin.search.performance.performance_model import (
        PerformanceModel,
        PriorEffects,
    )

RESULTS = Path(__file__).resolve().parent.parent / "results" / "search"
EVALUATIONS = 80
METRIC = "choice_logprob"
SPACE = RankSpace(
    candidates=simulators.RANKS,
    searchable=(True,) * simulators.LAYERS,
    default_rank=8,
    costs=(1,) * simulators.LAYERS,
)
MODEL = PerformanceModelConfig()
SEARCH = SearchConfig()


@dataclass(frozen=True)
class Method:
    """A registered sampler, and whether it learns from the sources."""

    sampler: str
    meta: bool = False


METHODS = {
    "paper": Method("paper", meta=True),
    "paper-nometa": Method("paper"),
    "bayes": Method("bayes", meta=True),
    "bayes-nometa": Method("bayes"),
    **{name: Method(name) for name in ("tpe", "gp", "random")},
}


@runtime_checkable
class Recommending(Protocol):
    """A sampler with a final rule of its own."""

    def recommend(self, study: optuna.Study, count: int) -> list[Sequence[int]]:
        """Returns the rows to believe in, best first."""
        ...


def search(method: Method, problem: simulators.Problem, seed: int) -> dict[str, dict[str, float]]:
    """Runs one search.

    Returns:
        Regret in sigma_b by number of evaluations and rule.
    """
    sampler_for = _samplers(method, problem, seed)
    store = TrialStore(InMemoryStorage(), "regret")
    tried: set[tuple[int, ...]] = set()
    regrets = {}
    for position in range(EVALUATIONS + 1):
        sampler = sampler_for(int(np.random.SeedSequence([seed, position]).generate_state(1)[0]))
        if position in regret_tables.CHECKS:
            delivered = {"observed": _best_observed(store)}
            if isinstance(sampler, Recommending):
                best = sampler.recommend(store.as_seen_by(sampler), 1)[0]
                delivered["model"] = tuple(int(rank) for rank in best)
            regrets[str(position)] = {
                rule: problem.regret(np.array(row)) for rule, row in delivered.items()
            }
        if position == EVALUATIONS:
            break
        spare = untried(SPACE, tried, 1, np.random.default_rng([seed, position]))[0]

        def place(proposal: RankAllocation, spare: Allocations = spare) -> RankAllocation:
            # As the search does: samplers such as TPE repeat themselves.
            return SPACE.allocation(spare) if proposal.ranks in tried else proposal

        pending = store.begin(sampler, SPACE, place)
        tried.add(pending.allocation.ranks)
        value = problem.measure(np.array(pending.allocation.ranks), position)
        store.finish(pending, _trial(position, pending.allocation, value))
    return regrets


def _samplers(
    method: Method, problem: simulators.Problem, seed: int
) -> Callable[[int], BaseSampler]:
    """Returns what makes the sampler of a trial from its seed."""
    found = _registries()
    make_model = found.performance_models.get(MODEL.name)
    on_sources = method.meta and method.sampler == "paper"
    pretrained = _pretrained(make_model(SPACE, MODEL, seed), problem) if on_sources else None
    priors = source_priors(problem) if method.meta and not on_sources else ()

    def model(trial_seed: int) -> PerformanceModel:
        if pretrained is not None:
            return copy.deepcopy(pretrained)
        return make_model(SPACE, MODEL, trial_seed)

    def sampler_for(trial_seed: int) -> BaseSampler:
        return found.samplers.get(method.sampler)(
            SamplerSettings(
                space=SPACE,
                seed=trial_seed,
                # The sources take the place of the paper's initialization; two values are the
                # least that its sampler learns from.
                n_startup_trials=2 if on_sources else 0,
                candidates=SEARCH.candidates,
                final_candidates=SEARCH.final_candidates,
                performance_model=lambda: model(trial_seed),
                # What the sources taught shall not be learned over by the target's first values.
                metric="" if on_sources else METRIC,
                priors=priors,
            )
        )

    return sampler_for


def source_priors(problem: simulators.Problem) -> tuple[PriorEffects, ...]:
    """Returns what the package learns from the sources, taken as finished studies."""
    features = LayerFeatures((), np.zeros((SPACE.slots, 0)))
    sources = tuple(
        SourceStudy(
            name=f"task {i}",
            space=SPACE,
            features=features,
            rows=rows,
            values=values[:, None],
            columns=(OBJECTIVE,),
        )
        for i, (rows, values) in enumerate(
            zip(problem.source_rows, problem.source_values, strict=True)
        )
    )
    return (prior_effects(MetaKnowledge(sources=sources), SPACE, features),)


def _pretrained(model: Any, problem: simulators.Problem) -> PerformanceModel:
    """Trains the paper's network on all sources jointly, standardized per task."""
    values = problem.source_values
    values = (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)
    model.pretrain(problem.source_rows.reshape(-1, simulators.LAYERS), values.reshape(-1, 1))
    trained: PerformanceModel = model
    return trained


def _best_observed(store: TrialStore) -> tuple[int, ...]:
    return max(store.trials(), key=lambda trial: trial.objective or 0.0).allocation.ranks


def _trial(position: int, allocation: RankAllocation, value: float) -> Trial:
    score = TaskScore(values={METRIC: value}, stderr={METRIC: 0.0}, documents=1)
    return Trial(
        position=position,
        phase=Phase.ITERATION,
        allocation=allocation,
        seed=0,
        state=TrialState.COMPLETE,
        score=Score(tasks={"target": score}),
        objective=value,
    )


@lru_cache(maxsize=1)
def _registries() -> Registries:
    return registries(plugin_manager(third_party=False))


def _work(cells: list[regret_tables.Cell], path: Path) -> list[str]:
    """Searches the cells of one problem, a line of `path` for each; returns what was done."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    done = []
    for cell in cells:
        problem = simulators.problem(cell.kind, cell.noise, cell.repeat)
        started = time.process_time()
        regrets = search(METHODS[cell.method], problem, cell.repeat)
        seconds = time.process_time() - started
        line = json.dumps({**vars(cell), "seconds": round(seconds, 3), "regret": regrets}) + "\n"
        with path.open("ab", buffering=0) as file:  # one write: workers do not mix their lines
            file.write(line.encode())
        done.append(f"{cell.method} {seconds:.1f} s")
    return done


def main() -> None:
    """Searches what is missing, then prints the tables and draws the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--kinds", nargs="*", default=list(simulators.KINDS), choices=simulators.KINDS
    )
    parser.add_argument("--noise", nargs="*", type=float, default=list(simulators.NOISES))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "regret.jsonl"
    known = {result.cell for result in regret_tables.read(path)}
    problems = list(itertools.product(range(options.repeats), options.kinds, options.noise))
    groups = []
    for repeat, kind, noise in problems:
        cells = [regret_tables.Cell(kind, noise, method, repeat) for method in options.methods]
        groups.append([cell for cell in cells if cell not in known])
    groups = [cells for cells in groups if cells]
    started = time.perf_counter()
    # Workers inherit one thread per library, where threads would wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        futures = {pool.submit(_work, cells, path): cells[0] for cells in groups}
        for number, future in enumerate(as_completed(futures), 1):
            cell = futures[future]
            print(
                f"{number}/{len(groups)} {time.perf_counter() - started:.0f} s: {cell.kind}, "
                f"noise {cell.noise:g}, repeat {cell.repeat}: {', '.join(future.result())}",
                flush=True,
            )
    results = regret_tables.read(path)
    summary = regret_tables.summary(results)
    print(regret_tables.markdown(summary))
    written = {"evaluations": EVALUATIONS, "correlation": simulators.CORRELATION, **summary}
    name = f"regret-{date.today().isoformat()}.json"
    (options.results / name).write_text(json.dumps(written, indent=1) + "\n", "utf-8")
    plots.draw(summary, options.results)


if __name__ == "__main__":
    main()
