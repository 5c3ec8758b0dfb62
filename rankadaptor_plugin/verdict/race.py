"""The race of a run: what enters, what each fine-tune scored, and what all of them say together.

Two questions are asked. What is recovered beyond the public recipe: uniform LoRA at the tuned rate,
the stack, and other recovery methods are compared with LoRA by the recipe, the reference. And what
the ranks alone give: a rank allocation is compared with even ranks of the same size, on the same
stack, with the same settings. Whatever is compared was fine-tuned with the same seeds and scored on
the same documents.

`Confirmation` runs it. All that enters runs with fresh seeds, one seed after the other, and is
scored on the *report* documents. Neither the seeds nor the documents chose what enters, and the
intervals hold for all comparisons together, so the verdict is not biased by any choice. Where the
tune stage has chosen a stack, that is what is compared with the recipe; tuned LoRA without it can
only be delivered where the stack is shown to gain, and so costs no part of the error rate.
"""

from __future__ import annotations

import enum
import hashlib
import json
import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rankadaptor_plugin.core.errors import ConfigError, OracleError, RecoveryError
from rankadaptor_plugin.core.trials import Outcome, Phase, Trial, TrialState
from rankadaptor_plugin.verdict.statistics import compare, model_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.core.run_folder import RunFolder
    from rankadaptor_plugin.core.scores import Score
    from rankadaptor_plugin.search.study import TrialStore
    from rankadaptor_plugin.verdict.statistics import Difference, Model

FINALIST, BEST_RANDOM = "finalist", "best random"
"""Labels of the competitors that are rank allocations; a recovery method has its name."""

TUNED, STACK = "LoRA, tuned", "stack"
"""Labels of uniform LoRA at the tuned rate, and of uniform ranks with the parts of the stack."""

RECIPE, UNIFORM, DEFAULT_RANK, SEARCHED = "recipe", "uniform", "lora", "searched"
RECOVERED = "recovered"
"""Names of models in reports and comparisons: LoRA by the public recipe; even ranks on the stack,
which rank allocations are compared with; LoRA of the default rank at the tuned rate, without the
stack; the best rank allocation that was searched or given; and what is delivered."""


Runs = tuple[Outcome, ...]  # one per seed


def run_name(allocation: RankAllocation, seed: int) -> str:
    """Returns the file name, without ending, of a run; ranks of many layers would be too long."""
    return f"{hashlib.sha256(str(allocation).encode()).hexdigest()[:12]}-{seed}"


def run_path(allocation: RankAllocation, seed: int) -> str:
    """Returns the path of a run's files in the run folder, without ending."""
    return f"evaluations/{run_name(allocation, seed)}"


def stored_run(
    folder: RunFolder,
    name: str,
    make: Callable[[], Outcome],
    part: Literal["search", "report"],
    *,
    is_whole: bool = True,
) -> Outcome:
    """Returns a run from the run folder; it is made anew where it was not finished.

    Args:
        folder: The run folder.
        name: Path of the run's files in it, without ending.
        make: Makes the run.
        part: The score whose values per document are kept.
        is_whole: False if something else that the run left is missing.
    """
    run = folder.read_result(name, Outcome.from_json) if is_whole else None
    if run is None:
        made = make()
        folder.write_score(f"{name}.parquet", getattr(made, part))
        folder.write_json(f"{name}.json", made.to_json())
        # As it reads back, so that an interrupted run ends like one that was not.
        run = Outcome.from_json(json.loads(json.dumps(made.to_json())))
    score = folder.with_documents(f"{name}.parquet", getattr(run, part))
    return replace(run, search=score) if part == "search" else replace(run, report=score)


def is_stored(folder: RunFolder, name: str) -> bool:
    """True if `stored_run` has stored a run of this name."""
    return all((folder.path / f"{name}{ending}").is_file() for ending in (".json", ".parquet"))


def baseline_label(ranks: Sequence[int]) -> str:
    """Names LoRA by its ranks: ``LoRA r=8``, or ``LoRA r=5 to 6`` where they are mixed."""
    least, most = min(ranks), max(ranks)
    return f"LoRA r={most}" if least == most else f"LoRA r={least} to {most}"


