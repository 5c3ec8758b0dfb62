"""What plugins register, and who provides them."""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.errors import PluginError
from rankadaptor_plugin.pipeline.context import Registries

if TYPE_CHECKING:
    import pluggy

    from rankadaptor_plugin.config.tables import RunConfig

GROUP = "rankadaptor_plugin"
"""Entry-point group of third-party plugins."""


def registries(manager: pluggy.PluginManager) -> Registries:
    """Returns all names that the plugins register."""
    found = Registries()
    manager.hook.rankadaptor_register_pruners(register=found.pruners)
    manager.hook.rankadaptor_register_families(register=found.families)
    manager.hook.rankadaptor_register_oracles(register=found.oracles)
    manager.hook.rankadaptor_register_performance_models(register=found.performance_models)
    manager.hook.rankadaptor_register_samplers(register=found.samplers)
    return found


def check_names(found: Registries, config: RunConfig) -> None:
    """Checks, by loading it, everything that a run file names, and makes all families known.

    Raises:
        UnknownNameError: If no plugin registers a name.
        PluginError: If what is registered cannot be loaded, or is no map of its model type.
    """
    register_families(found)
    found.pruners.get(config.prune.method)
    for oracle in filter(None, (config.oracle.name, config.oracle.search_name)):
        found.oracles.get(oracle)
    if not config.search.is_fixed:
        found.samplers.get(config.search.method)
    found.performance_models.get(config.performance_model.name)


def register_families(found: Registries) -> None:
    """Makes the families of all plugins known, so that their models can be pruned and loaded.

    Raises:
        PluginError: If what is registered cannot be loaded, or is no map of its model type.
    """
    from rankadaptor_plugin.models.families import (
        register_family,  # loads torch, unlike a mere list
    )

    for model_type in found.families.names():
        structure = found.families.get(model_type)
        if getattr(structure, "model_type", None) != model_type:
            raise PluginError(
                f'The model family "{model_type}" is registered with {structure!r}. Register a '
                "Structure of that model_type."
            )
        register_family(structure)


def describe(manager: pluggy.PluginManager) -> dict[str, Any]:
    """Returns what is active.

    Returns:
        ``plugins``: name, provider and hooks of each plugin, in the order of their calls;
        ``registered``: names by kind.
    """
    providers = {point.name: provider(point) for point in entry_points(group=GROUP)}
    version = importlib.metadata.version("rankadaptor-plugin")
    active = [
        {
            "name": name,
            "provider": providers.get(name, f"rankadaptor-plugin {version}, built in"),
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
            "model families": found.families.names(),
            "oracles": found.oracles.names(),
            "performance models": found.performance_models.names(),
            "samplers": found.samplers.names(),
        },
    }


def provider(point: EntryPoint) -> str:
    """Returns name and version of the distribution that an entry point belongs to."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
