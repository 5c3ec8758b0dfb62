"""The recovery stage ``rankadaptor``: search, confirm, deliver."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin import hookimpl

if TYPE_CHECKING:
    from rankadaptor_plugin.context import Recovered, RunContext
    from rankadaptor_plugin.pruned_model import PrunedModel


@hookimpl(trylast=True)
def rankadaptor_post_prune(pruned: PrunedModel, context: RunContext) -> Recovered:
    """Searches the rank allocation, compares it with uniform LoRA, delivers the better one."""
    from rankadaptor_plugin.stage import recover_pruned

    return recover_pruned(pruned, context)
