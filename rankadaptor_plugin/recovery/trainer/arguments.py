"""The arguments of `transformers.Trainer`: which are ours, and which the user may choose."""

from __future__ import annotations

import contextlib
import copy
import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.registry import suggestion

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftModel

    from rankadaptor_plugin.config.tables import RecoveryConfig

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

_RESHAPING = ("parallelism_config", "use_liger_kernel")
"""Arguments that leave another model behind, where all fine-tunes share one."""

_SHARDING = ("fsdp", "fsdp_config", "deepspeed")
"""Arguments for one fine-tune; see `rankadaptor_plugin.recovery.trainer.sharding`."""


DEEPSPEED_OURS = (
    "gradient_clipping",
    "gradient_accumulation_steps",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
)
"""Keys of DeepSpeed's own table that Trainer fills in with what it is given here."""

_LAUNCHED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def check_arguments(arguments: dict[str, Any], *, alone: bool = False) -> None:
    """Checks the names of ``[recovery] trainer_arguments``.

    Args:
        arguments: The arguments.
        alone: Whether they are those of one fine-tune, not of a run with many.

    Raises:
        ConfigError: If Trainer knows no such argument, or a key of ours stands for it, or a model
            would be sharded that all fine-tunes of a run share.
    """
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
        if name in _SHARDING and not alone:
            raise ConfigError(
                f"[recovery.trainer_arguments] {name} would shard the pruned model, which all "
                "fine-tunes of a run share. Leave it out; for one fine-tune call "
                "rankadaptor_plugin.recovery.recover.recover in a script that torchrun starts."
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
        ConfigError: If Trainer does not know one, a key of ours stands for it, Trainer refuses
            them, or ``accelerate launch`` has set others.
    """
    wanted = copy.deepcopy(config.trainer_arguments)  # TrainingArguments changes fsdp_config
    check_arguments(wanted, alone=True)
    if not is_sharding(wanted) and any(os.environ.get(name) == "true" for name in _LAUNCHED):
        raise ConfigError(
            "Accelerate is told to shard the model, and [recovery.trainer_arguments] is not. Start "
            "the script with torchrun, and set fsdp or deepspeed there."
        )
    if deepspeed := wanted.get("deepspeed"):
        deepspeed.update(dict.fromkeys(DEEPSPEED_OURS, "auto"))
        del deepspeed["train_batch_size"]  # the product of others
    on_gpu = model.device.type == "cuda"
    if is_sharding(wanted):  # of a model that waits in host memory, for the GPUs that there are
        on_gpu = torch.cuda.is_available()
    chosen = {
        "output_dir": folder,
        "max_steps": steps,
        "max_grad_norm": config.max_grad_norm,
        # DeepSpeed finds out for itself; Accelerate would leave it out on a CPU.
        "use_cpu": not (on_gpu or deepspeed),
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


def is_sharding(arguments: dict[str, Any]) -> bool:
    """Tells whether FSDP or DeepSpeed is asked for."""
    return bool(arguments.get("fsdp") or arguments.get("deepspeed"))


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
