"""Built-in model families."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.lazy_registration import BUILT_IN

if TYPE_CHECKING:
    from rankadaptor_plugin.modeling_rankadaptor import Structure
    from rankadaptor_plugin.registry import Registry


@hookimpl
def rankadaptor_register_families(register: Registry[Structure]) -> None:
    """Registers the maps of `rankadaptor_plugin.families`."""
    for model_type in BUILT_IN:
        register(model_type, f"rankadaptor_plugin.families:{model_type.upper()}")
