"""Built-in commands beside those of a run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from rankadaptor_plugin import hookimpl

if TYPE_CHECKING:
    import pluggy


@hookimpl
def rankadaptor_register_commands(cli: click.Group) -> None:
    """Adds ``plugins``."""
    cli.add_command(plugins)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def plugins(manager: pluggy.PluginManager, as_json: bool) -> None:
    """List plugins, who provides them, their hooks and every registered name."""
    from rankadaptor_plugin.plugin_list import describe

    found = describe(manager)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for plugin in found["plugins"]:
        click.echo(f"{plugin['name']} ({plugin['provider']})")
        for hook in plugin["hooks"]:
            click.echo(f"    {hook}")
    click.echo()
    for kind, names in found["registered"].items():
        click.echo(f"{kind}: {', '.join(names)}")
