"""LoRA on a frozen matrix as one operation, for the time of a training or an evaluation.

PEFT's layer casts the input of an adapter to the type of its weights, and makes a tensor each of
the product with B, of that product scaled, and of the sum; backward, the two gradients of the input
make three more. At LoRA's ranks all these cost about as much as the adapter's own products, and in
half precision the cast inputs are kept besides. Here products are added in place to what the matrix
gives, and what is kept for the backward pass is the input, which matrices with the same one share.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rankadaptor_plugin.recovery.adapters import ADAPTER
from rankadaptor_plugin.recovery.peft_internals import Linear, has_hooks

if TYPE_CHECKING:
    from collections.abc import Iterator


def can_fuse(matrix: nn.Module) -> TypeGuard[nn.Linear]:
    """True if a module computes nothing but the product with a frozen matrix."""
    return (
        type(matrix) is nn.Linear
        and not matrix.weight.requires_grad
        and "forward" not in vars(matrix)  # accelerate's, which moves inputs between devices
        and not has_hooks(matrix)
    )


def adapted_product(
    matrix: nn.Linear,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    scale: float,
    dropped: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes a frozen matrix with an adapter.

    Args:
        matrix: The matrix; see `can_fuse`.
        x: Its input, shape (..., in).
        down: A, shape (r, in).
        up: B, shape (out, r).
        scale: Factor of the adapter's product.
        dropped: Input of the adapter after dropout; None takes that of the matrix.

    Returns:
        Shape (..., out), in the type of the matrix.
    """
    product: torch.Tensor = _AdaptedProduct.apply(  # type: ignore[no-untyped-call]
        x, dropped, matrix.weight, matrix.bias, down, up, scale
    )
    return product


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Lets the LoRA layers of a model compute this way while the block lasts, where they can.

    Left as they are: variants such as DoRA, matrices that are quantized, transposed, trained, or
    spread over devices, and layers with other adapters.
    """
    layers = [m for m in model.modules() if type(m) is Linear and _is_plain(m)]
    for layer in layers:
        layer.__class__ = FusedLinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = Linear


def _is_plain(layer: Any) -> bool:
    return (
        list(layer.active_adapters) == [ADAPTER]
        and layer.lora_A.keys() == {ADAPTER}
        and not layer.lora_variant
        and layer.lora_B[ADAPTER].bias is None
        and not layer.disable_adapters
        and not layer.merged
        and can_fuse(layer.base_layer)
    )


class FusedLinear(Linear):  # type: ignore[misc] # PEFT leaves it untyped
    """PEFT's layer with another forward.

    As a class of its own, and not a function put on each layer, it is compiled once for all layers
    of a shape.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the product with the adapted matrix, shape (..., out)."""
        dropout = self.lora_dropout[ADAPTER]
        drops = self.training and not isinstance(dropout, nn.Identity)
        return adapted_product(
            self.base_layer,
            x,
            self.lora_A[ADAPTER].weight,
            self.lora_B[ADAPTER].weight,
            self.scaling[ADAPTER],
            dropout(x) if drops else None,
        )


class _AdaptedProduct(torch.autograd.Function):
    """Knows the gradients of all but the matrix, its bias and the scale."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Returns x W^T + bias + scale * (dropped or x) A^T B^T."""
        # Casts as autocast does, which knows nothing of operations in place.
        down, up, rows = (tensor.to(weight.dtype) for tensor in (down, up, x))
        fed = _rows(rows if dropped is None else dropped.to(weight.dtype))
        inner = (fed @ down.mT).mul_(scale)
        product = functional.linear(rows, weight, bias)
        _rows(product).addmm_(inner, up.mT)
        # The gradient of A alone asks for the input.
        kept = fed if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(kept, inner, weight, down, up)
        ctx.scale, ctx.is_dropped = scale, dropped is not None
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of x, dropped, A and B."""
        fed, inner, weight, down, up = ctx.saved_tensors
        rows = _rows(gradient)
        of_inner = (rows @ up).mul_(ctx.scale)
        of_x = of_dropped = of_down = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ weight
            if not ctx.is_dropped:
                _rows(of_x).addmm_(of_inner, down)
            of_x = of_x.to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            of_dropped = (of_inner @ down).to(ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[4]:
            of_down = of_inner.mT @ fed
        of_up = rows.mT @ inner
        return of_x, of_dropped, None, None, of_down, of_up, None


def _rows(states: torch.Tensor) -> torch.Tensor:
    """Returns states of shape (..., m) as rows, shape (n, m)."""
    return states.reshape(-1, states.shape[-1])
