"""Verdict on a gain: real, or within the noise.

Before the search, the noise floor estimates if a search could find a gain above the noise of the
seeds. After it, the race fine-tunes the finalists and LoRA of equal size with fresh
seeds and scores them on documents that the search never saw. One statistical procedure
(`rankadaptor_plugin.verdict.statistics`) compares them, and the models of any finished runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin.core.lazy import lazy_exports

if TYPE_CHECKING:
    from rankadaptor_plugin.verdict.comparison import RunComparison, compare_runs
    from rankadaptor_plugin.verdict.noise_floor import Reliability
    from rankadaptor_plugin.verdict.race import check
    from rankadaptor_plugin.verdict.statistics import Difference, Interval, compare, mean_interval

__all__ = [
    "Difference",
    "Interval",
    "Reliability",
    "RunComparison",
    "check",
    "compare",
    "compare_runs",
    "mean_interval",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "Difference": "statistics",
        "Interval": "statistics",
        "Reliability": "noise_floor",
        "RunComparison": "comparison",
        "check": "race",
        "compare": "statistics",
        "compare_runs": "comparison",
        "mean_interval": "statistics",
    },
)
