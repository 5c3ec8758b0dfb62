"""Memory of importance scores above the model: whole gradients against streamed ones.

    python benchmarks/pruning_memory.py
    python benchmarks/pruning_memory.py --device cuda --shape llama-7b --dtype bfloat16
    OMP_NUM_THREADS=1 python benchmarks/pruning_memory.py --shape quarter --dtype bfloat16 \
        --sequences 2 --tokens 2048 --scores mix second

Llamas with random weights, by default with 10 sequences of 64 tokens. "whole" is one backward pass
per sequence that leaves a gradient in every parameter of the layers, as LLM-Pruner does; the others
are `unit_scores` by their Taylor term. On the CPU the memory is the highest sum of the storages of
live tensors that torch operations made, counted at every operation: exact and the same each time,
unlike the memory of the process, which allocators round up and keep; buffers inside of one
operation are not seen. On a GPU it is what torch's allocator says. The weights, which are there
before, do not count. Limits on what is kept are those of a 7B model, in proportion to widths and
layers, so that as many sequences go through in one pass, and as many layers are added up over the
passes. Times are taken in a run without the counting. Prints a table and writes
``results/pruning_memory-DATE.json``; options other than the default become part of the name.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
import weakref
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import LlamaConfig, LlamaForCausalLM

from rankadaptor_plugin.config.tables import PruneConfig
from rankadaptor_plugin.models.structures import layer_units
from rankadaptor_plugin.pruning import calibration
from rankadaptor_plugin.pruning.importance import unit_scores

if TYPE_CHECKING:
    from collections.abc import Callable

    from rankadaptor_plugin.models.structures import Units

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = {
    "small": {"hidden_size": 512, "heads": 8, "intermediate_size": 1408, "vocab_size": 32000},
    "quarter": {"hidden_size": 1024, "heads": 8, "intermediate_size": 2752, "vocab_size": 32000},
    "llama-7b": {"hidden_size": 4096, "heads": 32, "intermediate_size": 11008, "vocab_size": 32000},
}
LAYERS = {"small": (4, 8, 16, 32), "quarter": (2, 4), "llama-7b": (32,)}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make while it is on."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and looks at what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._known:
                storage = tensor.untyped_storage()
                self._known[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _forget(self, size: int) -> None:
        self.now -= size


def build(shape: str, layers: int, device: str, dtype: str) -> LlamaForCausalLM:
    """Makes a Llama with random weights, right on its device."""
    sizes = dict(SHAPES[shape])
    heads = sizes.pop("heads")
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_hidden_layers=layers)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def units_of(model: LlamaForCausalLM) -> list[Units]:
    """Describes the heads and the MLP channels of all layers."""
    return [kind for layer in layer_units(model) for kind in layer]


def whole(model: LlamaForCausalLM, kinds: list[Units], samples: list[torch.Tensor]) -> None:
    """First-order scores of all matrices, once all gradients are there."""
    model.requires_grad_(False)
    matrices = [member for units in kinds for member in units]
    for member in matrices:
        member.module.requires_grad_(True)
    for sample in samples:
        ids = sample[None].to(model.device)
        (model(input_ids=ids, labels=ids, use_cache=False).loss / len(samples)).backward()
    with torch.no_grad():
        for member in matrices:
            gradient = member.module.weight.grad
            salience = (gradient.float() * member.weight.float()).abs_()
            salience.sum(1 if member.side == "out" else 0).cpu()
    model.zero_grad()


def streamed(
    model: LlamaForCausalLM, kinds: list[Units], samples: list[torch.Tensor], *, term: str
) -> None:
    """The scores as the package makes them."""
    unit_scores(model, kinds, samples, PruneConfig(importance="taylor", taylor=term))


def measure(model: LlamaForCausalLM, work: Callable[[], None]) -> tuple[int, float]:
    """Returns the peak above the weights in bytes and the time in seconds."""
    gc.collect()
    if model.device.type == "cuda":
        work()  # the first use of a GPU loads its libraries
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, time.perf_counter() - began
    with LiveBytes(model) as counter:
        work()
    began = time.perf_counter()
    work()
    return counter.peak, time.perf_counter() - began


def machine_of(device: str) -> str:
    """Names the processor, or the GPU, and the versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if device == "cpu" and cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    used = f"{torch.get_num_threads()} of {os.cpu_count()} cores used"
    return f"{name}, {used}, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> None:
    """Measures all ways at all depths, prints the table and writes the values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=int, nargs="+", default=None)
    parser.add_argument("--sequences", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--scores", nargs="+", default=["whole", "first", "mix"])
    options = parser.parse_args()
    machine = machine_of(options.device)
    generator = torch.Generator().manual_seed(1)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    size = (options.sequences, options.tokens)
    samples = list(torch.randint(0, vocabulary, size, generator=generator))
    terms = ("first", "mix", "second", "vectorize")
    ways = {term: partial(streamed, term=term) for term in terms} | {"whole": whole}
    print(f"{machine}; {options.dtype}\n")
    print("| layers | weights MiB | scores | MiB above the weights | in layers | seconds |")
    print("| --: | --: | --- | --: | --: | --: |")
    rows = []
    inputs, sums = calibration.LIMITS
    for layers in options.layers or LAYERS[options.shape]:
        width = SHAPES[options.shape]["hidden_size"] / SHAPES["llama-7b"]["hidden_size"]
        part = layers / max(layers, LAYERS["llama-7b"][-1])
        limits = calibration.Limits(int(inputs * width * part), int(sums * width**2))
        calibration.LIMITS = limits
        model = build(options.shape, layers, options.device, options.dtype)
        kinds = units_of(model)
        weights = sum(p.nbytes for p in model.parameters())
        layer = sum(p.nbytes for p in model.model.layers[0].parameters())
        for way in options.scores:
            peak, seconds = measure(model, partial(ways[way], model, kinds, samples))
            rows.append(
                {
                    "layers": layers,
                    "weight_bytes": weights,
                    "layer_bytes": layer,
                    "scores": way,
                    "peak_bytes_above_weights": peak,
                    "seconds": seconds,
                }
            )
            print(
                f"| {layers} | {weights / 2**20:.0f} | {way} | {peak / 2**20:.1f} | "
                f"{peak / layer:.1f} | {seconds:.2f} |",
                flush=True,
            )
        del model, kinds
    RESULTS.mkdir(exist_ok=True)
    names = ("device", "shape", "dtype", "tokens")
    changed = [str(getattr(options, n)) for n in names]
    changed = [v for n, v in zip(names, changed, strict=True) if v != str(parser.get_default(n))]
    name = "-".join(["pruning_memory", *changed, date.today().isoformat()])
    found = {"machine": machine, **vars(options), "runs": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
