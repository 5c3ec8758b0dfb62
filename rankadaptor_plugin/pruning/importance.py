"""Importance of each unit: scores of its weights, summed within each of its matrices.

Taylor scores estimate by how much the calibration loss would change without the weight, as in
LLM-Pruner (arXiv 2305.11627, section 3.2) and the paper (arXiv 2406.15734, equation 2); Wanda
(arXiv 2306.11695) takes the size of weight and input. Biases are not counted, as there.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from rankadaptor_plugin.core.errors import ConfigError, RankAdaptorError
from rankadaptor_plugin.core.progress import counted
from rankadaptor_plugin.models.structures import place
from rankadaptor_plugin.pruning.calibration import (
    Limits,
    check_loaded,
    check_samples,
    grouped,
    micro_batches,
    within_memory,
)
from rankadaptor_plugin.pruning.gradients import stream_gradients, stream_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from rankadaptor_plugin.config.tables import PruneConfig
    from rankadaptor_plugin.models.structures import Member, Units

    LineScores = dict[str, torch.Tensor]
    """Sums over each row ("out", shape (rows,)) and column ("in") of a matrix, on the CPU."""

_CHUNK = 2**22
"""Most weights of a matrix that are scored at once; 16 MiB for each intermediate result."""


def unit_scores(
    model: PreTrainedModel,
    kinds: Sequence[Units],
    samples: Sequence[torch.Tensor],
    config: PruneConfig,
) -> list[torch.Tensor]:
    """Scores units; higher means more important.

    A unit's score in one matrix is the sum over its weights there, and ``config.group_reduction``
    makes one score of those of all its matrices. What a weight w scores, ``config.importance``
    says:

    - "taylor": by ``config.taylor``. The loss is the mean over the sequences of their mean
      next-token loss, g its gradient, g_j that of sequence j's own mean loss. "first": abs(g w).
      "second": the sum over j of (g_j w)^2; LLM-Pruner's code divides it by the number of
      sequences, the paper does not. "mix": abs(g w - second / 2), equation 2 of the paper.
      "vectorize": g w, and the absolute value of the sum of a row or column.
    - "magnitude": abs(w).
    - "wanda": abs(w) times the norm of w's input feature over all calibration tokens.
    - "random": uniform numbers from torch's global generator, drawn per unit.

    All matrices are those of decoder layers. The model is left as it was. See
    `rankadaptor_plugin.pruning.gradients` for the memory this takes.

    Args:
        model: A causal language model of a supported family.
        kinds: Units of any number of kinds, or none of a kind. A matrix may occur in several.
        samples: Token ids, each of shape (t,), int64, t >= 2; for "taylor" and "wanda" only.
        config: The ``[prune]`` table.

    Returns:
        The scores of each kind, shape (units,), float32, on the CPU.

    Raises:
        ConfigError: If the importance, the Taylor term or the reduction is unknown.
        UnsupportedModelError: If the family is not supported, or a weight is offloaded.
        CorpusError: If there is no sequence, or one is too short or long, or has unknown tokens.
        RankAdaptorError: If a weight or score is not finite, or the loss does not depend on a
            matrix.
    """
    check_names(config)
    check_loaded(model)
    if config.importance == "random":
        return [torch.rand(len(units[0].indices)) if units else torch.zeros(0) for units in kinds]
    matrices = list({member.module: member for units in kinds for member in units}.values())
    lines = _MEASURES[config.importance](model, matrices, samples, config)
    if missing := [member.module for member in matrices if member.module not in lines]:
        raise RankAdaptorError(
            f"The loss has no gradient for {_place(model, missing[0])}. Use a model whose loss "
            "depends on all of its layers."
        )
    _check_finite(model, lines, config.importance)
    return [_reduced(units, lines, config.group_reduction) for units in kinds]


def _taylor(
    model: PreTrainedModel,
    matrices: Sequence[Member],
    samples: Sequence[torch.Tensor],
    config: PruneConfig,
) -> dict[nn.Module, LineScores]:
    """Makes the scores of each matrix when the backward pass reaches it, those of the top first.

    Over several passes, what the absolute value is taken of is added up first: row and column sums,
    or, for "first" and "mix", single weights, of as many matrices at a time as memory allows.
    """
    check_samples(model, samples)
    term, count = config.taylor, len(samples)

    def compute(limits: Limits) -> dict[nn.Module, LineScores]:
        parts = micro_batches(model, samples, limits)
        if len(parts) == 1 or term in _LINES_ADD_UP:
            return _taylor_lines(model, matrices, parts, term, count)
        lines: dict[nn.Module, LineScores] = {}
        for group in grouped(matrices[::-1], lambda m: 4 * m.weight.numel(), limits.sums):
            lines |= _taylor_sums(model, group, parts, term, count)
        return lines

    return within_memory(model, samples, compute)


_LINES_ADD_UP = ("second", "vectorize")
"""Terms whose row and column sums are sums over the sequences."""


def _taylor_lines(
    model: PreTrainedModel,
    matrices: Sequence[Member],
    parts: Sequence[Sequence[torch.Tensor]],
    term: str,
    count: int,
) -> dict[nn.Module, LineScores]:
    """Adds up row and column sums over the passes."""
    lines: dict[nn.Module, LineScores] = {}

    def receive(member: Member, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        salience = partial(_salience, term, count, inputs.float(), gradients.float())

        def score(rows: slice, weight: torch.Tensor) -> torch.Tensor:
            signed = salience(rows, weight)
            return signed if term in _LINES_ADD_UP else signed.abs_()

        own = _line_scores(member, score)
        before = lines.get(member.module)
        lines[member.module] = {s: own[s] + before[s] for s in own} if before else own

    for part in counted(parts, "calibration passes"):
        stream_gradients(model, matrices, part, receive)
    return {key: {s: values.abs() for s, values in own.items()} for key, own in lines.items()}


def _taylor_sums(
    model: PreTrainedModel,
    matrices: Sequence[Member],
    parts: Sequence[Sequence[torch.Tensor]],
    term: str,
    count: int,
) -> dict[nn.Module, LineScores]:
    """Adds up the scores of single weights over the passes, with their signs."""
    sums: dict[nn.Module, tuple[Member, torch.Tensor]] = {}

    def receive(member: Member, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        if member.module not in sums:
            sums[member.module] = member, torch.zeros_like(member.weight, dtype=torch.float32)
        _, total = sums[member.module]
        inputs, gradients = inputs.float(), gradients.float()
        for rows in _row_slices(member):
            weight = member.weight[rows].float()
            total[rows] += _salience(term, count, inputs, gradients, rows, weight)

    with torch.no_grad():
        for part in counted(parts, "calibration passes"):
            stream_gradients(model, matrices, part, receive)

    def absolute(total: torch.Tensor, rows: slice, _: torch.Tensor) -> torch.Tensor:
        return total[rows].abs()

    return {key: _line_scores(m, partial(absolute, total)) for key, (m, total) in sums.items()}


def _salience(
    term: str,
    count: int,
    inputs: torch.Tensor,
    gradients: torch.Tensor,
    rows: slice,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Adds up signed scores of some rows of a matrix over the sequences of a pass.

    Args:
        term: The Taylor term.
        count: Number of sequences of all passes.
        inputs: First factors of the sequences' own gradients g_j, shape (sequences, t, in).
        gradients: The other ones, shape (sequences, t, out).
        rows: Some of the rows.
        weight: Those rows.
    """
    gradients = gradients[..., rows]
    if term in {"first", "vectorize"}:
        return (gradients.flatten(0, 1).T @ inputs.flatten(0, 1)).mul_(weight).div_(count)
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for x, d in zip(inputs, gradients, strict=True):
        own = (d.T @ x).mul_(weight)
        first.add_(own, alpha=1 / count)
        second.addcmul_(own, own)
    return second if term == "second" else first.sub_(second, alpha=0.5)


