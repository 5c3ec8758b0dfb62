"""Built-in command ``compare``."""

from __future__ import annotations

import json
import shutil

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN[:MODEL]...")
@click.option(
    "--all", "every_model", is_flag=True, help="All recovered models of every RUN without MODEL."
)
@click.option(
    "--metric",
    metavar="NAME",
    help="What to compare, such as clp; what the first run's verdict is about if left out.",
)
@click.option("--task", metavar="NAME", help="One task, instead of the weighted mean.")
@click.option(
    "--confidence",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Of intervals and verdicts; the first run's if left out.",
)
@click.option(
    "--resamples",
    type=click.IntRange(min=100),
    default=10_000,
    show_default=True,
    help="Resamples of the bootstrap.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the resamples.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(
    runs: tuple[str, ...],
    every_model: bool,
    metric: str | None,
    task: str | None,
    confidence: float | None,
    resamples: int,
    seed: int,
    as_json: bool,
) -> None:
    """Compare models within a run or between runs.

    RUN is a run folder or a run file; MODEL is base, pruned, uniform, searched, a recovery method
    such as adalora, or recovered (the delivered one, if left out). One RUN alone: all of its
    recovered models. Nothing is evaluated again.
    """
    from rankadaptor_plugin.report.comparison_text import text
    from rankadaptor_plugin.verdict.comparison import compare_runs

    found = compare_runs(
        runs,
        every_model=every_model,
        metric=metric,
        task=task,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        click.echo(text(found, shutil.get_terminal_size().columns))
