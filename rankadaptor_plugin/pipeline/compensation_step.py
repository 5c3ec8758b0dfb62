"""The stage ``compensate``: fits the pruned model to the unpruned one, and keeps both.

What it leaves is ``compensation.safetensors``, the new weights alone, ``compensation.json``, what
was fitted and how well, and ``compensated/``, a whole model, which adapters on it name as theirs.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from rankadaptor_plugin.config.tables import GENERATE
from rankadaptor_plugin.core.errors import PluginError
from rankadaptor_plugin.core.files import write_file
from rankadaptor_plugin.pruning.calibration import (
    calibration_documents,
    mixed_text,
    written_text,
)
from rankadaptor_plugin.pruning.compensation import Compensation

if TYPE_CHECKING:
    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.core.run_folder import RunFolder
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.pipeline.base_model import BaseModel
    from rankadaptor_plugin.pipeline.context import RunContext

logger = logging.getLogger(__name__)

WEIGHTS, RECORD = "compensation.safetensors", "compensation.json"
MOST = 512
"""Sequences of calibration text at most."""


def compensated(
    pruned: PrunedModel, base: BaseModel, context: RunContext, folder: RunFolder
) -> Compensation:
    """Returns the compensation of a run, fitted if it is not there yet.

    Args:
        pruned: The pruned model, as it comes back too.
        base: The unpruned model.
        context: The run.
        folder: Its folder.

    Raises:
        PluginError: If no plugin knows ``[prune] compensate``.
        RankAdaptorError: If it cannot be fitted.
    """
    record = folder.read_json(RECORD)
    if record is not None and (folder.path / WEIGHTS).is_file() and folder.compensated.is_dir():
        return Compensation(weights=load_file(folder.path / WEIGHTS), record=record)
    began, config = time.perf_counter(), context.config
    sequences, sources = _text(pruned, base, context)
    found = context.hook.rankadaptor_compensate(
        method=config.prune.compensate,
        base=base.at_rest(),
        pruned=pruned,
        sequences=sequences,
        config=config,
    )
    if found is None:
        raise PluginError(
            f'No plugin knows [prune] compensate = "{config.prune.compensate}". Set it to '
            '"least-squares" or "none".'
        )
    record = {**found.record, "text": sources, "seconds": time.perf_counter() - began}
    weights = {name: weight.detach().cpu().contiguous() for name, weight in found.weights.items()}
    write_file(folder.path / WEIGHTS, lambda partial: save_file(weights, partial))
    compensation = Compensation(weights=weights, record=record)
    with compensation.applied(pruned.model):
        pruned.save(folder.compensated)
    folder.write_json(RECORD, record)
    return compensation


def _text(
    pruned: PrunedModel, base: BaseModel, context: RunContext
) -> tuple[list[torch.Tensor], list[str]]:
    """Returns the calibration sequences in random order, and what they come from."""
    config, corpus = context.config, context.corpus
    length = config.corpus.max_length
    general: list[torch.Tensor] = []
    sources = ["recovery corpus"]
    for text in config.compensate.text:
        if text == GENERATE:
            general += written_text(
                base(), pruned.tokenizer, count=MOST // 2, tokens=length, seed=config.seed
            )
            sources.append("text of the unpruned model")
        else:
            template = config.corpus.template
            general += calibration_documents(Path(text), pruned.tokenizer, template=template)
            sources.append(Path(text).name)
    if not general:
        logger.warning(
            "Compensation is fitted to the recovery corpus alone, and keeps what it sees: name "
            "general text in [compensate] text"
        )
    rows = [torch.as_tensor(sequence.tokens, dtype=torch.int64) for sequence in corpus.sequences]
    drawn = mixed_text(rows, general, tokens=length, most=MOST, seed=config.seed)
    return drawn, sources


def needs_compensation(config: RunConfig) -> bool:
    """True if some fine-tune may start from compensated weights; says why not where asked for."""
    if not config.compensates:
        return False
    if config.quantize:
        logger.warning("Quantized weights are not compensated; the stack goes without")
        return False
    return True
