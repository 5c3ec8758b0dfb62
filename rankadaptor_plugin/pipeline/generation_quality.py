"""Simple measures of the texts that models write.

They need no other opinion than that of the unpruned model:
    distinct-n: Different n-grams of a text by all of its n-grams, in (0, 1]; Li et al. 2016
        (arXiv 1510.03055) divide by tokens instead, so that 1 cannot be reached.
    repetition: rep-4 = 1 - distinct-4, in [0, 1); seq-rep-4 of Welleck et al. 2020
        (arXiv 1908.04319).
    perplexity: exp of the mean negative log-likelihood of a text's tokens, given the prompt, under
        the unpruned model; at least 1. Lower is likelier, and repetitive text is likely too.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from rankadaptor_plugin.pipeline.texts import prompt_tokens
from rankadaptor_plugin.recovery.adapters import base_of, evaluated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.pipeline.texts import Sample

REPEATED = 4  # tokens; the length of the n-grams of the repetition


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Measures of one text by itself; None where it is too short for a single n-gram.

    Attributes:
        distinct_1: Different tokens by all tokens, in (0, 1].
        distinct_2: Different pairs of neighbours by all pairs, in (0, 1].
        repetition: Share of 4-grams that occurred before in the text, in [0, 1).
    """

    distinct_1: float | None
    distinct_2: float | None
    repetition: float | None


def quality(samples: Sequence[Sample]) -> list[Quality]:
    """Measures each text by itself, on its tokens."""
    found = []
    for sample in samples:
        again = distinct(sample.tokens, REPEATED)
        found.append(
            Quality(
                distinct_1=distinct(sample.tokens, 1),
                distinct_2=distinct(sample.tokens, 2),
                repetition=None if again is None else 1 - again,
            )
        )
    return found


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
        One value per text; None for a text without tokens, and where it is no finite number.

    Raises:
        ConfigError: If a prompt has no tokens, or the context window is too small.
    """
    bare = base_of(judge)
    found: list[float | None] = []
    with evaluated(bare), torch.no_grad():
        for sample in samples:
            if not sample.tokens:
                found.append(None)
                continue
            head = prompt_tokens(bare, tokenizer, sample.prompt, len(sample.tokens))
            ids = torch.tensor([[*head, *sample.tokens]], device=bare.device)
            logits = bare(input_ids=ids, use_cache=False).logits[0, len(head) - 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, len(head) :])
            value = float(loss.double().exp())
            found.append(value if math.isfinite(value) else None)
    return found


def entries(
    model: str, samples: Sequence[Sample], judged: Sequence[float | None]
) -> list[dict[str, Any]]:
    """Returns the texts of one model as `rankadaptor_plugin.report.schema.Entry`.

    Args:
        model: ``base``, ``pruned``, ``uniform`` or ``searched``.
        samples: What it wrote.
        judged: What `perplexities` returned for these.
    """
    return [
        {
            "model": model,
            "kind": sample.kind,
            "prompt": sample.prompt,
            "decoding": sample.decoding,
            "text": sample.text,
            "perplexity": perplexity,
            **asdict(measures),
        }
        for sample, measures, perplexity in zip(samples, quality(samples), judged, strict=True)
    ]
