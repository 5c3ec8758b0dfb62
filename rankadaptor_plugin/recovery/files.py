"""Adapters on disk: saved whole or not at all, and put back only on the model they belong to.

LoRA matrices of one base fit another of the same shape without complaint, and give nonsense there.
So a hash of the base model is saved beside an adapter, and compared before it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.core.files import write_folder
from rankadaptor_plugin.models.structures import matrix_shape
from rankadaptor_plugin.recovery.peft_internals import WRAPPED, WRAPPER, without_old_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

RECORD = "rankadaptor.json"
"""File beside an adapter that says where it comes from."""

BASE = "base"
"""Key in it of the fingerprint of the base model."""

_SAMPLE = 1024  # values of a tensor that are hashed
_COMPARABLE = (torch.float32, torch.bfloat16)  # of one checkpoint both round to the same bfloat16
_WEIGHTS = "adapter_model.safetensors"
_FILES = {_WEIGHTS, "adapter_config.json", "README.md", RECORD}


def save_adapter(
    model: PeftModel, folder: Path, provenance: dict[str, Any], base_name: str | None = None
) -> None:
    """Writes the adapter of a model into a folder: PEFT's two files, and where it comes from.

    The folder appears complete or not at all; an adapter that is there is replaced.

    Args:
        model: The model with its adapter.
        folder: The folder; its parents are made.
        provenance: Plain JSON values for the record beside it, `RECORD`. That gets the
            fingerprint of the base model too, unless ``"base"`` is among them.
        base_name: Where PEFT finds the base model, a folder or a name on the hub; None names none.

    Raises:
        ArtifactError: If it cannot be written, or the folder holds anything else; it is then as it
            was.
    """
    folder = folder.resolve()
    _check_replaceable(folder)

    def fill(partial: Path) -> None:
        for config in model.peft_config.values():
            config.base_model_name_or_path = base_name
        # Embeddings are never trained, and "auto" would ask the hub whether the base has ours.
        model.save_pretrained(str(partial), safe_serialization=True, save_embedding_layers=False)
        write_provenance(partial, {BASE: fingerprint(model), **provenance})

    try:
        write_folder(folder, fill)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(
            f"The adapter cannot be written to {folder}: {reason}. Check the folder's permissions "
            "and the free space."
        ) from error


def _check_replaceable(folder: Path) -> None:
    """Raises ArtifactError if anything but an adapter would be replaced."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if strange := sorted(names - _FILES):
        raise ArtifactError(
            f"{folder} holds something other than an adapter ({strange[0]}). Choose a new folder."
        )


