"""Predictions of the unpruned model, computed once per corpus and kept on disk.

A fine-tune that distills needs the teacher's predictions for every trained token, the same in each
of the hundreds of fine-tunes of a search. So they are computed once and cut to the k likeliest
tokens, and the unpruned model leaves memory again. `LiveTeacher` keeps it, and predicts anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import zlib
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.files import write_file
from rankadaptor_plugin.core.progress import advance
from rankadaptor_plugin.corpus.sequences import TeacherTokens
from rankadaptor_plugin.models.logits import hidden_at, logits_of
from rankadaptor_plugin.recovery.batches import LEAST, padded, trained_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

    from rankadaptor_plugin.corpus.sequences import Corpus, TrainingSequence
    from rankadaptor_plugin.recovery.batches import Pass

logger = logging.getLogger(__name__)

_VERSION = 1  # of what is computed and how it is stored; part of the key
_ROWS = 256  # predictions that are in memory at a time


class LiveTeacher:
    """The unpruned model, kept in memory to predict every pass anew."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Puts the model into evaluation mode and freezes it."""
        self._model = model.eval().requires_grad_(False)
        self.config: PreTrainedConfig = model.config

    @torch.no_grad()
    def __call__(self, given: Pass) -> Callable[[slice], torch.Tensor]:
        """Reads the sequences.

        Args:
            given: The sequences, on any device.

        Returns:
            A function that returns the logits of some of the trained tokens, shape (m, v), in the
            type of the teacher, on the device of the pass.
        """
        here = given.to(self._model.device)
        as_it_is = torch.autocast(here.input_ids.device.type, enabled=False)  # not as the student
        with as_it_is:
            hidden = hidden_at(self._model, here.positions, here.input_ids)

        def predicted(rows: slice) -> torch.Tensor:
            with torch.no_grad(), as_it_is:
                return logits_of(self._model, hidden[rows]).to(given.targets.device)

        return predicted


