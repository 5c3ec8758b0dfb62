"""Rows and columns of a decoder layer that belong together, per model family.

Written down by hand, because tracing finds wrong groups for grouped-query attention and fused
projections; for the families where tracing is right, a test compares the two.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankadaptor_plugin.core.errors import UnsupportedModelError
from rankadaptor_plugin.models.families import family_of, hidden_size_families
from rankadaptor_plugin.models.modeling_rankadaptor import LayerWidths, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def structure_of(model: PreTrainedModel) -> Structure:
    """Returns the map of a model's family, whether the model is pruned or not.

    Raises:
        UnsupportedModelError: If the family is not supported.
    """
    config = getattr(model, "config", None)
    return family_of(config if config is not None else {"model_type": type(model).__name__})


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the decoder layers of a model, bottom first."""
    layers: Any = model.get_submodule(structure_of(model).layers)
    return list(layers)


def place(model: PreTrainedModel, name: str) -> str:
    """Says where in a model a module or parameter is, such as ``Layer 3: mlp.up_proj``."""
    prefix = structure_of(model).layers + "."
    index, dot, rest = name.removeprefix(prefix).partition(".")
    return f"Layer {index}: {rest}" if name.startswith(prefix) and dot else name


def group_matrices(structure: Structure) -> dict[str, dict[str, tuple[str, ...]]]:
    """Returns the matrices that share a rank, at the granularity of the search.

    Returns:
        Under ``"layer"``, ``"group"`` and ``"projection"``: the groups of a layer by name, in the
        order of the slots, each with the names of its matrices within the layer; every matrix is in
        one group. A projection has the last part of its matrix's name, or, where that is not
        unique, all of it.
    """
    names = structure.matrices
    last = [name.rpartition(".")[2] for name in names]
    return {
        "layer": {"": names},
        "group": {
            "attention": (*structure.query_key_value, structure.output),
            "mlp": (*structure.expand, structure.contract),
        },
        "projection": {
            short if last.count(short) == 1 else name: (name,)
            for short, name in zip(last, names, strict=True)
        },
    }


def matrix_shape(matrix: nn.Module) -> tuple[int, int]:
    """Returns the shape (out, in) of a matrix, also of one with an adapter or quantized weights."""
    plain: Any = getattr(matrix, "base_layer", matrix)
    weight: Any = plain.weight
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):  # packed
        return int(plain.out_features), int(plain.in_features)
    rows, columns = weight.T.shape if is_transposed(plain) else weight.shape
    return rows, columns


