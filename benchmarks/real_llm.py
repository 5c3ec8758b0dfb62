r"""A real LLM pruned by width and by depth, and recovered by LoRA at several learning rates.

    python examples/get_smollm2.py smollm2
    python benchmarks/real_llm.py --model smollm2 --data DATA --work runs/real_llm

DATA holds ``instruct/alpaca_random_9k.json`` (Alpaca rows), ``benchmarks/`` (local copies of the
seven benchmarks, as docs/local-data.md names them) and ``text/wikitext2.test.txt``. Each model is
scored by what a run would score it by: accuracy and the low-noise scores on report documents of the
seven benchmarks; besides by the loss per response token on Alpaca rows that no fine-tune saw, and
by the perplexity of WikiText-2's test text in windows of 256 tokens. Intervals are 95 %, over
documents (and seeds where there are several), one by one.

Every model is one file below ``--work``, so an interrupted measurement goes on where it was. The
result is printed as a table and written to ``results/real_llm-NAME-DATE.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import statistics
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from embedded_default import processor
from transformers.utils import logging as transformers_logging

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.tables import OracleConfig
from rankadaptor_plugin.core.document_results import with_documents, write_documents
from rankadaptor_plugin.core.files import write_file
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.core.scores import LOG_LIKELIHOOD, METRICS, Score
from rankadaptor_plugin.models.checkpoints import load_model
from rankadaptor_plugin.models.device import attending, faster_attention
from rankadaptor_plugin.models.pruned_model import PrunedModel, load_pruned
from rankadaptor_plugin.oracle.oracle import OracleSettings
from rankadaptor_plugin.oracle.perplexity import PerplexityOracle
from rankadaptor_plugin.pipeline.preparation import Prepared, prepare
from rankadaptor_plugin.plugins import plugin_manager
from rankadaptor_plugin.recovery import recover
from rankadaptor_plugin.recovery.adapters import base_of
from rankadaptor_plugin.recovery.batches import passes
from rankadaptor_plugin.recovery.fused_lora import fused
from rankadaptor_plugin.recovery.training import MicroBatch, mean_loss
from rankadaptor_plugin.verdict.statistics import compare, mean_interval, model_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "lm-eval")
FACTS = ("parameters", "train_loss", "held_out_loss", "perplexity", "cpu_seconds",
         "evaluation_cpu_seconds")  # fmt: skip
HELD_OUT = 300
"""Alpaca rows that no fine-tune sees."""


def run_table(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """Returns the run file of a pruner, as TOML gives it."""
    return {
        "model": str(options.model.resolve()),
        "output": str(options.work.resolve() / method),
        "recipe": "quick",
        "dtype": options.dtype,
        "prune": {
            "method": method,
            "pruning_ratio": options.ratio,
            "ratio_of": "parameters",
            "calibration_samples": 50,
            "calibration_tokens": 64,
        },
        "corpus": {
            "path": str(options.data.resolve() / "instruct" / "alpaca_random_9k.json"),
            "val_set_size": HELD_OUT,
        },
        "recovery": {"max_steps": options.steps, "methods": ["lora"]},
        "oracle": {
            "tasks": ["rankadaptor_commonsense7"],
            # There are copies of the report splits alone, so these are cut in two.
            "search_tasks": ["rankadaptor_commonsense7"],
            "data_dir": str(options.data.resolve() / "benchmarks"),
            "search_documents": 60,
            "report_documents": options.documents,
            "max_length": 512,
            "batch_tokens": 2048,
        },
    }


class Bench:
    """The measurement: models by name, each measured once and kept in a file.

    Args:
        options: Those of the command line.
        method: Pruner, ``width`` or ``depth``.
    """

    def __init__(self, options: argparse.Namespace, method: str) -> None:
        self.options, self.method = options, method
        self.config = run_file.from_dict(run_table(options, method))
        self.folder = RunFolder(Path(self.config.output))
        with self.folder.opened():
            manager = plugin_manager(third_party=False)
            self.prepared: Prepared = prepare(
                self.config, manager, self.folder, None, time.perf_counter()
            )
        corpus = self.prepared.context.corpus
        self.held_out = corpus.validation
        self.corpus = replace(corpus, validation=[])  # looked at once, at the end
        self.text = PerplexityOracle(
            OracleSettings(
                config=OracleConfig(
                    name="perplexity",
                    text=str(options.data / "text" / "wikitext2.test.txt"),
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

    def base(self) -> PreTrainedModel:
        """Loads the unpruned model."""
        return load_model(
            self.prepared.source, device=self.prepared.device, dtype=self.prepared.dtype
        )

    def pruned(self) -> PrunedModel:
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
        file = self.options.work / f"{name}.json"
        if file.exists():
            return
        loaded, facts = model()
        began = time.process_time()
        with fused(base_of(loaded)):
            score = self.prepared.context.oracle.score(loaded, "report")
            facts["evaluation_cpu_seconds"] = time.process_time() - began
            text = self.text.score(loaded, "report").mean(LOG_LIKELIHOOD)
            loss = mean_loss(base_of(loaded), self.held_out, MicroBatch(16))
        facts |= {"held_out_loss": loss, "perplexity": math.exp(-text)}
        write_documents(file.with_suffix(".parquet"), score)
        content = json.dumps({"name": name, **facts, "score": score.to_json()}, indent=1)
        write_file(file, lambda partial: partial.write_text(content, "utf-8"))
        print(name, {k: v for k, v in facts.items() if isinstance(v, float)}, flush=True)

    def recoveries(self, rates: list[float], seeds: int, prefix: str) -> None:
        """Fine-tunes at several learning rates and seeds, and measures each."""
        pruned = self.pruned()
        rows = passes(self.corpus.sequences[:2], 2)[0].input_ids
        attention = faster_attention(pruned.model, rows)
        model: Any = pruned.model
        for rate in rates:
            for seed in range(seeds):

                def tuned(rate: float = rate, seed: int = seed) -> tuple[Any, dict[str, Any]]:
                    nonlocal model
                    began = time.process_time()
                    settings = replace(self.config.recovery, learning_rate=rate)
                    uniform = RankAllocation((8,) * pruned.model.config.num_hidden_layers)
                    with attending(pruned.model, attention):
                        result = recover(
                            model,
                            self.prepared.tokenizer,
                            uniform,
                            self.corpus,
                            settings,
                            seed,
                        )
                    cpu = time.process_time() - began
                    facts = {
                        "learning_rate": rate,
                        "seed": seed,
                        "train_loss": result.train_loss,
                        "cpu_seconds": cpu,
                    }
                    model = result.model  # the next fine-tune takes this one's place
                    return model, facts

                self.measured(f"{prefix}-{rate:g}-{seed}", tuned)


def summary(scores: list[Score], reference: list[Score]) -> dict[str, Any]:
    """Returns each metric's mean over the tasks, and its difference from the pruned model's."""
    weights = dict.fromkeys(scores[0].tasks, 1.0)
    rows: dict[str, Any] = {}
    for metric in METRICS:
        ours, theirs = (model_of(dict(enumerate(s)), metric) for s in (scores, reference))
        rows[metric] = mean_interval(ours, metric, weights).to_json()
        rows[metric]["by_task"] = {
            task: float(np.mean([score.tasks[task].values[metric] for score in scores]))
            for task in weights
        }
        if ours != theirs:
            rows[metric]["above_pruned"] = compare(ours, theirs, metric, weights).to_json()
    return rows


def main() -> None:
    """Measures what is missing, prints the table and writes all values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/real_llm"))
    parser.add_argument("--name", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ratio", type=float, default=0.2, help="of all parameters")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--documents", type=int, default=200, help="report documents per task")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--depth-rates", type=float, nargs="*", default=[1e-4, 2e-3])
    parser.add_argument("--seeds", type=int, default=1, help="of every learning rate")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    options.work.mkdir(parents=True, exist_ok=True)
    for method, rates in (("width", options.rates), ("depth", options.depth_rates)):
        if not rates:
            continue
        bench = Bench(options, method)
        bench.measured("base", lambda bench=bench: (bench.base(), {}))

        def cut(bench: Bench = bench) -> tuple[Any, dict[str, Any]]:
            began = time.process_time()
            pruned = bench.pruned()
            cpu = time.process_time() - began
            share = pruned.parameters / pruned.base_parameters
            return pruned.model, {"parameters": share, "cpu_seconds": cpu}

        bench.measured(f"{method}-pruned", cut)
        bench.recoveries(rates, options.seeds, f"{method}-lora")
    report(options)