class Reason(enum.StrEnum):
    """Why a competitor was not compared."""

    SAME = "the baseline itself"
    FAILED = "a fine-tune failed"


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Rules of the race: seeds, confidence and metrics.

    Attributes:
        seeds: Fresh seeds, the same for all allocations.
        confidence: One less the error rate, of all comparisons together, in (0, 1).
        metric: The decisive metric.
        weights: Weight per task of the verdict.
    """

    seeds: tuple[int, ...]
    confidence: float
    metric: str
    weights: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One entrant of the race.

    Attributes:
        label: `FINALIST`, `BEST_RANDOM`, `TUNED`, `STACK`, or the name of a recovery method.
        allocation: What is fine-tuned.
        baseline: What it is compared with; the same where there is nothing to compare.
        is_ranks: True if it differs from its baseline in the ranks alone.
    """

    label: str
    allocation: RankAllocation
    baseline: RankAllocation
    is_ranks: bool = False


@dataclass(frozen=True, kw_only=True)
class Competitor(Entrant):
    """An entrant after the race.

    Attributes:
        reason: Why it was not compared; None if it was.
        detail: What failed, empty otherwise.
        comparison: It minus its baseline in the decisive metric; None if it was not compared.
    """

    reason: Reason | None = None
    detail: str = ""
    comparison: Difference | None = None

    @property
    def is_method(self) -> bool:
        """True if it entered as a recovery method of the run file."""
        return self.label not in (FINALIST, BEST_RANDOM, TUNED, STACK)

    @property
    def is_gain(self) -> bool:
        """True if it is better than its baseline beyond noise."""
        return self.comparison is not None and self.comparison.is_gain


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """Results of the fresh seeds.

    Attributes:
        rules: What the race was about.
        runs: Runs by allocation, one per seed; fewer of one that failed.
        competitors: The finalists, best of the search first, then the best random allocation, then
            the recovery methods. None where LoRA ran alone.
        reference: LoRA by the recipe.
    """

    rules: Rules
    runs: Mapping[RankAllocation, Runs]
    competitors: tuple[Competitor, ...]
    reference: RankAllocation

    @classmethod
    def of(
        cls,
        rules: Rules,
        runs: Mapping[RankAllocation, Runs],
        entrants: Sequence[Entrant],
        reference: RankAllocation,
        failed: Mapping[RankAllocation, str],
    ) -> Confirmed:
        """Compares each entrant with its baseline.

        Args:
            rules: What the race is about.
            runs: Finished runs by allocation.
            entrants: What entered.
            reference: LoRA by the recipe.
            failed: Allocations of which a fine-tune failed, and how.
        """
        confirmed = cls(rules=rules, runs=runs, competitors=(), reference=reference)
        count = comparisons(entrants)

        def result(entrant: Entrant) -> Competitor:
            fields = vars(entrant)
            if entrant.allocation == entrant.baseline:
                return Competitor(**fields, reason=Reason.SAME)
            for allocation in (entrant.allocation, entrant.baseline):
                if allocation in failed:
                    return Competitor(**fields, reason=Reason.FAILED, detail=failed[allocation])
            comparison = confirmed._compared(entrant, rules.metric, count)
            return Competitor(**fields, comparison=comparison)

        return replace(confirmed, competitors=tuple(map(result, entrants)))

    @property
    def comparisons(self) -> int:
        """Number of comparisons that intervals and verdicts are corrected for, at least 1."""
        return comparisons(self.competitors)

    @property
    def chosen(self) -> Competitor | None:
        """What the first sentence is about; None if nothing was compared with the recipe.

        What is delivered, or else the one with the greatest difference from the recipe.
        """
        return self._best(self._gains()) or self._best(
            [c for c in self.competitors if c.comparison is not None and not c.is_ranks]
        )

    @property
    def ranks(self) -> Competitor | None:
        """The rank allocation that the second sentence is about; None if none was compared.

        That with the greatest difference: of those that are a gain or, if there is none, of all.
        """
        compared = [c for c in self.competitors if c.is_ranks and c.comparison is not None]
        gains = [c for c in compared if c.is_gain]
        return max(gains or compared, key=_estimate) if compared else None

    @property
    def searched(self) -> RankAllocation | None:
        """The best rank allocation that was searched or given; None if there is none."""
        found = [
            c
            for c in self.competitors
            if c.label in (FINALIST, BEST_RANDOM) and c.comparison is not None
        ]
        gains = [c for c in found if c.is_gain]
        return max(gains or found, key=_estimate).allocation if found else None

    @property
    def methods(self) -> dict[str, RankAllocation]:
        """The recovery methods that were compared, by name."""
        compared = (c for c in self.competitors if c.is_method and c.comparison is not None)
        return {c.label: c.allocation for c in compared}

    @property
    def baseline(self) -> RankAllocation:
        """Even ranks on the stack: what the ranks are compared with, or else would be."""
        ranks = self.ranks or next((c for c in self.competitors if c.is_ranks), None)
        if ranks is not None:
            return ranks.baseline
        stack = self._labeled(STACK) or self._labeled(TUNED)
        return self.reference if stack is None else stack.allocation

    @property
    def delivered(self) -> RankAllocation:
        """What is shown to gain over the recipe, the best of it; the recipe's LoRA otherwise."""
        best = self._best(self._gains())
        return self.reference if best is None else best.allocation

    def _gains(self) -> list[Competitor]:
        """Returns the competitors that may be delivered: those shown to gain over the recipe.

        Ranks have to gain over even ones first. So each of them, and tuned LoRA behind the stack,
        is tested where the test before it has passed, which takes no further error rate.
        """
        stack = self._labeled(STACK)
        return [
            c
            for c in self.competitors
            if c.is_gain
            and (c.label != TUNED or stack is None or stack.is_gain)
            and (not c.is_ranks or self._over_recipe(c, self.rules.metric).is_gain)
        ]

    def _over_recipe(self, competitor: Competitor, metric: str) -> Difference:
        against = replace(competitor, baseline=self.reference)
        return self._compared(against, metric, self.comparisons)

    def _best(self, competitors: Sequence[Competitor]) -> Competitor | None:
        """Returns the one with the greatest difference from the recipe, the first of equal ones."""
        metric, weights = self.rules.metric, self.rules.weights

        def mean(competitor: Competitor) -> float:
            scores = self.reports(competitor.allocation)
            return sum(score.mean(metric, weights) for score in scores) / len(scores)

        return max(competitors, key=mean, default=None)

    def _labeled(self, label: str) -> Competitor | None:
        return next((c for c in self.competitors if c.label == label), None)

    @property
    def models(self) -> dict[str, RankAllocation]:
        """Models that reports and comparisons show, by name; each of even ranks once."""
        models: dict[str, RankAllocation] = {}
        if self.reference != self.baseline:
            models[RECIPE] = self.reference
        tuned = self._labeled(TUNED)
        if tuned is not None and tuned.allocation not in (self.reference, self.baseline):
            models |= {DEFAULT_RANK: tuned.allocation} if self._is_whole(tuned.allocation) else {}
        if self._is_whole(self.baseline):
            models[UNIFORM] = self.baseline
        stack = self._labeled(STACK)
        if stack and stack.allocation not in models.values() and self._is_whole(stack.allocation):
            models[STACK] = stack.allocation
        if self.searched is not None:
            models[SEARCHED] = self.searched
        return models | self.methods | {RECOVERED: self.delivered}

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the models of even ranks by name; they state the ranks."""
        models = self.models
        tuned = " on the stack" if self._labeled(STACK) else ", tuned"
        what = {
            RECIPE: " by the recipe",
            DEFAULT_RANK: ", tuned",
            STACK: " on the stack",
            UNIFORM: "" if self.baseline == self.reference else tuned,
        }
        if not (self._labeled(STACK) or self._labeled(TUNED)):
            what = dict.fromkeys(what, "")  # nothing but ranks differs
        return {
            name: baseline_label(models[name].ranks) + text
            for name, text in what.items()
            if name in models
        }

    @property
    def fine_tunes(self) -> int:
        """Number of fine-tunes that were scored."""
        return sum(map(len, self.runs.values()))

    def reports(self, allocation: RankAllocation) -> list[Score]:
        """Returns an allocation's scores on the report documents, one per seed that it ran with."""
        return [run.report for run in self.runs.get(allocation, ()) if run.report]

    def seeds_of(self, allocation: RankAllocation) -> tuple[int, ...]:
        """Returns the seeds that an allocation ran with."""
        return self.rules.seeds[: len(self.runs.get(allocation, ()))]

    def differences(self, metrics: Sequence[str]) -> dict[str, Difference]:
        """Compares the chosen competitor with the recipe, by metric; empty if there is none."""
        chosen = self.chosen
        if chosen is None or chosen.allocation == self.reference:
            return {}
        return {metric: self._over_recipe(chosen, metric) for metric in metrics}

    def differences_of_ranks(self, metrics: Sequence[str]) -> dict[str, Difference]:
        """Compares the ranks of the second sentence with even ones, by metric; empty without."""
        ranks = self.ranks
        if ranks is None:
            return {}
        return {metric: self._compared(ranks, metric, self.comparisons) for metric in metrics}

    def _whole(self) -> list[RankAllocation]:
        """Returns what ran with all seeds."""
        return [allocation for allocation in self.runs if self._is_whole(allocation)]

    def _is_whole(self, allocation: RankAllocation) -> bool:
        return self.seeds_of(allocation) == self.rules.seeds

    def _model(self, allocation: RankAllocation, metric: str) -> Model:
        seeds, scores = self.seeds_of(allocation), self.reports(allocation)
        return model_of(dict(zip(seeds, scores, strict=True)), metric)

    def _compared(self, entrant: Entrant, metric: str, comparisons: int) -> Difference:
        return compare(
            self._model(entrant.allocation, metric),
            self._model(entrant.baseline, metric),
            metric,
            self.rules.weights,
            confidence=self.rules.confidence,
            comparisons=comparisons,
            race=[self._model(allocation, metric) for allocation in self._whole()],
        )

    def to_json(self, parameters: Callable[[RankAllocation], int]) -> dict[str, Any]:
        """Returns plain values for the report, without scores.

        Args:
            parameters: Tells how many parameters a fine-tune trains.
        """
        return {
            "error_rate": round(1 - self.rules.confidence, 12),  # 0.05, not 0.050000000000000044
            "confidence": self.rules.confidence,
            "comparisons": self.comparisons,
            "metric": self.rules.metric,
            "seeds": list(self.rules.seeds),
            "fine_tunes": self.fine_tunes,
            "baselines": [
                {
                    "name": self._name(allocation),
                    "label": self.labels.get(
                        self._name(allocation) or "", baseline_label(allocation.ranks)
                    ),
                    "ranks": list(allocation.ranks),
                    "settings": dict(allocation.settings),
                    "parameters": parameters(allocation),
                    "is_recipe": allocation == self.reference,
                }
                for allocation in self._baselines()
            ],
            "competitors": [self._entry(competitor) for competitor in self.competitors],
            "files": [
                [f"{run_path(allocation, seed)}.parquet" for seed in self.rules.seeds]
                for allocation in self._whole()
            ],
        }

    def _baselines(self) -> list[RankAllocation]:
        """Returns the baselines of the competitors, the decisive one first, and the default."""
        every = (self.baseline, *(c.baseline for c in self.competitors), self.reference)
        return [allocation for allocation in dict.fromkeys(every) if self._is_whole(allocation)]

    def _name(self, allocation: RankAllocation) -> str | None:
        """Returns the name of an allocation among the models; None if it has none."""
        return next((name for name, a in self.models.items() if a == allocation), None)

    def _baseline_text(self, competitor: Competitor) -> str:
        name = self._name(competitor.baseline) or ""
        return self.labels.get(name, baseline_label(competitor.baseline.ranks))

    def _entry(self, competitor: Competitor) -> dict[str, Any]:
        runs = self.runs.get(competitor.allocation, ())
        compared = competitor.comparison is not None
        ours, theirs = (self.reports(a) for a in (competitor.allocation, competitor.baseline))
        metric, weights = self.rules.metric, self.rules.weights
        return {
            "label": competitor.label,
            **competitor.allocation.to_json(),
            "baseline": list(competitor.baseline.ranks),
            "baseline_settings": dict(competitor.baseline.settings),
            "baseline_label": self._baseline_text(competitor),
            "model": self._name(competitor.allocation) if compared else None,
            "baseline_model": self._name(competitor.baseline),
            "is_ranks": competitor.is_ranks,
            "chosen": competitor in (self.chosen, self.ranks),
            "search_objective": sum(r.objective for r in runs) / len(runs) if runs else None,
            "per_seed": [
                a.mean(metric, weights) - b.mean(metric, weights)
                for a, b in zip(ours, theirs, strict=True)
            ]
            if compared
            else [],
            "reason": competitor.reason and competitor.reason.value,
            "detail": competitor.detail,
            "comparison": competitor.comparison and competitor.comparison.to_json(),
        }


