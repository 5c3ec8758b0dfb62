"""Fine-tunes on the resident pruned model: recovered, scored, and its adapter kept.

Here the search meets models, adapters and oracles; what it sees of them are functions of an
allocation and a seed.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.trials import Outcome
from rankadaptor_plugin.models.device import attending
from rankadaptor_plugin.pipeline.tune_step import Tuned
from rankadaptor_plugin.recovery.adapters import bare_model, base_of
from rankadaptor_plugin.recovery.fine_tune import recover
from rankadaptor_plugin.recovery.fused_lora import fused
from rankadaptor_plugin.recovery.methods.methods import parse_method
from rankadaptor_plugin.recovery.slots import nearest_allocation
from rankadaptor_plugin.verdict.race import is_stored, run_name, stored_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
    from rankadaptor_plugin.core.run_folder import RunFolder
    from rankadaptor_plugin.core.scores import Score
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.oracle.oracle import Objective
    from rankadaptor_plugin.pipeline.budget import Budget
    from rankadaptor_plugin.pipeline.context import RunContext
    from rankadaptor_plugin.recovery.fine_tune import RecoveredAdapter


class FineTuner:
    """Fine-tunes one allocation after the other on one model.

    Args:
        pruned: The pruned model.
        context: The run.
        folder: Its folder.
        objective: What the search maximizes.
        delivered_seed: Seed of the fine-tunes whose adapters are kept.
        budget: Told how long each takes.

    Attributes:
        tuned: The stack and the learning rates, which an allocation does not name.
    """

    def __init__(
        self,
        pruned: PrunedModel,
        context: RunContext,
        folder: RunFolder,
        objective: Objective,
        delivered_seed: int,
        budget: Budget,
    ) -> None:
        self._context, self._folder, self._budget = context, folder, budget
        self._settings = context.config.recovery
        self._tokenizer = pruned.tokenizer
        self._objective, self._delivered_seed = objective, delivered_seed
        self._resident: Any = pruned.model  # wrapped by PEFT from the first adapter on
        self._last: RecoveredAdapter  # the last fine-tune, whose adapter is on the model
        self._applied = contextlib.ExitStack()  # holds compensated weights in the model
        self._is_compensated = False
        self.tuned = Tuned.untuned(context.config, context.parts)

    @contextlib.contextmanager
    def cleared(self) -> Iterator[None]:
        """Takes the adapter out of the model at the end of the block, however it ends."""
        try:
            yield
        finally:
            self._start_from(compensated=False)

    def _start_from(self, *, compensated: bool) -> None:
        """Leaves the model without adapter, as it was pruned or compensated."""
        self._resident = bare_model(self._resident)
        if compensated and not self._is_compensated:
            compensation = self._context.compensation
            if compensation is None:
                raise ConfigError(
                    "A method starts from compensated weights, but the run has none. Set [prune] "
                    'compensate = "least-squares", or leave compensate out of [recovery] stack and '
                    "methods."
                )
            self._applied.enter_context(compensation.applied(self._resident))
        elif self._is_compensated and not compensated:
            self._applied.close()
        self._is_compensated = compensated

    def search_run(self, allocation: RankAllocation, seed: int, *, anew: bool = False) -> Outcome:
        """Fine-tunes an allocation and scores it on the search documents.

        Args:
            allocation: The ranks, and perhaps method and settings.
            seed: Seed of the fine-tune.
            anew: Also where the tune stage has made the same one, whose scores are returned if not.
        """
        resolved = self.tuned.resolved(allocation)
        name = f"tune/{run_name(resolved, seed)}"
        if not anew and is_stored(self._folder, name):
            again = partial(self.search_run, allocation, seed, anew=True)
            made = stored_run(self._folder, name, again, "search")
            return replace(made, seconds={})  # which count there
        method, settings = parse_method(resolved.method), dict[str, Any](resolved.settings)
        if method.compensate != self._is_compensated:
            self._start_from(compensated=method.compensate)
        try:
            with attending(base_of(self._resident), self._context.attention):
                recovered = recover(
                    self._resident,
                    self._tokenizer,
                    allocation,
                    self._context.corpus,
                    replace(self._settings, **settings),
                    seed,
                    method=str(replace(method, compensate=False)),
                    teacher=self._context.teacher,
                )
        except BaseException:
            self._resident = bare_model(self._resident)
            raise
        self._last = recovered
        self._resident = recovered.model
        # Memory that ran out once would run out again.
        self._settings = replace(
            self._settings,
            per_device_train_batch_size=recovered.per_device_train_batch_size,
            gradient_accumulation_steps=self._settings.batch_size
            // recovered.per_device_train_batch_size,
        )
        began = time.perf_counter()
        score = self._score("search")
        seconds = {"recovery": recovered.seconds, "oracle": time.perf_counter() - began}
        self._budget.observe(seconds)
        return Outcome(
            search=score,
            objective=self._objective(score),
            train_loss=recovered.train_loss,
            seconds=seconds,
            validation_loss=recovered.validation_loss,
        )

    def report_run(self, allocation: RankAllocation, seed: int) -> Outcome:
        """Fine-tunes and scores on both sets of documents; one seed's adapter is kept."""
        run = self.search_run(allocation, seed, anew=True)
        began = time.perf_counter()
        report = self._score("report")
        report_seconds = time.perf_counter() - began
        self._budget.observe_report(report_seconds)
        if seed == self._delivered_seed:
            # The model was pruned in memory; PEFT needs telling where its base lies on disk.
            self._last.save(
                self._folder.path / self.adapter_name(allocation),
                base=str(self._base().resolve()),
            )
        seconds = {**run.seconds, "oracle": run.seconds["oracle"] + report_seconds}
        return replace(run, report=report, seconds=seconds)

    def _base(self) -> Path:
        """Returns the folder of the model that is resident."""
        return self._folder.compensated if self._is_compensated else self._folder.pruned

    def _score(self, documents: str) -> Score:
        """Scores the model with its adapter, which computes as it did in the training."""
        with fused(base_of(self._resident)):
            return self._context.oracle.score(self._resident, documents)

    def nearest(self, space: RankSpace) -> RankAllocation:
        """Returns the allocation nearest to the ranks that the last fine-tune came out with."""
        bare, seed = base_of(self._resident), self._context.config.seed
        return nearest_allocation(bare, self._last.ranks, space, seed)

    def is_whole(self, allocation: RankAllocation, seed: int) -> bool:
        """True if a run that was scored has left its adapter, where it should."""
        folder = self._folder.path / self.adapter_name(allocation)
        return seed != self._delivered_seed or folder.is_dir()

    def adapter_name(self, allocation: RankAllocation) -> str:
        """Returns the path in the run folder of the adapter that may be delivered."""
        return f"adapters/{run_name(allocation, self._delivered_seed)}"
