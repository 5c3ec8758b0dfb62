"""Noise of each score: fine-tunes of random allocations, each with several seeds.

    OMP_NUM_THREADS=1 python benchmarks/score_noise.py --allocations 33 --seeds 4

The embedded model, pruned and recovered as its run file says. Uniform LoRA and random allocations
within its budget are fine-tuned with the same seeds. Each fine-tune is scored on the search
documents, by every score of one request and by the perplexity of three held-out texts, and on the
report documents. The texts have one line per document, its prompt with the right answer:

* other: questions about the evaluation part of the tiny world that are in no task document. Two
  tasks have none left, two more have few, so this text is not about what the report is about.
* search: the search documents themselves, which a choice score sees as well.
* report: the report documents. Nobody may search with these; they flatter what is predicted.

None of them is in the recovery corpus. Printed and written to ``results/score_noise-DATE.json``:
the reliability of each score (`rankadaptor_plugin.verdict.noise_floor`), and how well it ranks
allocations from one seed: Spearman's correlation with the mean report score of the other seeds, the
mean over the choices of this one seed. Their intervals, and those of the differences from
`choice_logprob`, are percentiles of a bootstrap over the allocations, the same resamples for every
score. Another ``--seed`` repeats all of it with other allocations, fine-tunes and documents; it
becomes part of the name.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import platform
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from embedded_default import processor
from scipy.stats import rankdata
from tiny.tinyworld import TASKS, World

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.run_file import EMBEDDED_RUN_FILE, corpus_file
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.core.scores import LOG_LIKELIHOOD, METRICS
from rankadaptor_plugin.corpus.rows import prompt_and_response, read_rows
from rankadaptor_plugin.models.checkpoints import load_model
from rankadaptor_plugin.oracle.oracle import OracleSettings
from rankadaptor_plugin.oracle.perplexity import PerplexityOracle
from rankadaptor_plugin.oracle.tasks import Tasks, choose
from rankadaptor_plugin.pipeline.preparation import Prepared, prepare
from rankadaptor_plugin.plugins import plugin_manager
from rankadaptor_plugin.recovery import recover
from rankadaptor_plugin.recovery.slots import rank_space
from rankadaptor_plugin.tasks import task_dir
from rankadaptor_plugin.verdict.noise import noise_allocations, noise_seeds
from rankadaptor_plugin.verdict.noise_floor import reliability

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "lm-eval", "numpy", "scipy")
PER_TASK = 100  # lines of the text "other", where the world has so many
PREFERRED = "choice_logprob"
TARGETS = {"accuracy": "report accuracy", "choice_logprob": "report choice_logprob"}


def held_out_texts(prepared: Prepared) -> dict[str, list[str]]:
    """Returns the lines of each text by its name.

    Raises:
        ValueError: If a line is in the recovery corpus.
    """
    config = prepared.context.config
    documents = choose(Tasks([task_dir()]), config.oracle, config.seed)
    lines: dict[str, list[str]] = {}
    for purpose, by_task in documents.items():
        docs = [d.task.eval_docs[i] for d in by_task.values() for i in d.ids]
        lines[purpose] = [f"{doc['context']} {doc['choices'][doc['gold']]}" for doc in docs]
    world, other = World(), []
    asked = {doc["context"] for d in documents["search"].values() for doc in d.task.eval_docs}
    for task in TASKS:
        left = [q for q in world.questions(task, "eval") if q.prompt not in asked]
        drawn = np.random.default_rng(config.seed).permutation(len(left))[:PER_TASK]
        other += [f"{left[i].prompt} {left[i].answer}" for i in drawn]
    texts = {"other": other, "search": lines["search"], "report": lines["report"]}
    rows = read_rows(corpus_file(config.corpus.path))
    trained = {" ".join("".join(prompt_and_response(row, "plain")).split()) for row in rows}
    for name, text in texts.items():
        if found := trained & set(text):
            raise ValueError(f"The text {name} has trained lines such as {min(found)!r}.")
    return texts


def perplexity_oracle(lines: list[str], prepared: Prepared, folder: Path) -> PerplexityOracle:
    """Returns an oracle whose search documents are all lines but one."""
    path = folder / f"{len(list(folder.iterdir()))}.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
    config = dataclasses.replace(
        prepared.context.config.oracle,
        text=str(path),
        search_documents=len(set(lines)) - 1,  # it insists on something for the report
        report_documents=0,
    )
    return PerplexityOracle(
        OracleSettings(config=config, tokenizer=prepared.tokenizer, task_paths=(), seed=0)
    )


def correlations(score: Array, target: Array, draws: NDArray[np.int64]) -> Array:
    """Returns Spearman's correlation per draw of allocations, the mean over the seeds.

    Args:
        score: Shape (n, k); one column is taken at a time.
        target: Shape (n, k); of this the mean of the other columns.
        draws: Allocations of each draw, shape (b, n).
    """
    found = []
    for seed in range(score.shape[1]):
        ranks = [
            rankdata(values[draws], axis=1)
            for values in (score[:, seed], np.delete(target, seed, axis=1).mean(1))
        ]
        one, other = (r - r.mean(1, keepdims=True) for r in ranks)
        found.append((one * other).sum(1) / np.sqrt((one**2).sum(1) * (other**2).sum(1)))
    return np.mean(found, axis=0)


def intervals(
    tables: Mapping[str, Array], statistic: Callable[[Array, NDArray[np.int64]], Array], draws: int
) -> dict[str, dict[str, Any]]:
    """Returns a statistic of each score, and what it has above `PREFERRED`, with 95 % intervals."""
    rows = len(tables[PREFERRED])
    plain = np.arange(rows)[None]
    resamples = np.random.default_rng(0).integers(0, rows, (draws, rows))
    values = {name: statistic(table, plain)[0] for name, table in tables.items()}
    drawn = {name: statistic(table, resamples) for name, table in tables.items()}
    return {
        name: {
            "value": float(values[name]),
            "interval": np.nanquantile(drawn[name], (0.025, 0.975)).tolist(),
            "above": float(values[name] - values[PREFERRED]),
            "above_interval": np.nanquantile(
                drawn[name] - drawn[PREFERRED], (0.025, 0.975)
            ).tolist(),
        }
        for name in tables
    }


def iccs(table: Array, draws: NDArray[np.int64]) -> Array:
    """Returns ICC(3,1) per draw of allocations, shape (b,)."""
    return np.array([reliability(table[draw]).icc for draw in draws])


def measure(allocations: int, seeds: int, seed: int) -> dict[str, Any]:
    """Fine-tunes and scores; returns tables of shape (n, k) by score, and what was run.

    Args:
        allocations: Uniform LoRA and this many less one random allocations.
        seeds: Fine-tunes of each.
        seed: Seed of the run: draws allocations, calibration sequences and documents, and numbers
            the seeds of the fine-tunes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        config = dataclasses.replace(
            run_file.load(EMBEDDED_RUN_FILE), output=str(Path(scratch) / "run"), seed=seed
        )
        folder, texts_folder = RunFolder(Path(config.output)), Path(scratch) / "texts"
        texts_folder.mkdir()
        with folder.opened():
            manager = plugin_manager(third_party=False)
            prepared = prepare(config, manager, folder, None, time.perf_counter())
        torch.manual_seed(config.seed)
        base = load_model(prepared.source, device=prepared.device, dtype=prepared.dtype)
        pruned = prepared.pruner(base, prepared.tokenizer, prepared.calibration, config.prune)
        texts = held_out_texts(prepared)
        held_out = {n: perplexity_oracle(t, prepared, texts_folder) for n, t in texts.items()}
    oracle, corpus = prepared.context.oracle, prepared.context.corpus
    weights = oracle.weights("search")
    space = rank_space(pruned.model, pruned.pruned_layers, config.rank_space)
    drawn = noise_allocations(space, allocations, config.seed)
    numbers = noise_seeds(config.seed, seeds)
    model: Any = pruned.model
    found: list[list[dict[str, float]]] = []
    began = time.perf_counter()
    for allocation in drawn:
        found.append([])
        for number in numbers:
            model = recover(model, None, allocation, corpus, config.recovery, seed=number).model
            search, report = (oracle.score(model, purpose) for purpose in ("search", "report"))
            values = {metric: search.mean(metric, weights) for metric in METRICS}
            for name, asked in held_out.items():
                score = asked.score(model, "search")
                values[f"perplexity, {name}"] = score.mean(LOG_LIKELIHOOD)
            values |= {name: report.mean(metric) for metric, name in TARGETS.items()}
            found[-1].append(values)
    return {
        "allocations": [list(allocation.ranks) for allocation in drawn],
        "seeds": list(numbers),
        "lines": {name: len(text) for name, text in texts.items()},
        "seconds_per_fine_tune": (time.perf_counter() - began) / (len(drawn) * seeds),
        "values": {n: [[run[n] for run in row] for row in found] for n in found[0][0]},
    }


