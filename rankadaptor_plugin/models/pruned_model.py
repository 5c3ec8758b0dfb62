"""A pruned model and what was done to it, in memory and on disk."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rankadaptor_plugin.core.errors import ArtifactError, UnsupportedModelError
from rankadaptor_plugin.core.files import write_folder
from rankadaptor_plugin.models.checkpoints import check_checkpoint, register
from rankadaptor_plugin.models.device import quantization_config
from rankadaptor_plugin.models.footprint import Footprint, footprint, on_meta, shape_of
from rankadaptor_plugin.models.modeling_rankadaptor import structure_entry
from rankadaptor_plugin.models.structures import (
    ModelShape,
    decoder_layers,
    layer_widths,
    set_config,
    structure_of,
)
from rankadaptor_plugin.models.transformers_internals import forget_weight_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rankadaptor_plugin.models.modeling_rankadaptor import LayerWidths


RECORD = "pruned_model.json"
"""File beside the weights that says what was cut, and how."""

IMPORTANCE_LOST = "importance_lost"
"""Key of the provenance: share of its importance that each layer of the base model lost."""


@dataclass(kw_only=True)
class PrunedModel:
    """PL of the paper: a pruned model and what was done to it.

    Attributes:
        model: The model: of a pruned class where a layer is narrower than before, else of the stock
            class.
        tokenizer: Its tokenizer.
        shape: Hidden size and widths now.
        base_shape: The same before pruning.
        kept_layers: For each layer its number before pruning, which may have removed whole layers.
        pruned_layers: Whether the rank of a layer is worth a search, one flag per layer: where it
            lost something itself, or lies among layers that were removed.
        footprint: What the model costs.
        base_footprint: What it cost before pruning.
        provenance: Where it comes from, plain JSON values.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shape: ModelShape
    base_shape: ModelShape
    kept_layers: tuple[int, ...]
    pruned_layers: tuple[bool, ...]
    footprint: Footprint
    base_footprint: Footprint
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        provenance: dict[str, Any] | None = None,
        *,
        base_config: PreTrainedConfig | None = None,
        kept_layers: Sequence[int] | None = None,
        pruned_layers: Sequence[bool] | None = None,
    ) -> PrunedModel:
        """Describes a model from which something was cut; where needed it is converted in place.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            provenance: Where it comes from, plain JSON values.
            base_config: Config before pruning; None if the model's still holds those sizes.
            kept_layers: For each layer its number before pruning; None if all are there.
            pruned_layers: Flags of the attribute of that name; None takes what is narrower.

        Raises:
            UnsupportedModelError: If the class or the shapes of the model are not supported.
        """
        base_config = copy.deepcopy(model.config) if base_config is None else base_config
        try:
            base_config.validate()  # saving would, too late
        except StrictDataclassError as error:
            raise UnsupportedModelError(
                "The model's config is that of no base model: "
                f"{str(error).splitlines()[-1].strip()} Set it back to the sizes of the base model."
            ) from error
        base = on_meta(stock_class(model), base_config, model.dtype)
        kept = tuple(kept_layers or range(base.config.num_hidden_layers))
        return cls.described(
            model,
            tokenizer,
            base_shape=shape_of(base),
            base_footprint=footprint(base),
            kept_layers=kept,
            pruned_layers=pruned_layers,
            provenance=dict(provenance or {}),
        )

    @classmethod
    def described(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        base_shape: ModelShape,
        base_footprint: Footprint,
        kept_layers: tuple[int, ...],
        pruned_layers: Sequence[bool] | None,
        provenance: dict[str, Any],
    ) -> PrunedModel:
        """Describes a model of which it is known what it was before; see `of`.

        Raises:
            UnsupportedModelError: If the class or the shapes of the model are not supported.
        """
        shape = shape_of(model)
        if len(kept_layers) != len(shape.layers):
            raise UnsupportedModelError(
                f"The model has {len(shape.layers)} layers, but {len(kept_layers)} are said to be "
                "kept. Say for each layer which number it had before pruning."
            )
        before = ModelShape(base_shape.hidden, tuple(base_shape.layers[i] for i in kept_layers))
        if shape != before or is_pruned(model):
            model = to_pruned(model, before)
        narrower = shape.hidden != before.hidden
        return cls(
            model=model,
            tokenizer=tokenizer,
            shape=shape,
            base_shape=base_shape,
            kept_layers=kept_layers,
            pruned_layers=tuple(
                pruned_layers
                if pruned_layers is not None
                else (
                    narrower or now != was
                    for now, was in zip(shape.layers, before.layers, strict=True)
                )
            ),
            footprint=footprint(model),
            base_footprint=base_footprint,
            provenance=provenance,
        )

    @property
    def widths(self) -> tuple[LayerWidths, ...]:
        """Width of each decoder layer, bottom first."""
        return self.shape.layers

    @property
    def parameters(self) -> int:
        """Number of parameters now; tied weights count once."""
        return self.footprint.parameters

    @property
    def base_parameters(self) -> int:
        """Number of parameters before pruning."""
        return self.base_footprint.parameters

    @property
    def importance_lost(self) -> tuple[float, ...] | None:
        """Share of its importance that each layer of the base model lost, bottom first.

        That is the sum of the scores of what was removed over that of all; 0 for layers that were
        left alone, 1 for removed ones. None where the pruner had no scores, or says nothing.
        """
        shares = self.provenance.get(IMPORTANCE_LOST)
        if not isinstance(shares, list) or len(shares) != len(self.base_shape.layers):
            return None
        if not all(type(share) in {int, float} and 0 <= share <= 1 for share in shares):
            return None
        return tuple(float(share) for share in shares)

    def record(self) -> dict[str, Any]:
        """Returns all but the model and the tokenizer, as JSON values."""
        return {
            "shape": self.shape.to_json(),
            "base_shape": self.base_shape.to_json(),
            "kept_layers": list(self.kept_layers),
            "pruned_layers": list(self.pruned_layers),
            "footprint": asdict(self.footprint),
            "base_footprint": asdict(self.base_footprint),
            "provenance": self.provenance,
        }

    def weights_digest(self) -> str:
        """Returns a hash of the weights."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            sha.update(f"{name} {tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().float().cpu().numpy().tobytes())
        return sha.hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Writes the model, the tokenizer and the record into a folder.

        The folder appears complete or not at all. A pruned model already there is replaced.

        Raises:
            ArtifactError: If the folder holds something else or cannot be written.
        """
        folder = Path(folder).resolve()
        if folder.exists() and not _replaceable(folder):
            raise ArtifactError(
                f"{folder} holds something other than a pruned model and is left alone. Choose "
                "another folder."
            )
        try:
            write_folder(folder, self._write)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"The pruned model cannot be written to {folder}: {error}. Check the folder's "
                "permissions and the free space."
            ) from error

    def _write(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps(self.record(), indent=2) + "\n", "utf-8")


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / RECORD).is_file() or not any(folder.iterdir()))


