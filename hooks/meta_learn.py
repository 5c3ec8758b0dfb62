"""Built-in command ``meta-learn``."""

from __future__ import annotations

from pathlib import Path

import click

from rankadaptor_plugin import hookimpl


@hookimpl
def rankadaptor_register_commands(cli: click.Group) -> None:
    """Adds ``meta-learn``."""
    cli.add_command(meta_learn)


@click.command("meta-learn")
@click.argument("studies", nargs=-1, required=True, metavar="STUDY...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="File to write, such as meta.safetensors; one written before is replaced.",
)
def meta_learn(studies: tuple[str, ...], out: Path) -> None:
    """Collect finished studies for later searches to learn from.

    STUDY is a run folder, an SQLite file or a storage URL of Optuna, with #NAME for one study among
    several. Name the file under [search] meta in a run file; the models may differ in depth.
    """
    from rankadaptor_plugin.search.transfer.meta_knowledge import collect

    knowledge = collect(studies, out)
    for source in knowledge.sources:
        tasks = ", ".join(source.tasks) or "none, the objective alone"
        click.echo(
            f"{source.name}: {len(source.rows)} trials of {source.space.layers} layers, "
            f"{len(source.tasks)} tasks ({tasks})"
        )
    click.echo(f"Wrote {out}. Use it with [search] meta.")
