"""Checks of a run's fine-tunes before any weight is loaded."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rankadaptor_plugin.config.tables import SEARCHED_RANKS, UNIFORM_LORA
from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.registry import suggestion
from rankadaptor_plugin.recovery.batches import check_sequences
from rankadaptor_plugin.recovery.methods.methods import (
    SWITCHES,
    Method,
    check_scaling,
    parse_method,
)
from rankadaptor_plugin.recovery.teacher import check_teacher

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from rankadaptor_plugin.config.tables import RecoveryConfig, RunConfig
    from rankadaptor_plugin.corpus.sequences import Corpus

logger = logging.getLogger(__name__)


def check(
    config: RunConfig,
    teacher: PreTrainedConfig | None = None,
    student: PreTrainedConfig | None = None,
) -> None:
    """Checks the table ``[recovery]``.

    Args:
        config: The run file.
        teacher: Configuration of the unpruned model; None if it is not known yet.
        student: Configuration of a model that was pruned already; None if the run prunes.

    Raises:
        ConfigError: If a method is unknown or cannot have a switch of the run, two are the same,
            squeeze trains less than it may keep, or the teacher predicts other tokens.
    """
    check_methods(config.recovery)
    for text in config.recovery.methods:
        method, budget = parse_method(text), config.rank_space.default_rank
        if method.name == "squeeze" and method.ranks and method.ranks[0] < budget:
            raise ConfigError(
                f'[recovery] methods: "{text}" trains at a lower rank than its budget, '
                f"[rank_space] default_rank {budget}. Name a greater rank, such as "
                f"squeeze:{2 * budget}."
            )
    if config.distills and teacher is not None and student is not None:
        check_teacher(teacher, student)


def check_corpus(corpus: Corpus, config: RecoveryConfig, window: int | None = None) -> None:
    """Checks a corpus, and warns of settings that have no effect on it.

    Args:
        corpus: The corpus.
        config: The ``[recovery]`` table.
        window: Context of the model, in tokens; None for no limit.

    Raises:
        CorpusError: If there is nothing to train on, or a sequence is longer than the context.
    """
    if not corpus.validation and (config.load_best_model_at_end or config.eval_steps):
        logger.warning(
            "[recovery] load_best_model_at_end and eval_steps look at held-out rows, but there are "
            "none: [corpus] val_set_size is 0"
        )
    check_sequences(corpus.sequences, window)
    steps = config.steps_for(len(corpus.sequences))
    if config.warmup_steps >= steps:
        logger.warning(
            "[recovery] warmup_steps %d is not below the %d steps of a fine-tune, which never "
            "reaches learning_rate",
            config.warmup_steps,
            steps,
        )


def check_methods(config: RecoveryConfig) -> None:
    """Checks the recovery methods of a run file.

    Raises:
        ConfigError: If one, or a part of the stack, is unknown or cannot have a switch of the run,
            or two are the same.
    """
    methods = config.methods
    for text in (*methods, UNIFORM_LORA):
        check_scaling(parse_method(text).with_switches(config), config)
    for part in config.stack:
        if part not in SWITCHES:
            raise ConfigError(
                f"[recovery] stack names {part!r}, which is no part of a stack."
                f"{suggestion(part, list(SWITCHES))} Parts: {', '.join(SWITCHES)}."
            )
    parse_method("+".join((UNIFORM_LORA, *config.stack))).with_switches(config)
    own = (SEARCHED_RANKS, UNIFORM_LORA)
    seen: dict[Method, str] = {parse_method(name).with_switches(config): name for name in own}
    for text in methods:
        if text in seen.values():
            continue
        method = parse_method(text).with_switches(config)
        if method in seen:
            raise ConfigError(
                f'[recovery] methods: "{text}" is the same as "{seen[method]}". Write it once, '
                "like that."
            )
        if method.name == SEARCHED_RANKS and SEARCHED_RANKS not in methods:
            raise ConfigError(
                f'[recovery] methods: "{text}" takes the ranks of "{SEARCHED_RANKS}", which is not '
                "among them. Add it, or leave this one out."
            )
        seen[method] = text
