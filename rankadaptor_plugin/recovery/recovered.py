"""Result of a fine-tune: a recovered model, and its loss on rows that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rankadaptor_plugin.core.errors import RecoveryError
from rankadaptor_plugin.recovery.adapters import adapter_ranks, adapter_weights
from rankadaptor_plugin.recovery.files import save_adapter
from rankadaptor_plugin.recovery.training import mean_loss

if TYPE_CHECKING:
    from peft import PeftModel

    from rankadaptor_plugin.config.tables import RecoveryConfig
    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.corpus.sequences import Corpus
    from rankadaptor_plugin.recovery.methods.methods import Tuned
    from rankadaptor_plugin.recovery.training import MicroBatch


@dataclass(kw_only=True)
class RecoveredAdapter:
    """A fine-tuned model; its weights live in the resident base and the adapter on it.

    The next fine-tune of the model takes the place of this one: save it before.

    Attributes:
        model: In evaluation mode.
        allocation: The ranks that were asked for.
        method: How they were used, such as ``lora`` or ``adalora``.
        train_loss: Mean loss over the last tenth of the steps, in nats per trained token.
        losses: Loss of each step.
        validation_loss: Loss on the held-out rows, None where there are none.
        seconds: Wall time.
        micro_batch_size: Sequences per pass; fewer than were asked for if memory ran out.
        provenance: Its seed, settings and sizes.
    """

    model: PeftModel
    allocation: RankAllocation
    method: str
    train_loss: float
    losses: list[float] = field(default_factory=list)
    validation_loss: float | None = None
    seconds: float
    micro_batch_size: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._weights = adapter_weights(self.model)

    def _check_is_there(self) -> None:
        now = adapter_weights(self.model)
        if len(now) != len(self._weights) or any(
            one is not other for one, other in zip(now, self._weights, strict=True)
        ):
            raise RecoveryError(
                "The adapter is no longer on the model: another fine-tune has taken its place, or "
                "it was unloaded. Save an adapter before the next fine-tune."
            )

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module that has an adapter, as it came out.

        Raises:
            RecoveryError: If the adapter is no longer on the model.
        """
        self._check_is_there()
        return adapter_ranks(self.model)

    def save(self, folder: str | Path, *, base: str | None = None) -> None:
        """Writes the adapter as a PEFT folder, whole or not at all, with the hash of its base.

        Args:
            folder: Where to; an adapter that is there is replaced.
            base: Folder of the pruned model, which PEFT notes; None keeps what it knows.

        Raises:
            RecoveryError: If the adapter is no longer on the model.
            ArtifactError: If it cannot be written.
        """
        self._check_is_there()
        save_adapter(self.model, Path(folder), self.provenance, base)


class HeldOut:
    """Looks at the held-out loss, and keeps the weights that it was lowest with.

    Args:
        corpus: The corpus; without held-out rows nothing is looked at.
        config: The ``[recovery]`` table.
        steps: Steps of the fine-tune.
        micro: How much goes through the model at once.

    Attributes:
        loss: The lowest loss with ``load_best_model_at_end``, else the last, in nats per trained
            token; None before the first look.
    """

    def __init__(
        self, corpus: Corpus, config: RecoveryConfig, steps: int, micro: MicroBatch
    ) -> None:
        self._sequences, self._config, self._steps = corpus.validation, config, steps
        self._micro = micro
        self._weights: list[torch.Tensor] = []
        self.loss: float | None = None

    def after(self, tuned: Tuned, done: int) -> None:
        """Looks if it is time to; `done` steps are."""
        every = self._config.eval_steps
        is_last = done == self._steps
        if not self._sequences or not (is_last or (every and done % every == 0)):
            return
        if self._config.load_best_model_at_end and not (is_last or tuned.is_settled):
            return  # of weights from before the last ranks were dropped nobody knows which count
        loss = mean_loss(tuned.model.get_base_model(), self._sequences, self._micro)
        if self.loss is None or loss < self.loss or not self._config.load_best_model_at_end:
            self.loss = loss
            if self._config.load_best_model_at_end:
                self._weights = [p.detach().clone() for p in tuned.parameters()]

    @torch.no_grad()
    def restore(self, tuned: Tuned) -> None:
        """Puts the best weights back."""
        for parameter, weight in zip(tuned.parameters(), self._weights, strict=False):
            parameter.copy_(weight)
