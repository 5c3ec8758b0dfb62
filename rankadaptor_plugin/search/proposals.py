"""What a search fine-tunes next, proposed in groups of trials that need not wait for each other."""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from rankadaptor_plugin.search.paper import INITIAL_TRIALS
from rankadaptor_plugin.search.parameters import untried

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from optuna.samplers import BaseSampler

    from rankadaptor_plugin.config.tables import SearchConfig
    from rankadaptor_plugin.core.ranks import RankAllocation, RankSpace
    from rankadaptor_plugin.core.trials import Trial
    from rankadaptor_plugin.search.study import Proposal, TrialStore


class Proposals:
    """What comes next, proposed in groups of trials that do not depend on how each other ends.

    Such are the random trials in the beginning, and the trials of a batch.

    Attributes:
        ready: Proposals that are to be begun, and the seconds that each took.
        group: The allocations of the present group, in order, those that were tried included.
        initial_trials: Random allocations in the beginning, as the last sampler has it.
    """

    def __init__(
        self,
        space: RankSpace,
        store: TrialStore,
        sampler_for: Callable[[int], BaseSampler],
        config: SearchConfig,
        seed: int,
    ) -> None:
        self._space, self._store, self._sampler_for = space, store, sampler_for
        self._config, self._seed = config, seed
        self.ready: deque[tuple[Proposal, float]] = deque()
        self.group: list[RankAllocation] = []
        self.initial_trials = 0

    def draw(self, trials: Sequence[Trial]) -> None:
        """Proposes the rest of the group that comes after some trials; nothing if none is left."""
        tried = {tuple(self._space.row(trial.allocation)) for trial in trials}
        position, last = len(trials), len(trials) + 1
        self.group = []
        while position < last:
            began = time.perf_counter()
            spare = untried(self._space, tried, 1, np.random.default_rng([self._seed, position]))
            if not len(spare):
                break
            drawn_seed = sampler_seed(self._seed, position)
            sampler = self._sampler_for(drawn_seed)
            other = self._space.allocation(spare[0])
            proposal = self._store.propose(
                sampler,
                self._space,
                partial(_placed, self._space, tried, other, drawn_seed),
                self._config.batch,
                other,
                [ahead for ahead, _ in self.ready],
            )
            self.ready.append((proposal, time.perf_counter() - began))
            tried.add(tuple(self._space.row(proposal.allocation)))
            if position == len(trials):
                first, last = self._bounds(position, sampler)
                self.group = [trial.allocation for trial in trials[first:]]
            self.group.append(proposal.allocation)
            position += 1

    def _bounds(self, position: int, sampler: BaseSampler) -> tuple[int, int]:
        """Returns the first trial of the group of a position, and the first after it."""
        config, unasked = self._config, self._store.unasked()
        self.initial_trials = initial_trials(config, sampler)
        # Of a foreign sampler nobody knows whether it looks at what its first trials gave.
        known = getattr(sampler, "initial_trials", 0)
        if position < known:
            return unasked, min(known, config.max_trials)
        first = position - (position - unasked) % config.batch
        return max(first, known), min(first + config.batch, config.max_trials)


def initial_trials(config: SearchConfig, sampler: BaseSampler) -> int:
    """Returns how many random allocations a search begins with."""
    return config.initial_trials or int(getattr(sampler, "initial_trials", INITIAL_TRIALS))


def sampler_seed(seed: int, position: int) -> int:
    """Returns the seed of one trial's sampler, below 2 ** 32."""
    return int(np.random.SeedSequence([seed, position]).generate_state(1)[0])


def _placed(
    space: RankSpace,
    tried: Collection[tuple[int, ...]],
    spare: RankAllocation,
    seed: int,
    proposal: RankAllocation,
) -> RankAllocation:
    """Returns a proposal within the budget, or `spare` if that was tried already."""
    allocation = space.within_budget(proposal, seed)
    # Samplers such as TPE repeat themselves; a fine-tune is too dear for that.
    return spare if tuple(space.row(allocation)) in tried else allocation
