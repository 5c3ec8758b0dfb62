"""One trial of the search: a rank allocation, really fine-tuned and really evaluated."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.scores import Score

if TYPE_CHECKING:
    from collections.abc import Mapping


RECORD = "rankadaptor_trial"
"""User attribute of an Optuna trial that holds the record of a finished `Trial`."""


class TrialState(enum.StrEnum):
    """End of a trial."""

    COMPLETE = "complete"
    FAILED = "failed"


class Phase(enum.StrEnum):
    """The phase in which a trial was made: two of the paper's (section 3.3), then our own check."""

    INITIALIZATION = "initialization"
    ITERATION = "iteration"
    CONFIRMATION = "confirmation"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one fine-tune of an allocation with a seed.

    Attributes:
        search: Scores per task on the search documents.
        report: Scores on the report documents; None outside of the race.
        objective: What the search maximizes, P of the paper.
        train_loss: Mean training loss over the last tenth of the fine-tune, in nats per token.
        seconds: Wall time by part: ``recovery`` and ``oracle``.
        validation_loss: Loss on the held-out rows, in nats per token; None without such rows.
    """

    search: Score
    report: Score | None = None
    objective: float
    train_loss: float
    seconds: dict[str, float]
    validation_loss: float | None = None

    def is_finite(self) -> bool:
        """True if every score and the objective are finite numbers."""
        scores = (self.search, self.report)
        return math.isfinite(self.objective) and all(s is None or s.is_finite() for s in scores)

    def trial(self, **place: Any) -> Trial:
        """Returns the run as a complete trial; `place` are the other fields of it."""
        return Trial(
            state=TrialState.COMPLETE,
            score=self.search,
            objective=self.objective,
            train_loss=self.train_loss,
            validation_loss=self.validation_loss,
            seconds={**place.pop("seconds", {}), **self.seconds},
            **place,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, without those per document."""
        report = self.report and self.report.to_json()
        return {**vars(self), "search": self.search.to_json(), "report": report}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        """Builds a run from what `to_json` returned."""
        search = Score.from_json(data["search"])
        report = data["report"] and Score.from_json(data["report"])
        return cls(**{**data, "search": search, "report": report})


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A finished trial.

    Attributes:
        position: Place in the search, from 0; interrupted trials do not count.
        phase: Initialization or iteration.
        allocation: The ranks.
        seed: Seed of the fine-tune, the same for all trials of a search.
        state: Complete or failed.
        score: Scores per task and metric, None if failed.
        objective: See `Outcome`; None unless complete.
        predicted: What the performance model said before, Q of the paper; None if it said nothing.
        train_loss: See `Outcome`.
        seconds: See `Outcome`, plus ``search``: time to propose the allocation.
        reason: Why the trial failed.
        parameters: Trainable parameters; None in records that were made without.
        validation_loss: See `Outcome`.
    """

    position: int
    phase: Phase
    allocation: RankAllocation
    seed: int
    state: TrialState
    score: Score | None = None
    objective: float | None = None
    predicted: float | None = None
    train_loss: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    reason: str | None = None
    parameters: int | None = None
    validation_loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, without per-document scores."""
        return {
            "position": self.position,
            "phase": self.phase.value,
            **self.allocation.to_json(),
            "parameters": self.parameters,
            "seed": self.seed,
            "state": self.state.value,
            "score": None if self.score is None else self.score.to_json(),
            "objective": self.objective,
            "predicted": self.predicted,
            "train_loss": self.train_loss,
            "validation_loss": self.validation_loss,
            "seconds": self.seconds,
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """Builds a trial from what `to_json` returned; other keys are left aside."""
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        values["allocation"] = RankAllocation.from_json(data)
        values["phase"] = Phase(values["phase"])
        values["state"] = TrialState(values["state"])
        if values["score"] is not None:
            values["score"] = Score.from_json(values["score"])
        return cls(**values)
