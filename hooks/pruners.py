"""Built-in pruners."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin import hookimpl

if TYPE_CHECKING:
    from rankadaptor_plugin.core.registry import Registry
    from rankadaptor_plugin.pruning.contract import Pruner


@hookimpl
def rankadaptor_register_pruners(register: Registry[Pruner]) -> None:
    """Registers LLM-Pruner's block-wise and channel-wise pruning, and Shortened LLaMA's."""
    register("width", "rankadaptor_plugin.pruning.width:prune_width")
    register("channel", "rankadaptor_plugin.pruning.channel:prune_channel")
    register("depth", "rankadaptor_plugin.pruning.depth:prune_depth")
