"""P of the paper: lm-eval measures a model on documents kept apart for search and for report.

Tasks are built and tokenized once. From the same multiple-choice requests come the accuracy that
lm-eval reports and three scores that do not jump where an answer flips: `choice_logprob`, `margin`
and `gold_logprob` (`rankadaptor_plugin.core.scores`).
"""

from __future__ import annotations

import copy
import hashlib
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.core.scores import METRICS, Score
from rankadaptor_plugin.oracle.documents import choose
from rankadaptor_plugin.oracle.oracle import check_task_names
from rankadaptor_plugin.oracle.oracle_requests import Requests
from rankadaptor_plugin.oracle.tasks import Tasks, accuracy_metric, compiled_once

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from rankadaptor_plugin.oracle.contract import Oracle, OracleSettings


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

    def score(self, model: PreTrainedModel | PeftModel, documents: str) -> Score:
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


class TwoOracles:
    """Asks one oracle for the search and another one for the report.

    Args:
        search: Scores the search documents.
        report: Scores the report documents.
    """

    def __init__(self, search: Oracle, report: Oracle) -> None:
        self._oracles = {"search": search, "report": report}

    def score(self, model: PreTrainedModel | PeftModel, documents: str) -> Score:
        """Scores a model with the oracle of these documents."""
        return self._oracles[documents].score(model, documents)

    def metrics(self, documents: str) -> tuple[str, ...]:
        """Returns the metrics of the oracle of these documents."""
        return self._oracles[documents].metrics(documents)

    def weights(self, documents: str) -> dict[str, float]:
        """Returns the weights of the oracle of these documents."""
        return self._oracles[documents].weights(documents)

    def describe(self) -> dict[str, Any]:
        """Returns the documents of each oracle for its purpose, and both digests."""
        found = {purpose: oracle.describe() for purpose, oracle in self._oracles.items()}
        return {
            "documents": {p: found[p]["documents"][p] for p in found},
            "digest": "-".join(found[p]["digest"] for p in found),
        }


def lm_eval(settings: OracleSettings) -> LmEvalOracle:
    """Builds the oracle ``lm-eval``."""
    return LmEvalOracle(settings)
