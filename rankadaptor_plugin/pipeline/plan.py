"""The plan of a run: what its stages take, before any of the long work begins.

The shapes of the base and of the pruned model say what memory it takes. A few passes of a fine-tune
and two of an evaluation, on the run's own data, say how long: of the pruned model where the run
folder has one, else of the base model, in proportion to the parameters. What does not fit into
memory or time is refused, or cut, here.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from rankadaptor_plugin.config.tables import GENERATE
from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.models.checkpoints import meta_model
from rankadaptor_plugin.models.device import attending, devices, free_memory_bytes, resident_bytes
from rankadaptor_plugin.models.footprint import footprint, on_meta
from rankadaptor_plugin.models.structures import decoder_layers
from rankadaptor_plugin.oracle.oracle import Cost, evaluation_cost
from rankadaptor_plugin.pipeline import compensation_step
from rankadaptor_plugin.pipeline.base_model import has_room
from rankadaptor_plugin.pipeline.budget import (
    Budget,
    Costs,
    Done,
    Size,
    cut,
    fine_tunes,
    seconds_of,
    smallest,
)
from rankadaptor_plugin.pipeline.stage import check_ranks
from rankadaptor_plugin.pipeline.texts import prompts
from rankadaptor_plugin.pruning.calibration import LIMITS, micro_batches
from rankadaptor_plugin.pruning.checks import shape_after
from rankadaptor_plugin.recovery.cost import fine_tune_pace, training_bytes
from rankadaptor_plugin.recovery.slots import rank_costs
from rankadaptor_plugin.report.words import duration, size
from rankadaptor_plugin.search.study import TrialStore
from rankadaptor_plugin.verdict.race import fresh_seeds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.core.run_folder import RunFolder
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.pipeline.preparation import Prepared

_HOUR = 3600.0
_QUANTIZED = {"8bit": 1.0, "4bit": 0.6}  # bytes per parameter
_PASSES = {"taylor": 2.0, "wanda": 0.4, "ppl": 0.4}
"""What a pruner does with its sequences, in passes of a fine-tune, which knows no gradients of
weights: forward, again forward, and back through all of it; or forward alone."""
_FORWARD = 0.4  # of a pass of a fine-tune
_FITTED = 4.0  # forward passes of the pruned model, while it is fitted, and its products
_GENERATED = 25.0  # texts written one by one, in the time of those that compensation reads
_WRITTEN = 200e6  # bytes of weights that are written or read in a second
_REPORT_SECONDS = 3.0
_SURE = 0.9  # of what a pass is predicted to take, before a run is refused for it
_TOKENS = 3  # written to time them
_LOGITS = 2**24  # most of an evaluation that are held in float32 at once


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What is left of one stage.

    Attributes:
        name: Its name, as in the hook ``rankadaptor_on_progress``; ``evaluate``: of the base and of
            the pruned model; ``texts``: and the report.
        fine_tunes: Fine-tunes, at most.
        seconds: Wall time.
        memory: Most bytes in use on the device; on the CPU, by the process.
    """

    name: str
    fine_tunes: int
    seconds: float
    memory: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is left of a run.

    Attributes:
        stages: The stages, in their order.
        costs: Seconds of the parts.
        size: What of the run fits into its time.
        cuts: What does not, in plain words.
        devices: Devices that the run occupies.
        device: Name of the kind: ``cpu`` or ``cuda``.
        free_memory: Bytes that are free on the device; None if that is not known.
        disk: Bytes that the run folder takes.
        free_disk: Bytes that are free there.
        spent: Seconds of earlier sessions.
    """

    stages: tuple[StagePlan, ...]
    costs: Costs
    size: Size
    cuts: tuple[str, ...]
    devices: int
    device: str
    free_memory: int | None
    disk: int
    free_disk: int
    spent: float

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; hours beside seconds, and GPU hours, of which a CPU takes none."""
        on_gpu = self.devices if self.device == "cuda" else 0
        return asdict(self) | {
            "seconds": self.seconds,
            "hours": self.seconds / _HOUR,
            "device_hours": self.devices * self.seconds / _HOUR,
            "gpu_hours": on_gpu * self.seconds / _HOUR,
            "fine_tunes": sum(stage.fine_tunes for stage in self.stages),
            "memory": max((stage.memory for stage in self.stages), default=0),
        }