def comparisons(entrants: Sequence[Entrant]) -> int:
    """Returns the number of comparisons that the error rate is shared out among, at least 1.

    Tuned LoRA beside a stack takes no part of it: it is delivered only after the stack has passed.
    """
    labels = {entrant.label for entrant in entrants}
    compared = [e for e in entrants if e.allocation != e.baseline]
    return max(1, sum(e.label != TUNED or STACK not in labels for e in compared))


def _estimate(competitor: Competitor) -> float:
    return competitor.comparison.estimate if competitor.comparison is not None else -math.inf


logger = logging.getLogger(__name__)

LEAST_SEEDS = 3
"""Fewest seeds of a race that can have a verdict."""

FRESH = 1_000_000
"""Distance of the race's seeds from the seed of the search."""


def check(config: RunConfig) -> None:
    """Checks the tables ``[noise]`` and ``[confirm]`` against the rest of the run file.

    Raises:
        ConfigError: If a setting cannot have an effect.
    """
    if config.confirm.best_random and not config.searches:
        why = "[search] allocation names the ranks"
        if not config.races_ranks:
            why = f'[recovery] methods {list(config.recovery.methods)} lacks "rankadaptor"'
        raise ConfigError(
            "[confirm] best_random takes as many random allocations as the search makes trials, "
            f"but nothing is searched: {why}. Leave one of them out."
        )


