"""Cost of the loss behind the output layer: some tokens at a time, all at once, and torch's own.

    OMP_NUM_THREADS=1 python benchmarks/output_layer.py

Loss and gradient of random hidden states through a random output layer: "whole" holds the logits of
all tokens and their gradient, "parts" is `summed_loss`, "torch" is ``linear_cross_entropy`` in
chunks of as many tokens, which uses no autocast and knows no distillation. SmolLM2's layer with 16
rows of about 90 trained tokens, and a small one. They take turns; the median counts.
Memory is the highest sum of live tensors above weights and hidden states, as in
``pruning_memory.py``, which does not see into torch's function. Printed and written to
``results/output_layer-DATE.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import date
from typing import TYPE_CHECKING

import torch
from pruning_memory import RESULTS, LiveBytes, machine_of
from torch.nn import LinearCrossEntropyOptions, functional
from transformers import LlamaConfig, LlamaForCausalLM

from rankadaptor_plugin.models import logits
from rankadaptor_plugin.models.logits import logits_of, summed_loss

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = {"SmolLM2-135M": (49152, 576, 1440), "small": (260, 64, 300)}
"""Vocabulary, hidden size, trained tokens of a pass."""


def cross_entropy(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Adds up the loss in float32."""
    return functional.cross_entropy(predictions.float(), targets, reduction="sum")


def ways(
    model: LlamaForCausalLM, hidden: torch.Tensor, targets: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    """Returns the three ways to the loss."""
    tokens = logits._CHUNK // model.config.vocab_size

    def torchs() -> torch.Tensor:
        options = LinearCrossEntropyOptions(batch_chunk_size=min(tokens, len(targets)))
        return functional.linear_cross_entropy(
            hidden, model.lm_head.weight, targets, reduction="sum", options=options
        )

    return {
        "whole": lambda: cross_entropy(logits_of(model, hidden), targets),
        "parts": lambda: summed_loss(
            model, hidden, lambda p, rows: cross_entropy(p, targets[rows])
        ),
        "torch": torchs,
    }


def seconds(way: Callable[[], torch.Tensor]) -> float:
    """Returns the CPU seconds of a loss with its gradient."""
    began = time.process_time()
    torch.autograd.backward(way())
    return time.process_time() - began


def main() -> None:
    """Measures all ways, prints the table and writes the values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| case | dtype | way | CPU ms | MiB | gradient off by |")
    print("| --- | --- | --- | --: | --: | --: |")
    for case, (vocabulary, size, tokens) in CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=vocabulary, hidden_size=size, num_hidden_layers=1, num_attention_heads=1
            )
            model = LlamaForCausalLM(config).to(dtype).requires_grad_(False)
            hidden = torch.randn(tokens, size).to(dtype).requires_grad_()
            targets = torch.randint(vocabulary, (tokens,))
            all_ways = ways(model, hidden, targets)
            times: dict[str, list[float]] = {name: [] for name in all_ways}
            for _ in range(options.turns + 1):  # the first one warms up
                for name, way in all_ways.items():
                    times[name].append(seconds(way))
            exact = hidden.detach().double().requires_grad_()
            predictions = functional.linear(exact, model.lm_head.weight.double())
            loss = functional.cross_entropy(predictions, targets, reduction="sum")
            (expected,) = torch.autograd.grad(loss, exact)
            del predictions, loss
            for name, way in all_ways.items():
                hidden.grad = None
                with LiveBytes(model) as counter:
                    torch.autograd.backward(way())
                row = {
                    "case": case,
                    "dtype": str(dtype).removeprefix("torch."),
                    "way": name,
                    "cpu_seconds": statistics.median(times[name][1:]),
                    "peak_bytes": counter.peak,
                    "gradient_error": float((hidden.grad - expected).norm() / expected.norm()),
                }
                rows.append(row)
                print(
                    f"| {case} | {row['dtype']} | {name} | {1e3 * row['cpu_seconds']:.2f} | "
                    f"{counter.peak / 2**20:.1f} | {row['gradient_error']:.1e} |",
                    flush=True,
                )
    found = {"machine": machine_of("cpu"), **vars(options), "runs": rows}
    path = RESULTS / f"output_layer-{date.today().isoformat()}.json"
    path.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
