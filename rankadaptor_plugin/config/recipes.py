"""Presets of ``[corpus]`` and ``[recovery]``: two public recipes, and a short one for searches.

Sources, read at these commits: ``llm-pruner`` is post_training.py of LLM-Pruner (horseee/LLM-Pruner
128a07d) with the options of its scripts and README; ``shortened`` is src/lora_retrain.py of
Shortened LLaMA (Nota-NetsPresso/shortened-llm 4031a92) with those of its scripts. docs/data.md says
where each value stands, and what of the originals no key says.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rankadaptor_plugin.config.tables import CorpusConfig, RecoveryConfig, RunConfig
from rankadaptor_plugin.config.values import build, key_suggestion, merged
from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.registry import suggestion

_ALPACA_LORA: dict[str, dict[str, Any]] = {
    "corpus": {
        "template": "alpaca",
        "max_length": 256,
        "max_train_samples": 0,
        "val_set_size": 2000,
    },
    "recovery": {
        "num_train_epochs": 2.0,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 16,
        "learning_rate": 1e-4,
        "warmup_steps": 100,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "alpha_over_rank": 2.0,
        "lora_alpha": 0.0,
        "lora_dropout": 0.05,
        "target_modules": [],
        "eval_steps": 100,
        "load_best_model_at_end": True,
    },
}
"""Both public recipes are Alpaca-LoRA's program with the same options."""

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "llm-pruner": _ALPACA_LORA,
    "shortened": _ALPACA_LORA,
    "quick": {
        "corpus": {"template": "alpaca", "max_length": 128},
        "recovery": {
            "max_steps": 200,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "learning_rate": 3e-4,
            "warmup_steps": 10,
            "lr_scheduler_type": "linear",
            "lora_dropout": 0.0,
        },
    },
}
"""Presets by name: the two tables, with the values of a run file."""

_TABLES: dict[str, type] = {"corpus": CorpusConfig, "recovery": RecoveryConfig}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one fine-tune.

    Attributes:
        corpus: How the recovery corpus is read.
        recovery: How it is trained on.
    """

    corpus: CorpusConfig
    recovery: RecoveryConfig


def recipe(name: str, **changes: Any) -> Recipe:
    """Returns a preset with changes.

    Args:
        name: A key of `RECIPES`.
        changes: Keys of ``[corpus]`` or ``[recovery]``; no key is in both tables.

    Raises:
        ConfigError: On an unknown name or key (with a suggestion), a wrong type, or a wrong value.
    """
    if name not in RECIPES:
        raise ConfigError(
            f"Unknown recipe {name!r}.{suggestion(name, list(RECIPES))} "
            f"Allowed: {', '.join(RECIPES)}."
        )
    keys = {key: table for table, cls in _TABLES.items() for key in _fields(cls)}
    data: dict[str, Any] = {"recipe": name, "corpus": {}, "recovery": {}}
    for key, value in changes.items():
        if key not in keys:
            near = (key_suggestion(key, table) for table in _TABLES.values())
            raise ConfigError(
                f"Unknown key {key} of a recipe.{next(filter(None, near), '')} "
                f"Allowed: {', '.join(keys)}."
            )
        data[keys[key]][key] = list(value) if isinstance(value, tuple) else value
    data = with_preset(data)
    return Recipe(
        corpus=build(CorpusConfig, data["corpus"], "corpus"),
        recovery=build(RecoveryConfig, data["recovery"], "recovery"),
    )


def with_preset(data: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a run file, filled up with those of the recipe that it names.

    Own keys win. An unknown recipe is left for the checks that follow.
    """
    name = data.get("recipe")
    preset = RECIPES.get(name, {}) if isinstance(name, str) else {}
    return merged(preset, data, RunConfig)


def _fields(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]
