"""Adapters on disk: saved whole or not at all, and put back only on the model they belong to."""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open

from rankadaptor_plugin.core.atomic_folder import write_folder
from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.recovery.fingerprint import (
    BASE,
    RECORD,
    check_base,
    fingerprint,
    write_provenance,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

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
        provenance: Plain JSON values for the record beside it, `fingerprint.RECORD`. That gets the
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
    """Sees to it that nothing but an adapter is replaced."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if strange := sorted(names - _FILES):
        raise ArtifactError(
            f"{folder} holds something else than an adapter ({strange[0]}). Choose a new folder."
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
            # Without its weights PEFT would merge a fresh adapter, that is none.
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


@contextlib.contextmanager
def without_old_name() -> Iterator[None]:
    """Hides that PEFT 0.21 asks for an attribute that transformers 5.23 has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def adapter_parameters(adapter: Path, part: str = "") -> int:
    """Returns the number of parameters of a PEFT folder, of the tensors with `part` in the name."""
    with safe_open(adapter / _WEIGHTS, framework="numpy") as file:
        names = [name for name in file.keys() if part in name]  # noqa: SIM118
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)
