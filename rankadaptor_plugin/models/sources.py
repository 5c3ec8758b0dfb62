"""Where a base model comes from: a folder, a repository of the Hub, or a GGUF file.

Whatever a run file names, the rest of the package works on a local folder: that of the Hub's own
cache, or one with the dequantized weights of a GGUF file, written the first time that it is named.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from rankadaptor_plugin.config.run_file import is_hub_name, model_folder
from rankadaptor_plugin.core.errors import ConfigError, UnsupportedModelError
from rankadaptor_plugin.core.files import cache_folder, write_folder
from rankadaptor_plugin.core.hub import hub_problem
from rankadaptor_plugin.core.run_folder import digest
from rankadaptor_plugin.models.checkpoints import check_config
from rankadaptor_plugin.models.device import resolve_device, resolve_dtype
from rankadaptor_plugin.models.families import family_of
from rankadaptor_plugin.models.transformers_internals import forget_quantization

if TYPE_CHECKING:
    import torch

    from rankadaptor_plugin.config.tables import RunConfig

logger = logging.getLogger(__name__)

GGUF = ".gguf"

_RECORD = "gguf.json"
"""File beside dequantized weights that says where they come from."""

_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
"""Files of a repository that are downloaded: no pickled weights, and no other formats."""


def model_source(config: RunConfig) -> Path:
    """Returns the local folder of the model that a run file names.

    A model of the Hub is downloaded unless its cache has it, and a GGUF file dequantized the first
    time. What a local folder holds is for `rankadaptor_plugin.models.check` to look at.

    Raises:
        ConfigError: If there is no such file or repository, it cannot be downloaded, or `revision`
            is given for something that is not on the Hub.
        UnsupportedModelError: If the family is not supported.
    """
    path = model_folder(config.model)
    on_hub = is_hub_name(config.model) and not path.exists()
    if config.revision and not on_hub:
        raise ConfigError(
            f'revision is "{config.revision}", but the model {config.model} is not on the Hub. '
            'Set revision = "", or model to a name on the Hub such as "owner/name".'
        )
    if on_hub:
        return _downloaded(config.model, config.revision)
    if path.suffix.lower() == GGUF:
        return _dequantized(path, resolve_dtype(config.dtype, resolve_device(config.device)))
    return path


def quantized_before(source: Path) -> str:
    """Returns the quantization that a base model went through, such as ``Q4_1``; empty for none."""
    try:
        record = json.loads((source / _RECORD).read_text("utf-8"))
    except FileNotFoundError:
        return ""
    return str(record["quantization"])


def _downloaded(name: str, revision: str) -> Path:
    # The config first: gigabytes of a family that is not supported would be in vain.
    check_config(_snapshot(name, revision, ["config.json"]))
    return _snapshot(name, revision, list(_FILES))


def _snapshot(name: str, revision: str, files: list[str]) -> Path:
    try:
        # Other formats lie in folders of their own.
        folder = snapshot_download(
            name, revision=revision or None, allow_patterns=files, ignore_patterns=["*/*"]
        )
    except Exception as error:  # the Hub, its client and the network each have their own
        raise ConfigError(hub_problem("model", name, error, revision)) from error
    return Path(folder)


def _dequantized(file: Path, dtype: torch.dtype) -> Path:
    """Returns the folder with the weights of a GGUF file; writes it the first time."""
    if not file.is_file():
        raise ConfigError(
            f"The model file {file} does not exist. Set model to a GGUF file, a folder, or a name "
            'on the Hub such as "owner/name".'
        )
    name = str(dtype).removeprefix("torch.")
    folder = cache_folder("gguf") / f"{file.stem}-{digest(file)}-{name}"
    if (folder / _RECORD).is_file():
        return folder
    quantization = _check_gguf(file)
    logger.warning(
        "%s is dequantized (%s) to %s once: quantization came before pruning, and what it cost is "
        "part of the base model's scores",
        file,
        quantization,
        name,
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):  # another run may be at it
            if not (folder / _RECORD).is_file():
                write_folder(folder, lambda partial: _convert(file, dtype, quantization, partial))
    except OSError as error:
        raise ConfigError(
            f"The dequantized model cannot be written to {folder}: {error}. Make room, or set "
            "XDG_CACHE_HOME to a folder with enough."
        ) from error
    return folder


def _check_gguf(file: Path) -> str:
    """Returns the quantization of a file whose model can be pruned."""
    from gguf import GGUFReader, LlamaFileType

    try:
        fields = GGUFReader(file).fields
        architecture = fields["general.architecture"].contents()
        number = fields["general.file_type"].contents() if "general.file_type" in fields else -1
    except Exception as error:  # the reader raises all kinds on a torn file
        raise ConfigError(
            f"The model file {file} cannot be read as GGUF ({type(error).__name__}: {error}). Copy "
            "it again."
        ) from error
    try:
        family_of(AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict())
    except (ValueError, UnsupportedModelError) as error:
        raise UnsupportedModelError(
            f'The model in {file} cannot be pruned: its architecture is "{architecture}". {error}'
        ) from error
    try:
        return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return "unknown quantization"


def _convert(file: Path, dtype: torch.dtype, quantization: str, folder: Path) -> None:
    options = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=dtype, quantization_config=GgufConfig(dequantize=True), **options
    )
    forget_quantization(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {"file": str(file), "bytes": os.path.getsize(file), "quantization": quantization}
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
