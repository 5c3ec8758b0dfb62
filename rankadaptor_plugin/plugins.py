"""Finds plugins and gathers what they register.

The manager comes from a function, so nothing global leaks between two runs or two tests.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from rankadaptor_plugin.context import Registries
from rankadaptor_plugin.errors import PluginError
from rankadaptor_plugin.hooks import (
    commands,
    oracles,
    pruners,
    recovery,
    search,
    specs,
)

if TYPE_CHECKING:
    from rankadaptor_plugin.config import RunConfig

GROUP = "rankadaptor_plugin"
"""Entry-point group of third-party plugins."""

BUILT_IN = {
    "pruners": pruners,
    "oracles": oracles,
    "search": search,
    "commands": commands,
    "rankadaptor": recovery,
}


def plugin_manager(*, third_party: bool = True) -> pluggy.PluginManager:
    """Returns a manager with the built-in plugins and, if asked for, the installed ones.

    Raises:
        PluginError: If a plugin cannot be loaded, or implements a hook that does not exist.
    """
    manager = pluggy.PluginManager("rankadaptor_plugin")
    manager.add_hookspecs(specs)
    for name, module in BUILT_IN.items():
        manager.register(module, name=name)
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


def registries(manager: pluggy.PluginManager) -> Registries:
    """Returns all names that the plugins register."""
    found = Registries()
    manager.hook.rankadaptor_register_pruners(register=found.pruners)
    manager.hook.rankadaptor_register_oracles(register=found.oracles)
    manager.hook.rankadaptor_register_performance_models(register=found.performance_models)
    manager.hook.rankadaptor_register_samplers(register=found.samplers)
    return found


def check_names(found: Registries, config: RunConfig) -> None:
    """Checks, by loading it, everything that a run file names for the stages after the pruner.

    Raises:
        UnknownNameError: If no plugin registers a name.
        PluginError: If what is registered cannot be loaded.
    """
    found.oracles.get(config.oracle.name)
    found.samplers.get(config.search.sampler)
    found.performance_models.get(config.performance_model.name)


def describe(manager: pluggy.PluginManager) -> dict[str, Any]:
    """Returns what is active.

    Returns:
        ``plugins``: name, provider and hooks of each plugin, in the order of their calls;
        ``registered``: names by kind.
    """
    providers = {point.name: _provider(point) for point in entry_points(group=GROUP)}
    version = importlib.metadata.version("rankadaptor-plugin")
    active = [
        {
            "name": name,
            "provider": f"rankadaptor-plugin {version}, built in"
            if name in BUILT_IN
            else providers.get(name, "unknown"),
            "hooks": sorted(caller.name for caller in manager.get_hookcallers(plugin) or []),
        }
        for name, plugin in manager.list_name_plugin()
        if plugin is not None
    ]
    found = registries(manager)
    return {
        "plugins": active,
        "registered": {
            "pruners": found.pruners.names(),
            "oracles": found.oracles.names(),
            "performance models": found.performance_models.names(),
            "samplers": found.samplers.names(),
        },
    }


def _register(manager: pluggy.PluginManager, point: EntryPoint) -> None:
    who = f"The plugin {point.name!r} of {_provider(point)}"
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
            f"The plugin {point.name!r} of {_provider(point)} cannot be loaded from "
            f"{point.value!r}: {error}. Repair or uninstall it."
        ) from error


def _provider(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
