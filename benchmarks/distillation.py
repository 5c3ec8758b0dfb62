r"""Gain from the unpruned model as a teacher, at equal steps.

    OMP_NUM_THREADS=1 python benchmarks/distillation.py embedded
    OMP_NUM_THREADS=1 python benchmarks/distillation.py benchmarks/run_files/stories260k.toml \
        --model ../shared/models/stories260K --corpus ../shared/data/text/tinystories_train.jsonl

The model is pruned as the run file says, and recovered by uniform LoRA: without a teacher, and with
every weight and temperature, from the kept likeliest tokens and from a live teacher. All of them
are fine-tuned with the same seeds and batches, and scored on the report documents. Intervals have
seeds and documents random, and pair both (`rankadaptor_plugin.verdict.statistics`); 95 %, one by
one, so of many comparisons some are outside by chance. The first row of the table, without a
teacher, is what the others are compared with. Printed and written to
``results/distillation-NAME-DATE.json``.
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
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from embedded_default import processor

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.run_file import EMBEDDED_RUN_FILE
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.models.checkpoints import load_model
from rankadaptor_plugin.pipeline.preparation import prepare
from rankadaptor_plugin.plugins import plugin_manager
from rankadaptor_plugin.recovery import recover
from rankadaptor_plugin.recovery.slots import rank_space
from rankadaptor_plugin.recovery.teacher import LiveTeacher, with_teacher
from rankadaptor_plugin.verdict.statistics import Model, compare, mean_interval, model_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.core.scores import Score

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "lm-eval", "numpy")
METRICS = ("accuracy", "choice_logprob")
LIVE = 0  # kept tokens of a live teacher, as the run file writes it


def _model(scores: list[Score], metric: str) -> Model:
    return model_of(dict(enumerate(scores)), metric)


def mean_of(scores: list[Score], metric: str) -> dict[str, Any]:
    """Returns the mean over the tasks with its interval."""
    weights = dict.fromkeys(scores[0].tasks, 1.0)
    return mean_interval(_model(scores, metric), metric, weights).to_json()


def above(scores: list[Score], others: list[Score], metric: str) -> dict[str, Any]:
    """Returns the difference of the means over the tasks."""
    weights = dict.fromkeys(scores[0].tasks, 1.0)
    return compare(_model(scores, metric), _model(others, metric), metric, weights).to_json()


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to learn from the teacher, or none; fields as in the ``[recovery]`` table."""

    weight: float = 0.0
    temperature: float = 1.0
    top_k: int = LIVE

    def __str__(self) -> str:
        """Names it in the table."""
        if not self.weight:
            return "no teacher"
        source = f"top {self.top_k}" if self.top_k else "live"
        return f"weight {self.weight:g}, T {self.temperature:g}, {source}"


def arms(options: argparse.Namespace) -> Iterator[Arm]:
    """Yields no teacher first, then all combinations."""
    yield Arm()
    for values in product(options.weights, options.temperatures, options.top_k):
        yield Arm(*values)


def with_options(loaded: RunConfig, options: argparse.Namespace) -> RunConfig:
    """Returns the run file's settings with what the command line says otherwise."""
    return dataclasses.replace(
        loaded,
        model=options.model or loaded.model,
        corpus=dataclasses.replace(loaded.corpus, path=options.corpus or loaded.corpus.path),
        recovery=dataclasses.replace(
            loaded.recovery, max_steps=options.steps or loaded.recovery.max_steps
        ),
    )


