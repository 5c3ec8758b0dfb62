"""Calibration sequences: what a model needs to read them within memory, and leave no trace."""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from rankadaptor_plugin.core.errors import CorpusError, RankAdaptorError, UnsupportedModelError
from rankadaptor_plugin.core.progress import advance
from rankadaptor_plugin.corpus.corpus import encode
from rankadaptor_plugin.corpus.rows import prompt_and_response, read_rows
from rankadaptor_plugin.models.device import is_out_of_memory
from rankadaptor_plugin.models.logits import replaced_forward, summed_loss
from rankadaptor_plugin.models.structures import place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

T = TypeVar("T")


class Limits(NamedTuple):
    """What scores may hold above the weights and the work on one layer, in bytes.

    Attributes:
        inputs: Inputs of all layers in one pass, which takes at least one sequence.
        sums: What is added up over the passes, in float32, of at least one matrix or block; for
            the others the passes are made again.
    """

    inputs: int
    sums: int


LIMITS = Limits(inputs=2**29, sums=3 * 2**29)
"""Room for one sequence of 2048 tokens of a 7B model in half precision, and two of its layers."""
_LEAST = 2**16
"""Bytes of sums, which every model has memory for."""
_WRITTEN_TOGETHER = 32
"""Texts that a model writes at once."""


class Batch(NamedTuple):
    """Sequences padded on the right.

    Attributes:
        ids: Token ids, shape (sequences, t), int64.
        mask: 1 for tokens and 0 for padding, of the same shape and type.
    """

    ids: torch.Tensor
    mask: torch.Tensor


def check_loaded(model: PreTrainedModel) -> None:
    """Checks that all weights are in memory and finite, as scores and cuts need them.

    A model that lies on the meta device as a whole has none: only shapes are asked for.

    Raises:
        UnsupportedModelError: If some are offloaded.
        RankAdaptorError: If some are not finite; the message names the layer.
    """
    if all(parameter.is_meta for parameter in model.parameters()):
        return
    for name, parameter in model.named_parameters():
        where = place(model, name.removesuffix(".weight"))
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"{where} is offloaded (its weight is on the meta device). Load the model whole, "
                "onto one or more GPUs or the CPU, to prune it."
            )
        # The least and the greatest number take no memory, a comparison as much as the parameter.
        if not all(end.isfinite() for end in parameter.detach().aminmax()):
            raise RankAdaptorError(
                f"{where} has weights that are not finite. Load an intact model."
            )


def check_samples(model: PreTrainedModel, samples: Sequence[torch.Tensor]) -> None:
    """Checks that a model can read calibration sequences.

    Raises:
        CorpusError: If there is no sequence, or one is too short or long, or has unknown tokens.
    """
    if not len(samples):
        raise CorpusError("There are no calibration sequences. Give at least one.")
    longest = getattr(model.config, "max_position_embeddings", None)
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
        if longest and len(sample) > longest:  # learned positions end there
            raise CorpusError(
                f"Calibration sequence {number} has {len(sample)} tokens; the model reads at most "
                f"{longest}. Lower [prune] calibration_tokens."
            )


def padded(samples: Sequence[torch.Tensor]) -> Batch:
    """Makes one batch of sequences, each of shape (t,), int64, of any lengths."""
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return Batch(pad(list(samples)), pad([torch.ones_like(sample) for sample in samples]))


