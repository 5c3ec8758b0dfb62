"""Compensation: what is left of a pruned model is refitted to the unpruned one, without training.

The two matrices of a decoder layer that write into the residual stream, the attention's output and
the MLP's last, are fitted by ridge regression, layer by layer from the bottom, so that the stream
of the pruned model follows that of the unpruned one. With x the input of such a matrix W in the
pruned model, h' the stream before it, and h the unpruned stream behind it, all on the same tokens,

    D = argmin sum |h - h' - W x - D x|^2 + ridge * |D|^2,    W := W + D.

h' holds what the fits below could not mend, so errors do not pile up; matching the matrix's own
output alone does clearly less (benchmarks/README.md). Where blocks were removed, the block before
them is fitted to the stream behind them. Biases are fitted where a matrix has one. Where a norm
follows the matrix (Gemma 2 and 3), what it divides by is taken from the unpruned model.

Each layer of both models runs a few times, and only it is on the device: in main memory there are
the two models and the stream of both. The ridge of each matrix is the one with the least error on
held-out sequences, and so is the number of sequences: it is doubled until more gain little.

The least squares are those of SlimLLM and FLAP's successors with propagated errors, as in GPTQ's
sweep over the layers; the depth case is compared with Prune&Comp (arXiv 2507.18212).
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from rankadaptor_plugin.core.errors import CorpusError, RankAdaptorError, UnsupportedModelError
from rankadaptor_plugin.core.progress import advance
from rankadaptor_plugin.models.logits import replaced_forward
from rankadaptor_plugin.models.structures import decoder_layers, is_transposed, structure_of
from rankadaptor_plugin.pruning.calibration import Batch, padded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from rankadaptor_plugin.models.modeling_rankadaptor import Structure

logger = logging.getLogger(__name__)

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges that are tried, in units of the mean square of a feature."""

_TOKENS = 4096  # per pass
_HELD_OUT = 5  # one sequence of so many is held out
_LEAST = 32  # sequences that the number begins with
_GAIN = 0.02  # least share by which twice the sequences must raise what is explained
_CLOSE = 0.05  # relative error up to which a layer counts as the sum of its parts; bfloat16 rounds


