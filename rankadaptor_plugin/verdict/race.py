"""The race of a run: what enters, what each fine-tune scored, and what all of them say together.

Each competitor is compared with LoRA of the same number of parameters, its baseline, fine-tuned
with the same seeds and scored on the same documents. LoRA of the default rank, which most people
would train, is always among the models.

`Confirmation` runs it. The best allocations of the search, perhaps the best of as many random ones,
recovery methods, and LoRA at the same parameters run with fresh seeds, one seed after the other,
and are scored on the *report* documents. Neither the seeds nor the documents chose the finalists,
and the intervals hold for all that entered together, so the verdict is not biased by any choice.
"""

from __future__ import annotations

import enum
import hashlib
import json
import logging
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

UNIFORM, DEFAULT_RANK, SEARCHED, RECOVERED = "uniform", "lora", "searched", "recovered"
"""Names of models in reports and comparisons: the baseline of the verdict, LoRA of the default
rank, the best rank allocation that was searched or given, and what is delivered."""


Runs = tuple[Outcome, ...]  # one per seed


def run_name(allocation: RankAllocation, seed: int) -> str:
    """Returns the file name, without ending, of a run; ranks of many layers would be too long."""
    return f"{hashlib.sha256(str(allocation).encode()).hexdigest()[:12]}-{seed}"


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
        label: `FINALIST`, `BEST_RANDOM`, or the name of a recovery method.
        allocation: What is fine-tuned.
        baseline: LoRA that it is compared with; the same where there is nothing to compare.
    """

    label: str
    allocation: RankAllocation
    baseline: RankAllocation


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
        """True if it entered as a recovery method, not as what a search found."""
        return self.label not in (FINALIST, BEST_RANDOM)

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
        reference: LoRA of the default rank.
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
            reference: LoRA of the default rank.
            failed: Allocations of which a fine-tune failed, and how.
        """
        confirmed = cls(rules=rules, runs=runs, competitors=(), reference=reference)
        count = sum(entrant.allocation != entrant.baseline for entrant in entrants)

        def result(entrant: Entrant) -> Competitor:
            fields = vars(entrant)
            if entrant.allocation == entrant.baseline:
                return Competitor(**fields, reason=Reason.SAME)
            if entrant.allocation in failed:
                detail = failed[entrant.allocation]
                return Competitor(**fields, reason=Reason.FAILED, detail=detail)
            comparison = confirmed._compared(entrant, rules.metric, count)
            return Competitor(**fields, comparison=comparison)

        return replace(confirmed, competitors=tuple(map(result, entrants)))

    @property
    def comparisons(self) -> int:
        """Number of comparisons that intervals and verdicts are corrected for, at least 1."""
        return max(1, sum(c.allocation != c.baseline for c in self.competitors))

    @property
    def chosen(self) -> Competitor | None:
        """The competitor that the verdict is about; None if none was compared.

        That with the greatest mean difference: of those that are a gain or, if there is none, of
        all that were compared.
        """
        return _best(self.competitors)

    @property
    def searched(self) -> RankAllocation | None:
        """The best rank allocation, by the same rule among those; None if there is none."""
        best = _best([c for c in self.competitors if not c.is_method])
        return None if best is None else best.allocation

    @property
    def methods(self) -> dict[str, RankAllocation]:
        """The recovery methods that were compared, by name."""
        compared = (c for c in self.competitors if c.is_method and c.comparison is not None)
        return {c.label: c.allocation for c in compared}

    @property
    def baseline(self) -> RankAllocation:
        """LoRA at the parameters of the chosen one, or else of the first that entered."""
        first = self.chosen or next(iter(self.competitors), None)
        return self.reference if first is None else first.baseline

    @property
    def delivered(self) -> RankAllocation:
        """The chosen allocation if it is a gain, else the baseline."""
        chosen = self.chosen
        return chosen.allocation if chosen is not None and chosen.is_gain else self.baseline

    @property
    def models(self) -> dict[str, RankAllocation]:
        """Models that reports and comparisons show, by name; LoRA of the default rank once."""
        models = {UNIFORM: self.baseline}
        if self.reference != self.baseline and self._is_whole(self.reference):
            models[DEFAULT_RANK] = self.reference
        if self.searched is not None:
            models[SEARCHED] = self.searched
        return models | self.methods | {RECOVERED: self.delivered}

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the LoRA models by name; they state the ranks."""
        models = self.models
        return {
            name: baseline_label(models[name].ranks)
            for name in (UNIFORM, DEFAULT_RANK)
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
        """Compares the chosen competitor with its baseline, by metric; empty if there is none."""
        chosen = self.chosen
        if chosen is None:
            return {}
        return {metric: self._compared(chosen, metric, self.comparisons) for metric in metrics}

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
                    "label": baseline_label(allocation.ranks),
                    "ranks": list(allocation.ranks),
                    "settings": dict(allocation.settings),
                    "parameters": parameters(allocation),
                    "is_default": allocation == self.reference,
                }
                for allocation in self._baselines()
            ],
            "competitors": [self._entry(competitor) for competitor in self.competitors],
        }

    def _baselines(self) -> list[RankAllocation]:
        """Returns the baselines of the competitors, the decisive one first, and the default."""
        every = (self.baseline, *(c.baseline for c in self.competitors), self.reference)
        return [allocation for allocation in dict.fromkeys(every) if self._is_whole(allocation)]

    def _name(self, allocation: RankAllocation) -> str | None:
        """Returns the name of an allocation among the models; None if it has none."""
        return next((name for name, a in self.models.items() if a == allocation), None)

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
            "baseline_label": baseline_label(competitor.baseline.ranks),
            "model": self._name(competitor.allocation) if compared else None,
            "baseline_model": self._name(competitor.baseline),
            "chosen": competitor is self.chosen,
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


def _best(competitors: Sequence[Competitor]) -> Competitor | None:
    """Returns the one of these that the verdict is about, the first of equal ones."""
    compared = [(c.comparison.estimate, c) for c in competitors if c.comparison is not None]
    gains = [(estimate, c) for estimate, c in compared if c.is_gain]
    return max(gains or compared, key=lambda entry: entry[0])[1] if compared else None


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
            reference: LoRA of the default rank, which runs in any case.

        Raises:
            RecoveryError: If a fine-tune of a baseline diverges; there is no other to take.
            OracleError: If it cannot be scored.
        """
        distinct = list({entrant.allocation: entrant for entrant in reversed(entrants)}.values())
        distinct.sort(key=entrants.index)
        racing = [entrant for entrant in distinct if entrant.allocation != entrant.baseline]
        needed = [entrant.baseline for entrant in racing or distinct[:1]] or [reference]
        every = dict.fromkeys([*needed, reference, *(entrant.allocation for entrant in racing)])
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
                    # Baselines ran first: what fails now is no fault of the corpus or the oracle.
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
        name = f"evaluations/{run_name(allocation, seed)}"
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

        name = f"evaluations/{run_name(allocation, seed)}"
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
