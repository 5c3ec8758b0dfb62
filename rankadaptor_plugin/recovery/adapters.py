"""PEFT adapters on the resident pruned model.

One base model stays in memory; adapters are swapped under it. The initial weights are drawn per
module from a seed and its name, and nested: rank r takes the first r rows of one draw. So two
allocations that agree on a layer start from the same weights there, whatever the others' ranks
(common random numbers), and the difference of their scores owes less to chance.

Whatever a recovery method does, it ends as a plain LoRA or DoRA adapter, so that saving, merging,
scoring and swapping know nothing else.
"""

from __future__ import annotations

import contextlib
import math
import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from torch import nn

from rankadaptor_plugin.models.structures import decoder_layers, is_transposed, structure_of
from rankadaptor_plugin.recovery.peft_internals import (
    WRAPPER,
    BaseTunerLayer,
    LoraLayer,
    without_old_name,
)
from rankadaptor_plugin.recovery.slots import module_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

    from rankadaptor_plugin.config.tables import RecoveryConfig
    from rankadaptor_plugin.core.ranks import RankAllocation

ADAPTER = "default"
_BLOCK = 32  # rows drawn at a time; fixed, or a higher rank would change the rows before it


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """PEFT's settings of an adapter other than its ranks.

    Attributes:
        alpha_over_rank: LoRA alpha / r, the same for every rank. The adapter's product is scaled by
            it, or, with `use_rslora`, by alpha_over_rank * sqrt(r).
        lora_alpha: LoRA alpha, the same for every rank, in place of `alpha_over_rank` * r; 0: none.
            The scaling is then alpha / r, or, with `use_rslora`, alpha / sqrt(r).
        lora_dropout: LoRA dropout.
        use_dora: Train a magnitude per output as well (DoRA, arXiv 2402.09353), starting from that
            of the base weights.
        use_rslora: Divide alpha by sqrt(r) instead of r (arXiv 2312.03732).
        target_modules: The matrices of a layer that get an adapter, by name or its last part;
            empty: all.
    """

    alpha_over_rank: float = 2.0
    lora_alpha: float = 0.0
    lora_dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: RecoveryConfig) -> LoraSettings:
        """Returns those of a run file, without the switches of a method."""
        return cls(
            alpha_over_rank=config.alpha_over_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.target_modules,
        )

    def alpha(self, rank: int) -> float:
        """Returns LoRA's alpha of a module."""
        return self.lora_alpha or self.alpha_over_rank * rank

    def scaling(self, rank: int) -> float:
        """Returns the factor of the adapter's product."""
        return self.alpha(rank) / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True, eq=False)
class Pair:
    """Addend of an adapter to one matrix: scaling * up @ down.

    Attributes:
        down: A, shape (rank, in).
        up: B, shape (out, rank).
        scaling: Any factor.
    """

    down: torch.Tensor
    up: torch.Tensor
    scaling: float


def attach(
    base: PreTrainedModel | PeftModel,
    allocation: RankAllocation,
    settings: LoraSettings | None = None,
    *,
    seed: int,
) -> PeftModel:
    """Puts a fresh adapter on the base model, in the place of the one before.

    Args:
        base: The pruned model, or what PEFT made of it, with any adapter.
        allocation: One rank per decoder layer, group or projection.
        settings: Scaling, dropout and the like; the defaults if left out.
        seed: Seed of the initial weights.

    Returns:
        `base` itself if it has been a LoRA model, else a new one.

    Raises:
        RankSpaceError: If the allocation does not fit the model.
        ConfigError: If a target is not a matrix of this model.
    """
    settings = settings or LoraSettings()
    bare = base_of(base)
    ranks = module_ranks(bare, allocation, settings.target_modules)
    structure, layers = structure_of(bare), len(decoder_layers(bare))
    patterns = {re.escape(name): rank for name, rank in ranks.items()}
    if len(allocation.ranks) == layers:
        # PEFT matches a pattern against the whole module name, so one short pattern per layer has
        # to spell out the layer up to the dot: `layers.1.*` would match the layers 10 to 19 too.
        named = enumerate(allocation.ranks)
        patterns = {rf"{re.escape(f'{structure.layers}.{i}')}\..*": r for i, r in named if r}
    alphas = {pattern: settings.alpha(rank) for pattern, rank in patterns.items()}
    config = _lora_config(bare, list(ranks), patterns, alphas, settings)
    if isinstance(base, PeftModel):
        base.unload()  # deleting an adapter would leave its layers, now without use, and its DoRA
    if isinstance(base, PeftModel) and base.peft_type == PeftType.LORA:
        for name in list(base.peft_config):
            base.delete_adapter(name)
        base.add_adapter(ADAPTER, config)
        base.set_adapter(ADAPTER)  # after delete and add nothing would be trainable otherwise
        model = base
    else:
        with without_old_name():
            model = get_peft_model(bare, config)
    initialize(model, seed)
    return model


def attach_ranks(
    bare: PreTrainedModel, ranks: Mapping[str, int], settings: LoraSettings, *, seed: int
) -> PeftModel:
    """Puts a fresh adapter with a rank per module on a model without adapter layers.

    Args:
        bare: The model.
        ranks: At least 1 each; modules that are not named get no adapter.
        settings: Scaling, dropout and the like.
        seed: Seed of the initial weights, which are those of `attach`.
    """
    alphas = {re.escape(name): settings.alpha(rank) for name, rank in ranks.items()}
    model = _attached(bare, ranks, alphas, settings)
    initialize(model, seed)
    return model


