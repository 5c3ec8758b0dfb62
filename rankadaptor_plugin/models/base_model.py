"""Loads the base model of a run from a local folder, and says plainly what is wrong with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rankadaptor_plugin.core.errors import ConfigError, UnsupportedModelError
from rankadaptor_plugin.models.checkpoints import check_checkpoint
from rankadaptor_plugin.models.families import family_of
from rankadaptor_plugin.models.modeling_rankadaptor import PREFIX

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_folder(folder: Path) -> str:
    """Checks, before any weight is read, that a folder holds a model that we can prune.

    Returns:
        The model type.

    Raises:
        ConfigError: If the folder or its config.json is missing.
        UnsupportedModelError: If it is no causal LM, of another family, or quantized.
        ArtifactError: If weights are pickled, torn or missing, or contradict config.json.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"The model folder {folder} does not exist. Set model to a local folder with "
            "config.json and safetensors weights."
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no table of settings")
        family, architectures = config.get("model_type", ""), config.get("architectures") or []
        if not isinstance(family, str) or not isinstance(architectures, list):
            raise ValueError("model_type is no text, or architectures no list")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The model folder {folder} has no readable config.json ({error}). "
            "Set model to a Hugging Face model folder."
        ) from error
    causal = any(str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in architectures)
    if not causal and (architectures or family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        named = ", ".join(map(str, architectures)) or family or "unknown"
        raise UnsupportedModelError(
            f"The model in {folder} is no causal language model (architecture {named}). Set model "
            "to a decoder such as Llama."
        )
    try:
        family_of(config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"The model in {folder} cannot be pruned. {error}") from None
    if family.startswith(PREFIX):
        raise UnsupportedModelError(
            f"The model in {folder} is pruned already (model type {family!r}). Set model to the "
            "base model that it was made from."
        )
    check_checkpoint(folder, strict=False)
    return str(family)


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
