"""How wide a decoder layer is, and the units that can be removed from it.

A *unit* is the least that can be removed without breaking a layer: in the attention one KV group,
that is one key-value head with all query heads that read it, or, where all of them read a single
one, a query head; in the MLP one channel. The units of one kind are described all at once, by index
tables, so that 11,008 channels cost one tensor and not 11,008 objects. The groups are those of
LLM-Pruner (arXiv 2305.11627, section 3.1).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from rankadaptor_plugin.models.modeling_rankadaptor import LayerWidths

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class ModelShape:
    """What pruning changes about a model.

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
    """Returns whether a matrix is kept as (in, out): transformers' ``Conv1D`` does."""
    return hasattr(module, "nf")


Units = tuple[Member, ...]
"""All units of one kind in one layer: every matrix they run through."""


class LayerUnits(NamedTuple):
    """The prunable units of one layer."""

    attention: Units
    mlp: Units
