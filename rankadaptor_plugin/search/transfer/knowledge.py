"""What is believed of the ranks before the search, and what those beliefs turned out to be worth.

Two sources, both as `PriorEffects` that the performance models weigh by evidence: studies of other
tasks and models (`rankadaptor_plugin.search.transfer.meta_knowledge`), and a proxy, one adapter
trained at the greatest rank and cut to many allocations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from rankadaptor_plugin.core.errors import OracleError
from rankadaptor_plugin.core.trials import TrialState
from rankadaptor_plugin.search.performance.linear_model import BayesianRegression
from rankadaptor_plugin.search.transfer.meta_knowledge import MetaKnowledge
from rankadaptor_plugin.search.transfer.transfer import prior_effects, proxy_effects

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rankadaptor_plugin.config.tables import SearchConfig
    from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
    from rankadaptor_plugin.core.run_folder import RunFolder
    from rankadaptor_plugin.core.trials import Trial
    from rankadaptor_plugin.search.performance.performance_model import PriorEffects
    from rankadaptor_plugin.search.record import LayerFeatures

_PROXY = "proxy.json"
_LEAST = 3  # trials below which a rank correlation says nothing


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """Beliefs before the search.

    Attributes:
        space: The rank space.
        priors: The beliefs.
        seconds: What the proxy took, by part; empty without one.
    """

    space: RankSpace
    priors: tuple[PriorEffects, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)

    def worth(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """Says how much each belief helped to predict the trials.

        Returns:
            One entry per prior: ``name``; ``weight``, the share of it that the measurements bear
            out; ``correlation`` (Spearman) of what it alone expects with what was measured, None
            if that cannot be told; ``gain``, in nats per trial, of the log evidence of the linear
            model with this prior over that without.
        """
        measured = [t for t in trials if t.state is TrialState.COMPLETE]
        if not self.priors or len(measured) < _LEAST:
            return []
        rows = np.array([self.space.row(t.allocation) for t in measured], dtype=np.int64)
        values = np.array([t.objective for t in measured], dtype=np.float64)
        found = []
        for prior in self.priors:
            model = BayesianRegression(self.space, (prior,))
            model.fit(rows, values)
            expected = prior(self.space, rows)
            varies = np.ptp(expected) > 0 and np.ptp(values) > 0
            found.append(
                {
                    "name": prior.name,
                    "weight": model.prior_weights[prior.name],
                    "correlation": (
                        float(spearmanr(expected, values).statistic) if varies else None
                    ),
                    "gain": (model.evidence - model.evidence_without_priors) / len(measured),
                }
            )
        return found


def knowledge(
    space: RankSpace,
    features: LayerFeatures,
    config: SearchConfig,
    metric: str,
    folder: RunFolder,
    seed: int,
    proxies: Callable[[Sequence[RankAllocation], int], tuple[list[float], dict[str, float]]],
) -> Knowledge:
    """Reads and measures what the run file asks for.

    Args:
        space: The rank space.
        features: Its slots.
        config: The ``[search]`` table.
        metric: What the search maximizes; earlier studies are asked for the same.
        folder: The run folder, which keeps the proxy's scores.
        seed: Seed of the search, and of the proxy's fine-tune.
        proxies: Scores allocations on one adapter, trained with a seed; tells the seconds too.

    Raises:
        ArtifactError: If the file of meta-knowledge cannot be used.
        OracleError: If a score of the proxy is not a finite number.
    """
    priors, seconds = [], dict[str, float]()
    if config.meta:
        path = Path(config.meta)
        priors.append(prior_effects(MetaKnowledge.load(path), space, features, metric=metric))
    if config.proxy:
        rows = space.sample(config.proxy, np.random.default_rng([seed, config.proxy]))
        kept = folder.read_json(_PROXY)
        if kept is None or not _fits(kept, rows.tolist()):
            values, took = proxies([space.allocation(row) for row in rows], seed)
            if not np.isfinite(values).all():
                raise OracleError(
                    "A score of the proxy is no finite number. Lower [recovery] learning_rate, or "
                    "set [search] proxy = 0."
                )
            kept = {"rows": rows.tolist(), "values": values, "seconds": took}
            folder.write_json(_PROXY, kept)
        seconds = kept["seconds"]
        scores = np.array(kept["values"], dtype=np.float64)
        priors.append(proxy_effects(space, rows, scores, "proxy"))
    return Knowledge(space=space, priors=tuple(priors), seconds=seconds)


def _fits(kept: dict[str, Any], rows: list[list[int]]) -> bool:
    """Tells whether kept scores are whole, and of these rows."""
    values, seconds = kept.get("values"), kept.get("seconds")
    return (
        kept.get("rows") == rows
        and isinstance(values, list)
        and len(values) == len(rows)
        and all(isinstance(value, float) for value in values)
        and isinstance(seconds, dict)
        and all(isinstance(value, float) for value in seconds.values())
    )
