"""P of the paper: lm-eval measures a model on documents kept apart for search and for report.

Tasks are built once. Every task's documents are ordered by a hash of the seed and of what they
ask and cut into search and report documents; identical questions count once, and no question of
one task's report is searched in another, so the two are disjoint by construction. From the same
multiple-choice requests come the accuracy that lm-eval reports and two scores with far
less noise, `clp` and `margin` (`rankadaptor_plugin.scores`).
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from rankadaptor_plugin.errors import ConfigError, OracleError
from rankadaptor_plugin.lm_eval_tasks import (
    accuracy_metric,
    choice_scores,
    gold_choices,
    load_tasks,
    partition,
    question,
    quiet,
)
from rankadaptor_plugin.registry import suggestion
from rankadaptor_plugin.scores import Score, TaskScore

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from rankadaptor_plugin.context import OracleSettings


class LmEvalOracle:
    """Scores models on lm-eval tasks.

    Args:
        settings: Tasks, document counts, tokenizer and seed.

    Raises:
        ConfigError: If a task is unknown or has too few documents, or the target or a weight names
            no task.
        OracleError: If a task is not multiple choice, its documents cannot be loaded, an answer is
            not among its choices, or no document is left for the report.
    """

    def __init__(self, settings: OracleSettings) -> None:
        self._config = settings.config
        self._tokenizer = settings.tokenizer
        self._loaded = load_tasks(settings.config.tasks, settings.task_paths)
        self._tasks: dict[str, Any] = self._loaded["tasks"]
        for name, task in self._tasks.items():
            if task.OUTPUT_TYPE != "multiple_choice":
                raise OracleError(
                    f"The task {name!r} is of type {task.OUTPUT_TYPE!r}; only multiple_choice "
                    "tasks can guide the search. Name other [oracle] tasks."
                )
        self._check_names()
        self._ids: dict[str, dict[str, list[int]]] = {"search": {}, "report": {}}
        questions = {n: [question(t, d) for d in t.eval_docs] for n, t in self._tasks.items()}
        for name, task in self._tasks.items():
            search, report = partition(
                name,
                questions[name],
                self._config.search_documents,
                self._config.report_documents,
                settings.seed,
            )
            for index in (*search, *report):  # a broken document shall not show up hours later
                gold_choices(task, task.eval_docs[index])
            self._ids["search"][name], self._ids["report"][name] = search, report
        self._keep_apart(questions)

    def weights(self) -> dict[str, float]:
        """Returns the weight of each task in the reported mean."""
        return {name: self._config.weights.get(name, 1.0) for name in self._tasks}

    def describe(self) -> dict[str, Any]:
        """Returns the document ids by purpose and task, and a digest of what they ask."""
        sha = hashlib.sha256()
        for by_task in self._ids.values():
            for name, ids in by_task.items():
                documents = self._tasks[name].eval_docs
                sha.update(f"{name} {self._tasks[name].VERSION} {ids}".encode())
                for index in ids:
                    sha.update(json.dumps(documents[index], default=str).encode())
        return {"documents": self._ids, "digest": sha.hexdigest()[:16]}

    def score(self, model: PreTrainedModel | PeftModel, documents: str) -> Score:
        """Scores a model, which is put into evaluation mode.

        Args:
            model: A causal LM, with or without an adapter.
            documents: ``"search"`` or ``"report"``.

        Raises:
            OracleError: If a score is not a finite number.
        """
        model.eval()
        ids = self._ids[documents]
        with quiet("lm_eval"):
            lm = _QuietHFLM(
                pretrained=model,
                tokenizer=self._tokenizer,
                batch_size=self._config.batch_size,
                max_length=self._config.max_length or None,
            )
            # One bootstrap round: accuracies then carry their analytic error at no cost.
            results = evaluate(lm, self._loaded, samples=ids, bootstrap_iters=1, log_samples=True)
        score = Score(
            tasks={name: self._task_score(name, results["samples"][name]) for name in self._tasks}
        )
        if not score.is_finite():
            raise OracleError(
                "A score is not a finite number: the model gives no valid probabilities. "
                "Lower [recovery] learning_rate or use another dtype."
            )
        return score

    def _task_score(self, name: str, samples: list[dict[str, Any]]) -> TaskScore:
        task = self._tasks[name]
        metric = accuracy_metric(name, samples[0])
        if metric is None:
            raise OracleError(
                f"The task {name!r} reports neither acc nor acc_norm. Name other [oracle] tasks."
            )
        values: dict[str, list[float]] = {"accuracy": [], "clp": [], "margin": []}
        # A task with several filters gives one sample per filter; the first counts.
        samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        for sample in samples:
            # Tasks with acc_mutual_info append a second request per choice, without the question.
            answers = sample["filtered_resps"][: len(task.doc_to_choice(sample["doc"]))]
            likelihoods = np.array([answer[0] for answer in answers])
            clp, margin = choice_scores(likelihoods, gold_choices(task, sample["doc"]))
            values["accuracy"].append(float(sample[metric]))
            values["clp"].append(clp)
            values["margin"].append(margin)
        count = len(samples)
        return TaskScore(
            values={key: float(np.mean(v)) for key, v in values.items()},
            stderr={
                key: float(np.std(v, ddof=1) / math.sqrt(count)) if count > 1 else 0.0
                for key, v in values.items()
            },
            documents=count,
            accuracy_metric=metric,
            per_document=values,
        )

    def _keep_apart(self, questions: dict[str, list[str]]) -> None:
        """Leaves out report documents whose question is a search document of another task.

        Raises:
            OracleError: If no report document of a task is left.
        """
        searched = {questions[n][i] for n, ids in self._ids["search"].items() for i in ids}
        for name, ids in self._ids["report"].items():
            kept = [i for i in ids if questions[name][i] not in searched]
            if not kept:
                raise OracleError(
                    f"Every report document of {name!r} is a search document of another task. "
                    "Leave one of the two out of [oracle] tasks."
                )
            self._ids["report"][name] = kept

    def _check_names(self) -> None:
        named = {"target": [self._config.target] if self._config.target else []}
        named["weights"] = list(self._config.weights)
        for key, names in named.items():
            for name in names:
                if name not in self._tasks:
                    raise ConfigError(
                        f"[oracle] {key} names {name!r}, which is not among the tasks."
                        f"{suggestion(name, list(self._tasks))} Tasks: {', '.join(self._tasks)}."
                    )
        if not any(self.weights().values()):
            raise ConfigError("[oracle] weights are all 0. Give at least one task a weight.")


def lm_eval(settings: OracleSettings) -> LmEvalOracle:
    """Builds the oracle ``lm-eval``."""
    return LmEvalOracle(settings)


class _QuietHFLM(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model without its progress bar."""

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Scores requests; see `HFLM.loglikelihood`."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
