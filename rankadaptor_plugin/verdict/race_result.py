"""Where the race of the finalists against uniform LoRA stands, and what it says in the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.verdict.race import Advantage, Reason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.core.scores import Score
    from rankadaptor_plugin.verdict.confirmation import ConfirmationRun, Runs
    from rankadaptor_plugin.verdict.race import Rules
    from rankadaptor_plugin.verdict.statistics import Comparison

FINALIST, BEST_RANDOM = "finalist", "best random"
"""Labels of the competitors that are rank allocations; a recovery method has its name."""


@dataclass(frozen=True, kw_only=True)
class Exit:
    """When and why a competitor left the race.

    Attributes:
        after: Number of seeds that it ran with and was scored.
        reason: Why.
        detail: What failed, empty for other reasons.
    """

    after: int
    reason: Reason
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A recovery method that enters the race.

    Attributes:
        label: Its name.
        allocation: What is fine-tuned.
        baseline: Uniform LoRA that it is compared with.
    """

    label: str
    allocation: RankAllocation
    baseline: RankAllocation


@dataclass(frozen=True, kw_only=True)
class Competitor:
    """One allocation of the race.

    Attributes:
        allocation: Its ranks.
        baseline: Uniform LoRA at its parameters.
        label: ``finalist``, ``best random``, or the name of a recovery method.
        exit: How it left the race; None if it ran with all seeds.
        comparison: It minus its baseline in the decisive metric: after the last seed with the
            simultaneous confidence, or that of the round in which it was eliminated. None if it
            is its baseline or a fine-tune failed.
    """

    allocation: RankAllocation
    baseline: RankAllocation
    label: str
    exit: Exit | None
    comparison: Comparison | None

    @property
    def is_method(self) -> bool:
        """Whether it entered as a recovery method, not as what a search found."""
        return self.label not in (FINALIST, BEST_RANDOM)

    @property
    def is_gain(self) -> bool:
        """Whether it ran to the end and its whole interval lies above zero."""
        return self.exit is None and self.comparison is not None and self.comparison.is_gain


