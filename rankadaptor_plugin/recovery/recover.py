"""One fine-tune: from a pruned model and a rank allocation to a recovered model.

Order of the sequences, initial weights and dropout come from the seed alone, so all allocations of
a search see the same batches in the same order, and the global random state is left as it was.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from rankadaptor_plugin.core.errors import ConfigError, RecoveryError
from rankadaptor_plugin.models.device import seeded_devices
from rankadaptor_plugin.recovery import training
from rankadaptor_plugin.recovery.batches import batches
from rankadaptor_plugin.recovery.candidates import put
from rankadaptor_plugin.recovery.dropout import install
from rankadaptor_plugin.recovery.methods import methods as recovery_methods
from rankadaptor_plugin.recovery.module_adapters import restored_on_failure
from rankadaptor_plugin.recovery.packing import check_packing
from rankadaptor_plugin.recovery.recovered import HeldOut, RecoveredAdapter
from rankadaptor_plugin.recovery.recovery_inputs import (
    as_allocation,
    as_corpus,
    as_settings,
    check_numbers,
)
from rankadaptor_plugin.recovery.teacher import check_predictions
from rankadaptor_plugin.recovery.training import MicroBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from rankadaptor_plugin.config.recipes import Recipe
    from rankadaptor_plugin.config.tables import RecoveryConfig
    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.corpus.sequences import Corpus
    from rankadaptor_plugin.recovery.candidates import Trained
    from rankadaptor_plugin.recovery.teacher import LiveTeacher


_UNRECORDED = ("methods", "steps", "epochs", "trainer_arguments", "candidates_per_pass")
"""What of the settings says nothing of one fine-tune, or may be no plain value."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A look at a fine-tune on its way.

    Attributes:
        fidelity: Share of the steps after which it is looked at, in (0, 1).
        goes_on: Told the model, in evaluation mode; False ends the fine-tune there. Whatever it
            draws from torch's random numbers, the rest of the fine-tune is as without it.
    """

    fidelity: float
    goes_on: Callable[[PeftModel], bool]


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
    fidelity: float = 1.0,
    rung: Rung | None = None,
    teacher: LiveTeacher | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    micro: MicroBatch | None = None,
) -> RecoveredAdapter:
    """Fine-tunes a fresh adapter with the given ranks.

    Args:
        model: The pruned model, or the `RecoveredAdapter.model` of an earlier call on it.
        tokenizer: Its tokenizer; of use where the corpus is not tokenized yet.
        allocation: One rank per decoder layer, group or projection.
        corpus: Training sequences; or rows, a file, or a hub name, which are tokenized first.
        recipe: Name of a preset, a preset with changes
            (`rankadaptor_plugin.config.recipes.recipe`), or a ``[recovery]`` table.
        seed: Seed of initial weights, batches and dropout.
        method: A recovery method (`rankadaptor_plugin.recovery.methods.methods`); empty takes that
            of the allocation, LoRA if it has none.
        fidelity: Share of the steps to run, in (0, 1]; the schedule is that of the full run.
        rung: Where to look at the model on the way. Going on from there costs no step twice.
        teacher: The unpruned model, for distillation without kept predictions.
        callbacks: For ``engine = "trainer"``.
        micro: How much goes through the model at once, kept from one call to the next; None takes
            what the recipe says.

    Raises:
        RankSpaceError: If the ranks do not fit the model.
        ConfigError: If method or settings do not go together, or with the model.
        CorpusError: If there is nothing to train on.
        RecoveryError: If the fine-tune diverges, memory does not suffice, or the call is made under
            ``torch.inference_mode()``.
    """
    if torch.is_inference_mode_enabled():
        raise RecoveryError(
            "recover() trains, which torch.inference_mode() does not allow. Call it outside of it."
        )
    began, paused = time.perf_counter(), 0.0
    check_numbers(seed, fidelity)
    allocation = as_allocation(allocation)
    config, table = as_settings(recipe)
    corpus = as_corpus(corpus, tokenizer, table, model)
    config = replace(config, steps=config.steps_for(len(corpus.sequences)), epochs=0.0)
    text = method or allocation.method or recovery_methods.LORA
    spec = recovery_methods.parse_method(text).with_switches(config)
    steps = 0 if spec.name == recovery_methods.NONE else steps_of(config, fidelity)
    look = steps_of(config, rung.fidelity) if rung else steps
    micro = micro or MicroBatch.of(config)
    if callbacks and config.engine != "trainer":
        raise ConfigError(
            f'callbacks are told by Trainer, but the engine is "{config.engine}". Set [recovery] '
            'engine = "trainer", or leave them out.'
        )
    if config.distill_weight:
        check_predictions(model.config, corpus.sequences, teacher)
    else:
        teacher = None
    devices = seeded_devices(model.device)
    looks = HeldOut(corpus, config, steps, micro)
    with restored_on_failure(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)  # PEFT's own first weights and dropout draw from it
        tuned = recovery_methods.begin(
            model, spec, allocation, config, seed=seed, steps=steps, sequences=corpus.sequences
        )
        install(tuned.model, seed)
        torch.manual_seed(seed)  # as many numbers as PEFT drew depend on the ranks
        if micro.layout == "packed":
            check_packing(tuned.model.get_base_model())

        def on_step(done: int, loss: float) -> bool:
            nonlocal paused, fidelity
            looks.after(tuned, done)
            if rung is None or done != look or look == steps:
                return True
            looked = time.perf_counter()
            tuned.model.eval()
            with torch.random.fork_rng(devices=devices):
                goes_on = rung.goes_on(tuned.model)
            tuned.model.train()
            paused = time.perf_counter() - looked
            if not goes_on:
                fidelity = rung.fidelity
            return goes_on

        order = batches(corpus.sequences, config.batch_size, seed)
        if config.engine == "trainer" and steps:
            # Only here: the import of Trainer takes as long as that of the whole program.
            from rankadaptor_plugin.recovery.trainer import engine as trainer_engine

            losses = trainer_engine.train(
                tuned,
                order,
                config,
                steps,
                micro=micro,
                teacher=teacher,
                on_step=on_step,
                callbacks=callbacks,
            )
        else:
            losses = training.train(
                tuned, order, config, steps, micro=micro, teacher=teacher, on_step=on_step
            )
        looks.restore(tuned)
        if not losses:  # nothing was trained: what the losses are as it is
            looks.after(tuned, 0)
            losses = [training.mean_loss(tuned.model.get_base_model(), next(order), micro)]
        finished = tuned.finish()
    finished.eval()
    return _recovered(
        finished,
        allocation,
        spec,
        corpus,
        config,
        seed,
        losses,
        steps=len(losses) if steps else 0,
        validation_loss=looks.loss,
        seconds=time.perf_counter() - began - paused,
        fidelity=fidelity,
    )


def adopt(
    model: PreTrainedModel | PeftModel,
    allocation: RankAllocation,
    trained: Trained,
    corpus: Corpus,
    config: RecoveryConfig,
    seed: int,
    *,
    seconds: float,
    micro: MicroBatch,
) -> RecoveredAdapter:
    """Puts an adapter on a model that was trained together with others.

    Args:
        model: The pruned model, or the `RecoveredAdapter.model` of an earlier fine-tune of it.
        allocation: The ranks.
        trained: What `rankadaptor_plugin.recovery.candidates.train_together` returned for them.
        corpus: What was trained on; the loss on its held-out rows is measured.
        config: The ``[recovery]`` table.
        seed: Seed of the fine-tune.
        seconds: Its share of the training, in seconds.
        micro: How much goes through the model at once.

    Raises:
        RecoveryError: If it failed.
    """
    if trained.failed is not None:
        raise RecoveryError(trained.failed)
    began = time.perf_counter()
    spec = recovery_methods.parse_method(recovery_methods.LORA).with_switches(config)
    steps = len(trained.losses)
    looks = HeldOut(corpus, config, steps, micro)
    with restored_on_failure(model):
        tuned = recovery_methods.begin(
            model, spec, allocation, config, seed=seed, steps=steps, sequences=corpus.sequences
        )
        put(tuned.model, trained)
        looks.after(tuned, steps)
        finished = tuned.finish()
    return _recovered(
        finished,
        allocation,
        spec,
        corpus,
        config,
        seed,
        trained.losses,
        steps=steps,
        validation_loss=looks.loss,
        seconds=seconds + time.perf_counter() - began,
    )


def _recovered(
    model: PeftModel,
    allocation: RankAllocation,
    method: recovery_methods.Method,
    corpus: Corpus,
    config: RecoveryConfig,
    seed: int,
    losses: list[float],
    *,
    steps: int,
    validation_loss: float | None,
    seconds: float,
    fidelity: float = 1.0,
) -> RecoveredAdapter:
    last = losses[-max(1, len(losses) // 10) :]
    train_loss = sum(last) / len(last)
    return RecoveredAdapter(
        model=model,
        allocation=allocation,
        method=str(method),
        train_loss=train_loss,
        losses=losses,
        validation_loss=validation_loss,
        seconds=seconds,
        fidelity=fidelity,
        provenance={
            "method": str(method),
            "ranks": list(allocation.ranks),
            "seed": seed,
            "steps": steps,
            "sequences": len(corpus.sequences),
            "settings": {k: v for k, v in asdict(config).items() if k not in _UNRECORDED},
            "train_loss": train_loss,
            "validation_loss": validation_loss,
        },
    )


def steps_of(config: RecoveryConfig, fidelity: float) -> int:
    """Returns the optimizer steps of a share of a fine-tune, at least one."""
    return max(1, round(config.steps * fidelity))
