"""The time that a run may take: what of it is used, and what fits into the rest.

`max_hours` and `max_gpu_hours` hold for all of a run. What must happen in any case is kept free:
the comparison with all its seeds while there is a search to cut, with the fewest after that. Before
the start the forecast says what fits; from the first fine-tune on, the longest one so far does, so
that a run on a slower machine than forecast ends in time as well.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rankadaptor_plugin.core.errors import RecoveryError
from rankadaptor_plugin.pipeline import tune_step
from rankadaptor_plugin.search.search import LEAST_TRIALS, StopReason
from rankadaptor_plugin.verdict.race import LEAST_SEEDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rankadaptor_plugin.config.tables import RunConfig

_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of a run.

    Attributes:
        tune: Fine-tunes for learning rate and stack; 0: neither is tuned.
        noise_seeds: Fine-tunes of each allocation of the noise floor; 0: it is not measured.
        trials: Trials of the search; 0 where nothing is searched.
        seeds: Fine-tunes of each competitor.
    """

    noise_seeds: int
    trials: int
    seeds: int
    tune: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> Size:
        """Returns that of a run file."""
        return cls(
            noise_seeds=config.noise.seeds if config.searches else 0,
            trials=config.search.n_trials if config.searches else 0,
            seeds=config.confirm.seeds,
            tune=tune_step.fine_tunes(config),
        )


