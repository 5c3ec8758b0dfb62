"""Hook specifications, and nothing else.

A plugin is a module or object with functions of these names, marked with
``rankadaptor_plugin.hookimpl``; a function may take fewer arguments than its specification. Every
built-in feature comes in through these same hooks. A third party names its plugin under the
entry-point group ``rankadaptor_plugin``. A misspelled hook name is an error at startup.

``register`` is called as ``register(name, target)``, where the target is an object or a string
``"module:object"`` that is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankadaptor_plugin import hookspec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from rankadaptor_plugin.config.tables import RunConfig
    from rankadaptor_plugin.core.registry import Registry
    from rankadaptor_plugin.core.trials import Trial
    from rankadaptor_plugin.models.modeling_rankadaptor import Structure
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.oracle.oracle import OracleFactory
    from rankadaptor_plugin.pipeline.commands import CommandGroup
    from rankadaptor_plugin.pipeline.context import Recovered, RunContext
    from rankadaptor_plugin.pruning.compensation import Compensation
    from rankadaptor_plugin.pruning.cutting import Pruner
    from rankadaptor_plugin.search.samplers import PerformanceModelFactory, SamplerFactory


@hookspec
def rankadaptor_register_pruners(register: Registry[Pruner]) -> None:
    """Registers pruners for ``[prune] method``.

    Called once at startup. A pruner is ``(model, tokenizer, samples, config) -> PrunedModel``
    and may change the model in place. If it has an attribute ``check(config, model_config)``, that
    is called before any weight is loaded, to raise errors about the table. Example:
    ``register("width", "my_package.cut:prune")``.
    """


@hookspec
def rankadaptor_register_families(register: Registry[Structure]) -> None:
    """Registers model families that can be pruned, as maps of the matrices in their layers.

    Called once at startup, under the name of the ``model_type`` in ``config.json``. Example:
    ``register("olmo2", Structure(model_type="olmo2", prunable_heads=False))``.
    """


@hookspec
def rankadaptor_register_oracles(register: Registry[OracleFactory]) -> None:
    """Registers oracles for ``[oracle] name``.

    Called once at startup. A factory is ``(OracleSettings) -> Oracle``; the oracle scores a
    model on the search or on the report documents.
    """


@hookspec
def rankadaptor_register_performance_models(register: Registry[PerformanceModelFactory]) -> None:
    """Registers performance models Q for ``[performance_model] name``.

    Called once at startup. A factory is ``(RankSpace, PerformanceModelConfig, seed) ->
    PerformanceModel``.
    """


@hookspec
def rankadaptor_register_samplers(register: Registry[SamplerFactory]) -> None:
    """Registers samplers for ``[search] method``.

    Called once at startup. A factory is ``(SamplerSettings) -> optuna.samplers.BaseSampler``; it
    is called before every trial with that trial's own seed, so a resumed search makes the same
    proposals as an uninterrupted one.
    """


@hookspec
def rankadaptor_lm_eval_task_paths() -> Path | None:
    """Returns a folder with lm-eval task YAML files for use in ``[oracle] tasks``.

    Called when the oracle is built; all folders are combined in one ``TaskManager``.
    """


@hookspec
def rankadaptor_register_commands(cli: CommandGroup) -> None:
    """Adds commands to the ``rankadaptor-plugin`` command line.

    Called once at startup; import heavy modules inside the command.
    """


@hookspec(firstresult=True)
def rankadaptor_compensate(
    method: str,
    base: PreTrainedModel,
    pruned: PrunedModel,
    sequences: Sequence[torch.Tensor],
    config: RunConfig,
) -> Compensation | None:
    """Fits a pruned model to the unpruned one, without training: the stage ``compensate``.

    Called once per run, if a fine-tune may start from such weights. ``method`` is ``[prune]
    compensate``; return None for a name that is not yours. ``sequences`` are token ids of shape
    (t,) in random order, on the CPU. Both models have to be left as they were; ``base`` may lie in
    main memory. The weights in the result are parameters of ``pruned.model``.
    """


@hookspec(firstresult=True)
def rankadaptor_post_prune(pruned: PrunedModel, context: RunContext) -> Recovered | None:
    """Recovers a pruned model: the stage after the pruner.

    Called once per run, or after ``step()`` of a user's own torch-pruning pruner. The first result
    that is not None is used; the built-in stage ``rankadaptor`` comes last, so any plugin can
    replace it. An exception ends the run, which can be resumed.
    """


@hookspec
def rankadaptor_on_progress(stage: str, done: int, total: int) -> None:
    """Observes progress: ``done`` of ``total`` units of work of a stage are finished.

    Called with ``done = 0`` when a stage begins and after each unit. Return values are ignored.
    """


@hookspec
def rankadaptor_on_plan(plan: Mapping[str, Any]) -> None:
    """Observes the plan of a run, before its long work begins.

    Called once per session with what is left, as `rankadaptor-plugin plan --json` prints it. An
    exception ends the run. Return values are ignored.
    """


@hookspec
def rankadaptor_on_step(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
    """Observes progress inside a unit of work: ``done`` of ``total`` parts are finished.

    Called with ``done = 0`` at its beginning and after each part. ``what`` names the parts:
    ``steps`` of a fine-tune, with ``loss`` (nats per trained token) and ``tokens_per_second`` of
    the last step among the figures; ``requests`` of an evaluation; ``sequences`` that the unpruned
    model predicts; ``blocks`` that depth pruning tries to leave out; ``texts`` that a model writes;
    ``calibration passes`` or ``calibration sequences`` of other pruning. Be quick: a step may take
    milliseconds. Return values are ignored.
    """


@hookspec
def rankadaptor_on_resume(trials: Sequence[Trial], context: RunContext) -> None:
    """Observes the trials that earlier sessions finished, when a search is resumed.

    Called once before the search, and not for a new one. Return values are ignored.
    """


@hookspec
def rankadaptor_after_trial(trial: Trial, context: RunContext) -> None:
    """Observes a finished trial of the search, however it ended, after it is stored.

    Called once per trial; loggers and dashboards hang here. Return values are ignored.
    """
