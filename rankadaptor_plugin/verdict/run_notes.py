"""What keeps models of different runs from being compared like with like, a sentence or so each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rankadaptor_plugin.core.run_folder import flat

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rankadaptor_plugin.core.document_results import TaskDocuments
    from rankadaptor_plugin.verdict.choice import Choice

    Results = dict[int | None, dict[str, TaskDocuments]]  # by seed and task

_SIMILAR = 0.02  # share by which trainable parameters may differ and still count as equal
_NAMED = 6  # settings that a note spells out


def notes_on_tasks(
    choices: Sequence[Choice], tasks: Sequence[Sequence[str]], compared: Sequence[str]
) -> Iterator[str]:
    """Says which tasks are left out, and whether the runs weight them alike.

    Args:
        choices: The models.
        tasks: Names of the tasks that each model has.
        compared: Names of the tasks that are compared.
    """
    left_out = sorted(
        {task for names in tasks for task in names if any(task not in n for n in tasks)}
    )
    if left_out:
        yield (
            f"Only tasks that all models have are compared: {', '.join(compared)}. Left out: "
            f"{', '.join(left_out)}."
        )
    shares = []
    for choice in choices:
        given = choice.report["weights"]
        total = sum(given.get(task, 0.0) for task in compared)
        shares.append([given.get(task, 0.0) / total if total else 0.0 for task in compared])
    if any(not np.allclose(share, shares[0]) for share in shares):
        yield (
            f"The runs weight their tasks differently; the weights of {choices[0].label} are used."
        )


def notes_on_models(
    choices: Sequence[Choice], results: Sequence[Results], compared: Sequence[str]
) -> Iterator[str]:
    """Says in what the runs differ, and what the results leave open.

    Args:
        choices: The models.
        results: The results of each.
        compared: Names of the tasks that are compared.
    """
    runs = list({choice.folder: choice for choice in choices}.values())
    for size, what in (("base", "base models"), ("pruned", "pruned models")):
        counts = [run.report["parameters"].get(size) for run in runs]
        if len(set(counts)) > 1:
            listed = ", ".join(f"{c:,}" if isinstance(c, int) else "unknown" for c in counts)
            yield f"The runs have {what} of different sizes: {listed} parameters."
    settings = [flat(run.report.get("config", {})) for run in runs]
    changed = [
        key
        for key in sorted({key for values in settings for key in values} - {"output"})
        if any(values.get(key) != settings[0].get(key) for values in settings)
    ]
    if changed:
        more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
        yield f"Settings that differ between the runs: {', '.join(changed[:_NAMED])}{more}."
    counted = [(c.trainable, c.label) for c in choices if c.trainable is not None]
    if counted and max(counted)[0] > (1 + _SIMILAR) * min(counted)[0]:
        (most, largest), (least, smallest) = max(counted), min(counted)
        yield (
            f"Warning: not at equal parameters: {largest} has {most:,} trainable parameters, "
            f"{smallest} {least:,}. More parameters recover more."
        )
    for choice in choices:
        if len(choice.files) == 1 and choice.model not in ("base", "pruned"):
            yield (
                f"{choice.label} is one fine-tune. Its part of the interval covers the choice of "
                "documents, not what another seed would change."
            )
    unnamed = {
        task
        for result in results
        for score in result.values()
        for task in compared
        if score[task].keys == [str(i) for i in range(len(score[task].keys))]
    }
    if unnamed and len({choice.folder for choice in choices}) > 1:
        yield (
            f"The documents of {', '.join(sorted(unnamed))} have no names and are paired by "
            "position. That is right only if the runs were scored on the same documents."
        )


def notes_on_confidence(choices: Sequence[Choice]) -> Iterator[str]:
    """Says so if the runs have different confidences."""
    given = sorted({choice.confidence for choice in choices})
    if len(given) > 1:
        yield (
            f"The runs have different confidences ({', '.join(f'{c:g}' for c in given)}); "
            f"{choices[0].confidence:g} is used, that of {choices[0].label}."
        )
