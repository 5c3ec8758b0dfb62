"""What a caller may hand to a fine-tune, and what is made of it before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.config.recipes import RECIPES, Recipe
from rankadaptor_plugin.config.recipes import recipe as preset
from rankadaptor_plugin.config.tables import CorpusConfig, RecoveryConfig
from rankadaptor_plugin.core.errors import ConfigError, RankSpaceError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.corpus.corpus import load_corpus
from rankadaptor_plugin.corpus.sequences import Corpus
from rankadaptor_plugin.recovery.batches import check_sequences

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SEEDS = 2**63  # as many as torch takes


def as_allocation(allocation: RankAllocation | Sequence[int]) -> RankAllocation:
    """Returns ranks as an allocation.

    Raises:
        RankSpaceError: If they are no list of whole numbers.
    """
    if isinstance(allocation, RankAllocation):
        return allocation
    is_list = isinstance(allocation, Sequence) and not isinstance(allocation, str)
    if not is_list or not all(type(rank) is int for rank in allocation):
        raise RankSpaceError(
            f"The allocation is {allocation!r}; it must be a list of whole numbers, one rank per "
            "decoder layer, as in [8, 8, 4, 8]."
        )
    return RankAllocation(tuple(allocation))


def as_settings(recipe: RecoveryConfig | Recipe | str) -> tuple[RecoveryConfig, CorpusConfig]:
    """Returns the two tables of a recipe.

    Raises:
        ConfigError: If it is none.
    """
    if isinstance(recipe, RecoveryConfig):
        return recipe, CorpusConfig()
    if isinstance(recipe, str):
        recipe = preset(recipe)
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            f"The recipe is of type {type(recipe).__name__}. Give a name ({', '.join(RECIPES)}), "
            'recipe("quick", steps=100) with changes, or a RecoveryConfig.'
        )
    return recipe.recovery, recipe.corpus


def as_corpus(
    corpus: Corpus | Sequence[dict[str, Any]] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    table: CorpusConfig,
    model: PreTrainedModel,
) -> Corpus:
    """Returns a tokenized corpus that the model can be trained on.

    Args:
        corpus: That, or rows, a file, or a name on the hub.
        tokenizer: Of use for the latter.
        table: The ``[corpus]`` table, of which `path` is not used.
        model: The model, or a PEFT model of it.

    Raises:
        ConfigError: If it is something else, or cannot be read.
        CorpusError: If there is nothing to train on, or a sequence does not fit the model.
    """
    if not isinstance(corpus, Corpus):
        corpus = load_corpus(corpus, tokenizer, table)
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    check_sequences(corpus.sequences, window, vocabulary)
    if corpus.validation:
        check_sequences(corpus.validation, window, vocabulary)
    return corpus


def check_numbers(seed: int, fidelity: float) -> None:
    """Checks what says how a fine-tune runs.

    Raises:
        ConfigError: If the seed is no whole number from 0, or the share of the steps not in (0, 1].
    """
    if type(seed) is not int or not 0 <= seed < _SEEDS:
        raise ConfigError(f"The seed is {seed!r}; it must be a whole number of 0 or more.")
    if not 0 < fidelity <= 1:
        raise ConfigError(
            f"fidelity is {fidelity!r}; it is the share of the steps to run, above 0 and at most 1."
        )
