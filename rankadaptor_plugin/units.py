"""How wide a decoder layer is, and the units that can be removed from it.

A *unit* is the least that can be removed without breaking a layer: in the attention one KV group,
that is one key-value head with all query heads that read it; in the MLP one channel. The units of
one kind are described all at once, by index tables, so that 11,008 channels cost one tensor and
not 11,008 objects. The groups are those of LLM-Pruner (arXiv 2305.11627, section 3.1).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

_CONFIG_KEYS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


@dataclass(frozen=True)
class LayerWidths:
    """How wide one decoder layer is.

    Attributes:
        heads: Query heads.
        kv_heads: Key-value heads, a divisor of the query heads.
        channels: Hidden channels of the MLP.
    """

    heads: int
    kv_heads: int
    channels: int

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> LayerWidths:
        """Reads the widths from a transformers config."""
        return cls(*(getattr(config, key) for key in _CONFIG_KEYS))

    def to_config(self) -> dict[str, int]:
        """Returns the widths as entries of a transformers config."""
        return dict(zip(_CONFIG_KEYS, astuple(self), strict=True))


@dataclass(frozen=True, kw_only=True)
class Member:
    """The part that one matrix has in every unit of a kind.

    Attributes:
        name: Name of the matrix within its layer.
        module: The matrix, weight of shape (out, in).
        side: ``"out"`` if a unit owns rows (and entries of the bias), ``"in"`` if columns.
        indices: The rows or columns of each unit, shape (units, per unit), int64, on the CPU.
    """

    name: str
    module: nn.Linear
    side: Literal["out", "in"]
    indices: torch.Tensor


Units = tuple[Member, ...]
"""All units of one kind in one layer: every matrix they run through."""


class LayerUnits(NamedTuple):
    """The prunable units of one layer."""

    attention: Units
    mlp: Units
