"""Log-likelihoods of the continuations of many requests, by as few forward passes as will do.

Equal to those of lm-eval's `HFLM.loglikelihood` for causal models, but that log-probabilities are
taken in float32, where lm-eval takes them in the dtype of the model. Logits are computed only where
one is read, by handing the output layer those hidden states alone. Prefixes are shared through the
key-value cache. Not every model does that exactly, so the first time both ways are compared, and a
model that fails the comparison computes whole rows, padded on the right.
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from rankadaptor_plugin.core.progress import advance
from rankadaptor_plugin.models.logits import logits_at
from rankadaptor_plugin.oracle.loglikelihood_plan import Plan, Shared, plan
from rankadaptor_plugin.oracle.oracle import Cost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from rankadaptor_plugin.oracle.loglikelihood_plan import Forward

__all__ = ["Plan", "loglikelihoods", "plan"]

_log = logging.getLogger(__name__)

_CHUNK = 2**24
"""Most logits that are held in float32 at once."""

_shares: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()
"""True if a model, without its adapter, shares prefixes exactly; filled at the first comparison."""


class Reading(NamedTuple):
    """Log-probabilities in nats and greedy hits, read off one pass, on its device."""

    logprobs: torch.Tensor
    hits: torch.Tensor
    owners: NDArray[np.int64]


@torch.inference_mode()
def loglikelihoods(model: Any, plan: Plan) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores the requests of a plan.

    Args:
        model: A causal LM of transformers in evaluation mode, with or without a LoRA adapter.
        plan: Of n requests.

    Returns:
        The sum of the log-probabilities of the continuation tokens, in nats, and whether greedy
        decoding gives exactly the continuation; each of shape (n,), in the order of the requests.
        What is not a number stays so.
    """
    passes, readings = _Passes(model), []
    done, counts = 0, np.bincount(plan.inverse, minlength=plan.distinct)
    advance("requests", done, len(plan.inverse))
    parts: Sequence[Forward | Shared] = plan.plain
    if passes.share_exactly(plan):
        parts = (*plan.single, *plan.shared)
    for part in parts:
        read = passes.shared(part) if isinstance(part, Shared) else [passes.plain(part)]
        readings += read
        # All of a request is read off one part.
        done += counts[np.unique(np.concatenate([reading.owners for reading in read]))].sum()
        advance("requests", int(done), len(plan.inverse))
    sums, greedy = _totals(readings, plan.distinct)
    return sums[plan.inverse], greedy[plan.inverse]


