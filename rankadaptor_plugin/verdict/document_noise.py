"""What the number of documents does to the noise of a comparison.

The noise floor is measured on search documents, the verdict comes from report documents: fewer or
more of them, and other ones. Values per document say how much of the noise depends on that.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rankadaptor_plugin.core.scores import Score

_LEAST = 2  # documents that show a variance


def document_sd(
    scores: Sequence[Sequence[Score]],
    metric: str,
    weights: Mapping[str, float],
    report_documents: Mapping[str, int],
) -> float:
    """Returns the standard error of a difference that the choice of documents makes.

    From the differences between the first and each other allocation per document, the mean over
    the seeds; scaled from the documents at hand to those of the final comparison. Like the
    comparison itself it counts the chance of single answers here as well as among the seeds.

    Args:
        scores: Scores with values per document, by allocation and seed.
        metric: The metric of the difference.
        weights: Weight per task.
        report_documents: Documents of the final comparison by task.
    """
    shares = {task: weight / sum(weights.values()) for task, weight in weights.items()}
    variances = []
    for other in scores[1:]:
        variance = 0.0
        for task, share in shares.items():
            first, second = (
                np.mean([score.tasks[task].per_document[metric] for score in several], axis=0)
                for several in (scores[0], other)
            )
            if len(first) > 1:
                spread = float(np.var(first - second, ddof=1))
                if metric == "accuracy":
                    # That no answer differs among these documents does not mean that none can:
                    # half of one more document, as Jeffreys' prior has it.
                    spread = max(spread, 0.5 / (len(first) + 1))
                variance += share**2 * spread / report_documents[task]
        variances.append(variance)
    return math.sqrt(sum(variances) / len(variances))


def seed_scale(
    scores: Sequence[Sequence[Score]],
    metric: str,
    weights: Mapping[str, float],
    report_documents: Mapping[str, int],
    seed_sd: float,
) -> float:
    """Returns the seed noise on the report documents, as a multiple of that on those at hand.

    What a seed does to single answers averages out over more documents; what it does to all of
    them does not. The first is the variance over the documents of what is left of an answer once
    the means of its allocation and of its seed are taken out.

    Args:
        scores: Scores with values per document, by allocation and seed, two of each at least.
        metric: The metric of the verdict.
        weights: Weight per task.
        report_documents: Documents of the final comparison by task.
        seed_sd: Residual sd of a fine-tune on the documents at hand.
    """
    if not seed_sd:
        return 1.0
    here = there = 0.0
    for task, weight in weights.items():
        share = weight / sum(weights.values())
        values = np.array(
            [[score.tasks[task].per_document[metric] for score in several] for several in scores]
        )
        n, k, count = values.shape
        if count < _LEAST:
            continue
        rest = (
            values
            - values.mean(0, keepdims=True)
            - values.mean(1, keepdims=True)
            + values.mean((0, 1), keepdims=True)
        )
        single = float(rest.var(axis=2, ddof=1).sum()) / ((n - 1) * (k - 1))
        here += share**2 * single / count
        there += share**2 * single / report_documents[task]
    return math.sqrt((max(0.0, seed_sd**2 - here) + there) / seed_sd**2)
