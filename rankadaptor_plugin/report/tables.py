"""Tables of a report as plain text, the same for Markdown, HTML and the terminal.

A table is built once from report.json and rendered by each of them, so they cannot differ.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rankadaptor_plugin.core.scores import KNOWN_METRICS, described, unit_of_difference
from rankadaptor_plugin.report.words import (
    MODELS,
    UNKNOWN,
    duration,
    interval,
    metric_title,
    number,
    objective_label,
    scored,
    size,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from rankadaptor_plugin.report.schema import Entry, ReportData

Row = TypeVar("Row")


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        caption: What it shows, with the unit.
        header: Column names.
        rows: Cells.
        left: Columns that hold words and not numbers.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: tuple[int, ...] = (0,)

    @classmethod
    def of(
        cls,
        caption: str,
        entries: Iterable[Row],
        columns: Mapping[str, Callable[[Row], str]],
        words: Collection[str] | None = None,
    ) -> Table:
        """Builds a table of one row per entry.

        Args:
            caption: What it shows, with the unit.
            entries: The entries.
            columns: By column name, what an entry has there.
            words: Columns that hold words and not numbers; the first if left out.
        """
        names = tuple(columns)
        rows = tuple(tuple(show(entry) for show in columns.values()) for entry in entries)
        left = [names.index(name) for name in (names[:1] if words is None else words)]
        return cls(caption, names, rows, tuple(left))


# ------------------------------------------------------------------------------ names of models


def models(data: ReportData) -> dict[str, str]:
    """Returns the label of each model in the order of the tables, the recovered one last.

    LoRA is called by its ranks, and by its size where some of different sizes are shown.
    """
    labels, counts = dict(data.get("labels", {})), data["parameters"]["trainable"]
    if len({counts[name] for name in labels if name in counts}) > 1:
        labels |= {n: f"{t}, {counts[n]:,} parameters" for n, t in labels.items() if n in counts}
    methods = {method: method for method in data.get("methods", [])}
    return {**MODELS, **{n: t for n, t in methods.items() if n not in MODELS}, **labels} | {
        "recovered": "recovered"
    }


def delivered(data: ReportData) -> str:
    """Names what was delivered, and the folder of the model that its adapter belongs on."""
    verdict = data["verdict"]
    name = verdict["delivered"]
    if name == "foreign":
        return "the adapter of another recovery stage"
    label = models(data).get(name, name)
    base = "compensated/" if "compensate" in verdict.get("method", "") else "pruned/"
    return f"{label}, an adapter of {base}"


def allocations(data: ReportData) -> dict[str, list[int]]:
    """Returns the ranks to show by layer: of even LoRA, and of what it is compared with.

    That is the searched allocation, or the delivered method where it gives the ranks by layer; of
    a foreign stage only what it delivers.
    """
    ranks = data["allocations"]
    if not {"uniform", "searched"} & {*ranks}:
        return {"recovered": ranks.get("recovered", [])}
    uniform, best = ranks.get("uniform", []), data["verdict"]["delivered"]
    if best in data.get("methods", []) and ranks.get("recovered") != uniform:
        return {"uniform": uniform, best: ranks["recovered"]}
    if "searched" not in ranks:
        return {"uniform": uniform}
    return {"uniform": uniform, "searched": ranks.get("searched", [])}


def named_allocations(data: ReportData) -> dict[str, list[int]]:
    """Returns the same ranks by the title of their column."""
    labels = data.get("labels", {})
    return {labels.get(name, f"{name} ranks"): ranks for name, ranks in allocations(data).items()}


def ranks_text(entry: Mapping[str, Any]) -> str:
    """Writes ranks, and searched settings behind them."""
    if entry.get("method") == "none":
        return "no adapter"
    settings = (f"{name} {value:g}" for name, value in entry.get("settings", {}).items())
    return ", ".join(["-".join(map(str, entry["ranks"])), *settings])


# ------------------------------------------------------------------------------ scores and verdict


def scores(data: ReportData, metric: str) -> Table | None:
    """Tabulates a metric by task and model; None where no model has it."""
    named, best = models(data), data["verdict"]["delivered"]
    columns = data["scores"]
    shown = [m for m in named if any(metric in row for row in columns.get(m, {}).values())]
    if best in shown and "recovered" in shown:  # the same model; one column is enough
        shown.remove("recovered")
    if not shown:
        return None
    names = [f"{named[m]} (delivered)" if m == best else named[m] for m in shown]
    confidence = f"{100 * data['confirm']['confidence']:g} %"
    return Table(
        f"{metric_title(metric)} on the report documents, "
        f"+- half width of the {confidence} interval",
        ("task", *names),
        tuple(
            (task, *(interval(columns[m].get(task, {}).get(metric), metric) for m in shown))
            for task in (*data["tasks"], "mean")
        ),
    )


def comparisons(data: ReportData) -> Table:
    """Tabulates what was gained over LoRA by the recipe, by metric."""
    chosen = (e["label"] for e in data["confirm"]["competitors"] if e["chosen"])
    baseline = data["verdict"]["baseline"]
    return _differences(data, f"{next(chosen, 'delivered')} minus {baseline}", "comparisons")


def comparisons_of_ranks(data: ReportData) -> Table:
    """Tabulates what the ranks alone gave, by metric."""
    caption = "ranks alone: minus even ranks of the same size on the same stack"
    return _differences(data, caption, "comparisons_of_ranks")


def _differences(data: ReportData, caption: str, key: str) -> Table:
    verdict: Any = data["verdict"]
    place = f", task {verdict['target']} alone" if verdict.get("target") else ""
    return Table.of(
        f"{caption}, paired by seed and document{place}",
        verdict.get(key, {}).items(),
        {
            "metric": lambda pair: pair[0],
            "unit": lambda pair: unit_of_difference(pair[0]),
            "difference": lambda pair: interval(pair[1], pair[0], "estimate"),
            "interval": lambda pair: (
                f"{scored(pair[1]['low'], pair[0])} to {scored(pair[1]['high'], pair[0])}"
            ),
            "confidence": lambda pair: f"{100 * pair[1]['confidence']:g} %",
            "seeds": lambda pair: str(_first(pair[1]["seeds"])),
            "documents": lambda pair: str(pair[1]["documents"]),
            "what it measures": lambda pair: described(pair[0]).meaning,
        },
        ("metric", "unit", "what it measures"),
    )


def curve(data: ReportData) -> Table:
    """Tabulates the objective by learning rate, as it was tuned."""
    tuned: Any = data.get("tune") or {"curves": {}}
    metric = data["objective"]["metric"]
    return Table.of(
        f"learning rates: {objective_label(data)}, on the search documents",
        [(name, point) for name, points in tuned["curves"].items() for point in points],
        {
            "method": lambda pair: pair[0],
            "learning rate": lambda pair: f"{pair[1]['learning_rate']:g}",
            "mean": lambda pair: scored(pair[1]["mean"], metric),
            "by seed": lambda pair: ", ".join(scored(v, metric) for v in pair[1]["values"]),
            "end": lambda pair: pair[1]["reason"] or "ran to the end",
        },
        ("method", "by seed", "end"),
    )


def parts(data: ReportData) -> Table:
    """Tabulates what each part of the stack added on top of those before it."""
    tuned: Any = data.get("tune") or {"tried": []}
    metric = data["objective"]["metric"]
    return Table.of(
        f"parts of the stack, each on top of those that stay: gain in {objective_label(data)}",
        tuned["tried"],
        {
            "part": lambda entry: entry["part"],
            "difference": lambda entry: (
                UNKNOWN
                if entry["difference"] is None
                else scored(entry["difference"]["estimate"], metric)
            ),
            "by seed": lambda entry: ", ".join(scored(v, metric) for v in entry["by_seed"]),
            "stays": lambda entry: "yes" if entry["stays"] else entry["reason"] or "no",
        },
        ("part", "by seed", "stays"),
    )


def _first(seeds: Any) -> Any:
    return seeds["first"] if isinstance(seeds, dict) else seeds  # a number in earlier reports


def race(data: ReportData) -> Table:
    """Tabulates the competitors of the race."""
    metric = data["confirm"]["metric"]
    meaning, unit = described(metric).meaning, unit_of_difference(metric)
    return Table.of(
        f"difference in {metric}{f' ({meaning})' if meaning else ''}"
        f"{f', in {unit}' if unit else ''}, paired by seed and document",
        data["confirm"]["competitors"],
        {
            "competitor": lambda entry: entry["label"],
            "difference": lambda entry: interval(entry["comparison"], metric, "estimate"),
            "confidence": lambda entry: (
                f"{100 * entry['comparison']['confidence']:g} %" if entry["comparison"] else UNKNOWN
            ),
            "by seed": lambda entry: ", ".join(scored(v, metric) for v in entry["per_seed"]),
            "end": lambda entry: (
                ": ".join(filter(None, (entry["reason"], entry["detail"]))) or "ran to the end"
            ),
            "ranks": ranks_text,
            "compared with": lambda entry: (
                entry.get("baseline_label") or "-".join(map(str, entry["baseline"]))
            ),
            "its ranks": lambda entry: "-".join(map(str, entry["baseline"])),
        },
        ("competitor", "by seed", "end", "ranks", "compared with", "its ranks"),
    )


# ------------------------------------------------------------------------------- the pruned model


def layers(data: ReportData) -> Table:
    """Tabulates widths and ranks per layer; several ranks of a layer stand in one cell."""
    named, widths = named_allocations(data), data["widths"]
    count = len(widths)
    per = max(1, len(data.get("slots", [])) // count) if count else 1
    rows = []
    for layer in range(max(count, *(-(-len(ranks) // per) for ranks in named.values()))):
        shape = [data["kept_layers"][layer], *widths[layer]] if layer < count else [UNKNOWN] * 4
        slots = [ranks[per * layer : per * (layer + 1)] for ranks in named.values()]
        ranks = ["-".join(map(str, slot)) or UNKNOWN for slot in slots]
        rows.append(tuple(str(cell) for cell in (layer, *shape, *ranks)))
    header = ("layer", "before pruning", "heads", "KV heads", "MLP channels", *named)
    return Table("the pruned model and its ranks by layer", header, tuple(rows), ())


def parameters(data: ReportData) -> Table:
    """Tabulates parameter counts and their share of the base model."""
    counts, base = data["parameters"], data["parameters"]["base"]
    labels = {**models(data), **data.get("labels", {})}
    named = {"base": base, "pruned": counts["pruned"]}
    for name, label in labels.items():
        if name in counts["trainable"]:
            named[f"{label}, trainable"] = counts["trainable"][name]
    return Table.of(
        "parameters",
        named.items(),
        {
            "model": lambda pair: pair[0],
            "parameters": lambda pair: f"{pair[1]:,}",
            "% of base": lambda pair: _percent(pair[1], base, 2),
        },
    )


def footprint(data: ReportData) -> Table:
    """Tabulates what the model costs before and after pruning."""
    base, pruned = (data["footprints"][name] for name in ("base", "pruned"))
    layer_counts, hidden_sizes = data["layers"], data["hidden_sizes"]
    counts = {
        "parameters": (base["parameters"], pruned["parameters"]),
        "multiply-accumulates, 64 tokens": (base["macs"], pruned["macs"]),
        "layers": (layer_counts["base"], layer_counts["pruned"]),
        "hidden size": (hidden_sizes["base"], hidden_sizes["pruned"]),
    }
    sizes = {
        "key-value cache per token": (base["kv_cache_bytes"], pruned["kv_cache_bytes"]),
        "weights": (base["checkpoint_bytes"], pruned["checkpoint_bytes"]),
    }
    rows = [
        (label, write(was), write(now), _percent(now, was, 1))
        for group, write in ((counts, "{:,}".format), (sizes, size))
        for label, (was, now) in group.items()
    ]
    caption = f"what the model costs, without adapter; bytes in {data['dtype']}"
    if quantization := data.get("quantization"):
        caption += f"; the base model had been quantized ({quantization}), which its scores include"
    return Table(caption, ("", "base", "pruned", "% of base"), tuple(rows))


def _percent(part: int, whole: int, digits: int) -> str:
    return number(100 * part / whole if whole else None, digits)


# ------------------------------------------------------------------------------------ noise floor


def noise_scores(noise: dict[str, Any]) -> Table:
    """Tabulates by score how much of what differs between allocations is more than noise.

    Args:
        noise: What `rankadaptor_plugin.verdict.noise.Noise.to_json` returned.
    """
    first = next(iter(noise["scores"].values()))
    return Table.of(
        f"{first['allocations']} allocations with {first['seeds']} seeds each, on the search "
        "documents. ICC: share of the variance between fine-tunes that is due to the allocation, "
        f"with its {100 * first['confidence']:g} % interval; 0 is nothing but noise",
        noise["scores"].items(),
        {
            "score": lambda pair: pair[0],
            "ICC, shared seeds": lambda pair: number(pair[1]["icc"], 2),
            "interval": lambda pair: f"{number(pair[1]['low'], 2)} to {number(pair[1]['high'], 2)}",
            "ICC, own seeds": lambda pair: number(pair[1]["icc_independent"], 2),
            "sd between allocations": lambda pair: _spread(pair[1]["between_sd"], pair[0]),
            "noise of a fine-tune (sd)": lambda pair: _spread(pair[1]["seed_sd"], pair[0]),
            "unit": lambda pair: unit_of_difference(pair[0]),
        },
        ("score", "unit"),
    )


def noise_needed(noise: dict[str, Any]) -> Table:
    """Tabulates the fine-tunes that it takes to tell a gain from noise, and how long they take."""
    decisive, seconds = noise["decisive"], noise["seconds_per_fine_tune"]
    unit = unit_of_difference(decisive)
    return Table.of(
        f"fine-tunes, of two allocations together, that show a gain in {decisive} with "
        f"probability 0.8; {UNKNOWN}: not with these documents",
        [(entry["gain"], entry["fine_tunes"]) for entry in noise["needed"]],
        {
            "gain": lambda pair: f"{_spread(pair[0], decisive)} {unit}".strip(),
            "fine-tunes": lambda pair: UNKNOWN if pair[1] is None else f"{pair[1]:,}",
            "time": lambda pair: duration(None if pair[1] is None else pair[1] * seconds),
        },
    )


def _spread(value: float, name: str) -> str:
    # Spreads are small: a digit more than the score itself.
    if name == "accuracy":
        return number(100 * value, 2)
    return number(value, 4) if name in KNOWN_METRICS else scored(value, name)


# ------------------------------------------------------------------------------------- the search


def trials(data: ReportData) -> Table:
    """Tabulates the trials in the order of the search."""
    metric = data["objective"]["metric"]

    def error(trial: dict[str, Any]) -> str:
        measured, predicted = trial.get("objective"), trial.get("predicted")
        off = None if measured is None or predicted is None else measured - predicted
        return scored(off, metric)

    def seconds(trial: dict[str, Any]) -> str:
        return number(sum(trial["seconds"].values()) if trial.get("seconds") else None, 1)

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "trial": lambda trial: str(trial["position"] + 1),
        "phase": lambda trial: trial["phase"],
        "measured": lambda trial: scored(trial.get("objective"), metric),
        "predicted": lambda trial: scored(trial.get("predicted"), metric),
        "error": error,
        "training loss": lambda trial: number(trial.get("train_loss")),
        "held-out loss": lambda trial: number(trial.get("validation_loss")),
        "seconds": seconds,
        "state": lambda trial: ": ".join(filter(None, (trial["state"], trial.get("reason")))),
        "ranks, layer 0 first": ranks_text,
    }
    held_out = any(trial.get("validation_loss") is not None for trial in data["trials"])
    if not held_out:
        del columns["held-out loss"]
    return Table.of(
        f"objective: {objective_label(data)}, on the search documents; error: measured minus "
        f"predicted; training loss{' and loss on held-out rows' if held_out else ''} in nats per "
        "token",
        data["trials"],
        columns,
        ("phase", "state", "ranks, layer 0 first"),
    )


def front(data: ReportData) -> Table:
    """Tabulates the Pareto front of score against parameters, smallest first."""
    metric = data["objective"]["metric"]
    return Table.of(
        "Pareto front of score against trainable parameters: no trial has a higher score with as "
        f"few; {objective_label(data)}, on the search documents, one fine-tune each",
        data["front"],
        {
            "parameters": lambda trial: str(trial["parameters"]),
            "measured": lambda trial: scored(trial["objective"], metric),
            "trial": lambda trial: str(trial["position"] + 1),
            "ranks, layer 0 first": ranks_text,
        },
        ("ranks, layer 0 first",),
    )


def knowledge(data: ReportData) -> Table:
    """Tabulates what earlier studies said beforehand and how much that helped."""
    return Table.of(
        "known before the search: rank correlation of what it alone expects with what was "
        "measured; weight that the measurements give it, from 0 to 1; what it adds to the log "
        "evidence, in nats per trial (0 or less: it did not help)",
        data["knowledge"],
        {
            "source": lambda entry: entry["name"],
            "correlation": lambda entry: number(entry["correlation"], 2),
            "weight": lambda entry: number(entry["weight"], 2),
            "evidence": lambda entry: number(entry["gain"], 3),
        },
    )


# ------------------------------------------------------------------------- cost, documents, inputs


def shares(data: ReportData) -> list[tuple[str, float, float]]:
    """Returns (name, seconds, share in [0, 1]) of what the time was spent on."""
    cost = data["cost"]
    parts = (
        ("fine-tuning", cost["fine_tuning"]),
        ("evaluation", cost["evaluation"]),
        ("everything else", cost["other"]),
    )
    total = sum(seconds for _, seconds in parts)
    return [(name, seconds, seconds / total if total > 0 else 0.0) for name, seconds in parts]


def total_time(data: ReportData) -> str:
    """Writes the time of the whole run."""
    return duration(sum(seconds for _, seconds, _ in shares(data)))


def costs(data: ReportData) -> list[Table]:
    """Tabulates time by stage, the longest first, and what the time was spent on."""
    cost = data["cost"]
    memory = cost["peak_memory_bytes"]
    rows = [(n, duration(s), number(100 * share, 1) + " %") for n, s, share in shares(data)]
    rows.append(("mean of a complete trial", duration(cost["per_trial"]), ""))
    rows.append(("peak memory", UNKNOWN if memory is None else f"{memory / 2**30:.2f} GiB", ""))
    return [
        Table.of(
            "time by stage",
            sorted(cost["stages"].items(), key=lambda item: (-item[1], item[0])),
            {
                "stage": lambda pair: pair[0],
                "time": lambda pair: duration(pair[1]),
                "seconds": lambda pair: number(pair[1], 1),
            },
        ),
        Table("what it was spent on", ("part", "amount", "share"), tuple(rows)),
    ]


def documents(data: ReportData) -> Table:
    """Tabulates numbers of documents, and the weight of each task in the mean."""
    counts, weights = data["documents"], data.get("weights") or dict.fromkeys(data["tasks"], 1.0)
    return Table.of(
        "documents by task",
        dict.fromkeys((*data["tasks"], *counts["search"])),
        {
            "task": str,
            "search": lambda task: str(counts["search"].get(task, UNKNOWN)),
            "report": lambda task: str(counts["report"].get(task, UNKNOWN)),
            "weight in the mean": lambda task: f"{weights.get(task, 0.0):g}",
        },
    )


def pairs(caption: str, values: Mapping[str, Any]) -> Table:
    """Tabulates names and values, such as versions and seeds."""
    rows = tuple(
        (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in sorted(values.items())
    )
    return Table(caption, ("name", "value"), rows, (0, 1))


# ------------------------------------------------------------------------------ texts of the models

MEASURES = ("perplexity", "distinct-1", "distinct-2", "repetition")
DECODINGS = ("greedy", "sampled")


def text_quality(data: ReportData) -> Table | None:
    """Tabulates the mean measures of the texts by model and decoding; None without texts."""
    entries, named = data["generation"], models(data)
    if not entries:
        return None
    decodings = _ordered((entry["decoding"] for entry in entries), DECODINGS)
    rows = []
    for model in _ordered((entry["model"] for entry in entries), named):
        cells = []
        for decoding in decodings:
            texts = [e for e in entries if (e["model"], e["decoding"]) == (model, decoding)]
            cells += [
                _mean([entry["perplexity"] for entry in texts], geometric=True),
                _mean([entry["distinct_1"] for entry in texts]),
                _mean([entry["distinct_2"] for entry in texts]),
                _mean([entry["repetition"] for entry in texts]),
            ]
        rows.append((named.get(model, model), *cells))
    return Table(
        "mean over the texts, with their number where some are too short to count; perplexity: "
        "geometric mean (exp of the mean logarithm) under the base model, which finds repetitive "
        "text likely too; distinct-1 and distinct-2: different tokens by all tokens, and the same "
        "of pairs; repetition: share of 4-grams that occurred before in the text",
        ("model", *(f"{name}, {decoding}" for decoding in decodings for name in MEASURES)),
        tuple(rows),
    )


def texts(data: ReportData) -> list[tuple[str, str, str, list[tuple[str, str]]]]:
    """Returns (kind, prompt, decoding, [(name of the model, text)]), as written by the models."""
    entries, named = data["generation"], models(data)
    prompts = dict.fromkeys((entry["kind"], entry["prompt"]) for entry in entries)
    groups = []
    for kind, prompt in prompts:
        same: list[Entry] = [e for e in entries if (e["kind"], e["prompt"]) == (kind, prompt)]
        order = _ordered((entry["model"] for entry in same), named)
        for decoding in _ordered((entry["decoding"] for entry in same), DECODINGS):
            written = [
                (named.get(model, model), entry["text"])
                for model in order
                for entry in same
                if (entry["model"], entry["decoding"]) == (model, decoding)
            ]
            groups.append((kind, prompt, decoding, written))
    return groups


def _ordered(names: Iterable[str], order: Iterable[str]) -> list[str]:
    """Returns each name once: those of `order` first, then the rest as they came."""
    present, order = dict.fromkeys(names), list(order)
    return [name for name in order if name in present] + [n for n in present if n not in order]


def _mean(values: Sequence[float | None], *, geometric: bool = False) -> str:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return UNKNOWN
    mean = statistics.geometric_mean(finite) if geometric else statistics.fmean(finite)
    rest = "" if len(finite) == len(values) else f" ({len(finite)} of {len(values)})"
    return number(mean, 2) + rest
