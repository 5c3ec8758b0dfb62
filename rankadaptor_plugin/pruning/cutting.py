"""Shared parts of all pruners: cutting out units, and the bridge to torch-pruning's own pruners.

The only module that imports torch-pruning.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from dataclasses import asdict
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch_pruning import utils
from torch_pruning.dependency import index_mapping

from rankadaptor_plugin.config.tables import PruneConfig
from rankadaptor_plugin.core.errors import UnsupportedModelError
from rankadaptor_plugin.models.modeling_rankadaptor import take
from rankadaptor_plugin.models.pruned_model import IMPORTANCE_LOST, PrunedModel
from rankadaptor_plugin.models.structures import decoder_layers, set_config, structure_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch_pruning.pruner import BasePruner
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.models.structures import Units


log = logging.getLogger(__name__)


def provenance(config: PruneConfig, samples: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Returns the record of a built-in pruner: its settings."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("method", "calibration")}
    return {
        "pruner": config.method,
        **settings,
        "calibration_tokens": [len(sample) for sample in samples],
    }


def importance_lost(
    layers: int, parts: Iterable[tuple[int, torch.Tensor, Sequence[int]]], config: PruneConfig
) -> dict[str, list[float]]:
    """Returns the entry of the provenance that says which share of its importance a layer lost.

    Args:
        layers: Number of layers before pruning.
        parts: Number of a layer, the scores of some of its units, and which of them go.
        config: The ``[prune]`` table; random scores say nothing, and the entry is left out.
    """
    if config.importance == "random":
        return {}
    lost, total = [0.0] * layers, [0.0] * layers
    for layer, scores, removed in parts:
        lost[layer] += float(scores[list(removed)].double().sum())
        total[layer] += float(scores.double().sum())
    shares = (part / whole if whole else 0.0 for part, whole in zip(lost, total, strict=True))
    return {IMPORTANCE_LOST: [min(share, 1.0) for share in shares]}


def warn_of_too_much(problem: str, remedy: str) -> None:
    """Warns where a setting asks for more than a layer can lose."""
    log.warning("%s; %s. Lower it to prune as asked.", problem, remedy)


def rounded(kept: int, step: int, most: int) -> int:
    """Rounds a number of units that stay to the nearest multiple, at least one and at most all."""
    return min(most, max(1, (2 * kept + step) // (2 * step)) * step)


def note_unused(config: PruneConfig, *keys: str) -> None:
    """Warns of settings that were changed but that the method does not use."""
    for key in keys:
        if getattr(config, key) != getattr(PruneConfig, key):
            log.warning('[prune] %s is not used by method = "%s".', key, config.method)


def remove(units: Units, numbers: Sequence[int]) -> None:
    """Cuts units out of all their matrices; frozen parameters stay frozen."""
    if not numbers:
        return
    for member in units:
        lines = member.weight.shape[0 if member.side == "out" else 1]
        kept = torch.ones(lines, dtype=torch.bool)
        kept[member.indices[list(numbers)].flatten()] = False
        rest, whole = kept.nonzero().flatten().to(member.weight.device), slice(None)
        take(member.module, *((rest, whole) if member.side == "out" else (whole, rest)))


def describe_pruned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base_config: PreTrainedConfig | None = None,
    provenance: dict[str, Any] | None = None,
) -> PrunedModel:
    """Takes over a model that was pruned by other means; converts it in place.

    The widths are read from the matrices. Heads must have been removed whole: with torch-pruning's
    own pruners set ``prune_head_dims=False``, as heads made smaller may look like fewer heads.

    Args:
        model: A model of a supported family whose heads, MLP channels or hidden size were cut.
        tokenizer: Its tokenizer.
        base_config: Config before pruning; None if ``model.config`` still holds those sizes.
        provenance: Where it comes from, plain JSON values.

    Raises:
        UnsupportedModelError: If heads are fractional, or matrices do not fit each other or the
            config.
    """
    structure = structure_of(model)
    base_config = base_config or copy.deepcopy(model.config)
    hidden = model.get_input_embeddings().weight.shape[1]
    if structure.norms and hidden != model.config.hidden_size:
        set_hidden_size(model, hidden)
    return PrunedModel.of(
        model, tokenizer, {"pruner": "custom", **(provenance or {})}, base_config=base_config
    )


def set_hidden_size(model: PreTrainedModel, hidden: int) -> None:
    """Brings the config up to date after the hidden size was cut; the heads keep their size.

    Raises:
        UnsupportedModelError: If a norm or the output layer still has another size.
    """
    structure, layers = structure_of(model), decoder_layers(model)
    size = structure.size_of_head(layers[0])
    norms = {
        f"{structure.layers}.{i}.{name}" for i in range(len(layers)) for name in structure.norms
    }
    for name in (*sorted(norms), structure.final_norm):
        found = len(model.get_submodule(name).get_parameter("weight"))
        if found != hidden:
            raise UnsupportedModelError(
                f"{name} has {found} weights, but the embeddings have {hidden}. Prune the hidden "
                "size everywhere: with torch-pruning, leave the norms out of ignored_layers."
            )
    config = copy.deepcopy(model.config)
    config.head_dim = size
    config.hidden_size = hidden
    set_config(model, config)


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """Lets torch-pruning trace a causal LM of transformers, within a ``with`` block.

    torch-pruning 1.6.1 takes the two halves of a rotated query for concatenated features, and then
    looks for their pruning group without end: where query heads share a key-value head, and, with
    as many key-value heads as query heads, where the forward pass fills a cache. Its notes on
    concatenation are switched off in the block; decoder layers have none. It also stumbles over a
    cache in the output, of which only the logits are traced here, so that no ``forward_fn`` is
    needed. Build the pruner inside; `after_pruning` covers its steps.
    """
    noted, flattened = index_mapping.update_concat_index_mapping, utils.flatten_as_list
    index_mapping.update_concat_index_mapping = lambda group, node: None
    utils.flatten_as_list = lambda output: flattened(getattr(output, "logits", output))
    try:
        yield
    finally:
        index_mapping.update_concat_index_mapping = noted
        utils.flatten_as_list = flattened


def after_pruning(pruner: BasePruner, callback: Callable[[PreTrainedModel], object]) -> None:
    """Makes a torch-pruning pruner call back when it is done.

    torch-pruning has no callbacks, so ``pruner.step`` is replaced on this one instance. The
    callback gets ``pruner.model`` once: when step number ``iterative_steps`` has ended, or, with
    ``step(interactive=True)``, when its groups have all been taken.
    """
    step = pruner.step
    called = False

    def finish() -> None:
        nonlocal called
        if not called and pruner.current_step >= pruner.iterative_steps:
            called = True
            callback(pruner.model)

    def then_finish(groups: Iterator[Any]) -> Iterator[Any]:
        with traceable():
            yield from groups
        finish()

    @wraps(step)
    def step_and_finish(interactive: bool = False) -> Iterator[Any] | None:
        with traceable():
            groups = step(interactive=interactive)
        if interactive:
            return then_finish(groups)
        finish()
        return None

    pruner.step = step_and_finish


class Pruner(Protocol):
    """Removes units from a model."""

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        samples: Sequence[torch.Tensor],
        config: PruneConfig,
    ) -> PrunedModel:
        """Prunes a model, in place or not.

        Args:
            model: The base model.
            tokenizer: Its tokenizer.
            samples: Calibration sequences, each of shape (t,), int64.
            config: The ``[prune]`` table.
        """
        ...
