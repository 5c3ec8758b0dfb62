"""Costs of a model: parameters, multiply-accumulates, cache and checkpoint."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from rankadaptor_plugin.models.structures import (
    ModelShape,
    decoder_layers,
    layer_widths,
    structure_of,
)
from rankadaptor_plugin.models.transformers_internals import from_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TOKENS = 64
"""Length of the sequence that the multiply-accumulates are counted for, as in LLM-Pruner."""


@dataclass(frozen=True)
class Footprint:
    """Costs of a model.

    Attributes:
        parameters: Number of parameters; tied weights count once.
        macs: Multiply-accumulates of the forward pass over one sequence of `TOKENS` tokens: all
            matrices, the output layer included, and the attention; each position attends to all.
        kv_cache: Numbers that transformers' key-value cache holds per token of one sequence.
    """

    parameters: int
    macs: int
    kv_cache: int

    def with_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """Returns all figures, and the bytes of weights and cache in a type.

        Returns:
            ``parameters``, ``macs``, ``kv_cache_bytes`` per token, ``checkpoint_bytes``.
        """
        size = dtype.itemsize
        return {
            "parameters": self.parameters,
            "macs": self.macs,
            "kv_cache_bytes": self.kv_cache * size,
            "checkpoint_bytes": self.parameters * size,
        }


def footprint(model: PreTrainedModel) -> Footprint:
    """Counts what a model costs; it may be on the meta device.

    Raises:
        UnsupportedModelError: If the family is not supported.
    """
    matrices = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    structure = structure_of(model)
    macs = sum(TOKENS * matrix.weight.numel() for matrix in matrices)
    cached = 0
    for layer, widths in zip(decoder_layers(model), layer_widths(model), strict=True):
        size = structure.size_of_head(layer)
        macs += 2 * TOKENS**2 * widths.heads * size  # queries times keys, weights times values
        expanded = structure.cached_per_query and widths.kv_heads > 1
        cached += 2 * (widths.heads if expanded else widths.kv_heads) * size
    return Footprint(
        parameters=sum(p.numel() for p in model.parameters()), macs=macs, kv_cache=cached
    )


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Reads hidden size and widths off a model."""
    return ModelShape(model.config.hidden_size, layer_widths(model))


def kept_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Counts what the decoder keeps of one sequence for a backward pass; no layer is repeated.

    What it computes with is not counted, and of attention only what its fused kernels keep.

    Args:
        model: A model on the meta device, which is good for nothing else afterwards. Inputs of
            parameters that need a gradient are kept as well.
        tokens: Length of the sequence.
    """
    own = {id(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage  # held, so that no other one takes its place
        return tensor

    model.config.pad_token_id = None  # for which transformers would look at the tokens
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    AttentionInterface.register(_FUSED, _fused_attention)
    model.set_attn_implementation(_FUSED)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.get_decoder()(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


_FUSED = "rankadaptor_shapes"


class _Fused(torch.autograd.Function):
    """Attention of which only shapes count."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        query = inputs[0]
        output = torch.empty_like(query)
        sums = torch.empty(query.shape[:-1], device=query.device)
        ctx.save_for_backward(*inputs, output, sums)
        return output


def _fused_attention(
    _: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: Any, **___: Any
) -> tuple[torch.Tensor, None]:
    output: torch.Tensor = _Fused.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


def on_meta(model_class: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Builds a model without memory for its weights, to read shapes off it."""
    with torch.device("meta"):
        model = from_config(model_class, copy.deepcopy(config), dtype)
    model.tie_weights()
    return model
