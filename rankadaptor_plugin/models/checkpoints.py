"""Checks of the weights in a folder against its config.json, without reading them.

Names and shapes stand in the headers of safetensors files, and in a model on the meta device. The
two are compared before a load, where transformers would fill in or fail without saying why.
"""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from rankadaptor_plugin.core.errors import ArtifactError, ConfigError, UnsupportedModelError
from rankadaptor_plugin.models.device import (
    quantization_config,
    resolve_device,
    resolve_dtype,
    set_attention,
)
from rankadaptor_plugin.models.families import family_of
from rankadaptor_plugin.models.footprint import on_meta
from rankadaptor_plugin.models.modeling_rankadaptor import (
    PREFIX,
    pruned_config_class,
    pruned_model_class,
)
from rankadaptor_plugin.models.transformers_internals import ignored_keys

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.config.tables import RunConfig


log = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]
"""Shape of each tensor by its name."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Buffers that older versions of transformers saved and newer ones compute.
_FORMER = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


def check_checkpoint(folder: Path, *, strict: bool = True) -> PreTrainedModel:
    """Compares names and shapes of the weights with those of the model in config.json.

    Code that lies in the folder is never run. A pruned family is registered with
    ``AutoModelForCausalLM`` on the way, also one that came with a plugin.

    Args:
        folder: A pruned model, an export, or a model of a supported family.
        strict: Whether tensors that the model does not know are an error, or are ignored with a
            warning, as transformers does.

    Returns:
        The model that config.json describes, on the meta device and in its type.

    Raises:
        ArtifactError: If they contradict each other, or a file is missing or torn; the message
            names the first contradiction.
        UnsupportedModelError: If the family is not supported, or the weights are quantized.
    """
    model = meta_model(folder)
    expected: Shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = _as_in_model(header_shapes(folder), model, expected)
    may_have, may_lack = ignored_keys(model)
    unknown = sorted(found.keys() - expected.keys(), key=_by_layer)
    if unknown := [name for name in unknown if not _ignored(name, (*may_have, *_FORMER))]:
        problem = f"{unknown[0]} is in the weights, but in no model by config.json"
        if strict:
            raise _broken(folder, problem)
        log.warning("%s: %s. It is ignored, with %d more.", folder, problem, len(unknown) - 1)
    for name in expected:  # in the order of the model: the first contradiction comes first
        if name not in found:
            tied = (_tied_to(name, model) & found.keys()) or _ignored(name, may_lack)
            if not tied:
                raise _broken(folder, f"{name} is missing in the weights")
        elif found[name] != expected[name]:
            raise _broken(
                folder,
                f"{name} has shape {found[name]} in the weights but {expected[name]} by "
                "config.json",
            )
    return model


def meta_model(folder: Path) -> PreTrainedModel:
    """Builds the model that a config.json describes, without memory for weights.

    Raises:
        ArtifactError: If there is no config.json, or no model can be built from it.
        UnsupportedModelError: If the family is not supported, or the weights are quantized.
    """
    values = _read_json(folder, "config.json")
    structure = family_of(values)
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedModelError(
            f"The weights in {folder} are quantized ({method or 'unknown method'}). Give the model "
            "in float32, float16 or bfloat16."
        )
    try:
        config_class = CONFIG_MAPPING[structure.model_type]
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    except KeyError:
        raise UnsupportedModelError(
            f'transformers has no causal language model of type "{structure.model_type}". Import '
            "the package that registers it, or use a model of another family."
        ) from None
    if str(values["model_type"]).startswith(PREFIX):
        config_class, model_class = register(model_class)
    try:
        config = config_class.from_dict(values)
        return on_meta(model_class, config, config.dtype or torch.float32)
    except Exception as error:  # configs raise all kinds, and so do models with odd sizes
        raise _broken(
            folder,
            f"no model can be built from config.json: {_reason(error)}",
        ) from error


def header_shapes(folder: Path) -> Shapes:
    """Reads the shape of each tensor from the headers of the safetensors files in a folder.

    Of the two forms that transformers reads, one file or an index with its shards, the one file
    goes first, as it does there.

    Raises:
        ArtifactError: If there is no such file, or one is torn, missing, or not as in the index.
    """
    if not folder.is_dir():
        raise ArtifactError(f"The folder {folder} does not exist. Give a folder with a model.")
    if (folder / _SINGLE).exists():
        return _header(folder, _SINGLE)
    if not (folder / _INDEX).exists():
        raise _no_weights(folder)
    index = _read_json(folder, _INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise _broken(folder, f"{_INDEX} has no weight_map of file names")
    shapes: Shapes = {}
    for file in sorted(set(index.values())):
        if "/" in file or "\\" in file or not (folder / file).is_file():
            raise _broken(folder, f"the file {file!r} of {_INDEX} is missing")
        held = _header(folder, file)
        listed = {name for name, place in index.items() if place == file}
        if absent := sorted(listed - held.keys(), key=_by_layer):
            raise _broken(folder, f"{absent[0]} is not in {file}, where {_INDEX} says it is")
        if unlisted := sorted(held.keys() - listed, key=_by_layer):
            raise _broken(folder, f"{unlisted[0]} of {file} is missing in {_INDEX}")
        shapes |= held
    return shapes


def _header(folder: Path, file: str) -> Shapes:
    try:
        with safe_open(folder / file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in list(opened.keys())}
    except (OSError, SafetensorError) as error:
        raise _broken(folder, f"{file} is corrupt ({_reason(error)})") from error


def _as_in_model(found: Shapes, model: PreTrainedModel, expected: Shapes) -> Shapes:
    """Renames tensors as transformers does when it loads them, for example ``embed_out``."""
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    renamed: Shapes = {}
    for name, shape in found.items():
        new, _ = rename_source_key(name, renamings, [], model.base_model_prefix, expected)
        renamed[new] = shape
    return renamed


def _tied_to(name: str, model: PreTrainedModel) -> set[str]:
    """Returns the other names of a tensor that has several."""
    pairs: dict[str, str] = model.all_tied_weights_keys
    source = pairs.get(name, name)
    return {source, *(other for other, tied in pairs.items() if tied == source)} - {name}


def _ignored(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _by_layer(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part) if part.isdigit() else -1, part) for part in name.split(".")]


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads((folder / name).read_text("utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder} has no model: {name} is missing. Give a folder with config.json and "
            "safetensors weights."
        ) from None
    except (OSError, ValueError) as error:
        raise _broken(folder, f"{name} cannot be read ({_reason(error)})") from error
    if not isinstance(values, dict):
        raise _broken(folder, f"{name} is not a table of settings")
    return values


def _no_weights(folder: Path) -> ArtifactError:
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
    if not pickled:
        return _broken(folder, f"there is neither {_SINGLE} nor {_INDEX}")
    return ArtifactError(
        f"{folder} holds pickled weights ({pickled[0]}), which are rejected as they can run code. "
        "If you trust them, convert them with AutoModelForCausalLM.from_pretrained(folder)"
        ".save_pretrained(new_folder)."
    )


def _broken(folder: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{folder} has no valid model: {reason.rstrip('.')}. Copy it again, or delete it and "
        "prune again."
    )


def _reason(error: Exception) -> str:
    """Returns the last line of a message: transformers begins with where it happened."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else type(error).__name__


