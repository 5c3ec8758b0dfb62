"""What `transformers.Trainer` leaves on a model and in random generators, taken away again."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftModel


@contextlib.contextmanager
def as_it_was(model: PeftModel) -> Iterator[None]:
    """Takes away what Trainer and Accelerate put on a model."""
    before, use_cache = set(vars(model)), model.config.use_cache
    try:
        yield
    finally:
        for name in vars(model).keys() - before:
            delattr(model, name)
        model.config.use_cache = use_cache


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leaves the random numbers of all that seeds generators in the block as they were."""
    states = random.getstate(), np.random.get_state(), torch_states()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        set_torch_states(states[2])


def torch_states() -> list[torch.Tensor]:
    """Returns the state of the CPU's generator and, where they are in use, the GPUs'."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = torch.cuda.get_rng_state_all() if in_use else []
    return [torch.get_rng_state(), *gpus]


def set_torch_states(states: list[torch.Tensor]) -> None:
    """Puts back what `torch_states` returned."""
    torch.set_rng_state(states[0])
    for index, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, index)