@dataclass(frozen=True, kw_only=True)
class _Timed:
    """What was timed, in proportion to the pruned model.

    Attributes:
        begin: Seconds before the first step of a fine-tune.
        step: Seconds of an optimizer step.
        per_token: Seconds of one token in a fine-tune.
        search: An evaluation on the search documents.
        report: An evaluation on the report documents.
        token: Seconds of writing one token.
    """

    begin: float
    step: float
    per_token: float
    search: Cost
    report: Cost
    token: float

    @classmethod
    def of(
        cls, model: PreTrainedModel, prepared: Prepared, scale: float, rows: int, attention: str
    ) -> _Timed:
        """Times a model.

        Args:
            model: The model.
            prepared: The run.
            scale: How many times as long the pruned model takes.
            rows: Sequences per pass of a fine-tune.
            attention: Attention kernels of a fine-tune; empty for those of the model.
        """
        context, config = prepared.context, prepared.context.config
        with attending(model, attention):
            pace = fine_tune_pace(
                model,
                prepared.tokenizer,
                context.corpus,
                replace(config.recovery, per_device_train_batch_size=rows),
                config.rank_space.default_rank,
                config.seed,
            )
        search, report = (
            replace(cost, seconds=scale * cost.seconds)
            for cost in (evaluation_cost(context.oracle, model, p) for p in ("search", "report"))
        )
        with torch.inference_mode():
            ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
            began = time.perf_counter()
            for _ in range(_TOKENS):
                float(model(input_ids=ids).logits[0, 0, 0])
        return cls(
            begin=scale * pace.begin,
            step=scale * pace.per_token * pace.tokens * config.recovery.batch_size,
            per_token=scale * pace.per_token,
            search=search,
            report=report,
            token=scale * (time.perf_counter() - began) / _TOKENS,
        )

    def fine_tune(self, prepared: Prepared) -> float:
        """Returns the seconds of a fine-tune, looks at the held-out rows included."""
        corpus, config = prepared.context.corpus, prepared.context.config.recovery
        steps = config.steps_for(len(corpus.sequences))
        looks = 1 + (steps // config.eval_steps if config.eval_steps else 0)
        held_out = sum(len(sequence.tokens) for sequence in corpus.validation)
        return self.begin + steps * self.step + looks * held_out * _FORWARD * self.per_token


class Planner:
    """Plans what is left of a run: first its memory, by shapes, then its time, by a few passes.

    Args:
        prepared: The run.
        folder: Its folder, which may not exist yet; it is only read.
        pruned: A model that was pruned already.

    Raises:
        RankAdaptorError: If the tables of pruning or of the ranks do not fit the model.
    """

    def __init__(self, prepared: Prepared, folder: RunFolder, pruned: PrunedModel | None) -> None:
        self._prepared, self._folder = prepared, folder
        self._config = config = prepared.context.config
        self._base = meta_model(prepared.source)
        stored = self._base.dtype.itemsize
        self._base.to(prepared.dtype)
        self._pruned = self._base
        is_kept = folder.pruned.is_dir() and _is_evaluated(folder, "base")
        self.is_pruned = pruned is not None or is_kept
        if pruned is not None:
            self._pruned = on_meta(type(pruned.model), pruned.model.config, prepared.dtype)
        elif folder.pruned.is_dir():
            self._pruned = meta_model(folder.pruned).to(prepared.dtype)
        else:
            model = meta_model(prepared.source).to(prepared.dtype)
            shape = shape_after(prepared.pruner, model, prepared.tokenizer, config.prune)
            if shape is not None:
                if not config.prune.global_pruning:  # else chance decides on the widths
                    check_ranks(shape, config)
                self._pruned = shape.model
        self._costs_of = {"base": footprint(self._base), "pruned": footprint(self._pruned)}
        # What another package's recovery stage takes is not known.
        self._is_foreign = len(prepared.context.hook.rankadaptor_post_prune.get_hookimpls()) > 1
        self._rows = config.recovery.per_device_train_batch_size
        self._tokens = max(len(s.tokens) for s in prepared.context.corpus.sequences)
        self._widest = max(max(p.shape) for p in decoder_layers(self._base)[0].parameters())
        self._free = free_memory_bytes(prepared.device)
        # What the process has besides the tensors; on a CPU the file of the weights stays mapped.
        self._mapped, self._resident = 0, 0
        if prepared.device.type == "cpu":
            self._mapped, self._resident = stored, resident_bytes()

    # -------------------------------------------------------------------------------------- memory

    def check_memory(self) -> None:
        """Refuses a run whose weights and smallest pass do not fit into memory.

        Raises:
            ConfigError: With what is needed, what there is, and what to set.
        """
        if self._free is None or self._config.device_map:
            return
        base, pruned = self._weights("base"), self._weights("pruned")
        if not self.is_pruned and base > self._free:
            self._refuse("the weights of the base model", base, [])
        settings = [f"[corpus] max_length below {self._tokens}"]
        if not self._config.recovery.gradient_checkpointing:
            settings.insert(0, "[recovery] gradient_checkpointing = true")
        training = self._training(rows=1)
        if pruned + _SURE * training > self._free:
            what = f"the pruned model and one training sequence of {self._tokens} tokens"
            self._refuse(what, pruned + training, settings)

    def _refuse(self, what: str, needed: int, settings: list[str]) -> NoReturn:
        device = self._prepared.device.type
        if self._prepared.dtype == torch.float32:
            settings = ['dtype = "bfloat16"', *settings]
        if device == "cuda" and torch.cuda.device_count() > 1:
            settings = ['device_map = "auto"', *settings]
        raise ConfigError(
            f"Not enough memory: {what} need {size(needed)} on {device}, and "
            f"{size(self._free or 0)} are free. Free some; or "
            f"{'; or '.join([*(f'set {s}' for s in settings), 'take a smaller model'])}."
        )

    def _weights(self, name: str) -> int:
        count, item = self._costs_of[name].parameters, self._prepared.dtype.itemsize
        quantize = self._config.quantize if name == "pruned" else ""
        return int(count * _QUANTIZED.get(quantize, item))

    def _in_use(self, name: str) -> int:
        """Returns the bytes of the process with a model in it, before it computes anything."""
        mapped = self._costs_of[name].parameters * self._mapped
        return self._resident + self._weights(name) + mapped

    def _training(self, rows: int, name: str = "pruned") -> int:
        model = self._base if name == "base" else self._pruned
        rank = self._config.rank_space.default_rank
        return training_bytes(model, self._config.recovery, rank, rows, self._tokens)

    def _timed_rows(self) -> int:
        """Returns the sequences per pass that are timed: fewer where only the base model is there.

        It is larger than what will be trained, and memory should not run out for its sake.
        """
        if self.is_pruned or self._free is None:
            return self._rows
        room = self._free - self._weights("base")
        return max(1, min(self._rows, int(self._rows * room / self._training(self._rows, "base"))))

    def _evaluating(self, name: str, cost: Cost) -> int:
        """Returns the bytes of an evaluation beside the weights: a layer, the cache, and logits."""
        text, item = self._base.config.get_text_config(), self._prepared.dtype.itemsize
        states = (
            4 * text.hidden_size + 3 * self._widest + 2 * self._costs_of[name].kv_cache
        ) * item
        logits = cost.logits * text.vocab_size
        return int(cost.tokens * states + logits * item + 3 * 4 * min(logits, _LOGITS))

    def _kept(self) -> int:
        """Returns the bytes of the base model beside other models, where that is on the device."""
        weights = self._weights("base")
        if self._prepared.device.type != "cpu" or self._config.device_map or self._free is None:
            return 0
        return weights if has_room(self._free - weights, weights) else 0

    def _pruning(self) -> int:
        """Returns the bytes of the pruner beside the weights.

        These are inputs of all layers, one layer, and what is added up over several passes.
        """
        parts = micro_batches(self._base, self._prepared.calibration, LIMITS)
        tokens = max((sum(map(len, part)) for part in parts), default=0)
        text, item = self._base.config.get_text_config(), self._prepared.dtype.itemsize
        layers = text.num_hidden_layers
        sums = min(LIMITS.sums, 4 * self._costs_of["base"].parameters) if len(parts) > 1 else 0
        return int(tokens * ((layers + 8) * text.hidden_size + 6 * self._widest) * item + sums)

    # ---------------------------------------------------------------------------------------- time

    def plan(self, model: PreTrainedModel, attention: str = "") -> Plan:
        """Times a few passes and says what is left.

        Args:
            model: The pruned model if `is_pruned`, else the base model; it is left as it was.
            attention: Attention kernels of the fine-tunes; empty for those that it has.

        Raises:
            ConfigError: If not even the smallest run fits into its time.
        """
        config, done = self._config, _done(self._folder, self._config)
        scale = 1.0
        if not self.is_pruned:
            scale = self._costs_of["pruned"].parameters / self._costs_of["base"].parameters
        timed = _Timed.of(model, self._prepared, scale, self._timed_rows(), attention)
        before = self._before(timed)
        costs = Costs(
            fine_tune=timed.fine_tune(self._prepared),
            search_score=timed.search.seconds,
            report_score=timed.report.seconds,
            before=sum(before.values()),
            after=self._texts(timed) + _REPORT_SECONDS,
        )
        budget = self._prepared.context.budget or Budget(config)
        fitting: Size | None = Size.of(config)
        if not self._is_foreign:
            fitting = cut(config, costs, budget.left, done)
        if fitting is None:
            raise ConfigError(_too_long(config, costs, budget, done))
        counts = {} if self._is_foreign else fine_tunes(config, fitting, done)
        return Plan(
            stages=self._stages(before, costs, counts, timed),
            costs=costs,
            size=fitting,
            cuts=tuple(_cuts(config, fitting, budget)),
            devices=devices(config),
            device=self._prepared.device.type,
            free_memory=self._free,
            disk=self._disk(),
            free_disk=_free_disk(self._folder.path),
            spent=sum(self._folder.timings().values()),
        )

    def _stages(
        self, before: dict[str, float], costs: Costs, counts: dict[str, int], timed: _Timed
    ) -> tuple[StagePlan, ...]:
        base, kept = self._in_use("base"), self._kept()
        scored = self._evaluating("pruned", timed.report)
        recovery = self._config.recovery
        is_live = self._config.distills and not recovery.distill_top_k
        beside = self._weights("base") if is_live else kept
        tuned = self._in_use("pruned") + max(self._training(self._rows), scored) + beside
        memory = {
            "prune": base + kept + self._pruning(),
            "evaluate": base + self._evaluating("base", timed.report),
            "teacher": base + self._evaluating("base", timed.report),
            "compensate": base + self._weights("pruned") + self._evaluating("base", timed.report),
        }
        stages = [
            StagePlan(name=name, fine_tunes=0, seconds=seconds, memory=memory[name])
            for name, seconds in before.items()
        ]
        for name, count in counts.items():
            one = costs.race_run if name == "confirm" else costs.trial
            if count:
                stage = StagePlan(name=name, fine_tunes=count, seconds=count * one, memory=tuned)
                stages.append(stage)
        last = StagePlan(name="texts", fine_tunes=0, seconds=costs.after, memory=base)
        return (*stages, last)

    def _before(self, timed: _Timed) -> dict[str, float]:
        """Returns the seconds that are left before the recovery stage, by stage."""
        config, folder = self._config, self._folder
        ratio = self._costs_of["base"].parameters / self._costs_of["pruned"].parameters
        left = {}
        if not folder.pruned.is_dir():
            tokens = sum(map(len, self._prepared.calibration))
            passes = _PASSES.get(config.prune.importance, 0.0)
            if config.prune.importance == "ppl":
                passes *= self._base.config.get_text_config().num_hidden_layers
            written = (self._weights("base") + self._weights("pruned")) / _WRITTEN
            left["prune"] = written + tokens * passes * ratio * timed.per_token
        evaluations = {"base": ratio, "pruned": 1.0}
        missing = [r for n, r in evaluations.items() if not _is_evaluated(folder, n)]
        if missing:
            left["evaluate"] = sum(missing) * timed.report.seconds
        sequences = self._prepared.context.corpus.sequences
        tokens = sum(len(sequence.tokens) for sequence in sequences)
        if config.distills and config.recovery.distill_top_k:
            left["teacher"] = tokens * _FORWARD * ratio * timed.per_token
        if config.compensates and not (folder.path / compensation_step.RECORD).exists():
            read = tokens * min(2.0, compensation_step.MOST / len(sequences))
            left["compensate"] = read * (ratio + _FITTED) * _FORWARD * timed.per_token
            if GENERATE in config.compensate.text:
                left["compensate"] += _GENERATED * ratio * config.corpus.max_length * timed.token
        return left

    def _texts(self, timed: _Timed) -> float:
        table = self._config.generation
        if not table.max_new_tokens or (self._folder.path / "generations.json").exists():
            return 0.0
        models = 4 + self._config.race_models  # base, pruned, compensated, delivered
        return 2 * models * len(prompts(self._config)) * table.max_new_tokens * timed.token

    def _disk(self) -> int:
        """Returns the bytes of the run folder: the pruned model, and an adapter per competitor."""
        item = self._prepared.dtype.itemsize
        adapters = self._config.race_models + 1
        costs = rank_costs(self._pruned, targets=self._config.recovery.target_modules)
        trained = self._config.rank_space.default_rank * sum(costs)
        return self._costs_of["pruned"].parameters * item + adapters * trained * 4


def _is_evaluated(folder: RunFolder, name: str) -> bool:
    return (folder.path / "evaluations" / f"{name}.json").is_file()


def _done(folder: RunFolder, config: RunConfig) -> Done:
    """Returns what earlier sessions have left; once the comparison has begun, all before it."""
    timings = folder.timings()

    def trials(study: str) -> int:
        if study not in timings:
            return 0
        with TrialStore.open(folder.study_url, study) as store:
            return len(store.trials())

    seeds = fresh_seeds(config.seed, config.confirm.seeds)
    race = sum(len(list(folder.path.glob(f"evaluations/*-{seed}.json"))) for seed in seeds)
    if race:
        whole = Size.of(config)
        noise = whole.noise_seeds * config.noise.allocations
        searches = {"search": whole.trials, "random": whole.trials}
        return Done(tune=whole.tune, noise=noise, race=race, **searches)
    tune, noise = (len(list(folder.path.glob(f"{stage}/*.json"))) for stage in ("tune", "noise"))
    if (folder.path / "tune.json").exists():
        tune = max(tune, Size.of(config).tune)
    return Done(tune=tune, noise=noise, search=trials("search"), random=trials("random"))


def _cuts(config: RunConfig, fitting: Size, budget: Budget) -> Iterator[str]:
    """Says what does not fit, in plain words."""
    whole = Size.of(config)
    limit = f"{budget.stop} {getattr(config.search, budget.stop):g}"
    for name, part, all_, what in (
        ("tuning", fitting.tune, whole.tune, "fine-tunes"),
        ("noise floor", fitting.noise_seeds, whole.noise_seeds, "seeds"),
        ("search", fitting.trials, whole.trials, "trials"),
        ("comparison", fitting.seeds, whole.seeds, "seeds"),
    ):
        if part < all_:
            yield f"{name}: {part} of {all_} {what} fit into {limit}"


def _too_long(config: RunConfig, costs: Costs, budget: Budget, done: Done) -> str:
    """Says why not even the smallest run fits, and what to change."""
    least = smallest(config)
    counts = fine_tunes(config, least, done)
    needed, limit = seconds_of(config, least, costs, done), getattr(config.search, budget.stop)
    trials = sum(counts[stage] for stage in ("tune", "noise", "search", "random"))
    parts = [
        f"{duration(costs.before)} for pruning and evaluations" if costs.before else "",
        f"{trials} trials of {duration(costs.trial)}" if trials else "",
        f"{counts['confirm']} fine-tunes of {duration(costs.race_run)} for the comparison",
        f"{duration(costs.after)} for texts and report",
    ]
    enough = 1.1 * limit * (budget.limit - budget.left + needed) / budget.limit
    return (
        f"[search] {budget.stop} {limit:g} is too short: {duration(max(0.0, budget.left))} are "
        f"left of it, and the smallest run takes {duration(needed)}: "
        f"{', '.join(filter(None, parts))}. Raise it to {enough:.2g}, or lower "
        "[recovery] max_steps, [oracle] report_documents or the number of methods."
    )


def _free_disk(path: Path) -> int:
    """Returns the bytes that are free where a folder is, or will be."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free
