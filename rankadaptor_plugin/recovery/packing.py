"""Whether a model keeps sequences apart that are packed into one row.

transformers masks attention where position ids begin anew, but not in every family: in release
5.23 OPT drops them on the way to the mask, and the ALiBi of Bloom and the masks of Falcon are
built without them. Their sequences would read the ones before. Only trying tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.corpus.sequences import TrainingSequence
from rankadaptor_plugin.recovery.batches import passes, trained_tokens
from rankadaptor_plugin.recovery.losses import forward_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTHS = (7, 5, 6)  # tokens


def check_packing(model: PreTrainedModel) -> None:
    """Checks that a model keeps packed sequences apart.

    Raises:
        ConfigError: If it does not.
    """
    if not supports_packing(model):
        raise ConfigError(
            f"The layout is packed, but {type(model).__name__} mixes the sequences of a row. Set "
            '[recovery] layout = "sorted".'
        )


@torch.no_grad()
def supports_packing(model: PreTrainedModel) -> bool:
    """Tells whether packed sequences are predicted as each is by itself.

    Costs forward passes over 54 tokens. Other tokens in the first sequence must leave the others'
    predictions as they are to the last bit, since masked attention is exactly 0. And predictions
    must be those of each sequence alone, or positions are not counted anew; there, the square root
    of the precision of the model's type (0.03 % in float32, 9 % in bfloat16) of the spread of the
    predictions is allowed for rounding.

    Args:
        model: The bare model; adapter layers inside it count. Its mode is left as it was.
    """
    generator = torch.Generator().manual_seed(0)
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = [torch.randint(size, (length,), generator=generator) for length in _LENGTHS]
    sequences = [TrainingSequence(tokens, tokens) for tokens in ids]
    other = TrainingSequence((ids[0] + 1) % size, ids[0])
    training = model.training
    model.eval()
    try:
        apart = torch.cat([_logits(model, [sequence], "padded") for sequence in sequences])
        packed = _logits(model, sequences, "packed")
        beside = _logits(model, [other, *sequences[1:]], "packed")
    except (TypeError, ValueError):  # it takes no position ids
        return False
    finally:
        model.train(training)
    later = slice(trained_tokens(sequences[:1]), None)
    spread = (apart - apart.mean(dim=-1, keepdim=True)).norm()
    allowed = torch.finfo(model.dtype).eps ** 0.5 * spread
    return torch.equal(packed[later], beside[later]) and bool((packed - apart).norm() <= allowed)


def _logits(model: PreTrainedModel, sequences: list[TrainingSequence], layout: str) -> torch.Tensor:
    (given,) = passes(sequences, layout, len(sequences))
    return forward_logits(model, given.to(model.device)).float()
