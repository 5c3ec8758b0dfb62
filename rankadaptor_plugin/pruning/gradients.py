"""Inputs and output gradients of each matrix in one pass over the calibration sequences.

Whole gradients of a 7B model take as much memory as the model. The scores of a matrix need only
its own gradient, so each is made when the backward pass comes to its matrix, and then given up.
Besides the model the memory holds the inputs of the layers, the activations of one layer, and what
the receiver takes.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from rankadaptor_plugin.core.errors import UnsupportedModelError
from rankadaptor_plugin.core.progress import counted
from rankadaptor_plugin.models.logits import replaced_forward
from rankadaptor_plugin.models.structures import decoder_layers
from rankadaptor_plugin.pruning.calibration import (
    backward,
    checkpointed,
    hidden_states,
    only_gradients_of,
    padded,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from rankadaptor_plugin.models.structures import Member
    from rankadaptor_plugin.pruning.calibration import Batch


def stream_gradients(
    model: PreTrainedModel,
    matrices: Sequence[Member],
    samples: Sequence[torch.Tensor],
    receive: Callable[[Member, torch.Tensor, torch.Tensor], None],
) -> None:
    """Hands over the two factors of each matrix's gradient, of the top matrix first.

    The loss is the sum over the sequences of their mean next-token loss. With inputs x and output
    gradients d, sequence j's gradient of the matrix is ``d[j].T @ x[j]``. The model is left as it
    was; the gradients of its parameters are neither read nor filled.

    Args:
        model: A causal language model of a supported family.
        matrices: One member per matrix; matrices of the decoder layers.
        samples: Token ids, each of shape (t,), int64, t >= 2; lengths may differ.
        receive: Called once per matrix that the loss depends on, with its member, its inputs of
            shape (sequences, t, in), and the gradients of its outputs of shape
            (sequences, t, out), both in the model's dtype, on the matrix's device. Padding has
            gradient 0. A matrix that is used k times has its t tokens k times.

    Raises:
        UnsupportedModelError: If a matrix sees its tokens in another arrangement.
    """
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(only_gradients_of(model, []))
        stack.enter_context(checkpointed(decoder_layers(model)))
        batch = padded(samples)
        anchor = torch.zeros((), requires_grad=True)
        tapped = [_Tapped(member, batch, anchor, receive) for member in matrices]
        for tap in tapped:
            stack.enter_context(replaced_forward(tap.member.module, tap.forward))
        hidden = hidden_states(model, batch)
        for tap in tapped:
            tap.counting = False
        backward(model, samples, hidden)
        for tap in tapped:
            tap.finish()


def stream_inputs(
    model: PreTrainedModel,
    matrices: Sequence[Member],
    samples: Sequence[torch.Tensor],
    receive: Callable[[Member, torch.Tensor], None],
) -> None:
    """Hands over the inputs of each matrix, sequence by sequence, without gradients.

    Args:
        model: A causal language model of a supported family; it is left as it was.
        matrices: One member per matrix.
        samples: Token ids, each of shape (t,), int64; lengths may differ.
        receive: Called at every use of a matrix, with its member and its inputs of shape
            (t, in), in the model's dtype.
    """

    def hook(member: Member, module: nn.Module, args: tuple[Any, ...]) -> None:
        receive(member, args[0].flatten(0, -2))

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(only_gradients_of(model, []))
        for member in matrices:
            handle = member.module.register_forward_pre_hook(partial(hook, member))
            stack.callback(handle.remove)
        for sample in counted(samples, "calibration sequences"):
            hidden_states(model, padded([sample]))


class _Tapped:
    """A matrix whose forward hands over what its gradient is made of.

    Attributes:
        member: The matrix.
        counting: Whether calls are new ones; in the backward pass, checkpointing repeats them.
    """

    def __init__(
        self,
        member: Member,
        batch: Batch,
        anchor: torch.Tensor,
        receive: Callable[[Member, torch.Tensor, torch.Tensor], None],
    ) -> None:
        self.member = member
        self.counting = True
        self._original = member.module.forward
        self._batch = batch
        self._anchor = anchor
        self._receive = receive
        self._calls = 0
        self._parts: list[tuple[torch.Tensor, ...]] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Does what the module does; replaces its forward."""
        self._calls += self.counting
        # accelerate's hooks on the module move its inputs in a forward that autograd does not see.
        inputs = inputs.to(self.member.weight.device)
        result = _TappedProduct.apply(inputs, self._anchor, self, self._original)  # type: ignore[no-untyped-call] # of torch
        return cast("torch.Tensor", result)

    def add(self, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Takes one use of the matrix, and hands over when it was the last."""
        shaped = (_by_sequence(self.member, x, self._batch) for x in (inputs, gradients))
        self._parts.append(tuple(shaped))
        if len(self._parts) == self._calls:
            self.finish()

    def finish(self) -> None:
        """Hands over what has come, if anything; uses without effect on the loss never come."""
        if self._parts:
            inputs, gradients = zip(*self._parts, strict=True)
            self._parts = []
            self._receive(self.member, _joined(inputs), _joined(gradients))


class _TappedProduct(torch.autograd.Function):
    """``x @ W.T + b``, whose backward pass tells x and the output's gradient to a `_Tapped`.

    The anchor is a leaf that requires a gradient, and gets none: with it the backward pass comes
    here even if x does not depend on anything that requires one. So nothing below the lowest
    matrix has to be differentiated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        anchor: torch.Tensor,
        tapped: _Tapped,
        original: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        ctx.tapped = tapped
        return original(inputs)

    @staticmethod
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.tapped.add(inputs, gradients)
        on_the_way = ctx.needs_input_grad[0]
        return gradients @ ctx.tapped.member.weight if on_the_way else None, None, None, None


def _by_sequence(member: Member, tensor: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Arranges what a matrix gets or gives as (sequences, t, features)."""
    sequences, t = batch.ids.shape
    if tensor.shape[:-1] not in {(sequences, t), (sequences * t,)}:
        raise UnsupportedModelError(
            f"{member.name} gets a tensor of shape {tuple(tensor.shape)} for {sequences} sequences "
            f"of {t} tokens, so that it cannot be told which token is whose. Set [prune] "
            'importance = "magnitude" or "random".'
        )
    return tensor.reshape(sequences, t, -1)


def _joined(uses: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return uses[0] if len(uses) == 1 else torch.cat(uses, dim=1)
