"""What the layout of the batches costs, and candidates per pass: one optimizer step, side by side.

    OMP_NUM_THREADS=1 python benchmarks/layouts.py

Two cases: the embedded default, whose sequences are short and nearly alike, and the pruned story
model of ``examples/stories260k.toml`` with rows of Alpaca, of very uneven lengths. The second one
needs ``../shared`` and is left out without it. Steps of 64 sequences, with 4, 16 and 64 per pass.

Ways take turns. In each turn a way makes a few steps of the same fine-tune, from the same weights
on the same sequences; the first step only warms up, the median of the others counts. Each way is
divided by `sorted` of the same turn and the same number of sequences per pass; candidates per pass
count per candidate. The losses of all steps are compared too: they may differ by rounding alone.
Printed and written to ``results/layouts-DATE.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from datetime import date
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from embedded_default import processor
from transformers.utils import logging as transformers_logging

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.run_file import EMBEDDED_RUN_FILE
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.models.base_model import load_model
from rankadaptor_plugin.pipeline.preparation import prepare
from rankadaptor_plugin.plugins import plugin_manager
from rankadaptor_plugin.recovery.adapters import rank_space
from rankadaptor_plugin.recovery.batches import batches, passes
from rankadaptor_plugin.recovery.candidates import train_together
from rankadaptor_plugin.recovery.methods import methods as recovery_methods
from rankadaptor_plugin.recovery.training import MicroBatch, train

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

    from rankadaptor_plugin.config.tables import RecoveryConfig, RunConfig
    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.corpus.sequences import TrainingSequence

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STORIES = ROOT / "examples" / "stories260k.toml"
ALPACA = ROOT.parent / "shared" / "data" / "instruct" / "alpaca_random_9k.json"
PACKAGES = ("torch", "transformers", "peft")
SORTED = "sorted"
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to make an optimizer step: layout, sequences and candidates per pass."""

    layout: str
    size: int
    together: int = 1

    def __str__(self) -> str:
        """Names it in the table."""
        return f"{self.together} candidates" if self.together > 1 else self.layout


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a way took: wall and CPU seconds of a step of a candidate, the losses of the first."""

    wall: float
    cpu: float
    losses: list[float]


class Clock:
    """Takes wall and CPU time at the end of each step."""

    def __init__(self) -> None:
        self._ticks: list[tuple[float, float]] = []

    def tick(self, *_: object) -> bool:
        """Notes the end of a step."""
        self._ticks.append((time.perf_counter(), time.process_time()))
        return True

    def turn(self, losses: list[float], candidates: int) -> Turn:
        """Returns the medians of the steps, the first left out."""
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(self._ticks)]
        wall, cpu = (
            statistics.median(seconds) / candidates for seconds in zip(*steps, strict=True)
        )
        return Turn(wall, cpu, losses)


@dataclasses.dataclass(frozen=True)
class Case:
    """A pruned model, what it is fine-tuned on, and ranks of equal sum for as many candidates."""

    model: PreTrainedModel
    sequences: Sequence[TrainingSequence]
    config: RecoveryConfig
    allocations: list[RankAllocation]

    def turn(self, way: Way, steps: int) -> Turn:
        """Makes a few steps."""
        config = dataclasses.replace(self.config, layout=way.layout, micro_batch_size=way.size)
        clock = Clock()
        if way.together > 1:
            candidates = [(allocation, _SEED) for allocation in self.allocations[: way.together]]
            trained = train_together(
                self.model, candidates, self.sequences, config, steps=steps, on_step=clock.tick
            )
            return clock.turn(trained[0].losses, way.together)
        tuned = recovery_methods.begin(
            self.model,
            recovery_methods.parse_method(recovery_methods.LORA),
            self.allocations[0],
            config,
            seed=_SEED,
            steps=steps,
            sequences=self.sequences,
        )
        order = batches(self.sequences, config.batch_size, _SEED)
        micro = MicroBatch.of(config)
        try:
            losses = train(tuned, order, config, steps, micro=micro, on_step=clock.tick)
        finally:
            tuned.model.unload()
        return clock.turn(losses, 1)

    def tokens(self, way: Way, steps: int) -> float:
        """Returns the tokens that a step of a candidate computes, padding included."""
        count = 0
        for batch in islice(batches(self.sequences, self.config.batch_size, _SEED), steps):
            ordered = sorted(batch, key=lambda s: -len(s.tokens)) if way.together > 1 else batch
            layout = "padded" if way.together > 1 else way.layout
            count += sum(p.inputs["input_ids"].numel() for p in passes(ordered, layout, way.size))
        return count / steps


def case(config: RunConfig, candidates: int) -> Case:
    """Prunes as a run does, and draws allocations within the budget of uniform LoRA."""
    with tempfile.TemporaryDirectory() as scratch:
        config = dataclasses.replace(config, output=str(Path(scratch) / "run"), device="cpu")
        folder = RunFolder(Path(config.output))
        with folder.opened():
            manager = plugin_manager(third_party=False)
            prepared = prepare(config, manager, folder, None, time.perf_counter())
        torch.manual_seed(config.seed)
        base = load_model(prepared.source, device=prepared.device, dtype=prepared.dtype)
        pruned = prepared.pruner(base, prepared.tokenizer, prepared.calibration, config.prune)
    space = rank_space(pruned.model, pruned.pruned_layers, config.rank_space, config.recovery)
    rows = space.sample(candidates, np.random.default_rng(_SEED))
    return Case(
        pruned.model,
        prepared.context.corpus.sequences,
        config.recovery,
        [space.within_budget(space.allocation(row), _SEED) for row in rows.tolist()],
    )


def configs(batch_size: int) -> Iterator[tuple[str, RunConfig]]:
    """Yields the embedded default, and the story model if it is there."""
    for name, path in (("embedded", EMBEDDED_RUN_FILE), ("stories260K", STORIES)):
        config = run_file.load(path)
        if name == "stories260K":
            if not ALPACA.is_file():
                return
            corpus = dataclasses.replace(
                config.corpus,
                path=str(ALPACA),
                template="plain",
                max_length=256,
                max_train_samples=2000,
            )
            config = dataclasses.replace(config, corpus=corpus)
        recovery = dataclasses.replace(config.recovery, batch_size=batch_size)
        yield name, dataclasses.replace(config, recovery=recovery)


def measure(measured: Case, ways: Sequence[Way], steps: int, turns: int) -> dict[str, Any]:
    """Lets all ways take turns; returns what the results file holds of a case."""
    found: dict[Way, list[Turn]] = defaultdict(list)
    for _ in range(turns):
        for way in ways:
            found[way].append(measured.turn(way, steps))
    lengths = sorted(len(sequence.tokens) for sequence in measured.sequences)
    rows = []
    for way, own in found.items():
        plain = found[Way(SORTED, way.size)]
        rows.append(
            {
                **dataclasses.asdict(way),
                "tokens": measured.tokens(way, steps),
                "loss_difference": max(
                    abs(a - b) for a, b in zip(own[0].losses, plain[0].losses, strict=True)
                ),
                **{
                    clock: {
                        "seconds": statistics.median(getattr(turn, clock) for turn in own),
                        "ratios": [
                            getattr(turn, clock) / getattr(other, clock)
                            for turn, other in zip(own, plain, strict=True)
                        ],
                    }
                    for clock in ("wall", "cpu")
                },
            }
        )
    return {
        "sequences": len(lengths),
        "lengths": {
            "lowest": lengths[0],
            "median": statistics.median(lengths),
            "highest": lengths[-1],
        },
        "ranks": [list(allocation.ranks) for allocation in measured.allocations],
        "ways": rows,
    }


def show(name: str, result: dict[str, Any]) -> None:
    """Prints the table of a case."""

    def cell(found: dict[str, Any]) -> str:
        ratios = found["ratios"]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    lengths = result["lengths"]
    print(
        f"{name}: {result['sequences']} sequences of {lengths['lowest']} to {lengths['highest']} "
        f"tokens, median {lengths['median']:g}\n"
    )
    print("| per pass | way | tokens of a step | CPU s | CPU time | wall time | loss |")
    print("| --: | --- | --: | --: | --: | --: | --: |")
    for row in result["ways"]:
        way = Way(row["layout"], row["size"], row["together"])
        print(
            f"| {way.size} | {way} | {row['tokens']:,.0f} | {row['cpu']['seconds']:.3f} | "
            f"{cell(row['cpu'])} | {cell(row['wall'])} | {row['loss_difference']:.1e} |"
        )
    print()


def main() -> None:
    """Measures, prints the tables and writes all values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs="+", default=(4, 16, 64))
    parser.add_argument("--candidates", type=int, nargs="*", default=(2, 4))
    parser.add_argument("--steps", type=int, default=4, help="of a turn, the first one included")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    ways = [
        way
        for size in options.sizes
        for way in (
            *(Way(layout, size) for layout in (SORTED, "padded", "packed")),
            *(Way(SORTED, size, count) for count in options.candidates),
        )
    ]
    began = time.perf_counter()
    found = {
        name: measure(
            case(config, max(options.candidates, default=1)), ways, options.steps, options.turns
        )
        for name, config in configs(options.batch_size)
    }
    machine = f"{processor()}, 1 of {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}; steps of {options.batch_size} sequences, {options.turns} turns\n")
    for name, one in found.items():
        show(name, one)
    result = {
        "date": date.today().isoformat(),
        "machine": machine,
        "load_average": os.getloadavg(),
        "versions": {package: version(package) for package in PACKAGES},
        "options": vars(options),
        "seconds": time.perf_counter() - began,
        **found,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"layouts-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