def analyze(values: Mapping[str, list[list[float]]], draws: int) -> dict[str, Any]:
    """Returns reliability, differences in ICC, and predictions, by score."""
    tables = {name: np.array(table) for name, table in values.items()}
    return {
        "reliability": {name: reliability(table).to_json() for name, table in tables.items()},
        "icc": intervals(tables, iccs, draws),
        "predictions": {
            name: intervals(tables, lambda x, d, y=tables[name]: correlations(x, y, d), draws)
            for name in TARGETS.values()
        },
    }


def show(result: Mapping[str, Any]) -> None:
    """Prints the two tables."""

    def cell(found: Mapping[str, Any], name: str = "value", interval: str = "interval") -> str:
        low, high = found[interval]
        return f"{found[name]:.2f} ({low:.2f} to {high:.2f})"

    print(
        "| score | ICC | above choice_logprob | independent seeds | between sd | seed sd | ratio |"
    )
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for name, found in result["reliability"].items():
        ratio = found["seed_sd"] / found["between_sd"] if found["between_sd"] else float("inf")
        above = cell(result["icc"][name], "above", "above_interval")
        print(
            f"| {name} | {found['icc']:.2f} ({found['low']:.2f} to {found['high']:.2f}) | {above} "
            f"| {found['icc_independent']:.2f} | {found['between_sd']:.4f} "
            f"| {found['seed_sd']:.4f} | {ratio:.2f} |"
        )
    print(
        "\n| score | report accuracy | above the default "
        "| report choice_logprob | above the default |"
    )
    print("| --- | --: | --: | --: | --: |")
    for name in result["reliability"]:
        cells = []
        for target in TARGETS.values():
            found = result["predictions"][target][name]
            cells += [cell(found), cell(found, "above", "above_interval")]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Measures, prints the tables and writes all values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--allocations", type=int, default=17, help="uniform LoRA is one of them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
    parser.add_argument("--draws", type=int, default=2000, help="resamples of the bootstrap")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    measured = measure(options.allocations, options.seeds, options.seed)
    machine = f"{processor()}, 1 of {os.cpu_count()} cores, Python {platform.python_version()}"
    result = {
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": {package: version(package) for package in PACKAGES},
        **measured,
        **analyze(measured["values"], options.draws),
    }
    print(
        f"{machine}; {len(measured['allocations'])} allocations x {options.seeds} seeds, "
        f"{measured['seconds_per_fine_tune']:.2f} s each; lines: {measured['lines']}\n"
    )
    show(result)
    RESULTS.mkdir(exist_ok=True)
    part = f"-seed{options.seed}" if options.seed else ""
    path = RESULTS / f"score_noise{part}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
