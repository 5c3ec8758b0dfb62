"""Writes run-file.md from the fields of the run file: ``python docs/run_file_page.py``."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from rankadaptor_plugin.config.run_file import toml_value
from rankadaptor_plugin.config.tables import OracleConfig, RunConfig

PAGE = Path(__file__).parent / "run-file.md"

HEAD = """\
# The run file

A run file is TOML. `rankadaptor-plugin init RUN.toml` writes one with every setting. What is left
out has its default; `[oracle] tasks` must be given, and for a model of your own also `output` and
`[corpus] path`. Unknown keys, wrong types and values out of range are errors. Relative paths count
from the folder of the run file. The embedded default has values of its own:
[rankadaptor_plugin/embedded/run.toml](../rankadaptor_plugin/embedded/run.toml).

`python docs/run_file_page.py` writes this page; its tables come from
[rankadaptor_plugin/config/tables.py](../rankadaptor_plugin/config/tables.py).

## Keys on the command line

`run` and `noise` take `--set KEY=VALUE`, as often as you like, also without a run file:

```sh
rankadaptor-plugin run RUN.toml --set search.n_trials=10 --set dtype=bfloat16 \\
  --set 'oracle.tasks=["arc_easy", "piqa"]' --set oracle.weights.piqa=2
```

A value is written as in the run file; what is no TOML, such as a bare word, is text. `--set` goes
before the run file, and that before its recipe; of two that set the same key, the last one wins.
Where one setting overrules another, as `num_train_epochs` does `max_steps`, the one of higher rank
counts: `--set recovery.max_steps=5` also cancels the `num_train_epochs` of the file. Relative paths
in `--set`, as in `--output`, count from the current folder. `--output` goes before `--set output`.
"""

TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def page() -> str:
    """Returns the page: one table per table of the run file."""
    config = RunConfig(oracle=OracleConfig(tasks=("any",)))
    tables = [
        (f"`[{field.name}]`", getattr(config, field.name))
        for field in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, field.name))
    ]
    return "\n".join([HEAD, *(_section(*each) for each in [("Top level", config), *tables])])


def _section(title: str, config: Any) -> str:
    hints = typing.get_type_hints(type(config))
    summary = (type(config).__doc__ or "").splitlines()[0]
    lines = [f"## {title}", "", summary, "", "| key | type | default | allowed | meaning |"]
    lines.append("|---|---|---|---|---|")
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        cells = (
            f"`{field.name}`",
            _type(hints[field.name]),
            f"`{toml_value(default)}`",
            _allowed(field.metadata),
            field.metadata["help"],
        )
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _type(hint: Any) -> str:
    items = typing.get_args(hint)
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
