"""The statistics of the race: who is out after a round, and the intervals of those who are not.

Each competitor runs with the same seeds as uniform LoRA at its parameters and is scored on the same
documents; what counts is its advantage, the paired difference of the two. Two errors have a stated
rate, ``1 - confidence`` each:

* A gain is claimed for a competitor that has none. Claims are made once, after the last seed, from
  intervals that hold for all competitors together (Bonferroni over those that entered). Nothing is
  claimed for those that left, so leaving cannot add to this error.
* The best competitor is eliminated although it is no worse than uniform LoRA. After each earlier
  round whoever is shown to be worse than uniform LoRA, or than the leader, is out. Only the
  comparisons of the best one with all others and with uniform LoRA can make this error, as many as
  there are competitors; the rate is shared out among them and among the rounds, where a round's
  share is in proportion to the rounds that it can save.

An interval adds up what seeds and what documents leave open, each at its own quantile of
Student's t, ``h^2 = t_seeds^2 v_seeds + t_documents^2 v_documents``, after W. G. Howe, JASA 69
(1974), 789. Few seeds that differ much make the Welch-Satterthwaite interval of
`rankadaptor_plugin.verdict.statistics` too narrow, the more so the higher the confidence; this one
kept the stated rate in all simulated cases (``benchmarks/race_errors.py``). The chance of a single
pair of seed and document is contained in both variances and taken out of the second; where few
seeds agree by luck, the interval is still no narrower than that chance makes it.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from scipy.special import stdtrit

from rankadaptor_plugin.verdict.statistics import Comparison, Values, compare

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rankadaptor_plugin.core.scores import Score

Name = TypeVar("Name")


class Reason(enum.StrEnum):
    """Why a competitor is out."""

    UNIFORM = "worse than uniform LoRA"
    LEADER = "worse than the leader"
    SAME = "uniform LoRA itself"
    FAILED = "a fine-tune failed"


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How many run how long, and how sure a decision must be.

    Attributes:
        competitors: Number of competitors that enter, at least one.
        seeds: Seeds of the whole race.
        least_seeds: Seeds before anyone may be eliminated.
        confidence: One less the rate of each of the two errors, in (0, 1).
    """

    competitors: int
    seeds: int
    least_seeds: int
    confidence: float

    @property
    def error_rate(self) -> float:
        """Rate of each of the two errors, in (0, 1)."""
        return round(1 - self.confidence, 12)  # 0.05, not 0.050000000000000044

    def is_look(self, seeds: int) -> bool:
        """Tells whether competitors may be eliminated after a number of seeds."""
        return self.least_seeds <= seeds < self.seeds

    def confidence_after(self, seeds: int) -> float:
        """Returns the confidence of each two-sided interval after a number of seeds, in (0, 1)."""
        if not self.is_look(seeds):
            return 1 - self.error_rate / self.competitors
        saved = self.seeds - seeds
        share = saved / sum(range(1, self.seeds - self.least_seeds + 1))
        # Only one end of the interval eliminates.
        return 1 - 2 * self.error_rate * share / self.competitors


@dataclass(frozen=True)
class Advantage:
    """Paired differences of a competitor to its baseline.

    Attributes:
        values: Per task the differences of shape (S, J), by seed and document.
        shares: Weight of each task, adding up to 1.
    """

    values: tuple[Values, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(
        cls,
        first: Sequence[Score],
        second: Sequence[Score],
        metric: str,
        weights: Mapping[str, float] | None = None,
    ) -> Advantage:
        """Returns first minus second; arguments and errors are those of `statistics.compare`."""
        compare(first, second, metric, weights)  # raises if the scores do not pair up
        given = dict.fromkeys(first[0].tasks, 1.0) if weights is None else weights
        total = sum(given.values())
        shares = {task: weight / total for task, weight in given.items() if weight > 0}
        values = tuple(
            _table(first, task, metric) - _table(second, task, metric) for task in shares
        )
        return cls(values, tuple(shares.values()))

    @property
    def per_seed(self) -> Values:
        """Weighted mean over the tasks, shape (S,)."""
        means = [w * v.mean(axis=1) for w, v in zip(self.shares, self.values, strict=True)]
        return np.asarray(np.sum(means, axis=0), dtype=np.float64)

    def over(self, other: Advantage) -> Advantage:
        """Returns by how much this advantage exceeds another one of the same shape."""
        values = (a - b for a, b in zip(self.values, other.values, strict=True))
        return Advantage(tuple(values), self.shares)

    def interval(self, confidence: float) -> Comparison:
        """Returns the mean over seeds and documents with a two-sided interval.

        Without any variance the half width is 0; with a single document of a task, or a single
        seed, it is infinite.
        """
        per_seed = self.per_seed
        seeds, sizes = len(per_seed), [v.shape[1] for v in self.values]
        estimate, documents = float(per_seed.mean()), sum(sizes)
        if seeds == 1 or 1 in sizes:
            half_width = stderr = math.inf
        else:
            by_seed = float(per_seed.var(ddof=1)) / seeds
            found = [(w * w, *_variances(v)) for w, v in zip(self.shares, self.values, strict=True)]
            parts = [(w * part, size - 1) for (w, part, _), size in zip(found, sizes, strict=True)]
            by_document = sum(part for part, _ in parts)
            by_chance = sum(w * chance for w, _, chance in found)
            # Each part is divided by the total first: squares of tiny variances underflow to zero.
            spread = sum((p / by_document) ** 2 / df for p, df in parts) if by_document > 0 else 0.0
            level = (1 + confidence) / 2
            square = float(stdtrit(seeds - 1, level)) ** 2 * by_seed
            if spread > 0:
                square += float(stdtrit(1 / spread, level)) ** 2 * by_document
            pairs = (seeds - 1) * sum(size - 1 for size in sizes)
            least = float(stdtrit(pairs, level)) ** 2 * (by_document + by_chance)
            square = max(square, least)
            half_width, stderr = math.sqrt(square), math.sqrt(by_seed + by_document)
        low, high = estimate - half_width, estimate + half_width
        return Comparison(estimate, half_width, low, high, stderr, confidence, seeds, documents)


def eliminated(advantages: Mapping[Name, Advantage], confidence: float) -> dict[Name, Reason]:
    """Returns who is out after a round, and why.

    Args:
        advantages: Those still in the race, all with the same seeds, documents and tasks.
        confidence: Confidence of each two-sided interval, see `Rules.confidence_after`.
    """
    if not advantages:
        return {}
    leader = max(advantages.values(), key=lambda advantage: float(advantage.per_seed.mean()))
    out = {}
    for name, advantage in advantages.items():
        if advantage.interval(confidence).is_loss:
            out[name] = Reason.UNIFORM
        elif advantage is not leader and advantage.over(leader).interval(confidence).is_loss:
            out[name] = Reason.LEADER
    return out


def _table(scores: Sequence[Score], task: str, metric: str) -> Values:
    return np.asarray([score.tasks[task].per_document[metric] for score in scores], dtype=float)


def _variances(values: Values) -> tuple[float, float]:
    """Returns what two things add to the variance of the mean of values (S, J).

    Returns:
        The choice of documents, and the chance of single pairs of seed and document.
    """
    seeds, documents = len(values), values.shape[1]
    by_document = values.mean(axis=0)
    rest = values - by_document - values.mean(axis=1, keepdims=True) + values.mean()
    chance = float(np.square(rest).sum()) / ((seeds - 1) * (documents - 1))
    by_chance = chance / seeds / documents
    variance = float(by_document.var(ddof=1)) / documents - by_chance
    return max(0.0, variance), by_chance