def stock_class(model: PreTrainedModel) -> Any:
    """Returns the transformers class of a model, pruned or not.

    Raises:
        UnsupportedModelError: If it is no causal LM of transformers.
    """
    stock = getattr(type(model), "stock_class", type(model))
    config_class = getattr(stock, "config_class", None)
    # Asked by its config: a look at all classes would import every model of transformers.
    if config_class is None or MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None) is not stock:
        raise UnsupportedModelError(
            f"The model is a {type(model).__name__}. Give a causal LM of transformers without "
            "adapters."
        )
    return stock


def is_pruned(model: PreTrainedModel) -> bool:
    """True if a model already has a pruned class."""
    return hasattr(type(model), "stock_class")


def to_pruned(model: PreTrainedModel, base: ModelShape) -> PreTrainedModel:
    """Turns a model whose layers were cut into the class that can be saved, in place.

    The forward pass stays the same.

    Args:
        model: The model; its hidden size is that of its config.
        base: The shape before pruning, layers that were left out not counted.

    Raises:
        UnsupportedModelError: If the class or the shapes of the model are not supported.
    """
    structure, widths, stock = structure_of(model), layer_widths(model), stock_class(model)
    for index, (width, was) in enumerate(zip(widths, base.layers, strict=True)):
        if any(a > b for a, b in zip(astuple(width), astuple(was), strict=True)):
            raise UnsupportedModelError(
                f"Layer {index} has {width}, more than {was} before pruning according to the "
                "base model's config. Set the config back to the sizes of the base model."
            )
    config_class, model_class = register(stock)
    config = copy.deepcopy(model.config)
    config.__class__ = config_class
    config.allow_global_per_layer_attribute_access = True
    for key, value in structure.to_config(base.layers[0]).items():
        setattr(config, key, value)
    config.structure = structure_entry(structure)
    config.per_layer_config = {i: structure.to_config(w) for i, w in enumerate(widths)}
    config.architectures = [model_class.__name__]
    set_config(model, config)
    forget_weight_names(model)
    for layer, width in zip(decoder_layers(model), widths, strict=True):
        structure.repair(layer, width)
    model.__class__ = model_class
    return model


