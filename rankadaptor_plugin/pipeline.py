"""A whole run: load, evaluate, prune, recover, report. Finished stages are skipped."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from rankadaptor_plugin import plugin_list, run_file
from rankadaptor_plugin.base_model import (
    check_folder,
    load_model,
    load_tokenizer,
)
from rankadaptor_plugin.context import Oracle, OracleSettings, Recovered, RunContext
from rankadaptor_plugin.corpus import calibration_samples, load_corpus
from rankadaptor_plugin.device import (
    device_name,
    peak_memory_bytes,
    resolve_device,
    resolve_dtype,
    threads,
)
from rankadaptor_plugin.embedded_default import corpus_file, model_folder
from rankadaptor_plugin.errors import ArtifactError, PluginError
from rankadaptor_plugin.pruned_model import PrunedModel, load_pruned
from rankadaptor_plugin.report import write_report
from rankadaptor_plugin.run_folder import RunFolder, digest
from rankadaptor_plugin.scores import Score
from rankadaptor_plugin.study import TrialStore
from rankadaptor_plugin.summary import report_data
from rankadaptor_plugin.trials import TrialState

if TYPE_CHECKING:
    from collections.abc import Callable

    import pluggy
    from transformers import PreTrainedModel

    from rankadaptor_plugin.config import RunConfig


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        verdict: The sentence that the report opens with.
        folder: The run folder.
        adapter: The delivered adapter, a PEFT folder.
        report: All of report.json.
    """

    verdict: str
    folder: Path
    adapter: Path
    report: dict[str, Any]


def run(
    config: RunConfig,
    manager: pluggy.PluginManager,
    *,
    pruned: PrunedModel | None = None,
    began: float | None = None,
) -> RunResult:
    """Runs all stages whose results are not in the run folder yet.

    Args:
        config: The run file.
        manager: Plugins.
        pruned: A model that was pruned already; the pruning stage is then left out.
        began: ``time.perf_counter()`` at the start of the program, to count its imports in.

    Raises:
        RankAdaptorError: Whatever is wrong with the inputs or goes wrong on the way.
    """
    folder = RunFolder(Path(config.output))
    with folder.opened(), threads(config.threads):
        return _Run(config, manager, folder, pruned, began or time.perf_counter()).result()


