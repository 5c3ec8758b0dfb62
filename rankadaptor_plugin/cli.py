"""The ``rankadaptor-plugin`` command line: a group of the commands that plugins register."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING

import click

from rankadaptor_plugin import __version__, plugins
from rankadaptor_plugin.core.errors import RankAdaptorError
from rankadaptor_plugin.pipeline.commands import CommandGroup

if TYPE_CHECKING:
    import pluggy


def build_cli(manager: pluggy.PluginManager) -> click.Group:
    """Returns the command group with the commands of all plugins."""
    group = CommandGroup(
        "rankadaptor-plugin",
        help="Recover pruned LLMs with per-layer LoRA ranks, and report whether they helped.",
        context_settings={"help_option_names": ["-h", "--help"], "obj": manager},
    )
    group = click.version_option(__version__, prog_name="rankadaptor-plugin")(group)
    manager.hook.rankadaptor_register_commands(cli=group)
    return group


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
