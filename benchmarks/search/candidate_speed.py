"""Speed of the performance models at scoring and proposing rank allocations.

    OMP_NUM_THREADS=1 python benchmarks/search/candidate_speed.py
    OMP_NUM_THREADS=1 python benchmarks/search/candidate_speed.py --billion

First the limit: what one core multiplies of large float32 matrices, in allocations per second at
the 5,824 operations that the paper's network of 26 layers takes for one. Beside it the scan for the
best of many random allocations, generation included, in a space without and one with a budget, and
predictions one at a time. All are measured in turn, several times, so that other work on the
machine disturbs all of them alike; rates are given by CPU time of the process and by wall time, of
which the first holds whatever else runs. Then 10^8 allocations for good, with ``--billion`` 10^9.
Last the time per proposal, fit included, at 80 observations of 32 layers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import torch

from rankadaptor_plugin.config.tables import PerformanceModelConfig
from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
from rankadaptor_plugin.search.bayes import bayes
from rankadaptor_plugin.search.paper import best_of_random
from rankadaptor_plugin.search.performance.linear import BayesianRegression
from rankadaptor_plugin.search.performance.mlp import MLPPerformanceModel, mlp
from rankadaptor_plugin.search.samplers import SamplerSettings
from rankadaptor_plugin.search.space import distributions, parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from rankadaptor_plugin.core.ranks import Allocations
    from rankadaptor_plugin.search.performance.performance_model import ProposingModel, Values

RESULTS = Path(__file__).resolve().parent.parent / "results" / "search"
CONFIG = PerformanceModelConfig()
OBSERVATIONS = 80
RANDOM_STATE = 0
MATRIX = 2048
LAYERS = 26
OPERATIONS = 2 * sum(i * o for i, o in itertools.pairwise((LAYERS, 32, 32, 32, 1)))
"""Of one allocation in the paper's network."""


def space(layers: int, *, budget: bool = False) -> RankSpace:
    """Returns a space of six candidates, as the paper's."""
    costs = tuple(range(100, 100 + layers))
    return RankSpace(
        candidates=(2, 4, 6, 8, 10, 12),
        searchable=(True,) * layers,
        default_rank=8,
        costs=costs,
        budget=8 * sum(costs) if budget else None,
    )


class Rate:
    """Allocations per second of a way to score them, measured again and again."""

    def __init__(self, name: str, count: int, run: Callable[[], object]) -> None:
        self.name, self._count, self._run = name, count, run
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def measure(self) -> None:
        """Runs once."""
        cpu, wall = time.process_time(), time.perf_counter()
        self._run()
        self.cpu.append(self._count / (time.process_time() - cpu))
        self.wall.append(self._count / (time.perf_counter() - wall))


def limits() -> list[Rate]:
    """The matrix products of numpy and torch, in allocations of the network."""
    one = np.random.default_rng(0).random((MATRIX, MATRIX), dtype=np.float32)
    other, out = torch.tensor(one), torch.empty(MATRIX, MATRIX)
    into = np.empty_like(one)
    count = 2 * MATRIX**3 // OPERATIONS
    return [
        Rate("limit: numpy matmul", count, lambda: np.matmul(one, one, out=into)),
        Rate("limit: torch mm", count, lambda: torch.mm(other, other, out=out)),
    ]


def scans(model: MLPPerformanceModel, count: int) -> list[Rate]:
    """The scan without and with a budget, and one allocation at a time."""
    spaces = {"scan": space(LAYERS), "scan within a budget": space(LAYERS, budget=True)}

    def scan(name: str, number: int) -> None:
        best_of_random(spaces[name], model, number, np.random.default_rng(RANDOM_STATE))

    def one_by_one(number: int) -> None:
        rng = np.random.default_rng(RANDOM_STATE)
        for _ in range(number):
            model.predict(spaces["scan"].sample(1, rng))

    few = count // 16  # moving allocations to the budget takes most of the time
    return [
        Rate("scan", count, partial(scan, "scan", count)),
        Rate("scan within a budget", few, partial(scan, "scan within a budget", few)),
        Rate("one at a time", 300, partial(one_by_one, 300)),
    ]


def asker(rank_space: RankSpace, rows: Allocations, values: Values) -> Callable[[], object]:
    """Asks a study of these observations, with a fresh sampler each time, as the search does."""
    parameters = distributions(rank_space)
    study = optuna.create_study(direction="maximize")
    for row, value in zip(rows.tolist(), values.tolist(), strict=True):
        params = parameters_of(rank_space, RankAllocation(tuple(row)))
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=parameters, value=value)
        )
    settings = SamplerSettings(
        space=rank_space,
        seed=RANDOM_STATE,
        n_startup_trials=0,
        candidates=1,
        performance_model=partial(mlp, rank_space, CONFIG, RANDOM_STATE),
    )

    def ask() -> None:
        study.sampler = bayes(settings)
        study.ask(parameters)

    return ask


