"""Speed and memory of fine-tuning a pruned LLaMA-7B on one GPU.

    python benchmarks/gpu/recover.py
    python benchmarks/gpu/recover.py --only micro,checkpointing --folder results
    python benchmarks/gpu/recover.py --tiny --device cpu

Random weights of the shape of LLaMA-7B in bfloat16, made on the device; a quarter of the KV groups
and MLP channels of layers 5 to 30 are removed by the width pruner, which is a fifth of all
parameters. LoRA of mean rank 8 on the seven projections, 64 sequences per optimizer step, the
project's own loop. A cell is a few optimizer steps with one choice of settings; one that fails is
written down with its reason. See README.md beside this file for what is counted. Writes
``results/gpu/recover-DEVICE-DATE.json`` after every cell.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import logging
import math
import platform
import re
import signal
import statistics
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from rankadaptor_plugin.config.tables import PruneConfig, RecoveryConfig
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.corpus.sequences import IGNORED, TrainingSequence
from rankadaptor_plugin.models.structures import decoder_layers, structure_of
from rankadaptor_plugin.pruning.width import prune_width
from rankadaptor_plugin.recovery import training
from rankadaptor_plugin.recovery.batches import batches
from rankadaptor_plugin.recovery.memory import MicroBatch
from rankadaptor_plugin.recovery.methods import methods as recovery_methods
from rankadaptor_plugin.recovery.slots import module_ranks
from rankadaptor_plugin.testing.families import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peft import PeftModel
    from transformers import PreTrainedModel

    Cell = tuple[str, dict[str, Any]]

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu"
SHAPE = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
TINY = SHAPE | {
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 176,
    "vocab_size": 512,
}
RANK = 8
MEDIAN, SPREAD, SHORTEST = 140, 0.55, 48  # of the lengths of tokenized Alpaca rows, log-normal
PROMPT = 45  # tokens in front of which nothing is trained
WARM_UP = 1  # steps that are not timed


def main() -> None:
    """Measures all cells."""
    options = arguments()
    device = torch.device(options.device)
    logging.basicConfig(level=logging.WARNING)
    began = time.perf_counter()
    ends = began + 60 * options.minutes
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    dtype = torch.float32 if options.tiny else torch.bfloat16
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    peak = matmul_peak(device, dtype, 512 if options.tiny else 8192)
    print(f"{name or 'cpu'}: matmul {peak / 1e12:.1f} TFLOP/s in {dtype}")
    made = time.perf_counter()
    model = pruned_model(TINY if options.tiny else SHAPE, device, dtype)
    bench = Bench(model, peak, tiny=options.tiny)
    report: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
        "dtype": str(dtype),
        "tiny": options.tiny,
        "matmul_tflops": peak / 1e12,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_unpruned": unpruned(TINY if options.tiny else SHAPE),
        "build_seconds": time.perf_counter() - made,
        "cells": [],
    }
    slug = "tiny" if options.tiny else re.sub(r"\W+", "-", name or "cpu").strip("-").lower()
    path = options.folder / f"recover-{slug}-{date.today().isoformat()}.json"
    wanted = {group for group in options.only.split(",") if group}
    for group, settings in cells(tiny=options.tiny):
        if wanted and group not in wanted:
            continue
        left = ends - time.perf_counter()
        result = bench.measured(settings, min(left, 60 * options.cell_minutes))
        report["cells"].append({"group": group, **settings, **result})
        report["seconds"] = time.perf_counter() - began
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(line(group, settings, result), flush=True)
    print(f"{report.get('seconds', 0):.0f} s, {path}")


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a toy model in float32")
    parser.add_argument("--only", default="", help="groups of cells, separated by commas")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no cell after these")
    parser.add_argument(
        "--cell-minutes", type=float, default=2.5, help="give a cell up after these"
    )
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the result goes")
    return parser.parse_args()


def cells(*, tiny: bool) -> Iterator[Cell]:
    """Yields the groups and settings of all cells, those that matter most first."""
    size = 4 if tiny else 16
    yield "micro", {"rows": "alpaca", "micro": size}
    for micro in (size // 4, size // 2, size, 2 * size):
        yield "micro", {"rows": "full", "micro": micro}
    for micro in (size, 4 * size):
        yield "checkpointing", {"rows": "full", "micro": micro, "checkpointing": True}
    yield "checkpointing", {"rows": "alpaca", "micro": 4 * size, "checkpointing": True}
    yield "compile", {"rows": "full", "micro": size, "compile": False}
    yield "compile", {"rows": "full", "micro": size, "compile": True}


class Bench:
    """One resident model, on which every cell is run.

    Args:
        model: The pruned model.
        peak: Operations per second of a large matrix product.
        tiny: Whether it is the toy.
    """

    def __init__(self, model: PreTrainedModel, peak: float, *, tiny: bool) -> None:
        self._model: PreTrainedModel | PeftModel = model
        self._bare, self._peak, self._tiny = model, peak, tiny
        self._cutoff = 32 if tiny else 256
        self._batch, self._steps = (8, 3) if tiny else (64, 4)

    def measured(self, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Runs a cell; returns its figures, or why there are none."""
        device = self._bare.device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        try:
            with time_limit(seconds):
                result = self._run(settings)
        except Exception as error:  # whatever it is, the other cells go on
            why = " ".join(str(error).split())[:300]
            result = {"failed": f"{type(error).__name__}: {why}"}
        if device.type == "cuda":
            result["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return result | {"cell_seconds": time.perf_counter() - began}

    def _run(self, settings: dict[str, Any]) -> dict[str, Any]:
        micro_size = min(settings["micro"], self._batch)
        config = RecoveryConfig(
            max_steps=100,
            per_device_train_batch_size=micro_size,
            gradient_accumulation_steps=self._batch // micro_size,
            gradient_checkpointing=settings.get("checkpointing", False),
        )
        steps = WARM_UP + self._steps
        sequences = rows(
            settings["rows"], self._batch * steps, self._cutoff, self._bare.config.vocab_size
        )
        marks: list[float] = []

        def on_step(_: int) -> None:
            if self._bare.device.type == "cuda":
                torch.cuda.synchronize(self._bare.device)
            marks.append(time.perf_counter())

        allocation = RankAllocation((RANK,) * len(decoder_layers(self._bare)))
        micro = MicroBatch(config.per_device_train_batch_size)
        with compiled(self._bare, settings.get("compile", False), tiny=self._tiny):
            method = recovery_methods.parse_method("lora")
            order = batches(sequences, self._batch, 0)
            tuned = recovery_methods.begin(
                self._model, method, allocation, config, seed=0, steps=steps, sequences=sequences
            )
            self._model = tuned.model
            training.train(tuned, order, config, steps, micro=micro, on_step=on_step)
        order = batches(sequences, self._batch, 0)
        drawn = [next(order) for _ in range(steps)][WARM_UP:]
        taken = [later - earlier for earlier, later in itertools.pairwise(marks)]
        # Medians: a step in which memory ran out counts its failed passes as well.
        tokens = [sum(len(s.tokens) for s in batch) for batch in drawn]
        operations = [flops(self._bare, allocation, batch) for batch in drawn]
        rate = statistics.median(n / t for n, t in zip(tokens, taken, strict=True))
        speed = statistics.median(n / t for n, t in zip(operations, taken, strict=True))
        return {
            "tokens_per_second": rate,
            "model_tflops": speed / 1e12,
            "share_of_matmul": speed / self._peak,
            "step_seconds": statistics.median(taken),
            "tokens_per_step": statistics.mean(tokens),
            "micro_used": micro.size,
        }


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Returns the operations per second of a large matrix product, the best of five tries."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    repeats, best = 20, 0.0
    for _ in range(6):  # the first one is slow
        wait()
        began = time.perf_counter()
        for _ in range(repeats):
            torch.matmul(left, right)
        wait()
        best = max(best, 2 * size**3 * repeats / (time.perf_counter() - began))
    return best


def pruned_model(
    shape: dict[str, int], device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """Makes random weights and removes a quarter of the units of the layers in the middle."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, tie_word_embeddings=False)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    first, last = (1, 1) if shape is TINY else (4, 2)
    settings = PruneConfig(
        importance="random", pruning_ratio=0.25, keep_first=first, keep_last=last
    )
    pruned: PreTrainedModel = prune_width(model.eval(), tiny_tokenizer(), [], settings).model
    return pruned.requires_grad_(False)


def unpruned(shape: dict[str, int]) -> int:
    """Returns the parameters before pruning."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, tie_word_embeddings=False))
    return sum(p.numel() for p in model.parameters())


def rows(kind: str, count: int, cutoff: int, vocabulary: int) -> list[TrainingSequence]:
    """Draws sequences: ``full`` of the greatest length, ``alpaca`` of about Alpaca's lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.full((count,), cutoff)
    if kind == "alpaca":
        scale = cutoff / 256
        drawn = torch.randn(count, generator=generator).mul(SPREAD).add(math.log(MEDIAN)).exp()
        lengths = (drawn * scale).clamp(max(4, SHORTEST * scale), cutoff).long()
    made = []
    for length in lengths.tolist():
        tokens = torch.randint(3, vocabulary, (length,), generator=generator)
        labels = tokens.clone()
        labels[: PROMPT * cutoff // 256] = IGNORED
        made.append(TrainingSequence(tokens, labels))
    return made


def flops(
    model: PreTrainedModel, allocation: RankAllocation, batch: Sequence[TrainingSequence]
) -> float:
    """Counts what a fine-tune has to compute for a batch; padding and recomputing count nothing."""
    structure, layers = structure_of(model), decoder_layers(model)
    ranks = module_ranks(model, allocation)
    matrices = adapters = width = 0
    for index, layer in enumerate(layers):
        for name in structure.matrices:
            outputs, inputs = layer.get_parameter(f"{name}.weight").shape
            matrices += outputs * inputs
            full_name = f"{structure.layers}.{index}.{name}"
            adapters += ranks.get(full_name, 0) * (outputs + inputs)
        width += layer.get_parameter(f"{structure.output}.weight").shape[1]
    head = model.get_output_embeddings().weight.numel()
    tokens = sum(len(sequence.tokens) for sequence in batch)
    trained = sum(int((sequence.labels[1:] != IGNORED).sum()) for sequence in batch)
    squares = sum(len(sequence.tokens) ** 2 for sequence in batch)
    return (
        4 * matrices * tokens  # forward, and backward to the activations; the weights are frozen
        + 4 * head * trained
        + 6 * adapters * tokens  # which get gradients of their weights besides
        + 6 * width * squares  # causal attention: two products of half a square, three times
    )


@contextlib.contextmanager
def compiled(model: PreTrainedModel, wanted: bool, *, tiny: bool) -> Iterator[None]:
    """Compiles the decoder layers while the block lasts."""
    if not wanted:
        yield
        return
    layers = decoder_layers(model)
    for layer in layers:
        layer.compile(backend="aot_eager" if tiny else "inductor", dynamic=False)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None  # there is no public way back
        torch.compiler.reset()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block when its time is up, where the system can."""
    if seconds <= 0:
        raise TimeoutError("no time was left")

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it took more than {seconds:.0f} s")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def line(group: str, settings: dict[str, Any], result: dict[str, Any]) -> str:
    """Returns a cell for people."""
    told = ", ".join(f"{key} {value}" for key, value in settings.items())
    memory = f", {result['peak_gib']:.1f} GiB" if "peak_gib" in result else ""
    if "failed" in result:
        return f"{group}: {told}: {result['failed']}{memory}"
    return (
        f"{group}: {told}: {result['tokens_per_second']:,.0f} tokens/s, "
        f"{100 * result['share_of_matmul']:.1f} % of matmul{memory}"
    )


if __name__ == "__main__":
    main()