def load(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Puts a saved adapter on its model.

    Raises:
        ArtifactError: If the adapter's record is torn, or says that it was trained on another
            model.
    """
    check_base(model, folder)
    with without_old_name():
        return PeftModel.from_pretrained(model, folder)


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Adds a saved adapter to the weights of its model, in place; they keep their type.

    Args:
        model: The model that the adapter was trained on.
        folder: The adapter, a PEFT folder with safetensors.

    Returns:
        The model, without adapter layers.

    Raises:
        ArtifactError: If the adapter is torn, pickled, or does not fit the model.
    """
    check_base(model, folder)
    try:
        with warnings.catch_warnings(), without_old_name():
            # Without its weights PEFT would merge a fresh adapter, which adds nothing.
            warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
            if not (folder / _WEIGHTS).is_file():
                raise ValueError(f"{_WEIGHTS} is missing")
            wrapped = PeftModel.from_pretrained(model, folder)
            whole: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
    except Exception as error:  # PEFT and the readers of a torn file raise all kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ArtifactError(
            f"The adapter in {folder} cannot be merged: {' '.join(lines[:2]).rstrip('.')}. Give "
            "the adapter that was trained on this model."
        ) from error
    return whole


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Returns hashes that tell a base model from others.

    At most 1024 evenly spaced values of a tensor are looked at, rounded to bfloat16, so that a
    float32 checkpoint has the same hash when it is loaded as bfloat16.

    Args:
        model: The model, or a PEFT model of it, whose adapter is left out.

    Returns:
        Hexadecimal hashes: ``"shapes"`` of all names and shapes; ``"weights"`` of the values, empty
        where they cannot be compared, being in float16, quantized, or not in memory.
    """
    shapes, weights, samples = hashlib.sha256(), hashlib.sha256(), []
    comparable = True
    for name, tensor, shape in sorted(_base_parameters(model), key=lambda row: row[0]):
        shapes.update(f"{name} {shape}\n".encode())
        comparable = comparable and tensor.dtype in _COMPARABLE and not tensor.is_meta
        if comparable:
            step = max(1, math.ceil(tensor.numel() / _SAMPLE))
            samples.append(tensor.detach().reshape(-1)[::step].to(torch.bfloat16))
    if comparable:
        for values in _on_cpu(samples):
            weights.update(values.view(torch.int16).numpy().tobytes())
    return {
        "shapes": shapes.hexdigest()[:16],
        "weights": weights.hexdigest()[:16] if comparable else "",
    }


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, tuple[int, ...]]]:
    """Yields name, values and unpacked shape of each parameter that belongs to no adapter."""
    matrices: dict[str, nn.Module] = {}
    adapted = set()
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            adapted.add(name)
        if isinstance(module, (nn.Linear, Conv1D)):
            matrices[f"{name}.weight"] = module
    for name, tensor in model.named_parameters():
        parts = name.split(".")
        above = [i for i in range(1, len(parts)) if ".".join(parts[:i]) in adapted]
        if any(parts[i] != "base_layer" for i in above):
            continue
        shape = matrix_shape(matrices[name]) if name in matrices else tuple(tensor.shape)
        yield name.removeprefix(WRAPPER).replace(WRAPPED, "."), tensor, shape


def _on_cpu(samples: list[torch.Tensor]) -> list[torch.Tensor]:
    """Fetches vectors with one transfer per device, as waiting for each would take longer."""
    fetched: list[torch.Tensor] = [torch.empty(0)] * len(samples)
    for device in {values.device for values in samples}:
        numbers = [n for n, values in enumerate(samples) if values.device == device]
        together = torch.cat([samples[n] for n in numbers]).cpu()
        parts = torch.split(together, [len(samples[n]) for n in numbers])
        for number, part in zip(numbers, parts, strict=True):
            fetched[number] = part
    return fetched


def write_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    """Writes the record of an adapter into its folder.

    Raises:
        OSError: If it cannot be written.
    """
    (folder / RECORD).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def check_base(model: nn.Module, folder: Path) -> None:
    """Checks that an adapter belongs on a model, as far as its record tells.

    Args:
        model: The base model, with or without an adapter on it.
        folder: The adapter; one without a record, or with one that names no base, passes.

    Raises:
        ArtifactError: If the adapter was trained on another model, or its record is torn.
    """
    try:
        text = (folder / RECORD).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise _torn(folder, error) from error
    try:
        record = json.loads(text)
        was = record.get(BASE)
        if was is None:
            return
        trained = {key: str(was[key]) for key in ("shapes", "weights")}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _torn(folder, error) from error
    here = fingerprint(model)
    for key in ("shapes", "weights"):
        if here[key] != trained[key] and here[key] and trained[key]:
            raise ArtifactError(
                f"The adapter in {folder} was trained on another base model ({key} "
                f"{trained[key]}) than this one ({key} {here[key]}). Load the model that it was "
                "trained on, or train an adapter for this one."
            )


def _torn(folder: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{folder / RECORD} cannot be read ({error}). Restore the file, or delete {folder} and "
        "train the adapter again."
    )


def adapter_parameters(adapter: Path, part: str = "") -> int:
    """Returns the number of parameters of a PEFT folder, of the tensors with `part` in the name."""
    with safe_open(adapter / _WEIGHTS, framework="numpy") as file:
        names = [name for name in file.keys() if part in name]  # noqa: SIM118
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)
