"""What fits into memory: sequences per pass, halved when it runs out, and half-precision passes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rankadaptor_plugin.core.errors import RecoveryError
from rankadaptor_plugin.models.device import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass
class MicroBatch:
    """Sequences that go through the model at once.

    Attributes:
        size: Most sequences per pass; halved when memory runs out, or, where it is odd, cut to its
            greatest divisor, so that all passes of a step stay of equal size.
    """

    size: int

    def halve(self) -> None:
        """Makes room.

        Raises:
            RecoveryError: If a pass holds a single sequence already.
        """
        if self.size == 1:
            raise RecoveryError(
                "Out of memory with a single training sequence. Set [recovery] "
                "gradient_checkpointing = true, lower [corpus] max_length, or quantize the model."
            )
        self.size = max(n for n in range(1, self.size // 2 + 1) if self.size % n == 0)
        logger.warning("Out of memory: from now on %d sequences per pass", self.size)


def within_memory(
    compute: Callable[[], float],
    undo: Callable[[], None],
    device: torch.device,
    micro: MicroBatch,
) -> float:
    """Computes again with half as many sequences per pass, each time that memory runs out."""
    state = torch.get_rng_state()
    device_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    while True:
        try:
            return compute()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        undo()  # out here the error no longer holds on to the tensors of the last pass
        if device.type == "cuda":
            torch.cuda.empty_cache()
        micro.halve()
        torch.set_rng_state(state)  # the same dropout again
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, device)


def mixed_precision(model: PreTrainedModel) -> torch.autocast:
    """Lets the float32 adapters of a half-precision base compute in its type."""
    half = model.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(model.device.type, model.dtype if half else None, enabled=half)
