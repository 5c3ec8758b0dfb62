r"""Cost of an optimizer step of our loop, compared with the plain loop of transformers and PEFT.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py
    OMP_NUM_THREADS=1 python benchmarks/training_step.py --model DIR --corpus FILE --batch-size 16 \
        --steps 3 --turns 3

Two cases: the embedded default, whose sequences are short and nearly alike, and the pruned story
model of ``run_files/stories260k.toml`` with rows of Alpaca, of very uneven lengths; the second one
needs ``../shared`` and is left out without it. With ``--model``, that model alone, without a fifth
of its parameters and with rows of Alpaca up to 128 tokens. Each is run in float32, and in bfloat16
with adapters in float32; in bfloat16 with the attention kernels that a run would choose. Both loops
see the same sequences in the same order and begin with the same adapter. The plain one calls PEFT's
layers, gives the model an attention mask, lets it predict every token, leaves those out of the loss
that are not trained, and takes torch's AdamW as it is. They take turns; in each turn a loop makes a
few steps, the first of which only warms up, and the median of the others counts. Losses are
compared, and what autograd keeps for the backward pass of the
largest pass is counted. Printed and written to ``results/training_step-DATE.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from embedded_default import processor
from torch.nn import functional
from transformers.utils import logging as transformers_logging

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.run_file import EMBEDDED_RUN_FILE
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.corpus.sequences import IGNORED
from rankadaptor_plugin.models.checkpoints import load_model
from rankadaptor_plugin.models.device import attending, faster_attention
from rankadaptor_plugin.pipeline.preparation import prepare
from rankadaptor_plugin.plugins import plugin_manager
from rankadaptor_plugin.recovery.batches import batches, passes, trained_tokens
from rankadaptor_plugin.recovery.memory import MicroBatch
from rankadaptor_plugin.recovery.methods import methods as recovery_methods
from rankadaptor_plugin.recovery.slots import rank_space
from rankadaptor_plugin.recovery.training import (
    learning_rate_factor,
    mixed_precision,
    train,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

    from rankadaptor_plugin.config.tables import RecoveryConfig, RunConfig
    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.corpus.sequences import TrainingSequence
    from rankadaptor_plugin.recovery.methods.methods import Tuned

    Loop = Callable[["Case", Tuned, int, "Clock"], list[float]]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STORIES = ROOT / "benchmarks" / "run_files" / "stories260k.toml"
ALPACA = ROOT.parent / "shared" / "data" / "instruct" / "alpaca_random_9k.json"
PACKAGES = ("torch", "transformers", "peft")
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Turn:
    """Seconds of a step in a turn, wall and CPU, and the losses."""

    wall: float
    cpu: float
    losses: list[float]


class Clock:
    """Takes wall and CPU time at the end of each step."""

    def __init__(self) -> None:
        self._ticks: list[tuple[float, float]] = []

    def tick(self, *_: object) -> None:
        """Notes the end of a step."""
        self._ticks.append((time.perf_counter(), time.process_time()))

    def turn(self, losses: list[float]) -> Turn:
        """Returns the medians of the steps, the first left out."""
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(self._ticks)]
        wall, cpu = (statistics.median(seconds) for seconds in zip(*steps, strict=True))
        return Turn(wall, cpu, losses)


@dataclasses.dataclass(frozen=True)
class Case:
    """A pruned model, its ranks, and what it is fine-tuned on."""

    model: PreTrainedModel
    sequences: Sequence[TrainingSequence]
    config: RecoveryConfig
    allocation: RankAllocation
    attention: str = ""

    def in_type(self, dtype: torch.dtype) -> Case:
        """Returns the case in another type, with the attention that a run would choose."""
        model = self.model.to(dtype)
        rows = passes(self.sequences[:2], 2)[0].input_ids
        return dataclasses.replace(self, model=model, attention=faster_attention(model, rows))


def case(config: RunConfig) -> Case:
    """Prunes as a run does, and draws an allocation within the budget of uniform LoRA."""
    with tempfile.TemporaryDirectory() as scratch:
        config = dataclasses.replace(config, output=str(Path(scratch) / "run"), device="cpu")
        folder = RunFolder(Path(config.output))
        with folder.opened():
            manager = plugin_manager(third_party=False)
            prepared = prepare(config, manager, folder, None, time.perf_counter())
        torch.manual_seed(config.seed)
        base = load_model(prepared.source, device=prepared.device, dtype=prepared.dtype)
        pruned = prepared.pruner(base, prepared.tokenizer, prepared.calibration, config.prune)
    space = rank_space(pruned.model, pruned.pruned_layers, config.rank_space, config.recovery)
    (row,) = space.sample(1, np.random.default_rng(_SEED)).tolist()
    return Case(
        pruned.model,
        prepared.context.corpus.sequences,
        config.recovery,
        space.within_budget(space.allocation(row), _SEED),
    )


def passes_of(config: RecoveryConfig, batch_size: int, micro: int) -> RecoveryConfig:
    """Returns the settings with so many sequences per step and per pass."""
    return dataclasses.replace(
        config,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch_size // micro,
    )


def real_model(model: Path, corpus: Path, batch_size: int) -> RunConfig:
    """Returns the run of a real model; of its tasks nothing is measured here."""
    return run_file.from_dict(
        {
            "model": str(model.resolve()),
            "output": "run",
            "recipe": "quick",
            "corpus": {"path": str(corpus.resolve())},
            "prune": {"pruning_ratio": 0.2, "ratio_of": "parameters"},
            "recovery": {"per_device_train_batch_size": batch_size},
            "oracle": {"tasks": ["tiny_boolq"]},
        }
    )


def configs(batch_size: int) -> Iterator[tuple[str, RunConfig]]:
    """Yields the embedded default, and the story model if it is there."""
    for name, path in (("embedded", EMBEDDED_RUN_FILE), ("stories260K", STORIES)):
        config = run_file.load(path)
        if name == "stories260K":
            if not ALPACA.is_file():
                return
            corpus = dataclasses.replace(
                config.corpus,
                path=str(ALPACA),
                template="plain",
                max_length=256,
                max_train_samples=2000,
            )
            config = dataclasses.replace(config, corpus=corpus)
        recovery = passes_of(config.recovery, batch_size, batch_size)
        yield name, dataclasses.replace(config, recovery=recovery)


def own(measured: Case, tuned: Tuned, steps: int, clock: Clock) -> list[float]:
    """Makes steps with the loop of this package."""
    config = measured.config
    order = batches(measured.sequences, config.batch_size, _SEED)
    micro = MicroBatch(config.per_device_train_batch_size)
    return train(tuned, order, config, steps, micro=micro, on_step=clock.tick)


def plain(measured: Case, tuned: Tuned, steps: int, clock: Clock) -> list[float]:
    """Makes the same steps with what transformers and PEFT offer."""
    config, model = measured.config, tuned.model
    optimizer = torch.optim.AdamW(tuned.parameters(), weight_decay=config.weight_decay)
    order = batches(measured.sequences, config.batch_size, _SEED)
    model.train()
    losses = []
    for step in range(steps):
        batch = next(order)
        count, total = trained_tokens(batch), 0.0
        for inputs, labels in padded(batch, config.per_device_train_batch_size):
            with mixed_precision(model.get_base_model()):
                logits = model(**inputs, use_cache=False).logits
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
            )
            (loss / count).backward()
            total += loss.item() / count
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = config.learning_rate * learning_rate_factor(step, config)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        clock.tick()
    return losses


def padded(
    batch: Sequence[TrainingSequence], size: int
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Yields inputs with a mask, and labels, of sequences sorted by length."""
    ordered = sorted(batch, key=lambda sequence: -len(sequence.tokens))
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        fill = torch.nn.utils.rnn.pad_sequence
        tokens = fill([sequence.tokens for sequence in part], batch_first=True)
        mask = fill([torch.ones_like(s.tokens) for s in part], batch_first=True)
        labels = fill([s.labels for s in part], batch_first=True, padding_value=IGNORED)
        yield {"input_ids": tokens, "attention_mask": mask}, labels


