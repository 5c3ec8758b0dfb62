"""Built-in pruners."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin import hookimpl

if TYPE_CHECKING:
    from rankadaptor_plugin.context import Pruner
    from rankadaptor_plugin.registry import Registry


@hookimpl
def rankadaptor_register_pruners(register: Registry[Pruner]) -> None:
    """Registers LLM-Pruner's block-wise and channel-wise pruning, and Shortened LLaMA's."""
    register("width", "rankadaptor_plugin.width:prune_width")
    register("channel", "rankadaptor_plugin.channel:prune_channel")
    register("depth", "rankadaptor_plugin.depth:prune_depth")
