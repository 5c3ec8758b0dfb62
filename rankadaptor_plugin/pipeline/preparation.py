"""The first stage of a run: everything is checked and loaded that the other stages share.

What is wrong with a run file shows here, before any model is loaded or anything is written but the
claim on the run folder.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from rankadaptor_plugin import corpus as recovery_corpus
from rankadaptor_plugin import models, oracle, pruning, recovery, search, verdict
from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.run_file import corpus_file
from rankadaptor_plugin.config.tables import GENERATE
from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.core.run_folder import RunFolder, digest
from rankadaptor_plugin.core.trials import TrialState
from rankadaptor_plugin.corpus.corpus import load_corpus
from rankadaptor_plugin.models.checkpoints import load_tokenizer
from rankadaptor_plugin.models.device import devices, resolve_device, resolve_dtype
from rankadaptor_plugin.models.sources import model_source
from rankadaptor_plugin.oracle.oracle import (
    Oracle,
    OracleSettings,
    TwoOracles,
    check_task_names,
    objective_metric,
)
from rankadaptor_plugin.pipeline import context as plugin_list
from rankadaptor_plugin.pipeline import texts
from rankadaptor_plugin.pipeline.budget import Budget
from rankadaptor_plugin.pipeline.context import RunContext
from rankadaptor_plugin.pruning.calibration import calibration_documents, calibration_samples
from rankadaptor_plugin.search.study import TrialStore

if TYPE_CHECKING:
    import pluggy
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.core.registry import Registry
    from rankadaptor_plugin.corpus.sequences import Corpus
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.oracle.oracle import OracleFactory
    from rankadaptor_plugin.pipeline.context import Registries
    from rankadaptor_plugin.pruning.cutting import Pruner

logger = logging.getLogger(__name__)

_FREE = {
    "corpus": ("path",),
    "oracle": ("include_path", "data_dir", "text", "batch_tokens"),
    "recovery": (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "compile",
    ),
    # A search may be prolonged.
    "search": ("n_trials", "max_hours", "max_gpu_hours"),
}
"""Settings that say where things lie, which are compared by their content, and how much is
computed at once, which a run may have to change before it can go on."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """State that the stages share.

    Attributes:
        context: The run, as plugins may know it.
        pruner: The pruner that the run file names.
        source: Folder of the base model.
        tokenizer: Its tokenizer.
        device: Where to compute.
        dtype: Type of the base model's weights.
        calibration: Sequences for the pruner, each of shape (t,), int64; none if it is not needed.
    """

    context: RunContext
    pruner: Pruner
    source: Path
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    calibration: list[torch.Tensor]


def prepare(
    config: RunConfig,
    manager: pluggy.PluginManager,
    folder: RunFolder,
    pruned: PrunedModel | None,
    began: float,
    *,
    claims: bool = True,
) -> Prepared:
    """Checks and loads what a run file names, and claims the run folder.

    Args:
        config: The run file.
        manager: Plugins.
        folder: The run folder, opened.
        pruned: A model that was pruned already.
        began: ``time.perf_counter()`` at the start of the program.
        claims: False leaves the folder as it is; it must fit nevertheless.

    Raises:
        RankAdaptorError: If anything is wrong with the inputs.
    """
    manager.hook.rankadaptor_on_progress(stage="load", done=0, total=1)
    spent = sum(folder.timings().values())
    registries = plugin_list.registries(manager)
    plugin_list.check_names(registries, config)
    plugin_list.check_compensation(manager, config)
    device = pruned.model.device if pruned else resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    source = check(config, registries, pruned)
    tokenizer = (
        pruned.tokenizer
        if pruned
        else load_tokenizer(source, trust_remote_code=config.trust_remote_code)
    )
    window = _window(config, source, pruned)
    corpus = load_corpus(corpus_file(config.corpus.path), tokenizer, config.corpus)
    recovery.check_corpus(corpus, config.recovery, window)
    texts.check(config, tokenizer)
    paths = list(manager.hook.rankadaptor_lm_eval_task_paths())
    if config.oracle.include_path:
        paths.append(Path(config.oracle.include_path))  # last: lm-eval lets later folders win
    scorer = _oracle(
        registries.oracles,
        OracleSettings(
            config=config.oracle,
            tokenizer=tokenizer,
            task_paths=tuple(paths),
            seed=config.seed,
            window=window,
        ),
    )
    objective_metric(config.oracle, scorer)  # says now what it would say after the pruning
    inputs = _inputs(config, source, pruned, corpus, scorer)
    folder = _claimed(folder, inputs, writes=claims)
    scored = config.prune.importance not in ("magnitude", "random")
    needed = scored and pruned is None and not folder.pruned.is_dir()
    prepared = Prepared(
        context=RunContext(
            config=config,
            folder=folder.path,
            registries=registries,
            hook=manager.hook,
            oracle=scorer,
            corpus=corpus,
            budget=Budget(config, devices=devices(config), spent=spent, began=began),
        ),
        pruner=registries.pruners.get(config.prune.method),
        source=source,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        calibration=_calibration(config, corpus, tokenizer) if needed else [],
    )
    if claims:
        folder.add_seconds("load", time.perf_counter() - began)
    manager.hook.rankadaptor_on_progress(stage="load", done=1, total=1)
    return prepared


def check(config: RunConfig, registries: Registries, pruned: PrunedModel | None) -> Path:
    """Lets every package check its tables of the run file; no weight is loaded.

    What can be known without the model comes first, as that may have to be downloaded.

    Returns:
        Folder of the base model.

    Raises:
        RankAdaptorError: If anything is wrong with them.
    """
    verdict.check(config)
    oracle.check(config)
    recovery_corpus.check(config)
    source = model_source(config)
    models.check(config, source, in_memory=pruned is not None)
    base = _config_of(config, source)
    if pruned is None:
        pruning.check(config.prune, registries.pruners.get(config.prune.method), base)
    learns = pruned is not None and config.distills
    recovery.check(config, *((base, pruned.model.config) if pruned and learns else ()))
    search.check(config, *_shape(config, base, pruned))
    return source


def _config_of(config: RunConfig, source: Path) -> PreTrainedConfig:
    loaded: PreTrainedConfig = AutoConfig.from_pretrained(
        source, trust_remote_code=config.trust_remote_code, local_files_only=True
    )
    return loaded


def _oracle(oracles: Registry[OracleFactory], settings: OracleSettings) -> Oracle:
    """Builds the oracle of the report, and that of the search where it is another one."""
    name, search_name = settings.config.name, settings.config.search_name
    if search_name in ("", name):
        return oracles.get(name)(settings)
    both = TwoOracles(
        oracles.get(search_name)(replace(settings, purposes=("search",))),
        oracles.get(name)(replace(settings, purposes=("report",))),
    )
    names = dict.fromkeys((*both.weights("search"), *both.weights("report")))
    check_task_names(settings.config, names)
    return both


def _window(config: RunConfig, source: Path, pruned: PrunedModel | None) -> int | None:
    """Returns the context window of the model, as its configuration has it."""
    model = pruned.model.config if pruned else _config_of(config, source)
    return getattr(model.get_text_config(), "max_position_embeddings", None)


def _shape(
    config: RunConfig, base: PreTrainedConfig, pruned: PrunedModel | None
) -> tuple[int | None, int | None]:
    """Returns layers and width of the pruned model, None where pruning decides on them."""
    if pruned is None and config.prune.method != "width":
        return None, None
    model = (pruned.model.config if pruned else base).get_text_config()
    return model.num_hidden_layers, model.hidden_size


def _calibration(
    config: RunConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerBase
) -> list[torch.Tensor]:
    prune = config.prune
    if prune.calibration:
        documents = calibration_documents(
            Path(prune.calibration), tokenizer, template=config.corpus.template
        )
    else:
        documents = [sequence.tokens for sequence in corpus.sequences]
    return calibration_samples(
        documents, prune.calibration_samples, prune.calibration_tokens, config.seed
    )


def _claimed(folder: RunFolder, inputs: dict[str, Any], *, writes: bool) -> RunFolder:
    """Claims the folder; one without a report or complete fine-tune is taken over.

    So whoever corrects a setting that made a run fail need not clean up after it.

    Args:
        folder: The folder.
        inputs: What the run is made from.
        writes: False only looks whether the folder can be claimed.

    Returns:
        The folder; one that is not there in place of one that would be cleared.
    """
    # Who raises the seeds because of the noise floor keeps its fine-tunes; who has seen two
    # allocations compared may not ask again with others.
    free = () if len(_tried(folder, "confirm")) > 1 else ("config.confirm.",)
    try:
        folder.claim(inputs, free, writes=writes)
    except ArtifactError:
        if _has_results(folder):
            raise
        logger.warning("%s was started with different settings; starting over", folder.path)
        if not writes:
            return RunFolder(folder.path / "new")
        folder.clear()
        folder.write_json("inputs.json", inputs)
        folder.claim(inputs)
    return folder


def _has_results(folder: RunFolder) -> bool:
    if (folder.path / "report.json").exists() or any(folder.path.glob("noise/*.json")):
        return True
    return bool(_tried(folder, "search"))


def _tried(folder: RunFolder, study: str) -> set[RankAllocation]:
    """Returns the allocations of the complete trials of a study."""
    if not (folder.path / "study.db").exists():
        return set()
    with TrialStore.open(folder.study_url, study) as store:
        complete = (t for t in store.trials() if t.state is TrialState.COMPLETE)
        return {trial.allocation for trial in complete}


def _inputs(
    config: RunConfig, source: Path, pruned: PrunedModel | None, corpus: Corpus, oracle: Oracle
) -> dict[str, Any]:
    """Returns the settings that must not change between two sessions in one run folder."""
    plain, corpus_path = run_file.to_dict(config), corpus_file(config.corpus.path)
    # A run may move to another machine or device.
    # What the noise step and the texts show may be asked again in another way.
    where = ("output", "model", "revision", "device", "device_map", "threads")
    for key in (*where, "noise", "generation"):
        del plain[key]
    for table, names in _FREE.items():
        for key in names:
            del plain[table][key]
    plain["recovery"]["batch_size"] = config.recovery.batch_size
    calibration, meta = plain["prune"].pop("calibration"), plain["search"].pop("meta")
    texts = plain["compensate"].pop("text")
    return {
        "config": plain,
        "model": digest(source),
        "pruned model": pruned.weights_digest() if pruned else None,
        # What lies on the hub may change under its name.
        "corpus": digest(corpus_path) if corpus_path.exists() else corpus.digest(),
        "calibration": digest(Path(calibration)) if calibration and not pruned else None,
        "compensation": [t if t == GENERATE else digest(Path(t)) for t in texts],
        "documents": oracle.describe()["digest"],
        "meta-knowledge": digest(Path(meta)) if meta else None,
    }