def check(config: RunConfig, source: Path, *, in_memory: bool = False) -> None:
    """Checks the model, device and type that a run file names; no weight is loaded.

    Args:
        config: The run file.
        source: Folder of the model.
        in_memory: True if the pruned model is given rather than loaded.

    Raises:
        ConfigError: If the folder, the device or its quantization cannot be used.
        UnsupportedModelError: If the model cannot be pruned.
        ArtifactError: If its weights are pickled, torn or missing.
    """
    set_attention(check_folder(source), config.attention)
    if in_memory and config.quantize:
        raise ConfigError(
            f'quantize is "{config.quantize}", but the model is already in memory. Load it that '
            'way, and leave quantize = "".'
        )
    device = resolve_device(config.device)
    quantization_config(config.quantize, device, resolve_dtype(config.dtype, device))


def check_folder(folder: Path) -> PreTrainedModel:
    """Checks, before any weight is read, that a folder holds a model that we can prune.

    Returns:
        The model, on the meta device.

    Raises:
        ConfigError: If the folder or its config.json is missing.
        UnsupportedModelError: If it is no causal LM, of another family, or quantized.
        ArtifactError: If weights are pickled, torn or missing, or contradict config.json.
    """
    check_config(folder)
    return check_checkpoint(folder, strict=False)


