"""Time of one trial's evaluation outside the model: the oracle beside plain lm-eval.

    OMP_NUM_THREADS=1 python benchmarks/oracle_speed.py
    OMP_NUM_THREADS=1 python benchmarks/oracle_speed.py --model MODEL --data DATA --max-length 512

MODEL and DATA are those of ``lm_eval_equality.py``; without them the embedded model is asked the
tiny tasks. The model is pruned by half and has a LoRA adapter, as in a search. Four ways to score
it on the same documents take turns, in another order each time:

* ours: ``LmEvalOracle.score``, with the adapter fused as a run scores one; the oracle is built
  before the first trial;
* names: ``lm_eval.simple_evaluate`` with the names of the tasks, built anew in every call;
* objects: ``lm_eval.simple_evaluate`` with the loaded tasks;
* lean: ``lm_eval.evaluate`` with the loaded tasks and without samples. ``simple_evaluate`` asks
  pip for all installed packages in every call; who scores many models can leave that out.

In lm-eval's favor its task manager and its ``HFLM`` are built before the first trial as well, and
the data are cut to one document more than is asked. Hooks before and after the forward pass take
its time, on a GPU after a synchronization; what is left is the time outside. On a CPU all times are
CPU seconds. The
model's output layer is within the pass: the oracle saves some of it by asking for fewer logits,
which counts for the whole time alone. Ratios are those of one repetition, given as median and
range. Writes ``results/oracle_speed-DATE.json``; the name of a model becomes part of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
import torch
from embedded_default import processor
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval_equality import (
    BENCHMARKS,
    PACKAGES,
    RESULTS,
    WHOLE,
    copy_rows,
    fused_score,
    largest,
    oracle,
    our_values,
    random_adapter,
    stock_values,
)
from tiny.tinyworld import TASKS

from rankadaptor_plugin.config.run_file import model_folder
from rankadaptor_plugin.models.checkpoints import load_model, load_tokenizer
from rankadaptor_plugin.models.device import device_name, resolve_device, resolve_dtype
from rankadaptor_plugin.pruning.width import prune_width
from rankadaptor_plugin.tasks import task_dir

if TYPE_CHECKING:
    from collections.abc import Callable

OURS = "ours"


@dataclass
class Cost:
    """Seconds of one evaluation, and its forward passes."""

    total: float = 0.0
    forward: float = 0.0
    passes: int = 0
    tokens: int = 0

    @property
    def outside(self) -> float:
        """Seconds outside the forward passes."""
        return self.total - self.forward


class Watch:
    """Takes the time of a model's forward passes."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._device, self._cost, self._began = device, Cost(), 0.0
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after)

    def run(self, evaluate: Callable[[], object]) -> Cost:
        """Evaluates once."""
        gc.collect()
        self._cost = Cost()
        began = self._now()
        evaluate()
        cost, self._cost = self._cost, Cost()  # what runs without the watch does not count
        cost.total = self._now() - began
        return cost

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return time.perf_counter()
        return time.process_time()

    def _before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs["input_ids"]
        self._cost.passes += 1
        self._cost.tokens += tokens.numel()
        self._began = self._now()

    def _after(self, *_: Any) -> None:
        self._cost.forward += self._now() - self._began


def ratios(costs: dict[str, list[Cost]], way: str, name: str) -> list[float]:
    """Returns what another way took as a multiple of ours, by repetition."""
    pairs = zip(costs[way], costs[OURS], strict=True)
    return [getattr(theirs, name) / getattr(ours, name) for theirs, ours in pairs]


