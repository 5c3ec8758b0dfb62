"""Texts that a model writes after a prompt, greedily and sampled.

The paper shows how recovered models continue an article and list steps (sections 4.2 and A.4). Here
every model of a run writes after the same prompts. Settings that a model folder brings along are
left out, and every sampled text starts from the same seed, so texts differ by the model alone.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import GenerationConfig

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.corpus.corpus import encode
from rankadaptor_plugin.recovery.adapters import base_of, evaluated

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Decoding = Literal["greedy", "sampled"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is to go on from.

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
class Settings:
    """How texts are written.

    Attributes:
        max_new_tokens: Most tokens of a text, at least 1.
        temperature: Divides the logits of sampled texts, above 0.
        top_p: Sampled texts take the likeliest tokens that have this probability together, in
            (0, 1].
        seed: Seed of every single sampled text, in [0, 2**63).

    Raises:
        ConfigError: If a value is outside of its range.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        allowed = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 < self.temperature < math.inf, "a number above 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "seed": (0 <= self.seed < 2**63, "at least 0 and below 2**63"),
        }
        for name, (holds, what) in allowed.items():
            if not holds:
                raise ConfigError(
                    f"The {name} of generated texts is {getattr(self, name)}; allowed is {what}. "
                    f"Correct {name}."
                )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One text.

    Attributes:
        prompt: What it goes on from, as given, even if the model read only the end of it.
        kind: That of the prompt.
        decoding: ``greedy`` or ``sampled``.
        text: The continuation, special tokens included, without the end of text.
        tokens: Its token ids.
    """

    prompt: str
    kind: str
    decoding: Decoding
    text: str
    tokens: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self) | {"tokens": list(self.tokens)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sample:
        """Builds a sample from what `to_json` returned."""
        return cls(**{**data, "tokens": tuple(data["tokens"])})


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: Settings,
) -> list[Sample]:
    """Lets a model go on from each prompt, first greedily, then sampled.

    A prompt that leaves too little room in the context window loses its beginning, but for the
    token that begins every text. Model and global random state are left as they were found.

    Args:
        model: A causal LM, with or without an adapter.
        tokenizer: Its tokenizer.
        prompts: What to go on from.
        settings: How.

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
    with evaluated(bare), _without_own_settings(bare), torch.random.fork_rng(devices=devices):
        for prompt, head in zip(prompts, heads, strict=True):
            ids = torch.tensor([head], device=bare.device)
            for decoding in ways:
                torch.manual_seed(settings.seed)  # whatever was written before
                found = bare.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=_config(ends, settings, decoding),
                )[0, len(head) :].tolist()
                tokens = tuple(takewhile(lambda token: token not in ends, found))
                text = _text(tokenizer, head, tokens)
                samples.append(
                    Sample(
                        prompt=prompt.text,
                        kind=prompt.kind,
                        decoding=decoding,
                        text=text,
                        tokens=tokens,
                    )
                )
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
    kept = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    room = window - new_tokens - len(kept)
    if room < 1:
        raise ConfigError(
            f"max_new_tokens {new_tokens} leaves no room for a prompt in the context window of "
            f"{window} tokens. Lower max_new_tokens to at most {window - 1 - len(kept)}."
        )
    return kept + ids[-room:]


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end a text; chat models have more than their tokenizer names."""
    own = getattr(model.generation_config, "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
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
def _without_own_settings(model: Any) -> Iterator[None]:
    """Hides a model's generation settings, which transformers would fill ours up with."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
