"""Which rows and columns of a decoder layer belong together, per model family.

Written down by hand, because tracing finds wrong groups for grouped-query attention; for the
families where tracing is right, a test compares the two. A family with separate projections is one
more `Structure` in `_STRUCTURES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from rankadaptor_plugin.errors import UnsupportedModelError
from rankadaptor_plugin.units import LayerUnits, LayerWidths, Member

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRUNED_PREFIX = "rankadaptor_"
"""Starts the ``model_type`` of a pruned model; the family's own follows."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The map of one family: where in a decoder layer its matrices are.

    Attributes:
        model_type: Name of the family in ``config.json``.
        attention: The attention module; it knows ``head_dim``.
        query: Matrix that makes the queries.
        key_value: Matrices that make the keys and the values.
        output: Matrix that reads the heads.
        expand: Matrices whose rows are the channels.
        contract: Matrix that reads the channels.
    """

    model_type: str
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key_value: tuple[str, ...] = ("self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    expand: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    contract: str = "mlp.down_proj"

    def shapes(
        self, layer: nn.Module, widths: LayerWidths, hidden: int
    ) -> dict[str, tuple[int, int]]:
        """Returns the shape (out, in) that each matrix has at the given widths."""
        size = self._head_size(layer)
        return {
            self.query: (widths.heads * size, hidden),
            **dict.fromkeys(self.key_value, (widths.kv_heads * size, hidden)),
            self.output: (hidden, widths.heads * size),
            **dict.fromkeys(self.expand, (widths.channels, hidden)),
            self.contract: (hidden, widths.channels),
        }

    def widths(self, layer: nn.Module, hidden: int) -> LayerWidths:
        """Reads the widths off the matrices of a layer.

        Raises:
            UnsupportedModelError: If the matrices do not fit each other.
        """
        size = self._head_size(layer)
        found: dict[str, tuple[int, int]] = {}
        for name in (self.query, *self.key_value, self.output, *self.expand, self.contract):
            matrix: Any = layer.get_submodule(name)
            found[name] = (matrix.out_features, matrix.in_features)
        for name in (self.query, self.key_value[0]):
            rows = found[name][0]
            if rows % size or not rows:
                raise UnsupportedModelError(
                    f"{name} has {rows} rows, that is {rows / size:g} heads of size {size}. "
                    "Remove whole heads only, and keep at least one."
                )
        heads, kv_heads = (found[name][0] // size for name in (self.query, self.key_value[0]))
        if heads % kv_heads:
            raise UnsupportedModelError(
                f"{heads} query heads cannot share {kv_heads} key-value heads. Remove a key-value "
                "head together with all query heads that read it."
            )
        widths = LayerWidths(heads, kv_heads, found[self.expand[0]][0])
        for name, shape in self.shapes(layer, widths, hidden).items():
            if found[name] != shape:
                raise UnsupportedModelError(
                    f"{name} has shape {found[name]}, but {shape} fits the rest of the model with "
                    f"its hidden size {hidden}. Remove a head or MLP channel from all its "
                    "matrices; where the hidden size was pruned, set config.hidden_size."
                )
        return widths

    def units(self, layer: nn.Module) -> LayerUnits:
        """Describes the units of a layer as it is now.

        Raises:
            UnsupportedModelError: If a matrix is no plain linear layer, such as a quantized one.
        """
        size = self._head_size(layer)
        groups = _linear(layer, self.key_value[0]).out_features // size
        per_group = _linear(layer, self.query).out_features // groups
        channels = _linear(layer, self.contract).in_features
        return LayerUnits(
            attention=(
                _member(layer, self.query, "out", groups, per_group),
                *(_member(layer, name, "out", groups, size) for name in self.key_value),
                _member(layer, self.output, "in", groups, per_group),
            ),
            mlp=(
                *(_member(layer, name, "out", channels, 1) for name in self.expand),
                _member(layer, self.contract, "in", channels, 1),
            ),
        )

    def parameters(self, layer: nn.Module, widths: LayerWidths, hidden: int) -> int:
        """Returns the number of parameters that the matrices of a layer have at given widths."""
        shapes = self.shapes(layer, widths, hidden)
        return sum(
            rows * (columns + (layer.get_submodule(name).bias is not None))
            for name, (rows, columns) in shapes.items()
        )

    def resize(self, layer: nn.Module, widths: LayerWidths, hidden: int) -> None:
        """Cuts a freshly built layer down to given widths, without regard to what is in it."""
        for name, (rows, columns) in self.shapes(layer, widths, hidden).items():
            matrix = _linear(layer, name)
            if (matrix.out_features, matrix.in_features) == (rows, columns):
                continue
            # Slices keep device, type and initialization; on the meta device they cost nothing.
            matrix.weight = nn.Parameter(matrix.weight.detach()[:rows, :columns].clone())
            if matrix.bias is not None:
                matrix.bias = nn.Parameter(matrix.bias.detach()[:rows].clone())
            matrix.out_features, matrix.in_features = rows, columns
        self.repair(layer, widths)

    def repair(self, layer: nn.Module, widths: LayerWidths) -> None:
        """Brings the numbers that modules keep beside their matrices up to date."""
        attention: Any = layer.get_submodule(self.attention)
        attention.num_key_value_groups = widths.heads // widths.kv_heads
        mlp: Any = layer.get_submodule(self.contract.rpartition(".")[0])
        if hasattr(mlp, "intermediate_size"):  # not read in the forward pass, but by other tools
            mlp.intermediate_size = widths.channels

    def _head_size(self, layer: nn.Module) -> int:
        return int(cast("int", layer.get_submodule(self.attention).head_dim))


_STRUCTURES = {s.model_type: s for s in (Structure(model_type="llama"),)}

SUPPORTED_FAMILIES = tuple(sorted(_STRUCTURES))
"""Model types that can be pruned."""


def structure_of(model: PreTrainedModel) -> Structure:
    """Returns the map of a model's family, whether the model is pruned or not.

    Raises:
        UnsupportedModelError: If the family is not supported.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    structure = _STRUCTURES.get(model_type.removeprefix(PRUNED_PREFIX))
    if structure is None:
        raise UnsupportedModelError(
            f'The model type "{model_type}" is not supported. Use a model of type '
            f"{', '.join(sorted(_STRUCTURES))}."
        )
    return structure


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the decoder layers of a model, bottom first."""
    return list(model.get_decoder().layers)


def layer_widths(model: PreTrainedModel) -> tuple[LayerWidths, ...]:
    """Reads the widths of all layers off a model's matrices, bottom first.

    Raises:
        UnsupportedModelError: If the family is not supported or matrices do not fit each other.
    """
    structure, hidden = structure_of(model), model.config.hidden_size
    size = model.get_input_embeddings().weight.shape[1]
    if size != hidden:
        raise UnsupportedModelError(
            f"The embeddings have size {size}, but config.hidden_size is {hidden}. Prune heads and "
            "MLP channels only, or set config.hidden_size if it was pruned everywhere."
        )
    widths = []
    for index, layer in enumerate(decoder_layers(model)):
        try:
            widths.append(structure.widths(layer, hidden))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"Layer {index}: {error}") from None
    return tuple(widths)


def base_widths(model: PreTrainedModel) -> LayerWidths:
    """Returns the widths before pruning, which the config keeps as its global values."""
    return LayerWidths.from_config(model.config)


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    matrix = layer.get_submodule(name)
    if type(matrix) is not nn.Linear:
        raise UnsupportedModelError(
            f"{name} is a {type(matrix).__name__}, not a plain linear layer. Load the model "
            "unquantized and without adapters."
        )
    return matrix


def _member(
    layer: nn.Module, name: str, side: Literal["out", "in"], units: int, per_unit: int
) -> Member:
    """A matrix in which the units lie one after the other."""
    indices = torch.arange(units * per_unit).view(units, per_unit)
    return Member(name=name, module=_linear(layer, name), side=side, indices=indices)
