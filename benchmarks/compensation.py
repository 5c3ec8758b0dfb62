r"""Compensation beside its alternatives: block-wise training, and Prune&Comp for removed blocks.

    OMP_NUM_THREADS=1 python benchmarks/compensation.py RUN.toml --name NAME

The model of a run file is pruned as it says, and, in a second pass, by removing as many blocks as
`--blocks` says. What is left is then mended without any LoRA:

* least squares: `rankadaptor_plugin.pruning.compensate`, on the recovery corpus alone and on half
  corpus, half text that the unpruned model writes.
* block-wise: every pruned block is trained by AdamW to give what the unpruned block gives, its
  input being the pruned model's own stream, block after block from the bottom (as LaCo and SlimLLM
  do), for the CPU time of least squares, and for ten times that; the best of three learning rates.
* Prune&Comp (arXiv 2507.18212): for removed blocks, the matrices that write into the stream below
  them are scaled by the ratio of the mean norms of the unpruned stream behind and before them.

Loss per trained token on rows of the corpus that nothing was fitted to, accuracy on the report
documents, and CPU seconds, also in optimizer steps of LoRA r=8. Printed and written to
``results/compensation-NAME-DATE.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from levers import Bench
from transformers.utils import logging as transformers_logging

from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.models.structures import decoder_layers, structure_of
from rankadaptor_plugin.pruning.calibration import mixed_text, written_text
from rankadaptor_plugin.pruning.compensation import (
    Compensation,
    _passes,
    _Stream,
    compensate,
)
from rankadaptor_plugin.pruning.depth import keep_layers
from rankadaptor_plugin.recovery import recover
from rankadaptor_plugin.recovery.adapters import bare_model
from rankadaptor_plugin.recovery.memory import MicroBatch
from rankadaptor_plugin.recovery.training import mean_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

RESULTS = Path(__file__).resolve().parent / "results"
RATES = (1e-4, 1e-3, 1e-2)


def block_wise(
    base: PreTrainedModel,
    pruned: PreTrainedModel,
    text: Sequence[torch.Tensor],
    seconds: float,
    rate: float,
) -> None:
    """Trains the blocks of a pruned model, in place, for so many CPU seconds in all."""
    batches = _passes(list(text))
    with torch.no_grad():
        ours, theirs = (_Stream(model, batches, None) for model in (pruned, base))
    layers = decoder_layers(pruned)
    for index, layer in enumerate(layers):
        with torch.no_grad():
            theirs.advance(index)
        began = time.process_time()
        layer.requires_grad_(True)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=rate)
        number = 0
        while time.process_time() - began < seconds / len(layers):
            batch = number % len(batches)
            with torch.enable_grad():
                error = (ours.run(index, batch) - theirs.states[batch]).float().square()
                loss = error[ours.real[batch]].mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            number += 1
        layer.requires_grad_(False)
        with torch.no_grad():
            ours.advance(index)


@torch.no_grad()
def prune_and_comp(
    base: PreTrainedModel,
    pruned: PreTrainedModel,
    text: Sequence[torch.Tensor],
    kept: Sequence[int],
) -> None:
    """Scales what writes into the stream below removed blocks, in place."""
    stream, structure = _Stream(base, _passes(list(text)), None), structure_of(base)
    norms = []
    for index in range(len(decoder_layers(base)) + 1):
        values = [
            s[r].float().norm(dim=-1) for s, r in zip(stream.states, stream.real, strict=True)
        ]
        norms.append(float(torch.cat(values).mean()))
        if index < len(decoder_layers(base)):
            stream.advance(index)
    ends = [*kept[1:], len(decoder_layers(base))]
    scale = 1.0
    for index, (number, end) in reversed(list(enumerate(zip(kept, ends, strict=True)))):
        scale *= norms[end] / norms[number + 1]
        for name in (structure.output, structure.contract):
            decoder_layers(pruned)[index].get_submodule(name).weight.mul_(scale)
    embeddings: Any = pruned.get_input_embeddings()
    if not pruned.config.tie_word_embeddings:
        embeddings.weight.mul_(scale * norms[kept[0]] / norms[0])


class Table:
    """Rows of the result.

    Args:
        bench: Model, documents and held-out rows.
        step: CPU seconds of an optimizer step of LoRA.
    """

    def __init__(self, bench: Bench, step: float) -> None:
        self.bench, self.step, self.rows = bench, step, {}

    def add(self, name: str, model: PreTrainedModel, change: Callable[[], object]) -> float:
        """Changes a model, and measures it; returns the CPU seconds of the change."""
        began = time.process_time()
        change()
        seconds = time.process_time() - began
        score = self.bench.prepared.context.oracle.score(model, "report")
        loss = mean_loss(model, self.bench.held_out, MicroBatch(5))
        self.rows[name] = {
            "accuracy": score.mean("accuracy"),
            "loss": loss,
            "cpu_seconds": seconds,
            "steps": seconds / self.step,
        }
        print(
            f"| {name} | {loss:.3f} | {100 * score.mean('accuracy'):.1f} | {seconds:.2f} | "
            f"{seconds / self.step:.1f} |",
            flush=True,
        )
        return seconds


def texts(bench: Bench, base: PreTrainedModel) -> dict[str, list[torch.Tensor]]:
    """Returns the calibration texts by name."""
    length, seed = bench.config.corpus.max_length, bench.config.seed
    rows = [torch.as_tensor(s.tokens, dtype=torch.int64) for s in bench.corpus.sequences]
    written = written_text(base, bench.prepared.tokenizer, count=256, tokens=length, seed=seed)
    return {
        "corpus": mixed_text(rows, [], tokens=length, most=512, seed=seed),
        "corpus and written text": mixed_text(rows, written, tokens=length, most=512, seed=seed),
    }


def lora_step(bench: Bench) -> float:
    """Returns the CPU seconds of an optimizer step of LoRA r=8."""
    ranks = RankAllocation((8,) * len(decoder_layers(bench.pruned.model)))
    seconds = []
    for steps in (2, 12):
        began = time.process_time()
        settings = replace(bench.config.recovery, max_steps=steps)
        tuned = recover(bench.pruned.model, bench.prepared.tokenizer, ranks, bench.corpus, settings)
        seconds.append(time.process_time() - began)
        bare_model(tuned.model)
    return (seconds[1] - seconds[0]) / 10


def measure(bench: Bench, blocks: Sequence[int]) -> dict[str, Any]:
    """Measures everything on one model."""
    base, table = bench.base(), Table(bench, lora_step(bench))
    calibration, kinds = texts(bench, base), {"width": bench.pruned.model}
    kept = [i for i in range(len(decoder_layers(base))) if i not in blocks]
    short = copy.deepcopy(base)
    keep_layers(short, kept)
    kinds["depth"] = short
    table.add("unpruned", base, lambda: None)
    for kind, pruned in kinds.items():
        layers = kept if kind == "depth" else None
        table.add(f"{kind}, pruned", pruned, lambda: None)
        seconds = 0.0
        for name, text in calibration.items():
            model = copy.deepcopy(pruned)

            def fit(model: Any = model, text: Any = text, layers: Any = layers) -> None:
                found: Compensation = compensate(base, model, text, kept_layers=layers)
                found.put(model)

            seconds = table.add(f"{kind}, least squares, {name}", model, fit)
        text = calibration["corpus and written text"]
        if kind == "depth":
            model = copy.deepcopy(pruned)
            scale = partial(prune_and_comp, base, model, text, kept)
            table.add("depth, Prune&Comp", model, scale)
            continue
        for times in (1, 10):
            for rate in RATES:
                model = copy.deepcopy(pruned)
                train = partial(block_wise, base, model, text, times * seconds, rate)
                table.add(f"{kind}, block-wise, {times} times the CPU time, {rate:g}", model, train)
    return table.rows


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--name", required=True, help="of the result")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="as of run")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2], help="that depth removes")
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--work", type=Path, default=Path("runs/compensation"))
    options = parser.parse_args()
    options.text = None
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    print("| model | loss on held-out rows | accuracy, % | CPU s | in LoRA steps |")
    print("| --- | --: | --: | --: | --: |")
    rows = measure(Bench(options), options.blocks)
    path = RESULTS / f"compensation-{options.name}-{date.today().isoformat()}.json"
    path.write_text(json.dumps({"blocks": options.blocks, "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