@dataclass(frozen=True, kw_only=True)
class Compensation:
    """New weights of a pruned model.

    Attributes:
        weights: By the names of the model's parameters, in its type.
        record: What was fitted and how well, plain JSON values.
    """

    weights: Mapping[str, torch.Tensor]
    record: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Puts the weights into a model without adapter, in place, while the block lasts."""
        parameters = {name: model.get_parameter(name) for name in self.weights}
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            self.put(model)
            yield
        finally:
            _put(model, before)

    def put(self, model: PreTrainedModel) -> None:
        """Puts the weights into a model without adapter, in place, for good."""
        _put(model, self.weights)


@torch.no_grad()
def _put(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)


@torch.no_grad()
def compensate(
    base: PreTrainedModel,
    pruned: PreTrainedModel,
    sequences: Sequence[torch.Tensor],
    *,
    kept_layers: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Compensation:
    """Fits a pruned model to the model that it was cut from; both are left as they were.

    Args:
        base: The unpruned model.
        pruned: The pruned one, of the same hidden size.
        sequences: Calibration text in random order, token ids of shape (t,) each, int64.
        kept_layers: Number in `base` of each layer of `pruned`; None if none was removed.
        device: Where to compute; one layer of each model is moved there at a time. None computes
            where the layers are.

    Raises:
        UnsupportedModelError: If the hidden sizes differ, or a layer is not the sum of its input
            and what the two matrices write.
        CorpusError: If there are fewer than two sequences.
        RankAdaptorError: If activations are not finite; the message names the layer.
    """
    began = time.perf_counter()
    sizes = [model.config.get_text_config().hidden_size for model in (base, pruned)]
    if sizes[0] != sizes[1]:
        raise UnsupportedModelError(
            f"The pruned model has a hidden size of {sizes[1]}, the unpruned one of {sizes[0]}: "
            'compensation needs the same residual stream. Set [prune] compensate = "none", or '
            'method = "width" or "depth".'
        )
    if len(sequences) < 2:  # noqa: PLR2004  (one is held out)
        raise CorpusError(
            f"Compensation has {len(sequences)} calibration sequences; it takes at least 2. Give "
            "more text in [compensate] text, or a larger corpus."
        )
    with _evaluating(base, pruned):
        fit = _Fit(base, pruned, kept_layers, device)
        count, curve = fit.enough(sequences)
        weights, layers = fit.sweep(sequences[:count])
    tokens = sum(map(len, sequences[:count]))
    widest = max((layer["features"] for layer in layers), default=0)
    if tokens < widest:
        logger.warning(
            "Compensation has %d calibration tokens for matrices of up to %d features: the fit "
            "leans on its ridge. Give more text in [compensate] text.",
            tokens,
            widest,
        )
    return Compensation(
        weights=weights,
        record={
            "method": "least-squares",
            "sequences": count,
            "tokens": tokens,
            "by_sequences": curve,
            "matrices": layers,
            "seconds": time.perf_counter() - began,
        },
    )


@contextlib.contextmanager
def _evaluating(*models: PreTrainedModel) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Stream:
    """The residual stream of a model on some sequences, taken through it layer by layer.

    Args:
        model: The model.
        batches: The sequences.
        device: Where to compute; None where the layers are.
    """

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[Batch], device: torch.device | None
    ) -> None:
        self.layers, self._device = decoder_layers(model), device
        self.states: list[torch.Tensor] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self.real = [batch.mask.bool() for batch in batches]
        self._gives_tuples: bool | None = None
        for batch in batches:
            self._calls.append([])
            self._begin(model, batch)

    def _begin(self, model: PreTrainedModel, batch: Batch) -> None:
        """Notes what each layer is called with; of the layers only the first runs, once."""
        first: list[torch.Tensor] = []

        def note(forward: Any, *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if not first:
                first.append(hidden.cpu())
            if self._gives_tuples is None:
                self._gives_tuples = isinstance(forward(*args, **kwargs), tuple)
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            self._calls[-1].append((args[1:], rest))
            return (hidden,) if self._gives_tuples else hidden

        where = model.get_input_embeddings().weight.device
        decoder: Any = model.get_decoder()
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                call = _bound(note, layer.forward)
                stack.enter_context(replaced_forward(layer, call))
            decoder(
                input_ids=batch.ids.to(where),
                attention_mask=batch.mask.to(where),
                use_cache=False,
            )
        self.states.append(first[0])

    @contextlib.contextmanager
    def at(self, index: int) -> Iterator[nn.Module]:
        """Lends a layer on the device."""
        layer = self.layers[index]
        before = next(layer.parameters()).device
        if self._device is not None:
            layer.to(self._device)
        try:
            yield layer
        finally:
            layer.to(before) if self._device is not None else None

    def run(self, index: int, batch: int) -> torch.Tensor:
        """Returns what a layer makes of the stream; the layer is on its device."""
        layer = self.layers[index]
        where = next(layer.parameters()).device
        args, kwargs = _moved(self._calls[batch][index], where)
        result = layer(self.states[batch].to(where), *args, **kwargs)
        hidden: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return hidden

    def advance(self, index: int) -> None:
        """Takes the stream through a layer."""
        with self.at(index):
            for batch in range(len(self.states)):
                self.states[batch] = self.run(index, batch).to(self.states[batch].device)


def _bound(function: Any, forward: Any) -> Any:
    return lambda *args, **kwargs: function(forward, *args, **kwargs)


def _moved(value: Any, device: torch.device) -> Any:
    """Returns arguments of a layer on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    return value


class _ReachedError(Exception):
    """Ends a layer's forward pass at the matrix that is fitted."""


@dataclass
class _Written:
    """What a matrix wrote in one pass.

    Attributes:
        output: Shape (sequences, t, hidden); a copy, as Falcon adds to it in place.
        source: The tensor itself.
        norm: The norm that it goes through on its way to the stream, by its name in the layer.
    """

    output: torch.Tensor
    source: torch.Tensor
    norm: tuple[str, Any] | None = None

    def to_stream(self) -> torch.Tensor:
        """Returns what reaches the stream."""
        return self.output if self.norm is None else self.norm[1](self.output)

    def root_mean_square(self) -> torch.Tensor | None:
        """Returns what the norm divides by, per token; None without a norm."""
        if self.norm is None:
            return None
        return self.output.float().square().mean(-1, keepdim=True).sqrt()


