"""Commands of ``rankadaptor-plugin``.

Each command parses its arguments, calls one function and prints the result. Heavy modules are
imported inside the command to keep ``--help`` fast.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rankadaptor_plugin.config.recipes import RECIPES
from rankadaptor_plugin.core.errors import ConfigError, Interrupted, RankAdaptorError, signal_of
from rankadaptor_plugin.pipeline.context import check_early

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pluggy
    from rich.console import Console

    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.pipeline.export import Format

_DEFAULT = (signal.SIG_DFL, signal.default_int_handler)
_SIGNALED = 128  # what shells add to the number of the signal that a command ended by

_run_file = click.argument(
    "run_file", type=click.Path(path_type=Path), required=False, metavar="[RUN.toml]"
)
_output = click.option(
    "--output", type=click.Path(path_type=Path), help="Run folder; overrides the run file's."
)
_set = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the run file, as in search.n_trials=10; repeatable.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class CommandGroup(click.Group):
    """Shows the errors of this package as one line and ends with their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Invokes the command."""
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
                f"Error: {reason}. Set a smaller per_device_train_batch_size, batch_tokens or "
                "max_length, fewer or shorter calibration sequences, or device_map = "
                '"auto" to use all GPUs; then run again.',
                err=True,
            )
            ctx.exit(1)


@click.command()
@_run_file
@_output
@_set
@click.option("--quiet", "-q", is_flag=True, help="Print only the verdict.")
@click.pass_obj
def run(
    manager: pluggy.PluginManager,
    run_file: Path | None,
    output: Path | None,
    settings: tuple[str, ...],
    quiet: bool,
) -> None:
    """Prune, search ranks, recover, evaluate and report.

    Without RUN.toml, runs the embedded default: a tiny Llama on seven small tasks. Run the same
    command again to resume an interrupted run.
    """
    began = time.perf_counter()
    config = load_config(run_file, output, settings)
    check_early(manager, config)
    with _interruptible(), _display(manager, config, quiet=quiet, began=began):
        # Imported here, as it takes seconds, during which progress is already shown.
        from rankadaptor_plugin.pipeline import run as pipeline

        result = pipeline.run(config, manager, began=began)
    if quiet:
        click.echo(result.verdict)
        return
    click.echo("Verdict: " + result.verdict.replace("\n", "\n         "))
    click.echo(f"Report:  {_near(result.folder / 'report.html')} (also .md, .json)")
    click.echo(f"Adapter: {_near(result.adapter)}")


@click.command()
@_run_file
@_output
@_set
@_json
@click.pass_obj
def plan(
    manager: pluggy.PluginManager,
    run_file: Path | None,
    output: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what a run will take before it starts.

    Checks the run file, times a few training steps and one evaluation batch, and shows fine-tunes,
    time, GPU hours and memory of each stage, and the disk space. Of a run that was begun it shows
    what is left. Nothing is written. Without RUN.toml, uses the embedded default.
    """
    began = time.perf_counter()
    config = load_config(run_file, output, settings)
    check_early(manager, config)
    with _interruptible(), _display(manager, config, quiet=as_json, began=began):
        from rankadaptor_plugin.pipeline import run as pipeline
        from rankadaptor_plugin.report.console import plan_text

        found = pipeline.plan(config, manager, began=began).to_json()
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(plan_text(found, shutil.get_terminal_size().columns))


@click.command()
@_run_file
@_output
@_set
@click.option("--seeds", type=int, help="Fine-tunes per allocation; overrides noise.seeds.")
@click.option("--allocations", type=int, help="Allocations; overrides noise.allocations.")
@click.option(
    "--gain",
    "gains",
    type=float,
    multiple=True,
    help="Gain to detect (0.01 is one point); repeatable; overrides noise.gains.",
)
@_json
@click.pass_obj
def noise(
    manager: pluggy.PluginManager,
    /,
    run_file: Path | None,
    output: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
    **changes: Any,
) -> None:
    """Measure the noise of the scores before a search.

    Fine-tunes uniform LoRA and a few random allocations with several seeds, and reports which gains
    could be detected, how many fine-tunes that takes, and how long they take. A run of the same run
    file continues from there. Without RUN.toml, uses the embedded default.
    """
    began = time.perf_counter()
    from rankadaptor_plugin.config import run_file as run_files
    from rankadaptor_plugin.config.tables import NoiseConfig

    plain = run_files.to_dict(load_config(run_file, output, settings))
    if not plain["noise"]["seeds"]:  # a run skips the step, but this command asks for it
        plain["noise"]["seeds"] = NoiseConfig.seeds
    changes["gains"] = list(changes["gains"]) or None
    plain["noise"] |= {key: value for key, value in changes.items() if value is not None}
    config = run_files.from_dict(plain)
    if not config.noise.seeds:
        raise ConfigError("noise.seeds is 0, which measures nothing. Use at least 2.")
    check_early(manager, config)
    with _interruptible(), _display(manager, config, quiet=as_json, began=began):
        from rankadaptor_plugin.pipeline import run as pipeline
        from rankadaptor_plugin.report.console import noise_text

        floor = pipeline.noise(config, manager, began=began)
    if as_json:
        click.echo(json.dumps(floor, indent=2))
    elif floor is None:
        click.echo("Fewer than two allocations could be fine-tuned; the noise floor is unknown.")
    else:
        click.echo(noise_text(floor, shutil.get_terminal_size().columns))


