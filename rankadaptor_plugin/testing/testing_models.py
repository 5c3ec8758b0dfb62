"""What the conformance suite of model families does to its models, and reads off them."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from rankadaptor_plugin.models.structures import (
    decoder_layers,
    hidden_units,
    layer_units,
    structure_of,
)
from rankadaptor_plugin.models.units import is_transposed
from rankadaptor_plugin.pruning.cutting import remove

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from rankadaptor_plugin.models.units import Units

    Cut = tuple[int, int, list[int]]
    """Number of a layer, 0 for its attention or 1 for its MLP, numbers of the units to remove."""


def choose_cuts(model: PreTrainedModel) -> list[Cut]:
    """Chooses the first unit of layer 1 and the last two of the last layer, but never all."""
    layers, cuts = layer_units(model), []
    for index, chosen in ((1, (0,)), (len(layers) - 1, (-1, -2))):
        for kind, units in enumerate(layers[index]):
            count = len(units[0].indices) if units else 0
            numbers = [range(count)[i] for i in chosen[: max(count - 1, 0)]]
            if numbers:
                cuts.append((index, kind, numbers))
    return cuts


def remove_units(model: PreTrainedModel, cuts: Sequence[Cut]) -> None:
    """Removes units as a pruner does."""
    units = layer_units(model)
    for index, kind, numbers in cuts:
        remove(units[index][kind], numbers)


@torch.no_grad()
def zero_units(model: PreTrainedModel, cuts: Sequence[Cut]) -> None:
    """Zeroes what reads units, which so are without effect."""
    units = layer_units(model)
    for index, kind, numbers in cuts:
        for member in units[index][kind]:
            if member.side == "in":
                member.weight[:, member.indices[numbers].flatten()] = 0


@torch.no_grad()
def first_order(units: Units) -> torch.Tensor:
    """Sums |g w| over the weights of each unit, with gradients that are there; shape (units,)."""
    total = torch.zeros(len(units[0].indices))
    for member in units:
        gradient: Any = member.module.weight.grad
        shaped = gradient.T if is_transposed(member.module) else gradient
        salience = (shaped * member.weight).abs().sum(1 if member.side == "out" else 0)
        total += salience[member.indices].sum(1)
    return total


@torch.no_grad()
def without_channels(model: PreTrainedModel, removed: list[int]) -> PreTrainedModel:
    """Copies a model; in the copy hidden channels are zero throughout, and norms disregard them."""
    model = copy.deepcopy(model)
    structure, hidden = structure_of(model), model.config.hidden_size
    share = (hidden - len(removed)) / hidden
    model.get_input_embeddings().weight[:, removed] = 0
    for member in hidden_units(model):
        if member.side == "out":
            member.weight[removed] = 0
            if member.module.bias is not None:
                bias: Any = member.module.bias
                bias[removed] = 0
    norms = [layer.get_submodule(n) for layer in decoder_layers(model) for n in structure.norms]
    for norm in (*norms, model.get_submodule(structure.final_norm)):
        norm.get_parameter("weight").mul_(math.sqrt(share))
        for name in [name for name in vars(norm) if "eps" in name]:
            setattr(norm, name, getattr(norm, name) * share)
    return model


def numbers_beside(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Returns, per layer, the numbers that modules keep, and the widths in their configs."""
    structure, found = structure_of(model), []
    keys = [structure.heads_key, structure.kv_heads_key, structure.channels_key]
    for layer in decoder_layers(model):
        numbers: dict[str, Any] = {}
        for name, module in layer.named_modules():
            values: dict[str, Any] = {
                k: v for k, v in vars(module).items() if isinstance(v, int | float)
            }
            config = getattr(module, "config", None)
            values |= {f"config.{key}": getattr(config, key, None) for key in keys}
            numbers[name] = values
        found.append(numbers)
    return found


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer of one word, only to be saved beside a model."""
    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))  # noqa: S106
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")  # noqa: S106


def batch(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids and a mask that pads the second sequence on the left, shape (2, 9)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.config.vocab_size, (2, 9), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    return tokens, mask


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """Returns the logits of all tokens, first without padding, then with: (tokens, vocabulary)."""
    tokens, mask = batch(model)
    whole = model(input_ids=tokens, use_cache=False).logits
    padded = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return torch.cat([whole.flatten(0, 1), padded[mask.bool()]])


def loss_of(model: Any) -> torch.Tensor:
    """Returns the next-token loss on the batch."""
    tokens, _ = batch(model)
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


def graded(model: Any) -> set[str]:
    """Returns the names of the parameters that the loss gives a gradient to."""
    torch.autograd.backward(loss_of(model))
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return names


def generate(model: Any, **options: Any) -> torch.Tensor:
    """Generates five tokens greedily after the padded batch."""
    tokens, mask = batch(model)
    length = {"min_new_tokens": 5, "max_new_tokens": 5, "pad_token_id": 0}
    result: torch.Tensor = model.generate(
        tokens, attention_mask=mask, do_sample=False, **length, **options
    )
    return result


def tied(model: Any) -> bool:
    """Returns whether the output layer shares its weights with the input embeddings."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight
