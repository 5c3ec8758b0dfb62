"""P of the paper: lm-eval measures a model on documents kept apart for search and for report.

lm-eval builds the requests, tokenizes them and decides what is right: its own `construct_requests`,
filters and `process_results` are called, once per run and not once per model. From the same
multiple-choice requests come the accuracy that lm-eval reports and three scores that do not jump
where an answer flips: `choice_logprob`, `margin` and `gold_logprob`
(`rankadaptor_plugin.core.scores`). Where lm-eval offers `acc_norm`, which is where choices differ
in length, choices are compared by their log-likelihood per byte, as `acc_norm` compares them:
otherwise a task with long choices would outweigh all others in the mean.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.models.huggingface import HFLM

from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.core.scores import METRICS, Score, TaskScore
from rankadaptor_plugin.oracle.lm_eval_internals import compiled_once, encoded
from rankadaptor_plugin.oracle.loglikelihood import Plan, cost, loglikelihoods, plan
from rankadaptor_plugin.oracle.oracle import Cost, check_task_names, quiet
from rankadaptor_plugin.oracle.tasks import (
    Tasks,
    accuracy_metric,
    choose,
    gold_choices,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.config.tables import OracleConfig
    from rankadaptor_plugin.oracle.oracle import OracleSettings
    from rankadaptor_plugin.oracle.tasks import Documents


FEWSHOT_SEED = 1234
"""Seed with which lm-eval's own commands draw few-shot examples."""


@dataclass(frozen=True)
class Question:
    """One document with the requests that lm-eval made of it.

    Attributes:
        doc: The document.
        requests: lm-eval's instances: one per choice, for some metrics more.
        gold: Indices of the right choices.
        sizes: Bytes of the text that is scored, one per choice.
    """

    doc: dict[str, Any]
    requests: list[Any]
    gold: tuple[int, ...]
    sizes: NDArray[np.float64]


class TaskRequests:
    """The requests of one task.

    Attributes:
        per_byte: True if choices are compared by their log-likelihood per byte.

    Raises:
        OracleError: If the answer of a document is not among its choices.
    """

    def __init__(self, documents: Documents, accuracy_metric: str) -> None:
        self._metric = accuracy_metric
        self.per_byte = "acc_norm" in documents.task.aggregation()
        # A task of its own: its instances and what it remembers belong to these documents.
        self._task = copy.copy(documents.task)
        for name in ("doc_to_text", "doc_to_choice", "doc_to_target"):
            setattr(self._task, name, _remembering(getattr(self._task, name)))
        with quiet("lm_eval"):
            self._task.set_fewshot_seed(FEWSHOT_SEED)
            # A set, as lm-eval looks up each of its documents in it.
            self._task.build_all_requests(samples=frozenset(documents.ids))
        self.questions = [
            self._question(list(requests))
            for _, requests in groupby(self._task.instances, key=lambda r: r.doc_id)
        ]
        self._keys = documents.keys()

    def _question(self, requests: list[Any]) -> Question:
        requests.sort(key=lambda request: request.idx)
        doc = requests[0].doc
        scored = [request.args[1].strip() for request in requests]
        return Question(
            doc=doc,
            requests=requests,
            gold=tuple(sorted(gold_choices(self._task, doc))),
            sizes=np.array(
                [max(1, len(t.encode())) for t in scored[: len(self._task.doc_to_choice(doc))]],
                dtype=np.float64,
            ),
        )

    def asked(self) -> Iterator[str]:
        """Returns the inputs that determine the scores: all requests and the right answers."""
        for question in self.questions:
            yield repr(([request.args for request in question.requests], question.gold))

    def score(self, likelihoods: NDArray[np.float64], greedy: NDArray[np.bool_]) -> TaskScore:
        """Scores the answers to all requests, in their order; both of shape (requests,)."""
        for request, likelihood, is_greedy in zip(
            (r for q in self.questions for r in q.requests), likelihoods, greedy, strict=True
        ):
            request.resps = [(float(likelihood), bool(is_greedy))]
            request.filtered_resps = {}
        self._task.apply_filters()
        values: dict[str, list[float]] = {metric: [] for metric in METRICS}
        for question in self.questions:
            # A task with several filters has several answers; the first counts.
            answers = [next(iter(r.filtered_resps.values())) for r in question.requests]
            results = self._task.process_results(question.doc, answers)
            values["accuracy"].append(float(results[self._metric]))
            # Tasks with acc_mutual_info append a second request per choice, without the question.
            choices = np.array([answer[0] for answer in answers[: len(question.sizes)]])
            scores = choice_scores(choices, question.gold, question.sizes, per_byte=self.per_byte)
            for metric, value in scores.items():
                values[metric].append(value)
        return TaskScore.of(values, keys=self._keys, accuracy_metric=self._metric)


class Requests:
    """The requests of several tasks, ready for any model with one tokenizer and context window.

    Args:
        documents: Documents by name of the task.
        metrics: lm-eval's metric that counts as accuracy, by name of the task.
        config: The ``[oracle]`` table.
        tokenizer: Tokenizer of the models.

    Raises:
        OracleError: If the answer of a document is not among its choices.
    """

    def __init__(
        self,
        documents: Mapping[str, Documents],
        metrics: Mapping[str, str],
        config: OracleConfig,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._tasks = {name: TaskRequests(d, metrics[name]) for name, d in documents.items()}
        self._planned: Plan | None = None

    def asked(self) -> Iterator[str]:
        """Returns the inputs that determine the scores of all tasks."""
        for task in self._tasks.values():
            yield from task.asked()

    def cost(self, model: PreTrainedModel) -> Cost:
        """Forecasts `score`."""
        return cost(model, self._plan_for(model))

    def score(self, model: PreTrainedModel) -> Score:
        """Scores a model, which must be in evaluation mode."""
        likelihoods, greedy = loglikelihoods(model, self._plan_for(model))
        scores, begin = {}, 0
        for name, task in self._tasks.items():
            end = begin + sum(len(question.requests) for question in task.questions)
            scores[name] = task.score(likelihoods[begin:end], greedy[begin:end])
            begin = end
        return Score(tasks=scores)

    def _plan_for(self, model: PreTrainedModel) -> Plan:
        """Tokenizes and packs the requests once; the models of a run share one context window."""
        if self._planned is None:
            self._planned = self._plan(model)
        return self._planned

    def _plan(self, model: PreTrainedModel) -> Plan:
        with quiet("lm_eval"):
            lm = HFLM(
                pretrained=model,
                tokenizer=self._tokenizer,
                max_length=self._config.max_length or None,
            )
        length = int(lm.max_length)
        requests = []
        for name, task in self._tasks.items():
            for question in task.questions:
                for request in question.requests:
                    before, after = encoded(lm, *request.args[:2])
                    if len(after) > length:
                        raise OracleError(
                            f"The choice {request.args[1].strip()[:40]!r} of a document of "
                            f"{name!r} has {len(after)} tokens; at most {length} can be scored. "
                            "Raise [oracle] max_length up to what the model allows, or leave the "
                            "task out."
                        )
                    requests.append((before, after))
        return plan(
            requests,
            max_length=length,
            batch_tokens=self._config.batch_tokens,
        )


def choice_scores(
    likelihoods: NDArray[np.float64],
    gold: tuple[int, ...],
    sizes: NDArray[np.float64],
    *,
    per_byte: bool = False,
) -> dict[str, float]:
    """Returns `choice_logprob`, `margin` and `gold_logprob` of one document.

    Args:
        likelihoods: Log-likelihood of each choice, shape (choices,), in nats.
        gold: Indices of the right choices.
        sizes: Bytes of each choice, shape (choices,).
        per_byte: Compare the choices by their log-likelihood per byte, in the first two scores.
    """
    compared = likelihoods / sizes if per_byte else likelihoods
    right = compared[list(gold)]
    wrong = np.delete(compared, list(gold))
    with np.errstate(invalid="ignore"):  # a broken model's NaN is for the oracle to report
        choice_logprob = np.logaddexp.reduce(right) - np.logaddexp.reduce(compared)
    return {
        "choice_logprob": float(choice_logprob),
        "margin": float(right.max() - wrong.max()) if len(wrong) else 0.0,
        "gold_logprob": float((likelihoods / sizes)[list(gold)].max()),
    }


def _remembering(render: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls `render` once per document.

    lm-eval compiles a template at every call, which takes longer than a small model's answer.
    Documents are told apart by identity, and kept, so that no other one takes an identity over.
    """
    known: dict[int, tuple[Any, Any]] = {}

    def remembered(doc: Any, *template: Any) -> Any:
        if template and template[0] is not None:  # few-shot examples may have one of their own
            return render(doc, *template)
        if id(doc) not in known:
            known[id(doc)] = (doc, render(doc))
        return known[id(doc)][1]

    return remembered


class LmEvalOracle:
    """Scores models on lm-eval tasks.

    Args:
        settings: Tasks, document counts, tokenizer and seed.

    Raises:
        ConfigError: If a task is unknown or has too few documents, or the target or a weight names
            no task.
        OracleError: If a task is not multiple choice, its documents cannot be loaded, an answer is
            not among its choices, or search and report documents overlap.
    """

    def __init__(self, settings: OracleSettings) -> None:
        config = self._config = settings.config
        tasks = Tasks(settings.task_paths, config.data_dir)
        with compiled_once():
            self._documents = choose(tasks, config, settings.seed, settings.purposes)
            self._check_names()
            self._requests = {
                purpose: Requests(
                    documents,
                    {name: accuracy_metric(name, d.task) for name, d in documents.items()},
                    config,
                    settings.tokenizer,
                )
                for purpose, documents in self._documents.items()
            }
        self._description = self._described()

    def metrics(self, documents: str) -> tuple[str, ...]:
        """Returns `METRICS`, for search and for report documents."""
        return METRICS

    def weights(self, documents: str) -> dict[str, float]:
        """Returns the weight of each task in the mean."""
        return {name: self._config.weights.get(name, 1.0) for name in self._documents[documents]}

    def describe(self) -> dict[str, Any]:
        """Returns the document ids by purpose and task, and a digest of what they ask."""
        return copy.deepcopy(self._description)

    def _described(self) -> dict[str, Any]:
        sha = hashlib.sha256()
        for purpose, by_task in self._documents.items():
            for name, documents in by_task.items():
                sha.update(f"{name} {documents.task.VERSION} {documents.ids}".encode())
            for asked in self._requests[purpose].asked():
                sha.update(asked.encode())
        ids = {
            purpose: {name: list(documents.ids) for name, documents in by_task.items()}
            for purpose, by_task in self._documents.items()
        }
        return {"documents": ids, "digest": sha.hexdigest()[:16]}

    def cost(self, model: PreTrainedModel, documents: str) -> Cost:
        """Forecasts an evaluation."""
        model.eval()
        return self._requests[documents].cost(model)

    def score(self, model: PreTrainedModel, documents: str) -> Score:
        """Scores a model, which is put into evaluation mode.

        Args:
            model: A causal LM, with or without an adapter.
            documents: ``"search"`` or ``"report"``.

        Raises:
            OracleError: If a score is not a finite number.
        """
        model.eval()
        score = self._requests[documents].score(model)
        broken = [name for name, task in score.tasks.items() if not task.is_finite()]
        if broken:
            raise OracleError(
                f"Scores of {', '.join(broken)} are not finite numbers: the model gives no valid "
                "probabilities. Lower [recovery] learning_rate or use another dtype."
            )
        return score

    def _check_names(self) -> None:
        if len(self._documents) > 1:  # else another oracle has tasks as well
            known = dict.fromkeys(n for names in self._documents.values() for n in names)
            check_task_names(self._config, known)
        for documents in self._documents:
            if not any(self.weights(documents).values()):
                raise ConfigError(
                    f"[oracle] weights of the {documents} tasks are all 0. Give at least one task "
                    "a weight."
                )


def lm_eval(settings: OracleSettings) -> LmEvalOracle:
    """Builds the oracle ``lm-eval``."""
    return LmEvalOracle(settings)
