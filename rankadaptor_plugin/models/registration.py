"""Makes transformers know our model types without importing it.

transformers looks a model type up in a table of names and imports the module of the same name
under ``transformers.models`` on first use. `install` adds our names to that table as soon as
transformers has built it, and puts a stand-in where the module is looked for, which calls
`rankadaptor_plugin.models.checkpoints.register` when it is asked for a class. Programs that never
touch a pruned model pay nothing. Should the table move in a later version, loading through
`rankadaptor_plugin.models.pruned_model.load_pruned` still works.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec

_STOCK = {
    "bloom": "BloomForCausalLM",
    "falcon": "FalconForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "opt": "OPTForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

BUILT_IN = tuple(_STOCK)
"""Model types of the families in `rankadaptor_plugin.models.families`."""

CONFIGS = {f"rankadaptor_{family}": f"rankadaptor_{family}_config" for family in _STOCK}
"""Our model types, and the names under which transformers asks a stand-in for their config."""

_TABLE_MODULE = "transformers.models.auto.configuration_auto"


def add(family: str, stock: str) -> None:
    """Registers one more family, by its model type and the name of its causal LM. Repeatable."""
    _STOCK[family] = stock
    CONFIGS[f"rankadaptor_{family}"] = f"rankadaptor_{family}_config"
    install()


def install() -> None:
    """Registers our model types now, or as soon as transformers is imported. Repeatable."""
    for model_type in CONFIGS:
        name = f"transformers.models.{model_type}"
        sys.modules.setdefault(name, _StandIn(name))
    table = sys.modules.get(_TABLE_MODULE)
    if table is not None:
        _add_names(table)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _StandIn(ModuleType):
    """Has the config class of one family, and makes it when asked."""

    def __getattr__(self, name: str) -> Any:
        # Any other name, such as those that tools look up in every module, must load nothing.
        model_type = self.__name__.rpartition(".")[2]
        if name != CONFIGS[model_type]:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        stock = _STOCK[model_type.removeprefix("rankadaptor_")]
        register = importlib.import_module("rankadaptor_plugin.models.checkpoints").register
        return register(getattr(importlib.import_module("transformers"), stock))[0]


class _Watcher(MetaPathFinder):
    """Waits for the module with the table, lets it be imported as ever, then adds our names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE_MODULE:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            _add_names(module)

        # On this one loader object, so that everything else about the module is as ever.
        spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec


def _add_names(table: ModuleType) -> None:
    names = getattr(table, "CONFIG_MAPPING_NAMES", None)
    if isinstance(names, dict):
        names.update(CONFIGS)