@contextlib.contextmanager
def begun(measured: Case, steps: int) -> Iterator[Tuned]:
    """Begins a fine-tune with plain LoRA, and takes the adapter off at the end."""
    tuned = recovery_methods.begin(
        measured.model,
        recovery_methods.parse_method(recovery_methods.LORA),
        measured.allocation,
        measured.config,
        seed=_SEED,
        steps=steps,
        sequences=measured.sequences,
    )
    try:
        yield tuned
    finally:
        tuned.model.unload()


def turn(measured: Case, loop: Loop, steps: int) -> Turn:
    """Lets a loop make a few steps from the beginning."""
    clock = Clock()
    with attending(measured.model, measured.attention), begun(measured, steps) as tuned:
        losses = loop(measured, tuned, steps, clock)
    return clock.turn(losses)


def kept_bytes(measured: Case, loop: Loop) -> int:
    """Returns what is kept for the backward pass of a step in one pass, weights left out."""
    whole = dataclasses.replace(
        measured.config,
        per_device_train_batch_size=measured.config.batch_size,
        gradient_accumulation_steps=1,
    )
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no place is used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with begun(measured, 1) as tuned:
        weights = {p.untyped_storage().data_ptr() for p in tuned.model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loop(dataclasses.replace(measured, config=whole), tuned, 1, Clock())
    return sum(storage.nbytes() for at, storage in kept.items() if at not in weights)


def measure(measured: Case, steps: int, turns: int) -> dict[str, Any]:
    """Lets both loops take turns; returns what the results file holds of a case."""
    found = [
        {loop.__name__: turn(measured, loop, steps) for loop in (own, plain)} for _ in range(turns)
    ]
    kept = {loop.__name__: kept_bytes(measured, loop) for loop in (own, plain)}
    return {
        "seconds": {
            name: statistics.median(one[name].cpu for one in found) for name in ("own", "plain")
        },
        "ratios": {
            clock: [getattr(one["own"], clock) / getattr(one["plain"], clock) for one in found]
            for clock in ("cpu", "wall")
        },
        "loss_difference": max(
            abs(a - b)
            for a, b in zip(found[0]["own"].losses, found[0]["plain"].losses, strict=True)
        ),
        "kept_bytes": kept,
        "kept_ratio": kept["own"] / kept["plain"],
    }


def main() -> None:
    """Measures, prints the table and writes all values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a real model")
    parser.add_argument("--corpus", type=Path, help="rows of Alpaca for it")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--micro", type=int, default=16, help="sequences per pass")
    parser.add_argument("--steps", type=int, default=6, help="of a turn, the first one included")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    found = {}
    cases = configs(options.batch_size)
    if options.model:
        config = real_model(options.model, options.corpus, options.batch_size)
        cases = iter([(options.model.name, config)])
    for name, config in cases:
        made = case(config)
        recovery = passes_of(made.config, options.batch_size, options.micro)
        for dtype in (torch.float32, torch.bfloat16):
            one = dataclasses.replace(made.in_type(dtype), config=recovery)
            key = f"{name}, {str(dtype).removeprefix('torch.')}, {one.attention}"
            found[key] = measure(one, options.steps, options.turns)
    machine = f"{processor()}, 1 of {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}; {options.batch_size} sequences, {options.micro} per pass\n")
    print("| case | plain, CPU s | own / plain, CPU | wall | kept | loss |")
    print("| --- | --: | --: | --: | --: | --: |")
    for key, one in found.items():
        cells = [
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            for ratios in one["ratios"].values()
        ]
        print(
            f"| {key} | {one['seconds']['plain']:.3f} | {' | '.join(cells)} | "
            f"{one['kept_ratio']:.2f} | {one['loss_difference']:.1e} |"
        )
    if options.model:
        slow, fast = (one["seconds"]["own"] for one in found.values())
        print(
            f"\nOwn loop, tokens per CPU second: the second type over the first {slow / fast:.2f}"
        )
    result = {
        "date": date.today().isoformat(),
        "machine": machine,
        "load_average": os.getloadavg(),
        "versions": {package: version(package) for package in PACKAGES},
        "options": {
            key: value.name if isinstance(value, Path) else value
            for key, value in vars(options).items()
        },
        **found,
    }
    RESULTS.mkdir(exist_ok=True)
    part = f"-{options.model.name}" if options.model else ""
    path = RESULTS / f"training_step{part}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
