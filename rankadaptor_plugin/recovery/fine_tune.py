"""One fine-tune: from a pruned model and a rank allocation to a recovered model.

Order of the sequences, initial weights and dropout come from the seed alone, so all allocations of
a search see the same batches in the same order, and the global random state is left as it was.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rankadaptor_plugin.config.recipes import RECIPES, Recipe
from rankadaptor_plugin.config.recipes import recipe as preset
from rankadaptor_plugin.config.tables import (
    SEARCHED_RANKS,
    CorpusConfig,
    RecoveryConfig,
)
from rankadaptor_plugin.core.errors import ConfigError, RankSpaceError, RecoveryError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.corpus.corpus import load_corpus
from rankadaptor_plugin.corpus.sequences import Corpus
from rankadaptor_plugin.models.device import seeded_devices
from rankadaptor_plugin.recovery import training
from rankadaptor_plugin.recovery.adapters import adapter_ranks, adapter_weights, restored_on_failure
from rankadaptor_plugin.recovery.batches import batches, check_sequences
from rankadaptor_plugin.recovery.files import save_adapter
from rankadaptor_plugin.recovery.memory import MicroBatch
from rankadaptor_plugin.recovery.methods import methods
from rankadaptor_plugin.recovery.teacher import check_predictions
from rankadaptor_plugin.recovery.training import HeldOut

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.corpus.sequences import TrainingSequence
    from rankadaptor_plugin.recovery.teacher import LiveTeacher

_SEEDS = 2**63  # as many as torch takes
_UNRECORDED = ("methods", "max_steps", "num_train_epochs")  # settings of no single fine-tune


@dataclass(kw_only=True)
class RecoveredAdapter:
    """A fine-tuned model; its weights live in the resident base and the adapter on it.

    The next fine-tune of the model takes the place of this one: save it before.

    Attributes:
        model: In evaluation mode.
        allocation: The ranks that were asked for.
        method: How they were used, such as ``lora`` or ``adalora``.
        train_loss: Mean loss over the last tenth of the steps, in nats per trained token.
        losses: Loss of each step.
        validation_loss: Loss on the held-out rows, None where there are none.
        seconds: Wall time.
        per_device_train_batch_size: Sequences per pass; fewer than asked for if memory ran out.
        provenance: Its seed, settings and sizes.
    """

    model: PeftModel
    allocation: RankAllocation
    method: str
    train_loss: float
    losses: list[float] = field(default_factory=list)
    validation_loss: float | None = None
    seconds: float
    per_device_train_batch_size: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._weights = adapter_weights(self.model)

    def _check_is_there(self) -> None:
        now = adapter_weights(self.model)
        if len(now) != len(self._weights) or any(
            one is not other for one, other in zip(now, self._weights, strict=True)
        ):
            raise RecoveryError(
                "The adapter is no longer on the model: another fine-tune has taken its place, or "
                "it was unloaded. Save an adapter before the next fine-tune."
            )

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module that has an adapter, as it came out.

        Raises:
            RecoveryError: If the adapter is no longer on the model.
        """
        self._check_is_there()
        return adapter_ranks(self.model)

    def save(self, folder: str | Path, *, base: str | None = None) -> None:
        """Writes the adapter as a PEFT folder, whole or not at all, with the hash of its base.

        Args:
            folder: Where to; an adapter that is there is replaced.
            base: Folder of the pruned model, which PEFT notes; None keeps what it knows.

        Raises:
            RecoveryError: If the adapter is no longer on the model.
            ArtifactError: If it cannot be written.
        """
        self._check_is_there()
        save_adapter(self.model, Path(folder), self.provenance, base)


