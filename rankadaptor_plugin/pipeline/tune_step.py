"""The stage ``tune``: which learning rate, and which parts of the stack, before ranks are compared.

Uniform LoRA is fine-tuned at several rates, each with the same few seeds, and scored on the search
documents by the objective. The best mean wins; of those that cannot be told from it the smallest.
"Cannot be told" means by the 50 % interval of `rankadaptor_plugin.verdict.statistics`, over seeds
and documents. Where the best is the first or the last rate, rates beyond it are tried too. Then the
parts of the stack are added one by one, in the order of the run file; one stays if it raises the
mean: a part without effect does little harm, and a good one that is left out does much. What is
chosen here is confirmed later, on other documents with other seeds.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.config.tables import AUTO, UNIFORM_LORA
from rankadaptor_plugin.core.errors import OracleError, RecoveryError
from rankadaptor_plugin.recovery.methods.methods import parse_method
from rankadaptor_plugin.verdict.noise import noise_seeds
from rankadaptor_plugin.verdict.race import is_stored, run_name, stored_run
from rankadaptor_plugin.verdict.statistics import Difference, compare, model_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.core.run_folder import RunFolder
    from rankadaptor_plugin.core.trials import Outcome
    from rankadaptor_plugin.oracle.oracle import Objective

logger = logging.getLogger(__name__)

RATE = "learning_rate"
_STEP = 10 ** (1 / 3)
_RATES = 4  # of which the last is ten times the recipe's
_WIDER = 4  # rates beyond the first ones at most
_LIKELY = 0.5  # confidence of what is chosen here


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What the arms of a run are fine-tuned with.

    Attributes:
        recipe: The learning rate of the run file.
        learning_rate: That of LoRA, of the stack, and of methods without one of their own.
        parts: The parts of the stack that stay.
        rates: Learning rates of methods that were tuned on their own.
        curves: Points by method: ``learning_rate``, ``mean`` of the objective, its ``values`` by
            seed, and ``reason`` where a fine-tune failed.
        tried: The parts that were tried: ``part``, its ``difference`` in the objective with
            interval and ``by_seed``, whether it ``stays``, and ``reason`` where it failed.
        seeds: Seeds of all fine-tunes.
        at_edge: True if better rates may lie beyond those that were tried.
        seconds: Seconds of each fine-tune, by part.
    """

    recipe: float
    learning_rate: float
    parts: tuple[str, ...]
    rates: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    tried: tuple[dict[str, Any], ...] = ()
    seeds: tuple[int, ...] = ()
    at_edge: bool = False
    seconds: tuple[Mapping[str, float], ...] = ()

    @classmethod
    def untuned(cls, config: RunConfig, parts: Sequence[str]) -> Tuned:
        """Returns the rate of the run file, and all parts of the stack."""
        rate = config.recovery.learning_rate
        return cls(recipe=rate, learning_rate=rate, parts=tuple(parts))

    @property
    def stack(self) -> str:
        """The method that a rank allocation without one is fine-tuned by."""
        return str(parse_method("+".join((UNIFORM_LORA, *self.parts))))

    def resolved(self, allocation: RankAllocation) -> RankAllocation:
        """Returns an allocation with the method and the learning rate that it is fine-tuned by."""
        method = allocation.method or self.stack
        rate = self.rates.get(method, self.learning_rate)
        return replace(
            allocation,
            method=method,
            settings=tuple({RATE: rate, **dict(allocation.settings)}.items()),
        )

    def plain(self, uniform: RankAllocation) -> RankAllocation:
        """Returns LoRA without the stack, at the tuned rate."""
        return replace(uniform, method=UNIFORM_LORA) if self.parts else uniform

    def by_recipe(self, uniform: RankAllocation) -> RankAllocation:
        """Returns LoRA without the stack, at the rate of the run file."""
        if self.learning_rate == self.recipe:
            return self.plain(uniform)
        settings = tuple({**dict(uniform.settings), RATE: self.recipe}.items())
        return replace(uniform, method=UNIFORM_LORA, settings=settings)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, for tune.json and the report."""
        return {
            "recipe": self.recipe,
            "learning_rate": self.learning_rate,
            "stack": self.stack,
            "parts": list(self.parts),
            "rates": dict(self.rates),
            "curves": dict(self.curves),
            "tried": list(self.tried),
            "seeds": list(self.seeds),
            "at_edge": self.at_edge,
            "fine_tunes": len(self.seconds),
            "seconds": sum(sum(one.values()) for one in self.seconds),
        }


def learning_rates(config: RunConfig) -> tuple[float, ...]:
    """Returns the learning rates to begin with, ascending; none where nothing is tuned."""
    rates = config.tune.learning_rates
    if rates != AUTO:
        return tuple(rates)  # type: ignore[arg-type]
    recipe = config.recovery.learning_rate
    return tuple(_rounded(recipe * _STEP**i) if i else recipe for i in range(_RATES))


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


class TuneStep:
    """Tunes; finished fine-tunes are read from the run folder.

    Args:
        run: Fine-tunes an allocation with a seed and scores it on the search documents.
        folder: Run folder, where each run's scores are kept.
        config: The run file.
        objective: What is maximized.
        uniform: LoRA of the default rank.
        parts: The parts of the stack to try.
        on_run: Told the number of finished runs and of all runs.
        allows: Says whether there is time for so many more runs.
    """

    def __init__(
        self,
        run: Callable[[RankAllocation, int], Outcome],
        folder: RunFolder,
        config: RunConfig,
        objective: Objective,
        uniform: RankAllocation,
        *,
        parts: Sequence[str],
        on_run: Callable[[int, int], None],
        allows: Callable[[int], bool] = lambda runs: True,
    ) -> None:
        self._run, self._folder, self._config, self._objective = run, folder, config, objective
        self._uniform, self._on_run, self._allows = uniform, on_run, allows
        self._tried_parts = tuple(parts)
        self._seeds = noise_seeds(config.seed, config.tune.seeds)
        self._runs: dict[RankAllocation, list[Outcome]] = {}
        self._failed: dict[RankAllocation, str] = {}
        self._at_edge = False

    def run(self) -> Tuned:
        """Tunes, and writes ``tune.json``.

        Raises:
            RecoveryError: If LoRA can be fine-tuned at none of the rates.
        """
        rates = learning_rates(self._config)
        if not rates:
            return Tuned.untuned(self._config, self._tried_parts)
        self._on_run(0, self._planned)
        curves = {UNIFORM_LORA: self._curve(UNIFORM_LORA, rates)}
        rate, at_edge = self._best(curves[UNIFORM_LORA], UNIFORM_LORA), self._at_edge
        if rate is None and not self._failed:
            logger.warning(
                "The learning rate is not tuned: it does not fit into the time of the run"
            )
            return Tuned.untuned(self._config, ())
        if rate is None:
            tried_rates = ", ".join(f"{r:g}" for r in sorted(curves[UNIFORM_LORA]))
            reason = next(iter(self._failed.values()))
            raise RecoveryError(
                f"LoRA cannot be fine-tuned at any of the learning rates {tried_rates}: {reason}"
            )
        own: dict[str, float] = {}
        for method in self._config.tune.methods:
            curves[method] = self._curve(method, rates)
            best = self._best(curves[method], method)
            own |= {} if best is None else {str(parse_method(method)): best}
        parts, tried = self._parts(rate)
        if at_edge:
            logger.warning(
                "The best learning rate, %g, is at the edge of those that were tried; better ones "
                "may lie beyond it. Set [recovery] learning_rate nearer to it, or [tune] "
                "learning_rates.",
                rate,
            )
        tuned = Tuned(
            recipe=self._config.recovery.learning_rate,
            learning_rate=rate,
            parts=parts,
            rates=own,
            curves={
                name: [self._point(self._arm(name, r)) | {RATE: r} for r in sorted(tried_rates)]
                for name, tried_rates in curves.items()
            },
            tried=tried,
            seeds=self._seeds,
            at_edge=at_edge,
            seconds=tuple(o.seconds for several in self._runs.values() for o in several),
        )
        self._folder.write_json("tune.json", tuned.to_json())
        done = len(tuned.seconds)
        self._on_run(done, done)
        return tuned

    @property
    def _planned(self) -> int:
        return fine_tunes(self._config)

    def _arm(self, method: str, rate: float) -> RankAllocation:
        settings = {**dict(self._uniform.settings), RATE: rate}
        return replace(self._uniform, method=method, settings=tuple(settings.items()))

    def _curve(self, method: str, rates: Sequence[float]) -> list[float]:
        """Fine-tunes a method at rates, and at more where the best one is the first or last."""
        tried = list(rates)
        for rate in tried:
            self._fine_tune(self._arm(method, rate))
        self._at_edge = False
        for _ in range(_WIDER + 1):
            best = self._best(tried, method)
            if best is None:
                # All diverge: smaller rates are what is left.
                beyond = _rounded(min(tried) / _STEP)
            elif best == max(tried):
                beyond = _rounded(best * _STEP)
            elif best == min(tried):
                beyond = _rounded(best / _STEP)
            else:
                break
            self._at_edge = best is not None
            if len(tried) == len(rates) + _WIDER or not self._fine_tune(self._arm(method, beyond)):
                break
            tried.append(beyond)
            self._at_edge = False
        return tried

    def _best(self, rates: Sequence[float], method: str) -> float | None:
        """Returns the smallest rate that cannot be told from the best; None if all failed."""
        tried = ((rate, self._mean(self._arm(method, rate))) for rate in rates)
        means = {rate: mean for rate, mean in tried if mean is not None}
        if not means:
            return None
        best = max(means, key=lambda rate: means[rate])
        arms = {rate: self._arm(method, rate) for rate in sorted(means)}
        return next(
            rate
            for rate, arm in arms.items()
            if rate == best or self._difference(arms[best], arm).low <= 0
        )

    def _parts(self, rate: float) -> tuple[tuple[str, ...], tuple[dict[str, Any], ...]]:
        """Adds the parts of the stack one by one; returns those that stay, and all."""
        parts: tuple[str, ...] = ()
        tried: list[dict[str, Any]] = []
        for part in self._tried_parts:
            with_it, without = (
                self._arm(str(parse_method("+".join((UNIFORM_LORA, *names)))), rate)
                for names in ((*parts, part), parts)
            )
            made = self._fine_tune(with_it)
            entry: dict[str, Any] = {"part": part, "stays": False, "reason": ""}
            entry |= {"difference": None, "by_seed": []}
            if with_it in self._failed:
                entry["reason"] = self._failed[with_it]
            elif not made:
                entry["reason"] = "no time"
            else:
                pairs = zip(self._runs[with_it], self._runs[without], strict=True)
                entry["by_seed"] = [one.objective - other.objective for one, other in pairs]
                entry["difference"] = self._difference(with_it, without).to_json()
                if sum(entry["by_seed"]) > 0:
                    entry["stays"], parts = True, (*parts, part)
            tried.append(entry)
        return parts, tuple(tried)

    def _fine_tune(self, arm: RankAllocation) -> bool:
        """Fine-tunes an arm with all seeds, unless time is short; a failure is kept in mind."""
        if arm in self._runs or arm in self._failed:
            return True
        names = [f"tune/{run_name(arm, seed)}" for seed in self._seeds]
        missing = sum(not is_stored(self._folder, name) for name in names)
        if missing and not self._allows(missing):
            return False
        made: list[Outcome] = []
        for seed, name in zip(self._seeds, names, strict=True):
            try:
                made.append(stored_run(self._folder, name, partial(self._run, arm, seed), "search"))
            except (RecoveryError, OracleError) as error:
                logger.warning("Out of the tuning: %s: %s", arm, error)
                self._failed[arm] = str(error)
                return True
            done = sum(map(len, self._runs.values())) + len(made)
            self._on_run(done, max(done, self._planned))
        self._runs[arm] = made
        return True

    def _mean(self, arm: RankAllocation) -> float | None:
        runs = self._runs.get(arm)
        return fmean(run.objective for run in runs) if runs else None

    def _point(self, arm: RankAllocation) -> dict[str, Any]:
        runs = self._runs.get(arm, [])
        return {
            "mean": self._mean(arm),
            "values": [run.objective for run in runs],
            "reason": self._failed.get(arm, ""),
        }

    def _difference(self, one: RankAllocation, other: RankAllocation) -> Difference:
        objective = self._objective
        ours, theirs = (
            model_of(
                dict(zip(self._seeds, (o.search for o in self._runs[a]), strict=True)),
                objective.metric,
            )
            for a in (one, other)
        )
        weights = {objective.target: 1.0} if objective.target else objective.weights
        return compare(ours, theirs, objective.metric, weights, confidence=_LIKELY)


def fine_tunes(config: RunConfig) -> int:
    """Returns the fine-tunes of the stage, without those of a wider look."""
    rates = len(learning_rates(config))
    if not rates:
        return 0
    return config.tune.seeds * (rates * (1 + len(config.tune.methods)) + len(config.parts))