def measure(loaded: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tunes and scores; returns what the results file holds."""
    with tempfile.TemporaryDirectory() as scratch:
        config = dataclasses.replace(loaded, output=str(Path(scratch) / "run"))
        folder = RunFolder(Path(config.output))
        with folder.opened():
            manager = plugin_manager(third_party=False)
            prepared = prepare(config, manager, folder, None, time.perf_counter())
        torch.manual_seed(config.seed)
        load = partial(load_model, device=prepared.device, dtype=prepared.dtype)
        base = load(prepared.source)
        pruned = prepared.pruner(base, prepared.tokenizer, prepared.calibration, config.prune)
        unpruned = load(prepared.source)
    oracle, corpus = prepared.context.oracle, prepared.context.corpus
    space = rank_space(pruned.model, pruned.pruned_layers, config.rank_space, config.recovery)
    before = {
        name: {m: mean_of([score], m) for m in METRICS}
        for name, model in (("unpruned", unpruned), ("pruned", pruned.model))
        for score in [oracle.score(model, "report")]
    }
    model: Any = pruned.model
    found: dict[Arm, list[Score]] = {}
    seconds: dict[Arm, list[float]] = {}
    predicting: dict[str, float] = {}
    for arm in arms(options):
        recovery = dataclasses.replace(
            config.recovery,
            distill_weight=arm.weight or 1.0,
            distill_temperature=arm.temperature,
            distill_top_k=arm.top_k,
        )
        taught, teacher = corpus, None
        if arm.weight and arm.top_k:
            began = time.perf_counter()
            taught = with_teacher(
                corpus,
                lambda: unpruned,
                fingerprint="",
                top_k=arm.top_k,
                temperature=arm.temperature,
                cache=None,
            )
            predicting[str(arm)] = time.perf_counter() - began
        elif arm.weight:
            teacher = LiveTeacher(unpruned)
        found[arm], seconds[arm] = [], []
        for seed in range(options.seeds):
            recovered = recover(
                model,
                prepared.tokenizer,
                space.uniform(),
                taught,
                recovery,
                seed=seed,
                method="distill" if arm.weight else "lora",
                teacher=teacher,
            )
            model = recovered.model
            found[arm].append(oracle.score(model, "report"))
            seconds[arm].append(recovered.seconds)
    plain = found[Arm()]
    return {
        "steps": config.recovery.max_steps,
        "seeds": options.seeds,
        "before": before,
        "seconds_of_predictions": predicting,
        "arms": [
            {
                "name": str(arm),
                **dataclasses.asdict(arm),
                "seconds": statistics.median(seconds[arm]),
                "per_seed": {m: [score.mean(m) for score in scores] for m in METRICS},
                "mean": {m: mean_of(scores, m) for m in METRICS},
                "above_none": {m: above(scores, plain, m) for m in METRICS},
            }
            for arm, scores in found.items()
        ],
        "top_k_above_live": {
            str(arm): {m: above(scores, found[live], m) for m in METRICS}
            for arm, scores in found.items()
            if arm.weight and arm.top_k
            for live in [dataclasses.replace(arm, top_k=LIVE)]
            if live in found
        },
    }


def show(result: dict[str, Any]) -> None:
    """Prints the tables."""

    def cell(found: dict[str, float]) -> str:
        return f"{found['estimate']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"

    for name, score in result["before"].items():
        print(f"{name}: " + ", ".join(f"{m} {score[m]['mean']:.4f}" for m in METRICS))
    print("\n| fine-tune | accuracy | above none | choice_logprob | above none | s per fine-tune |")
    print("| --- | --: | --: | --: | --: | --: |")
    for arm in result["arms"]:
        means = (f"{arm['mean'][m]['mean']:.4f} | {cell(arm['above_none'][m])}" for m in METRICS)
        print(f"| {arm['name']} | {' | '.join(means)} | {arm['seconds']:.2f} |")
    print(
        "\n| kept tokens, above a live teacher | accuracy | choice_logprob |\n| --- | --: | --: |"
    )
    for name, row in result["top_k_above_live"].items():
        print(f"| {name} | {' | '.join(cell(row[m]) for m in METRICS)} |")


def main() -> None:
    """Measures, prints the tables and writes all values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_file", help='a run file, or "embedded"')
    parser.add_argument("--name", default="", help="in the name of the results file")
    parser.add_argument("--model", default="", help="another model than that of the run file")
    parser.add_argument("--corpus", default="", help="another corpus than that of the run file")
    parser.add_argument("--steps", type=int, default=0, help="0 takes that of the run file")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--weights", type=float, nargs="+", default=(0.5, 1.0))
    parser.add_argument("--temperatures", type=float, nargs="+", default=(1.0, 2.0))
    parser.add_argument(
        "--top-k", type=int, nargs="+", default=(LIVE, 8), help="kept tokens; 0 is a live teacher"
    )
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    embedded = options.run_file == "embedded"
    path = EMBEDDED_RUN_FILE if embedded else Path(options.run_file)
    name = options.name or ("embedded" if embedded else path.stem)
    began = time.perf_counter()
    measured = measure(with_options(run_file.load(path), options), options)
    machine = f"{processor()}, 1 of {os.cpu_count()} cores, Python {platform.python_version()}"
    result = {
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": {package: version(package) for package in PACKAGES},
        "seconds": time.perf_counter() - began,
        **measured,
    }
    print(f"{machine}; {options.seeds} seeds, {measured['steps']} steps\n")
    show(result)
    RESULTS.mkdir(exist_ok=True)
    written = RESULTS / f"distillation-{name}-{date.today().isoformat()}.json"
    written.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
