"""The tables of a report that describe the pruned model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin.report.numbers import UNKNOWN, number, size
from rankadaptor_plugin.report.tables import Table, allocations, models

if TYPE_CHECKING:
    from rankadaptor_plugin.report.schema import ReportData


def layers(data: ReportData) -> Table:
    """Tabulates widths and ranks per layer; several ranks of a layer stand in one cell."""
    named = allocations(data)
    count = len(data["widths"])
    per = max(1, len(data.get("slots", [])) // count) if count else 1
    rows = []
    for layer in range(max(count, *(-(-len(ranks) // per) for ranks in named.values()))):
        widths = data["widths"][layer] if layer < count else [UNKNOWN] * 3
        found = [r[per * layer : per * (layer + 1)] for r in named.values()]
        ranks = ["-".join(map(str, own)) or UNKNOWN for own in found]
        number_before = data["kept_layers"][layer] if layer < count else UNKNOWN
        rows.append(tuple(str(cell) for cell in (layer, number_before, *widths, *ranks)))
    header = (
        "layer",
        "before pruning",
        "heads",
        "KV heads",
        "MLP channels",
        *(f"{name} rank" for name in named),
    )
    return Table("the pruned model and its ranks by layer", header, tuple(rows), ())


def parameters(data: ReportData) -> Table:
    """Tabulates parameter counts and their share of the base model."""
    counts, base = data["parameters"], data["parameters"]["base"]
    named = {"base": base, "pruned": counts["pruned"]}
    for name, label in models(data).items():
        if name in counts["trainable"]:
            named[f"{label}, trainable"] = counts["trainable"][name]
    rows = (
        (label, f"{count:,}", number(100 * count / base if base else None, 2))
        for label, count in named.items()
    )
    return Table("parameters", ("model", "parameters", "% of base"), tuple(rows))


def footprint(data: ReportData) -> Table:
    """Tabulates what the model costs before and after pruning."""
    base, pruned = (data["footprints"][name] for name in ("base", "pruned"))
    counts = {
        "parameters": (base["parameters"], pruned["parameters"]),
        "multiply-accumulates, 64 tokens": (base["macs"], pruned["macs"]),
        "layers": (data["layers"]["base"], data["layers"]["pruned"]),
        "hidden size": (data["hidden_sizes"]["base"], data["hidden_sizes"]["pruned"]),
    }
    sizes = {
        "key-value cache per token": (base["kv_cache_bytes"], pruned["kv_cache_bytes"]),
        "weights": (base["checkpoint_bytes"], pruned["checkpoint_bytes"]),
    }
    rows = [
        (label, write(was), write(now), number(100 * now / was if was else None, 1))
        for found, write in ((counts, "{:,}".format), (sizes, size))
        for label, (was, now) in found.items()
    ]
    header = ("", "base", "pruned", "% of base")
    caption = f"what the model costs, without adapter; bytes in {data['dtype']}"
    return Table(caption, header, tuple(rows))