def _magnitude(
    model: PreTrainedModel,
    matrices: Sequence[Member],
    samples: Sequence[torch.Tensor],
    config: PruneConfig,
) -> dict[nn.Module, LineScores]:
    return {m.module: _line_scores(m, lambda _, weight: weight.abs()) for m in matrices}


def _wanda(
    model: PreTrainedModel,
    matrices: Sequence[Member],
    samples: Sequence[torch.Tensor],
    config: PruneConfig,
) -> dict[nn.Module, LineScores]:
    check_samples(model, samples)
    squares: dict[nn.Module, tuple[Member, torch.Tensor]] = {}

    def receive(member: Member, inputs: torch.Tensor) -> None:
        own = inputs.float().square().sum(0)
        _, before = squares.get(member.module, (member, torch.zeros_like(own)))
        squares[member.module] = (member, before + own)

    def score(squares: torch.Tensor, rows: slice, weight: torch.Tensor) -> torch.Tensor:
        return weight.abs() * squares.sqrt()

    stream_inputs(model, matrices, samples, receive)
    return {key: _line_scores(m, partial(score, own)) for key, (m, own) in squares.items()}


_MEASURES: dict[str, Callable[..., dict[nn.Module, LineScores]]] = {
    "magnitude": _magnitude,
    "taylor": _taylor,
    "wanda": _wanda,
}
_REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda scores: scores.sum(0),
    "mean": lambda scores: scores.mean(0),
    "max": lambda scores: scores.amax(0),
    "first": lambda scores: scores[0],
}
_CHOICES = {
    "importance": sorted([*_MEASURES, "random"]),
    "taylor": ["first", "mix", "second", "vectorize"],
    "group_reduction": sorted(_REDUCTIONS),
}