@dataclass(frozen=True, kw_only=True)
class Done:
    """What earlier sessions have left in the run folder: numbers of fine-tunes by stage."""

    tune: int = 0
    noise: int = 0
    search: int = 0
    random: int = 0
    race: int = 0


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of the parts of a run.

    Attributes:
        fine_tune: One fine-tune.
        search_score: An evaluation on the search documents.
        report_score: An evaluation on the report documents.
        before: What is left to do before the recovery stage: pruning, evaluations.
        after: What follows it: texts, the report.
    """

    fine_tune: float = 0.0
    search_score: float = 0.0
    report_score: float = 0.0
    before: float = 0.0
    after: float = 0.0

    @property
    def trial(self) -> float:
        """Seconds of a trial, or of a fine-tune of the noise floor."""
        return self.fine_tune + self.search_score

    @property
    def race_run(self) -> float:
        """Seconds of a fine-tune of the comparison."""
        return self.trial + self.report_score


def fine_tunes(config: RunConfig, size: Size, done: Done | None = None) -> dict[str, int]:
    """Returns the most fine-tunes of each stage that are still to be made.

    Those of the noise floor with the search's seed are the first trials as well, and those of the
    tuned stack serve the noise floor too.

    Args:
        config: The run file.
        size: Numbers of seeds and trials.
        done: What has been made; nothing if left out.
    """
    done = done or Done()
    noise = size.noise_seeds * config.noise.allocations
    shared = min(size.noise_seeds, config.tune.seeds) if size.tune else 0
    begun = max(done.search, config.noise.allocations if noise else 0)
    again = size.trials if config.confirm.best_random else 0
    race = size.seeds * config.race_models
    return {
        "tune": max(0, size.tune - done.tune),
        "noise": max(0, noise - max(shared, done.noise)),
        "search": max(0, size.trials - begun),
        "random": max(0, again - done.random),
        "confirm": max(0, race - done.race),
    }


def seconds_of(config: RunConfig, size: Size, costs: Costs, done: Done | None = None) -> float:
    """Returns the seconds that are left of a run of some size; arguments as `fine_tunes`."""
    left = fine_tunes(config, size, done)
    race = left.pop("confirm")
    return costs.before + sum(left.values()) * costs.trial + race * costs.race_run + costs.after


def cut(config: RunConfig, costs: Costs, seconds: float, done: Done | None = None) -> Size | None:
    """Returns the largest size of a run that fits, None if not even the smallest does.

    Trials are cut before seeds of the noise floor, these before seeds of the comparison, and the
    tuning goes last.

    Args:
        config: The run file.
        costs: Seconds of its parts.
        seconds: Seconds that are left, infinite for no limit.
        done: What has been made; nothing if left out.
    """
    whole = Size.of(config)
    tunes, every = dict.fromkeys((whole.tune, 0)), _down(whole.seeds, LEAST_SEEDS)
    for tune, seeds in itertools.product(tunes, every):
        for noise in (n for n in _down(whole.noise_seeds, 0) if n != 1):
            fewest = config.noise.allocations if noise else LEAST_TRIALS  # which are trials as well
            for trials in _down(whole.trials, min(whole.trials, fewest)):
                size = Size(noise_seeds=noise, trials=trials, seeds=seeds, tune=tune)
                if seconds_of(config, size, costs, done) <= seconds:
                    return size
    return None


def smallest(config: RunConfig) -> Size:
    """Returns the size that a run cannot be cut below."""
    trials = min(Size.of(config).trials, LEAST_TRIALS)
    return Size(noise_seeds=0, trials=trials, seeds=LEAST_SEEDS)


def _down(most: int, least: int) -> range:
    return range(most, least - 1, -1)


class Budget:
    """The time of a run while it goes on.

    Args:
        config: The run file.
        devices: Devices that the run occupies; a CPU counts as one.
        spent: Seconds of earlier sessions.
        began: When this one began, in seconds of `now`; now if left out.
        now: The clock.

    Attributes:
        refused: Stages of which something did not fit.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        devices: int = 1,
        spent: float = 0.0,
        began: float | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        search = config.search
        limits = [
            (hours * _HOUR, stop)
            for hours, stop in (
                (search.max_hours, StopReason.MAX_HOURS),
                (search.max_gpu_hours / devices, StopReason.MAX_GPU_HOURS),
            )
            if hours
        ]
        self.limit, self.stop = min(limits, default=(math.inf, StopReason.MAX_HOURS))
        self.costs, self.refused = Costs(), set[str]()
        self._config, self._size = config, Size.of(config)
        self._spent, self._now = spent, now
        self._began = now() if began is None else began
        self._is_measured = False

    def planned(self, costs: Costs, size: Size) -> Budget:
        """Returns the same with a forecast, and what of the run fits by it."""
        known = copy.copy(self)
        known.costs, known._size, known.refused = costs, size, set()
        return known

    @property
    def left(self) -> float:
        """Seconds that are left; infinite without a limit."""
        return self.limit - self._spent - (self._now() - self._began)

    def observe(self, seconds: Mapping[str, float]) -> None:
        """Takes the seconds of a trial, by part, in place of the forecast; the longest count."""
        known = (
            self.costs if self._is_measured else replace(self.costs, fine_tune=0, search_score=0)
        )
        share = self.costs.report_score / (self.costs.search_score or 1)
        score = max(known.search_score, seconds["oracle"])
        self.costs = replace(
            known,
            fine_tune=max(known.fine_tune, seconds["recovery"]),
            search_score=score,
            report_score=share * score,
        )
        self._is_measured = True

    def observe_report(self, seconds: float) -> None:
        """Takes the seconds of an evaluation on the report documents; the longest count."""
        longest = max(self.costs.report_score, seconds)
        self.costs = replace(self.costs, report_score=longest)

    def allows(self, stage: str, runs: int = 1, *, trials: int = 0, needed: bool = False) -> bool:
        """True if more fine-tunes of a stage leave time for what must follow.

        Args:
            stage: ``tune``, ``noise``, ``search``, ``random`` or ``confirm``.
            runs: Fine-tunes.
            trials: Trials that the search has with them, of which as many random ones may follow.
            needed: True if the run cannot do without them; only the end of time stops them.

        Raises:
            RecoveryError: If they are needed, and do not end in time.
        """
        costs, left = self.costs, self.left
        seconds = runs * (costs.race_run if stage == "confirm" else costs.trial)
        if needed:
            if seconds > left:
                raise RecoveryError(
                    f"[search] {self.stop} {self.limit / _HOUR:.3g} leaves {max(0.0, left):.0f} s, "
                    f"but the next fine-tune, which the run cannot do without, takes {seconds:.0f} "
                    "s. Raise it and run the same command again; what is done is kept."
                )
            return True
        if stage in ("tune", "noise", "search") and self._config.confirm.best_random:
            seconds += max(LEAST_TRIALS, trials) * costs.trial
        if stage != "confirm":
            seconds += fine_tunes(self._config, self._size)["confirm"] * costs.race_run
        if seconds + costs.after > left:
            self.refused.add(stage)
            return False
        return True