def fresh_seeds(seed: int, count: int) -> tuple[int, ...]:
    """Returns seeds that no trial of the search used, as many as asked for."""
    return tuple(seed + FRESH + i for i in range(count))


class Confirmation:
    """Runs the race; finished runs are read from the run folder, failed ones from the store.

    Args:
        run: Fine-tunes an allocation with a seed and scores it on both sets of documents.
        folder: Run folder, where each run's scores are kept.
        store: Study that records each run as a trial.
        rules: What the race is about.
        on_run: Told the number of finished runs and of all runs, after each.
        is_whole: Tells of a run whose scores are kept whether all else that it left is there too.
        allows: Says whether there is time for so many more runs, and for those needed raises where
            there is none.
    """

    def __init__(
        self,
        *,
        run: Callable[[RankAllocation, int], Outcome],
        folder: RunFolder,
        store: TrialStore,
        rules: Rules,
        on_run: Callable[[int, int], None],
        is_whole: Callable[[RankAllocation, int], bool] = lambda allocation, seed: True,
        allows: Callable[..., bool] = lambda runs, needed: True,
    ) -> None:
        self._run, self._folder, self._store, self._rules = run, folder, store, rules
        self._on_run, self._is_whole, self._allows = on_run, is_whole, allows
        self._recorded = {(trial.allocation, trial.seed): trial for trial in store.trials()}

    def confirm(self, entrants: Sequence[Entrant], reference: RankAllocation) -> Confirmed:
        """Runs the race; without entrants the reference runs alone.

        An entrant that is its own baseline needs no runs and cannot gain. One of which a fine-tune
        diverges or cannot be scored is out.

        Args:
            entrants: What enters; of several with the same allocation the first.
            reference: LoRA by the recipe, which runs in any case.

        Raises:
            RecoveryError: If a fine-tune of the reference diverges; there is no other to take.
            OracleError: If it cannot be scored.
        """
        distinct = list({entrant.allocation: entrant for entrant in reversed(entrants)}.values())
        distinct.sort(key=entrants.index)
        racing = [entrant for entrant in distinct if entrant.allocation != entrant.baseline]
        needed = [reference]
        baselines = [entrant.baseline for entrant in racing]
        every = dict.fromkeys([reference, *baselines, *(entrant.allocation for entrant in racing)])
        runs: dict[RankAllocation, list[Outcome]] = {a: [] for a in every}
        failed: dict[RankAllocation, str] = {}
        seeds = self._rules.seeds
        done, total = 0, len(every) * len(seeds)
        for index, seed in enumerate(seeds):
            entered = [a for a in every if a not in failed]
            missing = sum(not self._is_stored(a, seed) for a in entered)
            if index >= LEAST_SEEDS and missing and not self._allows(missing, needed=False):
                seeds = seeds[:index]
                break
            for allocation in entered:
                if index < LEAST_SEEDS and not self._is_stored(allocation, seed):
                    self._allows(1, needed=True)
                try:
                    if allocation not in needed:
                        self._check_not_failed(allocation, seed)
                    runs[allocation].append(self._result(allocation, seed))
                except (RecoveryError, OracleError) as error:
                    # It ran first: what fails now is no fault of the corpus or the oracle.
                    if allocation in needed:
                        raise
                    logger.warning("Out: %s with seed %d failed: %s", allocation, seed, error)
                    self._record(allocation, seed, str(error))
                    failed[allocation] = str(error)
                    total -= len(seeds) - index - 1
                done += 1
                self._on_run(done, total)
        finished = {allocation: tuple(several) for allocation, several in runs.items()}
        rules = replace(self._rules, seeds=seeds)
        return Confirmed.of(rules, finished, distinct, reference, failed)

    def _is_stored(self, allocation: RankAllocation, seed: int) -> bool:
        name = run_path(allocation, seed)
        return is_stored(self._folder, name) and self._is_whole(allocation, seed)

    def _result(self, allocation: RankAllocation, seed: int) -> Outcome:
        """Returns a run, made anew only where it was not finished."""

        def make() -> Outcome:
            run = self._run(allocation, seed)
            if run.report is None or not run.is_finite():
                raise RecoveryError(
                    "A score on the report documents is absent or not a finite number. Lower "
                    "[recovery] learning_rate or check the oracle's tasks."
                )
            return run

        name = run_path(allocation, seed)
        is_whole = self._is_whole(allocation, seed)
        result = stored_run(self._folder, name, make, "report", is_whole=is_whole)
        self._record(allocation, seed, result)
        return result

    def _check_not_failed(self, allocation: RankAllocation, seed: int) -> None:
        earlier = self._recorded.get((allocation, seed))
        if earlier is not None and earlier.state is TrialState.FAILED:
            raise RecoveryError(earlier.reason)

    def _record(self, allocation: RankAllocation, seed: int, result: Outcome | str) -> None:
        """Stores a run as a trial, once; the text is the reason of a failed one."""
        place: dict[str, Any] = {
            "position": len(self._recorded),
            "phase": Phase.CONFIRMATION,
            "allocation": allocation,
            "seed": seed,
        }
        if isinstance(result, str):
            trial = Trial(state=TrialState.FAILED, reason=result, **place)
        else:
            trial = result.trial(**place)
        earlier = self._recorded.get((allocation, seed))
        if earlier is None or earlier.state is not trial.state:
            self._store.add(trial)
            self._recorded[allocation, seed] = trial
