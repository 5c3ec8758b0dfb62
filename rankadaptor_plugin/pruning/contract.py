"""What the package pruning is handed by plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.config.tables import (
        PruneConfig,
    )
    from rankadaptor_plugin.models.pruned_model import PrunedModel


class Pruner(Protocol):
    """Removes units from a model."""

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        samples: Sequence[torch.Tensor],
        config: PruneConfig,
    ) -> PrunedModel:
        """Prunes a model, in place or not.

        Args:
            model: The base model.
            tokenizer: Its tokenizer.
            samples: Calibration sequences, each of shape (t,), int64.
            config: The ``[prune]`` table.
        """
        ...
