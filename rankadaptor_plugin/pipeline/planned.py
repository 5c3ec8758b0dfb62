"""Fine-tunes that are known before they are due, several of which are made in one pass.

Which ones go together depends on the plan alone, never on what was made before, so that a run that
was broken off repeats them to the last bit.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.models.device import is_out_of_memory
from rankadaptor_plugin.recovery.candidates import Trained, can_train_together, train_together
from rankadaptor_plugin.recovery.module_adapters import base_of
from rankadaptor_plugin.recovery.pass_calibration import Choice, measure
from rankadaptor_plugin.recovery.training import MicroBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel
    from transformers import PreTrainedModel

    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.core.run_folder import RunFolder
    from rankadaptor_plugin.pipeline.context import RunContext

logger = logging.getLogger(__name__)

Job = tuple["RankAllocation", int]  # with its seed

_FILE = "passes"  # in the run folder: what the calibration found
_OPEN = "open"  # there: whether layout and candidates per pass were left open


class PlannedFineTunes:
    """Makes fine-tunes together and keeps each until it is asked for.

    Args:
        context: The run.
        folder: Its folder, where the choice of layout and candidates per pass is kept.

    Attributes:
        micro: How much of one fine-tune goes through the model at once.
    """

    def __init__(self, context: RunContext, folder: RunFolder) -> None:
        self._context, self._folder = context, folder
        self._config = context.config.recovery
        self._choice: Choice | None = None
        self._plan: list[Job] = []
        self._made: dict[Job, tuple[Trained, float]] = {}
        self.micro = MicroBatch.of(self._config)
        self._together = MicroBatch.of(self._config)  # of each of several
        self._open = [self._config.layout == "auto", not self._config.candidates_per_pass]
        # Read now, where a torn file is no trial's fault.
        self._kept = (
            folder.read_result(_FILE, self._from_json, documents=False) if any(self._open) else None
        )

    def _from_json(self, data: dict[str, Any]) -> Choice | None:
        """Returns what was chosen, unless something else was open to choice then."""
        choice = Choice.from_json(data)
        return choice if data.get(_OPEN) == self._open else None

    def expect(self, jobs: Sequence[Job]) -> None:
        """Takes the fine-tunes that are due next, those that were made before included."""
        # Only plain LoRA is trained together.
        self._plan = [job for job in dict.fromkeys(jobs) if not job[0].method]
        self._made = {}

    def take(
        self, base: PreTrainedModel | PeftModel, allocation: RankAllocation, seed: int
    ) -> tuple[Trained, float] | None:
        """Returns a fine-tune and the seconds it took; None if it is to be made by itself.

        Args:
            base: The pruned model, with any adapter, which is left on it.
            allocation: The ranks.
            seed: Seed of the fine-tune.
        """
        job = (allocation, seed)
        if job in self._made:
            return self._made.pop(job)
        group = self._group(job, self.choice(base, job).together)
        if len(group) == 1 or not self._train(base, group):
            return None
        return self._made.pop(job)

    def choice(self, base: PreTrainedModel | PeftModel, job: Job) -> Choice:
        """Returns layout and candidates per pass, measured at first where they are left open."""
        if self._choice is None:
            self._choice = self._chosen(base, job)
            self.micro.layout = self._choice.layout
        return self._choice

    def _chosen(self, base: PreTrainedModel | PeftModel, job: Job) -> Choice:
        config = self._config
        fixed = Choice(config.layout, config.candidates_per_pass, {})
        bare = base_of(base)
        if reason := can_train_together(config, bare.device, bare):
            if fixed.together > 1:
                logger.warning("Fine-tunes run one by one: %s", reason)
            fixed = replace(fixed, together=1)
        if not self._open[0] and fixed.together:
            return fixed
        kept = self._kept
        if kept is None:
            kept = measure(
                base,
                self._context.corpus.sequences,
                config,
                list(dict.fromkeys(replace(a, method="") for a, _ in [job, *self._plan])),
                seed=job[1],
                teacher=self._context.teacher,
            )
            logger.info("Fastest: layout %s, %d per pass", kept.layout, kept.together)
            self._folder.write_json(f"{_FILE}.json", {**kept.to_json(), _OPEN: self._open})
        return Choice(
            layout=kept.layout if self._open[0] else config.layout,
            together=fixed.together or kept.together,
            seconds=kept.seconds,
        )

    def _group(self, job: Job, together: int) -> list[Job]:
        """Returns the part of the plan that a job belongs to; parts are of about equal size."""
        if job not in self._plan or together == 1:
            return [job]
        total = len(self._plan)
        groups = math.ceil(total / together)
        number = self._plan.index(job) * groups // total
        bounds = [math.ceil(i * total / groups) for i in (number, number + 1)]
        return self._plan[bounds[0] : bounds[1]]

    def _train(self, base: PreTrainedModel | PeftModel, group: list[Job]) -> bool:
        """Makes the fine-tunes of a group; returns whether memory sufficed."""
        config, sequences = self._config, self._context.corpus.sequences
        self._together.layout = self.micro.layout
        began = time.perf_counter()
        try:
            found = train_together(
                base,
                group,
                sequences,
                config,
                steps=config.steps_for(len(sequences)),
                teacher=self._context.teacher,
                micro=self._together,
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("Out of memory: from now on fine-tunes run one by one")
            self._choice = replace(self.choice(base, group[0]), together=1)
            return False
        seconds = (time.perf_counter() - began) / len(group)
        self._made = {job: (one, seconds) for job, one in zip(group, found, strict=True)}
        return True
