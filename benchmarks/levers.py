r"""What each lever of recovery gives on one pruned model: rate, compensation, distillation, init.

    python benchmarks/levers.py RUN.toml lora@1e-4 lora@4e-3 none+compensate compensate@4e-3 \
        --name NAME --seeds 2

The run file names model, pruning, corpus, tasks and the steps of a fine-tune; an arm is a recovery
method (docs/methods.md) at a learning rate, with uniform ranks, so that all arms train the same
matrices at the same ranks for the same number of steps. ``none`` is the pruned model,
``none+compensate`` the compensated one. The first arm is what the others are compared with.

Every model is scored on the report documents of the tasks, by the loss per trained token on rows of
the corpus that no fine-tune saw, and, with ``--text``, by the perplexity of running text. Intervals
are 95 %, over seeds and documents (rows, windows), paired, one by one.

Every model is one file below ``--work``, so an interrupted measurement goes on where it was. The
result is printed as a table and written to ``results/levers-NAME-DATE.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import math
import os
import platform
import statistics
import time
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from embedded_default import processor
from scipy.stats import rankdata
from transformers.utils import logging as transformers_logging

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.tables import OracleConfig
from rankadaptor_plugin.core.document_results import read_documents, with_documents, write_documents
from rankadaptor_plugin.core.files import write_file
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.core.scores import LOG_LIKELIHOOD, METRICS, Score, TaskScore
from rankadaptor_plugin.models.checkpoints import load_model
from rankadaptor_plugin.models.device import attending, faster_attention
from rankadaptor_plugin.models.pruned_model import PrunedModel, load_pruned
from rankadaptor_plugin.models.structures import decoder_layers
from rankadaptor_plugin.oracle.oracle import OracleSettings
from rankadaptor_plugin.oracle.perplexity import PerplexityOracle
from rankadaptor_plugin.pipeline.base_model import BaseModel
from rankadaptor_plugin.pipeline.compensation_step import compensated
from rankadaptor_plugin.pipeline.preparation import Prepared, prepare
from rankadaptor_plugin.plugins import plugin_manager
from rankadaptor_plugin.recovery import LiveTeacher, recover
from rankadaptor_plugin.recovery.adapters import bare_model, base_of
from rankadaptor_plugin.recovery.batches import passes, trained_tokens
from rankadaptor_plugin.recovery.fused_lora import fused
from rankadaptor_plugin.recovery.memory import MicroBatch
from rankadaptor_plugin.recovery.methods.methods import parse_method
from rankadaptor_plugin.recovery.training import mean_loss
from rankadaptor_plugin.verdict.noise_floor import reliability
from rankadaptor_plugin.verdict.statistics import Model, compare, mean_interval, model_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from rankadaptor_plugin.pruning.compensation import Compensation

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "lm-eval")
UNTRAINED = "none"
ROWS, TEXT = "held-out rows", "text"
GROUP = 5
"""Held-out rows that count as one document: single ones have too few tokens."""


@dataclass(frozen=True)
class Arm:
    """A recovery method at a learning rate.

    Attributes:
        method: The method, as in run files.
        rate: Learning rate; 0 for what is not trained.
    """

    method: str
    rate: float

    @classmethod
    def of(cls, text: str) -> Arm:
        """Reads ``METHOD@RATE``."""
        method, _, rate = text.partition("@")
        return cls(method, float(rate or 0))

    def __str__(self) -> str:
        return f"{self.method}@{self.rate:g}" if self.rate else self.method


class Bench:
    """The measurement: models by name, each measured once and kept in a file.

    Args:
        options: Those of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.work: Path = options.work / options.name
        settings = [*options.settings, f"corpus.val_set_size={options.held_out}"]
        self.config = replace(
            run_file.load(options.run_file, settings), output=str(self.work / "run")
        )
        self.folder = RunFolder(Path(self.config.output))
        with self.folder.opened():
            manager = plugin_manager(third_party=False)
            self.prepared: Prepared = prepare(
                self.config, manager, self.folder, None, time.perf_counter()
            )
        corpus = self.prepared.context.corpus
        self.held_out = corpus.validation
        self.corpus = replace(corpus, validation=[])  # looked at once, at the end
        self.text = options.text and PerplexityOracle(
            OracleSettings(
                config=OracleConfig(
                    name="perplexity",
                    text=str(options.text.resolve()),
                    max_length=256,
                    report_documents=60,
                    batch_tokens=2048,
                ),
                tokenizer=self.prepared.tokenizer,
                task_paths=(),
                seed=0,
                purposes=("report",),
            )
        )
        self.pruned = self._pruned()
        rows = passes(self.corpus.sequences[:2], 2)[0].input_ids
        self.attention = faster_attention(self.pruned.model, rows)
        self.resident: Any = self.pruned.model
        self.weights = contextlib.ExitStack()

    def base(self) -> PreTrainedModel:
        """Loads the unpruned model."""
        return load_model(
            self.prepared.source, device=self.prepared.device, dtype=self.prepared.dtype
        )

    @cached_property
    def teacher(self) -> LiveTeacher:
        """The unpruned model."""
        return LiveTeacher(self.base())

    @cached_property
    def compensation(self) -> Compensation:
        """The compensated weights."""
        base = BaseModel(self.base, self.prepared.device)
        return compensated(self.pruned, base, self.prepared.context, self.folder)

    def _pruned(self) -> PrunedModel:
        """Prunes the model the first time, and loads it."""
        if not self.folder.pruned.is_dir():
            torch.manual_seed(self.config.seed)
            cut = self.prepared.pruner(
                self.base(), self.prepared.tokenizer, self.prepared.calibration, self.config.prune
            )
            cut.save(self.folder.pruned)
        return load_pruned(
            self.folder.pruned, device=self.prepared.device, dtype=self.prepared.dtype
        )

    def measured(self, name: str, model: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
        """Measures a model, unless its file is there."""
        file = self.work / f"{name}.json"
        if file.exists():
            return
        loaded, facts = model()
        oracle = self.prepared.context.oracle
        with fused(base_of(loaded)):
            write_documents(file.with_suffix(".search.parquet"), oracle.score(loaded, "search"))
            began = time.process_time()
            score = oracle.score(loaded, "report")
            facts["evaluation_cpu_seconds"] = time.process_time() - began
            likelihoods = {ROWS: self._likelihoods(base_of(loaded))}
            if self.text:
                text = self.text.score(loaded, "report")
                likelihoods |= {TEXT: next(iter(text.tasks.values()))}
        write_documents(file.with_suffix(".tasks.parquet"), score)
        write_documents(file.with_suffix(".text.parquet"), Score(tasks=likelihoods))
        content = {
            "name": name,
            **facts,
            "tasks": score.to_json(),
            "text": Score(tasks=likelihoods).to_json(),
        }
        write_file(file, lambda partial: partial.write_text(json.dumps(content, indent=1), "utf-8"))
        print(name, {k: v for k, v in facts.items() if isinstance(v, float)}, flush=True)

    def _likelihoods(self, model: PreTrainedModel) -> TaskScore:
        """Returns the log-likelihood of held-out rows, per trained token, by group of rows."""
        ordered = sorted(self.held_out, key=lambda sequence: len(sequence.tokens))
        groups = [ordered[at : at + GROUP] for at in range(0, len(ordered), GROUP)]
        mean = trained_tokens(self.held_out) / len(groups)
        values = [
            -mean_loss(model, group, MicroBatch(GROUP)) * trained_tokens(group) / mean
            for group in groups
        ]
        return TaskScore.of({LOG_LIKELIHOOD: values}, keys=[str(i) for i in range(len(groups))])

    def arm(self, arm: Arm, seed: int) -> tuple[Any, dict[str, Any]]:
        """Fine-tunes an arm; the next one takes its place."""
        began = time.process_time()
        method = parse_method(arm.method)
        self.resident = bare_model(self.resident)
        self.weights.close()
        if method.compensate:
            self.weights.enter_context(self.compensation.applied(self.resident))
        uniform = RankAllocation(
            (self.config.rank_space.default_rank,) * len(decoder_layers(self.resident))
        )
        with attending(self.resident, self.attention):
            result = recover(
                self.resident,
                self.prepared.tokenizer,
                uniform,
                self.corpus,
                replace(self.config.recovery, learning_rate=arm.rate),
                seed,
                method=str(replace(method, compensate=False)),
                teacher=self.teacher if method.distill else None,
            )
        self.resident = result.model
        return self.resident, {
            "seed": seed,
            "train_loss": result.train_loss,
            "cpu_seconds": time.process_time() - began,
            "trained": sum(p.numel() for p in result.model.parameters() if p.requires_grad),
        }

    def all(self, arms: Sequence[Arm], seeds: int) -> None:
        """Measures the unpruned model, and all arms seed by seed."""
        self.measured("base", lambda: (self.base(), {}))
        for seed in range(seeds):
            for arm in arms:
                if seed and not arm.rate:
                    continue
                self.measured(f"{arm}-{seed}", lambda arm=arm, seed=seed: self.arm(arm, seed))


def row_of(folder: Path, names: Sequence[str], weights: dict[str, float]) -> Row:
    """Returns the measurements of an arm, one file per seed."""
    files = [json.loads((folder / f"{name}.json").read_text("utf-8")) for name in names]
    scores = [
        Score(
            tasks={
                **with_documents(
                    Score.from_json(file["tasks"]), folder / f"{name}.tasks.parquet"
                ).tasks,
                **with_documents(
                    Score.from_json(file["text"]), folder / f"{name}.text.parquet"
                ).tasks,
            }
        )
        for name, file in zip(names, files, strict=True)
    ]
    return Row(files, dict(enumerate(scores)), weights)


@dataclass(frozen=True)
class Row:
    """An arm's measurements.

    Attributes:
        files: Contents of its files.
        scores: Scores by seed.
        weights: Weight of each task in the mean.
    """

    files: list[dict[str, Any]]
    scores: dict[int, Score]
    weights: dict[str, float]

    def values(self, metric: str) -> tuple[Model, dict[str, float]]:
        """Returns the values per document of a metric, and what it is averaged over."""
        if metric in (ROWS, TEXT):
            return model_of(self.scores, LOG_LIKELIHOOD), {metric: 1.0}
        return model_of(self.scores, metric), self.weights

    def mean(self, metric: str) -> dict[str, Any]:
        """Returns its mean with interval."""
        model, weights = self.values(metric)
        return mean_interval(model, _metric(metric), weights).to_json()

    def above(self, other: Row, metric: str) -> dict[str, Any]:
        """Returns the paired difference from another arm."""
        (ours, weights), (theirs, _) = self.values(metric), other.values(metric)
        return compare(ours, theirs, _metric(metric), weights).to_json()


def _metric(metric: str) -> str:
    return LOG_LIKELIHOOD if metric in (ROWS, TEXT) else metric


def report(options: argparse.Namespace, bench: Bench, arms: Sequence[Arm]) -> None:
    """Prints the table and writes all values."""
    weights = bench.prepared.context.oracle.weights("report")
    metrics = ["accuracy", "gold_logprob", ROWS, *([TEXT] if options.text else [])]
    names = {"base": ["base"]}
    for arm in arms:
        names[str(arm)] = [f"{arm}-{seed}" for seed in range(options.seeds if arm.rate else 1)]
    rows = {name: row_of(bench.work, files, weights) for name, files in names.items()}
    first = rows[str(arms[0])]
    table: dict[str, Any] = {}
    for name, row in rows.items():
        facts = ("cpu_seconds", "evaluation_cpu_seconds", "train_loss", "trained")
        table[name] = {fact: [file.get(fact) for file in row.files] for fact in facts}
        for metric in metrics:
            table[name][metric] = {"mean": row.mean(metric)}
            if row is not first:
                table[name][metric]["above_first"] = row.above(first, metric)
    header = ["arm", "accuracy, %", "gold_logprob", "loss on held-out rows"]
    header += ["text perplexity"] if options.text else []
    header += [f"minus {arms[0]}: points", "loss", "CPU s"]
    print("| " + " | ".join(header) + " |")
    print("| --- |" + " --: |" * (len(header) - 1))
    for name, entry in table.items():
        print(_line(name, entry, bool(options.text)))
    judges = judged_scores(options, bench, [arm for arm in arms if arm.rate])
    result = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "command": {
            "run_file": options.run_file.name,
            "set": [setting for setting in options.settings if "/" not in setting],
            "seeds": options.seeds,
        },
        "arms": table,
        "scores": judges,
    }
    path = RESULTS / f"levers-{options.name}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def judged_scores(
    options: argparse.Namespace, bench: Bench, arms: Sequence[Arm]
) -> dict[str, dict[str, Any]]:
    """Tells how well each score on the search documents judges an arm from one fine-tune.

    Printed and returned by score: the ICC between arms (more than one seed), and Spearman's
    correlation, mean over the seeds, with the report accuracy and with the held-out loss of the arm
    in the other seeds (of one seed: in the same fine-tune), with percentiles of a bootstrap over
    the arms.
    """
    weights = bench.prepared.context.oracle.weights("search")
    shape = (len(arms), options.seeds)
    tables = {metric: np.zeros(shape) for metric in METRICS}
    truth = {"accuracy": np.zeros(shape), "loss": np.zeros(shape)}
    for (i, arm), seed in itertools.product(enumerate(arms), range(options.seeds)):
        row = row_of(bench.work, [f"{arm}-{seed}"], weights)
        search = read_documents(bench.work / f"{arm}-{seed}.search.parquet")
        for metric, table in tables.items():
            shares = [
                weight * np.mean(search[task].values[metric]) for task, weight in weights.items()
            ]
            table[i, seed] = sum(shares) / sum(weights.values())
        truth["accuracy"][i, seed] = row.mean("accuracy")["mean"]
        truth["loss"][i, seed] = row.mean(ROWS)["mean"]
    rng, found = np.random.default_rng(0), {}
    print("\n| score | ICC | with accuracy | with held-out loss |\n| --- | --: | --: | --: |")
    for metric, table in tables.items():
        entry: dict[str, Any] = {"icc": reliability(table.tolist()).icc if shape[1] > 1 else None}
        for name, values in truth.items():
            resampled = [rng.integers(0, shape[0], shape[0]) for _ in range(1000)]
            drawn = [_correlation(table[rows], values[rows]) for rows in resampled]
            low, high = np.nanpercentile(drawn, [2.5, 97.5])
            entry[name] = [_correlation(table, values), float(low), float(high)]
        found[metric] = entry
        icc = "" if entry["icc"] is None else f"{entry['icc']:.2f}"
        cells = [f"{entry[n][0]:.2f} ({entry[n][1]:.2f} to {entry[n][2]:.2f})" for n in truth]
        print(f"| {metric} | {icc} | " + " | ".join(cells) + " |")
    return found


