"""Pruning: importance scores and cuts; the only package that knows torch-pruning.

Three pruners: `width` (heads and MLP channels, LLM-Pruner), `channel` (the hidden size) and `depth`
(whole blocks, Shortened LLaMA). `compensation` refits what is left. Scores of units are in
`importance`, streamed gradients in `gradients`, and what all pruners share, with the bridge to
torch-pruning, in `cutting`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin.core.lazy import lazy_exports

if TYPE_CHECKING:
    from rankadaptor_plugin.pruning.checks import check
    from rankadaptor_plugin.pruning.compensation import Compensation, compensate
    from rankadaptor_plugin.pruning.cutting import Pruner, describe_pruned, traceable

__all__ = ["Compensation", "Pruner", "check", "compensate", "describe_pruned", "traceable"]

__getattr__ = lazy_exports(
    __name__,
    {
        "Compensation": "compensation",
        "Pruner": "cutting",
        "check": "checks",
        "compensate": "compensation",
        "describe_pruned": "cutting",
        "traceable": "cutting",
    },
)
