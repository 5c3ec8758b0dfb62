r"""Cost of a trial by part, compared with a process per fine-tune and per evaluation.

    OMP_NUM_THREADS=1 python benchmarks/trial_cost.py
    OMP_NUM_THREADS=1 python benchmarks/trial_cost.py benchmarks/run_files/stories260k.toml \
        --peer-trials 6

Ours is the search of the run file, the embedded default if left out, without noise floor and race:
one process, one model that stays in memory. The time is split into

* swap: the adapter is put in place of the one before,
* train,
* evaluate (the search documents),
* bookkeeping: everything else, such as proposals, the study and what is written.

The peers do the same work as it is done without this package: for each of the same allocations one
process that loads the pruned model, tokenizes the corpus, attaches LoRA with the same first
weights, trains on the same batches with transformers and PEFT and saves the adapter, and one that
asks lm-eval's own model of model and adapter about the same documents
(``trial_cost_peer.py``). Both take turns in blocks of trials; the clock of the search stands still
while the peers run. Pruning is left out on both sides, and the two scores of each trial are
compared. The peers know plain LoRA, and run files that search for nothing but ranks.
Writes ``results/trial_cost-MODEL-DATE.json``.
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
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]
import torch
from embedded_default import processor
from trial_cost_turns import Clocks, Peers, Turns

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.run_file import EMBEDDED_RUN_FILE
from rankadaptor_plugin.config.tables import EMBEDDED
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.models.checkpoints import load_model
from rankadaptor_plugin.models.pruned_model import load_pruned
from rankadaptor_plugin.pipeline.preparation import prepare
from rankadaptor_plugin.pipeline.stage import _Stage
from rankadaptor_plugin.plugins import plugin_manager

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rankadaptor_plugin.config.tables import RunConfig

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "lm-eval", "optuna")


def measure(config: RunConfig, block: int, repeated: int, batch_size: int) -> dict[str, Any]:
    """Searches and lets the peers repeat it.

    Args:
        config: The run.
        block: Trials between two turns of the peers.
        repeated: Trials that they repeat, the first ones.
        batch_size: lm-eval's.
    """
    folder, manager = RunFolder(Path(config.output)), plugin_manager(third_party=False)
    with folder.opened():
        prepared = prepare(config, manager, folder, None, time.perf_counter())
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            base = load_model(prepared.source, device=prepared.device, dtype=prepared.dtype)
            prepared.pruner(base, prepared.tokenizer, prepared.calibration, config.prune).save(
                folder.pruned
            )
        pruning = time.perf_counter() - began
        pruned = load_pruned(folder.pruned, device=prepared.device, dtype=prepared.dtype)
        start = time.time() - psutil.Process().create_time() - pruning
        peers = Peers(folder.path, folder.pruned, prepared, batch_size)
        turns = Turns(peers, block, repeated)
        manager.register(turns)
        began, cpu = time.perf_counter(), time.process_time()
        turns.begin()
        stage = _Stage(pruned, prepared.context)
        with Clocks() as clocks, stage.tuner.cleared():
            trials = stage.step.run(None).trials
        wall = time.perf_counter() - began - turns.paused
        cpu = time.process_time() - cpu - turns.paused_cpu
        turns.end_block()
    recovery = sum(trial.seconds.get("recovery", 0.0) for trial in trials)
    evaluation = sum(trial.seconds.get("oracle", 0.0) for trial in trials)
    parts = {
        "swap": clocks.swap,
        "train": recovery - clocks.swap,
        "evaluate": evaluation,
        "bookkeeping": wall - recovery - evaluation,
    }
    return {
        "trials": len(trials),
        "failed": sum(trial.score is None for trial in trials),
        "ours": {
            "wall": wall,
            "cpu": cpu,
            "parts": parts,
            "proposals": sum(trial.seconds.get("search", 0.0) for trial in trials),
            "start": start,
        },
        "by_trial": [
            {
                "ranks": list(trial.allocation.ranks),
                "wall": sum(trial.seconds.values()),
                "cpu": spent,
            }
            for trial, spent in zip(trials, turns.cpu, strict=True)
        ],
        "peers": peers.done,
    }


def peer_seconds(measured: dict[str, Any], clock: str) -> dict[int, float]:
    """Returns the seconds that the peers took, by trial; `clock` is ``"wall"`` or ``"cpu"``."""
    return {p["position"]: p["train"][clock] + p["evaluate"][clock] for p in measured["peers"]}


def ratios(measured: dict[str, Any]) -> dict[str, Any]:
    """Returns the peers' seconds per trial as multiples of ours."""
    wall, cpu = (peer_seconds(measured, clock) for clock in ("wall", "cpu"))
    theirs, trials = statistics.mean(wall.values()), measured["trials"]
    ours, by_trial = measured["ours"], measured["by_trial"]
    return {
        "peers_per_trial": theirs,
        "ours_per_trial": ours["wall"] / trials,
        "ratio": theirs * trials / ours["wall"],
        "ratio_with_start": theirs * trials / (ours["wall"] + ours["start"]),
        "ratio_cpu": statistics.mean(cpu.values()) * trials / ours["cpu"],
        "ratio_by_trial": [seconds / by_trial[p]["wall"] for p, seconds in wall.items()],
        "accuracy_difference": max(p["accuracy_difference"] for p in measured["peers"]),
        "clp_difference": max(p["clp_difference"] for p in measured["peers"]),
    }


