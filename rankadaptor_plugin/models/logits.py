"""Logits of a causal language model where they are needed, and nowhere else.

With a large vocabulary the output layer is a good part of the work and most of the memory. So it is
handed the hidden states of those places alone, whatever the family of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


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
