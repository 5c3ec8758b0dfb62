"""LoRA dropout that does not depend on how an optimizer step is cut into passes.

Whether a value is dropped is a hash of seed, step, sequence, position, matrix and feature, in place
of the next random number. So the sequences per pass, their layout and the number of processes
change a fine-tune with dropout no further than rounding, and what checkpointing computes again is
the same.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
from torch import nn

from rankadaptor_plugin.recovery.module_adapters import adapted_modules

if TYPE_CHECKING:
    from peft import PeftModel

    from rankadaptor_plugin.recovery.batches import Pass

_FACTORS = (-7046029254386353131, -4658895280553007687)  # of splitmix64, as signed numbers
_BITS = 24  # of a hash that are compared


class DropoutPlace:
    """Where in the fine-tune its modules are; all of them share one.

    Args:
        seed: Seed of the fine-tune.

    Attributes:
        tokens: A random number for each token of the pass, int32.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._step = seed, 0
        self.tokens = torch.empty(0, dtype=torch.int32)

    def move(self, step: int, places: torch.Tensor) -> None:
        """Goes to another pass.

        Args:
            step: The optimizer step, counted from 0.
            places: Of the tokens; see `rankadaptor_plugin.recovery.batches.Pass`.
        """
        self._step = step
        self.tokens = _mixed(places, self.key("tokens"))

    def key(self, what: str) -> int:
        """Returns what a hash of something at this step begins with."""
        return zlib.crc32(f"{self._seed} {self._step} {what}".encode())


class SequenceDropout(nn.Module):
    """Dropout of the input of an adapter.

    Args:
        share: Share of the values that are dropped, in (0, 1).
        name: Name of the matrix.
        place: Where the fine-tune is.
    """

    def __init__(self, share: float, name: str, place: DropoutPlace) -> None:
        super().__init__()
        self.p, self.place = share, place
        self._name = name

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Returns states of shape (b, t, n) with some of them set to 0 and the rest scaled."""
        if not self.training:
            return states
        features = torch.arange(states.shape[-1], device=states.device)
        # A product of two odd random numbers: its upper bits are as good as random.
        hashed = self.place.tokens[:, None] * _mixed(features, self.place.key(self._name))
        kept = (hashed >> (32 - _BITS)) >= round((self.p - 0.5) * 2**_BITS)
        dropped: torch.Tensor = states * kept.view(states.shape) / (1 - self.p)
        return dropped


def install(model: PeftModel, seed: int) -> None:
    """Puts such dropout in the place of PEFT's, where there is any."""
    place = DropoutPlace(seed)
    for name, module in adapted_modules(model).items():
        for adapter, dropout in module.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):
                module.lora_dropout[adapter] = SequenceDropout(dropout.p, name, place)


def tell(model: nn.Module, given: Pass, step: int) -> None:
    """Tells the dropout of a model which pass comes next.

    Args:
        model: The bare model; without such dropout nothing happens.
        given: The pass, on the device of the model.
        step: The optimizer step, counted from 0.
    """
    found = (m.place for m in model.modules() if isinstance(m, SequenceDropout))
    place = next(found, None)
    if place is not None:
        place.move(step, given.places)


def _mixed(numbers: torch.Tensor, key: int) -> torch.Tensor:
    """Returns an odd random number, int32, for each whole number."""
    mixed = (numbers.long() + (key << 20)) * _FACTORS[0]
    mixed = (mixed ^ (mixed >> 31)) * _FACTORS[1]
    return ((mixed ^ (mixed >> 27)) >> 32).int() | 1
