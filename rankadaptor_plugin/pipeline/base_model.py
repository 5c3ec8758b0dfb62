"""The unpruned model of a run, loaded once where main memory has room for it.

Planning, pruning, its evaluation, distillation and the texts need it, in this order, with the whole
recovery before the last. It is kept in main memory between them if, once it is loaded, `_ROOM`
times its size is free there; a GPU holds it only while it is used. Otherwise, and where
``device_map`` spreads it, it is loaded each time, so that one model at a time is in memory.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from rankadaptor_plugin.models.device import free_memory_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

_ROOM = 4
_CPU = torch.device("cpu")


def has_room(free: int | None, size: int) -> bool:
    """True if a model of a size is kept, both in bytes, with so much free beside it."""
    return free is not None and free >= _ROOM * size


class BaseModel:
    """The unpruned model, loaded when it is first asked for.

    Args:
        load: Loads it onto its device.
        device: That device; None where it is spread over several, and never kept.
    """

    def __init__(self, load: Callable[[], PreTrainedModel], device: torch.device | None) -> None:
        self._load, self._device = load, device
        self._kept: PreTrainedModel | None = None

    def __call__(self) -> PreTrainedModel:
        """Returns it on its device. Its weights and shape have to stay as they are."""
        if self._kept is not None:
            return self._kept.to(self._device)
        model = self._load()
        size = sum(parameter.nbytes for parameter in model.parameters())
        if self._device is not None and has_room(free_memory_bytes(_CPU), size):
            self._kept = model
        return model

    def to_change(self) -> PreTrainedModel:
        """Returns one on its device that nobody else has."""
        model = self()
        if self._kept is None:
            return model
        self.rest()
        return copy.deepcopy(self._kept).to(self._device)

    def at_rest(self) -> PreTrainedModel:
        """Returns it where it takes no room on its device, if it is kept there."""
        model = self()
        self.rest()
        return model

    def rest(self) -> None:
        """Makes room for others on its device."""
        if self._kept is not None:
            self._kept.to(_CPU)
