"""The oracle ``perplexity``: how probable a model finds held-out running text.

Each text is cut into windows; a text belongs to the search or to the report as a whole, by a hash
of its content, unless that leaves too little for the report. The score is the mean log-likelihood
of a token, in nats: perplexity is ``exp(-log_likelihood)``. It needs no benchmark, and no fine-tune
is so bad that it tells nothing of it.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.core.scores import LOG_LIKELIHOOD, Score, TaskScore, document_key
from rankadaptor_plugin.corpus.rows import prompt_and_response, read_rows
from rankadaptor_plugin.oracle.loglikelihood import cost, loglikelihoods, plan
from rankadaptor_plugin.oracle.oracle import Cost, check_task_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.oracle.oracle import OracleSettings

logger = logging.getLogger(__name__)

TASK = "text"
_LEAST = 2  # windows of the report: one gives no interval
WINDOW = 512
"""Most tokens per window where the run file sets no ``max_length``."""

Window = tuple[list[int], list[int]]  # ids before the first scored token, scored ids


class PerplexityOracle:
    """Scores models on held-out text.

    Args:
        settings: The file, window length, numbers of windows, tokenizer and seed.

    Raises:
        ConfigError: If no text is named, it is missing, or too short to be cut in two.
        CorpusError: If the file is malformed.
    """

    def __init__(self, settings: OracleSettings) -> None:
        config = settings.config
        if not config.text:
            raise ConfigError(
                "The oracle perplexity needs held-out text. Name a file in [oracle] text."
            )
        if len(settings.purposes) > 1:  # else another oracle has tasks as well
            check_task_names(config, (TASK,))
        length = config.max_length or min(WINDOW, settings.window or WINDOW)
        if settings.window and length > settings.window:
            raise ConfigError(
                f"[oracle] max_length {length} is more than the model's context window of "
                f"{settings.window} tokens. Lower it."
            )
        texts = [
            row["text"] if "text" in row else "".join(prompt_and_response(row, "plain"))
            for row in read_rows(Path(config.text), "held-out text")
        ]
        ordered = sorted(set(texts), key=lambda text: document_key(f"{settings.seed} {text}"))
        cut = [_windows(text, settings.tokenizer, length) for text in ordered]
        counts = {"search": config.search_documents, "report": config.report_documents}
        self._windows = _shared_out(
            [windows for windows in cut if windows],
            {purpose: counts[purpose] for purpose in settings.purposes},
            config.text,
        )
        self._plans = {
            purpose: plan(
                windows,
                max_length=length,
                batch_tokens=config.batch_tokens,
            )
            for purpose, windows in self._windows.items()
        }

    def metrics(self, documents: str) -> tuple[str, ...]:
        """Returns ``log_likelihood``."""
        return (LOG_LIKELIHOOD,)

    def weights(self, documents: str) -> dict[str, float]:
        """Returns the weight of the only task."""
        return {TASK: 1.0}

    def describe(self) -> dict[str, Any]:
        """Returns numbers of the windows, and a digest of their tokens."""
        sha = hashlib.sha256(repr(self._windows).encode())
        documents, first = {}, 0
        for purpose, windows in self._windows.items():
            documents[purpose] = {TASK: list(range(first, first + len(windows)))}
            first += len(windows)
        return {
            "documents": documents,
            "digest": sha.hexdigest()[:16],
        }

    def cost(self, model: PreTrainedModel, documents: str) -> Cost:
        """Forecasts an evaluation."""
        model.eval()
        return cost(model, self._plans[documents])

    def score(self, model: PreTrainedModel, documents: str) -> Score:
        """Scores a model, which is put into evaluation mode.

        The values per window are weighted by their tokens, so that their mean is that of all
        tokens.

        Raises:
            OracleError: If a score is not a finite number.
        """
        model.eval()
        windows = self._windows[documents]
        likelihoods, _ = loglikelihoods(model, self._plans[documents])
        tokens = sum(len(scored) for _, scored in windows)
        values = likelihoods * (len(windows) / tokens)
        if not np.isfinite(values).all():
            raise OracleError(
                "The log-likelihood of the held-out text is not a finite number. Lower [recovery] "
                "learning_rate or use another dtype."
            )
        keys = [document_key(repr(window)) for window in windows]
        return Score(tasks={TASK: TaskScore.of({LOG_LIKELIHOOD: values.tolist()}, keys=keys)})


def perplexity(settings: OracleSettings) -> PerplexityOracle:
    """Builds the oracle ``perplexity``."""
    return PerplexityOracle(settings)


def _windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Window]:
    """Cuts a text into windows; the first token of each has the begin-of-text token before it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    windows = []
    for start in range(0, len(ids), length):
        window = begin + ids[start : start + length]
        if len(window) > 1:
            windows.append((window[:1], window[1:]))
    return windows


def _shared_out(
    texts: list[list[Window]], counts: dict[str, int], path: str
) -> dict[str, list[Window]]:
    """Gives whole texts to the search until it has enough windows, the others to the report.

    Where that leaves too little for the report, texts are divided between windows. No window is on
    both sides, also if texts share some.

    Raises:
        ConfigError: If fewer than two windows would be left for the report.
    """
    if len(counts) == 1:
        ((purpose, count),) = counts.items()
        windows = [window for text in texts for window in text]
        return {purpose: windows[: count or len(windows)]}
    search, report = counts["search"], counts["report"]
    searched, reported = _halves(texts, search)
    if len(reported) < _LEAST:
        searched, reported = _halves([[window] for text in texts for window in text], search)
    if len(reported) < _LEAST:
        count = sum(len(windows) for windows in texts)
        raise ConfigError(
            f"The held-out text {path} gives {count} windows; {search} for the search leave none "
            "for the report. Lower [oracle] search_documents or max_length, or give more text."
        )
    if report > len(reported):
        logger.warning("%s has %d windows for the report, not %d", path, len(reported), report)
    return {"search": searched, "report": reported[: report or len(reported)]}


def _halves(texts: list[list[Window]], search: int) -> tuple[list[Window], list[Window]]:
    searched: list[Window] = []
    reported: list[Window] = []
    for windows in texts:
        (searched if len(searched) < search else reported).extend(windows)
    known = {repr(window) for window in searched}
    return searched[:search], [window for window in reported if repr(window) not in known]