@torch.enable_grad()
def recover(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    allocation: RankAllocation | Sequence[int],
    corpus: Corpus | Sequence[dict[str, Any]] | str | Path,
    recipe: RecoveryConfig | Recipe | str = "quick",
    seed: int = 0,
    *,
    method: str = "",
    teacher: LiveTeacher | None = None,
) -> RecoveredAdapter:
    """Fine-tunes a fresh adapter with the given ranks.

    Args:
        model: The pruned model, or the `RecoveredAdapter.model` of an earlier call on it.
        tokenizer: Its tokenizer; used where the corpus is not tokenized yet.
        allocation: One rank per decoder layer, group or projection.
        corpus: Training sequences; or rows, a file, or a hub name, which are tokenized first.
        recipe: Name of a preset, a preset with changes
            (`rankadaptor_plugin.config.recipes.recipe`), or a ``[recovery]`` table.
        seed: Seed of initial weights, batches and dropout.
        method: A recovery method (`rankadaptor_plugin.recovery.methods`); empty takes that
            of the allocation, else the one that the recipe names, else LoRA.
        teacher: The unpruned model, for distillation without cached predictions.

    Raises:
        RankSpaceError: If the ranks do not fit the model.
        ConfigError: If method or settings do not go together, or with the model, or the recipe
            names several methods.
        CorpusError: If there is nothing to train on.
        RecoveryError: If the fine-tune diverges, memory runs out, or the call is made under
            ``torch.inference_mode()``.
    """
    began = time.perf_counter()
    _check_call(seed)
    allocation = _as_allocation(allocation)
    config, table = _as_settings(recipe)
    corpus = _as_corpus(corpus, tokenizer, table, model)
    config = replace(config, max_steps=config.steps_for(len(corpus.sequences)), num_train_epochs=0)
    spec = _spec(method or allocation.method or _method(config), config)
    steps = 0 if spec.name == methods.NONE else config.max_steps
    teacher = _teacher_of(spec, teacher, model, corpus)
    config = replace(config, distill_weight=config.distill_weight if spec.distill else 0.0)
    micro = MicroBatch(config.per_device_train_batch_size)
    held_out = HeldOut(corpus, config, steps, micro)
    with restored_on_failure(model), torch.random.fork_rng(devices=seeded_devices(model.device)):
        torch.manual_seed(seed)  # PEFT's own first weights draw from it
        tuned = methods.begin(
            model,
            spec,
            allocation,
            config,
            seed=seed,
            steps=steps,
            sequences=corpus.sequences,
            teacher=teacher,
        )
        torch.manual_seed(seed)  # as many numbers as PEFT drew depend on the ranks
        order = batches(corpus.sequences, config.batch_size, seed)
        look = partial(held_out.after, tuned)
        losses = training.train(
            tuned, order, config, steps, micro=micro, teacher=teacher, on_step=look
        )
        held_out.restore(tuned)
        losses = losses or [_untrained(tuned, next(order), micro, held_out)]
        finished = tuned.finish()
    train_loss = statistics.fmean(losses[-max(1, len(losses) // 10) :])
    return RecoveredAdapter(
        model=finished.eval(),
        allocation=allocation,
        method=str(spec),
        train_loss=train_loss,
        losses=losses,
        validation_loss=held_out.loss,
        seconds=time.perf_counter() - began,
        per_device_train_batch_size=micro.size,
        provenance=_record(allocation, spec, corpus, config)
        | {"seed": seed, "steps": steps, "train_loss": train_loss}
        | {"validation_loss": held_out.loss},
    )


def _untrained(
    tuned: methods.Tuned, batch: Sequence[TrainingSequence], micro: MicroBatch, held_out: HeldOut
) -> float:
    """Returns the loss where nothing was trained, and looks at the held-out one."""
    held_out.after(tuned, 0)
    return training.mean_loss(tuned.model.get_base_model(), batch, micro)


def _spec(name: str, config: RecoveryConfig) -> methods.Method:
    return methods.parse_method(name).with_switches(config)


def _teacher_of(
    spec: methods.Method, teacher: LiveTeacher | None, model: PreTrainedModel, corpus: Corpus
) -> LiveTeacher | None:
    """Returns the teacher at hand of a method that distills.

    Raises:
        ConfigError: If there is nobody to learn from, or the method starts from other weights.
    """
    if spec.compensate:
        raise ConfigError(
            f"The method {spec} trains a compensated model, which recover() is handed as it is. "
            "Compensate it first (rankadaptor_plugin.pruning.compensate), and leave the switch out."
        )
    if not spec.distill:
        return None
    check_predictions(model.config, corpus.sequences, teacher)
    return teacher


def _record(
    allocation: RankAllocation, spec: methods.Method, corpus: Corpus, config: RecoveryConfig
) -> dict[str, Any]:
    """Returns the inputs of a fine-tune as plain values."""
    return {
        "method": str(spec),
        "ranks": list(allocation.ranks),
        "sequences": len(corpus.sequences),
        "settings": {k: v for k, v in asdict(config).items() if k not in _UNRECORDED},
    }


def _method(config: RecoveryConfig) -> str:
    """Returns the method that a recipe names; the ranks of an allocation are trained by LoRA.

    Raises:
        ConfigError: If it names several.
    """
    if len(config.methods) > 1:
        raise ConfigError(
            f"The recipe names the methods {', '.join(config.methods)}, but one fine-tune has one. "
            "Name one, or give recover() a method."
        )
    only = config.methods[0] if config.methods else methods.LORA
    return methods.LORA if only == SEARCHED_RANKS else only


def _check_call(seed: int) -> None:
    if torch.is_inference_mode_enabled():
        raise RecoveryError(
            "recover() trains, which torch.inference_mode() does not allow. Call it outside of it."
        )
    if type(seed) is not int or not 0 <= seed < _SEEDS:
        raise ConfigError(f"The seed is {seed!r}; it must be a whole number of 0 or more.")


def _as_allocation(allocation: RankAllocation | Sequence[int]) -> RankAllocation:
    """Returns ranks as an allocation.

    Raises:
        RankSpaceError: If they are not a list of whole numbers.
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


def _as_settings(recipe: RecoveryConfig | Recipe | str) -> tuple[RecoveryConfig, CorpusConfig]:
    """Returns the two tables of a recipe.

    Raises:
        ConfigError: If it is not one.
    """
    if isinstance(recipe, RecoveryConfig):
        return recipe, CorpusConfig()
    if isinstance(recipe, str):
        recipe = preset(recipe)
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            f"The recipe is of type {type(recipe).__name__}. Give a name ({', '.join(RECIPES)}), "
            'recipe("quick", max_steps=100) with changes, or a RecoveryConfig.'
        )
    return recipe.recovery, recipe.corpus


def _as_corpus(
    corpus: Corpus | Sequence[dict[str, Any]] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    table: CorpusConfig,
    model: PreTrainedModel,
) -> Corpus:
    """Returns a tokenized corpus that the model can be trained on.

    Args:
        corpus: That, or rows, a file, or a name on the hub.
        tokenizer: Used for the latter.
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
