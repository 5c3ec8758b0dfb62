"""The recovery methods: what each puts on the base model, what it trains, and how it ends.

`begin` starts a fine-tune by any of them; `parse_method` reads their names, such as ``eva+dora``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin.core.lazy import lazy_exports

if TYPE_CHECKING:
    from rankadaptor_plugin.recovery.methods.methods import Method, Tuned, begin, parse_method

__all__ = ["Method", "Tuned", "begin", "parse_method"]

__getattr__ = lazy_exports(__name__, dict.fromkeys(__all__, "methods"))
