"""The texts of a run: what base, pruned and recovered models write after the same prompts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.config.tables import EMBEDDED
from rankadaptor_plugin.pipeline.generation_quality import entries, perplexities
from rankadaptor_plugin.pipeline.texts import EMBEDDED_PROMPTS, PROMPTS, Prompt, Settings, generate
from rankadaptor_plugin.recovery.files import load

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.models.pruned_model import PrunedModel


def prompts(config: RunConfig) -> tuple[Prompt, ...]:
    """Returns the prompts of a run file."""
    if config.generation.prompts:
        return tuple(Prompt(kind="prompt", text=text) for text in config.generation.prompts)
    return EMBEDDED_PROMPTS if config.model == EMBEDDED else PROMPTS


def sample_texts(
    pruned: PrunedModel,
    adapters: Mapping[str, Path],
    base: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
) -> list[dict[str, Any]]:
    """Lets every model write, and the base model judge.

    Args:
        pruned: The pruned model; it comes back without adapter, where it was.
        adapters: PEFT folders by name of the recovered model.
        base: Loads the base model, once the pruned model has left the device.
        tokenizer: Tokenizer of both.
        config: The run file.

    Returns:
        One entry per model, prompt and decoding, as `generation_quality.entries` returns them.
    """
    table = config.generation
    settings = Settings(
        max_new_tokens=max(1, min(table.max_new_tokens, _window(pruned.model) // 2)),
        temperature=table.temperature,
        top_p=table.top_p,
        seed=config.seed,
    )
    asked = prompts(config)
    texts = {"pruned": generate(pruned.model, tokenizer, asked, settings)}
    for name, folder in adapters.items():
        wrapped = load(pruned.model, folder)
        try:
            texts[name] = generate(wrapped, tokenizer, asked, settings)
        finally:
            wrapped.unload()
    device = pruned.model.device
    spread = hasattr(pruned.model, "hf_device_map")  # accelerate moves such a model itself
    if not spread:
        pruned.model.to("cpu")
    try:
        judge = base()
        texts = {"base": generate(judge, tokenizer, asked, settings), **texts}
        return [
            entry
            for name, samples in texts.items()
            for entry in entries(name, samples, perplexities(judge, tokenizer, samples))
        ]
    finally:
        if not spread:
            pruned.model.to(device)


def _window(model: PreTrainedModel) -> int:
    """Returns the context window in tokens; a prompt and its continuation have to share it."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)