@contextlib.contextmanager
def _watched(
    layer: nn.Module, names: Sequence[str], shape: torch.Size
) -> Iterator[dict[str, _Written]]:
    """Tells what matrices of a layer write to a stream of a shape, once it has run."""
    written: dict[str, _Written] = {}

    def wrote(name: str, output: torch.Tensor) -> None:
        written[name] = _Written(output.reshape(shape).clone(), output)  # OPT flattens

    def enters(name: str, module: nn.Module, states: torch.Tensor) -> None:
        for one in written.values():
            if one.source is states:
                one.norm = (name, module)

    hooks = [
        layer.get_submodule(name).register_forward_hook(
            lambda _, given, output, name=name: wrote(name, output)
        )
        for name in names
    ]
    hooks += [
        module.register_forward_pre_hook(
            lambda module, given, name=name: enters(name, module, given[0]) if given else None
        )
        for name, module in layer.named_children()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    ]
    try:
        yield written
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _reaching(matrix: nn.Module, inputs: list[torch.Tensor]) -> Iterator[None]:
    """Lets a layer run until it reaches a matrix, whose input is noted."""

    def stop(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        inputs.append(given[0])
        raise _ReachedError

    hook = matrix.register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(_ReachedError):
            yield
    finally:
        hook.remove()


class _Sums:
    """Sums over tokens that a regression needs, in float64: features, and what is wanted of them.

    Attributes:
        gram: Products of features, shape (n, n); the last feature is 1 where there is a bias.
        cross: Products of features and residuals, shape (n, hidden).
        square: Squares of the residuals.
    """

    def __init__(self) -> None:
        self.gram: Any = 0.0
        self.cross: Any = 0.0
        self.square = 0.0

    def add(self, matrix: Any, x: torch.Tensor, wanted: torch.Tensor) -> None:
        """Adds tokens: features (t, n), and what the matrix should write, (t, hidden)."""
        weight = matrix.weight.T if is_transposed(matrix) else matrix.weight
        rest = wanted - x @ weight.float().T
        if matrix.bias is not None:
            rest = rest - matrix.bias.float()
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.gram = self.gram + (x.T @ x).double()
        self.cross = self.cross + (x.T @ rest).double()
        self.square += float(rest.double().square().sum())

    def error(self, change: torch.Tensor) -> float:
        """Returns the sum of squares that a change of the weights, (n, hidden), leaves."""
        fits = 2 * (change * self.cross).sum() - (change * (self.gram @ change)).sum()
        return self.square - float(fits)


def _solved(gram: torch.Tensor, cross: torch.Tensor, ridge: float, biased: bool) -> torch.Tensor:
    """Returns the ridge solution; the bias is not held back."""
    features = len(gram) - biased
    held = ridge * float(gram.diagonal()[:features].mean())
    system = gram.clone()
    system.diagonal()[:features] += max(held, torch.finfo(torch.float64).tiny)
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):  # features that are zero throughout, or a bias that says the same
        least: torch.Tensor = torch.linalg.lstsq(system, cross).solution
        return least
    return torch.cholesky_solve(cross, factor)


def _passes(sequences: Sequence[torch.Tensor]) -> list[Batch]:
    """Cuts sequences into passes of similar lengths, with at most so many tokens each."""
    parts: list[list[torch.Tensor]] = []
    for sequence in sorted(sequences, key=len):
        if parts and len(sequence) * (len(parts[-1]) + 1) <= _TOKENS:
            parts[-1].append(sequence)
        else:
            parts.append([sequence])
    return [padded(part) for part in parts]


def _check_sum(index: int, total: torch.Tensor, result: torch.Tensor, real: torch.Tensor) -> None:
    """Checks that a layer adds to its input what its two matrices write, and nothing else."""
    real = real.to(result.device)
    result = result[real].float()
    if not result.isfinite().all():
        raise RankAdaptorError(
            f"Layer {index} of the unpruned model: activations are not finite numbers. Load an "
            'intact model, set dtype = "float32", or [prune] compensate = "none".'
        )
    if (total[real].float() - result).norm() > _CLOSE * result.norm():
        raise UnsupportedModelError(
            f"Layer {index} is not the sum of its input, its attention and its MLP: compensation "
            'does not know this kind of model. Set [prune] compensate = "none".'
        )