@torch.no_grad()
def attach_pairs(
    bare: PreTrainedModel, pairs: Mapping[str, Pair], *, dropout: float = 0.0
) -> PeftModel:
    """Puts a plain LoRA adapter with the given weights on a model without adapter layers.

    Args:
        bare: The model.
        pairs: By module name, of rank 1 or more each.
        dropout: LoRA dropout, for further training.

    Returns:
        The model with its adapter, in evaluation mode.
    """
    ranks = {name: len(pair.down) for name, pair in pairs.items()}
    alphas = {re.escape(name): pair.scaling * ranks[name] for name, pair in pairs.items()}
    model = _attached(bare, ranks, alphas, LoraSettings(lora_dropout=dropout))
    for name, module in adapted_modules(model).items():
        weight_of(module, "lora_A").copy_(pairs[name].down)
        weight_of(module, "lora_B").copy_(pairs[name].up)
    return model.eval()


def _attached(
    bare: PreTrainedModel,
    ranks: Mapping[str, int],
    alphas: dict[str, float],
    settings: LoraSettings,
) -> PeftModel:
    patterns = {re.escape(name): rank for name, rank in ranks.items()}
    config = _lora_config(bare, list(ranks), patterns, alphas, settings)
    # PEFT draws first weights that are replaced; the caller's random numbers stay as they are.
    with without_old_name(), torch.random.fork_rng(devices=[]):
        model: PeftModel = get_peft_model(bare, config)
    return model


def _lora_config(
    bare: PreTrainedModel,
    modules: list[str],
    ranks: dict[str, int],
    alphas: dict[str, float],
    settings: LoraSettings,
) -> LoraConfig:
    """Returns PEFT's description of an adapter; ranks and alphas are by pattern."""
    return LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(alphas.values()),
        rank_pattern=ranks,
        # Where alpha is the same for every rank, PEFT says it once.
        alpha_pattern={} if len({*alphas.values()}) == 1 else alphas,
        target_modules=modules,
        fan_in_fan_out=has_transposed_matrices(bare),
        lora_dropout=settings.lora_dropout,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


@torch.no_grad()
def initialize(model: PeftModel, seed: int) -> None:
    """Sets the adapter's weights: A uniform in +-1/sqrt(in) as in PEFT, B zero."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            down: nn.Linear = module.lora_A[ADAPTER]
            rank, features = down.weight.shape
            rows = nested_rows(rank, features, seed, name)
            down.weight.copy_(rows / math.sqrt(features))
            nn.init.zeros_(module.lora_B[ADAPTER].weight)


def nested_rows(rank: int, features: int, seed: int, name: str) -> torch.Tensor:
    """Draws rows uniform in [-1, 1); a smaller rank gets the first of the same rows.

    Returns:
        Shape (rank, features), float32.
    """
    # Seed and name are mixed into 32 bits: torch's generator ignores all bits above them.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    blocks = [torch.rand(_BLOCK, features, generator=generator) for _ in range(0, rank, _BLOCK)]
    return torch.cat(blocks)[:rank] * 2 - 1


def trainable_parameters(model: PeftModel) -> list[nn.Parameter]:
    """Returns the adapter's parameters."""
    return [p for p in model.parameters() if p.requires_grad]


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Returns the model below; adapter layers inside it stay."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def has_adapters(model: PreTrainedModel) -> bool:
    """True if a bare model has adapter layers inside it."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode while the block lasts; each module gets its mode back."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


@contextlib.contextmanager
def restored_on_failure(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Leaves the model below as it was, and without adapter layers, if the block fails."""
    bare = base_of(model)
    modes = [(module, module.training) for module in bare.modules()]
    flags = [(p, p.requires_grad) for p in bare.parameters()]
    try:
        yield
    except BaseException:
        adapted = {n: m for n, m in bare.named_modules() if isinstance(m, BaseTunerLayer)}
        for name, layer in adapted.items():
            bare.set_submodule(name, layer.get_base_layer())
        vars(bare).pop("peft_config", None)  # or PEFT would warn of adapters that are gone
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def bare_model(base: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Returns the model below, with all adapter layers taken off it."""
    if isinstance(base, PeftModel):
        base.unload()
    return base_of(base)


def adapted_modules(model: PeftModel) -> dict[str, LoraLayer]:
    """Returns the modules that have the adapter, by their name in the model below."""
    return {
        name.removeprefix(WRAPPER): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.r
    }


def adapter_ranks(model: PeftModel) -> dict[str, int]:
    """Returns the rank of every module that has the adapter, by its name in the model below."""
    return {name: module.r[ADAPTER] for name, module in adapted_modules(model).items()}


def adapter_weights(model: PeftModel) -> list[nn.Parameter]:
    """Returns the A matrices of the adapter."""
    return [weight_of(module, "lora_A") for module in adapted_modules(model).values()]


def weight_of(module: LoraLayer, kind: str, adapter: str = ADAPTER) -> nn.Parameter:
    """Returns a weight of an adapted module; `kind` is ``"lora_A"`` or ``"lora_B"``."""
    weight: nn.Parameter = getattr(module, kind)[adapter].weight
    return weight


def has_transposed_matrices(model: PreTrainedModel) -> bool:
    """True if the matrices of a model are stored as (in, out)."""
    structure = structure_of(model)
    matrix = model.get_submodule(f"{structure.layers}.0.{structure.output}")
    return is_transposed(getattr(matrix, "base_layer", matrix))
