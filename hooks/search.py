"""Built-in performance models and samplers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin import hookimpl

if TYPE_CHECKING:
    from rankadaptor_plugin.context import PerformanceModelFactory, SamplerFactory
    from rankadaptor_plugin.registry import Registry


@hookimpl
def rankadaptor_register_performance_models(register: Registry[PerformanceModelFactory]) -> None:
    """Registers the paper's MLP and its ablation, our own models beside it."""
    register("mlp", "rankadaptor_plugin.mlp:mlp")
    register("mlp-1", "rankadaptor_plugin.mlp:mlp_1")
    register("mlp-2", "rankadaptor_plugin.mlp:mlp_2")
    register("mlp-3", "rankadaptor_plugin.mlp:mlp_3")
    register("linear", "rankadaptor_plugin.linear_model:linear")
    register("ensemble", "rankadaptor_plugin.ensemble:ensemble")


@hookimpl
def rankadaptor_register_samplers(register: Registry[SamplerFactory]) -> None:
    """Registers our own search step, the paper's, and Optuna's samplers."""
    register("auto", "rankadaptor_plugin.adaptive_sampler:auto")
    register("linear", "rankadaptor_plugin.adaptive_sampler:linear")
    register("ensemble", "rankadaptor_plugin.adaptive_sampler:ensemble")
    register("paper", "rankadaptor_plugin.samplers:paper")
    register("random", "rankadaptor_plugin.optuna_samplers:random")
    register("tpe", "rankadaptor_plugin.optuna_samplers:tpe")
    register("gp", "rankadaptor_plugin.optuna_samplers:gp")
    register("cmaes", "rankadaptor_plugin.optuna_samplers:cmaes")
    register("qmc", "rankadaptor_plugin.optuna_samplers:qmc")
