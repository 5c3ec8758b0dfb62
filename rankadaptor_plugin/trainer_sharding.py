"""FSDP for one fine-tune: a copy of the model is sharded over the processes that torchrun started.

FSDP puts other parameters, classes and hooks into a model, and nothing takes them out again. So the
model itself stays whole in host memory, its adapter follows that of the copy, and what a fine-tune
leaves behind is what it leaves without FSDP.
"""

from __future__ import annotations

import contextlib
import copy
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rankadaptor_plugin.errors import ConfigError
from rankadaptor_plugin.tuned import Tuning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from peft import PeftModel

_ENVIRONMENT = ("ACCELERATE_", "FSDP_")


class Sharded:
    """A fine-tune whose work is done on a copy of its model that FSDP may shard.

    Attributes:
        work: The fine-tune on the copy.
    """

    def __init__(self, tuned: Tuning) -> None:
        self._tuned = tuned
        model = _copy(tuned.model)
        self.work = _Work(model=model, trained=[p for p in model.parameters() if p.requires_grad])

    @torch.no_grad()
    def pull(self) -> None:
        """Brings the adapter of the copy home; every process has to take part."""
        for home, shard in zip(self._tuned.parameters(), self.work.parameters(), strict=True):
            whole: torch.Tensor = shard.full_tensor()  # type: ignore[operator] # of a DTensor
            home.copy_(whole)

    def watched(self, on_step: Callable[[int, float], bool]) -> Callable[[int, float], bool]:
        """Returns the same callback, for which the copy stands in for the model.

        What it computes with, the model below or the one with PEFT around it, then works on shards;
        the parameters that it sees are whole.
        """
        tuned, root = self._tuned, self.work.model

        def told(done: int, loss: float) -> bool:
            self.pull()
            home, tuned.model = tuned.model, root
            # What no layer holds, such as the last norm, only a call of the outermost module gathers.
            root.unshard()
            try:
                return on_step(done, loss)
            finally:
                root.reshard()
                tuned.model = home

        return told


class _Work(Tuning):
    """A fine-tune on a model whose parameters are replaced when it is sharded."""

    def parameters(self) -> list[nn.Parameter]:
        """Returns what is trained, as it is now."""
        return [p for p in self.model.parameters() if p.requires_grad]


@contextlib.contextmanager
def sharded(tuned: Any) -> Iterator[Sharded]:
    """Keeps a fine-tune ready for FSDP while the block lasts; its adapter comes home at the end.

    Args:
        tuned: The fine-tune. Its model waits in host memory and is put back where it was.

    Raises:
        ConfigError: If its method or its model cannot be sharded.
    """
    _check(tuned)
    model: PeftModel = tuned.model
    device, before = model.device, _environment()
    model.to("cpu")
    try:
        shards = Sharded(tuned)
        yield shards
        shards.pull()
    finally:
        model.to(device)
        # Accelerate would shard the next model of this process, too.
        for name in _environment().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def gradient_norm(gradients: Sequence[torch.Tensor]) -> float:
    """Returns the norm of all gradients together; of shards, that of the whole."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _check(tuned: Any) -> None:
    reason = ""
    if not isinstance(tuned, Tuning) or tuned.before_step or tuned.end:
        reason = "a method that changes its adapter by itself. Use lora"
    elif getattr((bare := tuned.model.get_base_model()), "is_quantized", False):
        reason = "a quantized model. Leave out quantize"
    elif bare.dtype == torch.float16:
        reason = "a float16 model. Load it as bfloat16 or float32"
    elif len(getattr(bare, "hf_device_map", {})) > 1:
        reason = "a model that is spread over devices. Load it on one"
    if reason:
        raise ConfigError(
            f"[recovery.trainer_arguments] fsdp cannot shard {reason}, or leave fsdp out."
        )


def _copy(model: PeftModel) -> PeftModel:
    """Returns a copy whose parameters are others, over the same memory until they are sharded."""
    shared = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    copied: PeftModel = copy.deepcopy(model, shared)
    return copied


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
