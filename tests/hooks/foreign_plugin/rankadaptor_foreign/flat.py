"""The recovery stage ``flat``: one fine-tune with rank 1 everywhere."""

from __future__ import annotations

from rankadaptor_plugin import hookimpl


@hookimpl
def rankadaptor_post_prune(pruned, context):
    from rankadaptor_plugin.core.ranks import RankAllocation
    from rankadaptor_plugin.pipeline.context import Recovered
    from rankadaptor_plugin.recovery import recover

    allocation = RankAllocation((1,) * len(pruned.widths))
    settings = context.config.recovery
    found = recover(
        pruned.model,
        pruned.tokenizer,
        allocation,
        context.corpus,
        settings,
        seed=context.config.seed,
    )
    found.save(context.folder / "adapter", base=str(context.folder / "pruned"))
    found.model.unload()
    return Recovered(adapter=context.folder / "adapter", allocation=allocation)
