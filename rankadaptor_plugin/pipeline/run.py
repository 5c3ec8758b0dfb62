"""A whole run: load, prune, evaluate, recover, report. Finished stages are skipped."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rankadaptor_plugin.core.errors import PluginError, UnsupportedModelError
from rankadaptor_plugin.core.run_folder import PREDICTIONS, RunFolder, digest
from rankadaptor_plugin.core.scores import Score
from rankadaptor_plugin.models.checkpoints import load_model
from rankadaptor_plugin.models.device import (
    device_name,
    faster_attention,
    forget_peak_memory,
    peak_memory_bytes,
    set_attention,
    threads,
)
from rankadaptor_plugin.models.pruned_model import load_pruned
from rankadaptor_plugin.models.sources import quantized_before
from rankadaptor_plugin.pipeline.base_model import BaseModel
from rankadaptor_plugin.pipeline.compensation_step import compensated, needs_compensation
from rankadaptor_plugin.pipeline.context import Recovered, Summary
from rankadaptor_plugin.pipeline.plan import Plan, Planner
from rankadaptor_plugin.pipeline.preparation import Prepared, prepare
from rankadaptor_plugin.pipeline.record import recorded
from rankadaptor_plugin.pipeline.stage import measure_noise
from rankadaptor_plugin.pipeline.summary import Measured, foreign_summary, report_data
from rankadaptor_plugin.pipeline.texts import sample_texts
from rankadaptor_plugin.recovery.adapters import base_of
from rankadaptor_plugin.recovery.batches import batches, padded
from rankadaptor_plugin.recovery.files import load as load_adapter
from rankadaptor_plugin.recovery.fused_lora import fused
from rankadaptor_plugin.recovery.teacher import LiveTeacher, with_teacher
from rankadaptor_plugin.report.report import write_report
from rankadaptor_plugin.report.words import verdict_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pluggy
    from transformers import PreTrainedModel

    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.pruning.compensation import Compensation
    from rankadaptor_plugin.report.schema import Entry, ReportData, Result


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Result of a run.

    Attributes:
        verdict: What the report opens with: what is recovered, what was gained over LoRA by the
            recipe, what the ranks alone gave, and what else it cost; a line each.
        folder: The run folder.
        adapter: The delivered adapter, a PEFT folder.
        report: All of report.json.
    """

    verdict: str
    folder: Path
    adapter: Path
    report: dict[str, Any] = field(repr=False)


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
    with folder.opened(), threads(config.threads), recorded(folder, config, manager) as record:
        prepared = prepare(config, manager, folder, pruned, began or time.perf_counter())
        record.prepared(prepared)
        session = _Session(prepared, folder, pruned)
        session.planned()
        session.prune()
        base = session.evaluated("base", session.base_model)
        session.distill()
        model = session.pruned()
        scores = {"base": [base], "pruned": [session.evaluated("pruned", lambda: model.model)]}
        if compensation := session.compensate(model):
            with compensation.applied(model.model):
                scores["compensated"] = [session.evaluated("compensated", lambda: model.model)]
        with session.recovery_timed():
            recovered = session.context.hook.rankadaptor_post_prune(
                pruned=model, context=session.context
            )
        if not isinstance(recovered, Recovered):
            raise PluginError(
                f"The recovery stage returned {type(recovered).__name__}, not Recovered. Repair "
                "the plugin that implements rankadaptor_post_prune."
            )
        summary = recovered.summary
        if summary is None:
            scores["recovered"] = [session.evaluated_adapter(model, recovered.adapter)]
            summary = foreign_summary(recovered, session.context)
        data = session.report(model, summary, scores)
        return RunResult(
            verdict="\n".join(verdict_lines(data)),
            folder=folder.path,
            adapter=recovered.adapter,
            report=dict(data),
        )


def plan(config: RunConfig, manager: pluggy.PluginManager, *, began: float | None = None) -> Plan:
    """Says what is left of a run; nothing is written.

    Args:
        config: The run file.
        manager: Plugins.
        began: ``time.perf_counter()`` at the start of the program, to count its imports in.

    Raises:
        RankAdaptorError: If anything is wrong with the inputs, or the run does not fit into memory
            or time.
    """
    folder = RunFolder(Path(config.output))
    with threads(config.threads):
        began = began or time.perf_counter()
        prepared = prepare(config, manager, folder, None, began, claims=False)
        folder = RunFolder(prepared.context.folder)
        return _Session(prepared, folder, None, writes=False).plan()


def noise(
    config: RunConfig, manager: pluggy.PluginManager, *, began: float | None = None
) -> dict[str, Any] | None:
    """Prunes the model and measures the noise floor; a later `run` goes on from there.

    Args:
        config: The run file.
        manager: Plugins.
        began: ``time.perf_counter()`` at the start of the program, to count its imports in.

    Returns:
        What `rankadaptor_plugin.verdict.noise.Noise.to_json` returns; None if too few allocations
        can be fine-tuned.

    Raises:
        RankAdaptorError: Whatever is wrong with the inputs or goes wrong on the way.
    """
    folder = RunFolder(Path(config.output))
    with folder.opened(), threads(config.threads), recorded(folder, config, manager) as record:
        prepared = prepare(config, manager, folder, None, began or time.perf_counter())
        record.prepared(prepared)
        session = _Session(prepared, folder, None)
        session.prune()
        session.distill()
        model = session.pruned()
        session.compensate(model)
        return measure_noise(model, session.context)


