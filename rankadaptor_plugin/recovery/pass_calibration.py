"""How fine-tunes go through the model fastest here: layout of the batch, candidates per pass.

What is fastest depends on machine, model and corpus; a few optimizer steps tell. The choice changes
results by rounding, so a run measures once, keeps the choice in its folder, and stays with it.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.models.device import is_out_of_memory
from rankadaptor_plugin.recovery.batches import LAYOUTS, batches
from rankadaptor_plugin.recovery.candidates import can_train_together, train_together
from rankadaptor_plugin.recovery.methods import methods as recovery_methods
from rankadaptor_plugin.recovery.module_adapters import bare_model
from rankadaptor_plugin.recovery.packing import supports_packing
from rankadaptor_plugin.recovery.training import MicroBatch, train

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from peft import PeftModel
    from transformers import PreTrainedModel

    from rankadaptor_plugin.config.tables import RecoveryConfig
    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.corpus.sequences import TrainingSequence
    from rankadaptor_plugin.recovery.teacher import LiveTeacher

COUNTS = (1, 2, 4)
"""Candidates per pass that are tried."""

MARGIN = 1.1
"""How many times the least time something may take to be preferred all the same."""

OPEN_LAYOUTS = ("sorted", "packed", "padded")
"""Layouts that are tried, the default first."""

_STEPS = 4  # the first only warms up


@dataclass(frozen=True)
class Choice:
    """What was found fastest.

    Attributes:
        layout: How fine-tunes one by one lay out their batches.
        together: Candidates per pass.
        seconds: Of an optimizer step of one candidate, by layout and candidates per pass, such as
            ``sorted, 4``. What memory did not suffice for is left out.
    """

    layout: str
    together: int
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Choice:
        """Takes back what `to_json` returned.

        Raises:
            ArtifactError: If it is something else.
        """
        try:
            choice = cls(
                str(data["layout"]),
                int(data["together"]),
                {str(name): float(value) for name, value in data["seconds"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"The calibration of this run is torn ({type(error).__name__}: {error}). Start the "
                "run in a new folder."
            ) from error
        if choice.layout not in LAYOUTS or choice.together < 1:
            raise ArtifactError(
                f"The calibration of this run has layout {choice.layout!r} and {choice.together} "
                f"candidates per pass. Layouts are {', '.join(LAYOUTS)}; start the run in a new "
                "folder."
            )
        return choice


def calibrate(
    seconds_of: Callable[[str, int], float],
    layouts: Sequence[str],
    counts: Sequence[int],
    *,
    margin: float = MARGIN,
) -> Choice:
    """Chooses a layout for fine-tunes one by one, then how many go together.

    Of several that take about the same, `margin` times the least at most, the first is taken, so
    that noise alone seldom decides. Where nothing is left to choose, nothing is asked.

    Args:
        seconds_of: Seconds of an optimizer step of one candidate, told layout and candidates per
            pass; infinite where memory does not suffice. Asked at most once for each.
        layouts: Layouts to choose from, the preferred first.
        counts: Candidates per pass to choose from, likewise.
        margin: At least 1.
    """
    known: dict[tuple[str, int], float] = {}

    def ask(layout: str, count: int) -> float:
        if (layout, count) not in known:
            known[layout, count] = seconds_of(layout, count)
        return known[layout, count]

    layout = _fastest(layouts, lambda name: ask(name, 1), margin)
    together = _fastest(counts, lambda count: ask(layout, count), margin)
    seconds = {f"{n}, {k}": value for (n, k), value in known.items() if math.isfinite(value)}
    return Choice(layout, together, seconds)


def measure(
    base: PreTrainedModel | PeftModel,
    sequences: Sequence[TrainingSequence],
    config: RecoveryConfig,
    allocations: Sequence[RankAllocation],
    *,
    seed: int,
    layouts: Sequence[str] = (),
    counts: Sequence[int] = (),
    teacher: LiveTeacher | None = None,
) -> Choice:
    """Times a few optimizer steps of real fine-tunes; the base is left without adapter.

    All see the same batches. Global random states are left as they were.

    Args:
        base: The pruned model.
        sequences: What is trained on.
        config: The ``[recovery]`` table.
        allocations: Ranks such as the run will have; used in turn.
        seed: Seed of the fine-tunes.
        layouts: Layouts to choose from, the default first; empty: what `config` leaves open.
            `packed` is left out where the model mixes the sequences of a row.
        counts: Candidates per pass to choose from, likewise. Only 1 is taken where fine-tunes
            have to run one by one.
        teacher: The unpruned model, where it predicts on the way.

    Raises:
        RecoveryError: If a fine-tune diverges at once, or memory does not suffice for one.
    """
    bare = bare_model(base)
    config = replace(config, steps=config.steps_for(len(sequences)), epochs=0.0)
    layouts = layouts or (OPEN_LAYOUTS if config.layout == "auto" else (config.layout,))
    if "packed" in layouts and len(layouts) > 1 and not supports_packing(bare):
        layouts = [layout for layout in layouts if layout != "packed"]
    counts = counts or ((config.candidates_per_pass,) if config.candidates_per_pass else COUNTS)
    if can_train_together(config, bare.device, bare):
        counts = (1,)

    def seconds_of(layout: str, count: int) -> float:
        chosen = [allocations[i % len(allocations)] for i in range(count)]
        own = replace(config, layout=layout)
        if count == 1:
            return _one_by_one(bare, chosen[0], sequences, own, seed, teacher)
        return _together(bare, chosen, sequences, own, seed, teacher)

    training = bare.training
    try:
        return calibrate(seconds_of, layouts, counts)
    finally:
        bare.train(training)


def _one_by_one(
    bare: PreTrainedModel,
    allocation: RankAllocation,
    sequences: Sequence[TrainingSequence],
    config: RecoveryConfig,
    seed: int,
    teacher: LiveTeacher | None,
) -> float:
    clock = _Clock()
    devices = [bare.device] if bare.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        tuned = recovery_methods.begin(
            bare,
            recovery_methods.parse_method("lora"),
            allocation,
            config,
            seed=seed,
            steps=_STEPS,
            sequences=sequences,
        )
        try:
            train(
                tuned,
                batches(sequences, config.batch_size, seed),
                config,
                _STEPS,
                micro=MicroBatch.of(config),
                teacher=teacher,
                on_step=lambda done, loss: clock.tick(),
            )
        finally:
            tuned.model.unload()
    return clock.seconds()


def _together(
    bare: PreTrainedModel,
    allocations: Sequence[RankAllocation],
    sequences: Sequence[TrainingSequence],
    config: RecoveryConfig,
    seed: int,
    teacher: LiveTeacher | None,
) -> float:
    clock = _Clock()
    try:
        train_together(
            bare,
            [(allocation, seed) for allocation in allocations],
            sequences,
            config,
            steps=_STEPS,
            teacher=teacher,
            on_step=lambda done, losses: clock.tick(),
        )
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return math.inf
        raise
    return clock.seconds() / len(allocations)


class _Clock:
    """Takes the time of optimizer steps, the first of which only warms up."""

    def __init__(self) -> None:
        self._ticks: list[float] = []

    def tick(self) -> bool:
        """Notes the end of a step."""
        self._ticks.append(time.perf_counter())
        return True

    def seconds(self) -> float:
        """Returns the median of the steps; infinite if there are none."""
        steps = [end - start for start, end in pairwise(self._ticks)]
        return statistics.median(steps) if steps else math.inf


_T = TypeVar("_T")


def _fastest(offered: Sequence[_T], seconds_of: Callable[[_T], float], margin: float) -> _T:
    """Returns the first of what is offered that takes at most `margin` times the least."""
    if len(offered) == 1:
        return offered[0]
    least = min(map(seconds_of, offered))
    return next(one for one in offered if seconds_of(one) <= margin * least)
