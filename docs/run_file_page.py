"""Writes the tables of run-file.md from the fields: ``python docs/run_file_page.py``."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from rankadaptor_plugin.config.run_file import toml_value
from rankadaptor_plugin.config.tables import OracleConfig, RunConfig

PAGE = Path(__file__).parent / "run-file.md"
FIRST = "## Top level"

TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def page() -> str:
    """Returns the page: its text as it is, then one table per table of the run file."""
    text, _, _ = PAGE.read_text(encoding="utf-8").partition(FIRST)
    config = RunConfig(oracle=OracleConfig(tasks=("any",)))
    tables = [
        (f"## `[{field.name}]`", getattr(config, field.name))
        for field in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, field.name))
    ]
    return text + "\n".join(_section(*each) for each in [(FIRST, config), *tables])


def _section(title: str, config: Any) -> str:
    hints = typing.get_type_hints(type(config))
    summary = (type(config).__doc__ or "").splitlines()[0]
    lines = [title, "", summary, "", "| key | type | default | allowed | meaning |"]
    lines.append("|---|---|---|---|---|")
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        cells = (
            f"`{field.name}`",
            _type(hints[field.name], field.metadata),
            f"`{toml_value(default)}`",
            _allowed(field.metadata),
            field.metadata["help"],
        )
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _type(hint: Any, rule: Any = ()) -> str:
    items = typing.get_args(hint)
    if "word" in rule:
        return f"`{rule['word']}`, or {_type(items[-1])}"
    if typing.get_origin(hint) is tuple:
        return "list of " + {int: "whole numbers", float: "numbers", str: "texts"}[items[0]]
    if typing.get_origin(hint) is dict:
        return "table of numbers" if items[1] is float else "table"
    return TYPES[hint]


def _allowed(rule: Any) -> str:
    if "choices" in rule:
        return ", ".join(f"`{choice}`" for choice in rule["choices"])
    if "low" in rule and "high" in rule:
        return f"{rule['low']:,} to {rule['high']:,}"
    low = f"at least {rule['low']:,}" if "low" in rule else ""
    high = f"at most {rule['high']:,}" if "high" in rule else ""
    above = f"above {rule['above']:g}" if "above" in rule else ""
    below = f"below {rule['below']:g}" if "below" in rule else ""
    return ", ".join(part for part in (low, above, high, below) if part)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
