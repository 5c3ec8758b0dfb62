"""Contents of a model folder by layer, and what was pruned from it; no weights are read."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.models.checkpoints import check_checkpoint
from rankadaptor_plugin.models.footprint import Footprint, footprint, on_meta, shape_of
from rankadaptor_plugin.models.pruned_model import (
    RECORD,
    Recorded,
    is_pruned,
    read_record,
    recorded,
)
from rankadaptor_plugin.models.structures import ModelShape, decoder_layers, structure_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

    from rankadaptor_plugin.models.modeling_rankadaptor import LayerWidths, Structure


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer.

    Attributes:
        layer: Its number, 0 at the bottom.
        before: Its number before pruning.
        widths: Its widths now.
        base_widths: Its widths before pruning.
        parameters: Its parameters now.
        base_parameters: Its parameters before pruning.
    """

    layer: int
    before: int
    widths: LayerWidths
    base_widths: LayerWidths
    parameters: int
    base_parameters: int

    @property
    def kept(self) -> float:
        """Share of its parameters that is left, in [0, 1]."""
        return self.parameters / self.base_parameters


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Contents of a model folder.

    Attributes:
        folder: The folder that was looked at: in a run folder its ``pruned/``.
        architecture: Name of the model class.
        model_type: Name of the family, as in config.json.
        dtype: Type of the weights by config.json.
        layers: The decoder layers, bottom first.
        removed_layers: Numbers that layers had which are gone.
        other: Parameters outside of the decoder layers, before and after pruning.
        before: Statistics before pruning: ``parameters``, ``macs`` for 64 tokens,
            ``kv_cache_bytes`` per token, ``checkpoint_bytes``, ``hidden_size``, ``layers``.
        after: The same now.
    """

    folder: str
    architecture: str
    model_type: str
    dtype: str
    layers: tuple[Layer, ...]
    removed_layers: tuple[int, ...]
    other: tuple[int, int]
    before: dict[str, int]
    after: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Returns all figures exactly, as JSON values; shares are in [0, 1]."""
        return {
            "folder": self.folder,
            "architecture": self.architecture,
            "model_type": self.model_type,
            "dtype": self.dtype,
            "layers": [
                {
                    "layer": layer.layer,
                    "before_pruning": layer.before,
                    **vars(layer.widths),
                    "parameters": layer.parameters,
                    "base": {**vars(layer.base_widths), "parameters": layer.base_parameters},
                    "kept": layer.kept,
                }
                for layer in self.layers
            ],
            "removed_layers": list(self.removed_layers),
            "before": self.before,
            "after": self.after,
        }


def inspect_folder(folder: Path) -> Inspection:
    """Describes a pruned model, an export, a plain model of a supported family, or a run folder.

    Adapters are not counted, and code that lies in the folder is never run.

    Raises:
        ArtifactError: If there is no model, or its files contradict each other.
        UnsupportedModelError: If the family is not supported.
    """
    if not (folder / "config.json").exists() and (folder / "pruned" / "config.json").exists():
        folder = folder / "pruned"
    model = check_checkpoint(folder)
    base = _recorded(folder, model) if (folder / RECORD).exists() else _configured(model)
    shape, structure = shape_of(model), structure_of(model)
    blocks = decoder_layers(model)
    layers = tuple(
        Layer(
            layer=i,
            before=number,
            widths=widths,
            base_widths=base.shape.layers[number],
            parameters=sum(p.numel() for p in block.parameters()),
            base_parameters=_parameters(
                structure, block, base.shape.layers[number], base.shape.hidden
            ),
        )
        for i, (number, widths, block) in enumerate(
            zip(base.kept_layers, shape.layers, blocks, strict=True)
        )
    )
    removed = tuple(i for i in range(len(base.shape.layers)) if i not in base.kept_layers)
    gone = sum(
        _parameters(structure, blocks[0], base.shape.layers[i], base.shape.hidden) for i in removed
    )
    now = footprint(model)
    return Inspection(
        folder=str(folder),
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        layers=layers,
        removed_layers=removed,
        other=(
            base.footprint.parameters - gone - sum(layer.base_parameters for layer in layers),
            now.parameters - sum(layer.parameters for layer in layers),
        ),
        before=_figures(base.footprint, base.shape, model),
        after=_figures(now, shape, model),
    )


def _recorded(folder: Path, model: PreTrainedModel) -> Recorded:
    """Reads what the model was before from the record beside it."""
    record = read_record(folder)
    found = recorded(folder, record)
    if ModelShape.from_json(record["shape"]) != shape_of(model):
        raise ArtifactError(
            f"{folder / RECORD} describes another model. Copy it again, or delete it and prune "
            "again."
        )
    return found


def _configured(model: PreTrainedModel) -> Recorded:
    """Takes the config's global values for the sizes before pruning."""
    base = model
    if is_pruned(model):
        config, structure = copy.deepcopy(model.config), structure_of(model)
        entry = structure.to_config(structure.from_config(config))
        config.per_layer_config = {i: dict(entry) for i in range(config.num_hidden_layers)}
        base = on_meta(type(model), config, model.dtype)
    shape = shape_of(base)
    return Recorded(shape, footprint(base), tuple(range(len(shape.layers))))


def _parameters(structure: Structure, block: nn.Module, widths: LayerWidths, hidden: int) -> int:
    """Counts the parameters that a layer has at other widths, another hidden size, or both."""
    count = sum(p.numel() for p in block.parameters())
    for name, (rows, columns) in structure.shapes(block, widths, hidden).items():
        matrix: Any = block.get_submodule(name)
        count += rows * columns - matrix.weight.numel()
        if matrix.bias is not None:
            count += rows - matrix.bias.numel()
    for name in structure.norms:
        count += sum(hidden - p.numel() for p in block.get_submodule(name).parameters())
    return count


def _figures(cost: Footprint, shape: ModelShape, model: PreTrainedModel) -> dict[str, int]:
    return {
        **cost.with_bytes(model.dtype),
        "hidden_size": shape.hidden,
        "layers": len(shape.layers),
    }