def within_memory(
    model: PreTrainedModel, samples: Sequence[torch.Tensor], compute: Callable[[Limits], T]
) -> T:
    """Computes within `Limits`, which are halved each time that memory runs out.

    Raises:
        RankAdaptorError: If memory runs out with one sequence per pass and few sums.
    """
    limits = Limits(min(LIMITS.inputs, _bytes_of_inputs(model, samples)), LIMITS.sums)
    while True:
        try:
            return compute(limits)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if torch.cuda.is_available():  # out here the error no longer holds on to tensors
            torch.cuda.empty_cache()
        limits = Limits(*(limit // 2 for limit in limits))
        if limits.sums < _LEAST:
            raise RankAdaptorError(
                "Out of memory with one calibration sequence at a time. Lower [prune] "
                'calibration_tokens, set dtype = "bfloat16", or [prune] importance = "magnitude".'
            )
        parts = len(micro_batches(model, samples, limits))
        logger.warning("Out of memory: %d calibration sequences in %d passes", len(samples), parts)


def micro_batches(
    model: PreTrainedModel, samples: Sequence[torch.Tensor], limits: Limits
) -> list[Sequence[torch.Tensor]]:
    """Cuts calibration sequences into passes, in their order; in one pass if that is allowed."""
    parts: list[list[torch.Tensor]] = []
    for sample in samples:
        if parts and _bytes_of_inputs(model, [*parts[-1], sample]) <= limits.inputs:
            parts[-1].append(sample)
        else:
            parts.append([sample])
    return list(parts)


def _bytes_of_inputs(model: PreTrainedModel, samples: Sequence[torch.Tensor]) -> int:
    config = model.config.get_text_config()
    tokens = len(samples) * max(map(len, samples))  # with padding
    size: int = config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    return tokens * size


def grouped(items: Sequence[T], size: Callable[[T], int], most: int) -> list[list[T]]:
    """Cuts a list into groups of at most a size, or one item."""
    groups: list[list[T]] = []
    room = 0
    for item in items:
        if size(item) > room:
            groups.append([])
            room = most
        groups[-1].append(item)
        room -= size(item)
    return groups


def hidden_states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Returns the inputs of the output layer, shape (sequences, t, hidden)."""
    device = model.get_input_embeddings().weight.device
    ids, mask = (tensor.to(device) for tensor in batch)
    decoder: Any = model.get_decoder()
    return cast("torch.Tensor", decoder(input_ids=ids, attention_mask=mask, use_cache=False)[0])


def sequence_loss(model: PreTrainedModel, sample: torch.Tensor) -> torch.Tensor:
    """Returns the mean next-token loss of a sequence, in nats; a float32 scalar."""
    return _mean_loss(model, sample, hidden_states(model, padded([sample]))[0])


def backward(model: PreTrainedModel, samples: Sequence[torch.Tensor], hidden: torch.Tensor) -> None:
    """Takes the sum of the sequences' mean losses back through a model.

    Few logits are in memory at a time: those of all sequences would outweigh the layers.

    Args:
        model: A causal language model.
        samples: Token ids, each of shape (t,), int64.
        hidden: What `hidden_states` returned for the batch of these.
    """
    if not hidden.requires_grad:
        return
    own = hidden.detach().requires_grad_()
    for sample, states in zip(samples, own, strict=True):
        torch.autograd.backward(_mean_loss(model, sample, states[: len(sample)]))
    torch.autograd.backward(hidden, own.grad)


def _mean_loss(model: PreTrainedModel, sample: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Returns the mean next-token loss of a sequence from its states, shape (t, hidden)."""
    targets = sample[1:].to(hidden.device)

    def loss(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        expected = targets[rows].to(logits.device)
        return nn.functional.cross_entropy(logits.float(), expected, reduction="sum")

    return summed_loss(model, hidden[:-1], loss) / len(targets)


@contextmanager
def checkpointed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Keeps of each layer its inputs alone, and computes it again in the backward pass.

    transformers' own checkpointing needs training mode, which would switch dropout on.
    """
    with ExitStack() as stack:
        for layer in dict.fromkeys(layers):
            light = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
            stack.enter_context(replaced_forward(layer, light))
        yield


@contextmanager
def only_gradients_of(model: nn.Module, weights: Iterable[torch.Tensor]) -> Iterator[None]:
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


def calibration_documents(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, template: str = "alpaca"
) -> list[torch.Tensor]:
    """Reads and tokenizes the file that calibration sequences come from.

    Args:
        path: A ``.json``, ``.jsonl`` or text file, as for the corpus.
        tokenizer: Tokenizer of the model.
        template: ``alpaca`` or ``plain``, the prompt around instruction rows.

    Returns:
        Token ids of each row, or of the whole text, each of shape (t,), int64.

    Raises:
        ConfigError: If the file is missing.
        CorpusError: If it is malformed.
    """
    texts = (
        row["text"] if "text" in row else "".join(prompt_and_response(row, template))
        for row in read_rows(path, "calibration text")
    )
    return [torch.tensor(encode(tokenizer, text), dtype=torch.int64) for text in texts]


def calibration_samples(
    documents: Sequence[torch.Tensor], count: int, tokens: int, seed: int
) -> list[torch.Tensor]:
    """Draws sequences of one length, at random and without overlap.

    As in LLM-Pruner they come from documents that are long enough, never from two at once.

    Args:
        documents: Token ids, each of shape (t,), int64.
        count: Number of sequences; with a warning fewer if there are no more.
        tokens: Length of each sequence.
        seed: Seed of the draw.

    Returns:
        Token ids, each of shape (tokens,), int64.

    Raises:
        CorpusError: If no document is long enough.
    """
    generator = torch.Generator().manual_seed(seed)
    windows = [
        (number, place)
        for number, document in enumerate(documents)
        for place in range(len(document) // tokens)
    ]
    if not windows:
        longest = max((len(document) for document in documents), default=0)
        raise CorpusError(
            f"The calibration text is too short: its longest document has {longest} tokens, but "
            f"[prune] calibration_tokens is {tokens}. Lower it, or give longer text in [prune] "
            "calibration."
        )
    if len(windows) < count:
        logger.warning(
            "The calibration text gives %d sequences of %d tokens, not %d. Give more text, or "
            "lower [prune] calibration_tokens.",
            len(windows),
            tokens,
            count,
        )
    samples = []
    shifts: dict[int, int] = {}
    for index in torch.randperm(len(windows), generator=generator)[:count].tolist():
        number, place = windows[index]
        if number not in shifts:  # one for all windows of a document, which so cannot overlap
            spare = len(documents[number]) % tokens
            shifts[number] = int(torch.randint(spare + 1, (1,), generator=generator))
        start = shifts[number] + place * tokens
        samples.append(documents[number][start : start + tokens])
    return samples


def mixed_text(
    corpus: Sequence[torch.Tensor],
    general: Sequence[torch.Tensor],
    *,
    tokens: int,
    most: int,
    seed: int,
) -> list[torch.Tensor]:
    """Draws sequences from a corpus and from general text, about half of the tokens from each.

    Args:
        corpus: Its sequences, token ids of shape (t,) each, int64.
        general: Documents, likewise; none leaves the corpus alone.
        tokens: Longest sequence.
        most: Most sequences.
        seed: Seed of the draw.

    Returns:
        Token ids of shape (t,) each, in random order.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffled(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        order = torch.randperm(len(parts), generator=generator).tolist()
        return [parts[i] for i in order]

    cut = [piece for text in general for piece in torch.split(text, tokens) if len(piece) > 1]
    sources = [shuffled([row[:tokens] for row in corpus]), shuffled(cut)]
    chosen: list[torch.Tensor] = []
    taken = [0, 0]
    while len(chosen) < most:
        # The source that is behind; once one is used up, the other would outweigh it.
        source = int(bool(cut) and taken[1] < taken[0])
        if not sources[source]:
            break
        chosen.append(sources[source].pop())
        taken[source] += len(chosen[-1])
    return shuffled(chosen)


@torch.no_grad()
def written_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    tokens: int,
    seed: int,
) -> list[torch.Tensor]:
    """Lets a model write texts by itself, which are about what it was trained on.

    Sampled at temperature 1 from all tokens, behind the token that begins a text; where there is
    none, behind a token drawn at random. So the text needs no file, as in Self-Calibration
    (arXiv 2410.17170). Model and global random state are left as they were.

    Args:
        model: The unpruned model.
        tokenizer: Its tokenizer.
        count: Number of texts.
        tokens: Tokens of each; fewer where it ends earlier.
        seed: Seed of the sampling.

    Returns:
        Token ids of shape (t,) each, int64, on the CPU.
    """
    first = tokenizer.bos_token_id
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    device = model.get_input_embeddings().weight.device
    vocabulary = len(tokenizer)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens - 1,
        bos_token_id=first,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    texts: list[torch.Tensor] = []
    devices = [device] if device.type == "cuda" else []
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        while len(texts) < count:
            size = min(_WRITTEN_TOGETHER, count - len(texts))
            begin = (
                torch.randint(vocabulary, (size, 1))
                if first is None
                else torch.full((size, 1), first)
            )
            begin = begin.to(device)
            written = model.generate(
                begin, attention_mask=torch.ones_like(begin), generation_config=settings
            )
            for row in written.cpu():
                stops = [at for at, token in enumerate(row.tolist()) if at and token in ends]
                texts.append(row[: stops[0] + 1] if stops else row)
            advance("texts", len(texts), count)
    model.train(was_training)
    return texts
