"""EVA (arXiv 2410.07170): ranks and first weights from the inputs that each matrix really gets.

The principal components of a matrix's inputs over the fine-tuning data become its A. Components are
ranked over the whole model by the share of variance that they explain, and the budget of ranks goes
to the first of them. PEFT has the method too, and its incremental PCA does the work here. Its loop
is not used: it may never end where data are few, prints, and needs inputs four ranks wide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rankadaptor_plugin.core.errors import CorpusError, RecoveryError
from rankadaptor_plugin.models.device import is_out_of_memory
from rankadaptor_plugin.models.structures import matrix_shape
from rankadaptor_plugin.recovery.adapters import (
    LoraSettings,
    adapted_modules,
    attach_ranks,
    evaluated,
    weight_of,
)
from rankadaptor_plugin.recovery.batches import batches, padded
from rankadaptor_plugin.recovery.peft_internals import IncrementalPCA

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from peft import PeftModel
    from transformers import PreTrainedModel

    from rankadaptor_plugin.corpus.sequences import TrainingSequence
    from rankadaptor_plugin.recovery.batches import Pass

_MORE = 2  # most ranks of a module, per rank that it would have, rho in the paper
_ALIKE = 0.99  # cosine of a component before and after a batch that has not changed it
_MOST_BATCHES = 20  # a worst case; text takes fewer
_SEQUENCES = 16  # per batch at least; whatever a run file says, or components would depend on it
_PROBE = 8  # tokens that tell which matrices get the same input


def attach_eva(
    bare: PreTrainedModel,
    ranks: Mapping[str, int],
    settings: LoraSettings,
    sequences: Sequence[TrainingSequence],
    *,
    seed: int,
    redistributes: bool = True,
) -> PeftModel:
    """Puts an adapter on a model whose ranks and A matrices come from the model's inputs.

    Args:
        bare: The model, without adapter layers.
        ranks: The ranks to redistribute, by module; their sum stays.
        settings: Scaling, dropout and the like.
        sequences: What the model is fine-tuned on.
        seed: Seed of the order of the sequences.
        redistributes: False keeps the ranks, and takes the A matrices alone.

    Raises:
        CorpusError: If there are no sequences.
        RecoveryError: If memory runs out.
    """
    if not sequences:
        raise CorpusError("EVA reads the corpus, which is empty. Give at least one sequence.")
    components = _Components(bare, ranks, redistributes=redistributes)
    try:
        with evaluated(bare):
            for given in _stream(sequences, 2 * max(components.most.values()), seed):
                if components.settled():
                    break
                components.add(given)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RecoveryError(
            f"Out of memory with {_SEQUENCES} sequences at once, which EVA reads. Lower "
            "[corpus] max_length, or leave eva out."
        ) from None
    chosen = components.ranks()
    model = attach_ranks(
        bare,
        {name: rank for name, rank in chosen.items() if rank},
        settings,
        seed=seed,
    )
    with torch.no_grad():
        for name, module in adapted_modules(model).items():
            first = components.of(name)[: chosen[name]]
            weight_of(module, "lora_A")[: len(first)] = first  # ranks may exceed the inputs
    return model


class _Components:
    """The principal components of the inputs of all matrices, batch by batch."""

    def __init__(
        self, model: PreTrainedModel, ranks: Mapping[str, int], *, redistributes: bool
    ) -> None:
        self._model, self._budget = model, sum(ranks.values())
        self._ranks = None if redistributes else dict(ranks)
        self.most = {
            name: min(
                (_MORE if redistributes else 1) * rank, *matrix_shape(model.get_submodule(name))
            )
            for name, rank in ranks.items()
        }
        self._names = list(ranks)
        self._source: dict[str, str] = {}  # the first matrix with the same input
        self._count: dict[str, int] = {}  # components of its input
        self._pca: dict[str, Any] = {}
        self._likeness: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, given: Pass) -> None:
        """Reads a batch."""
        tokens = given.input_ids.to(self._model.device)
        if not self._source:
            self._find_sources(tokens[:1, :_PROBE])
        real = (torch.arange(given.input_ids.shape[1]) < given.lengths[:, None]).flatten()
        pending = self._pending()

        def read(name: str, states: torch.Tensor) -> None:
            self._read(name, states.reshape(len(real), -1)[real.to(states.device)].float())

        self._watch(pending, read, tokens)

    def _find_sources(self, tokens: torch.Tensor) -> None:
        seen: dict[str, torch.Tensor] = {}

        def note(name: str, states: torch.Tensor) -> None:
            same = (first for first, other in seen.items() if other is states)
            self._source[name] = next(same, name)
            seen.setdefault(self._source[name], states)

        self._watch(self._names, note, tokens)
        for name, first in self._source.items():
            self._pca.setdefault(first, None)
            self._count[first] = max(self._count.get(first, 0), self.most[name])

    def _watch(self, names: Sequence[str], told: Any, tokens: torch.Tensor) -> None:
        """Runs the model below its head, and tells the input of each of the matrices."""
        handles = [
            self._model.get_submodule(name).register_forward_pre_hook(
                lambda _, given, name=name: told(name, given[0])
            )
            for name in names
        ]
        try:
            self._model.base_model(input_ids=tokens, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _read(self, name: str, states: torch.Tensor) -> None:
        count, pca = self._count[name], self._pca[name]
        if pca is None:
            wide = 2 * count <= states.shape[1]
            pca = IncrementalPCA(n_components=count, lowrank=wide, lowrank_seed=0)
            self._pca[name] = pca.partial_fit(states)
            return
        before = pca.components_.clone()
        pca.partial_fit(states)
        self._likeness[name] = torch.cosine_similarity(pca.components_, before, dim=1)

    def settled(self) -> bool:
        """True if another batch would change nothing that is used."""
        return bool(self._source) and not self._pending()

    def _pending(self) -> list[str]:
        """Returns the matrices whose used components still change, one per input."""
        if len(self._likeness) < len(self._pca):
            return list(self._pca)
        used = dict.fromkeys(self._pca, 0)
        for name, rank in self.ranks().items():
            used[self._source[name]] = max(used[self._source[name]], rank)
        return [
            name
            for name, count in used.items()
            if not (self._likeness[name][:count] >= _ALIKE).all()
        ]

    def ranks(self) -> dict[str, int]:
        """Distributes the budget, unless the ranks stay; modules may get none."""
        if self._ranks is not None:
            return self._ranks
        shares = [self._shares(name) for name in self._names]
        owners = [i for i, share in enumerate(shares) for _ in share]
        order = torch.cat(shares).argsort(descending=True, stable=True)[: self._budget]
        chosen = dict.fromkeys(self._names, 0)
        for at in order.tolist():
            chosen[self._names[owners[at]]] += 1
        return chosen

    def _shares(self, name: str) -> torch.Tensor:
        """Returns the share of variance that each component explains, at most the allowed."""
        pca = self._pca[self._source[name]]
        shares: torch.Tensor = pca.explained_variance_ratio_[: self.most[name]]
        return shares.nan_to_num(0.0).cpu()

    def of(self, name: str) -> torch.Tensor:
        """Returns the components of a module's input, shape (n, in), those that matter first."""
        components: torch.Tensor = self._pca[self._source[name]].components_
        return components


def _stream(sequences: Sequence[TrainingSequence], tokens: int, seed: int) -> Iterator[Pass]:
    """Yields batches of at least so many sequences and tokens."""
    one_by_one = batches(sequences, 1, seed)
    for _ in range(_MOST_BATCHES):
        batch: list[TrainingSequence] = []
        while len(batch) < _SEQUENCES or sum(len(s.tokens) for s in batch) < tokens:
            batch += next(one_by_one)
        yield padded(batch)
