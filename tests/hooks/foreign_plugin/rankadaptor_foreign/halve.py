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