class _Fit:
    """The sweep over the layers of both models.

    Args:
        base: The unpruned model.
        pruned: The pruned one.
        kept_layers: Number in `base` of each of its layers.
        device: Where to compute.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        pruned: PreTrainedModel,
        kept_layers: Sequence[int] | None,
        device: torch.device | None,
    ) -> None:
        self._base, self._pruned, self._device = base, pruned, device
        self._structure: Structure = structure_of(pruned)
        self._names = (self._structure.output, self._structure.contract)
        self._kept = list(kept_layers or range(len(decoder_layers(pruned))))
        self._ends = [*self._kept[1:], len(decoder_layers(base))]
        self._before: dict[str, torch.Tensor] = {}  # weights of the pruned model

    def _changed(self, index: int) -> bool:
        """True if a layer is not as it was, or blocks behind it are gone."""
        number = self._kept[index]
        ours, theirs = decoder_layers(self._pruned)[index], decoder_layers(self._base)[number]
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        same = all(a.shape == b.shape and torch.equal(a, b.to(a.device)) for a, b in pairs)
        return not same or self._ends[index] > number + 1

    def enough(self, sequences: Sequence[torch.Tensor]) -> tuple[int, list[dict[str, float]]]:
        """Returns how many sequences to take, and the held-out error by their number.

        Judged by the last matrix of the first changed layer, which is fitted to ever more.
        """
        first = next((i for i in range(len(self._kept)) if self._changed(i)), None)
        curve: list[dict[str, float]] = []
        if first is None:
            return min(_LEAST, len(sequences)), curve
        held = sequences[::_HELD_OUT][:_LEAST]
        names = {id(sequence) for sequence in held}
        others = [s for s in sequences if id(s) not in names]
        count = _LEAST
        while True:
            fitted = min(count, len(sequences))
            error = self._first_error(first, others[: max(1, fitted * 4 // 5)], held)
            curve.append({"sequences": fitted, "held_out_error": error})
            last, explained = curve[-min(2, len(curve))]["held_out_error"], 1 - error**2
            if len(curve) > 1 and explained < (1 + _GAIN) * (1 - last**2):
                return int(curve[-2]["sequences"]), curve
            if fitted == len(sequences):
                return fitted, curve
            count *= 2

    def _first_error(
        self, index: int, fitted: Sequence[torch.Tensor], held: Sequence[torch.Tensor]
    ) -> float:
        """Returns the error on held-out sequences that is left behind one layer's fit."""
        base, pruned = self._streams(fitted, held)
        for number in range(self._kept[index]):
            base.advance(number)
        for number in range(index):
            pruned.advance(number)
        with self._restored():
            return float(self._layer(base, pruned, index)[-1]["held_out_error"])

    def sweep(
        self, sequences: Sequence[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Fits all layers, from the bottom.

        Returns:
            The new weights by name, and an entry of the record per matrix.
        """
        held = sequences[::_HELD_OUT]
        names = {id(sequence) for sequence in held}
        base, pruned = self._streams([s for s in sequences if id(s) not in names], held)
        record: list[dict[str, Any]] = []
        for number in range(self._kept[0]):  # blocks that were removed before all others
            base.advance(number)
        differ = self._kept[0] > 0
        with self._restored():
            for index, number in enumerate(self._kept):
                differ = differ or self._changed(index)
                if differ:
                    record += self._layer(base, pruned, index)
                else:
                    base.advance(number)
                    pruned.states = list(base.states)
                advance("layers", index + 1, len(self._kept))
            weights = {
                name: self._pruned.get_parameter(name).detach().cpu().clone()
                for name in self._before
            }
        return weights, record

    def _streams(
        self, fitted: Sequence[torch.Tensor], held: Sequence[torch.Tensor]
    ) -> tuple[_Stream, _Stream]:
        """Returns the streams of both models at their bottom; passes of held-out text last."""
        parts = [_passes(part) for part in (fitted, held)]
        self._fitted = len(parts[0])
        batches = [*parts[0], *parts[1]]
        base, pruned = (_Stream(m, batches, self._device) for m in (self._base, self._pruned))
        return base, pruned

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        """Gives the pruned model its weights back in the end."""
        self._before = {}
        try:
            yield
        finally:
            _put(self._pruned, self._before)

    def _layer(self, base: _Stream, pruned: _Stream, index: int) -> list[dict[str, Any]]:
        """Fits both matrices of a layer, and takes both streams behind it.

        Returns:
            An entry of the record per matrix.
        """
        output, contract, number = *self._names, self._kept[index]
        middles: list[torch.Tensor] = []
        norms: dict[str, tuple[str, Any] | None] = {}
        divisors: dict[str, list[torch.Tensor | None]] = {output: [], contract: []}
        with base.at(number) as layer:
            for batch, state in enumerate(base.states):
                with _watched(layer, self._names, state.shape) as written:
                    result = base.run(number, batch)
                middle = state.to(result.device) + written[output].to_stream()
                total = middle + written[contract].to_stream()
                _check_sum(number, total, result, base.real[batch])
                for name in self._names:
                    divisors[name].append(written[name].root_mean_square())
                    norms[name] = written[name].norm
                middles.append(middle.to(state.device))
                base.states[batch] = result.to(state.device)
        for removed in range(number + 1, self._ends[index]):
            base.advance(removed)
        entries = []
        for name, targets in ((output, middles), (contract, base.states)):
            norm = norms[name]
            target = _Target(name, targets, divisors[name], None if norm is None else norm[0])
            with pruned.at(index):
                entry = self._refit(index, name, self._summed(pruned, index, target))
            entries.append({"layer": index, "matrix": name, **entry})
        pruned.advance(index)
        return entries

    def _summed(self, pruned: _Stream, index: int, target: _Target) -> tuple[_Sums, _Sums]:
        """Adds up what the regression of a matrix needs, over fitted and held-out text."""
        layer, name = pruned.layers[index], target.matrix
        matrix, sums = layer.get_submodule(name), (_Sums(), _Sums())
        for batch, state in enumerate(pruned.states):
            inputs: list[torch.Tensor] = []
            with _watched(layer, self._names, state.shape) as written, _reaching(matrix, inputs):
                pruned.run(index, batch)
            stream = state.to(inputs[0].device).float()
            if name == self._structure.contract:
                stream = stream + written[self._structure.output].to_stream().float()
            x = inputs[0].reshape(*state.shape[:-1], -1).float()
            wanted = target.states[batch].to(stream.device).float() - stream
            divisor = target.divisors[batch]
            if target.norm is not None and divisor is not None:
                gain = layer.get_submodule(target.norm)(torch.ones_like(wanted[:1, :1]))
                x, wanted = x / divisor.to(x.device), wanted / gain
            real = pruned.real[batch].to(stream.device)
            x, wanted = x[real], wanted[real]
            if not (x.isfinite().all() and wanted.isfinite().all()):
                raise RankAdaptorError(
                    f"Layer {index}: activations at {name} are not finite numbers. Load an intact "
                    'model, set dtype = "float32", or [prune] compensate = "none".'
                )
            sums[batch >= self._fitted].add(matrix, x, wanted)
        return sums

    def _refit(self, index: int, name: str, sums: tuple[_Sums, _Sums]) -> dict[str, Any]:
        """Changes a matrix of the pruned model, by the ridge that held-out text asks for.

        Nothing changes where every ridge makes the held-out error greater.
        """
        fitted, held = sums
        path = f"{self._structure.layers}.{index}.{name}"
        matrix: Any = self._pruned.get_submodule(path)
        biased = matrix.bias is not None
        errors = {
            ridge: held.error(_solved(fitted.gram, fitted.cross, ridge, biased)) for ridge in RIDGES
        }
        best = min(errors, key=lambda ridge: errors[ridge])
        helps = errors[best] < held.square
        if helps:
            gram, cross = fitted.gram + held.gram, fitted.cross + held.cross
            change = _solved(gram, cross, best, biased)
            parts = {"weight": change[:-1] if biased else change}
            if biased:
                parts["bias"] = change[-1]
            for part, values in parts.items():
                parameter = getattr(matrix, part)
                self._before[f"{path}.{part}"] = parameter.detach().clone()
                flat = part == "bias" or is_transposed(matrix)
                new = parameter.double() + (values if flat else values.T)
                parameter.copy_(new)
        whole = held.square or 1.0
        return {
            "features": len(fitted.gram) - biased,
            "ridge": best if helps else None,
            "held_out_error": math.sqrt(max(0.0, errors[best] / whole)) if helps else 1.0,
        }


@dataclass(frozen=True)
class _Target:
    """What a matrix of the pruned model should bring the stream to.

    Attributes:
        matrix: Its name in the layer.
        states: The unpruned stream behind it, by pass.
        divisors: What the norm behind it divides by in the unpruned model, by pass.
        norm: Name of that norm in the layer; None without one.
    """

    matrix: str
    states: Sequence[torch.Tensor]
    divisors: Sequence[torch.Tensor | None]
    norm: str | None
