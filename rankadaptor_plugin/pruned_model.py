"""A pruned model and what was done to it, in memory and on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankadaptor_plugin.errors import ArtifactError
from rankadaptor_plugin.pruned_classes import to_pruned
from rankadaptor_plugin.structures import (
    base_widths,
    decoder_layers,
    layer_widths,
    structure_of,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.units import LayerWidths

RECORD = "pruned_model.json"
"""File beside the weights that says what was cut, and how."""


@dataclass(kw_only=True)
class PrunedModel:
    """PL of the paper: a pruned model and what was done to it.

    Attributes:
        model: The model, of one of the pruned classes.
        tokenizer: Its tokenizer.
        widths: Width of each decoder layer, bottom first.
        pruned_layers: Whether a layer is narrower than before pruning, one flag per layer.
        base_parameters: Number of parameters before pruning.
        parameters: Number of parameters now; tied weights count once.
        provenance: Where it comes from, plain JSON values.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    widths: tuple[LayerWidths, ...]
    pruned_layers: tuple[bool, ...]
    base_parameters: int
    parameters: int
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        provenance: dict[str, Any] | None = None,
    ) -> PrunedModel:
        """Describes a model whose layers were cut; the model is converted in place.

        Raises:
            UnsupportedModelError: If the class or the shapes of the model are not supported.
        """
        model = to_pruned(model)
        structure, hidden = structure_of(model), model.config.hidden_size
        widths, base = layer_widths(model), base_widths(model)
        parameters = sum(p.numel() for p in model.parameters())
        removed = sum(
            structure.parameters(layer, base, hidden) - structure.parameters(layer, width, hidden)
            for layer, width in zip(decoder_layers(model), widths, strict=True)
        )
        return cls(
            model=model,
            tokenizer=tokenizer,
            widths=widths,
            pruned_layers=tuple(width != base for width in widths),
            base_parameters=parameters + removed,
            parameters=parameters,
            provenance=dict(provenance or {}),
        )

    def record(self) -> dict[str, Any]:
        """Returns all but the model and the tokenizer, as JSON values."""
        return {
            "widths": [asdict(width) for width in self.widths],
            "pruned_layers": list(self.pruned_layers),
            "base_parameters": self.base_parameters,
            "parameters": self.parameters,
            "provenance": self.provenance,
        }

    def weights_digest(self) -> str:
        """Returns a hash of the weights."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            sha.update(f"{name} {tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().float().cpu().numpy().tobytes())
        return sha.hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Writes the model, the tokenizer and the record into a folder.

        The folder appears complete or not at all. A pruned model already there is replaced.

        Raises:
            ArtifactError: If the folder holds something else or cannot be written.
        """
        folder = Path(folder).resolve()
        if folder.exists() and not _replaceable(folder):
            raise ArtifactError(
                f"{folder} holds something other than a pruned model and is left alone. Choose "
                "another folder."
            )
        partial = folder.with_name(f".{folder.name}.partial")
        outdated = folder.with_name(f".{folder.name}.outdated")
        try:
            shutil.rmtree(partial, ignore_errors=True)  # what a killed run left behind
            shutil.rmtree(outdated, ignore_errors=True)
            partial.mkdir(parents=True)
            self.model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            (partial / RECORD).write_text(json.dumps(self.record(), indent=2) + "\n", "utf-8")
            if folder.exists():
                os.replace(folder, outdated)
            os.replace(partial, folder)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"The pruned model cannot be written to {folder}: {error}. Check the folder's "
                "permissions and the free space."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(outdated, ignore_errors=True)


def load_pruned(
    folder: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto"
) -> PrunedModel:
    """Loads what `PrunedModel.save` wrote.

    Args:
        folder: The folder.
        device: Where the model goes.
        dtype: Type of the weights; ``"auto"`` keeps that of the files.

    Raises:
        ArtifactError: If the folder holds no intact pruned model.
    """
    folder = Path(folder)
    record = _read_record(folder)
    try:
        model, notes = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the readers of a torn file raise whatever they stumble upon
        raise _torn(
            folder, (str(error).strip().splitlines() or [type(error).__name__])[0]
        ) from error
    pruned = PrunedModel.of(model.to(device), tokenizer, record["provenance"])
    wrong = sorted({*notes["missing_keys"], *notes["unexpected_keys"]})
    if wrong:
        raise _torn(folder, f"{wrong[0]} is missing or unknown")
    if pruned.record() != record:
        raise _torn(folder, f"{RECORD} describes another model")
    return pruned


def _read_record(folder: Path) -> dict[str, Any]:
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


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / RECORD).is_file() or not any(folder.iterdir()))
