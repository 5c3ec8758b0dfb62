"""AdaLoRA (arXiv 2303.10512): ranks are moved between modules while they are trained.

Every module starts with half as many ranks again as it has on average in the end; those that matter
least by sensitivity and its uncertainty are dropped on the way. The sum of ranks in the end is that
of the allocation, so uniform LoRA and AdaLoRA have the same budget of ranks.
"""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model

from rankadaptor_plugin.recovery.adapters import (
    ADAPTER,
    LoraSettings,
    Pair,
    adapted_modules,
    attach_pairs,
    bare_model,
    has_transposed_matrices,
    trainable_parameters,
)
from rankadaptor_plugin.recovery.methods.tuning import adamw
from rankadaptor_plugin.recovery.peft_internals import without_old_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from transformers import PreTrainedModel

_MORE = 1.5  # ranks in the beginning, per rank in the end, as in the paper
_SPREAD = 0.02  # standard deviation of the first singular vectors, as in PEFT
_LOOKS = 100  # about how often ranks are moved in a whole fine-tune
_ORTHOGONALITY = 0.5  # weight of the extra loss, PEFT's default


class AdaLora:
    """An AdaLoRA adapter on its way to a plain LoRA adapter.

    Args:
        bare: The model, without adapter layers.
        ranks: The ranks that uniform LoRA would have, by module.
        settings: How uniform LoRA would be scaled, and its dropout.
        seed: Seed of the initial weights.
        steps: Optimizer steps; ranks are final after half of them.
    """

    def __init__(
        self,
        bare: PreTrainedModel,
        ranks: Mapping[str, int],
        settings: LoraSettings,
        *,
        seed: int,
        steps: int,
    ) -> None:
        self.budget, self._dropout = sum(ranks.values()), settings.lora_dropout
        mean = self.budget / len(ranks)
        first = math.ceil(_MORE * mean)
        self._last_move = steps - steps // 2
        config = AdaLoraConfig(
            init_r=first,
            target_r=round(mean),
            tinit=steps // 10,
            tfinal=steps // 2,
            deltaT=max(1, steps // _LOOKS),
            total_step=steps,
            orth_reg_weight=_ORTHOGONALITY,
            # PEFT divides by the first rank throughout.
            lora_alpha=cast("int", settings.scaling(round(mean)) * first),
            target_modules=list(ranks),
            fan_in_fan_out=has_transposed_matrices(bare),
            lora_dropout=settings.lora_dropout,
            task_type="CAUSAL_LM",
        )
        with without_old_name(), torch.random.fork_rng(devices=[]):
            self.model: PeftModel = get_peft_model(bare, config)
        self._tuner: Any = self.model.base_model
        self._config: Any = self.model.peft_config[ADAPTER]
        self._tuner.rankallocator.target_bgt = self.budget  # the mean need not be a whole number
        for name, module in self._modules().items():
            for kind in ("lora_A", "lora_B"):
                _draw(getattr(module, kind)[ADAPTER], f"{seed} {name} {kind}")
        self._trained = trainable_parameters(self.model)
        self.is_settled = False

    def parameters(self) -> list[nn.Parameter]:
        """Returns singular vectors and singular values of all modules."""
        return self._trained

    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """Returns AdamW over them."""
        return adamw(self._trained, learning_rate, weight_decay)

    def extra_loss(self) -> torch.Tensor:
        """Returns the weighted deviation of the singular vectors from orthogonality; once per step.

        PEFT adds it where its own model computes a loss; here the model below is trained.
        """
        distances = []
        for module in self._modules().values():
            down, up = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
            for product in (down @ down.T, up.T @ up):
                one = torch.eye(len(product), dtype=product.dtype, device=product.device)
                distances.append(torch.linalg.matrix_norm(product - one))
        return _ORTHOGONALITY * torch.stack(distances).mean()

    def after_step(self, step: int) -> None:
        """Weighs and moves ranks; the gradients of the step are still there."""
        self._tuner.update_and_allocate(step)
        if step == self._last_move:
            self._settle()

    @torch.no_grad()
    def finish(self) -> PeftModel:
        """Returns the model with a plain LoRA adapter of the final ranks, in evaluation mode.

        Modules that have lost all ranks are without one.
        """
        allocator = self._tuner.rankallocator
        if not self.is_settled and allocator.exp_avg_ipt:  # ended before the last move
            self._config.rank_pattern = allocator.mask_to_budget(self._tuner.model, self.budget)
        if not self.is_settled:
            self._settle()
        pairs = {}
        for name, module in self._modules().items():
            kept = self._kept(name)
            if any(kept):
                at = torch.tensor(kept, device=module.lora_E[ADAPTER].device)
                down = module.lora_A[ADAPTER] * module.lora_E[ADAPTER]
                count = float(module.ranknum[ADAPTER]) + 1e-5  # as SVDLinear computes
                scaling = module.scaling[ADAPTER] / count
                pairs[name] = Pair(down[at], module.lora_B[ADAPTER][:, at], scaling)
        return attach_pairs(bare_model(self.model), pairs, dropout=self._dropout)

    def _modules(self) -> dict[str, Any]:
        return dict(adapted_modules(self.model))

    def _kept(self, name: str) -> list[bool]:
        """Mask of the ranks that a module keeps."""
        kept: list[bool] = self._config.rank_pattern[_values(name)]
        return kept

    def _settle(self) -> None:
        """Keeps exactly as many ranks as the budget has; PEFT drops all that tie with the last."""
        pattern: dict[str, list[bool]] = self._config.rank_pattern or {}
        modules = self._modules()
        for name, module in modules.items():
            pattern.setdefault(_values(name), [False] * module.r[ADAPTER])
        missing = self.budget - sum(map(sum, pattern.values()))
        most = max(module.r[ADAPTER] for module in modules.values())
        tied = (
            (_values(name), rank)
            for rank in range(most)
            for name in modules
            if not pattern[_values(name)][rank]
        )
        for key, rank in list(tied)[:missing]:
            pattern[key][rank] = True
        self._config.rank_pattern = pattern
        self.is_settled = True


def _values(name: str) -> str:
    """Returns PEFT's name for the singular values of a module."""
    return f"{name}.lora_E.{ADAPTER}"


@torch.no_grad()
def _draw(weight: torch.Tensor, key: str) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    weight.copy_(_SPREAD * torch.randn(weight.shape, generator=generator))
