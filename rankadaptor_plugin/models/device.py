"""Compute settings of a run: device, dtype and threads, and its memory use."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import joblib
import torch
from transformers import BitsAndBytesConfig

from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.models.transformers_internals import attention_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from rankadaptor_plugin.config.tables import RunConfig


def resolve_device(device: str) -> torch.device:
    """Returns the device of a run file.

    Raises:
        ConfigError: If there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = torch.device("meta")
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}. Allowed: auto, cpu, cuda, cuda:0 and so on.")
    if resolved.type == "cuda" and not 0 <= (resolved.index or 0) < torch.cuda.device_count():
        raise ConfigError(
            f"device is {device!r}, but torch sees {torch.cuda.device_count()} GPUs. "
            'Set device = "auto" or "cpu".'
        )
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of the base model's weights.

    ``auto`` takes bfloat16 where there are units for products of its matrices (newer GPUs, CPUs
    with AMX), else float16 on a GPU and float32 on a CPU.

    Raises:
        ConfigError: If the device cannot compute in it.
    """
    multiplies = _multiplies_bfloat16(device)
    if dtype == "auto":
        halved = torch.float16 if device.type == "cuda" else torch.float32
        return torch.bfloat16 if multiplies else halved
    if dtype == "bfloat16" and device.type == "cuda" and not multiplies:
        raise ConfigError(
            f'dtype is "bfloat16", which {device_name(device)} does not have. Set dtype = '
            '"float16" or "float32".'
        )
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def faster_attention(model: PreTrainedModel, tokens: torch.Tensor) -> str:
    """Returns the attention kernels that train a model faster.

    In bfloat16 on a CPU, eager attention has the faster backward pass on short rows and the slower
    one on long rows, so both are run here, in turns. Elsewhere the model's own stay.

    Args:
        model: The model.
        tokens: Rows as long as those of the run, shape (b, t), int64.
    """
    names = ("sdpa", "eager")
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return attention_of(model)
    if attention_of(model) != "sdpa":  # not all families have it
        return attention_of(model)
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    seconds = dict.fromkeys(names, math.inf)
    for name in names * 3:
        with attending(model, name):
            began = time.process_time()
            hidden = model.base_model(inputs_embeds=embeddings, use_cache=False)[0]
            torch.autograd.grad(hidden.sum(), embeddings)
            seconds[name] = min(seconds[name], time.process_time() - began)
    return min(names, key=lambda name: seconds[name])


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Sets a model's attention kernels; ``auto`` leaves transformers' choice.

    Raises:
        ConfigError: If the model does not have them.
    """
    if name in ("auto", attention_of(model)):
        return
    model.set_attn_implementation(name)
    if attention_of(model) != name:  # transformers only warns
        raise ConfigError(
            f'attention is "{name}", which {type(model).__name__} does not have. Set attention = '
            f'"{attention_of(model)}" or "auto".'
        )


@contextlib.contextmanager
def attending(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Sets a model's attention kernels for a while; an empty name leaves them."""
    before = attention_of(model)
    if name in ("", before):
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def is_out_of_memory(error: Exception) -> bool:
    """True for an out-of-memory error, which torch also raises as a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    said = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    return any(words in str(error) for words in said)


def seeded_devices(device: torch.device) -> list[int]:
    """Returns the GPUs whose random numbers a seed changes, for `torch.random.fork_rng`."""
    return list(range(torch.cuda.device_count())) if device.type == "cuda" else []


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets torch's CPU threads for a while; 0 takes one per core that the process may use.

    torch's own default does not know the CPU limit of a container.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or min(before, joblib.cpu_count(only_physical_cores=True)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_name(device: torch.device) -> str:
    """Returns the name of a device in reports."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def peak_memory_bytes(device: torch.device) -> int | None:
    """Returns the most memory in use so far, in bytes.

    On a GPU, what torch has allocated on all of them; on the CPU, the resident memory of the
    process, or None where the system does not tell.
    """
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def forget_peak_memory(device: torch.device) -> None:
    """Lets `peak_memory_bytes` of a GPU begin anew; that of a process cannot."""
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def free_memory_bytes(device: torch.device) -> int | None:
    """Returns the memory that is free on a device, in bytes; None where the system does not tell.

    On the CPU, what the system can give without a swap of what is in use, and within the limit of a
    container; swap space counts.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on Linux
        return None
    known = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines)
    }
    return min(known["MemAvailable"] + known["SwapFree"], _free_in_container())


def _free_in_container(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns what the limit of a container (cgroup v2) leaves, in bytes."""
    try:
        limit = int((folder / "memory.max").read_text(encoding="utf-8"))
        used = int((folder / "memory.current").read_text(encoding="utf-8"))
        details = (folder / "memory.stat").read_text(encoding="utf-8").split()
    except (OSError, ValueError):  # none, or "max"
        return sys.maxsize
    cached = int(details[details.index("inactive_file") + 1])  # given up when it is needed
    return max(0, limit - used + cached)


def resident_bytes() -> int:
    """Returns the memory that the process has now, in bytes; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:  # not on Linux
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def devices(config: RunConfig) -> int:
    """Returns the number of devices that a run occupies, at least one."""
    return max(1, torch.cuda.device_count()) if config.device_map else 1


def quantization_config(
    quantize: str, device: torch.device, dtype: str | torch.dtype
) -> BitsAndBytesConfig | None:
    """Returns the arguments of ``from_pretrained`` that quantize a model while it loads.

    Nothing is loaded here, so that it can be called early, to see whether it will work.

    Args:
        quantize: ``"8bit"``, ``"4bit"``, or empty for weights as they are.
        device: Where the model will be.
        dtype: Type to compute in; ``"auto"`` takes bfloat16. The int8 kernels have their own.

    Returns:
        None for weights as they are. 4 bits are NF4 with quantized constants, as in QLoRA.

    Raises:
        ConfigError: If the device is no CUDA GPU, or bitsandbytes is not installed.
    """
    if not quantize:
        return None
    if quantize not in ("8bit", "4bit"):
        raise ConfigError(f'quantize is "{quantize}". Allowed: "8bit", "4bit", or "" for neither.')
    if device.type != "cuda":
        raise ConfigError(
            f'quantize is "{quantize}", which needs a CUDA GPU, but the device is {device}. Set '
            'quantize = "", or run where there is a GPU.'
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f'quantize is "{quantize}", which needs bitsandbytes. Install it with: pip install '
            '"rankadaptor-plugin[quant]"'
        )
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
    )
