"""Small networks of one shape, trained side by side as batched matrices.

Gradients are written out by hand: on networks this small, the bookkeeping of automatic
differentiation takes longer than the arithmetic.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

_LOOK = 4  # Steps from one look at the points left out to the next.
_PATIENCE = 24
_BLIND = 16  # Steps that are always taken: members that learned nothing all agree.
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # Adam's defaults


class NetworkBatch:
    """B fully connected networks, ReLU between, a linear output of width 1.

    Args:
        members: Number of networks, B.
        inputs: Width of the input, c.
        hidden: Widths of the hidden layers.
        seed: Seed of the initial weights, which are PyTorch's default ones.
    """

    def __init__(self, members: int, inputs: int, hidden: Sequence[int], seed: int) -> None:
        self._members = members
        self._shapes = list(itertools.pairwise((inputs, *hidden, 1)))
        sizes = [members * (i + 1) * o for i, o in self._shapes]
        self._parameters = torch.empty(sum(sizes))
        self._layers = self._views(self._parameters)
        generator = torch.Generator().manual_seed(seed)
        for (weight, bias), (width, _) in zip(self._layers, self._shapes, strict=True):
            bound = 1 / math.sqrt(width)
            weight.uniform_(-bound, bound, generator=generator)
            bias.uniform_(-bound, bound, generator=generator)

    def state(self) -> torch.Tensor:
        """Returns a copy of all weights, shape (p,)."""
        return self._parameters.clone()

    def load(self, state: torch.Tensor) -> None:
        """Takes over weights that `state` gave."""
        self._parameters.copy_(state)

    def outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the outputs of all members, shape (B, n), for inputs of shape (n, c)."""
        return self._forward(inputs)[-1].squeeze(2)

    def train(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        *,
        steps: int,
        learning_rate: float,
        decay: float = 0.0,
        left_out: torch.Tensor | None = None,
    ) -> None:
        """Minimises the weighted squared error of every member by Adam, all data in one batch.

        With `left_out`, the weights kept are those of the step that predicted these points best,
        and training ends when no better step has come for a while.

        Args:
            inputs: Shape (n, c), float32.
            targets: Shape (n,), float32.
            weights: What each point counts for each member, shape (B, n), rows add up to 1.
            steps: Gradient steps.
            learning_rate: Learning rate.
            decay: Decoupled weight decay, as in AdamW.
            left_out: Which points to judge each member by, shape (B, n), bool.
        """
        gradient = torch.empty_like(self._parameters)
        first, second = torch.zeros_like(gradient), torch.zeros_like(gradient)
        slots = self._views(gradient)
        factor = 2 * weights.unsqueeze(2)  # (B, n, 1)
        lowest, kept, last = math.inf, self.state(), 0
        for step in range(1, steps + 1):
            activations = self._forward(inputs)
            difference = activations[-1] - targets[:, None]  # (B, n, 1)
            if left_out is not None and step % _LOOK == 1 and step > _BLIND:
                outside = float(difference.squeeze(2)[left_out].square().sum())
                if outside < lowest:
                    lowest, kept, last = outside, self.state(), step
                elif step - last > _PATIENCE:
                    break
            error = difference * factor
            for layer in range(len(self._layers) - 1, -1, -1):
                into = activations[layer].transpose(-1, -2).expand(self._members, -1, -1)
                to_weight, to_bias = slots[layer]
                torch.bmm(into, error, out=to_weight)
                torch.sum(error, 1, keepdim=True, out=to_bias)
                if layer:
                    error = torch.bmm(error, self._layers[layer][0].transpose(1, 2))
                    error.mul_(activations[layer] > 0)
            first.lerp_(gradient, 1 - _BETAS[0])
            second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
            scale = (second / (1 - _BETAS[1] ** step)).sqrt_().add_(_EPSILON)
            if decay:
                self._parameters.mul_(1 - learning_rate * decay)
            self._parameters.addcdiv_(first, scale, value=-learning_rate / (1 - _BETAS[0] ** step))
        if last:
            self.load(kept)

    def _forward(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Returns the inputs (n, c) and the outputs of every layer (B, n, width)."""
        activations, last = [inputs], len(self._layers) - 1
        for layer, (weight, bias) in enumerate(self._layers):
            into = activations[-1]
            into = into.expand(self._members, -1, -1) if layer == 0 else into
            out = torch.baddbmm(bias, into, weight)
            activations.append(out if layer == last else out.relu_())
        return activations

    def _views(self, flat: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns weights (B, i, o) and biases (B, 1, o) of every layer as parts of `flat`."""
        views, start = [], 0
        for inputs, outputs in self._shapes:
            middle = start + self._members * inputs * outputs
            end = middle + self._members * outputs
            views.append(
                (
                    flat[start:middle].view(self._members, inputs, outputs),
                    flat[middle:end].view(self._members, 1, outputs),
                )
            )
            start = end
        return views
