"""The two processes of a trial without this package's search: a fine-tune, and its evaluation.

    python benchmarks/trial_cost_peer.py train JOB RANKS ADAPTER
    python benchmarks/trial_cost_peer.py evaluate JOB ADAPTER RESULT

Started by ``trial_cost.py``, which writes JOB and documents its content. The first process loads
the pruned model, tokenizes, attaches LoRA, trains and writes ADAPTER; the second one asks lm-eval's
own model of model and adapter, and writes RESULT. Each imports no more than it needs, and prints
the seconds of its parts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


class Clock:
    """Seconds by part, counted from the last lap."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Ends a part."""
        now = time.perf_counter()
        self.seconds[part] = now - self._last
        self._last = now


def train(job: dict[str, Any], ranks: str, adapter: str) -> dict[str, float]:
    """Fine-tunes one adapter; returns the seconds of the parts."""
    clock = Clock()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rankadaptor_plugin.config.tables import CorpusConfig
    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.corpus.corpus import load_corpus
    from rankadaptor_plugin.corpus.sequences import IGNORED
    from rankadaptor_plugin.recovery import adapters

    torch.set_num_threads(1)
    clock.lap("imports")
    base = AutoModelForCausalLM.from_pretrained(job["pruned"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job["pruned"])
    clock.lap("load")
    corpus = CorpusConfig(**job["tokenize"])
    sequences = load_corpus(Path(job["corpus"]), tokenizer, corpus).sequences
    clock.lap("tokenize")
    table, seed = job["recovery"], job["seed"]
    torch.manual_seed(seed)
    model = adapters.attach(
        base,
        RankAllocation(tuple(json.loads(ranks))),
        adapters.LoraSettings(
            alpha_over_rank=table["alpha_over_rank"], lora_dropout=table["lora_dropout"]
        ),
        seed=seed,
    )
    clock.lap("attach")
    torch.manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=table["learning_rate"], weight_decay=table["weight_decay"]
    )
    steps, warmup, size = (
        table["max_steps"],
        table["warmup_steps"],
        table["per_device_train_batch_size"],
    )

    def factor(step: int) -> float:
        if step < warmup:
            return float((step + 1) / (warmup + 1))
        if table["lr_scheduler_type"] == "constant":
            return 1.0
        return float(max(0.0, (steps - step) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    model.train()
    for _ in range(steps):
        while len(waiting) < table["batch_size"]:
            waiting += torch.randperm(len(sequences), generator=generator).tolist()
        batch = [sequences[i] for i in waiting[: table["batch_size"]]]
        waiting = waiting[table["batch_size"] :]
        trained = sum(int((s.labels[1:] != IGNORED).sum()) for s in batch)
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            padded = {
                name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
                for name, rows, value in (
                    ("input_ids", [s.tokens for s in part], 0),
                    ("attention_mask", [torch.ones_like(s.tokens) for s in part], 0),
                    ("labels", [s.labels for s in part], IGNORED),
                )
            }
            model(**padded, use_cache=False, num_items_in_batch=trained).loss.backward()
        if table["max_grad_norm"]:
            torch.nn.utils.clip_grad_norm_(parameters, table["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    clock.lap("train")
    model.save_pretrained(adapter)
    clock.lap("save")
    return clock.seconds


def evaluate(job: dict[str, Any], adapter: str, result: str) -> dict[str, float]:
    """Asks lm-eval; writes metrics and log-likelihoods by task, returns the seconds of the parts.

    lm-eval's thousands of own tasks are not indexed, as its command line would.
    """
    clock = Clock()
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    import rankadaptor_plugin  # noqa: F401 (which makes transformers know pruned models)

    torch.set_num_threads(1)
    clock.lap("imports")
    lm = HFLM(
        pretrained=job["pruned"],
        peft=adapter,
        dtype="auto",
        device="cpu",
        batch_size=job["lm_eval_batch_size"],
        max_length=job["max_length"] or None,
    )
    clock.lap("load")
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(job["documents"]),
        samples=job["documents"],
        task_manager=TaskManager(include_path=job["task_paths"], include_defaults=False),
        bootstrap_iters=0,
    )
    clock.lap("evaluate")
    answers = {
        name: [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
        for name, samples in found["samples"].items()
    }
    metrics = {
        name: {m: values[f"{m},none"] for m in ("acc", "acc_norm") if f"{m},none" in values}
        for name, values in found["results"].items()
    }
    Path(result).write_text(json.dumps({"metrics": metrics, "answers": answers}), "utf-8")
    clock.lap("save")
    return clock.seconds


def main() -> None:
    """Runs one of the two processes."""
    step, job_file, *paths = sys.argv[1:]
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    seconds = {"train": train, "evaluate": evaluate}[step](job, *paths)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