def check_teacher(teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Checks that two models predict the same tokens.

    Raises:
        ConfigError: If their vocabularies are of different size.
    """
    theirs, ours = (config.get_text_config().vocab_size for config in (teacher, student))
    if theirs != ours:
        raise ConfigError(
            f"The teacher has a vocabulary of {theirs} tokens, the model that learns from it one "
            f"of {ours}. Distill from the model that it was pruned from, or leave distill out of "
            "[recovery] stack and methods."
        )


def check_predictions(
    student: PreTrainedConfig, sequences: Sequence[TrainingSequence], teacher: LiveTeacher | None
) -> None:
    """Checks that there is a teacher for every sequence, and that it knows the student's tokens.

    Raises:
        ConfigError: If not.
    """
    if teacher is not None:
        check_teacher(teacher.config, student)
        return
    size = student.get_text_config().vocab_size
    for number, sequence in enumerate(sequences, start=1):
        if sequence.teacher is None:
            raise ConfigError(
                f"The method distills, but training sequence {number} of {len(sequences)} has no "
                "predictions of a teacher. Add them with rankadaptor_plugin.recovery.with_teacher, "
                "hand over a LiveTeacher, or leave distill out."
            )
    greatest = max(int(s.teacher.indices.max()) for s in sequences if s.teacher is not None)
    if greatest >= size:
        raise ConfigError(
            f"The teacher predicts token {greatest}, but the model that learns from it has a "
            f"vocabulary of {size}. Distill from the model that it was pruned from, or leave "
            "distill out."
        )


def with_teacher(
    corpus: Corpus,
    teacher: Callable[[], PreTrainedModel],
    *,
    fingerprint: str,
    top_k: int,
    temperature: float,
    cache: Path | None,
    batch_tokens: int = 8192,
) -> Corpus:
    """Adds the teacher's predictions to the training sequences; validation stays as it is.

    A trained token takes ``6 k + 4`` bytes (388 for 64 kept tokens, so 1.9 GB for five million
    trained tokens), in the file and in memory. Read from the file, it is mapped: the system loads
    what a batch needs, and may forget it again. While it is computed and written, two copies are in
    memory. Log-probabilities are kept in float16, which is off by at most 2^-11 of each: less than
    a teacher in bfloat16 is, and without effect on a loss (`docs/distillation.md`).

    Args:
        corpus: The corpus.
        teacher: Loads the unpruned model where it is to compute; not called if the file is there.
        fingerprint: What tells one teacher from another: its weights, and its type.
        top_k: Tokens that are kept of each prediction, at least 1; all if there are no more.
        temperature: Temperature of the predictions.
        cache: Folder of such files; None keeps them in memory alone. A torn file is made anew, and
            one that cannot be written is a warning.
        batch_tokens: Most tokens in one pass of the teacher, padding included; a longer sequence
            is alone in its pass.

    Returns:
        A corpus whose sequences carry predictions.

    Raises:
        ValueError: If `top_k` is below 1.
    """
    if top_k < 1:
        raise ValueError(f"{top_k} tokens of each prediction are too few; keep at least 1")
    counts = [trained_tokens([sequence]) for sequence in corpus.sequences]
    file = None
    if cache is not None:
        key = _key(corpus.sequences, fingerprint, top_k, temperature)
        file = cache / f"{key}.safetensors"
    predictions = _read(file, sum(counts)) if file else None
    if predictions is None:
        predictions = _predict(teacher().eval(), corpus.sequences, top_k, temperature, batch_tokens)
        if file and _write(file, predictions):
            predictions = (
                _read(file, sum(counts)) or predictions
            )  # mapped, it need not stay in memory
    parts = zip(
        *(torch.split(tensor, counts) for tensor in _tensors(predictions).values()), strict=True
    )
    return dataclasses.replace(
        corpus,
        sequences=[
            dataclasses.replace(sequence, teacher=TeacherTokens(*part))
            for sequence, part in zip(corpus.sequences, parts, strict=True)
        ],
    )


def _predict(
    model: PreTrainedModel,
    sequences: Sequence[TrainingSequence],
    top_k: int,
    temperature: float,
    batch_tokens: int,
) -> TeacherTokens:
    """Returns the predictions for all sequences, one after the other."""
    ends = [*itertools.accumulate(trained_tokens([sequence]) for sequence in sequences)]
    starts = [0, *ends]
    total = ends[-1]
    kept = min(top_k, model.config.get_text_config().vocab_size)
    # Made outside of the inference mode: its tensors could not be part of a loss.
    predictions = TeacherTokens(
        torch.empty(total, kept, dtype=torch.int32),
        torch.empty(total, kept, dtype=torch.float16),
        torch.empty(total, dtype=torch.float32),
    )
    done = 0
    with torch.inference_mode():
        for group in _groups(sequences, batch_tokens):
            here = padded([sequences[i] for i in group]).to(model.device)
            hidden = hidden_at(model, here.positions, here.input_ids)
            rows = torch.cat([torch.arange(starts[i], ends[i]) for i in group])
            chunks = (torch.split(tensor, _ROWS) for tensor in (hidden, rows))
            for some, where in zip(*chunks, strict=True):
                logits = logits_of(model, some).float()
                scores = torch.log_softmax(logits / temperature, dim=-1)
                best, indices = scores.topk(kept)
                rest = scores.scatter(1, indices, -torch.inf).logsumexp(1)
                predictions.indices[where] = indices.int().cpu()
                predictions.log_probabilities[where] = best.clamp(min=LEAST).half().cpu()
                predictions.rest[where] = rest.clamp(min=LEAST).cpu()
            done += len(group)
            advance("sequences", done, len(sequences))
    return predictions


def _groups(sequences: Sequence[TrainingSequence], batch_tokens: int) -> Iterator[list[int]]:
    """Yields the numbers of the sequences of each pass, the longest sequences first."""
    group: list[int] = []
    longest = 0
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i].tokens)):
        if group and (len(group) + 1) * longest > batch_tokens:
            yield group
            group = []
        if not group:
            longest = len(sequences[i].tokens)
        group.append(i)
    yield group


def _key(
    sequences: Sequence[TrainingSequence], fingerprint: str, top_k: int, temperature: float
) -> str:
    """Returns the name of what is predicted by whom for what."""
    said = hashlib.sha256(repr((_VERSION, fingerprint, top_k, float(temperature))).encode())
    for sequence in sequences:
        said.update(len(sequence.tokens).to_bytes(8, "little"))
        for ids in (sequence.tokens, sequence.labels):
            said.update(ids.to(torch.int64).contiguous().numpy().tobytes())
    return said.hexdigest()[:32]


def _tensors(predictions: TeacherTokens) -> dict[str, torch.Tensor]:
    return {f.name: getattr(predictions, f.name) for f in dataclasses.fields(predictions)}


def _checksum(predictions: TeacherTokens) -> str:
    value = 0
    for tensor in _tensors(predictions).values():
        value = zlib.crc32(tensor.numpy().data, value)
    return str(value)


def _read(file: Path, total: int) -> TeacherTokens | None:
    """Returns the predictions for so many trained tokens; None where they have to be made."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            said = (opened.metadata() or {}).get("checksum")
            predictions = TeacherTokens(
                **{f.name: opened.get_tensor(f.name) for f in dataclasses.fields(TeacherTokens)}
            )
        if len(predictions.rest) != total or _checksum(predictions) != said:
            raise ValueError("its content does not match its checksum")
    except (OSError, SafetensorError, ValueError) as error:
        logger.warning("The teacher's predictions in %s are corrupt (%s); recomputing", file, error)
        return None
    return predictions


def _write(file: Path, predictions: TeacherTokens) -> bool:
    """Writes the predictions, whole or not at all; returns True if they were written."""
    checksum = {"checksum": _checksum(predictions)}
    try:
        write_file(
            file,
            lambda partial: save_file(_tensors(predictions), partial, checksum),
            shared=True,
        )
    except (OSError, SafetensorError) as error:
        logger.warning(
            "The teacher's predictions cannot be kept in %s (%s); the next run computes them again",
            file.parent,
            error,
        )
        return False
    return True