@click.command()
@click.argument("run_file", type=click.Path(path_type=Path), metavar="RUN.toml")
@click.option(
    "--model", help="Model folder, name on the Hub or .gguf file; default: the embedded model."
)
@click.option("--corpus", help="File to fine-tune on, or name of a dataset on the Hub.")
@click.option("--recipe", type=click.Choice(list(RECIPES)), help="Preset to use.")
@click.option("--full", is_flag=True, help="Write every setting.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def init(run_file: Path, **options: Any) -> None:
    """Write a commented run file for a model.

    It sets what depends on the model and what one may want to change. Everything else has its
    default, or the recipe's value; --full writes that too.
    """
    from rankadaptor_plugin.config.template import write_template

    remarks = write_template(run_file, **options)
    start = f"Start it with: rankadaptor-plugin run {run_file}"
    click.echo(" ".join([f"Wrote {run_file}.", *remarks, start]))


@click.command()
def schema() -> None:
    """Print a JSON schema of the run file, for editors."""
    from rankadaptor_plugin.config.schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--report", is_flag=True, help="Also write provisional.html and provisional.md.")
@_json
def status(run: Path, report: bool, as_json: bool) -> None:
    """Show how far a run is, while it works or after.

    RUN is a run folder or a run file. The run takes no notice. With --report, what is known so far
    is written into the run folder, without a verdict.
    """
    from rankadaptor_plugin.report.status import FINISHED, read_status, write_provisional

    now = read_status(run)
    paths = list(write_provisional(now)) if report and now.state != FINISHED else []
    if as_json:
        click.echo(json.dumps(now.to_json(), indent=2))
        return
    click.echo(now)
    for path in paths or [Path(now.folder) / "report.html"] if report else []:
        click.echo(f"report:  {_near(path)}")


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN[:MODEL]...")
@click.option(
    "--all",
    "every_model",
    is_flag=True,
    help="Compare all recovered models of each RUN given without MODEL.",
)
@click.option(
    "--metric",
    metavar="NAME",
    help="Metric, such as choice_logprob; default: that of the first run's verdict.",
)
@click.option("--task", metavar="NAME", help="Single task instead of the weighted mean.")
@click.option(
    "--confidence",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Confidence of intervals and verdicts; default: the first run's.",
)
@_json
def compare(runs: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Compare models within a run or between runs.

    RUN is a run folder or a run file. MODEL is base, pruned, uniform (LoRA of the searched size),
    lora (LoRA of the default rank, where that differs), searched, a recovery method such as
    adalora, or recovered (the delivered model; the default). A single RUN without MODEL compares
    all its recovered models. Nothing is evaluated again.
    """
    from rankadaptor_plugin.report.console import comparison_text
    from rankadaptor_plugin.verdict.comparison import compare_runs

    comparison = compare_runs(runs, **options)
    if as_json:
        click.echo(json.dumps(comparison.to_json(), indent=2))
    else:
        click.echo(comparison_text(comparison, shutil.get_terminal_size().columns))


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["hf", "hf-remote-code", "merged"]),
    required=True,
    help="Model and adapter, the same with code, or one merged model.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder to write; default: RUN/export-FORMAT.",
)
@click.pass_obj
def export(manager: pluggy.PluginManager, run: Path, format_: Format, output: Path | None) -> None:
    """Write a finished run as a model folder.

    RUN is a run folder or a run file. The hf format needs this package to load; hf-remote-code and
    merged do not.
    """
    from rankadaptor_plugin.pipeline.context import register_families, registries
    from rankadaptor_plugin.pipeline.export import export as export_run

    register_families(registries(manager))
    click.echo(export_run(run, format_, output))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@_json
@click.pass_obj
def inspect(manager: pluggy.PluginManager, folder: Path, as_json: bool) -> None:
    """Show the layers of a model and what was pruned from it.

    DIR is a model folder (pruned or not), an export or a run folder. No weights are read.
    """
    from rankadaptor_plugin.models.inspection import inspect_folder
    from rankadaptor_plugin.pipeline.context import register_families, registries
    from rankadaptor_plugin.report.console import inspection_text

    register_families(registries(manager))
    inspection = inspect_folder(folder)
    if as_json:
        click.echo(json.dumps(inspection.to_json(), indent=2))
    else:
        click.echo(inspection_text(inspection, shutil.get_terminal_size().columns))


@click.command("meta-learn")
@click.argument("studies", nargs=-1, required=True, metavar="STUDY...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="File to write, such as meta.safetensors; replaces an earlier one.",
)
def meta_learn(studies: tuple[str, ...], out: Path) -> None:
    """Collect finished studies for later searches to learn from.

    STUDY is a run folder, an SQLite file or an Optuna storage URL; append #NAME to pick one of
    several studies. Set [search] meta in a run file to the file written. The models may differ in
    depth.
    """
    from rankadaptor_plugin.search.transfer.studies import collect

    knowledge = collect(studies, out)
    for source in knowledge.sources:
        tasks = ", ".join(source.tasks) or "none, the objective alone"
        click.echo(
            f"{source.name}: {len(source.rows)} trials of {source.space.layers} layers, "
            f"{len(source.tasks)} tasks ({tasks})"
        )
    click.echo(f"Wrote {out}. Use it with [search] meta.")


@click.command()
@_json
@click.pass_obj
def plugins(manager: pluggy.PluginManager, as_json: bool) -> None:
    """List plugins with their providers, hooks and registered names."""
    from rankadaptor_plugin.pipeline.context import describe

    active = describe(manager)
    if as_json:
        click.echo(json.dumps(active, indent=2))
        return
    for plugin in active["plugins"]:
        click.echo(f"{plugin['name']} ({plugin['provider']})")
        for hook in plugin["hooks"]:
            click.echo(f"    {hook}")
    click.echo()
    for kind, names in active["registered"].items():
        click.echo(f"{kind}: {', '.join(names)}")


@click.command("task-path")
def task_path() -> None:
    """Print the folder with our lm-eval tasks, for lm_eval --include_path."""
    from rankadaptor_plugin.tasks import task_dir

    click.echo(task_dir())


class _PassThrough(click.Command):
    """Passes on every argument unchanged, including ``--help`` and ``--``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return ctx.args


@click.command("lm-eval", cls=_PassThrough, add_help_option=False)
@click.pass_context
def lm_eval(context: click.Context) -> None:
    """Run lm-eval with our model type and tasks available.

    Takes the same arguments as lm-eval; see lm-eval --help.
    """
    from rankadaptor_plugin.oracle.lm_eval_command import run

    manager: pluggy.PluginManager = context.obj
    run(context.args, manager.hook.rankadaptor_lm_eval_task_paths(), context.command_path)


COMMANDS = (
    run,
    plan,
    noise,
    status,
    init,
    schema,
    compare,
    export,
    inspect,
    meta_learn,
    plugins,
    task_path,
    lm_eval,
)


def load_config(
    path: Path | None, output: Path | None, settings: tuple[str, ...] = ()
) -> RunConfig:
    """Returns the config of a run file, or of the embedded default.

    Args:
        path: The run file; None for the embedded default, which writes below the current folder.
        output: Run folder that overrides the run file's.
        settings: Keys that override those of the run file, such as ``search.n_trials=10``.
    """
    from rankadaptor_plugin.config import run_file

    if output is not None:
        settings += (f"output={json.dumps(str(output))}",)
    return run_file.load(path, settings)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ends the program on Ctrl-C, SIGTERM and SIGHUP, and says how to resume."""
    before: dict[signal.Signals, Any] = {}

    def interrupt(number: int, _: object) -> None:
        # What is being put in order may be finished, unless Ctrl-C is pressed again.
        is_key = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if is_key else signal.SIG_IGN)
        raise Interrupted(number)

    if threading.current_thread() is threading.main_thread():  # no other one may handle signals
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            # nohup and shells in the background have some of them ignored.
            if number and signal.getsignal(number) in _DEFAULT:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal any more
            click.echo("Interrupted. Run the same command again to resume.", err=True)
        raise click.exceptions.Exit(_SIGNALED + signal_of(error)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _display(
    manager: pluggy.PluginManager, config: RunConfig, *, quiet: bool, began: float
) -> Iterator[None]:
    """Shows progress and warnings within the block; only warnings if quiet."""
    from rich.console import Console

    from rankadaptor_plugin.report.progress import Progress

    console = Console(stderr=True)
    _log_to(console, quiet=quiet)
    if quiet:
        yield
        return
    with Progress(config, console, began) as progress:
        manager.register(progress, name="progress")
        try:
            manager.hook.rankadaptor_on_progress(stage="load", done=0, total=1)
            yield
        finally:
            manager.unregister(progress)


def _log_to(console: Console, *, quiet: bool) -> None:
    """Shows warnings: above the live display on a terminal, else as whole lines."""
    handler: logging.Handler
    if console.is_terminal:
        from rich.logging import RichHandler

        handler = RichHandler(console=console, show_time=False, show_path=False)
    else:
        handler = logging.StreamHandler()
        if not quiet:  # the plain lines of the progress say already why a trial failed
            handler.addFilter(lambda record: record.name != "rankadaptor_plugin.search.search")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])


def _near(path: Path) -> Path:
    """Returns a path relative to the current folder if it lies below it."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path
