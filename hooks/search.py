"""Built-in performance models and samplers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin import hookimpl

if TYPE_CHECKING:
    from rankadaptor_plugin.context import PerformanceModelFactory, SamplerFactory
    from rankadaptor_plugin.registry import Registry


@hookimpl
def rankadaptor_register_performance_models(register: Registry[PerformanceModelFactory]) -> None:
    """Registers the paper's MLP."""
    register("mlp", "rankadaptor_plugin.performance_model:mlp")


@hookimpl
def rankadaptor_register_samplers(register: Registry[SamplerFactory]) -> None:
    """Registers the paper's search step, and two of Optuna's samplers beside it."""
    register("paper", "rankadaptor_plugin.samplers:paper")
    register("random", "rankadaptor_plugin.samplers:random")
    register("tpe", "rankadaptor_plugin.samplers:tpe")
