r"""A table of real fine-tunes, on which searches can be replayed.

    OMP_NUM_THREADS=1 python benchmarks/search/fine_tunes.py embedded
    OMP_NUM_THREADS=1 python benchmarks/search/fine_tunes.py benchmarks/run_files/stories260k.toml \
        --name stories260K --steps 25 --documents 32 64 --max-tokens 64 --max-length 128

Random allocations, half of them with a free total and half with the parameters of uniform LoRA,
the first of each half uniform LoRA itself; every one fine-tuned with the same seeds. Each
fine-tune is scored on the search and on the report documents.

The table goes to ``results/search/fine_tunes-NAME.parquet``: one row per allocation and seed, with
the mean of every metric, and ``choice_logprob`` and ``accuracy`` per task. The same command resumes
an interrupted run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.run_file import EMBEDDED_RUN_FILE
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.core.scores import METRICS, Score
from rankadaptor_plugin.models.checkpoints import load_model
from rankadaptor_plugin.pipeline.preparation import prepare
from rankadaptor_plugin.plugins import plugin_manager
from rankadaptor_plugin.recovery import adapters, recover

if TYPE_CHECKING:
    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.core.ranks import RankSpace

RESULTS = Path(__file__).resolve().parent.parent / "results" / "search"


def allocations(space: RankSpace, count: int) -> list[tuple[str, RankAllocation]]:
    """Draws `count` distinct allocations of each kind, ``free`` and ``equal``."""
    rng = np.random.default_rng(5)
    found: list[tuple[str, RankAllocation]] = []
    for kind in ("free", "equal"):
        budget = space.parameters(space.uniform()) if kind == "equal" else None
        limited = dataclasses.replace(space, budget=budget)
        drawn = [RankAllocation(tuple(r)) for r in limited.sample(4 * count, rng).tolist()]
        distinct = list(dict.fromkeys([space.uniform(), *drawn]))
        found += [(kind, allocation) for allocation in distinct[:count]]
    return found


def columns(score: Score, prefix: str, weights: dict[str, float]) -> dict[str, float]:
    """Returns means over the tasks, and two metrics per task."""
    found = {f"{prefix}_{metric}": score.mean(metric, weights) for metric in METRICS}
    for task, of_task in score.tasks.items():
        for metric in ("choice_logprob", "accuracy"):
            found[f"{prefix}_{metric}_{task}"] = of_task.values[metric]
    return found


def shortened(loaded: RunConfig, options: argparse.Namespace) -> RunConfig:
    """Returns a run file's settings with what the command line says of their size."""
    search, report = options.documents
    return dataclasses.replace(
        loaded,
        recovery=dataclasses.replace(
            loaded.recovery, max_steps=options.steps or loaded.recovery.max_steps
        ),
        corpus=dataclasses.replace(
            loaded.corpus, max_length=options.max_tokens or loaded.corpus.max_length
        ),
        oracle=dataclasses.replace(
            loaded.oracle,
            search_documents=search or loaded.oracle.search_documents,
            report_documents=report or loaded.oracle.report_documents,
            max_length=options.max_length or loaded.oracle.max_length,
        ),
        rank_space=dataclasses.replace(loaded.rank_space, budget="free"),
    )


def measure(loaded: RunConfig, rows_file: Path, count: int, seeds: int) -> None:
    """Fine-tunes what `rows_file` does not hold yet, one line per fine-tune."""
    with tempfile.TemporaryDirectory() as scratch:
        config = dataclasses.replace(loaded, output=str(Path(scratch) / "run"))
        folder = RunFolder(Path(config.output))
        with folder.opened():
            manager = plugin_manager(third_party=False)
            prepared = prepare(config, manager, folder, None, time.perf_counter())
        torch.manual_seed(config.seed)
        base = load_model(prepared.source, device=prepared.device, dtype=prepared.dtype)
        pruned = prepared.pruner(base, prepared.tokenizer, prepared.calibration, config.prune)
    oracle, corpus = prepared.context.oracle, prepared.context.corpus
    weights = oracle.weights("search")
    space = adapters.rank_space(pruned.model, pruned.pruned_layers, config.rank_space)
    drawn = allocations(space, count)
    lines = rows_file.read_text("utf-8").splitlines() if rows_file.exists() else []
    done = {(row["seed"], row["number"]) for row in map(json.loads, lines)}
    model: Any = pruned.model
    for seed in range(seeds):
        todo = [n for n in range(len(drawn)) if (seed, n) not in done]
        if not todo:
            continue
        for number in todo:
            kind, allocation = drawn[number]
            began = time.perf_counter()
            recovered = recover(model, None, allocation, corpus, config.recovery, seed=seed)
            model = recovered.model
            row = {
                "number": number,
                "kind": kind,
                "ranks": str(allocation),
                "parameters": space.parameters(allocation),
                "seed": seed,
                "train_loss": recovered.train_loss,
                **columns(oracle.score(model, "search"), "search", weights),
                **columns(oracle.score(model, "report"), "report", weights),
                "seconds": time.perf_counter() - began,
            }
            with rows_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def main() -> None:
    """Measures, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_file", help='a run file, or "embedded"')
    parser.add_argument("--name", default="embedded")
    parser.add_argument("--allocations", type=int, default=150, help="of each of the two kinds")
    parser.add_argument("--seeds", type=int, default=5)
    given = "0 takes that of the run file"
    parser.add_argument("--steps", type=int, default=0, help=given)
    parser.add_argument(
        "--documents", type=int, nargs=2, default=(0, 0), help=f"search, report; {given}"
    )
    parser.add_argument("--max-tokens", type=int, default=0, help=f"of a sequence; {given}")
    parser.add_argument("--max-length", type=int, default=0, help=f"of a request; {given}")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    embedded = options.run_file == "embedded"
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows_file = RESULTS / f"fine_tunes-{options.name}.jsonl"
    written = rows_file.with_suffix(".parquet")
    if written.exists() and not rows_file.exists():  # more seeds, or allocations, for a table
        lines = (json.dumps(row) + "\n" for row in pq.read_table(written).to_pylist())
        rows_file.write_text("".join(lines), encoding="utf-8")
    loaded = run_file.load(EMBEDDED_RUN_FILE if embedded else Path(options.run_file))
    measure(shortened(loaded, options), rows_file, options.allocations, options.seeds)
    rows = [json.loads(line) for line in rows_file.read_text("utf-8").splitlines()]
    table = pa.Table.from_pylist(sorted(rows, key=lambda r: (r["number"], r["seed"])))
    pq.write_table(table, written, compression="zstd")
    rows_file.unlink()


if __name__ == "__main__":
    main()