def set_config(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Gives a model and its modules another config; other models may share the old one."""
    old = model.config
    module: Any
    for module in model.modules():
        own = getattr(module, "config", None)
        if own is old or getattr(own, "_shared", None) is old:
            module.config = config


def layer_widths(model: PreTrainedModel) -> tuple[LayerWidths, ...]:
    """Reads the widths of all layers off a model's matrices, bottom first.

    Raises:
        UnsupportedModelError: If the family is not supported or matrices do not fit each other.
    """
    structure, hidden = structure_of(model), model.config.hidden_size
    widths = []
    for index, layer in enumerate(decoder_layers(model)):
        try:
            widths.append(_widths(structure, layer, hidden))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"Layer {index}: {error}") from None
    return tuple(widths)


def layer_units(model: PreTrainedModel) -> list[LayerUnits]:
    """Describes the units of all layers as they are now, bottom first.

    Raises:
        UnsupportedModelError: If a matrix is not a plain linear layer, such as a quantized one.
    """
    structure, hidden = structure_of(model), model.config.hidden_size
    heads = structure.prunable_heads and not getattr(model.config, "alibi", False)
    units = []
    for layer in decoder_layers(model):
        for name in structure.matrices:
            _check_plain(name, layer.get_submodule(name))
        widths = _widths(structure, layer, hidden)
        units.append(
            LayerUnits(
                attention=_attention(structure, layer, widths) if heads else (),
                mlp=_mlp(structure, layer, widths),
            )
        )
    return units


def hidden_units(model: PreTrainedModel) -> Units:
    """Describes the hidden size: its unit is one channel through the matrices of all layers.

    Raises:
        UnsupportedModelError: If the hidden size of this family cannot be pruned, or a matrix is
            not a plain linear layer.
    """
    structure, hidden = structure_of(model), model.config.hidden_size
    if not structure.norms:
        able = ", ".join(hidden_size_families())
        raise UnsupportedModelError(
            f'The hidden size of model type "{structure.model_type}" cannot be pruned. Use '
            f'[prune] method = "width" or "depth", or a model of type {able}.'
        )
    lines = torch.arange(hidden).view(hidden, 1)
    members = []
    for layer in decoder_layers(model):
        for name in structure.matrices:
            _check_plain(name, layer.get_submodule(name))
            side: Literal["out", "in"] = (
                "out" if name in (structure.output, structure.contract) else "in"
            )
            members.append(_member(layer, name, side, lines))
    return tuple(members)


def _widths(structure: Structure, layer: nn.Module, hidden: int) -> LayerWidths:
    """Reads the widths off the matrices of one layer."""
    size = structure.size_of_head(layer)
    found = {name: matrix_shape(layer.get_submodule(name)) for name in structure.matrices}
    columns = {structure.output: found[structure.output][1]}
    rows = {name: found[name][0] for name in structure.query_key_value}
    for name, lines in (*rows.items(), *columns.items()):
        if lines % size or not lines:
            what = "columns" if name in columns else "rows"
            raise UnsupportedModelError(
                f"{name} has {lines} {what}, that is {lines / size:g} heads of size {size}. "
                "Remove whole heads only, and keep at least one."
            )
    heads = columns[structure.output] // size
    if len(rows) == 1:
        kv_heads = (next(iter(rows.values())) // size - heads) // 2
    else:
        kv_heads = rows[structure.query_key_value[1]] // size
    if kv_heads < 1 or heads % kv_heads:
        raise UnsupportedModelError(
            f"{heads} query heads cannot share {kv_heads} key-value heads. Remove a key-value "
            "head together with all query heads that read it."
        )
    channels = found[structure.expand[0]][0] // structure.expand_blocks
    widths = LayerWidths(heads, kv_heads, channels)
    for name, shape in structure.shapes(layer, widths, hidden).items():
        if found[name] != shape:
            raise UnsupportedModelError(
                f"{name} has shape {found[name]}, but {shape} fits the rest of the model with "
                f"its hidden size {hidden}. Remove a head, MLP channel or hidden channel from all "
                "its matrices."
            )
    return widths


def _attention(structure: Structure, layer: nn.Module, widths: LayerWidths) -> Units:
    """The KV groups of a layer; its query heads where they all share one key-value head."""
    size, heads, groups = structure.size_of_head(layer), widths.heads, widths.kv_heads
    names = structure.query_key_value
    queries, keys, values = _head_rows(structure, size, widths)
    columns = torch.arange(heads * size).view(heads, size)
    if groups == 1 < heads:  # the one key-value head cannot go with all heads that read it
        tables = {names[0]: queries}
    else:
        parts = (queries.reshape(groups, -1), keys, values)
        tables = (
            {names[0]: torch.cat(parts, dim=1)}
            if len(names) == 1
            else dict(zip(names, parts, strict=True))
        )
        columns = columns.reshape(groups, -1)
    return (
        *(_member(layer, name, "out", rows) for name, rows in tables.items()),
        _member(layer, structure.output, "in", columns),
    )


def _head_rows(
    structure: Structure, size: int, widths: LayerWidths
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the rows of each query, key and value head in their matrix: (heads, size)."""
    heads, groups = widths.heads, widths.kv_heads
    if len(structure.query_key_value) > 1:
        keys = torch.arange(groups * size).view(groups, size)
        return torch.arange(heads * size).view(heads, size), keys, keys
    rows = torch.arange((heads + 2 * groups) * size)
    if not structure.interleaved:
        by_head = rows.view(-1, size)
        return by_head[:heads], by_head[heads : heads + groups], by_head[heads + groups :]
    by_group = rows.view(groups, -1, size)  # the queries of a group, then its key, then its value
    return by_group[:, :-2].reshape(heads, size), by_group[:, -2], by_group[:, -1]


def _mlp(structure: Structure, layer: nn.Module, widths: LayerWidths) -> Units:
    channels, blocks = widths.channels, structure.expand_blocks
    rows = torch.arange(blocks * channels).view(blocks, channels).T
    return (
        *(_member(layer, name, "out", rows) for name in structure.expand),
        _member(layer, structure.contract, "in", torch.arange(channels).view(channels, 1)),
    )


def _member(
    layer: nn.Module, name: str, side: Literal["out", "in"], indices: torch.Tensor
) -> Member:
    return Member(name=name, module=layer.get_submodule(name), side=side, indices=indices)


def _check_plain(name: str, matrix: nn.Module) -> None:
    """Checks that a matrix can be cut: it has numbers and no adapter."""
    weight = matrix.weight if isinstance(matrix, (nn.Linear, Conv1D)) else None
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise UnsupportedModelError(
            f"{name} is a {type(matrix).__name__}, not a plain linear layer. Load the model "
            "unquantized and without adapters."
        )


@dataclass(frozen=True)
class ModelShape:
    """Properties of a model that pruning changes.

    Attributes:
        hidden: Hidden size.
        layers: Widths of the decoder layers, bottom first.
    """

    hidden: int
    layers: tuple[LayerWidths, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {"hidden": self.hidden, "layers": [asdict(widths) for widths in self.layers]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ModelShape:
        """Takes back what `to_json` returned.

        Raises:
            KeyError, TypeError: If it is something else.
        """
        return cls(values["hidden"], tuple(LayerWidths(**widths) for widths in values["layers"]))


@dataclass(frozen=True, kw_only=True)
class Member:
    """The part that one matrix has in every unit of a kind.

    Attributes:
        name: Name of the matrix within its layer.
        module: The matrix: ``nn.Linear`` or, in GPT-2, transformers' ``Conv1D``.
        side: ``"out"`` if a unit owns rows (and entries of the bias), ``"in"`` if columns.
        indices: The rows or columns of each unit, shape (units, per unit), int64, on the CPU.
    """

    name: str
    module: nn.Module
    side: Literal["out", "in"]
    indices: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """The matrix as (out, in), a view of the module's weight."""
        weight = cast("torch.Tensor", self.module.weight)
        return weight.T if is_transposed(self.module) else weight


def is_transposed(module: nn.Module) -> bool:
    """True if a matrix is stored as (in, out), as in transformers' ``Conv1D``."""
    return hasattr(module, "nf")


Units = tuple[Member, ...]
"""All units of one kind in one layer: every matrix they run through."""


class LayerUnits(NamedTuple):
    """The prunable units of one layer."""

    attention: Units
    mlp: Units
