"""Built-in performance models and samplers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin import hookimpl

if TYPE_CHECKING:
    from rankadaptor_plugin.core.registry import Registry
    from rankadaptor_plugin.search.contract import PerformanceModelFactory, SamplerFactory


@hookimpl
def rankadaptor_register_performance_models(register: Registry[PerformanceModelFactory]) -> None:
    """Registers the paper's MLP and its ablation, our own models beside it."""
    register("mlp", "rankadaptor_plugin.search.performance.mlp:mlp")
    register("mlp-1", "rankadaptor_plugin.search.performance.mlp:mlp_1")
    register("mlp-2", "rankadaptor_plugin.search.performance.mlp:mlp_2")
    register("mlp-3", "rankadaptor_plugin.search.performance.mlp:mlp_3")
    register("linear", "rankadaptor_plugin.search.performance.linear_model:linear")
    register("ensemble", "rankadaptor_plugin.search.performance.ensemble:ensemble")


@hookimpl
def rankadaptor_register_samplers(register: Registry[SamplerFactory]) -> None:
    """Registers our own search step, the paper's, and Optuna's samplers."""
    register("auto", "rankadaptor_plugin.search.adaptive:auto")
    register("linear", "rankadaptor_plugin.search.adaptive:linear")
    register("ensemble", "rankadaptor_plugin.search.adaptive:ensemble")
    register("paper", "rankadaptor_plugin.search.paper:paper")
    register("random", "rankadaptor_plugin.search.optuna_samplers:random")
    register("tpe", "rankadaptor_plugin.search.optuna_samplers:tpe")
    register("gp", "rankadaptor_plugin.search.optuna_samplers:gp")
    register("cmaes", "rankadaptor_plugin.search.optuna_samplers:cmaes")
    register("qmc", "rankadaptor_plugin.search.optuna_samplers:qmc")