def show(costs: dict[str, list[Cost]]) -> None:
    """Prints medians and ranges."""

    def cell(values: list[float], form: str) -> str:
        low, middle, high = (f(values) for f in (min, statistics.median, max))
        return f"{middle:{form}} ({low:{form}} to {high:{form}})"

    print("| way | total s | forward s | outside s | outside / ours | total / ours | tokens |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for way, found in costs.items():
        seconds = (
            cell([getattr(c, n) for c in found], ".3f") for n in ("total", "forward", "outside")
        )
        times = (cell(ratios(costs, way, n), ".1f") for n in ("outside", "total"))
        print(f"| {way} | {' | '.join(seconds)} | {' | '.join(times)} | {found[0].tokens} |")


def main() -> None:
    """Measures, prints a table and writes all values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", type=Path, help="copies of the seven benchmarks")
    parser.add_argument("--documents", type=int, default=100, help="per task")
    parser.add_argument("--max-length", type=int, default=0, help="0 takes the model's limit")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="of the oracle")
    parser.add_argument("--batch-size", type=int, default=16, help="of lm-eval")
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    device = resolve_device(options.device)
    source = model_folder(options.model)
    tokenizer = load_tokenizer(source)
    base = load_model(source, device=device, dtype=resolve_dtype(options.dtype, device))
    model = random_adapter(prune_width(base, tokenizer, [], WHOLE).model)
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        rows = options.documents + 1
        if options.data:
            folder, data_dir = task_dir(), str(data)
            copy_rows(options.data, data, rows)
        else:
            folder, data_dir = Path(scratch) / "tasks", ""
            shutil.copytree(task_dir() / "tiny", folder)
            copy_rows(task_dir() / "tiny" / "data", folder / "data", rows)
        names = [f"rankadaptor_{b}" for b in BENCHMARKS] if options.data else list(TASKS)
        began = time.perf_counter()
        asked = oracle(
            names,
            tokenizer,
            task_path=folder,
            data_dir=data_dir,
            documents=options.documents,
            max_length=options.max_length,
            batch_tokens=options.batch_tokens,
        )
        once = {"oracle": time.perf_counter() - began}
        began = time.perf_counter()
        manager = TaskManager(
            include_path=str(folder), include_defaults=False, metadata={"data_dir": data_dir}
        )
        once["task manager"] = time.perf_counter() - began
        loaded = manager.load(names)["tasks"]
        ids = asked.describe()["documents"]["report"]
        length = options.max_length or None
        lm = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size, max_length=length
        )
        plain = partial(lm_eval.simple_evaluate, model=lm, task_manager=manager, samples=ids)
        ways: dict[str, Callable[[], object]] = {
            OURS: partial(fused_score, asked, model),
            "names": lambda: plain(tasks=names),
            "objects": lambda: plain(tasks=list(loaded.values())),
            "lean": lambda: lm_eval.evaluate(
                lm, {"tasks": loaded, "groups": {}}, samples=ids, log_samples=False
            ),
        }
        watch = Watch(model, device)
        first = {way: watch.run(evaluate) for way, evaluate in ways.items()}
        costs: dict[str, list[Cost]] = {way: [] for way in ways}
        for number in range(options.repeat):
            order = [*ways]
            for way in order[number % len(ways) :] + order[: number % len(ways)]:
                costs[way].append(watch.run(ways[way]))
        ours, theirs = our_values(asked, model, loaded), stock_values(lm, loaded, ids)
    differing = [n for n in names if any(ours[n][0][m] != v for m, v in theirs[n][0].items())]
    difference = max(largest(ours[n][1], theirs[n][1]) for n in names)
    machine = f"{processor()}, 1 of {os.cpu_count()} cores, Python {platform.python_version()}"
    if device.type == "cuda":
        machine = f"{device_name(device)}; {machine}"
    counts = [len(found) for found in ids.values()]
    print(f"{machine}; {sum(counts)} documents; {options.repeat} repetitions\n")
    show(costs)
    print(
        f"\nOnce: building the oracle {once['oracle']:.2f} s, its first score "
        f"{first[OURS].total:.2f} s. Accuracies that differ: {', '.join(differing) or 'none'}; "
        f"largest difference of a log-likelihood {difference:.1e}."
    )
    result = {
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": {package: version(package) for package in PACKAGES},
        "model": source.name if options.model != "embedded" else "embedded",
        "documents": counts,
        **{
            key: getattr(options, key)
            for key in ("max_length", "batch_tokens", "batch_size", "dtype")
        },
        "once": once,
        "first": {way: asdict(cost) for way, cost in first.items()},
        "costs": {way: [asdict(cost) for cost in found] for way, found in costs.items()},
        "ratios": {
            way: {name: ratios(costs, way, name) for name in ("outside", "forward", "total")}
            for way in costs
            if way != OURS
        },
        "differing": differing,
        "largest_difference": difference,
    }
    RESULTS.mkdir(exist_ok=True)
    part = "" if options.model == "embedded" else f"-{source.name}"
    path = RESULTS / f"oracle_speed{part}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
