"""The command ``lm-eval``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import pluggy


class _PassThrough(click.Command):
    """Hands on every argument as it stands, ``--help`` and ``--`` too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return ctx.args


@click.command("lm-eval", cls=_PassThrough, add_help_option=False)
@click.pass_context
def lm_eval(context: click.Context) -> None:
    """Run lm-eval with our model type and tasks known to it.

    Takes whatever lm-eval takes; lm-eval --help lists it.
    """
    from rankadaptor_plugin.oracle.lm_eval_command import run

    manager: pluggy.PluginManager = context.obj
    run(context.args, manager.hook.rankadaptor_lm_eval_task_paths(), context.command_path)
