r"""The recovery methods beside uniform LoRA, at equal steps.

    OMP_NUM_THREADS=1 python benchmarks/recovery_methods.py

The embedded default is pruned once, as its run file says, and fine-tuned with the same seeds by
every method that takes ranks that are given: uniform ones, but for the pattern, whose sum is the
same. All are scored on the report documents. Intervals have seeds and documents random, and pair
both (`rankadaptor_plugin.verdict.statistics`); 95 %, one by one, so of many comparisons some are
outside by chance. CPU seconds of a fine-tune are compared seed by seed, and the methods take turns.

Every adapter is also saved, and put by plain PEFT on the pruned model as it lies on disk; the
largest difference in a logit, over all tokens of 32 training sequences, is told, and the largest
that the adapter makes. The same on the model without half of its blocks, with fewer seeds: all
methods have to work there too. Printed and written to
``results/recovery_methods-embedded-DATE.json``.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from embedded_default import processor
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.run_file import EMBEDDED_RUN_FILE
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.models.checkpoints import load_model
from rankadaptor_plugin.pipeline.preparation import prepare
from rankadaptor_plugin.pipeline.stage import given_entrants, trained_parameters
from rankadaptor_plugin.plugins import plugin_manager
from rankadaptor_plugin.recovery import recover
from rankadaptor_plugin.recovery.batches import padded
from rankadaptor_plugin.recovery.files import without_old_name
from rankadaptor_plugin.recovery.slots import rank_space
from rankadaptor_plugin.verdict.statistics import Model, compare, mean_interval, model_of

if TYPE_CHECKING:
    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.core.scores import Score
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.pipeline.preparation import Prepared
    from rankadaptor_plugin.recovery.fine_tune import RecoveredAdapter

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "lm-eval", "numpy")
METRICS = ("accuracy", "choice_logprob")
LORA = "lora"
METHODS = (
    *(LORA, "adalora", "eva", "lora-fa", "dora", "rslora", "pissa", "pattern:4-6-10-12"),
    "none",
)
_SEQUENCES = 32  # whose logits are compared


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


@dataclasses.dataclass
class Measured:
    """Results of the fine-tunes of a method, by seed.

    Attributes:
        scores: On the report documents.
        cpu: CPU seconds.
        parameters: Trained ones; of methods that choose the ranks themselves, in the end.
        rank_sum: Sum of the ranks of all matrices in the adapter.
        reload_difference: Largest difference of a logit after saving and loading.
        adapter_effect: Largest difference that the adapter makes to a logit.
    """

    scores: list[Score] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)
    parameters: list[int] = dataclasses.field(default_factory=list)
    rank_sum: list[int] = dataclasses.field(default_factory=list)
    reload_difference: list[float] = dataclasses.field(default_factory=list)
    adapter_effect: list[float] = dataclasses.field(default_factory=list)

    def summary(self, plain: Measured) -> dict[str, Any]:
        """Returns what the results file holds, compared with uniform LoRA."""
        return {
            "per_seed": {m: [score.mean(m) for score in self.scores] for m in METRICS},
            "mean": {m: mean_of(self.scores, m) for m in METRICS},
            "above_lora": {m: above(self.scores, plain.scores, m) for m in METRICS},
            "cpu": self.cpu,
            "cpu_ratio": statistics.median(a / b for a, b in zip(self.cpu, plain.cpu, strict=True)),
            "parameters": self.parameters,
            "rank_sum": self.rank_sum,
            "reload_difference": max(self.reload_difference),
            "adapter_effect": max(self.adapter_effect),
        }


@torch.no_grad()
def logits(model: Any, prepared: Prepared) -> torch.Tensor:
    """Returns the logits of all tokens of a few training sequences, shape (n, vocabulary)."""
    sequences = prepared.context.corpus.sequences[:_SEQUENCES]
    given = padded(sequences)
    found: torch.Tensor = model(input_ids=given.input_ids, use_cache=False).logits
    return found[torch.arange(found.shape[1]) < given.lengths[:, None]]


def reloaded(recovered: RecoveredAdapter, pruned: Path, folder: Path) -> Any:
    """Saves an adapter; returns what PEFT makes of it and the pruned model on disk."""
    recovered.save(folder, base=str(pruned))
    with without_old_name():
        base = AutoModelForCausalLM.from_pretrained(pruned, dtype="auto")
        return PeftModel.from_pretrained(base, folder).eval()


def prepared_model(config: RunConfig) -> tuple[Prepared, PrunedModel]:
    """Prunes as a run does, and saves the pruned model in its folder."""
    folder = RunFolder(Path(config.output))
    with folder.opened():
        manager = plugin_manager(third_party=False)
        prepared = prepare(config, manager, folder, None, time.perf_counter())
    torch.manual_seed(config.seed)
    base = load_model(prepared.source, device=prepared.device, dtype=prepared.dtype)
    pruned = prepared.pruner(base, prepared.tokenizer, prepared.calibration, config.prune)
    pruned.save(folder.pruned)
    return prepared, pruned


def measure(config: RunConfig, seeds: int) -> dict[str, Any]:
    """Fine-tunes, scores, saves and loads with every method and seed."""
    prepared, pruned = prepared_model(config)
    oracle, corpus = prepared.context.oracle, prepared.context.corpus
    saved = RunFolder(Path(config.output)).pruned
    space = rank_space(pruned.model, pruned.pruned_layers, config.rank_space, config.recovery)
    allocations = {
        name: given_entrants([name], space, space.uniform())[0].allocation for name in METHODS
    }
    before, bare = oracle.score(pruned.model, "report"), logits(pruned.model, prepared)
    found: dict[str, Measured] = defaultdict(Measured)
    model: Any = pruned.model
    for seed in range(seeds):
        for name, allocation in allocations.items():
            cpu = time.process_time()
            recovered = recover(
                model, prepared.tokenizer, allocation, corpus, config.recovery, seed=seed
            )
            own, model = found[name], recovered.model
            own.cpu.append(time.process_time() - cpu)
            own.scores.append(oracle.score(model, "report"))
            folder = Path(config.output) / f"adapter-{name.replace(':', '-')}-{seed}"
            here, there = (logits(m, prepared) for m in (model, reloaded(recovered, saved, folder)))
            own.reload_difference.append(float((here - there).abs().max()))
            own.adapter_effect.append(float((here - bare).abs().max()))
            own.rank_sum.append(sum(recovered.ranks.values()))
            own.parameters.append(trained_parameters(allocation, space, config.recovery, folder))
    return {
        "seeds": seeds,
        "steps": config.recovery.steps_for(len(corpus.sequences)),
        "before": {m: mean_of([before], m) for m in METRICS},
        "methods": {name: own.summary(found[LORA]) for name, own in found.items()},
    }


def show(title: str, result: dict[str, Any]) -> None:
    """Prints the table of one pruned model."""

    def cell(found: dict[str, float], factor: float, form: str) -> str:
        estimate, low, high = (found[k] * factor for k in ("estimate", "low", "high"))
        return f"{estimate:{form}} ({low:{form}} to {high:{form}})"

    before = result["before"]
    print(
        f"{title}, {result['seeds']} seeds, {result['steps']} steps; before: accuracy "
        f"{before['accuracy']['mean']:.1%}, choice_logprob {before['choice_logprob']['mean']:.3f}\n"
    )
    print(
        "| method | accuracy % | above lora, points | choice_logprob | above lora | "
        "trained parameters | sum of ranks | CPU time | logits after loading |\n"
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |"
    )
    for name, row in result["methods"].items():
        accuracy, choice_logprob = (row["mean"][m]["mean"] for m in METRICS)
        points, nats = "", ""
        if name != LORA:
            points = cell(row["above_lora"]["accuracy"], 100, "+.1f")
            nats = cell(row["above_lora"]["choice_logprob"], 1, "+.3f")
        print(
            f"| {name} | {100 * accuracy:.1f} | {points} | {choice_logprob:.3f} | {nats} | "
            f"{statistics.median(row['parameters']):,.0f} | "
            f"{statistics.median(row['rank_sum']):,.0f} | {row['cpu_ratio']:.2f} | "
            f"{row['reload_difference']:.1e} of {row['adapter_effect']:.2g} |"
        )
    print()


def main() -> None:
    """Measures, prints the tables and writes all values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--depth-seeds", type=int, default=2, help="on the model without blocks")
    parser.add_argument("--steps", type=int, default=0, help="0 takes those of the run file")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    loaded = run_file.load(EMBEDDED_RUN_FILE)
    recovery = dataclasses.replace(
        loaded.recovery, max_steps=options.steps or loaded.recovery.max_steps
    )
    began, found = time.perf_counter(), {}
    for method, seeds in (("width", options.seeds), ("depth", options.depth_seeds)):
        with tempfile.TemporaryDirectory() as scratch:
            config = dataclasses.replace(
                loaded,
                output=str(Path(scratch) / "run"),
                device="cpu",
                recovery=recovery,
                prune=dataclasses.replace(loaded.prune, method=method),
            )
            found[method] = measure(config, seeds)
    machine = f"{processor()}, 1 of {os.cpu_count()} cores, Python {platform.python_version()}"
    result = {
        "date": date.today().isoformat(),
        "machine": machine,
        "load_average": os.getloadavg(),
        "versions": {package: version(package) for package in PACKAGES},
        "options": vars(options),
        "seconds": time.perf_counter() - began,
        **found,
    }
    print(f"{machine}\n")
    for method, one in found.items():
        show(f"Pruned by {method}", one)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"recovery_methods-embedded-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
