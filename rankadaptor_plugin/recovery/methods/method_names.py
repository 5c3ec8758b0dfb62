"""What the ways to fine-tune are called, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rankadaptor_plugin.core.errors import ConfigError, RankSpaceError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.registry import suggestion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rankadaptor_plugin.config.tables import RecoveryConfig

LORA = "lora"
"""LoRA with the ranks as they are given."""

NONE = "none"
"""The method that fine-tunes nothing."""

SWITCHES = ("dora", "rslora", "pissa")
"""What may be added to a method, in the order in which it is written."""

METHODS = {
    LORA: SWITCHES,
    "rankadaptor": SWITCHES,
    "pattern": SWITCHES,
    "eva": ("dora", "rslora"),
    "adalora": (),
    "lora-fa": (),
    NONE: (),
}
"""Each method with the switches that it can have."""

_RANKS = "pattern:4-6-10-12"


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: One of `METHODS`.
        ranks: The numbers of a pattern; empty for other methods.
        dora: Weight-decomposed LoRA, arXiv 2402.09353.
        rslora: Scaling by alpha / sqrt(r), arXiv 2312.03732.
        pissa: First weights from singular vectors, arXiv 2404.02948.
    """

    name: str
    ranks: tuple[int, ...] = ()
    dora: bool = False
    rslora: bool = False
    pissa: bool = False

    def __str__(self) -> str:
        """Returns how it is written; ``lora`` with a switch is named by the switch alone."""
        name = self.name + (":" + "-".join(map(str, self.ranks)) if self.ranks else "")
        on = [switch for switch in SWITCHES if getattr(self, switch)]
        return "+".join(on if on and name == LORA else [name, *on])

    def with_switches(self, config: RecoveryConfig) -> Method:
        """Returns the method with the switches that a run turns on for every fine-tune.

        Raises:
            ConfigError: If the method cannot have one of them.
        """
        if self.name == NONE:
            return self
        on = {name: getattr(self, name) or getattr(config, name) for name in SWITCHES}
        return _checked(replace(self, **on))


def parse_method(text: str) -> Method:
    """Reads a method: a name, a switch, or names joined by ``+``, in upper or lower case.

    Examples: ``adalora``, ``dora``, ``lora+rslora``, ``eva+dora``, ``pattern:4-6-10-12+pissa``.

    Raises:
        ConfigError: If it is none, or its parts do not go together.
    """
    first, *rest = (part.strip() for part in text.lower().split("+"))
    if first in SWITCHES:
        first, rest = LORA, [first, *rest]
    name, colon, numbers = (part.strip() for part in first.partition(":"))
    if name not in METHODS or (colon and name != "pattern"):
        known = [*(n for n in METHODS if n != "pattern"), _RANKS, *SWITCHES]
        near = suggestion(first, known) if first else ""
        raise ConfigError(
            f"Unknown recovery method {text!r}.{near} Give one of: {', '.join(known)}; "
            "switches may be added, such as eva+dora."
        )
    for switch in rest:
        if switch not in SWITCHES:
            raise ConfigError(
                f"Unknown switch {switch!r} in the recovery method {text!r}."
                f"{suggestion(switch, list(SWITCHES))} After + give one of: {', '.join(SWITCHES)}."
            )
    ranks = _numbers(numbers, text) if name == "pattern" else ()
    on = {switch: switch in rest for switch in SWITCHES}
    return _checked(Method(name, ranks, **on))


def _numbers(numbers: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in numbers.split("-")]
    # isdecimal alone takes digits of all scripts, which are no way to write ranks here.
    if not all(part.isascii() and part.isdecimal() for part in parts) or not any(map(int, parts)):
        raise ConfigError(
            f"The recovery method {text!r} has no list of ranks. Write whole numbers of 0 or more, "
            f"one of them above 0, as in {_RANKS}."
        )
    return tuple(map(int, parts))


def _checked(method: Method) -> Method:
    able = METHODS[method.name]
    for switch in SWITCHES:
        if getattr(method, switch) and switch not in able:
            can = f"only {' or '.join(able)}" if able else "no switch"
            raise ConfigError(
                f"The recovery method {method.name} cannot be combined with {switch}: it takes "
                f"{can}. Leave {switch} out, also of [recovery]."
            )
    if method.dora and method.pissa:
        raise ConfigError(
            f"The recovery method {method} starts its magnitudes from the base weights (dora) and "
            "replaces these (pissa). Choose one of the two."
        )
    return method


def pattern_allocation(ranks: Sequence[int], layers: int) -> RankAllocation:
    """Spreads ranks over the layers of a model, bottom first, in blocks as equal as can be.

    The paper's example (section 2) has 4, 6, 10 and 12 in the quarters of a model.

    Raises:
        RankSpaceError: If there are more ranks than layers, or none above 0.
    """
    if len(ranks) > layers:
        raise RankSpaceError(
            f"The pattern {'-'.join(map(str, ranks))} has {len(ranks)} ranks for {layers} layers. "
            f"Give at most {layers}."
        )
    if not ranks:
        raise RankSpaceError("The pattern has no ranks. Give at least one.")
    return RankAllocation(tuple(ranks[i * len(ranks) // layers] for i in range(layers)))
