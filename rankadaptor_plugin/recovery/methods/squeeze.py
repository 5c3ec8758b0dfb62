"""Squeeze: LoRA that is trained at a greater rank, and cut to the budget by its singular values.

The change s B A of each matrix (out, in) is decomposed, and what all of them have of singular
values compete for the parameters of the budget: a singular value sigma is worth sigma^2 per
out + in parameters, the error that leaving it out would make. So the rank of each matrix falls out
of one fine-tune. The steps after the cut train what is left.

PEFT's ``convert_to_lora`` cuts as well, but each matrix by a share of its own energy, to no budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.models.structures import matrix_shape
from rankadaptor_plugin.recovery.adapters import (
    ADAPTER,
    LoraSettings,
    Pair,
    adapted_modules,
    attach_pairs,
    attach_ranks,
    bare_model,
    trainable_parameters,
    weight_of,
)
from rankadaptor_plugin.recovery.methods.tuning import adamw

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

_MORE = 2  # rank in the beginning, per greatest rank of the budget
_CUT = 0.75  # share of the steps before the cut; see benchmarks/README.md


class Squeeze:
    """A LoRA adapter on its way to the budget.

    Args:
        bare: The model, without adapter layers.
        ranks: The ranks whose parameters are the budget, by module.
        settings: Scaling, dropout and the like.
        wide: Rank to train at; 0 takes twice the greatest of the budget.
        seed: Seed of the initial weights.
        steps: Optimizer steps, before and after the cut.

    Raises:
        ConfigError: If the budget has more parameters than the rank to train at.
    """

    def __init__(
        self,
        bare: PreTrainedModel,
        ranks: Mapping[str, int],
        settings: LoraSettings,
        *,
        wide: int,
        seed: int,
        steps: int,
    ) -> None:
        shapes = {name: matrix_shape(bare.get_submodule(name)) for name in ranks}
        self._costs = {name: sum(shape) for name, shape in shapes.items()}
        self._budget = sum(rank * self._costs[name] for name, rank in ranks.items())
        wide = wide or _MORE * max(ranks.values())
        trained = {name: min(wide, *shape) for name, shape in shapes.items()}
        parameters = sum(rank * self._costs[name] for name, rank in trained.items())
        if parameters < self._budget:
            raise ConfigError(
                f"squeeze:{wide} trains {parameters} parameters, fewer than the budget of "
                f"{self._budget}. Name a greater rank, such as "
                f"squeeze:{_MORE * max(ranks.values())}."
            )
        self._dropout, self._last = settings.lora_dropout, round(_CUT * steps)
        self.model: PeftModel = attach_ranks(bare, trained, settings, seed=seed)
        self._trained = trainable_parameters(self.model)
        self._optimizer: torch.optim.Optimizer | None = None
        self._ranks: dict[str, int] = {}

    @property
    def is_settled(self) -> bool:
        """True after the cut."""
        return bool(self._ranks)

    def parameters(self) -> list[nn.Parameter]:
        """Returns all A and B; after the cut, part of them stays zero."""
        return self._trained

    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """Returns AdamW over them."""
        self._optimizer = adamw(self._trained, learning_rate, weight_decay)
        return self._optimizer

    def extra_loss(self) -> torch.Tensor | None:
        """Returns None: the loss of the tokens is all."""
        return None

    def after_step(self, step: int) -> None:
        """Cuts, once it is time to."""
        if step + 1 == self._last:
            self._cut()

    @torch.no_grad()
    def finish(self) -> PeftModel:
        """Returns the model with a plain LoRA adapter of the final ranks, in evaluation mode."""
        if not self.is_settled:
            self._cut()
        pairs = {
            name: Pair(
                weight_of(module, "lora_A")[: self._ranks[name]],
                weight_of(module, "lora_B")[:, : self._ranks[name]],
                module.scaling[ADAPTER],
            )
            for name, module in adapted_modules(self.model).items()
            if self._ranks[name]
        }
        return attach_pairs(bare_model(self.model), pairs, dropout=self._dropout)

    @torch.no_grad()
    def _cut(self) -> None:
        """Turns all adapters to their singular vectors, and leaves zero what is cut off.

        A row of A and a column of B that are both zero have no gradient, and stay so.
        """
        modules = adapted_modules(self.model)
        parts = {name: _decomposed(module) for name, module in modules.items()}
        self._ranks = self._chosen({name: part[1] for name, part in parts.items()})
        for name, module in modules.items():
            left, values, right = parts[name]
            values[self._ranks[name] :] = 0.0
            root = (values / module.scaling[ADAPTER]).sqrt()
            weight_of(module, "lora_A").copy_(root[:, None] * right)
            weight_of(module, "lora_B").copy_(left * root)
        if self._optimizer is not None:
            self._optimizer.state.clear()  # its moments belong to the former basis

    def _chosen(self, values: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Distributes the budget over the singular values, those worth most per parameter first."""
        order = sorted(
            (
                (float(value) ** 2 / self._costs[name], -at, name)
                for name, several in values.items()
                for at, value in enumerate(several)
            ),
            reverse=True,
        )
        ranks, left = dict.fromkeys(values, 0), self._budget
        for _, minus_at, name in order:
            # A value that did not fit keeps the smaller ones of its matrix out as well.
            if ranks[name] == -minus_at and self._costs[name] <= left:
                ranks[name] += 1
                left -= self._costs[name]
        return ranks


def _decomposed(module: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the singular vectors and values of an adapter's change of its matrix."""
    down, up = (weight_of(module, kind).float() for kind in ("lora_A", "lora_B"))
    turned, rows = torch.linalg.qr(down.T)
    basis, columns = torch.linalg.qr(up)
    left, values, right = torch.linalg.svd(columns @ rows.T * module.scaling[ADAPTER])
    return basis @ left, values, right @ turned.T
