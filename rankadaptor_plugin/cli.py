"""The ``rankadaptor-plugin`` command line.

A command parses, calls one function and prints. What is heavy is imported inside the command, so
that help answers at once.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rankadaptor_plugin import __version__, plugins
from rankadaptor_plugin.core.errors import RankAdaptorError

if TYPE_CHECKING:
    import pluggy


_INTERRUPTED = 130  # what shells give a command that ended by Ctrl-C


class _Group(click.Group):
    """Shows our errors as one line and ends with their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RankAdaptorError as error:
            click.echo(f"Error: {' '.join(str(error).split())}", err=True)
            ctx.exit(error.exit_code)
        except RuntimeError as error:
            # By name, as help must not load torch.
            if type(error).__name__ != "OutOfMemoryError":
                raise
            reason = str(error).split(". ")[0]
            click.echo(
                f"Error: {reason}. Set a smaller micro_batch_size, batch_tokens or max_tokens, "
                'fewer or shorter calibration sequences, or device_map = "auto" to use all GPUs; '
                "then run again.",
                err=True,
            )
            ctx.exit(1)


def build_cli(manager: pluggy.PluginManager) -> click.Group:
    """Returns the command group with the commands of all plugins."""
    group = _Group(
        "rankadaptor-plugin",
        help="Recover pruned LLMs with per-layer LoRA ranks, and say honestly what it gained.",
        context_settings={"help_option_names": ["-h", "--help"], "obj": manager},
    )
    group = click.version_option(__version__, prog_name="rankadaptor-plugin")(group)
    for command in (run, noise, init, task_path):
        group.add_command(command)
    manager.hook.rankadaptor_register_commands(cli=group)
    return group


@click.command()
@click.argument("run_file", type=click.Path(path_type=Path), required=False, metavar="[RUN.toml]")
@click.option("--output", type=click.Path(path_type=Path), help="Run folder, instead of output.")
@click.option("--quiet", "-q", is_flag=True, help="Print the verdict alone.")
@click.pass_obj
def run(
    manager: pluggy.PluginManager, run_file: Path | None, output: Path | None, quiet: bool
) -> None:
    """Prune, search ranks, recover, evaluate, report.

    Without RUN.toml, runs the embedded default: a tiny Llama on seven small tasks. A run that was
    broken off goes on when the same command is given again.
    """
    began = time.perf_counter()
    from rankadaptor_plugin.pipeline.command import run_file_or_embedded

    try:
        click.echo(run_file_or_embedded(manager, run_file, output, quiet=quiet, began=began))
    except KeyboardInterrupt:
        click.echo("Interrupted. The same command goes on from what is finished.", err=True)
        raise click.exceptions.Exit(_INTERRUPTED) from None


@click.command()
@click.argument("run_file", type=click.Path(path_type=Path), required=False, metavar="[RUN.toml]")
@click.option("--output", type=click.Path(path_type=Path), help="Run folder, instead of output.")
@click.option("--seeds", type=int, help="Fine-tunes of each allocation, instead of noise.seeds.")
@click.option("--allocations", type=int, help="Allocations, instead of noise.allocations.")
@click.option(
    "--gain",
    "gains",
    type=float,
    multiple=True,
    help="Gain to detect, 0.01 is one point; may be repeated. Instead of noise.gains.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def noise(
    manager: pluggy.PluginManager,
    run_file: Path | None,
    output: Path | None,
    seeds: int | None,
    allocations: int | None,
    gains: tuple[float, ...],
    as_json: bool,
) -> None:
    """Measure how much of the scores is noise, before a search.

    Fine-tunes uniform LoRA and a few random allocations with several seeds, and tells what gain
    could be detected, with how many fine-tunes, and how long they take. A run of the same run file
    goes on from there. Without RUN.toml, takes the embedded default.
    """
    began = time.perf_counter()
    from rankadaptor_plugin.pipeline.command import measured_noise

    given = {"seeds": seeds, "allocations": allocations, "gains": list(gains) or None}
    changes = {key: value for key, value in given.items() if value is not None}
    try:
        click.echo(measured_noise(manager, run_file, output, changes, as_json=as_json, began=began))
    except KeyboardInterrupt:
        click.echo("Interrupted. The same command goes on from what is finished.", err=True)
        raise click.exceptions.Exit(_INTERRUPTED) from None


@click.command()
@click.argument("run_file", type=click.Path(path_type=Path), metavar="RUN.toml")
@click.option("--model", help="Model folder to write into it; the embedded model if left out.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def init(run_file: Path, model: str | None, force: bool) -> None:
    """Write a commented run file with every setting."""
    from rankadaptor_plugin.config.template import write_template

    write_template(run_file, model=model, force=force)
    click.echo(f"Wrote {run_file}. Start it with: rankadaptor-plugin run {run_file}")


@click.command("task-path")
def task_path() -> None:
    """Print the folder of our lm-eval tasks, for lm_eval --include_path."""
    from rankadaptor_plugin.tasks import task_dir

    click.echo(task_dir())


def main() -> None:
    """Runs the command line."""
    # Progress bars and notices of the libraries below would tear our own display apart.
    if sys.argv[1:2] != ["lm-eval"]:  # which has a display of its own
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        manager = plugins.plugin_manager()
    except RankAdaptorError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    build_cli(manager)()
