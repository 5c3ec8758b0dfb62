"""Conformance suite: what every oracle must do.

A plugin inherits the suite, says how its oracle and a model for it are made, and lets pytest
collect the class:

    from rankadaptor_plugin.testing.oracles import OracleConformance

    class TestMyOracle(OracleConformance):
        def oracle(self, seed):
            return MyOracle(OracleSettings(...))

        def model(self):
            return tiny_model()
"""
# ruff: noqa: S101 - asserting is what a test suite does.

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rankadaptor_plugin.oracle.oracle import Oracle

PURPOSES = ("search", "report")


class OracleConformance:
    """Inherit and override `oracle` and `model`."""

    def oracle(self, seed: int) -> Oracle:
        """Returns a fresh oracle; equal seeds must give equal ones."""
        raise NotImplementedError

    def model(self) -> PreTrainedModel:
        """Returns a model that the oracle can score, the same at every call."""
        raise NotImplementedError

    def test_it_names_its_metrics_and_weighs_its_tasks(self) -> None:
        """Metrics are distinct names; weights are 0 or more, one of them above."""
        oracle = self.oracle(0)
        for purpose in PURPOSES:
            metrics, weights = oracle.metrics(purpose), oracle.weights(purpose)
            assert metrics
            assert len({*metrics}) == len(metrics)
            assert min(weights.values()) >= 0
            assert max(weights.values()) > 0
            assert "mean" not in weights, "the tables keep this name for the weighted mean"

    def test_every_task_has_every_metric_as_a_finite_mean_of_its_documents(self) -> None:
        """Search and verdict need the means, the intervals need the values per document.

        It describes as many documents as it scores: the report counts them.
        """
        oracle, model = self.oracle(0), self.model()
        for purpose in PURPOSES:
            score, described = oracle.score(model, purpose), oracle.describe()["documents"][purpose]
            assert set(score.tasks) == set(oracle.weights(purpose)) == set(described)
            for name, task in score.tasks.items():
                assert len(described[name]) == task.documents > 0
                assert len(task.keys) in (0, task.documents)
                for metric in oracle.metrics(purpose):
                    values = task.per_document[metric]
                    assert len(values) == task.documents
                    assert math.isfinite(task.values[metric])
                    assert np.isclose(task.values[metric], np.mean(values))

    def test_search_and_report_documents_are_disjoint(self) -> None:
        """Documents that chose an allocation must not judge it."""
        documents = self.oracle(0).describe()["documents"]
        assert set(documents) == set(PURPOSES)
        for task in documents["search"].keys() & documents["report"].keys():
            searched, reported = (map(str, documents[purpose][task]) for purpose in PURPOSES)
            assert set(searched).isdisjoint(reported)
        oracle, model = self.oracle(0), self.model()
        keys = [
            {k for t in oracle.score(model, p).tasks.values() for k in t.keys} for p in PURPOSES
        ]
        assert keys[0].isdisjoint(keys[1])

    def test_equal_settings_give_equal_oracles(self) -> None:
        """A run that is continued must ask the same documents, or be refused."""
        one, two, model = self.oracle(0), self.oracle(0), self.model()
        assert one.describe() == two.describe()
        assert json.loads(json.dumps(one.describe())) == one.describe()
        assert one.score(model, "search") == two.score(model, "search")

    def test_scores_do_not_depend_on_what_happened_before(self) -> None:
        """Neither on earlier scores, nor on the generators, nor on training mode."""
        oracle, model = self.oracle(0), self.model()
        first = oracle.score(model, "search")
        oracle.score(model, "report")
        torch.manual_seed(1)
        assert oracle.score(model.train(), "search") == first

    def test_it_leaves_generators_and_weights_alone(self) -> None:
        """The next fine-tune must not depend on the evaluation before it."""
        oracle, model = self.oracle(0), self.model()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        torch.manual_seed(3)
        state, numpy_state = torch.get_rng_state(), repr(np.random.get_state())
        oracle.score(model, "search")
        assert torch.equal(torch.get_rng_state(), state)
        assert repr(np.random.get_state()) == numpy_state
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, before[name])

    def test_another_model_gets_another_score(self) -> None:
        """A score that no weight can change guides nothing."""
        oracle, model = self.oracle(0), self.model()
        first = oracle.score(model, "search")
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.5 * torch.linspace(-1, 1, weight.numel()).reshape(weight.shape))
        assert oracle.score(model, "search") != first
