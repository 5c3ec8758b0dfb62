"""Which base model an adapter belongs to: a hash of the model, kept beside the adapter.

LoRA matrices of one base fit another of the same shape without complaint, and give nonsense there.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.models.structures import matrix_shape

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RECORD = "rankadaptor.json"
"""File beside an adapter that says where it comes from."""

BASE = "base"
"""Key in it of the fingerprint of the base model."""

_SAMPLE = 1024  # values of a tensor that are hashed
_WRAPPER = "base_model.model."  # what PEFT puts before the names of the model below
_WRAPPED = ".base_layer."  # and before those of a matrix that it has put an adapter on
_COMPARABLE = (torch.float32, torch.bfloat16)  # of one checkpoint both round to the same bfloat16


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Returns what tells a base model from others.

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
    for name, tensor, shape in sorted(_base_parameters(model), key=lambda found: found[0]):
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
        yield name.removeprefix(_WRAPPER).replace(_WRAPPED, "."), tensor, shape


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
    """Sees to it that an adapter belongs on a model, as far as its record tells.

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
