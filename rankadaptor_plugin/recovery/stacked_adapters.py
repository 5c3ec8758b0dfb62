"""Low-rank adapters of several candidates on the same matrices, computed at once.

All weights lie in one table, a row per candidate: to an optimizer a row is one long parameter, and
a matrix sees its part of all rows as a stack. A candidate whose rank is below the greatest at a
matrix has zeros in the rest. They get no gradient, as each other factor is zero too, and so stay.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from rankadaptor_plugin.models.structures import matrix_shape
from rankadaptor_plugin.recovery.adapters import ADAPTER, nested_rows
from rankadaptor_plugin.recovery.dropout import DropoutPlace, SequenceDropout
from rankadaptor_plugin.recovery.fused_lora import adapted_product, can_fuse
from rankadaptor_plugin.recovery.module_adapters import Scaling

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from rankadaptor_plugin.config.tables import RecoveryConfig
    from rankadaptor_plugin.recovery.batches import Pass

_PREFIX = "base_model.model."  # of PEFT; part of the names that initial weights are drawn by


class Stacked(nn.Module):
    """A frozen matrix with an adapter of each candidate.

    Args:
        matrix: What the adapters are added to. Its input has the candidates' sequences one after
            the other, as many of each.
    """

    down: torch.Tensor
    """Shape (k, r, in)."""

    up: torch.Tensor
    """Shape (k, out, r)."""

    scales: torch.Tensor
    """Shape (k, 1, 1)."""

    dropouts: list[SequenceDropout]
    """Of each candidate; empty without."""

    def __init__(self, matrix: nn.Module) -> None:
        super().__init__()
        self.matrix = matrix

    @property
    def weight(self) -> torch.Tensor:
        """Weight of the matrix, which some models look at beside calling it."""
        return self.matrix.get_parameter("weight")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the matrix and adds the adapters.

        Args:
            x: Shape (k * n, ..., in).

        Returns:
            Shape (k * n, ..., out).
        """
        fed = x
        if self.dropouts:
            own = zip(self.dropouts, x.chunk(len(self.dropouts)), strict=True)
            fed = torch.cat([dropout(part) for dropout, part in own])
        if can_fuse(self.matrix):
            dropped = None if fed is x else fed
            return adapted_product(self.matrix, x, self.down, self.up, self.scales, dropped)
        whole: torch.Tensor = self.matrix(x)
        blocks = fed.reshape(len(self.down), -1, x.shape[-1])
        inner = torch.bmm(blocks, self.down.mT) * self.scales
        flat = whole.reshape(len(self.up), -1, whole.shape[-1])
        return torch.baddbmm(flat, inner, self.up.mT).reshape(whole.shape)


@dataclass(frozen=True)
class _Place:
    """Where the weights of a matrix lie in a row: first those of A, then of B."""

    start: int
    rank: int
    features: int
    outputs: int

    @property
    def middle(self) -> int:
        return self.start + self.rank * self.features

    @property
    def end(self) -> int:
        return self.middle + self.rank * self.outputs


