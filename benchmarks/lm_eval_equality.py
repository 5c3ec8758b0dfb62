"""Accuracies of the oracle beside those of stock lm-eval: equal to the last digit, or exit code 1.

    python benchmarks/lm_eval_equality.py
    python benchmarks/lm_eval_equality.py --model MODEL --data DATA --max-length 512

MODEL is a Hugging Face folder of a supported family, the embedded one if left out; DATA a folder
with copies of the seven benchmarks, such as ``boolq_validation.jsonl``, in the layout of the hub
(digits at the end of a file's name are ignored); without it the tiny tasks are asked. Stock means
``lm_eval.simple_evaluate`` with ``HFLM`` and, for the benchmarks, lm-eval's own task files on the
same rows. Four models are asked: the base, the base with half its heads and channels pruned, this
one with a random LoRA adapter of uneven ranks, and the adapter merged into it. Ours is repeated
with several ``batch_tokens``, lm-eval with several batch sizes.

`acc` and `acc_norm` come from lm-eval's own `process_results`; the one that the oracle reports is
taken from its score. Also printed: the largest difference between two log-likelihoods of the same
request, ours and stock, and among the stock batch sizes, which is lm-eval's own rounding.
Writes ``results/lm_eval_equality-DATE.json``; the name of a model becomes part of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.tasks
import numpy as np
import torch
from datasets import Dataset
from embedded_default import processor
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny.tinyworld import TASKS

from rankadaptor_plugin.config.run_file import model_folder
from rankadaptor_plugin.config.tables import OracleConfig, PruneConfig
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.models.checkpoints import load_model, load_tokenizer
from rankadaptor_plugin.models.device import resolve_device, resolve_dtype
from rankadaptor_plugin.models.structures import decoder_layers
from rankadaptor_plugin.oracle.lm_eval_internals import task_file
from rankadaptor_plugin.oracle.lm_eval_oracle import LmEvalOracle
from rankadaptor_plugin.oracle.oracle import OracleSettings
from rankadaptor_plugin.pruning.width import prune_width
from rankadaptor_plugin.recovery import adapters
from rankadaptor_plugin.recovery.adapters import base_of
from rankadaptor_plugin.recovery.fused_lora import fused
from rankadaptor_plugin.tasks import task_dir

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from rankadaptor_plugin.core.scores import Score

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "lm-eval", "torch-pruning")
BENCHMARKS = (
    *("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
)
WHOLE = PruneConfig(pruning_ratio=0.5, keep_first=0, keep_last=0, importance="magnitude")


def copy_rows(data: Path, folder: Path, count: int = 0) -> None:
    """Copies the first rows of each JSONL file, 0 for all, without digits at the end of its name.

    Args:
        data: Folder of the files.
        folder: Where the copies go.
        count: Rows of each copy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(data.glob("*.jsonl")):
        lines = [x for x in file.read_text(encoding="utf-8").split("\n") if x.strip()]
        name = re.sub(r"\d+(?=\.jsonl$)", "", file.name)
        (folder / name).write_text("\n".join(lines[: count or None]), encoding="utf-8")


def oracle(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    task_path: Path,
    data_dir: str = "",
    documents: int,
    max_length: int,
    batch_tokens: int = OracleConfig.batch_tokens,
) -> LmEvalOracle:
    """Returns an oracle whose report documents are `documents` of each task, of more than so many.

    Args:
        names: Tasks.
        tokenizer: Tokenizer of the models.
        task_path: Folder with their YAML.
        data_dir: Folder with copies of the benchmarks; empty for none.
        documents: Report documents per task.
        max_length: Most tokens of a request; 0 takes the model's limit.
        batch_tokens: Most tokens of a pass.
    """
    config = OracleConfig(
        tasks=tuple(names),
        search_tasks=tuple(names),  # the documents of each task are cut in two
        data_dir=data_dir,
        search_documents=1,
        report_documents=documents,
        max_length=max_length,
        batch_tokens=batch_tokens,
    )
    return LmEvalOracle(
        OracleSettings(config=config, tokenizer=tokenizer, task_paths=(task_path,), seed=0)
    )


