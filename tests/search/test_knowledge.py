"""What is believed before the search: measured once, kept, and weighed by what came of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from rankadaptor_plugin.config.tables import SearchConfig
from rankadaptor_plugin.core.errors import ArtifactError, OracleError
from rankadaptor_plugin.core.ranks import RankSpace
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.core.trials import Phase, Trial, TrialState
from rankadaptor_plugin.search.performance.performance_model import PriorEffects
from rankadaptor_plugin.search.record import OBJECTIVE, LayerFeatures
from rankadaptor_plugin.search.transfer.knowledge import Knowledge, knowledge
from rankadaptor_plugin.search.transfer.meta_knowledge import MetaKnowledge
from rankadaptor_plugin.search.transfer.source_studies import SourceStudy
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
            fidelity=1.0,
            state=TrialState.COMPLETE,
            objective=float(value),
            **changes,
        )
        for position, (value, row) in enumerate(zip(values, rows, strict=True))
    ]


def effects_of(function, name="proxy"):
    """Effects that add up to a function of the ranks alone, column by column."""
    found = []
    for column, levels in enumerate(SPACE.levels()):
        effect = np.array([function(column, level) for level in levels])
        found.append(effect - effect.mean())
    scale = math.sqrt(sum(effect.var() for effect in found))
    return PriorEffects(name, tuple(effect / scale for effect in found))


TRUE = effects_of(lambda column, rank: (column + 1) * np.log(rank), "true")
FALSE = effects_of(lambda column, rank: (-1) ** (column + rank // 2) * 1.0, "false")


class Proxies:
    """Scores allocations by the planted function and counts the calls."""

    def __init__(self, value=None):
        self.calls, self.value = [], value

    def __call__(self, allocations, seed):
        self.calls.append((list(allocations), seed))
        values = additive_value(np.array([a.ranks for a in allocations])).tolist()
        if self.value is not None:
            values = [self.value] * len(allocations)
        return values, {"recovery": 2.0, "oracle": 0.5}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def known(folder, proxies, seed=3, **table):
    return knowledge(SPACE, FEATURES, SearchConfig(**table), "clp", folder, seed, proxies)


# ------------------------------------------------------------------------------------- the proxy


def test_nothing_is_known_unless_asked_for(folder):
    proxies = Proxies()
    found = known(folder, proxies)
    assert (found.priors, dict(found.seconds), proxies.calls) == ((), {}, [])
    assert found.worth(trials_of(range(5), SPACE.sample(5, np.random.default_rng(0)))) == []
    assert not (folder.path / "proxy.json").exists()


def test_proxies_are_scored_once_and_kept(folder):
    proxies = Proxies()
    first = known(folder, proxies, proxy=40)
    again = known(folder, proxies, proxy=40)
    ((allocations, seed),) = proxies.calls
    assert (len(allocations), seed) == (40, 3)
    for allocation in allocations:
        SPACE.check(allocation)
    kept = json.loads((folder.path / "proxy.json").read_text("utf-8"))
    assert kept["rows"] == [SPACE.row(a) for a in allocations]
    assert kept["values"] == additive_value(np.array(kept["rows"])).tolist()
    for one, other in zip(first.priors[0].effects, again.priors[0].effects, strict=True):
        np.testing.assert_array_equal(one, other)
    assert first.priors[0].name == "proxy"
    # What it took counts, in the run that goes on too.
    assert first.seconds == again.seconds == {"recovery": 2.0, "oracle": 0.5}


@pytest.mark.parametrize("change", [{"seed": 4}, {"proxy": 41}])
def test_other_proxies_are_scored_anew(folder, change):
    proxies = Proxies()
    known(folder, proxies, proxy=40)
    known(folder, proxies, **{"proxy": 40, **change})
    assert len(proxies.calls) == 2


def test_the_effects_are_those_of_the_scores(folder):
    (prior,) = known(folder, Proxies(), proxy=200).priors
    rows = SPACE.sample(100, np.random.default_rng(9))
    assert np.corrcoef(prior(SPACE, rows), additive_value(rows))[0, 1] > 0.95
    for effect, levels in zip(prior.effects, SPACE.levels(), strict=True):
        assert effect.shape == (len(levels),)
        assert effect[-1] > effect[0]


def test_equal_scores_have_no_effects(folder):
    (prior,) = known(folder, Proxies(value=0.25), proxy=10).priors
    assert not np.concatenate(prior.effects).any()


def test_a_single_proxy_has_no_effects(folder):
    (prior,) = known(folder, Proxies(), proxy=1).priors
    assert not np.concatenate(prior.effects).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_one_line(folder, value):
    with pytest.raises(OracleError, match="score of the proxy is no finite number") as error:
        known(folder, Proxies(value=value), proxy=10)
    assert "\n" not in str(error.value)
    assert not (folder.path / "proxy.json").exists()  # the next run may do better


@pytest.mark.parametrize("text", ["", '{"rows": [[1,', '{"rows": 3}', "[]", "{}"])
def test_a_damaged_file_of_scores_is_one_line_or_measured_anew(folder, text):
    (folder.path / "proxy.json").write_text(text, "utf-8")
    assert_refused_or_measured_anew(folder)


@pytest.mark.parametrize(("key", "value"), [("values", None), ("values", "x"), ("seconds", None)])
def test_a_file_with_a_part_of_the_scores_is_one_line_or_measured_anew(folder, key, value):
    known(folder, Proxies(), proxy=10)
    file = folder.path / "proxy.json"
    kept = json.loads(file.read_text("utf-8"))
    del kept[key]
    file.write_text(json.dumps(kept if value is None else {**kept, key: value}), "utf-8")
    assert_refused_or_measured_anew(folder)


def assert_refused_or_measured_anew(folder):
    proxies, found, refusal = Proxies(), None, "proxy.json"
    try:
        found = known(folder, proxies, proxy=10)
    except ArtifactError as error:
        refusal = str(error)
    assert "proxy.json" in refusal
    assert "\n" not in refusal
    if found is not None:
        assert len(proxies.calls) == 1
        assert dict(found.seconds) == {"recovery": 2.0, "oracle": 0.5}


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


def test_earlier_studies_are_a_belief_of_their_own(folder, meta):
    found = known(folder, Proxies(), meta=meta, proxy=100)
    assert [prior.name for prior in found.priors] == ["earlier studies", "proxy"]
    rows = SPACE.sample(100, np.random.default_rng(9))
    for prior in found.priors:
        assert np.corrcoef(prior(SPACE, rows), additive_value(rows))[0, 1] > 0.8


def test_a_missing_file_is_one_line_before_any_proxy(folder):
    proxies = Proxies()
    with pytest.raises(ArtifactError, match=r"There is no file .*nowhere"):
        known(folder, proxies, meta="nowhere", proxy=10)
    assert not proxies.calls


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
    stopped = [replace(t, state=TrialState.STOPPED, objective=None) for t in trials[:8]]
    believed = Knowledge(space=SPACE, priors=(TRUE,))
    assert believed.worth(failed) == []
    assert believed.worth([*failed, *trials[:2]]) == []
    assert believed.worth([*failed, *stopped, *trials[8:]]) == believed.worth(trials[8:])


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
