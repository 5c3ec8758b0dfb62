"""Logits of a causal language model where they are needed, and nowhere else.

With a large vocabulary the output layer is a good part of the work and most of the memory. So it is
handed the hidden states of those places alone, whatever the family of the model; and where a loss
is taken of the logits, some places at a time, each with its gradient at once, as in Liger and Cut
Cross-Entropy (arXiv 2410.10989, 2411.09009). torch's ``linear_cross_entropy`` does so too, but
knows neither distillation nor what a family does to its logits, and takes 1.7 times as long on a
CPU in bfloat16 (`benchmarks/README.md`).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn
    from transformers import PreTrainedModel

_CHUNK = 2**23
"""Most logits that a loss is taken of at once; 32 MiB in float32, a few times."""


def logits_at(
    model: nn.Module,
    head: nn.Module | None,
    places: torch.Tensor,
    input_ids: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, Any]:
    """Runs a model.

    Args:
        model: What is called: a model of transformers, or what wraps one.
        head: Its output layer; None where it has none.
        places: Where logits are needed, as row * t + column, shape (n,), int64.
        input_ids: Shape (b, t), int64.
        **options: Further arguments of the model.

    Returns:
        The logits of the places, shape (n, v), and the output of the model, whose own logits may
        be those alone.
    """
    picked = False

    def pick(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
        nonlocal picked
        hidden = inputs[0]
        if hidden.shape[:2] != input_ids.shape:
            return None
        picked = True
        return (hidden.flatten(0, 1)[places.to(hidden.device)][None], *inputs[1:])

    handle = head.register_forward_pre_hook(pick) if head is not None else None
    try:
        output = model(input_ids=input_ids, **options)
    finally:
        if handle is not None:
            handle.remove()
    logits: torch.Tensor = output.logits.flatten(0, 1)
    return (logits if picked else logits[places.to(logits.device)]), output


def hidden_at(
    model: PreTrainedModel, places: torch.Tensor, input_ids: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Returns the inputs of the output layer.

    Args:
        model: A causal language model of a supported family; adapter layers inside it count.
        places: Where they are needed, as row * t + column, shape (n,), int64.
        input_ids: Shape (b, t), int64.
        **options: Further arguments of the decoder.

    Returns:
        Shape (n, hidden), on the device of `input_ids`, wherever the last layer is.
    """
    states = model.get_decoder()(input_ids=input_ids, use_cache=False, **options)[0]
    picked = states.flatten(0, 1)[places.to(states.device)]
    return cast("torch.Tensor", picked.to(input_ids.device))


def logits_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Returns what a model makes of inputs of its output layer, scaling and soft-capping included.

    Args:
        model: A causal language model of a supported family.
        hidden: Shape (n, hidden).

    Returns:
        Shape (n, v), in the model's type.
    """
    output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden[None])
    nothing = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    with replaced_forward(model.get_decoder(), lambda *_, **__: output):
        logits: torch.Tensor = model(input_ids=nothing, use_cache=False).logits[0]
    return logits


def summed_loss(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    loss: Callable[[torch.Tensor, slice], torch.Tensor],
) -> torch.Tensor:
    """Adds up a loss over predictions, of which few are in memory at a time.

    Args:
        model: A causal language model of a supported family; its output layer gets no gradient.
        hidden: Inputs of the output layer, shape (n, hidden).
        loss: Returns the sum of the loss, a scalar, over the logits of some rows, shape (m, v).

    Returns:
        A scalar that depends on `hidden` for autograd, where that requires a gradient.
    """
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    gradient = torch.empty_like(hidden) if wanted else None
    total = torch.zeros((), device=hidden.device)
    step = max(1, _CHUNK // model.config.get_text_config().vocab_size)
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        part = hidden[rows].detach().requires_grad_(wanted)
        value = loss(logits_of(model, part), rows)
        if gradient is not None:
            (gradient[rows],) = torch.autograd.grad(value, part)
        total = total + value.detach().to(total.device)
    if gradient is None:
        return total
    return cast("torch.Tensor", _WithGradient.apply(total, hidden, gradient))  # type: ignore[no-untyped-call] # of torch


class _WithGradient(torch.autograd.Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, of: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * factor.to(gradient.device), None


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Gives one module another forward; accelerate's, kept on the same module, comes back."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before
