"""What a fine-tune takes: seconds, by a few of its steps, and memory, by the shapes alone."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rankadaptor_plugin.core.progress import watched
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.corpus.sequences import Corpus
from rankadaptor_plugin.models.footprint import kept_bytes
from rankadaptor_plugin.models.structures import decoder_layers, matrix_shape
from rankadaptor_plugin.recovery.adapters import bare_model
from rankadaptor_plugin.recovery.batches import batches
from rankadaptor_plugin.recovery.fine_tune import recover
from rankadaptor_plugin.recovery.fused_lora import adapted_product
from rankadaptor_plugin.recovery.methods.methods import LORA
from rankadaptor_plugin.recovery.slots import module_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.config.tables import RecoveryConfig

_STEPS, _SECONDS = 3, 0.2
"""What is timed: at least so many steps, and so long. The first step warms up."""

_TRAINED_BYTES = 16  # per adapter parameter, in float32: itself, its gradient, and AdamW's moments
_LOSS_BYTES = 16  # per logit that a loss is taken of: as it is, in float32, and their gradients
_LOGITS = 2**23  # most of them at once


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a model is fine-tuned.

    Attributes:
        begin: Seconds before the first step.
        per_token: Seconds of one token of a step.
        tokens: Tokens of a sequence, in the mean.
    """

    begin: float
    per_token: float
    tokens: float


class _EnoughError(Exception):
    """Ends a fine-tune that is only timed."""


def fine_tune_pace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    config: RecoveryConfig,
    rank: int,
    seed: int,
) -> Pace:
    """Times a few passes of a fine-tune on the run's own batches; the model is left as it was.

    Args:
        model: The model, without adapter.
        tokenizer: Its tokenizer.
        corpus: The training sequences.
        config: The ``[recovery]`` table.
        rank: Rank of the adapters.
        seed: Seed of the batches.

    Raises:
        RecoveryError: If memory runs out with a single sequence.
    """
    marks: list[float] = []

    def observe(*, what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if what == "steps":
            marks.append(time.perf_counter())
            if done == total or (done >= _STEPS and marks[-1] - marks[1] >= _SECONDS):
                raise _EnoughError

    # One pass per step: a large batch is many of them.
    size = config.per_device_train_batch_size
    # A rate that diverges is for the trials to report.
    one_pass = replace(config, gradient_accumulation_steps=1, learning_rate=0.0)
    rows = Corpus(sequences=corpus.sequences, dropped=0)
    allocation = RankAllocation((rank,) * len(decoder_layers(model)))
    began = time.perf_counter()
    with watched(observe), contextlib.suppress(_EnoughError):
        recover(model, tokenizer, allocation, rows, one_pass, seed, method=LORA)
    bare_model(model)
    first = 1 if len(marks) > 2 else 0  # noqa: PLR2004 - the beginning, the step that warms up
    timed = islice(batches(rows.sequences, size, seed), first, len(marks) - 1)
    tokens = sum(len(sequence.tokens) for batch in timed for sequence in batch)
    mean = sum(len(sequence.tokens) for sequence in rows.sequences) / len(rows.sequences)
    per_token = (marks[-1] - marks[first]) / tokens
    return Pace(begin=marks[0] - began, per_token=per_token, tokens=mean)


def training_bytes(
    model: PreTrainedModel, config: RecoveryConfig, rank: int, rows: int, tokens: int
) -> int:
    """Returns the memory of a fine-tune beside the weights, predicted from the shapes alone.

    That is what is kept for the backward pass, adapters with their gradients and the optimizer, and
    what a layer and the loss compute meanwhile.

    Args:
        model: The model that is fine-tuned, on the meta device.
        config: The ``[recovery]`` table.
        rank: Rank of the adapters.
        rows: Sequences per pass.
        tokens: Tokens of each.

    Raises:
        RankSpaceError: If the rank does not fit the model.
    """
    model.requires_grad_(False)
    layers, size = decoder_layers(model), model.dtype.itemsize
    ranks = module_ranks(model, RankAllocation((rank,) * len(layers)), config.target_modules)
    matrices = [model.get_submodule(name) for name in ranks]
    shapes = [matrix_shape(matrix) for matrix in matrices]
    trained = sum(rank * (rows_ + columns) for rows_, columns in shapes)
    with _adapted(matrices, rank):
        kept = rows * kept_bytes(model, tokens)
    if config.gradient_checkpointing:  # the inputs of all layers, and all of one
        inputs = rows * tokens * model.config.get_text_config().hidden_size * size
        kept = kept // len(layers) + len(layers) * inputs
    passing = 3 * rows * tokens * max(map(max, shapes)) * size
    logits: int = rows * tokens * model.config.get_text_config().vocab_size
    losses = min(logits, _LOGITS) * _LOSS_BYTES
    return int(kept + passing + trained * _TRAINED_BYTES + losses)


@contextlib.contextmanager
def _adapted(matrices: Sequence[nn.Module], rank: int) -> Iterator[None]:
    """Lets matrices on the meta device compute with adapters, as in a fine-tune."""
    for matrix in matrices:
        rows, columns = matrix_shape(matrix)
        # As parameters they are told from what is kept.
        matrix.down = nn.Parameter(torch.empty(rank, columns, device="meta"))
        matrix.up = nn.Parameter(torch.empty(rows, rank, device="meta"))
        matrix.forward = partial(_with_adapter, matrix, matrix.forward)
    try:
        yield
    finally:
        for matrix in matrices:
            del matrix.forward, matrix.down, matrix.up


def _with_adapter(
    matrix: Any, plain: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    if isinstance(matrix, nn.Linear):
        return adapted_product(matrix, x, matrix.down, matrix.up, 1.0)  # type: ignore[arg-type]
    added: torch.Tensor = x.float() @ matrix.down.mT @ matrix.up.mT
    return plain(x) + added.to(x.dtype)
