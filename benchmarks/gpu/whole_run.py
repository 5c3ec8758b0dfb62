"""A whole run on one GPU beside its plan: memory and time of every stage, and the training's speed.

    python benchmarks/gpu/whole_run.py --model smollm2/model --corpus alpaca.json
    python benchmarks/gpu/whole_run.py --shape llama-7b --corpus alpaca.json
    python benchmarks/gpu/whole_run.py --model embedded --device cpu

The model is pruned by a fifth of its parameters, evaluated, recovered by uniform LoRA with three
seeds, and evaluated again, by the code of ``rankadaptor-plugin run``. ``--shape`` makes a model
with random weights first, whose scores mean nothing. Of every stage, the peak of allocated memory
and the time are told beside what `plan` said of them; of the fine-tunes, tokens per second, and the
operations that they have to do over those of a matrix product measured in the same process (see
README.md beside this file). Writes ``results/gpu/whole_run-NAME-DEVICE-DATE.json``.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from recover import RESULTS, SHAPE, matmul_peak
from transformers import AutoModelForCausalLM, LlamaConfig

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.tables import EMBEDDED
from rankadaptor_plugin.models.device import device_name, resolve_device, resolve_dtype
from rankadaptor_plugin.models.footprint import TOKENS
from rankadaptor_plugin.pipeline.run import run
from rankadaptor_plugin.plugins import plugin_manager
from rankadaptor_plugin.testing.families import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping


class Watch:
    """Plugin that takes memory and time of each stage.

    Attributes:
        plan: What was planned, by stage.
        stages: Seconds and peak memory in bytes, by stage; memory is None on a CPU.
        speeds: Tokens per second of each step of the fine-tunes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._stage, self._began = "load", time.perf_counter()
        self.plan: dict[str, Mapping[str, Any]] = {}
        self.stages: dict[str, dict[str, float | None]] = {}
        self.speeds: list[float] = []

    @hookimpl
    def rankadaptor_on_plan(self, plan: Mapping[str, Any]) -> None:
        """Keeps the plan."""
        self.plan = {stage["name"]: stage for stage in plan["stages"]}

    @hookimpl
    def rankadaptor_on_progress(self, stage: str, done: int, total: int) -> None:
        """Closes a stage when the next one begins."""
        stage = stage.split()[0]  # base and pruned model are evaluated in one stage
        if stage != self._stage:
            peak = torch.cuda.max_memory_allocated() if self._on_gpu else None
            seconds = time.perf_counter() - self._began
            self.stages[self._stage] = {"seconds": seconds, "memory": peak}
            self._stage, self._began = stage, time.perf_counter()
            if self._on_gpu:
                torch.cuda.reset_peak_memory_stats()

    @hookimpl
    def rankadaptor_on_step(
        self, what: str, done: int, total: int, figures: Mapping[str, float]
    ) -> None:
        """Notes the speed of a step."""
        if what == "steps" and done > 1:  # the first one warms up
            self.speeds.append(figures["tokens_per_second"])


def random_model(folder: Path, dtype: torch.dtype) -> Path:
    """Writes a model of the shape of LLaMA-7B with random weights."""
    config = LlamaConfig(**SHAPE, tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def table(options: argparse.Namespace, model: str, output: Path) -> dict[str, Any]:
    """Returns the run file."""
    small = {"keep_first": 0, "keep_last": 0, "calibration_tokens": 7} if model == EMBEDDED else {}
    return {
        "model": model,
        "output": str(output),
        "recipe": "quick",
        "device": options.device,
        "prune": {"pruning_ratio": 0.2, "ratio_of": "parameters", **small},
        "corpus": {"path": options.corpus or EMBEDDED},
        "recovery": {"methods": ["lora"], "max_steps": options.steps},
        "oracle": {"tasks": list(options.tasks), "data_dir": options.data},
        "confirm": {"seeds": 3},
        "generation": {"max_new_tokens": 16},
    }


def main() -> None:
    """Runs, prints the table and writes all values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--shape", choices=["llama-7b"], help="a random model of this shape")
    parser.add_argument("--corpus", default="", help="rows of Alpaca")
    parser.add_argument("--tasks", nargs="+", default=["tiny_boolq", "tiny_piqa"])
    parser.add_argument("--data", default="", help="copies of the seven benchmarks, if asked")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = resolve_device(options.device)
    dtype = resolve_dtype("auto", device)
    name = options.shape or Path(options.model).name
    watch, manager = Watch(device), plugin_manager(third_party=False)
    manager.register(watch)
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model
        if options.shape:
            model = str(random_model(Path(scratch) / "model", dtype))
        config = run_file.from_dict(table(options, model, Path(scratch) / "run"))
        result = run(config, manager)
    peak = matmul_peak(device, dtype, 8192 if device.type == "cuda" else 1024)
    pruned = result.report["footprints"]["pruned"]
    speed = statistics.median(watch.speeds)
    # Forward 2 operations per multiply-accumulate, backward to the activations 2.
    per_token = 4 * pruned["macs"] / TOKENS
    print("| stage | s | planned | GiB | planned |\n| --- | --: | --: | --: | --: |")
    for stage, found in watch.stages.items():
        planned = watch.plan.get(stage, {"seconds": 0.0, "memory": 0})
        memory = found["memory"]
        print(
            f"| {stage} | {found['seconds']:.1f} | {planned['seconds']:.1f} | "
            f"{'' if memory is None else f'{memory / 2**30:.2f}'} | "
            f"{planned['memory'] / 2**30:.2f} |"
        )
    share = speed * per_token / peak
    print(f"\n{speed:,.0f} tokens/s, {share:.0%} of the matmul peak of {peak / 1e12:.1f} TFLOP/s")
    content = {
        "date": date.today().isoformat(),
        "device": device_name(device),
        "torch": torch.__version__,
        "options": vars(options),
        "tokens_per_second": speed,
        "matmul_tflops": peak / 1e12,
        "share_of_matmul": share,
        "stages": watch.stages,
        "plan": watch.plan,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"\W+", "-", device_name(device)).strip("-").lower()
    path = RESULTS / f"whole_run-{name}-{slug}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