@torch.no_grad()
def _line_scores(
    member: Member, score: Callable[[slice, torch.Tensor], torch.Tensor]
) -> LineScores:
    """Sums the scores of single weights over rows and over columns, some rows at a time.

    Args:
        member: The matrix.
        score: From some of its rows, as a slice and as float32 weights (not to be changed), makes
            as many scores.
    """
    out, into = [], torch.zeros(member.weight.shape[1], device=member.weight.device)
    for rows in _row_slices(member):
        scores = score(rows, member.weight[rows].float())
        out.append(scores.sum(1))
        into += scores.sum(0)
    return {"out": torch.cat(out).cpu(), "in": into.cpu()}


def _row_slices(member: Member) -> Iterator[slice]:
    height, width = member.weight.shape
    step = max(_CHUNK // width, 1)
    return (slice(start, start + step) for start in range(0, height, step))


def _reduced(units: Units, lines: dict[nn.Module, LineScores], reduction: str) -> torch.Tensor:
    scores = [lines[member.module][member.side][member.indices].sum(1) for member in units]
    return _REDUCTIONS[reduction](torch.stack(scores)) if units else torch.zeros(0)


def check_names(config: PruneConfig) -> None:
    """Checks the names that `unit_scores` takes from a run file.

    Raises:
        ConfigError: If one is unknown.
    """
    for key, names in _CHOICES.items():
        value = getattr(config, key)
        if value not in names:
            known = ' for other methods than "depth"' if value == "ppl" else ""
            raise ConfigError(
                f'[prune] {key} "{value}" is unknown{known}. Use one of: {", ".join(names)}.'
            )


def _check_finite(
    model: PreTrainedModel, lines: dict[nn.Module, LineScores], importance: str
) -> None:
    """Names the matrix where the trouble begins: scores are in the order of the pass."""
    bad = [m for m, sums in lines.items() if not all(s.isfinite().all() for s in sums.values())]
    if not bad:
        return
    what, way = ("inputs", "forward") if importance == "wanda" else ("gradients", "backward")
    raise RankAdaptorError(
        f"{_place(model, bad[0])} has {what} that are not finite, the first of {len(bad)} such "
        f'matrices in the {way} pass. Set dtype = "float32" or "bfloat16", or use other '
        "calibration text."
    )


def _place(model: PreTrainedModel, module: nn.Module) -> str:
    names = (name for name, inner in model.named_modules() if inner is module)
    return place(model, next(names, "a matrix"))