def show(measured: dict[str, Any], found: dict[str, Any]) -> None:
    """Prints the tables."""
    ours, trials = measured["ours"], measured["trials"]
    print("| ours | seconds per trial | share |\n| --- | --: | --: |")
    for name, seconds in ours["parts"].items():
        print(f"| {name} | {seconds / trials:.3f} | {seconds / ours['wall']:.1%} |")
    print(f"| all | {ours['wall'] / trials:.3f} | |")
    print(
        f"\nOf the bookkeeping {ours['proposals'] / trials:.3f} s are proposals. "
        f"Start, once: {ours['start']:.1f} s.\n"
    )

    def row(name: str, values: Iterable[float]) -> None:
        several = list(values)
        print(
            f"| {name} | {statistics.mean(several):.3f} | {min(several):.3f} to "
            f"{max(several):.3f} |"
        )

    print("| peers | seconds per trial | lowest to highest |\n| --- | --: | --: |")
    for step in ("train", "evaluate"):
        row(f"{step} process", (p[step]["wall"] for p in measured["peers"]))
        for part in measured["peers"][0][step]["parts"]:
            row(f"... {part}", (p[step]["parts"][part] for p in measured["peers"]))
    row("all", (p["train"]["wall"] + p["evaluate"]["wall"] for p in measured["peers"]))
    low, high = min(found["ratio_by_trial"]), max(found["ratio_by_trial"])
    print(
        f"\nPeers take {found['ratio']:.1f} times as long as ours (by trial {low:.1f} to "
        f"{high:.1f}; {found['ratio_with_start']:.1f} times with our start; in CPU time "
        f"{found['ratio_cpu']:.1f} times). "
        f"{len(measured['peers'])} of {trials} trials were repeated; largest difference in a "
        f"task's accuracy {found['accuracy_difference']:.2g}, in its mean log-probability of the "
        f"right choice {found['clp_difference']:.2g} nats."
    )


def main() -> None:
    """Measures, prints the tables and writes all values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_file", type=Path, nargs="?", default=EMBEDDED_RUN_FILE)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--peer-trials", type=int, default=0, help="0: all")
    parser.add_argument("--block", type=int, default=1, help="trials between two turns")
    parser.add_argument("--batch-size", type=int, default=64, help="lm-eval's")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        config = run_file.load(options.run_file)
        config = dataclasses.replace(
            config,
            output=str(Path(scratch) / "run"),
            device="cpu",
            search=dataclasses.replace(config.search, n_trials=options.trials),
        )
        measured = measure(
            config, options.block, options.peer_trials or options.trials, options.batch_size
        )
    found = ratios(measured)
    machine = f"{processor()}, 1 of {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}; {measured['trials']} trials\n")
    show(measured, found)
    result = {
        "date": date.today().isoformat(),
        "machine": machine,
        "load_average": os.getloadavg(),
        "versions": {package: version(package) for package in PACKAGES},
        "options": {**vars(options), "run_file": options.run_file.name},
        **found,
        **measured,
    }
    RESULTS.mkdir(exist_ok=True)
    model = EMBEDDED if config.model == EMBEDDED else Path(config.model).name
    path = RESULTS / f"trial_cost-{model}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
