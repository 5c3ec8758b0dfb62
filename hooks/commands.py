"""Built-in commands beside those of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.hooks.compare import compare
from rankadaptor_plugin.hooks.lm_eval import lm_eval

if TYPE_CHECKING:
    import pluggy

    from rankadaptor_plugin.pipeline.export import Format


@hookimpl
def rankadaptor_register_commands(cli: click.Group) -> None:
    """Adds ``compare``, ``lm-eval``, ``plugins``, ``export`` and ``inspect``."""
    for command in (compare, lm_eval, plugins, export, inspect):
        cli.add_command(command)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def plugins(manager: pluggy.PluginManager, as_json: bool) -> None:
    """List plugins, who provides them, their hooks and every registered name."""
    from rankadaptor_plugin.pipeline.registries import describe

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


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option(
    "--format",
    "form",
    type=click.Choice(["hf", "hf-remote-code", "merged"]),
    required=True,
    help="Model and adapter; the same with code; or one model.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder to write, instead of RUN/export-FORMAT.",
)
@click.pass_obj
def export(manager: pluggy.PluginManager, run: Path, form: Format, output: Path | None) -> None:
    """Write a finished run as a model folder.

    RUN is a run folder or a run file. hf loads where this package is installed, hf-remote-code
    and merged also where it is not.
    """
    from rankadaptor_plugin.pipeline.export import export as export_run
    from rankadaptor_plugin.pipeline.registries import register_families, registries

    register_families(registries(manager))
    click.echo(export_run(run, form, output))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def inspect(manager: pluggy.PluginManager, folder: Path, as_json: bool) -> None:
    """Show the layers of a model and what was pruned.

    DIR is a model folder, pruned or not, an export or a run folder. No weights are read.
    """
    from rankadaptor_plugin.models.inspection import inspect_folder
    from rankadaptor_plugin.pipeline.registries import register_families, registries
    from rankadaptor_plugin.report.inspection_text import text

    register_families(registries(manager))
    found = inspect_folder(folder)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        click.echo(text(found, shutil.get_terminal_size().columns))