class _Session:
    """One session of a run: its stages, and what they share."""

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        model: PrunedModel | None,
        *,
        writes: bool = True,
    ) -> None:
        self.prepared, self.folder, self.model, self.writes = prepared, folder, model, writes
        self.context = prepared.context
        self.config = prepared.context.config
        spread = bool(self.config.device_map)
        self.base_model = BaseModel(self._load_base, None if spread else prepared.device)
        self.evaluation_seconds = 0.0
        self.results: dict[str, list[Result]] = {}

    def planned(self) -> None:
        """Plans what is left, unless that is nothing; from now on time is watched by it."""
        if (self.folder.path / "report.json").exists():
            return
        with self.folder.timed("plan"):
            plan = self.plan()
        forget_peak_memory(self.prepared.device)
        budget = self.context.budget and self.context.budget.planned(plan.costs, plan.size)
        self.context = replace(self.context, budget=budget)
        self.context.hook.rankadaptor_on_plan(plan=plan.to_json())

    def plan(self) -> Plan:
        """Returns what is left of the run.

        Raises:
            RankAdaptorError: If it does not fit into memory or time.
        """
        self._progress("plan", 0)
        planner = Planner(self.prepared, self.folder, self.model)
        planner.check_memory()
        if planner.is_pruned:
            plan = planner.plan(self.pruned().model, self.context.attention)
        else:
            base = self.base_model()
            plan = planner.plan(base, self._faster_attention(base))
        self._progress("plan", 1)
        return plan

    def report(
        self, pruned: PrunedModel, summary: Summary, scores: dict[str, list[Score]]
    ) -> ReportData:
        """Writes the report and returns what it says."""
        generation = self.texts(pruned, summary)
        self._progress("report", 0)
        measured = Measured(
            scores=scores,
            results=self.results,
            generation=generation,
            timings=self.folder.timings(),
            evaluation_seconds=self.evaluation_seconds,
            peak_memory_bytes=peak_memory_bytes(self.prepared.device),
            device=device_name(self.prepared.device),
            quantization=quantized_before(self.prepared.source),
        )
        data = report_data(pruned, summary, self.context, measured)
        write_report(self.folder.path, data)
        self._progress("report", 1)
        return data

    @contextlib.contextmanager
    def recovery_timed(self) -> Iterator[None]:
        """Counts as ``recover`` what a foreign recovery stage does not time itself.

        The built-in stage times all that it does.
        """
        began, timed = time.perf_counter(), self._timed()
        yield
        if self._timed() == timed:
            self.folder.add_seconds("recover", time.perf_counter() - began)

    def _timed(self) -> float:
        return sum(self.folder.timings().values())

    def evaluated_adapter(self, pruned: PrunedModel, adapter: Path) -> Score:
        """Scores the adapter of a foreign stage, which may be another one than last time."""
        wrapped: list[PreTrainedModel] = []

        def load() -> PreTrainedModel:
            wrapped.append(load_adapter(pruned.model, adapter))
            return wrapped[0]

        try:
            return self.evaluated("recovered", load, of=digest(adapter))
        finally:
            for model in wrapped:
                model.unload()

    def _load_base(self) -> PreTrainedModel:
        model = load_model(
            self.prepared.source,
            device=self.prepared.device,
            dtype=self.prepared.dtype,
            device_map=self.config.device_map,
            trust_remote_code=self.config.trust_remote_code,
        )
        set_attention(model, self.config.attention)
        return model

    def evaluated(self, name: str, model: Callable[[], PreTrainedModel], of: str = "") -> Score:
        """Returns a model's score on the report documents, kept from an earlier session if any."""
        file = f"evaluations/{name}{of and f'-{of}'}"
        self._progress(f"evaluate {name}", 0)
        kept = self.folder.read_result(file, _measured)
        if kept is None:
            with self.folder.timed("evaluate"):
                loaded = model()
                began = time.perf_counter()
                with fused(base_of(loaded)):  # the adapter of a foreign stage
                    score = self.context.oracle.score(loaded, "report")
                seconds = time.perf_counter() - began
            self.folder.write_score(f"{file}.parquet", score)
            content = {"score": score.to_json(), "seconds": seconds}
            self.folder.write_json(f"{file}.json", content)
            kept = _measured(content)
        score, seconds = kept
        self.evaluation_seconds += seconds
        self.results[name] = [{"file": f"{file}.parquet", "seed": None}]
        self._progress(f"evaluate {name}", 1)
        return self.folder.with_documents(f"{file}.parquet", score)

    def texts(self, pruned: PrunedModel, summary: Summary) -> list[Entry]:
        """Returns the texts; reused from an earlier session with the same settings."""
        table = self.config.generation
        if not table.max_new_tokens:
            return []
        folders = summary.adapters
        adapters_now = {n: digest(self.folder.path / folder) for n, folder in folders.items()}
        asked = {**asdict(table), "prompts": list(table.prompts), "adapters": adapters_now}
        kept = self.folder.read_json("generations.json")
        self._progress("texts", 0)
        if kept is None or kept.get("asked") != asked:
            with self.folder.timed("texts"):
                found = sample_texts(
                    pruned,
                    {name: self.folder.path / adapter for name, adapter in folders.items()},
                    self.base_model,
                    self.prepared.tokenizer,
                    self.config,
                    self._weights_of,
                )
            kept = {"asked": asked, "entries": found}
            self.folder.write_json("generations.json", kept)
        self._progress("texts", 1)
        return list(kept["entries"])

    @contextlib.contextmanager
    def _weights_of(self, adapter: Path) -> Iterator[None]:
        """Gives the pruned model the weights that an adapter was trained on."""
        compensation, model = self.context.compensation, self.pruned().model
        if compensation is None or self.folder.base_of(adapter) != self.folder.compensated:
            yield
        else:
            with compensation.applied(model):
                yield

    def distill(self) -> None:
        """Lets the unpruned model predict the corpus, if the fine-tunes are to learn from it."""
        table, corpus = self.config.recovery, self.context.corpus
        if not self.config.distills:
            return
        self._progress("teacher", 0)
        with self.folder.timed("teacher"):
            if table.distill_top_k:
                corpus = with_teacher(
                    corpus,
                    self.base_model,
                    fingerprint=f"{digest(self.prepared.source)} {self.prepared.dtype}",
                    top_k=table.distill_top_k,
                    temperature=table.distill_temperature,
                    cache=self.folder.path / PREDICTIONS,
                )
                self.context = replace(self.context, corpus=corpus)
            else:
                self.context = replace(self.context, teacher=LiveTeacher(self.base_model()))
        self._progress("teacher", 1)

    def compensate(self, pruned: PrunedModel) -> Compensation | None:
        """Fits the pruned model to the unpruned one, if some fine-tune may start from that."""
        if not needs_compensation(self.config):
            return None
        self._progress("compensate", 0)
        try:
            with self.folder.timed("compensate"):
                found = compensated(pruned, self.base_model, self.context, self.folder)
        except UnsupportedModelError as error:
            if self.config.names("compensate"):
                raise
            logger.warning("Not compensated, so the stack goes without it: %s", error)
            return None
        if self.context.teacher is not None:
            self.base_model()  # back on its device
        self.context = replace(self.context, compensation=found)
        self._progress("compensate", 1)
        return found

    def prune(self) -> None:
        """Leaves the pruned model on disk."""
        self._progress("prune", 0)
        if not self.folder.pruned.is_dir():
            with self.folder.timed("prune"), torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)  # for pruners that draw at random
                pruned = self.model or self.prepared.pruner(
                    self.base_model.to_change(),
                    self.prepared.tokenizer,
                    self.prepared.calibration,
                    self.config.prune,
                )
                pruned.save(self.folder.pruned)
        self._progress("prune", 1)

    def pruned(self) -> PrunedModel:
        """Returns the pruned model, as it reads back from disk unless it was in memory already."""
        if self.context.teacher is None:  # which predicts during the fine-tunes
            self.base_model.rest()
        if self.model is None:
            self.model = load_pruned(
                self.folder.pruned,
                device=self.prepared.device,
                dtype=self.prepared.dtype,
                device_map=self.config.device_map,
                quantize=self.config.quantize,
            )
        set_attention(self.model.model, self.config.attention)
        if self.config.attention == "auto":
            attention = self._training_attention(self.model.model)
            self.context = replace(self.context, attention=attention)
        return self.model

    def _training_attention(self, model: PreTrainedModel) -> str:
        """Returns the faster attention kernels, chosen once for all fine-tunes of a run."""
        chosen = self.folder.read_json("attention.json")
        if chosen is None:
            chosen = {"attention": self._faster_attention(model)}
            if self.writes:
                self.folder.write_json("attention.json", chosen)
        return str(chosen["attention"])

    def _faster_attention(self, model: PreTrainedModel) -> str:
        """Returns the kernels to train a model with; empty for those that the run file names."""
        if self.config.attention != "auto":
            return ""
        order = batches(self.context.corpus.sequences, 2, self.config.seed)
        return faster_attention(model, padded(next(order)).input_ids)

    def _progress(self, stage: str, done: int) -> None:
        self.context.hook.rankadaptor_on_progress(stage=stage, done=done, total=1)


def _measured(content: dict[str, Any]) -> tuple[Score, float]:
    """Returns the score, and the seconds it took, of a kept evaluation."""
    return Score.from_json(content["score"]), float(content["seconds"])
