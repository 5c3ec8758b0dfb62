"""Used by ``trial_cost.py``: clocks inside a search, and peers that take turns with it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.config.run_file import corpus_file
from rankadaptor_plugin.oracle.lm_eval_oracle import choice_scores
from rankadaptor_plugin.plugins import plugin_manager
from rankadaptor_plugin.recovery import adapters

if TYPE_CHECKING:
    from collections.abc import Callable

    from rankadaptor_plugin.core.trials import Trial
    from rankadaptor_plugin.pipeline.context import RunContext
    from rankadaptor_plugin.pipeline.preparation import Prepared

PEER = Path(__file__).resolve().parent / "trial_cost_peer.py"
TRAINED_WITH = (
    *("batch_size", "per_device_train_batch_size", "learning_rate", "warmup_steps"),
    *("lr_scheduler_type", "weight_decay", "max_grad_norm", "alpha_over_rank", "lora_dropout"),
)


class Clocks:
    """Times the swaps of adapters inside a search, while the block lasts.

    Attributes:
        swap: Seconds of `adapters.attach`.
    """

    def __init__(self) -> None:
        self.swap = 0.0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Clocks:
        timed = partial(self._attach, adapters.attach)
        self._stack.enter_context(mock.patch.object(adapters, "attach", timed))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _attach(self, attach: Callable[..., Any], *args: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return attach(*args, **named)
        finally:
            self.swap += time.perf_counter() - began


class Peers:
    """Runs the two processes of a trial.

    Args:
        scratch: Folder for what they write.
        pruned: The pruned model's folder.
        prepared: The run.
        batch_size: lm-eval's.
    """

    def __init__(self, scratch: Path, pruned: Path, prepared: Prepared, batch_size: int) -> None:
        context = prepared.context
        config, corpus = context.config, context.config.corpus
        recovery = {name: getattr(config.recovery, name) for name in TRAINED_WITH}
        recovery["max_steps"] = config.recovery.steps_for(len(context.corpus.sequences))
        self._requests = context.oracle._requests["search"]._tasks  # type: ignore[attr-defined]
        paths = [Path(p) for p in plugin_manager().hook.rankadaptor_lm_eval_task_paths()]
        paths += [Path(config.oracle.include_path)] if config.oracle.include_path else []
        job = {
            "pruned": str(pruned.resolve()),
            "corpus": str(corpus_file(corpus.path).resolve()),
            "tokenize": {
                n: getattr(corpus, n) for n in ("template", "max_length", "max_train_samples")
            },
            "recovery": recovery,
            "seed": config.seed,
            "documents": context.oracle.describe()["documents"]["search"],
            "task_paths": [str(path.resolve()) for path in paths],
            "max_length": config.oracle.max_length,
            "lm_eval_batch_size": batch_size,
        }
        self._scratch, self._job = scratch, scratch / "job.json"
        self._job.write_text(json.dumps(job), "utf-8")
        self.done: list[dict[str, Any]] = []

    def run(self, trial: Trial) -> None:
        """Repeats a trial; keeps the seconds of the parts, and what its scores differ by."""
        adapter = self._scratch / f"adapter-{trial.position}"
        result = self._scratch / f"result-{trial.position}.json"
        ranks = json.dumps(trial.allocation.ranks)
        found: dict[str, Any] = {"position": trial.position}
        for step, paths in (("train", (ranks, adapter)), ("evaluate", (adapter, result))):
            began, cpu = time.perf_counter(), _children()
            parts = self._process(step, *paths)
            wall = time.perf_counter() - began
            parts["start"] = wall - sum(parts.values())  # the interpreter's own, and its end
            found[step] = {"wall": wall, "cpu": _children() - cpu, "parts": parts}
        found |= self._differences(trial, json.loads(result.read_text(encoding="utf-8")))
        self.done.append(found)

    def _process(self, step: str, *paths: object) -> dict[str, float]:
        command = [sys.executable, str(PEER), step, str(self._job), *map(str, paths)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return seconds

    def _differences(self, trial: Trial, theirs: dict[str, Any]) -> dict[str, Any]:
        accuracy, choice_logprob = [], []
        for name, score in trial.score.tasks.items() if trial.score else ():
            requests = self._requests[name]
            accuracy.append(
                score.values["accuracy"] - theirs["metrics"][name][score.accuracy_metric]
            )
            answers = zip(requests.questions, theirs["answers"][name], strict=True)
            values = [
                choice_scores(
                    np.array(a[: len(q.sizes)]), q.gold, q.sizes, per_byte=requests.per_byte
                )["choice_logprob"]
                for q, a in answers
            ]
            choice_logprob.append(score.values["choice_logprob"] - float(np.mean(values)))
        return {
            "accuracy_difference": float(np.abs(accuracy).max()),
            "clp_difference": float(np.abs(choice_logprob).max()),
        }


class Turns:
    """A plugin that lets the peers repeat the trials of a block when it is full.

    Args:
        peers: The peers.
        block: Trials of a block.
        repeated: Most trials that they repeat.

    Attributes:
        paused: Seconds that this took.
        paused_cpu: CPU seconds of this process meanwhile.
        cpu: CPU seconds of the search, by trial.
    """

    def __init__(self, peers: Peers, block: int, repeated: int) -> None:
        self._peers, self._block, self._repeated = peers, block, repeated
        self._waiting: list[Trial] = []
        self.paused, self.paused_cpu = 0.0, 0.0
        self.cpu: list[float] = []
        self._last = time.process_time()

    @hookimpl
    def rankadaptor_after_trial(self, trial: Trial, context: RunContext) -> None:
        """Waits for the block to be full."""
        self.cpu.append(time.process_time() - self._last)
        print(f"trial {trial.position + 1}: {trial.objective}", file=sys.stderr)
        self._waiting.append(trial)
        if len(self._waiting) == self._block:
            self.end_block()
        self._last = time.process_time()

    def end_block(self) -> None:
        """Lets the peers catch up."""
        began, cpu = time.perf_counter(), time.process_time()
        for trial in self._waiting:
            if trial.position < self._repeated and trial.score is not None:
                self._peers.run(trial)
        self._waiting.clear()
        self.paused += time.perf_counter() - began
        self.paused_cpu += time.process_time() - cpu

    def begin(self) -> None:
        """Starts the clock of the first trial."""
        self._last = time.process_time()


def _children() -> float:
    """Returns the CPU seconds of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