class _Run:
    """One session of a run; holds what its stages share."""

    def __init__(
        self,
        config: RunConfig,
        manager: pluggy.PluginManager,
        folder: RunFolder,
        given: PrunedModel | None,
        began: float,
    ) -> None:
        self.config, self.folder, self.hook, self.given = config, folder, manager.hook, given
        self.evaluation_seconds = 0.0
        self._base: PreTrainedModel | None = None
        self._progress("load", 0)
        found = plugin_list.registries(manager)
        self.pruner = found.pruners.get(config.prune.method)
        make_oracle = found.oracles.get(config.oracle.name)
        found.samplers.get(config.search.sampler)
        found.performance_models.get(config.performance_model.name)
        self.device = given.model.device if given else resolve_device(config.device)
        self.source = model_folder(config.model)
        check_folder(self.source)
        corpus_path = corpus_file(config.corpus.path)
        self.tokenizer = (
            given.tokenizer
            if given
            else load_tokenizer(self.source, trust_remote_code=config.trust_remote_code)
        )
        corpus = load_corpus(
            corpus_path,
            self.tokenizer,
            template=config.corpus.template,
            max_tokens=config.corpus.max_tokens,
            limit=config.corpus.limit,
        )
        paths = [Path(config.oracle.task_path)] if config.oracle.task_path else []
        paths += manager.hook.rankadaptor_lm_eval_task_paths()
        oracle = make_oracle(
            OracleSettings(
                config=config.oracle,
                tokenizer=self.tokenizer,
                task_paths=tuple(paths),
                seed=config.seed,
            )
        )
        self._claim(self._inputs(corpus_path, oracle))
        self.context = RunContext(
            config=config,
            folder=folder.path,
            registries=found,
            hook=manager.hook,
            oracle=oracle,
            corpus=corpus,
        )
        folder.add_seconds("load", time.perf_counter() - began)
        self._progress("load", 1)

    def result(self) -> RunResult:
        """Runs the stages in order and returns what they left."""
        base = self._evaluated("base", self._base_model)
        pruned = self._pruned()
        scores = {"base": [base], "pruned": [self._evaluated("pruned", lambda: pruned.model)]}
        recovered = self._recovered(pruned)
        if "scores" not in recovered.summary:
            scores["recovered"] = [self._evaluated_adapter(pruned, recovered.adapter)]
        self._progress("report", 0)
        data = report_data(
            pruned,
            recovered,
            scores,
            self.context,
            timings=self.folder.timings(),
            evaluation_seconds=self.evaluation_seconds,
            peak_memory_bytes=peak_memory_bytes(self.device),
            device=device_name(self.device),
        )
        write_report(self.folder.path, data)
        self._progress("report", 1)
        return RunResult(
            verdict=data["verdict"]["sentence"],
            folder=self.folder.path,
            adapter=recovered.adapter,
            report=dict(data),
        )

    def _recovered(self, pruned: PrunedModel) -> Recovered:
        """Calls the recovery stage; what it does not time itself counts as ``recover``."""
        began, timed = time.perf_counter(), sum(self.folder.timings().values())
        recovered = self.hook.rankadaptor_post_prune(pruned=pruned, context=self.context)
        if not isinstance(recovered, Recovered):
            raise PluginError(
                f"The recovery stage returned {type(recovered).__name__}, not Recovered. Repair "
                "the plugin that implements rankadaptor_post_prune."
            )
        if "scores" not in recovered.summary:
            own = sum(self.folder.timings().values()) - timed
            self.folder.add_seconds("recover", max(0.0, time.perf_counter() - began - own))
        return recovered

    def _evaluated_adapter(self, pruned: PrunedModel, adapter: Path) -> Score:
        """Scores the adapter of a foreign stage, which may be another one than last time."""
        wrapped: list[PeftModel] = []

        def load() -> PeftModel:
            wrapped.append(PeftModel.from_pretrained(pruned.model, adapter))
            return wrapped[0]

        try:
            return self._evaluated("recovered", load, of=digest(adapter))
        finally:
            for model in wrapped:
                model.unload()

    def _claim(self, inputs: dict[str, Any]) -> None:
        """Claims the folder; one without a report or complete trial is taken over.

        So whoever corrects a setting that made a run fail need not clean up after it.
        """
        try:
            self.folder.claim(inputs)
        except ArtifactError:
            if self._has_results():
                raise
            logger.warning("%s was begun with other settings; it begins anew", self.folder.path)
            self.folder.clear()
            self.folder.claim(inputs)

    def _has_results(self) -> bool:
        if (self.folder.path / "report.json").exists():
            return True
        if not (self.folder.path / "study.db").exists():
            return False
        with TrialStore.open(self.folder.study_url, "search") as store:
            return any(trial.state is TrialState.COMPLETE for trial in store.trials())

    def _inputs(self, corpus: Path, oracle: Oracle) -> dict[str, Any]:
        """What must not change between two sessions in one run folder."""
        config = run_file.to_dict(self.config)
        # A search may be prolonged, and a run may move to another machine or device.
        for key in ("output", "model", "device", "threads"):
            del config[key]
        del config["search"]["max_trials"]
        config["corpus"].pop("path")
        config["oracle"].pop("task_path")
        return {
            "config": config,
            "model": digest(self.source),
            "pruned model": self.given.weights_digest() if self.given else None,
            "corpus": digest(corpus),
            "documents": oracle.describe()["digest"],
        }

    def _base_model(self) -> PreTrainedModel:
        """Loads the base model, once for its evaluation and its pruning together."""
        if self._base is None:
            self._base = load_model(
                self.source,
                device=self.device,
                dtype=resolve_dtype(self.config.dtype, self.device),
                trust_remote_code=self.config.trust_remote_code,
            )
        return self._base

    def _evaluated(
        self, name: str, model: Callable[[], PreTrainedModel | PeftModel], of: str = ""
    ) -> Score:
        """Returns a model's score on the report documents, kept from an earlier session if any."""
        file = f"evaluations/{name}{of and f'-{of}'}.json"
        self._progress(f"evaluate {name}", 0)
        if (kept := self.folder.read_json(file)) is None:
            with self.folder.timed("evaluate"):
                loaded = model()
                began = time.perf_counter()
                score = self.context.oracle.score(loaded, "report")
                seconds = time.perf_counter() - began
            kept = {"score": score.to_json(per_document=True), "seconds": seconds}
            self.folder.write_json(file, kept)
        self.evaluation_seconds += kept["seconds"]
        self._progress(f"evaluate {name}", 1)
        return Score.from_json(kept["score"])

    def _pruned(self) -> PrunedModel:
        """Returns the pruned model, always as it reads back from disk."""
        self._progress("prune", 0)
        if not self.folder.pruned.is_dir():
            with self.folder.timed("prune"):
                pruned = self.given or self.pruner(
                    self._base_model(),
                    self.tokenizer,
                    calibration_samples(
                        self.context.corpus,
                        self.config.prune.calibration_samples,
                        self.config.prune.calibration_tokens,
                        self.config.seed,
                    ),
                    self.config.prune,
                )
                pruned.save(self.folder.pruned)
        self._base = None  # from here on the pruned model alone is needed
        pruned = self.given or load_pruned(
            self.folder.pruned,
            device=self.device,
            dtype=resolve_dtype(self.config.dtype, self.device),
        )
        self._progress("prune", 1)
        return pruned

    def _progress(self, stage: str, done: int) -> None:
        self.hook.rankadaptor_on_progress(stage=stage, done=done, total=1)
