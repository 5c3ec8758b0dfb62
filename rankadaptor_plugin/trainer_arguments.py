"""The arguments of `transformers.Trainer`: which are ours, and which the user may choose."""

from __future__ import annotations

import contextlib
import copy
import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from transformers import TrainingArguments

from rankadaptor_plugin.errors import ConfigError
from rankadaptor_plugin.registry import suggestion

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftModel

    from rankadaptor_plugin.config import RecoveryConfig

_OURS = {
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "auto_find_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size",
    "dataloader_drop_last": "batch_size",
    "train_sampling_strategy": "layout",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "schedule",
    "lr_scheduler_kwargs": "schedule",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "optim": "methods",
    "optim_args": "methods",
    "optim_target_modules": "methods",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "label_smoothing_factor": "distill_weight",
    "eval_strategy": "validate_every",
    "load_best_model_at_end": "keep_best",
}
"""Arguments that would change batches, schedule or loss, and our key in ``[recovery]``."""

_RUN = {
    "seed": "seed",
    "data_seed": "seed",
    "full_determinism": "seed",
    "use_cpu": "device",
    "resume_from_checkpoint": "output",
}
"""The same at the top of the run file."""

_RESHAPING = ("deepspeed", "parallelism_config", "use_liger_kernel")
"""Arguments that leave another model behind, where all fine-tunes share one."""

_SHARDING = ("fsdp", "fsdp_config")


def check_arguments(arguments: dict[str, Any], *, alone: bool = False) -> None:
    """Checks the names of ``[recovery] trainer_arguments``.

    Args:
        arguments: The arguments.
        alone: Whether they are those of one fine-tune, which may take all processes of a launcher
            for itself.

    Raises:
        ConfigError: If Trainer knows no such argument, or a key of ours stands for it; if a model
            is to be sharded that all fine-tunes of a run share, or over a single process.
    """
    launched = "WORLD_SIZE" in os.environ or dist.is_available() and dist.is_initialized()
    known = [f.name for f in fields(TrainingArguments) if f.init]
    for name in arguments:
        if name not in known:
            raise ConfigError(
                f"[recovery.trainer_arguments] {name} is no argument of "
                f"transformers.TrainingArguments.{suggestion(name, known)}"
            )
        if name in _RESHAPING:
            raise ConfigError(
                f"[recovery.trainer_arguments] {name} would change the pruned model, which all "
                "fine-tunes share. Leave it out; device_map spreads a model over GPUs."
            )
        if name in _SHARDING and not (alone and launched):
            raise ConfigError(
                f"[recovery.trainer_arguments] {name} is for one fine-tune in the processes of "
                "torchrun, which share its model. Leave it out, or call "
                "rankadaptor_plugin.recovery.recover in a script that torchrun starts."
            )
        if name in _OURS or name in _RUN:
            ours = f"[recovery] {_OURS[name]}" if name in _OURS else _RUN[name]
            raise ConfigError(
                f"[recovery.trainer_arguments] {name} would change what is compared. Leave it out "
                f"and set {ours}."
            )


def training_arguments(
    config: RecoveryConfig, steps: int, folder: str, model: PeftModel
) -> TrainingArguments:
    """Returns Trainer's arguments: ours, and what the user wants besides.

    Args:
        config: The ``[recovery]`` table.
        steps: Optimizer steps to run.
        folder: Where Trainer writes, if it does.
        model: What is trained; it stays on its device.

    Raises:
        ConfigError: If Trainer does not know one, a key of ours stands for it, or Trainer refuses
            them.
    """
    wanted = copy.deepcopy(config.trainer_arguments)  # TrainingArguments changes fsdp_config
    check_arguments(wanted, alone=True)
    fsdp = wanted.get("fsdp")
    # Shards go to the GPUs that are there, whereas the model they come from waits in host memory.
    on_gpu = torch.cuda.is_available() if fsdp else model.device.type == "cuda"
    chosen = {
        "output_dir": folder,
        "max_steps": steps,
        "max_grad_norm": config.max_grad_norm,
        "use_cpu": not on_gpu,
        "fp16": model.dtype == torch.float16 and on_gpu,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    with refusals():
        arguments = TrainingArguments(**{**chosen, **wanted})
        arguments._n_gpu = min(arguments.n_gpu, 1)  # or Trainer would cut the batches up once more
    return arguments


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Says in one line what Trainer does not like.

    Raises:
        ConfigError: If anything in the block raises.
    """
    try:
        yield
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"Trainer refuses [recovery.trainer_arguments]: {why}. Change or leave out what it "
            "names."
        ) from error
