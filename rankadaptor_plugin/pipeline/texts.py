"""Texts of a run: what base, pruned and recovered models write after the same prompts.

The paper shows how recovered models continue an article and list steps (sections 4.2 and A.4). Here
every model of a run writes after the same prompts, greedily and sampled. Generation settings that a
model folder brings along are left out, and every sampled text starts from the same seed, so texts
differ by the model alone.

The measures need no other opinion than that of the unpruned model:
    distinct-n: Different n-grams of a text by all of its n-grams, in (0, 1]; Li et al. 2016
        (arXiv 1510.03055) divide by tokens instead, so that 1 cannot be reached.
    repetition: rep-4 = 1 - distinct-4, in [0, 1); seq-rep-4 of Welleck et al. 2020
        (arXiv 1908.04319).
    perplexity: exp of the mean negative log-likelihood of a text's tokens, given the prompt, under
        the unpruned model; at least 1. Lower is likelier, and repetitive text is likely too.
"""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import GenerationConfig

from rankadaptor_plugin.config.tables import EMBEDDED
from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.progress import advance
from rankadaptor_plugin.corpus.corpus import encode
from rankadaptor_plugin.recovery.adapters import base_of, evaluated
from rankadaptor_plugin.recovery.files import load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.config.tables import GenerationConfig as Settings
    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.report.schema import Entry

Decoding = Literal["greedy", "sampled"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Beginning of a text, which a model continues.

    Attributes:
        kind: ``article``, ``steps`` or any other word.
        text: The prompt.
    """

    kind: str
    text: str


PROMPTS = (
    Prompt(
        kind="article",
        text="The lighthouse on the northern cape had been dark for thirty years. Last spring the "
        "village council decided to bring it back to life, and",
    ),
    Prompt(
        kind="steps",
        text="How to plant an apple tree in your garden, step by step:\n1. Choose a sunny place "
        "with good soil.\n2.",
    ),
)
"""The default prompts, one per task of the paper, which prints its own only in pictures."""

EMBEDDED_PROMPTS = (
    Prompt(kind="article", text="walt met ada"),
    Prompt(kind="article", text="vera gray"),
    Prompt(kind="steps", text="first wash cups"),
    Prompt(kind="steps", text="first serve rice then serve tea then cool milk then"),
)
"""Prompts in words of the embedded model: about persons, and scripts of steps."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One text.

    Attributes:
        prompt: The prompt, whole even if the model read only the end of it.
        decoding: ``greedy`` or ``sampled``.
        text: The continuation, special tokens included, without the end of text.
        tokens: Its token ids.
    """

    prompt: Prompt
    decoding: Decoding
    text: str
    tokens: tuple[int, ...]


def prompts(config: RunConfig) -> tuple[Prompt, ...]:
    """Returns the prompts of a run file."""
    if config.generation.prompts:
        return tuple(Prompt(kind="prompt", text=text) for text in config.generation.prompts)
    return EMBEDDED_PROMPTS if config.model == EMBEDDED else PROMPTS


def check(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks the ``[generation]`` table of a run file.

    Raises:
        ConfigError: If a prompt has no tokens.
    """
    if config.generation.max_new_tokens:
        for prompt in config.generation.prompts:
            if not encode(tokenizer, prompt):
                raise ConfigError(
                    f"The prompt {prompt!r} in [generation] prompts has no tokens. Write at least "
                    "one word."
                )


def sample_texts(
    pruned: PrunedModel,
    adapters: Mapping[str, Path],
    base: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    weights: Callable[[Path], AbstractContextManager[None]],
) -> list[Entry]:
    """Returns the texts of every model, judged by the base model.

    Args:
        pruned: The pruned model; it comes back without adapter, where it was.
        adapters: PEFT folders by name of the recovered model.
        base: Loads the base model, once the pruned model has left the device.
        tokenizer: Tokenizer of both.
        config: The run file.
        weights: Gives the pruned model the weights that an adapter was trained on, for a while.

    Returns:
        One entry per model, prompt and decoding, as `entries` returns them.
    """
    longest = min(config.generation.max_new_tokens, _window(pruned.model) // 2)
    settings = replace(config.generation, max_new_tokens=max(1, longest))
    asked = prompts(config)

    def written(model: PreTrainedModel) -> list[Sample]:
        return generate(model, tokenizer, asked, settings, config.seed)

    texts = {"pruned": written(pruned.model)}
    for name, folder in adapters.items():
        with weights(folder):
            wrapped = load(pruned.model, folder)
            try:
                texts[name] = written(wrapped)
            finally:
                wrapped.unload()
    device = pruned.model.device
    spread = hasattr(pruned.model, "hf_device_map")  # accelerate moves such a model itself
    if not spread:
        pruned.model.to("cpu")
    try:
        judge = base()
        texts = {"base": written(judge), **texts}
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


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: Settings,
    seed: int,
) -> list[Sample]:
    """Returns the texts of a model after each prompt, first greedy, then sampled.

    A prompt that leaves too little room in the context window loses its beginning, but for the
    token that begins every text. Model and global random state are left as they were.

    Args:
        model: A causal LM, with or without an adapter.
        tokenizer: Its tokenizer.
        prompts: What to go on from.
        settings: How; at least one new token.
        seed: Seed of every single sampled text, in [0, 2**63).

    Raises:
        ConfigError: If a prompt has no tokens, or the context window is too small.
    """
    bare = base_of(model)
    longest = settings.max_new_tokens
    heads = [prompt_tokens(bare, tokenizer, prompt.text, longest) for prompt in prompts]
    devices = {p.device for p in bare.parameters() if p.device.type == "cuda"}
    ends = _ends(bare, tokenizer)
    ways: tuple[Decoding, ...] = ("greedy", "sampled")
    samples = []
    with evaluated(bare), _without_settings(bare), torch.random.fork_rng(devices=devices):
        for prompt, head in zip(prompts, heads, strict=True):
            ids = torch.tensor([head], device=bare.device)
            for decoding in ways:
                torch.manual_seed(seed)  # whatever was written before
                ids_written = bare.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=_config(ends, settings, decoding),
                )[0, len(head) :].tolist()
                tokens = tuple(takewhile(lambda token: token not in ends, ids_written))
                text = _text(tokenizer, head, tokens)
                samples.append(Sample(prompt=prompt, decoding=decoding, text=text, tokens=tokens))
                advance("texts", len(samples), len(ways) * len(prompts))
    return samples


