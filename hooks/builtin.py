"""The built-in plugin ``rankadaptor``: everything that ships with the package, registered.

Targets are strings ``"module:object"``, imported on first use, so that help loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.config.tables import LEAST_SQUARES
from rankadaptor_plugin.models.registration import BUILT_IN
from rankadaptor_plugin.tasks import task_dir

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from rankadaptor_plugin.core.registry import Registry
    from rankadaptor_plugin.models.modeling_rankadaptor import Structure
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.oracle.oracle import OracleFactory
    from rankadaptor_plugin.pipeline.commands import CommandGroup
    from rankadaptor_plugin.pipeline.context import Recovered, RunContext
    from rankadaptor_plugin.pruning.compensation import Compensation
    from rankadaptor_plugin.pruning.cutting import Pruner
    from rankadaptor_plugin.search.samplers import PerformanceModelFactory, SamplerFactory


@hookimpl
def rankadaptor_register_pruners(register: Registry[Pruner]) -> None:
    """Registers LLM-Pruner's block-wise and channel-wise pruning, and Shortened LLaMA's."""
    register("width", "rankadaptor_plugin.pruning.width:prune_width")
    register("channel", "rankadaptor_plugin.pruning.channel:prune_channel")
    register("depth", "rankadaptor_plugin.pruning.depth:prune_depth")


@hookimpl
def rankadaptor_register_families(register: Registry[Structure]) -> None:
    """Registers the maps of `rankadaptor_plugin.models.families`."""
    for model_type in BUILT_IN:
        register(model_type, f"rankadaptor_plugin.models.families:{model_type.upper()}")


@hookimpl
def rankadaptor_register_oracles(register: Registry[OracleFactory]) -> None:
    """Registers lm-eval's tasks, and perplexity on held-out text."""
    register("lm-eval", "rankadaptor_plugin.oracle.lm_eval_oracle:lm_eval")
    register("perplexity", "rankadaptor_plugin.oracle.perplexity:perplexity")


@hookimpl
def rankadaptor_lm_eval_task_paths() -> Path:
    """Returns the folder of our tasks: the seven of the paper, and seven tiny ones."""
    return task_dir()


@hookimpl
def rankadaptor_register_performance_models(register: Registry[PerformanceModelFactory]) -> None:
    """Registers the paper's MLP and its ablation, our own model beside it."""
    register("mlp", "rankadaptor_plugin.search.performance.mlp:mlp")
    register("mlp-1", "rankadaptor_plugin.search.performance.mlp:mlp_1")
    register("mlp-2", "rankadaptor_plugin.search.performance.mlp:mlp_2")
    register("mlp-3", "rankadaptor_plugin.search.performance.mlp:mlp_3")
    register("bayes", "rankadaptor_plugin.search.performance.linear:bayes")


@hookimpl
def rankadaptor_register_samplers(register: Registry[SamplerFactory]) -> None:
    """Registers our own search step, the paper's, and Optuna's samplers."""
    register("bayes", "rankadaptor_plugin.search.bayes:bayes")
    register("paper", "rankadaptor_plugin.search.paper:paper")
    register("random", "rankadaptor_plugin.search.samplers:random")
    register("tpe", "rankadaptor_plugin.search.samplers:tpe")
    register("gp", "rankadaptor_plugin.search.samplers:gp")


@hookimpl
def rankadaptor_register_commands(cli: CommandGroup) -> None:
    """Adds the commands of `rankadaptor_plugin.pipeline.commands`."""
    from rankadaptor_plugin.pipeline.commands import COMMANDS

    for command in COMMANDS:
        cli.add_command(command)


@hookimpl(trylast=True)
def rankadaptor_compensate(
    method: str, base: PreTrainedModel, pruned: PrunedModel, sequences: Sequence[torch.Tensor]
) -> Compensation | None:
    """Refits the matrices that write into the residual stream, by least squares."""
    if method != LEAST_SQUARES:
        return None
    from rankadaptor_plugin.pruning.compensation import compensate

    spread = hasattr(base, "hf_device_map")
    return compensate(
        base,
        pruned.model,
        sequences,
        kept_layers=pruned.kept_layers,
        device=None if spread else pruned.model.device,
    )


@hookimpl(trylast=True)
def rankadaptor_post_prune(pruned: PrunedModel, context: RunContext) -> Recovered:
    """Searches the rank allocation, compares it with uniform LoRA, delivers the better one."""
    from rankadaptor_plugin.pipeline.stage import recover_pruned

    return recover_pruned(pruned, context)