def stock_task(benchmark: str, data_dir: Path) -> ConfigurableTask:
    """Returns a benchmark as lm-eval defines it, on local rows in the layout of the hub."""
    ours = task_file(task_dir() / "commonsense7" / f"rankadaptor_{benchmark}.yaml")
    config = task_file(Path(lm_eval.tasks.__file__).parent / ours["stock"])
    config.pop("tag", None)
    split = config.get("test_split") or config["validation_split"]
    lines = (data_dir / f"{benchmark}_{split}.jsonl").read_text(encoding="utf-8").split("\n")
    rows = Dataset.from_list([json.loads(line) for line in lines])
    data = {split: rows, "train": rows}
    return ConfigurableTask(config={**config, "custom_dataset": lambda **_: data})


def random_adapter(model: Any, seed: int = 0) -> Any:
    """Puts a LoRA adapter of uneven ranks on a model, as far from zero as a trained one."""
    ranks = tuple(islice(cycle((2, 12, 6, 8)), len(decoder_layers(model))))
    wrapped = adapters.attach(model, RankAllocation(ranks), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return wrapped.eval()


def models(source: Path, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> Iterator[Any]:
    """Yields names and models, one after the other in the same memory."""
    yield "base", load_model(source, device=device, dtype=dtype)
    model = load_model(source, device=device, dtype=dtype)
    model = prune_width(model, tokenizer, [], WHOLE).model.eval()
    yield "pruned", model
    wrapped = random_adapter(model)
    yield "adapter", wrapped
    yield "merged", wrapped.merge_and_unload().eval()


def fused_score(asked: LmEvalOracle, model: Any) -> Score:
    """Scores a model on the report documents as a run does, with its adapter fused."""
    with fused(base_of(model)):
        return asked.score(model, "report")


def our_values(
    asked: LmEvalOracle, model: Any, stock: Mapping[str, Any]
) -> dict[str, tuple[dict[str, float], list[tuple[float, bool]]]]:
    """Returns metrics and answers of the report documents, by task of ours.

    Args:
        asked: The oracle.
        model: What it scores.
        stock: lm-eval's task by name of ours.
    """
    score, found = fused_score(asked, model), {}
    for name, requests in asked._requests["report"]._tasks.items():  # no score keeps the answers
        answers = [[r.resps[0] for r in q.requests] for q in requests.questions]
        values = [
            stock[name].process_results(q.doc, a)
            for q, a in zip(requests.questions, answers, strict=True)
        ]
        means = {
            metric: float(stock[name].aggregation()[metric]([v[metric] for v in values]))
            for metric in ("acc", "acc_norm")
            if metric in values[0]
        }
        means[score.tasks[name].accuracy_metric] = score.tasks[name].values["accuracy"]
        found[name] = (means, [answer for several in answers for answer in several])
    return found


def stock_values(
    lm: HFLM, stock: Mapping[str, Any], ids: Mapping[str, list[int]]
) -> dict[str, tuple[dict[str, float], list[tuple[float, bool]]]]:
    """Returns what `our_values` does, of lm-eval's own evaluation."""
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(stock.values()),
        samples={task.config.task: ids[name] for name, task in stock.items()},
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    found = {}
    for name, task in stock.items():
        values = results["results"][task.config.task]
        means = {m: values[f"{m},none"] for m in ("acc", "acc_norm") if f"{m},none" in values}
        answers = [a for s in results["samples"][task.config.task] for a in s["filtered_resps"]]
        found[name] = (means, answers)
    return found


def largest(one: Sequence[tuple[float, bool]], other: Sequence[tuple[float, bool]]) -> float:
    """Returns the largest difference of two lists of log-likelihoods, in nats."""
    return float(np.abs(np.subtract(*([a[0] for a in answers] for answers in (one, other)))).max())


def compare(
    ours: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns one row per task and metric, from values by batch size and task."""
    first = next(iter(theirs.values()))
    rows = []
    for task, (means, answers) in first.items():
        pairs = [(o[task][1], t[task][1]) for o in ours.values() for t in theirs.values()]
        for metric in means:
            found = {
                side: {str(size): values[task][0][metric] for size, values in by_size.items()}
                for side, by_size in (("ours", ours), ("stock", theirs))
            }
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    **found,
                    "equal": len({v for by in found.values() for v in by.values()}) == 1,
                    "requests": len(answers),
                    "difference": max(largest(*pair) for pair in pairs),
                    "stock_difference": max(largest(answers, t[task][1]) for t in theirs.values()),
                    "greedy_differs": max(
                        sum(a[1] != b[1] for a, b in zip(*pair, strict=True)) for pair in pairs
                    ),
                }
            )
    return rows


def main() -> None:
    """Compares, prints a table, writes all values and exits with 1 if an accuracy differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", type=Path, help="copies of the seven benchmarks")
    parser.add_argument("--tasks", nargs="+", help="tasks, by default all seven")
    parser.add_argument("--documents", type=int, default=200, help="per task")
    parser.add_argument("--max-length", type=int, default=0, help="0 takes the model's limit")
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64], help="lm-eval's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    device = resolve_device(options.device)
    source = model_folder(options.model)
    tokenizer = load_tokenizer(source)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        if options.data:
            copy_rows(options.data, data)
            names = options.tasks or [f"rankadaptor_{b}" for b in BENCHMARKS]
            stock = {n: stock_task(n.removeprefix("rankadaptor_"), data) for n in names}
        else:
            names = options.tasks or list(TASKS)
            manager = TaskManager(include_path=str(task_dir()), include_defaults=False)
            stock = manager.load(names)["tasks"]
        oracles = {
            size: oracle(
                names,
                tokenizer,
                task_path=task_dir(),
                data_dir=str(data) if options.data else "",
                documents=options.documents,
                max_length=options.max_length,
                batch_tokens=size,
            )
            for size in options.batch_tokens
        }
    ids = next(iter(oracles.values())).describe()["documents"]["report"]
    print("| model | task | metric | ours | stock | equal | largest difference | among stock |")
    print("| --- | --- | --- | --: | --: | --- | --: | --: |")
    for name, model in models(source, tokenizer, device, resolve_dtype(options.dtype, device)):
        ours = {size: our_values(asked, model, stock) for size, asked in oracles.items()}
        theirs = {}
        for size in options.batch_sizes:
            length = options.max_length or None
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=length)
            theirs[size] = stock_values(lm, stock, ids)
        for row in compare(ours, theirs):
            rows.append({"model": name, **row})
            values = (" / ".join(map(str, sorted({*row[s].values()}))) for s in ("ours", "stock"))
            print(
                f"| {name} | {row['task']} | {row['metric']} | {' | '.join(values)} "
                f"| {'yes' if row['equal'] else 'NO'} | {row['difference']:.1e} "
                f"| {row['stock_difference']:.1e} |",
                flush=True,
            )
    differing = sum(not row["equal"] for row in rows)
    print(f"\n{len(rows) - differing} of {len(rows)} accuracies are equal.")
    result = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, 1 of {os.cpu_count()} cores, Python "
        f"{platform.python_version()}",
        "versions": {package: version(package) for package in PACKAGES},
        "model": source.name if options.model != "embedded" else "embedded",
        "device": device.type,
        "dtype": options.dtype,
        "documents": options.documents,
        "max_length": options.max_length,
        "differing": differing,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    part = "" if options.model == "embedded" else f"-{source.name}"
    path = RESULTS / f"lm_eval_equality{part}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