def check_config(folder: Path) -> None:
    """Checks that the config.json in a folder describes a model that we can prune.

    Raises:
        ConfigError: If the folder or its config.json is missing.
        UnsupportedModelError: If it is no causal LM, or of another family.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"The model folder {folder} does not exist. Set model to a Hugging Face "
            "folder, a name on the Hub such as owner/name, or a GGUF file."
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a table of settings")
        family, architectures = config.get("model_type", ""), config.get("architectures") or []
        if not isinstance(family, str) or not isinstance(architectures, list):
            raise ValueError("model_type is not a string, or architectures not a list")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The model folder {folder} has no readable config.json ({error}). "
            "Set model to a Hugging Face model folder."
        ) from error
    causal = any(str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in architectures)
    if not causal and (architectures or family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        named = ", ".join(map(str, architectures)) or family or "unknown"
        raise UnsupportedModelError(
            f"The model in {folder} is not a causal language model (architecture {named}). Set "
            "model to a decoder such as Llama."
        )
    try:
        family_of(config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"The model in {folder} cannot be pruned. {error}") from None
    if family.startswith(PREFIX):
        raise UnsupportedModelError(
            f"The model in {folder} is already pruned (model type {family!r}). Set model to the "
            "base model that it was made from."
        )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer; one without a padding token pads with its end of text.

    Raises:
        UnsupportedModelError: If there is none, it is torn, or has no token to pad with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and tokenizers raise all kinds
        raise _unloadable("tokenizer", folder, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise UnsupportedModelError(
            f"The tokenizer in {folder} has no padding, end-of-text or unknown token. Set "
            "pad_token in its tokenizer_config.json to a token of its vocabulary."
        )
    return tokenizer


def load_model(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    device_map: str = "",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a model, in evaluation mode.

    Args:
        folder: The model folder.
        device: Where it goes.
        dtype: Type of its weights.
        device_map: How accelerate spreads it over devices; empty puts all on `device`.
        trust_remote_code: Whether code in the folder may run.

    Raises:
        UnsupportedModelError: If its weights are torn or do not fit its config.
    """
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map or None,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
        if found["missing_keys"]:  # transformers would go on with random weights in their place
            raise ValueError(f"its weights lack {min(found['missing_keys'])}")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers and safetensors raise all kinds
        raise _unloadable("model", folder, error) from error
    return (model if device_map else model.to(device)).eval()


def _unloadable(what: str, folder: Path, error: Exception) -> UnsupportedModelError:
    lines = str(error).strip().splitlines()
    reason = lines[0].rstrip(".") if lines else type(error).__name__
    return UnsupportedModelError(
        f"The {what} in {folder} cannot be loaded: {reason}. Check that all its files are whole."
    )


def register(stock: Any) -> tuple[Any, Any]:
    """Makes ``AutoModelForCausalLM`` load pruned models of a stock class.

    Returns:
        The config class and the model class of pruned models.
    """
    config_class, model_class = pruned_config_class(stock.config_class), pruned_model_class(stock)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return config_class, model_class
