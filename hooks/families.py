"""Built-in model families."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.models.registration import BUILT_IN

if TYPE_CHECKING:
    from rankadaptor_plugin.core.registry import Registry
    from rankadaptor_plugin.models.modeling_rankadaptor import Structure


@hookimpl
def rankadaptor_register_families(register: Registry[Structure]) -> None:
    """Registers the maps of `rankadaptor_plugin.models.families`."""
    for model_type in BUILT_IN:
        register(model_type, f"rankadaptor_plugin.models.families:{model_type.upper()}")
