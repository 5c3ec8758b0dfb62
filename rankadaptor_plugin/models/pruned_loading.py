"""Reads pruned models back, and says what is wrong with a folder that holds none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankadaptor_plugin.core.errors import ArtifactError, UnsupportedModelError
from rankadaptor_plugin.models.checkpoints import check_checkpoint
from rankadaptor_plugin.models.footprint import Footprint
from rankadaptor_plugin.models.pruned_model import RECORD, PrunedModel
from rankadaptor_plugin.models.quantization import quantization_config
from rankadaptor_plugin.models.units import ModelShape


def load_pruned(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    device_map: str = "",
    quantize: str = "",
) -> PrunedModel:
    """Loads what `PrunedModel.save` wrote.

    Args:
        folder: The folder.
        device: Where the model goes.
        dtype: Type of the weights; ``"auto"`` keeps that of the files.
        device_map: How accelerate spreads it over devices; empty puts all on `device`.
        quantize: ``"8bit"`` or ``"4bit"`` quantizes the matrices of the layers; `dtype` is that of
            the other weights then.

    Raises:
        ArtifactError: If the folder holds no intact pruned model.
        ConfigError: If it cannot be quantized here.
    """
    folder, device = Path(folder), torch.device(device)
    quantization = quantization_config(quantize, device, dtype)
    # Quantized weights are made on their device and may not be moved.
    placement = device_map or ({"": device} if quantization else None)
    record = read_record(folder)
    check_checkpoint(folder)
    try:
        model, notes = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=placement,
            quantization_config=quantization,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the readers of a torn file raise whatever they stumble upon
        raise _torn(
            folder, (str(error).strip().splitlines() or [type(error).__name__])[0]
        ) from error
    wrong = sorted({*notes["missing_keys"], *notes["unexpected_keys"]})
    if wrong:
        raise _torn(folder, f"{wrong[0]} is missing or unknown")
    base = recorded(folder, record)
    try:
        pruned = PrunedModel.described(
            model if placement else model.to(device),
            tokenizer,
            base_shape=base.shape,
            base_footprint=base.footprint,
            kept_layers=base.kept_layers,
            pruned_layers=record["pruned_layers"],
            provenance=record["provenance"],
        )
        if quantization:  # what is counted of packed weights is not what the model has
            pruned.footprint = Footprint(**record["footprint"])
    except (KeyError, TypeError, UnsupportedModelError) as error:
        raise _torn(folder, f"{RECORD} cannot be read") from error
    if pruned.record() != record:
        raise _torn(folder, f"{RECORD} describes another model")
    return pruned


class Recorded(NamedTuple):
    """What a record says that a model was before pruning.

    Attributes:
        shape: Its hidden size and widths.
        footprint: What it cost.
        kept_layers: For each layer of the pruned model the number that it had.
    """

    shape: ModelShape
    footprint: Footprint
    kept_layers: tuple[int, ...]


def read_record(folder: Path) -> dict[str, Any]:
    """Reads the record beside a pruned model.

    Raises:
        ArtifactError: If there is none, or it is torn.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text("utf-8"))
        intact = isinstance(record["provenance"], dict)
    except OSError as error:
        raise ArtifactError(
            f"{folder} holds no pruned model: {RECORD} is missing. Give a folder that the prune "
            "stage wrote."
        ) from error
    except (ValueError, TypeError, KeyError):
        intact = False
    if not intact:
        raise _torn(folder, f"{RECORD} cannot be read")
    return record


def recorded(folder: Path, record: dict[str, Any]) -> Recorded:
    """Takes what the model was before from a record.

    Raises:
        ArtifactError: If the record is torn, or contradicts itself.
    """
    try:
        base, now = (ModelShape.from_json(record[key]) for key in ("base_shape", "shape"))
        kept = tuple(int(number) for number in record["kept_layers"])
        figures = Footprint(**record["base_footprint"])
        numbers = all(type(value) is int and value > 0 for value in vars(figures).values())
    except (KeyError, TypeError, ValueError) as error:
        raise _torn(folder, f"{RECORD} cannot be read") from error
    ascending = list(kept) == sorted({number for number in kept if 0 <= number < len(base.layers)})
    if not numbers or not ascending or len(kept) != len(now.layers):
        raise _torn(folder, f"{RECORD} contradicts itself")
    return Recorded(base, figures, kept)


def _torn(folder: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{folder} holds no intact pruned model: {reason.rstrip('.')}. Delete it and prune again."
    )