@torch.inference_mode()
def cost(model: Any, plan: Plan) -> Cost:
    """Forecasts what `loglikelihoods` takes, by the pass of middle length, after a short one."""
    passes = _Passes(model)
    parts: Sequence[Forward | Shared] = plan.plain
    if passes.share_exactly(plan):
        parts = (*plan.single, *plan.shared)
    ordered = sorted(parts, key=lambda part: part.size)
    seconds = 0.0
    for part in (ordered[0], middle := ordered[len(ordered) // 2]):
        began = time.perf_counter()
        read = passes.shared(part) if isinstance(part, Shared) else [passes.plain(part)]
        _totals(read, plan.distinct)  # waits for the device
        seconds = time.perf_counter() - began
    forwards = [f for p in parts for f in ((p.prefix, p.suffix) if isinstance(p, Shared) else (p,))]
    return Cost(
        seconds=seconds * sum(part.size for part in parts) / middle.size,
        tokens=max(part.size for part in parts),
        logits=max(len(forward.places) for forward in forwards),
    )


class _Passes:
    """Runs forward passes of one model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._accepted = inspect.signature(type(self._base).forward).parameters
        self._device = next(model.parameters()).device

    def plain(self, forward: Forward) -> Reading:
        """Runs whole rows."""
        return self._run(forward, use_cache=False)[0]

    def shared(self, shared: Shared) -> list[Reading]:
        """Runs prefixes, and then the rest of the rows behind them."""
        before, cache = self._run(shared.prefix, use_cache=True)
        # Indices on the CPU serve every layer, on whichever of several GPUs it lies.
        cache.batch_select_indices(shared.parents.long())
        return [before, self._run(shared.suffix, use_cache=True, past_key_values=cache)[0]]

    def share_exactly(self, plan: Plan) -> bool:
        """True if the model may share prefixes; compares both ways the first time."""
        if plan.probes and self._base not in _shares:
            differences = [self._difference(*probe, plan.distinct) for probe in plan.probes]
            if np.isnan(differences).any():
                return False  # a diverged adapter says nothing of the model
            _shares[self._base] = max(differences) < _tolerance(self._base.dtype)
            if not _shares[self._base]:
                _log.warning(
                    "%s computes something else behind a shared prefix. Scoring takes %.1f times "
                    "as many tokens without.",
                    type(self._base).__name__,
                    plan.plain_tokens / plan.tokens,
                )
        return _shares.get(self._base, True)

    def _difference(self, shared: Shared, whole: Forward, count: int) -> float:
        """Returns the mean difference per token, in nats, that sharing makes.

        Infinite if sharing fails, and not a number if whole rows give none.
        """
        expected, _ = _totals([self.plain(whole)], count)
        if not np.isfinite(expected).all():
            return math.nan
        try:
            found, _ = _totals(self.shared(shared), count)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models without such a cache differ in how they fail
            _log.debug("Sharing failed.", exc_info=error)
            return math.inf
        difference = float(np.abs(found - expected).sum()) / len(whole.owners)
        return difference if math.isfinite(difference) else math.inf

    def _run(self, forward: Forward, **options: Any) -> tuple[Reading, Any]:
        """Runs one pass; returns what is read off it and the cache."""
        if forward.mask is not None and forward.positions is not None:
            options["attention_mask"] = self._here(forward.mask)
            options["position_ids"] = self._here(forward.positions)
        options = {name: value for name, value in options.items() if name in self._accepted}
        logits, output = logits_at(
            self._model,
            self._base.get_output_embeddings(),
            self._here(forward.places),
            self._here(forward.tokens),
            **options,
        )
        return self._read(logits, forward), getattr(output, "past_key_values", None)

    def _read(self, logits: torch.Tensor, forward: Forward) -> Reading:
        """Reads log-probabilities off the logits of the places, shape (p, vocabulary)."""
        reads, targets = (self._here(t).to(logits.device) for t in (forward.reads, forward.targets))
        parts = []
        for i in range(0, len(logits), step := max(1, _CHUNK // logits.shape[1])):
            part = logits[i : i + step].float()
            peak, best = part.max(1)
            parts.append((peak, (part - peak[:, None]).logsumexp(1), best))
        if not parts:  # nothing is read off some prefixes
            none = logits.new_zeros(0, dtype=torch.float32)
            return Reading(none, none.bool(), forward.owners)
        peaks, rests, greedy = (torch.cat(column)[reads] for column in zip(*parts, strict=True))
        logprobs = logits[reads, targets].float() - peaks - rests
        return Reading(logprobs, greedy == targets, forward.owners)

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True).long()


def _tolerance(dtype: torch.dtype) -> float:
    """Returns the mean difference per token, in nats, that rounding can explain."""
    return max(1e-3, 8 * torch.finfo(dtype).eps)


def _totals(
    readings: Sequence[Reading], count: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Sums over the tokens of `count` requests, in one transfer from the device."""
    if not readings:
        return np.zeros(count), np.ones(count, bool)
    read = torch.stack(
        [
            torch.cat([reading.logprobs for reading in readings]),
            torch.cat([reading.hits for reading in readings]),
        ]
    )
    logprobs, hits = read.cpu().numpy().astype(np.float64)
    owners = np.concatenate([reading.owners for reading in readings])
    sums, greedy = np.zeros(count), np.ones(count, bool)
    np.add.at(sums, owners, logprobs)
    greedy[owners[hits == 0]] = False
    return sums, greedy
