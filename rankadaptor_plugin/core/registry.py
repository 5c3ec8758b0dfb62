"""Names to objects, loaded on first use.

A target is an object or a string ``"module:object"``. Strings keep ``--help`` free of torch, and
a plugin with a missing dependency hurts only those who name it.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Generic, TypeVar, cast

from rankadaptor_plugin.core.errors import PluginError, UnknownNameError

T = TypeVar("T")


def suggestion(name: str, known: list[str]) -> str:
    """Returns `` Did you mean 'x'?`` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class Registry(Generic[T]):
    """Maps names to objects of one kind, for example all samplers.

    Args:
        kind: What the registry holds, in the singular, for messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._targets: dict[str, T | str] = {}

    def __call__(self, name: str, target: T | str) -> None:
        """Registers a target under a name; a later plugin may not take a taken name.

        Raises:
            PluginError: If the name is taken.
        """
        if name in self._targets:
            raise PluginError(
                f"The {self.kind} {name!r} is registered twice. Rename one of the two."
            )
        self._targets[name] = target

    def names(self) -> list[str]:
        """Returns all registered names, sorted."""
        return sorted(self._targets)

    def check(self, name: str) -> None:
        """Refuses a name that is not registered; nothing is imported.

        Raises:
            UnknownNameError: With the names that there are.
        """
        if name not in self._targets:
            raise UnknownNameError(
                f"Unknown {self.kind} {name!r}.{suggestion(name, self.names())} "
                f"Registered: {', '.join(self.names()) or 'none'}."
            )

    def get(self, name: str) -> T:
        """Returns the object registered under a name, importing it if need be.

        Raises:
            UnknownNameError: If no such name is registered.
            PluginError: If the target cannot be imported.
        """
        self.check(name)
        target = self._targets[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            try:
                target = cast("T", getattr(importlib.import_module(module), attribute))
            except Exception as error:  # importing runs the plugin's code, which may raise anything
                raise PluginError(
                    f"The {self.kind} {name!r} cannot be loaded from {self._targets[name]!r}: "
                    f"{error}."
                ) from error
            self._targets[name] = target
        return target