def load_pruned(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    device_map: str = "",
    quantize: str = "",
) -> PrunedModel:
    """Loads what `PrunedModel.save` wrote.

    Args:
        folder: The folder.
        device: Where the model goes.
        dtype: Type of the weights; ``"auto"`` keeps that of the files.
        device_map: How accelerate spreads it over devices; empty puts all on `device`.
        quantize: ``"8bit"`` or ``"4bit"`` quantizes the matrices of the layers; `dtype` is that of
            the other weights then.

    Raises:
        ArtifactError: If the folder has no valid pruned model.
        ConfigError: If it cannot be quantized here.
    """
    folder, device = Path(folder), torch.device(device)
    quantization = quantization_config(quantize, device, dtype)
    # Quantized weights are made on their device and may not be moved.
    placement = device_map or ({"": device} if quantization else None)
    record = read_record(folder)
    check_checkpoint(folder)
    try:
        model, notes = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=placement,
            quantization_config=quantization,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the readers of a torn file raise whatever they stumble upon
        raise _torn(
            folder, (str(error).strip().splitlines() or [type(error).__name__])[0]
        ) from error
    wrong = sorted({*notes["missing_keys"], *notes["unexpected_keys"]})
    if wrong:
        raise _torn(folder, f"{wrong[0]} is missing or unknown")
    base = recorded(folder, record)
    try:
        pruned = PrunedModel.described(
            model if placement else model.to(device),
            tokenizer,
            base_shape=base.shape,
            base_footprint=base.footprint,
            kept_layers=base.kept_layers,
            pruned_layers=record["pruned_layers"],
            provenance=record["provenance"],
        )
        if quantization:  # what is counted of packed weights is not what the model has
            pruned.footprint = Footprint(**record["footprint"])
    except (KeyError, TypeError, UnsupportedModelError) as error:
        raise _torn(folder, f"{RECORD} cannot be read") from error
    if pruned.record() != record:
        raise _torn(folder, f"{RECORD} describes another model")
    return pruned


class Recorded(NamedTuple):
    """Shapes of a model before pruning, from its record.

    Attributes:
        shape: Its hidden size and widths.
        footprint: What it cost.
        kept_layers: For each layer of the pruned model the number that it had.
    """

    shape: ModelShape
    footprint: Footprint
    kept_layers: tuple[int, ...]


def read_record(folder: Path) -> dict[str, Any]:
    """Reads the record beside a pruned model.

    Raises:
        ArtifactError: If there is none, or it is torn.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text("utf-8"))
        intact = isinstance(record["provenance"], dict)
    except OSError as error:
        raise ArtifactError(
            f"{folder} has no pruned model: {RECORD} is missing. Give a folder that the prune "
            "stage wrote."
        ) from error
    except (ValueError, TypeError, KeyError):
        intact = False
    if not intact:
        raise _torn(folder, f"{RECORD} cannot be read")
    return record


def recorded(folder: Path, record: dict[str, Any]) -> Recorded:
    """Takes what the model was before from a record.

    Raises:
        ArtifactError: If the record is torn, or contradicts itself.
    """
    try:
        base, now = (ModelShape.from_json(record[key]) for key in ("base_shape", "shape"))
        kept = tuple(int(number) for number in record["kept_layers"])
        figures = Footprint(**record["base_footprint"])
        numbers = all(type(value) is int and value > 0 for value in vars(figures).values())
    except (KeyError, TypeError, ValueError) as error:
        raise _torn(folder, f"{RECORD} cannot be read") from error
    ascending = list(kept) == sorted({number for number in kept if 0 <= number < len(base.layers)})
    if not numbers or not ascending or len(kept) != len(now.layers):
        raise _torn(folder, f"{RECORD} contradicts itself")
    return Recorded(base, figures, kept)


def _torn(folder: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{folder} has no valid pruned model: {reason.rstrip('.')}. Delete it and prune again."
    )