def _correlation(scores: Any, truth: Any) -> float:
    """Returns the mean over seeds of the rank correlation with the truth of the other seeds."""
    count = scores.shape[1]
    found = []
    for seed in range(count):
        others = [s for s in range(count) if s != seed] or [seed]
        ours, theirs = rankdata(scores[:, seed]), rankdata(truth[:, others].mean(axis=1))
        found.append(np.corrcoef(ours, theirs)[0, 1])
    return float(np.mean(found))


def _line(name: str, entry: dict[str, Any], has_text: bool) -> str:
    accuracy, gold, rows = (entry[m]["mean"] for m in ("accuracy", "gold_logprob", ROWS))
    low, high = 100 * accuracy["low"], 100 * accuracy["high"]
    cells = [
        name,
        f"{100 * accuracy['mean']:.1f} ({low:.1f} to {high:.1f})",
        f"{gold['mean']:.3f}",
        f"{-rows['mean']:.3f}",
    ]
    if has_text:
        cells.append(f"{math.exp(-entry[TEXT]['mean']['mean']):.1f}")
    points, loss = (entry[m].get("above_first") for m in ("accuracy", ROWS))
    cells.append(
        f"{100 * points['estimate']:+.1f} ({100 * points['low']:.1f} to {100 * points['high']:.1f})"
        if points
        else ""
    )
    cells.append(
        f"{-loss['estimate']:+.3f} ({-loss['high']:.3f} to {-loss['low']:.3f})" if loss else ""
    )
    seconds = [s for s in entry["cpu_seconds"] if s is not None]
    cells.append(f"{statistics.mean(seconds):.0f}" if seconds else "")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measures what is missing, prints the table and writes all values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_file", type=Path)
    parser.add_argument("arms", nargs="+", help="METHOD@RATE, the first is the baseline")
    parser.add_argument("--name", required=True, help="of the result")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="as of run")
    parser.add_argument("--text", type=Path, help="running text to measure the perplexity of")
    parser.add_argument("--held-out", type=int, default=300, help="rows that no fine-tune sees")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/levers"))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    arms = [Arm.of(text) for text in options.arms]
    bench = Bench(options)
    bench.all(arms, options.seeds)
    report(options, bench, arms)


if __name__ == "__main__":
    main()