class StackedWeights:
    """The adapters of all candidates that still train, with initial weights.

    Args:
        model: The bare model.
        ranks: Rank of each module by candidate, those without adapter left out.
        settings: The ``[recovery]`` table of each candidate; all have the same dropout.
        seeds: Seeds of their initial weights and dropout.

    Attributes:
        rows: The weights of each candidate in a row; their gradients are set.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ranks: Sequence[Mapping[str, int]],
        settings: Sequence[RecoveryConfig],
        seeds: Sequence[int],
    ) -> None:
        self._ranks, self._dropped = list(ranks), settings[0].dropout
        self._dropping = [DropoutPlace(seed) for seed in seeds] if self._dropped else []
        self._places: dict[str, _Place] = {}
        end = 0
        for name in dict.fromkeys(name for own in ranks for name in own):
            outputs, features = matrix_shape(model.get_submodule(name))
            greatest = max(own.get(name, 0) for own in ranks)
            self._places[name] = place = _Place(end, greatest, features, outputs)
            end = place.end
        # Half-precision models have float32 adapters, as in PEFT.
        dtype = torch.promote_types(model.dtype, torch.float32)
        self._table = torch.zeros(len(ranks), end, dtype=dtype, device=model.device)
        self._scales = {
            name: torch.tensor(
                [_scale(c, own.get(name)) for c, own in zip(settings, ranks, strict=True)]
            )
            .to(self._table)
            .view(-1, 1, 1)
            for name in self._places
        }
        for number, (own, seed) in enumerate(zip(ranks, seeds, strict=True)):
            for name, rank in own.items():
                place = self._places[name]
                drawn = nested_rows(rank, place.features, seed, f"{_PREFIX}{name}")
                down = self._stack(self._table, place)[0][number]
                down[:rank].copy_(drawn / math.sqrt(place.features))
        self._gradients = torch.zeros_like(self._table)
        self.rows = [nn.Parameter(row) for row in self._table]
        self._layers: dict[str, Stacked] = {}
        self._connect()

    @contextlib.contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[None]:
        """Puts the adapters on a model while the block lasts."""
        matrices = {name: model.get_submodule(name) for name in self._places}
        self._layers = {name: Stacked(matrix) for name, matrix in matrices.items()}
        self._connect()
        try:
            for name, layer in self._layers.items():
                model.set_submodule(name, layer)
            yield
        finally:
            for name, matrix in matrices.items():
                model.set_submodule(name, matrix)
            self._layers = {}

    def add_gradients(self, loss: torch.Tensor) -> None:
        """Adds the gradients of a loss to those that are there."""
        layers = self._layers.items()
        leaves = [part for _, layer in layers for part in (layer.down, layer.up)]
        sums = [p for name, _ in layers for p in self._stack(self._gradients, self._places[name])]
        # Views of a table are no good as `grad`: autograd warns of their strides.
        for total, found in zip(
            sums, torch.autograd.grad(loss, leaves, materialize_grads=True), strict=True
        ):
            total.add_(found)

    def clear_gradients(self) -> None:
        """Sets all gradients to zero, in place."""
        self._gradients.zero_()

    def tell(self, given: Pass, step: int) -> None:
        """Tells the dropout which pass comes next.

        Args:
            given: The pass, as many sequences of each candidate.
            step: The optimizer step, counted from 0.
        """
        for place, own in zip(self._dropping, given.places.chunk(len(self.rows)), strict=False):
            place.move(step, own)

    def keep(self, chosen: Sequence[int]) -> None:
        """Drops all candidates but some, by number; the parameters of those stay the same ones."""
        kept = torch.tensor(chosen, dtype=torch.int64, device=self._table.device)
        self._table, self._gradients = self._table[kept], self._gradients[kept]
        self._scales = {name: scales[kept] for name, scales in self._scales.items()}
        self._ranks = [self._ranks[i] for i in chosen]
        self._dropping = [self._dropping[i] for i in chosen] if self._dropping else []
        self.rows = [self.rows[i] for i in chosen]
        for row, values in zip(self.rows, self._table, strict=True):
            row.data = values
        self._connect()

    def of(self, number: int) -> dict[str, torch.Tensor]:
        """Returns a copy of a candidate's weights by the names that PEFT gives them."""
        found = {}
        for name, rank in self._ranks[number].items():
            down, up = self._stack(self._table, self._places[name])
            path = f"{_PREFIX}{name}.lora_"
            found[f"{path}A.{ADAPTER}.weight"] = down[number, :rank].clone()
            found[f"{path}B.{ADAPTER}.weight"] = up[number, :, :rank].clone(
                memory_format=torch.contiguous_format
            )
        return found

    def _connect(self) -> None:
        """Lets matrices and optimizers see the same weights and the same gradients."""
        for row, gradient in zip(self.rows, self._gradients, strict=True):
            row.grad = gradient
        for name, layer in self._layers.items():
            layer.scales = self._scales[name]
            layer.dropouts = [SequenceDropout(self._dropped, name, at) for at in self._dropping]
            weights = self._stack(self._table, self._places[name])
            layer.down, layer.up = (part.detach().requires_grad_() for part in weights)

    def _stack(self, table: torch.Tensor, place: _Place) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the views (k, r, in) and (k, out, r) of a table that belong to a matrix."""
        down, up = table[:, place.start : place.middle], table[:, place.middle : place.end]
        return (
            down.view(-1, place.rank, place.features),
            up.view(-1, place.rank, place.outputs).mT,
        )


@contextlib.contextmanager
def bare_and_frozen(model: PreTrainedModel) -> Iterator[None]:
    """Takes adapters out of a model and freezes it; at the end all is as before."""
    modules = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    trained = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for name, module in modules.items():
            model.set_submodule(name, module.get_base_layer())
        model.requires_grad_(False)
        yield
    finally:
        for name, module in modules.items():
            model.set_submodule(name, module)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _scale(config: RecoveryConfig, rank: int | None) -> float:
    """Returns what the adapter of a matrix is multiplied by."""
    if rank is None:
        return 0.0
    return Scaling(
        alpha_over_rank=config.alpha_over_rank, alpha=config.alpha, rslora=config.rslora
    ).of(rank)