def proposals(repeat: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds per proposal, fit included: CPU and wall time of each repetition."""
    found: dict[str, dict[str, list[float]]] = {}
    for kind in ("free", "budget"):
        rank_space = space(32, budget=kind == "budget")
        rng = np.random.default_rng(RANDOM_STATE)
        rows = rank_space.sample(OBSERVATIONS, rng)
        values = np.log(rows) @ rng.normal(size=32) + rng.normal(size=OBSERVATIONS)
        tried = {tuple(row) for row in rows.tolist()}

        def propose(build: Callable[[], ProposingModel]) -> None:
            model = build()
            model.fit(rows, values)  # noqa: B023 - called within this turn of the loop
            model.propose(np.random.default_rng(RANDOM_STATE), tried=tried)  # noqa: B023

        ways: dict[str, Callable[[], object]] = {
            "model": partial(propose, partial(BayesianRegression, rank_space)),
            "sampler bayes": asker(rank_space, rows, values),
        }
        for way, call in ways.items():
            call()
            times = found[f"{way}, {kind}"] = {"cpu": [], "wall": []}
            for _ in range(repeat):
                cpu, wall = time.process_time(), time.perf_counter()
                call()
                times["cpu"].append(1e3 * (time.process_time() - cpu))
                times["wall"].append(1e3 * (time.perf_counter() - wall))
    return found


def show(rates: list[Rate]) -> float:
    """Prints rates as shares of the limit, and returns the limit, in allocations per second."""
    limit = max(statistics.median(rate.cpu) for rate in rates if rate.name.startswith("limit"))
    print("| way | per CPU second | per second | share of the limit | 10^9 take, CPU min |")
    print("| --- | --: | --: | --: | --: |")
    for rate in rates:
        cpu, wall = statistics.median(rate.cpu), statistics.median(rate.wall)
        print(
            f"| {rate.name} | {cpu / 1e6:.3g} M | {wall / 1e6:.3g} M | {cpu / limit:.1%} "
            f"| {1e9 / cpu / 60:.3g} |"
        )
    return limit


def show_proposals(times: dict[str, dict[str, list[float]]]) -> None:
    """Prints milliseconds per proposal."""

    def cell(values: list[float]) -> str:
        return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    print(f"\n| fit and propose, {OBSERVATIONS} observations, 32 layers | CPU ms | ms |")
    print("| --- | --: | --: |")
    for way, found in times.items():
        print(f"| {way} | {cell(found['cpu'])} | {cell(found['wall'])} |")


def whole(free: RankSpace, model: MLPPerformanceModel, count: int) -> dict[str, Any]:
    """Really scans so many."""
    cpu, wall = time.process_time(), time.perf_counter()
    _, mean = best_of_random(free, model, count, np.random.default_rng(RANDOM_STATE))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(
        f"\n10^{len(str(count)) - 1} allocations: {wall:.1f} s, {cpu:.1f} s of CPU "
        f"time; best predicted {mean:.3f}"
    )
    return {"count": count, "wall": wall, "cpu": cpu, "mean": mean}


def processor() -> str:
    """Returns the name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def main() -> None:
    """Measures, prints tables and writes all values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2**21, help="allocations per measurement")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--billion", action="store_true", help="scan 10^9 allocations as well")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    free = space(LAYERS)
    rng = np.random.default_rng(RANDOM_STATE)
    rows = free.sample(OBSERVATIONS, rng)
    model = MLPPerformanceModel(free, CONFIG, RANDOM_STATE)
    model.fit(rows, np.log(rows) @ rng.normal(size=LAYERS))
    rates = [
        *limits(),
        *scans(model, options.count),
    ]
    for number in range(options.repeat):
        order = rates[number % len(rates) :] + rates[: number % len(rates)]
        for rate in order:
            rate.measure()
    machine = f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}; {options.repeat} repetitions, load {os.getloadavg()[0]:.1f}\n")
    limit = show(rates)
    scanned = [
        whole(free, model, count) for count in (10**8, *((10**9,) if options.billion else ()))
    ]
    times = proposals(4 * options.repeat)
    show_proposals(times)
    result = {
        "date": date.today().isoformat(),
        "machine": machine,
        "load": os.getloadavg()[0],
        "versions": {package: version(package) for package in ("numpy", "torch", "optuna")},
        "operations": OPERATIONS,
        "count": options.count,
        "limit": limit,
        "rates": {rate.name: {"cpu": rate.cpu, "wall": rate.wall} for rate in rates},
        "whole": scanned,
        "proposals": times,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"candidate_speed-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
