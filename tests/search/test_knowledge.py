"""What is believed before the search: measured once, kept, and weighed by what came of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from rankadaptor_plugin.config.tables import SearchConfig
from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.core.ranks import RankSpace
from rankadaptor_plugin.core.trials import Phase, Trial, TrialState
from rankadaptor_plugin.search.performance.performance_model import PriorEffects
from rankadaptor_plugin.search.space import OBJECTIVE, LayerFeatures
from rankadaptor_plugin.search.transfer.studies import MetaKnowledge, SourceStudy
from rankadaptor_plugin.search.transfer.transfer import Knowledge, read_knowledge
from rankadaptor_plugin.testing.search import additive_value

SPACE = RankSpace(
    candidates=(2, 4, 8, 12), searchable=(True,) * 6, default_rank=4, costs=(3, 4, 5, 3, 4, 5)
)
FEATURES = LayerFeatures(("relative_depth",), np.linspace(0, 1, 6)[:, None])


def trials_of(values, rows, **changes):
    return [
        Trial(
            position=position,
            phase=Phase.ITERATION,
            allocation=SPACE.allocation(row),
            seed=0,
            state=TrialState.COMPLETE,
            objective=float(value),
            **changes,
        )
        for position, (value, row) in enumerate(zip(values, rows, strict=True))
    ]


def effects_of(function, name="planted"):
    """Effects that add up to a function of the ranks alone, column by column."""
    found = []
    for column, levels in enumerate(SPACE.levels()):
        effect = np.array([function(column, level) for level in levels])
        found.append(effect - effect.mean())
    scale = math.sqrt(sum(effect.var() for effect in found))
    return PriorEffects(name, tuple(effect / scale for effect in found))


TRUE = effects_of(lambda column, rank: (column + 1) * np.log(rank), "true")
FALSE = effects_of(lambda column, rank: (-1) ** (column + rank // 2) * 1.0, "false")


def known(**table):
    return read_knowledge(SPACE, FEATURES, SearchConfig(**table), "choice_logprob")


def test_nothing_is_known_unless_asked_for():
    nothing = known()
    assert nothing.priors == ()
    assert nothing.worth(trials_of(range(5), SPACE.sample(5, np.random.default_rng(0)))) == []


# --------------------------------------------------------------------------------- earlier studies


@pytest.fixture
def meta(tmp_path):
    rows = SPACE.sample(40, np.random.default_rng(1))
    source = SourceStudy(
        name="earlier",
        space=SPACE,
        features=FEATURES,
        rows=rows,
        values=additive_value(rows)[:, None],
        columns=(OBJECTIVE,),
    )
    MetaKnowledge((source,)).save(tmp_path / "meta.safetensors")
    return str(tmp_path / "meta.safetensors")


def test_earlier_studies_are_a_belief(meta):
    (prior,) = known(meta=meta).priors
    assert prior.name == "earlier studies"
    rows = SPACE.sample(100, np.random.default_rng(9))
    assert np.corrcoef(prior(SPACE, rows), additive_value(rows))[0, 1] > 0.8


def test_a_missing_file_is_one_line():
    with pytest.raises(ArtifactError, match=r"The file .*nowhere does not exist"):
        known(meta="nowhere")


# ---------------------------------------------------------------------------- what it was worth


def measured(noise=0.0, count=16):
    rows = SPACE.sample(count, np.random.default_rng(5))
    error = np.random.default_rng(6).normal(scale=noise, size=count) if noise else 0.0
    return trials_of(0.4 + 0.02 * (additive_value(rows) + error), rows)


def test_worth_says_how_each_belief_came_out():
    entries = Knowledge(space=SPACE, priors=(TRUE, FALSE)).worth(measured(noise=0.1))
    assert [entry["name"] for entry in entries] == ["true", "false"]
    for entry in entries:
        assert entry.keys() == {"name", "weight", "correlation", "gain"}
        assert 0 <= entry["weight"] <= 1
        assert -1 <= entry["correlation"] <= 1
        assert math.isfinite(entry["gain"])
    assert json.loads(json.dumps(entries)) == entries
    true, false = entries
    assert true["correlation"] > 0.8 > abs(false["correlation"])
    assert true["gain"] > 0 > false["gain"]
    assert true["weight"] > 0.5


def test_a_useless_belief_has_next_to_no_weight():
    (entry,) = Knowledge(space=SPACE, priors=(FALSE,)).worth(measured(noise=0.1, count=40))
    assert entry["weight"] < 0.2
    assert entry["gain"] < 0.05


def test_a_belief_that_is_upside_down_has_next_to_no_weight():
    upside = replace(TRUE, effects=tuple(-effect for effect in TRUE.effects))
    (entry,) = Knowledge(space=SPACE, priors=(upside,)).worth(measured(noise=0.1))
    assert entry["weight"] < 0.1
    assert entry["correlation"] < -0.8
    assert entry["gain"] < 0


def test_only_complete_trials_tell():
    trials = measured()
    failed = [replace(t, state=TrialState.FAILED, objective=None) for t in trials[:8]]
    believed = Knowledge(space=SPACE, priors=(TRUE,))
    assert believed.worth(failed) == []
    assert believed.worth([*failed, *trials[:2]]) == []
    assert believed.worth([*failed, *trials[8:]]) == believed.worth(trials[8:])


def test_equal_scores_tell_no_correlation():
    rows = SPACE.sample(5, np.random.default_rng(0))
    nothing = PriorEffects("nothing", tuple(np.zeros(len(levels)) for levels in SPACE.levels()))
    (entry,) = Knowledge(space=SPACE, priors=(TRUE,)).worth(trials_of([0.3] * 5, rows))
    assert entry["correlation"] is None
    assert math.isfinite(entry["gain"])
    (entry,) = Knowledge(space=SPACE, priors=(nothing,)).worth(measured())
    assert entry["correlation"] is None
    assert entry["gain"] == pytest.approx(0.0, abs=0.02)


def test_uniform_lora_beyond_the_candidates_is_looked_up_between_them():
    rows = np.vstack([SPACE.sample(6, np.random.default_rng(0)), [[6] * 6]])
    (entry,) = Knowledge(space=SPACE, priors=(TRUE,)).worth(trials_of(additive_value(rows), rows))
    assert entry["correlation"] > 0.8
