"""Search of rank allocations: loop, trial store, samplers, and priors from earlier studies.

`search` takes a function that fine-tunes and scores an allocation, and knows nothing else about
models. Samplers are those of Optuna's interface: ours (`bayes`), the paper's (`paper`) and Optuna's
own (`samplers`). ``performance/`` holds the models Q that predict scores, ``transfer/`` what is
learned from finished studies of other tasks and models. `rank_sampler` serves studies of your own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin.core.lazy import lazy_exports

if TYPE_CHECKING:
    from rankadaptor_plugin.search.allocations import check
    from rankadaptor_plugin.search.bayes import BayesSampler, rank_sampler
    from rankadaptor_plugin.search.paper import PerformanceModelSampler
    from rankadaptor_plugin.search.samplers import (
        PerformanceModelFactory,
        RankSampler,
        SamplerFactory,
        SamplerSettings,
    )
    from rankadaptor_plugin.search.search import SearchResult

__all__ = [
    "BayesSampler",
    "PerformanceModelFactory",
    "PerformanceModelSampler",
    "RankSampler",
    "SamplerFactory",
    "SamplerSettings",
    "SearchResult",
    "check",
    "rank_sampler",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "BayesSampler": "bayes",
        "PerformanceModelFactory": "samplers",
        "PerformanceModelSampler": "paper",
        "RankSampler": "samplers",
        "SamplerFactory": "samplers",
        "SamplerSettings": "samplers",
        "SearchResult": "search",
        "check": "allocations",
        "rank_sampler": "bayes",
    },
)
