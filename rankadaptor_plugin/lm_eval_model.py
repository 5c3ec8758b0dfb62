"""The lm-eval model type ``rankadaptor``: base models, pruned models, exports and runs.

    --model rankadaptor --model_args pretrained=RUN
    --model rankadaptor --model_args pretrained=RUN/pruned,adapter=RUN/adapter

Folders are checked before any weight is read; loading and scoring stay with lm-eval's own `HFLM`.
No code that lies in a folder has to be run. The module registers the type when it is imported,
and the class can be named as it stands in lm-eval's entry-point group ``lm_eval.models``.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from rankadaptor_plugin.core.errors import ArtifactError, ConfigError
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.models.checkpoints import check_checkpoint
from rankadaptor_plugin.models.pruned_model import RECORD
from rankadaptor_plugin.pipeline.context import register_families, registries
from rankadaptor_plugin.pipeline.export import MARK
from rankadaptor_plugin.plugins import plugin_manager
from rankadaptor_plugin.recovery.files import load as load_adapter
from rankadaptor_plugin.recovery.peft_internals import WRAPPER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Below lm-eval's own, which its command line shows.
logger = logging.getLogger(f"lm_eval.{__name__}")

NAME = "rankadaptor"
"""Name of the model type in lm-eval."""

Shapes = dict[str, tuple[int, ...]]
"""Shape of each tensor by its name."""

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


class RankAdaptorLM(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model, for what this package writes.

    Args:
        pretrained: Folder with a model of a supported family, pruned or not, an export, or a run
            folder. A run and an export bring the adapter that lies in them.
        adapter: PEFT folder with safetensors, instead of the one that `pretrained` brings.
        peft: lm-eval's own name for `adapter`.
        backend: ``"default"`` or ``"causal"``.
        **options: Whatever else `HFLM` takes: ``dtype``, ``batch_size``, ``max_length`` ...

    Raises:
        ConfigError: If both `adapter` and `peft` are given, or the backend is not causal.
        ArtifactError: If a folder is missing, torn or no model or adapter, a run is not finished,
            or the adapter does not fit the model.
        UnsupportedModelError: If the family is not supported, or the weights are quantized.
        PluginError: If a plugin with families cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str],
        *,
        adapter: str | os.PathLike[str] | None = None,
        peft: str | os.PathLike[str] | None = None,
        backend: str = "default",
        **options: Any,
    ) -> None:
        if adapter is not None and peft is not None:
            raise ConfigError(
                f"Both adapter={adapter} and peft={peft} are given. They mean the same: leave one "
                "out of model_args."
            )
        if backend not in ("default", "causal"):
            raise ConfigError(
                f'The backend "{backend}" is not supported by the model type {NAME}: use "causal", '
                "or leave it out. Models with an encoder load with --model hf."
            )
        register_families(registries(plugin_manager()))
        folder, adapter_folder = locate(pretrained, peft if adapter is None else adapter)
        model = check_checkpoint(folder, strict=(folder / RECORD).exists())
        if adapter_folder is not None:
            check_adapter(adapter_folder, model)
        logger.info("Model %s, adapter %s", folder, adapter_folder or "none")
        super().__init__(
            # Absolute, as transformers and PEFT take other paths for names on the Hub too.
            str(folder.absolute()),
            backend="causal",
            peft=None if adapter_folder is None else str(adapter_folder.absolute()),
            **options,
        )

    def _create_model(self, pretrained: str, *, peft: str | None = None, **options: Any) -> None:
        """Loads the model as `HFLM` does, then the adapter.

        `HFLM` would first cut or grow the embeddings to the size of the tokenizer, with which the
        adapter was not trained.
        """
        super()._create_model(pretrained, **options)
        if peft is not None:
            self._model: Any = load_adapter(self._model, Path(peft))


def locate(pretrained: object, adapter: object | None) -> tuple[Path, Path | None]:
    """Finds the model and the adapter that are meant.

    Args:
        pretrained: Folder of a model, an export or a run.
        adapter: Folder of an adapter; None for the one that an export or a run brings.

    Returns:
        The folder of the model and that of the adapter, if any.

    Raises:
        ArtifactError: If a folder is missing, or a run has no model or no adapter yet.
        ConfigError: If `pretrained` is not a path.
    """
    if not isinstance(pretrained, (str, os.PathLike, int)):  # lm-eval reads "7" as a number
        raise ConfigError(
            f"pretrained is a {type(pretrained).__name__}. The model type {NAME} takes folders; a "
            "loaded model goes to lm_eval.models.huggingface.HFLM."
        )
    folder = Path(str(pretrained)).expanduser()
    own = None if adapter is None else Path(str(adapter)).expanduser()
    if not folder.is_dir():
        raise ArtifactError(
            f"The folder {folder} does not exist. Set pretrained to a model folder, an export or a "
            "run folder; a model of the Hub loads with --model hf."
        )
    if not (folder / "config.json").exists() and (folder / "inputs.json").exists():
        run, folder = folder, RunFolder(folder).base_of(own or folder / "adapter")
        if not folder.is_dir():
            raise _unfinished(run, "pruned model")
        if own is None and not (run / "adapter").is_dir():
            raise _unfinished(run, "adapter", f", or set pretrained={folder} to do without")
        own = own or run / "adapter"
    elif own is None and (folder / MARK).exists() and (folder / "adapter").is_dir():
        own = folder / "adapter"
    return folder, own


def check_adapter(folder: Path, model: PreTrainedModel) -> None:
    """Compares names and shapes of an adapter's weights with those that a model has a place for.

    PEFT drops what has no place, and draws at random what is missing.

    Args:
        folder: The adapter, a PEFT folder with safetensors.
        model: The model, on the meta device; it is left with an empty adapter on it.

    Raises:
        ArtifactError: If the folder is missing, has no valid adapter, or one that was trained on
            another model; the message names the first contradiction.
    """
    found = _adapter_shapes(folder)
    # Full weights that PEFT saves beside an adapter, such as trained embeddings.
    known: Shapes = {WRAPPER + name: tuple(t.shape) for name, t in model.state_dict().items()}
    try:
        config = PeftConfig.from_pretrained(str(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT guesses is found below for certain
            adapted = PeftModel(model, config, low_cpu_mem_usage=True)
        weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except Exception as error:  # PEFT raises all kinds, and so do settings that it does not know
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _unfit(folder, lines[0]) from error
    expected: Shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name, shape in expected.items():  # in the order of the model
        if name not in found:
            raise _unfit(folder, f"{name} is missing")
        if found[name] != shape:
            raise _unfit(folder, f"{name} has shape {found[name]}, the model takes {shape}")
    for name in sorted(found.keys() - expected.keys()):
        if found[name] != known.get(name):
            raise _unfit(folder, f"the model has no place for {name}")


def _adapter_shapes(folder: Path) -> Shapes:
    if not folder.is_dir():
        raise ArtifactError(f"There is no adapter folder {folder}. Set adapter to a PEFT folder.")
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise ArtifactError(
                f"{folder} has no adapter: {name} is missing. Set adapter to a PEFT folder with "
                "safetensors weights."
            )
    try:
        with safe_open(folder / _WEIGHTS, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in list(opened.keys())}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder} has no valid adapter: {_WEIGHTS} is corrupt ({error}). Copy it again."
        ) from error


def _unfinished(run: Path, missing: str, otherwise: str = "") -> ArtifactError:
    return ArtifactError(
        f"The run in {run} has no {missing} yet. Finish it with: rankadaptor-plugin run{otherwise}."
    )


def _unfit(folder: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"The adapter in {folder} does not fit the model: {reason.rstrip('.')}. Give the adapter "
        "that was trained on this model."
    )


# Not by lm-eval's decorator, which may refuse where an entry point stands for this class already.
if NAME not in model_registry:
    model_registry.register(NAME, target=RankAdaptorLM)
