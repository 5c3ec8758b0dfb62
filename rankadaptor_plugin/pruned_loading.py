"""Reads pruned models back, and says what is wrong with a folder that holds none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from rankadaptor_plugin.checkpoint_check import check_checkpoint
from rankadaptor_plugin.errors import ArtifactError
from rankadaptor_plugin.footprint import Footprint
from rankadaptor_plugin.pruned_model import RECORD, PrunedModel
from rankadaptor_plugin.units import ModelShape

if TYPE_CHECKING:
    import torch


def load_pruned(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    device_map: str = "",
) -> PrunedModel:
    """Loads what `PrunedModel.save` wrote.

    Args:
        folder: The folder.
        device: Where the model goes.
        dtype: Type of the weights; ``"auto"`` keeps that of the files.
        device_map: How accelerate spreads it over devices; empty puts all on `device`.

    Raises:
        ArtifactError: If the folder holds no intact pruned model.
    """
    folder = Path(folder)
    record = read_record(folder)
    check_checkpoint(folder)
    try:
        model, notes = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map or None,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the readers of a torn file raise whatever they stumble upon
        raise _torn(
            folder, (str(error).strip().splitlines() or [type(error).__name__])[0]
        ) from error
    wrong = sorted({*notes["missing_keys"], *notes["unexpected_keys"]})
    if wrong:
        raise _torn(folder, f"{wrong[0]} is missing or unknown")
    try:
        pruned = PrunedModel.described(
            model if device_map else model.to(device),
            tokenizer,
            base_shape=ModelShape.from_json(record["base_shape"]),
            base_footprint=Footprint(**record["base_footprint"]),
            kept_layers=tuple(record["kept_layers"]),
            pruned_layers=record["pruned_layers"],
            provenance=record["provenance"],
        )
    except (KeyError, TypeError, IndexError) as error:
        raise _torn(folder, f"{RECORD} cannot be read") from error
    if pruned.record() != record:
        raise _torn(folder, f"{RECORD} describes another model")
    return pruned


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


def _torn(folder: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{folder} holds no intact pruned model: {reason.rstrip('.')}. Delete it and prune again."
    )
