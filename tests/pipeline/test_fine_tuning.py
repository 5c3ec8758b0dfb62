"""Fine-tunes one after another: memory that ran out once is remembered, the batch stays."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.tables import RecoveryConfig
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.run_folder import RunFolder
from rankadaptor_plugin.corpus.sequences import Corpus, TrainingSequence
from rankadaptor_plugin.pipeline.budget import Budget
from rankadaptor_plugin.pipeline.fine_tuning import FineTuner
from rankadaptor_plugin.recovery import training

CONFIG = RecoveryConfig(
    max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2, warmup_steps=0
)


@pytest.fixture
def tuner(make_llama, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 40, (n,), generator=generator) for n in (3, 5, 6, 8, 4, 7, 5, 9)]
    context = SimpleNamespace(
        config=SimpleNamespace(recovery=CONFIG),
        parts=(),
        corpus=Corpus(sequences=[TrainingSequence(one, one) for one in tokens], dropped=0),
        teacher=None,
        attention="",
        oracle=SimpleNamespace(score=lambda model, documents: None),
    )
    pruned = SimpleNamespace(model=make_llama(), tokenizer=None)
    budget = Budget(run_file.from_dict({"oracle": {"tasks": ["toy"]}}))
    return FineTuner(pruned, context, RunFolder(tmp_path), lambda score: 0.0, 0, budget)


def test_memory_that_ran_out_is_remembered_with_the_same_batch(tuner, monkeypatch):
    allocation = RankAllocation((4, 2))
    whole = tuner.search_run(allocation, 1)
    loss_of, sizes = training.pass_loss, []

    def cramped(model, given, **options):
        sizes.append(len(given.input_ids))
        if sizes[-1] > 2:
            raise RuntimeError("CUDA error: out of memory")
        return loss_of(model, given, **options)

    monkeypatch.setattr(training, "pass_loss", cramped)
    halved = tuner.search_run(allocation, 1)
    assert sizes == [4] + [2] * 8  # 2 steps of 8 sequences
    sizes.clear()
    again = tuner.search_run(allocation, 1)
    assert sizes == [2] * 8
    assert again.train_loss == halved.train_loss
    assert halved.train_loss == pytest.approx(whole.train_loss, rel=1e-5)
    with tuner.cleared():
        pass
