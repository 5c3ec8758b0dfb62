"""Causal language models whose layers differ in width, for every family.

Stock transformers classes give every layer the same width, so each has a subclass here: for
``LlamaForCausalLM`` it is ``PrunedLlamaForCausalLM`` with the model type ``rankadaptor_llama``. The
classes are made when they are asked for by name. A config keeps the sizes before pruning as its
global values, the widths of cut layers under transformers' native key ``per_layer_config``, and
under ``structure`` where the matrices of a layer are.

This file needs torch and transformers alone: an export with remote code carries a copy of it, and
then loads where the package is not installed.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import asdict, dataclass
from typing import Any

import transformers
from torch import nn

PREFIX = "rankadaptor_"
"""Starts the model type of a pruned model; that of its family follows."""

# Only warns when a global value of an uneven config is read, and ours are meant to be.
logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").setLevel("ERROR")


@dataclass(frozen=True)
class LayerWidths:
    """Widths of one decoder layer.

    Attributes:
        heads: Query heads.
        kv_heads: Key-value heads, a divisor of the query heads.
        channels: Hidden channels of the MLP.
    """

    heads: int
    kv_heads: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The map of one family: where in a decoder layer its matrices are.

    Attributes:
        model_type: Name of the family in ``config.json``.
        layers: The list of decoder layers, below the causal LM.
        attention: The attention module.
        head_size: Attribute of the attention module with the size of a head.
        query_key_value: The matrices of queries, keys and values, or one matrix of all three.
        interleaved: Whether one matrix of all three goes KV group by KV group (queries, key,
            value) rather than all queries first, then all keys, then all values.
        output: Matrix that reads the heads.
        expand: Matrices whose rows are the channels.
        expand_blocks: How often the channels stand in a matrix of ``expand``, one block after the
            other: 2 where gate and up projection are one matrix.
        contract: Matrix that reads the channels.
        norms: Norms of a layer over the hidden size; empty where that cannot be pruned.
        final_norm: The norm behind the last layer, below the causal LM.
        heads_key: Query heads in the config.
        kv_heads_key: Key-value heads in the config; empty if there are as many as query heads.
        channels_key: MLP channels in the config.
        prunable_heads: False where positions are tied to the number of heads (ALiBi).
        cached_per_query: Whether the key-value cache holds shared heads once per query head (not
            where all query heads share one).
        own_config: Whether the attention reads the number of its heads from the config.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    head_size: str = "head_dim"
    query_key_value: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    interleaved: bool = False
    output: str = "self_attn.o_proj"
    expand: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    expand_blocks: int = 1
    contract: str = "mlp.down_proj"
    norms: tuple[str, ...] = ()
    final_norm: str = "model.norm"
    heads_key: str = "num_attention_heads"
    kv_heads_key: str = "num_key_value_heads"
    channels_key: str = "intermediate_size"
    prunable_heads: bool = True
    cached_per_query: bool = False
    own_config: bool = False

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of all matrices of a layer."""
        return (*self.query_key_value, self.output, *self.expand, self.contract)

    def size_of_head(self, layer: nn.Module) -> int:
        """Returns the size of an attention head."""
        return int(getattr(layer.get_submodule(self.attention), self.head_size))

    def shapes(
        self, layer: nn.Module, widths: LayerWidths, hidden: int
    ) -> dict[str, tuple[int, int]]:
        """Returns the shape (out, in) that each matrix has at the given widths."""
        size = self.size_of_head(layer)
        queries, keys = widths.heads * size, widths.kv_heads * size
        fused = len(self.query_key_value) == 1
        rows = (queries + 2 * keys,) if fused else (queries, keys, keys)
        return {
            **{name: (r, hidden) for name, r in zip(self.query_key_value, rows, strict=True)},
            self.output: (hidden, queries),
            **dict.fromkeys(self.expand, (self.expand_blocks * widths.channels, hidden)),
            self.contract: (hidden, widths.channels),
        }

    def to_config(self, widths: LayerWidths) -> dict[str, int]:
        """Returns widths as entries of a transformers config."""
        entries = {
            self.heads_key: widths.heads,
            self.kv_heads_key: widths.kv_heads,
            self.channels_key: widths.channels,
        }
        return {key: value for key, value in entries.items() if key}

    def from_config(self, config: Any) -> LayerWidths:
        """Reads widths from a transformers config."""
        heads = getattr(config, self.heads_key)
        kv_heads = getattr(config, self.kv_heads_key) if self.kv_heads_key else heads
        return LayerWidths(heads, kv_heads, getattr(config, self.channels_key))

    def resize(self, layer: nn.Module, widths: LayerWidths, hidden: int) -> None:
        """Cuts a freshly built layer down to given widths, without regard to what is in it."""
        for name, (rows, columns) in self.shapes(layer, widths, hidden).items():
            take(layer.get_submodule(name), slice(rows), slice(columns))
        self.repair(layer, widths)

    def repair(self, layer: nn.Module, widths: LayerWidths) -> None:
        """Brings the numbers that modules keep beside their matrices up to date."""
        attention: Any = layer.get_submodule(self.attention)
        numbers = {
            "num_heads": widths.heads,
            "num_attention_heads": widths.heads,
            "num_kv_heads": widths.kv_heads,
            "num_key_value_heads": widths.kv_heads,
            "num_key_value_groups": widths.heads // widths.kv_heads,
            "embed_dim": widths.heads * self.size_of_head(layer),
            "split_size": widths.heads * self.size_of_head(layer),
        }
        for key, number in numbers.items():
            if hasattr(attention, key):
                setattr(attention, key, number)
        if self.own_config:
            shared = getattr(attention.config, "_shared", attention.config)
            attention.config = _LayerConfig(shared, self.to_config(widths))
        mlp: Any = layer.get_submodule(self.contract.rpartition(".")[0])
        if hasattr(mlp, "intermediate_size"):  # not read in the forward pass, but by other tools
            mlp.intermediate_size = widths.channels


