"""FSDP or DeepSpeed for one fine-tune, in the processes that torchrun started.

Both put other parameters and hooks into a model, FSDP other classes too, and nothing takes them out
again. So they get a copy. The model itself stays whole in host memory, its adapter follows that of
the copy, and what a fine-tune leaves behind is what it leaves without them.
"""

from __future__ import annotations

import contextlib
import copy
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import (  # type: ignore[import-untyped]
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.recovery.batches import passes
from rankadaptor_plugin.recovery.methods.tuning import Tuning
from rankadaptor_plugin.recovery.trainer.arguments import DEEPSPEED_OURS, check_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from accelerate import Accelerator  # type: ignore[import-untyped]
    from peft import PeftModel

    from rankadaptor_plugin.corpus.sequences import TrainingSequence
    from rankadaptor_plugin.recovery.batches import Pass
    from rankadaptor_plugin.recovery.training import MicroBatch

_ENVIRONMENT = ("ACCELERATE_", "FSDP_")
_FSDP_VERSION = 2
_FSDP_KEYS = (
    "version",
    "reshard_after_forward",
    "transformer_layer_cls_to_wrap",
    "cpu_ram_efficient_loading",
)


class Sharded:
    """A fine-tune whose work is done on a copy of its model that may be sharded.

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
            home.copy_(shard.full_tensor() if isinstance(shard, DTensor) else shard)

    def watched(self, on_step: Callable[[int, float], bool]) -> Callable[[int, float], bool]:
        """Returns the same callback, for which the copy stands in for the model.

        What it computes with, the model below or the one with PEFT around it, then works on shards;
        the parameters that it sees are whole.
        """
        tuned, root = self._tuned, self.work.model

        def told(done: int, loss: float) -> bool:
            self.pull()
            home, tuned.model = tuned.model, root
            # What no layer holds, such as the last norm, a call of the outermost module gathers.
            if isinstance(root, FSDPModule):
                root.unshard()
            try:
                return on_step(done, loss)
            finally:
                tuned.model = home
                if isinstance(root, FSDPModule):
                    root.reshard()

        return told


class _Work(Tuning):
    """A fine-tune on a model whose parameters are replaced when it is sharded."""

    def parameters(self) -> list[nn.Parameter]:
        """Returns what is trained, as it is now."""
        return [p for p in self.model.parameters() if p.requires_grad]


@contextlib.contextmanager
def sharded(tuned: Any, arguments: dict[str, Any]) -> Iterator[Sharded]:
    """Keeps a fine-tune ready for FSDP or DeepSpeed while the block lasts.

    Args:
        tuned: The fine-tune. Its model waits in host memory and is put back where it was, with the
            adapter that the last step left.
        arguments: Those of Trainer.

    Raises:
        ConfigError: If method, model, arguments or processes do not allow it.
    """
    _check(tuned, arguments)
    model: PeftModel = tuned.model
    device, before = model.device, _environment()
    model.to("cpu")
    try:
        yield Sharded(tuned)
    finally:
        model.to(device)
        # Accelerate would shard the next model of this process, too.
        for name in _environment().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def shard_over_cpus(accelerator: Accelerator, options: dict[str, Any]) -> None:
    """Makes an accelerator without GPUs shard a model, where it would copy that to each process."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**options)
    accelerator.state.distributed_type = DistributedType.FSDP


def place(accelerator: Accelerator) -> tuple[int, int]:
    """Returns the number of this process, from 0, and how many there are."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Without GPUs Accelerate takes each of its processes for the only one.
        return dist.get_rank(), dist.get_world_size()
    return accelerator.process_index, accelerator.num_processes


def own_passes(
    batch: Sequence[TrainingSequence], micro: MicroBatch, process: int, processes: int
) -> list[tuple[Pass, float]]:
    """Returns the passes of one process with their weights, as many as every other has."""
    shares = [range(first, len(batch), processes) for first in range(processes)]
    laid = [
        passes([batch[i] for i in share], micro.layout, micro.size, share)
        for share in shares
        if share
    ]
    own = laid[process] if process < len(laid) else []
    # One that is done earlier must not leave the others waiting for its part of the weights.
    idle = max(map(len, laid)) - len(own)
    return [(part, 1.0) for part in own] + [(laid[0][0], 0.0)] * idle


def gradient_norm(gradients: Sequence[torch.Tensor]) -> float:
    """Returns the norm of all gradients together; of shards, that of the whole."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _check(tuned: Any, arguments: dict[str, Any]) -> None:
    check_arguments(arguments, alone=True)
    way = "fsdp" if arguments.get("fsdp") else "deepspeed"
    reason = _fault_of_arguments(arguments) or _fault_of_model(tuned)
    if not _processes() > 1:
        reason = "takes the processes that torchrun starts. Call recover() in a script under it"
    if reason:
        raise ConfigError(f"[recovery.trainer_arguments] {way} {reason}, or leave {way} out.")


def _fault_of_arguments(arguments: dict[str, Any]) -> str:
    fsdp, deepspeed = arguments.get("fsdp"), arguments.get("deepspeed")
    if fsdp and deepspeed:
        return "and deepspeed exclude each other. Leave out deepspeed"
    if arguments.get("save_strategy", "no") != "no":
        return "keeps Trainer from saving an adapter. Leave out save_strategy"
    if deepspeed:
        return _fault_of_deepspeed(deepspeed)
    config = arguments.get("fsdp_config") or {}
    if fsdp is not True or not isinstance(config, dict):
        return "is switched on by true, and set by a table fsdp_config. Write it so"
    if unknown := [key for key in config if key.removeprefix("fsdp_") not in _FSDP_KEYS]:
        return f"does not go with fsdp_config {unknown[0]}. Keep to {', '.join(_FSDP_KEYS)}"
    if config.get("version", config.get("fsdp_version", _FSDP_VERSION)) != _FSDP_VERSION:
        return "is FSDP2 here. Leave out version"
    return ""


def _fault_of_deepspeed(config: Any) -> str:
    if find_spec("deepspeed") is None:
        return "is not installed. Install it"
    if not isinstance(config, dict):
        return "is set by a table here. Write it so"
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2):
        return f"works with ZeRO stages 1 and 2, not {stage}. Set one, take fsdp to shard the model"
    ours = ["optimizer", "scheduler", *DEEPSPEED_OURS]
    if set_ := [key for key in ours if config.get(key, "auto") != "auto"]:
        return f"would bring its own {set_[0]}. Leave that out; [recovery] says it"
    return ""


def _fault_of_model(tuned: Any) -> str:
    if not isinstance(tuned, Tuning) or tuned.before_step or tuned.end:
        return "does not go with a method that changes its adapter by itself. Use lora"
    bare = tuned.model.get_base_model()
    if getattr(bare, "quantization_method", None) is not None:
        return "does not go with a quantized model. Leave out quantize"
    if bare.dtype == torch.float16:
        return "does not go with float16. Load the model as bfloat16 or float32"
    if len(getattr(bare, "hf_device_map", None) or ()) > 1:
        return "does not go with device_map. Load the model on one device"
    return ""


def _processes() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _copy(model: PeftModel) -> PeftModel:
    """Returns a copy whose parameters are others, over the same memory until they are sharded."""
    shared = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    copied: PeftModel = copy.deepcopy(model, shared)
    return copied


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