def report(options: argparse.Namespace) -> None:
    """Prints the table and writes all values."""
    files = {f.stem: json.loads(f.read_text("utf-8")) for f in sorted(options.work.glob("*.json"))}
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, content in files.items():
        groups.setdefault(name.rsplit("-", 1)[0] if "lora" in name else name, []).append(content)
    scores = {
        name: [
            with_documents(Score.from_json(one["score"]), options.work / f"{one['name']}.parquet")
            for one in group
        ]
        for name, group in groups.items()
    }
    rows = {
        name: {
            **{key: [one.get(key) for one in group] for key in FACTS},
            **summary(
                scores[name], scores[f"{name.split('-')[0]}-pruned" if "-" in name else name]
            ),
        }
        for name, group in groups.items()
    }
    print(
        "| model | accuracy % | choice_logprob | gold_logprob | Alpaca loss | WikiText-2 "
        "perplexity | CPU s |\n| --- | --: | --: | --: | --: | --: | --: |"
    )
    for name, row in rows.items():
        accuracy, choice, gold = (row[m] for m in ("accuracy", "choice_logprob", "gold_logprob"))
        print(
            f"| {name} | {100 * accuracy['mean']:.1f} ({100 * accuracy['low']:.1f} to "
            f"{100 * accuracy['high']:.1f}) | {choice['mean']:.3f} | {gold['mean']:.3f} | "
            f"{statistics.mean(row['held_out_loss']):.3f} | "
            f"{statistics.mean(row['perplexity']):.1f} | "
            f"{statistics.mean(s or 0 for s in row['cpu_seconds']):.0f} |"
        )
    result = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "options": {
            key: value.name if isinstance(value, Path) else value
            for key, value in vars(options).items()
        },
        "models": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"real_llm-{options.name}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