class _LayerConfig:
    """A config with values of its own for one layer; all else is looked up in the shared one.

    A copy would not follow when the attention implementation of the model is changed.
    """

    def __init__(self, shared: Any, own: dict[str, int]) -> None:
        self.__dict__.update(own, _shared=shared)

    def __getattr__(self, name: str) -> Any:
        if name == "_shared" or name.startswith("__"):  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._shared, name)


def take(module: Any, rows: Any, columns: Any) -> None:
    """Keeps some rows and columns of a matrix (out, in); which of it is frozen stays as it is.

    Args:
        module: ``nn.Linear``, or transformers' ``Conv1D``, which keeps its weight as (in, out).
        rows: A slice or an index tensor.
        columns: The same.
    """
    transposed = hasattr(module, "nf")
    weight = module.weight
    kept = weight.detach()[columns][:, rows] if transposed else weight.detach()[rows][:, columns]
    if kept.shape == weight.shape:
        return
    # Indexing keeps device and type; on the meta device it costs nothing.
    module.weight = nn.Parameter(kept.clone().contiguous(), requires_grad=weight.requires_grad)
    bias = module.bias
    if bias is not None:
        module.bias = nn.Parameter(bias.detach()[rows].clone(), requires_grad=bias.requires_grad)
    if transposed:
        module.nx, module.nf = kept.shape
    else:
        module.out_features, module.in_features = kept.shape


class _PrunedConfig:
    """Additions to the config classes of transformers."""

    structure: Any

    def __post_init__(self, **kwargs: Any) -> None:
        # The global values are the sizes before pruning, and anyone may read them as such.
        kwargs["allow_global_per_layer_attribute_access"] = True
        super().__post_init__(**kwargs)  # type: ignore[misc] # of the stock class behind this one

    def validate_architecture(self) -> None:
        """Lets the heads not divide the hidden size, as pruned ones need not."""


class _PrunedModel:
    """Additions to the model classes of transformers."""

    stock_class: Any
    get_submodule: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        build: Any = super().__init__
        build(config, *args, **kwargs)  # all layers with the global values
        structure = structure_from(config)
        layers = self.get_submodule(structure.layers)
        for layer, own in zip(layers, config.per_layer_config, strict=True):
            structure.resize(layer, structure.from_config(own), config.hidden_size)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for attention in the source of a class's module, that is in this file.
        return bool(cls.stock_class._can_set_attn_implementation())


def structure_from(config: Any) -> Structure:
    """Returns the map that the config of a pruned model carries."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.structure.items()
    }
    return Structure(**fields)


def structure_entry(structure: Structure) -> dict[str, Any]:
    """Returns a map as the JSON value that a config carries."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(structure).items()}


@functools.cache
def pruned_config_class(stock: Any) -> Any:
    """Returns the config class of pruned models for a stock config class."""
    model_type = PREFIX + stock.model_type
    fields = {"model_type": model_type, "__module__": __name__}
    return type("Pruned" + stock.__name__, (_PrunedConfig, stock), fields)


@functools.cache
def pruned_model_class(stock: Any) -> Any:
    """Returns the class of pruned models for a stock class, registered with ``AutoModel...``."""
    config_class = pruned_config_class(stock.config_class)
    fields = {"config_class": config_class, "stock_class": stock, "__module__": __name__}
    return type("Pruned" + stock.__name__, (_PrunedModel, stock), fields)


def __getattr__(name: str) -> Any:
    """Makes ``Pruned<Class>`` for any config or model class of transformers."""
    stock = getattr(transformers, name[len("Pruned") :], None) if name[:6] == "Pruned" else None
    if not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(stock, transformers.PreTrainedConfig):
        return pruned_config_class(stock)
    return pruned_model_class(stock)
