"""The stage ``rankadaptor`` behind a user's own torch-pruning pruner, by one added line.

    from rankadaptor_plugin.post_prune import recover_after_pruning

    pruner = tp.pruner.BasePruner(model, example_inputs, ...)
    recover_after_pruning(pruner, "RUN.toml")  # the added line
    pruner.step()

The run file's ``model`` names the folder that the model came from: its tokenizer is used, and it
is the base that the report compares with. The ``[prune]`` table is not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from rankadaptor_plugin import plugins
from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.models.checkpoints import check_folder, load_tokenizer
from rankadaptor_plugin.models.sources import model_source
from rankadaptor_plugin.pipeline import context as plugin_list
from rankadaptor_plugin.pipeline.run import RunResult, run
from rankadaptor_plugin.pruning.cutting import after_pruning, describe_pruned

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


def recover_after_pruning(
    pruner: Any,
    path: str | Path,
    on_result: Callable[[RunResult], object] | None = None,
) -> None:
    """Makes a pruner's last ``step()`` end with the recovery stage.

    The stage is found through the hook ``rankadaptor_post_prune``, so plugins can replace it. The
    model is afterwards the pruned one, converted to a class that saves and loads; the adapter lies
    in the run folder. Run the script again to resume an interrupted run.

    Args:
        pruner: A ``torch_pruning.pruner.BasePruner``; heads must be pruned whole
            (``prune_head_dims=False``).
        path: The run file.
        on_result: Called with the result; the report lies in the run folder in any case.

    Raises:
        ConfigError: If the run file is wrong or names what no plugin registers.
        UnsupportedModelError: If its ``model`` is no folder of a supported model.
        PluginError: If a plugin cannot be loaded. All are raised before anything is pruned.
    """
    config = run_file.load(Path(path))
    source = model_source(config)
    manager = plugins.plugin_manager()
    plugin_list.check_names(plugin_list.registries(manager), config)  # and their families
    check_folder(source)

    def recover(model: PreTrainedModel) -> None:
        # Taylor pruners leave gradients behind, which would only take memory.
        model.zero_grad(set_to_none=True)
        tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
        # The script may have changed the model's own config as it pruned.
        pruned = describe_pruned(model, tokenizer, base_config=AutoConfig.from_pretrained(source))
        result = run(config, manager, pruned=pruned)
        if on_result is not None:
            on_result(result)

    after_pruning(pruner, recover)
