"""The recovery stage ``rankadaptor``: search, confirm, deliver."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin import hookimpl

if TYPE_CHECKING:
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.pipeline.context import Recovered, RunContext


@hookimpl(trylast=True)
def rankadaptor_post_prune(pruned: PrunedModel, context: RunContext) -> Recovered:
    """Searches the rank allocation, compares it with uniform LoRA, delivers the better one."""
    from rankadaptor_plugin.pipeline.stage import recover_pruned

    return recover_pruned(pruned, context)
