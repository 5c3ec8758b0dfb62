"""The pruner ``halve``: removes the upper half of the units of the lowest layer."""

from __future__ import annotations

from rankadaptor_plugin import hookimpl


@hookimpl
def rankadaptor_register_pruners(register):
    register("halve", halve)


def halve(model, tokenizer, samples, config):
    from rankadaptor_plugin.models.pruned_model import PrunedModel
    from rankadaptor_plugin.models.structures import layer_units
    from rankadaptor_plugin.pruning.cutting import remove

    for units in layer_units(model)[0]:
        count = len(units[0].indices)
        remove(units, range(count // 2, count))
    return PrunedModel.of(model, tokenizer, {"pruner": "halve", "samples": len(samples)})


def check(config, model_config):
    """Is called before any weight is loaded."""
    from rankadaptor_plugin.core.errors import ConfigError

    if config.pruning_ratio != 0.5:
        raise ConfigError(
            f"[prune] pruning_ratio is {config.pruning_ratio:g}, but the pruner halve removes half "
            f"of one of {model_config.num_hidden_layers} layers. Set it to 0.5."
        )


halve.check = check
