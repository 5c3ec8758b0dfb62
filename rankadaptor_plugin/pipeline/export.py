"""Export of a finished run as a model folder that loads elsewhere.

Three formats. ``hf``: the pruned model and below it the delivered adapter. ``hf-remote-code``: the
same with the file that pruned classes need, for where this package is not installed. ``merged``:
one model with the adapter in its weights, with that file too.

The exported adapter names no base model. PEFT looks a base up against the current folder or on the
Hub, so a relative path would find the wrong folder and an absolute one is lost when the export
moves, while ``PeftModel.from_pretrained(model, folder)`` and transformers'
``adapter_kwargs={"subfolder": "adapter"}`` need none. ``AutoPeftModelForCausalLM`` does need one
and fails; no setting makes it work for a folder that may move.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import transformers
from safetensors import SafetensorError

from rankadaptor_plugin import __version__
from rankadaptor_plugin.config.run_file import run_folder
from rankadaptor_plugin.core.errors import ArtifactError, UnsupportedModelError
from rankadaptor_plugin.core.files import write_folder
from rankadaptor_plugin.models import modeling_rankadaptor
from rankadaptor_plugin.models.checkpoints import check_checkpoint
from rankadaptor_plugin.models.families import BUILT_IN
from rankadaptor_plugin.models.pruned_model import is_pruned, load_pruned, read_record, stock_class
from rankadaptor_plugin.models.structures import structure_of
from rankadaptor_plugin.recovery.files import RECORD, merged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rankadaptor_plugin.core.run_folder import RunFolder

Format = Literal["hf", "hf-remote-code", "merged"]

MARK = "export.json"
"""File that tells an export, which may be replaced, from any other folder."""

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"


def export(run: Path, format_: Format, output: Path | None = None) -> str:
    """Exports the pruned model and the delivered adapter of a finished run.

    The folder appears complete or not at all; an export already there is replaced. Weights keep
    their type. Where nothing is merged the files are copied, and no weight goes through memory.

    Args:
        run: The run folder, or its run file.
        format_: What to write, see above.
        output: Folder to write; None for ``export-<format>`` in the run folder.

    Returns:
        What was written and how to load it, a few lines.

    Raises:
        ConfigError: If there is no such run.
        ArtifactError: If the run is not finished, what it left is torn, or the folder holds
            something else or cannot be written.
        UnsupportedModelError: If the code for elsewhere cannot make the model's class.
    """
    folder = run_folder(run)
    _check_finished(folder)
    target = (folder.path / f"export-{format_}" if output is None else output).resolve()
    if target.exists() and not _replaceable(target):
        raise ArtifactError(
            f"{target} holds something other than an export and is left alone. Choose another "
            "--output."
        )
    try:
        model = write_folder(target, lambda partial: _fill(partial, folder, format_))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(
            f"The export {target} cannot be written: {reason}. Check the folder's permissions and "
            "the free space."
        ) from error
    return _how_to_load(target, model, format_)


def _check_finished(folder: RunFolder) -> None:
    if not folder.path.is_dir() or not (folder.path / "inputs.json").is_file():
        raise ArtifactError(
            f"{folder.path} is not a run folder. Give one that rankadaptor-plugin run has written."
        )
    parts = [
        folder.base_of(folder.adapter),
        folder.adapter / _ADAPTER_CONFIG,
        folder.adapter / _ADAPTER_WEIGHTS,
    ]
    for part in (*parts, folder.path / "report.json"):
        if not part.exists():
            raise ArtifactError(
                f"The run in {folder.path} is not finished: {part.relative_to(folder.path)} is "
                "missing. Finish it with: rankadaptor-plugin run RUN.toml"
            )


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / MARK).is_file() or not any(folder.iterdir()))


def _fill(partial: Path, run: RunFolder, format_: Format) -> PreTrainedModel:
    """Writes an export and checks it.

    Returns:
        The exported model, on the meta device.
    """
    source = run.base_of(run.adapter)
    check_checkpoint(source)  # says what is wrong with the run, not with the export
    read_record(source)
    if format_ == "merged":
        pruned = load_pruned(source)
        pruned.model = merged(pruned.model, run.adapter)
        pruned.provenance = {**pruned.provenance, "merged_adapter": True}
        pruned.save(partial)
    else:
        # Code beside a base model of the Hub serves an auto_map that is left out below.
        without_code = shutil.ignore_patterns("*.py")
        shutil.copytree(source, partial, ignore=without_code, dirs_exist_ok=True)
        _copy_adapter(run.adapter, partial / "adapter")
    model = check_checkpoint(partial)
    _write_code(partial, model, with_code=format_ != "hf" and is_pruned(model))
    _write_json(partial / MARK, {"format": format_, "rankadaptor_plugin": __version__})
    return model


def _copy_adapter(source: Path, target: Path) -> None:
    target.mkdir()
    shutil.copyfile(source / _ADAPTER_WEIGHTS, target / _ADAPTER_WEIGHTS)
    try:
        config = json.loads((source / _ADAPTER_CONFIG).read_text("utf-8"))
        config["base_model_name_or_path"] = None
    except (ValueError, TypeError) as error:
        raise ArtifactError(
            f"{source / _ADAPTER_CONFIG} cannot be read ({error}). Delete {source} and run again."
        ) from error
    _write_json(target / _ADAPTER_CONFIG, config)
    if (source / RECORD).is_file():  # an older run wrote none
        shutil.copyfile(source / RECORD, target / RECORD)


def _write_code(folder: Path, model: PreTrainedModel, *, with_code: bool) -> None:
    """Writes the code that a model loads by, or takes out what asks for code."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("auto_map", None)
    if with_code:
        stock = stock_class(model)
        if getattr(transformers, stock.__name__, None) is not stock:
            raise UnsupportedModelError(
                f"{stock.__name__} is not a class of transformers itself, so the exported code "
                "cannot build on it. Use --format hf."
            )
        source = Path(str(modeling_rankadaptor.__file__))
        shutil.copyfile(source, folder / source.name)
        config["auto_map"] = {
            "AutoConfig": f"{source.stem}.{type(model.config).__name__}",
            "AutoModelForCausalLM": f"{source.stem}.{type(model).__name__}",
        }
    _write_json(folder / "config.json", config)


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _how_to_load(target: Path, model: PreTrainedModel, format_: Format) -> str:
    what = (
        "the model with the adapter merged" if format_ == "merged" else "the model and its adapter"
    )
    lines = [f"Wrote {what} to {target} ({type(model).__name__})."]
    load = f'model = AutoModelForCausalLM.from_pretrained("{target}"'
    if not is_pruned(model):
        lines.append(f"Load:    {load})  # a class of transformers, which needs no code of ours")
    elif format_ != "hf":
        lines.append(f"Load:    {load}, trust_remote_code=True)  # AutoTokenizer likewise")
    else:
        built_in = structure_of(model) in BUILT_IN
        note = "" if built_in else "  # first register_family(...), as its plugin does"
        lines.append(f"Load:    import rankadaptor_plugin; {load}){note}")
    if format_ != "merged":
        lines.append(f'Adapter: model = PeftModel.from_pretrained(model, "{target / "adapter"}")')
    return "\n".join(lines)
