"""Decoders of transformers, with even or uneven widths.

`families` maps the matrices of each model family, `structures` reads units and widths off a model,
`checkpoints` loads and checks folders, `pruned_model` saves and loads pruned models, and
`modeling_rankadaptor` is the modeling code that exports carry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin.core.lazy import lazy_exports

if TYPE_CHECKING:
    from rankadaptor_plugin.models.checkpoints import check, load_model, load_tokenizer
    from rankadaptor_plugin.models.families import register_family
    from rankadaptor_plugin.models.modeling_rankadaptor import Structure
    from rankadaptor_plugin.models.pruned_model import PrunedModel, load_pruned

__all__ = [
    "PrunedModel",
    "Structure",
    "check",
    "load_model",
    "load_pruned",
    "load_tokenizer",
    "register_family",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "PrunedModel": "pruned_model",
        "Structure": "modeling_rankadaptor",
        "check": "checkpoints",
        "load_model": "checkpoints",
        "load_pruned": "pruned_model",
        "load_tokenizer": "checkpoints",
        "register_family": "families",
    },
)
