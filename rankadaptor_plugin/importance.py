"""How much the loss would change without a unit: first-order Taylor scores.

The score of a weight is |g * w| with g the gradient of the mean calibration loss, and that of a
unit is the sum over all of its weights: ``param_first`` with sum aggregation in LLM-Pruner
(arXiv 2305.11627, section 3.2). Biases are not counted, as there.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from rankadaptor_plugin.errors import CorpusError, RankAdaptorError
from rankadaptor_plugin.structures import decoder_layers, structure_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from rankadaptor_plugin.units import LayerUnits, Units


class LayerScores(NamedTuple):
    """The scores of one layer's units; higher means more important.

    Attributes:
        attention: One score per KV group, shape (groups,), float32, on the CPU.
        mlp: One score per MLP channel, shape (channels,), float32, on the CPU.
    """

    attention: torch.Tensor
    mlp: torch.Tensor


def taylor(model: PreTrainedModel, samples: Sequence[torch.Tensor]) -> tuple[LayerScores, ...]:
    """Scores the units of every layer by first-order Taylor expansion of the loss.

    The loss is the mean over the sequences of their mean next-token loss. The model is left as it
    was: gradients, what requires them, and training modes. Besides the model, the memory holds one
    gradient per matrix of the layers, and the activations of one sequence.

    Args:
        model: A causal language model of a supported family.
        samples: Calibration sequences, each of shape (t,), int64, t >= 2, lengths may differ.

    Returns:
        Scores of each decoder layer, bottom first.

    Raises:
        UnsupportedModelError: If the family is not supported.
        CorpusError: If there is no sequence, or one is too short or has unknown tokens.
        RankAdaptorError: If a gradient is not finite.
    """
    _check_samples(model, samples)
    structure = structure_of(model)
    units = [structure.units(layer) for layer in decoder_layers(model)]
    weights = [member.module.weight for layer in units for kind in layer for member in kind]
    with _only_gradients_of(model, weights), torch.enable_grad():
        for sample in samples:
            tokens = sample.to(model.device).unsqueeze(0)  # (1, t)
            output = model(input_ids=tokens, labels=tokens, use_cache=False)
            (output.loss / len(samples)).backward()
        scores = tuple(LayerScores(*(_scores(kind) for kind in layer)) for layer in units)
        _check_finite(units, scores)
    return scores


@torch.no_grad()
def _scores(units: Units) -> torch.Tensor:
    """Sums |g * w| over the weights of each unit; shape (units,), float32."""
    total = torch.zeros(len(units[0].indices))
    for member in units:
        weight = member.module.weight
        if weight.grad is None:
            raise RankAdaptorError(
                f"The loss has no gradient for {member.name}. Use a model whose loss depends on "
                "all of its layers."
            )
        salience = (weight.grad.float() * weight.float()).abs()
        lines = salience.sum(1 if member.side == "out" else 0).cpu()
        total += lines[member.indices].sum(1)
    return total


@contextmanager
def _only_gradients_of(model: nn.Module, weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Evaluation mode with gradients for some weights; afterwards all is as it was."""
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    wanted = {id(weight) for weight in weights}
    try:
        model.eval()
        for parameter, _, _ in parameters:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, training in modes:
            module.training = training


def _check_samples(model: PreTrainedModel, samples: Sequence[torch.Tensor]) -> None:
    if not len(samples):
        raise CorpusError("There are no calibration sequences. Give at least one.")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for number, sample in enumerate(samples):
        if sample.dim() != 1 or len(sample) < 2:  # noqa: PLR2004 - one token has no next token
            raise CorpusError(
                f"Calibration sequence {number} has shape {tuple(sample.shape)}. Give sequences of "
                "shape (tokens,) with at least 2 tokens."
            )
        if not 0 <= int(sample.min()) <= int(sample.max()) < vocabulary:
            raise CorpusError(
                f"Calibration sequence {number} has tokens from {int(sample.min())} to "
                f"{int(sample.max())}; the model knows 0 to {vocabulary - 1}. Use the model's own "
                "tokenizer."
            )


def _check_finite(units: Sequence[LayerUnits], scores: Sequence[LayerScores]) -> None:
    """Names the layer where the trouble begins.

    One bad weight spoils the loss and with it every gradient, so weights are looked at first;
    otherwise the trouble came up on the way back, which starts at the top.
    """
    bad = [i for i, layer in enumerate(scores) if not all(s.isfinite().all() for s in layer)]
    if not bad:
        return
    for index, layer in enumerate(units):
        for kind in layer:
            for member in kind:
                if not member.module.weight.isfinite().all():
                    raise RankAdaptorError(
                        f"Layer {index}: {member.name} has weights that are not finite. Load an "
                        "intact model."
                    )
    raise RankAdaptorError(
        f"Layer {bad[-1]}: the gradients are not finite in {len(bad)} of {len(scores)} layers, "
        'this being the topmost. Set dtype = "float32" or "bfloat16", or use other calibration '
        "text."
    )
