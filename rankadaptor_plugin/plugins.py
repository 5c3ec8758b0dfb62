"""Finds plugins.

The manager comes from a function, so nothing global leaks between two runs or two tests.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from rankadaptor_plugin.core.errors import PluginError
from rankadaptor_plugin.hooks import builtin, specs
from rankadaptor_plugin.pipeline.context import GROUP, provider

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

BUILT_IN = "rankadaptor"
"""Name of the built-in plugin."""


def plugin_manager(*, third_party: bool = True) -> pluggy.PluginManager:
    """Returns a manager with the built-in plugin and, if asked for, the installed ones.

    Raises:
        PluginError: If a plugin cannot be loaded, or implements a hook that does not exist.
    """
    manager = pluggy.PluginManager("rankadaptor_plugin")
    manager.add_hookspecs(specs)
    manager.register(builtin, name=BUILT_IN)
    if third_party:
        for point in entry_points(group=GROUP):
            _register(manager, point)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        known = ", ".join(n for n in dir(specs) if n.startswith("rankadaptor_"))
        raise PluginError(
            f"The plugin {manager.get_name(error.plugin)!r} has a hook that does not exist: "
            f"{error}. Known hooks: {known}."
        ) from error
    if os.environ.get("RANKADAPTOR_TRACE"):
        manager.trace.root.setwriter(sys.stderr.write)
        manager.enable_tracing()
    return manager


def _register(manager: pluggy.PluginManager, point: EntryPoint) -> None:
    who = f"The plugin {point.name!r} of {provider(point)}"
    if manager.has_plugin(point.name):
        raise PluginError(
            f"{who} has a name that another plugin has already. Rename its entry point in the "
            f"group {GROUP}, or uninstall one of the two."
        )
    plugin = _load(point)
    if manager.is_registered(plugin):
        raise PluginError(
            f"{who} is {point.value!r}, which is registered as {manager.get_name(plugin)!r} "
            "already. Remove one of the two entry points."
        )
    try:
        manager.register(plugin, name=point.name)
    except pluggy.PluginValidationError as error:  # an argument that the specification lacks
        raise PluginError(
            f"{who} has a hook that does not fit its specification: "
            f"{' '.join(str(error).split())}. Correct its arguments."
        ) from error


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # whatever a stranger's module raises while it is imported
        raise PluginError(
            f"The plugin {point.name!r} of {provider(point)} cannot be loaded from "
            f"{point.value!r}: {error}. Repair or uninstall it."
        ) from error