def prompt_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, new_tokens: int
) -> list[int]:
    """Returns the ids of a prompt; of its end, if the whole leaves no room for so many tokens.

    Raises:
        ConfigError: If the prompt has no tokens, or the context window is too small.
    """
    ids = encode(tokenizer, text)
    if not ids:
        raise ConfigError(f"The prompt {text!r} has no tokens. Write at least one word.")
    window = getattr(model.config, "max_position_embeddings", None)
    if not window or len(ids) + new_tokens <= window:
        return ids
    # Without the token that every training text began with, many models write nonsense.
    first = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    room = window - new_tokens - len(first)
    if room < 1:
        raise ConfigError(
            f"max_new_tokens {new_tokens} leaves no room for a prompt in the context window of "
            f"{window} tokens. Lower max_new_tokens to at most {window - 1 - len(first)}."
        )
    return first + ids[-room:]


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end a text; chat models have more than their tokenizer names."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return sorted({i for i in (tokenizer.eos_token_id, *listed) if i is not None})


def _config(ends: list[int], settings: Settings, decoding: Decoding) -> GenerationConfig:
    """Returns settings for one text at a time, so that none has to be padded."""
    how: dict[str, Any] = {"do_sample": False}
    if decoding == "sampled":
        # No top_k: transformers would otherwise keep the likeliest 50 alone.
        how = {"do_sample": True, "top_k": 0, "top_p": settings.top_p}
        how["temperature"] = settings.temperature
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=ends or None,
        use_cache=True,
        remove_invalid_values=True,  # a broken model shall write nonsense, not stop the run
        **how,
    )


def _text(tokenizer: PreTrainedTokenizerBase, head: list[int], tokens: tuple[int, ...]) -> str:
    """Decodes a continuation as it follows its prompt; alone it would lose its first space."""
    before, whole = (
        str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        for ids in (head, [*head, *tokens])
    )
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode([*tokens], clean_up_tokenization_spaces=False))


@contextmanager
def _without_settings(model: Any) -> Iterator[None]:
    """Hides a model's generation settings, which transformers would fill ours up with."""
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings


def distinct(tokens: Sequence[int], n: int) -> float | None:
    """Returns different n-grams by all n-grams, in (0, 1]; None if there is no n-gram."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len({*grams}) / len(grams) if grams else None


def perplexities(
    judge: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
) -> list[float | None]:
    """Returns each text's perplexity given its prompt, at least 1.

    The end of a text is not counted. A prompt loses its beginning where it and the text do not fit
    the judge's context window together.

    Args:
        judge: The unpruned model.
        tokenizer: Its tokenizer, and that of the models that wrote the texts.
        samples: The texts.

    Returns:
        One value per text; None for a text without tokens, and where it is not a finite number.

    Raises:
        ConfigError: If a prompt has no tokens, or the context window is too small.
    """
    bare = base_of(judge)
    values: list[float | None] = []
    with evaluated(bare), torch.no_grad():
        for sample in samples:
            if not sample.tokens:
                values.append(None)
                continue
            head = prompt_tokens(bare, tokenizer, sample.prompt.text, len(sample.tokens))
            ids = torch.tensor([[*head, *sample.tokens]], device=bare.device)
            logits = bare(input_ids=ids, use_cache=False).logits[0, len(head) - 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, len(head) :])
            value = float(loss.double().exp())
            values.append(value if math.isfinite(value) else None)
    return values


REPEATED = 4  # tokens; the length of the n-grams of the repetition


def entries(model: str, samples: Sequence[Sample], judged: Sequence[float | None]) -> list[Entry]:
    """Returns the texts of one model with their measures, as the report has them.

    A measure is None where the text is too short for a single n-gram.

    Args:
        model: ``base``, ``pruned``, ``uniform`` or another name of a recovered model.
        samples: What it wrote.
        judged: What `perplexities` returned for these.
    """
    listed: list[Entry] = []
    for sample, perplexity in zip(samples, judged, strict=True):
        distinct_grams = distinct(sample.tokens, REPEATED)
        listed.append(
            {
                "model": model,
                "kind": sample.prompt.kind,
                "prompt": sample.prompt.text,
                "decoding": sample.decoding,
                "text": sample.text,
                "perplexity": perplexity,
                "distinct_1": distinct(sample.tokens, 1),
                "distinct_2": distinct(sample.tokens, 2),
                "repetition": None if distinct_grams is None else 1 - distinct_grams,
            }
        )
    return listed