class Standing:
    """Who has run how often and who is out, while the race goes on.

    Args:
        baselines: Baseline of each competitor; one that is its own is out from the start.

    Attributes:
        runs: Runs by allocation, one per seed.
        exits: How those left that are out.
        compared: The comparison of each competitor whose place is settled.
        done: Number of fine-tunes, failed ones included.
    """

    def __init__(self, baselines: dict[RankAllocation, RankAllocation]) -> None:
        self.baselines = baselines
        self.runs: dict[RankAllocation, list[ConfirmationRun]] = {}
        self.compared: dict[RankAllocation, Comparison] = {}
        self.exits = {
            allocation: Exit(after=0, reason=Reason.SAME)
            for allocation, baseline in baselines.items()
            if allocation == baseline
        }
        self.done = 0

    @property
    def racing(self) -> list[RankAllocation]:
        """Competitors that are not out."""
        return [allocation for allocation in self.baselines if allocation not in self.exits]

    @property
    def running_baselines(self) -> list[RankAllocation]:
        """Those of the competitors in the race; if none is left, the one that ran longest."""
        if racing := self.racing:
            return [self.baselines[allocation] for allocation in racing]
        left = self.baselines.values() or self.runs
        return [max(left, key=lambda a: len(self.runs.get(a, ())))]

    @property
    def in_race(self) -> list[RankAllocation]:
        """What runs in a round, in order: baselines first."""
        return list(dict.fromkeys((*self.running_baselines, *self.racing)))


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """What the fresh seeds say.

    Attributes:
        seeds: The fresh seeds that were used; each allocation ran with the first of them.
        runs: Runs of all competitors and baselines, one per seed.
        competitors: The finalists, best of the search first, then the best random allocation,
            then the recovery methods. None where uniform LoRA ran alone.
        rules: Rules of the race.
        metric: The decisive metric.
        weights: Weight per task of the verdict; None weighs all equally.
    """

    seeds: tuple[int, ...]
    runs: dict[RankAllocation, Runs]
    competitors: tuple[Competitor, ...]
    rules: Rules
    metric: str
    weights: Mapping[str, float] | None

    @property
    def chosen(self) -> Competitor | None:
        """The competitor that the verdict is about.

        That with the greatest mean difference of those that are a gain or, if there is none, of
        those that ran to the end or, if there is none, of those shown to be worse than uniform
        LoRA; None if there is none of these either, as where every finalist is uniform LoRA itself.
        """
        return _best(self.competitors)

    @property
    def searched(self) -> RankAllocation | None:
        """The best rank allocation, by the same rule among those; None if there is none.

        Where a recovery method led the race, one that was shown to be worse than it counts too.
        """
        found = [c for c in self.competitors if not c.is_method]
        best = _best(found)
        if best is None and self.chosen is not None and self.chosen.is_method:
            best = max(
                (c for c in found if c.comparison is not None),
                key=lambda c: c.comparison.estimate if c.comparison else 0.0,
                default=None,
            )
        return None if best is None else best.allocation

    @property
    def methods(self) -> dict[str, RankAllocation]:
        """The recovery methods that were scored, by name."""
        return {
            c.label: c.allocation
            for c in self.competitors
            if c.is_method and self.runs.get(c.allocation)
        }

    @property
    def baseline(self) -> RankAllocation:
        """Uniform LoRA at the parameters of the chosen one, or else the one that ran longest."""
        if self.chosen is not None:
            return self.chosen.baseline
        left = [c.baseline for c in self.competitors] or self.runs
        return max(left, key=lambda a: len(self.seeds_of(a)))

    @property
    def delivered(self) -> RankAllocation:
        """The chosen allocation if it is a gain, else the baseline."""
        chosen = self.chosen
        return chosen.allocation if chosen is not None and chosen.is_gain else self.baseline

    @property
    def fine_tunes(self) -> int:
        """Number of fine-tunes that were scored."""
        return sum(map(len, self.runs.values()))

    def reports(self, allocation: RankAllocation) -> list[Score]:
        """Returns an allocation's scores on the report documents, one per seed that it ran with."""
        return [run.report for run in self.runs.get(allocation, ()) if run.report]

    def seeds_of(self, allocation: RankAllocation) -> tuple[int, ...]:
        """Returns the seeds that an allocation ran with."""
        return self.seeds[: len(self.runs.get(allocation, ()))]

    def comparisons(self, metrics: Sequence[str]) -> dict[str, Comparison]:
        """Compares the chosen competitor with its baseline, with the confidence of the verdict.

        Returns:
            Comparison by metric; empty if there is no chosen one.
        """
        chosen = self.chosen
        if chosen is None or chosen.comparison is None:
            return {}
        confidence = chosen.comparison.confidence
        return {m: self._advantage(chosen, m).interval(confidence) for m in metrics}

    def _advantage(self, competitor: Competitor, metric: str) -> Advantage:
        ours, theirs = self._pairs(competitor)
        return Advantage.of(ours, theirs, metric, self.weights)

    def _pairs(self, competitor: Competitor) -> tuple[list[Score], list[Score]]:
        """Returns the scores of a competitor and of its baseline, while both were in the race."""
        ours, theirs = (self.reports(a) for a in (competitor.allocation, competitor.baseline))
        # An allocation that is out may have gone on as the baseline of another one.
        after = len(ours) if competitor.exit is None else competitor.exit.after
        both = min(len(ours), len(theirs), after)
        return ours[:both], theirs[:both]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for the report, without scores."""
        return {
            "error_rate": self.rules.error_rate,
            "confidence": self.rules.confidence,
            "metric": self.metric,
            "seeds": list(self.seeds),
            "most_seeds": self.rules.seeds,
            "least_seeds": self.rules.least_seeds,
            "fine_tunes": self.fine_tunes,
            "competitors": [self._entry(competitor) for competitor in self.competitors],
        }

    def _entry(self, competitor: Competitor) -> dict[str, Any]:
        out, runs = competitor.exit, self.runs.get(competitor.allocation, ())
        differences = [
            ours.mean(self.metric, self.weights) - theirs.mean(self.metric, self.weights)
            for ours, theirs in zip(*self._pairs(competitor), strict=True)
        ]
        return {
            "label": competitor.label,
            **competitor.allocation.to_json(),
            "baseline": list(competitor.baseline.ranks),
            "baseline_settings": dict(competitor.baseline.settings),
            "chosen": competitor is self.chosen,
            "search_objective": sum(r.objective for r in runs) / len(runs) if runs else None,
            "per_seed": differences,
            "eliminated_after": None if out is None else out.after,
            "reason": None if out is None else out.reason.value,
            "detail": "" if out is None else out.detail,
            "comparison": competitor.comparison and competitor.comparison.to_json(),
        }


def _best(competitors: Sequence[Competitor]) -> Competitor | None:
    """Returns the one of these that the verdict is about, the first of equal ones."""
    compared = [(c.comparison.estimate, c) for c in competitors if c.comparison is not None]
    gains = [(estimate, c) for estimate, c in compared if c.is_gain]
    ended = [(estimate, c) for estimate, c in compared if c.exit is None]
    worse = [(e, c) for e, c in compared if c.exit and c.exit.reason is Reason.UNIFORM]
    found = gains or ended or worse
    return max(found, key=lambda entry: entry[0])[1] if found else None
