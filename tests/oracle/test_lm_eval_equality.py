"""Accuracies are those of stock lm-eval, to the last digit, on all that a run can score.

Stock is `lm_eval.simple_evaluate` with lm-eval's own `HFLM`, on the same documents. The models are
the embedded one, its pruned forms, and an adapter on it, attached and merged.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from rankadaptor_plugin.config.run_file import corpus_file, model_folder
from rankadaptor_plugin.config.tables import EMBEDDED, CorpusConfig, OracleConfig, PruneConfig
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.corpus.corpus import load_corpus
from rankadaptor_plugin.models.checkpoints import load_model, load_tokenizer
from rankadaptor_plugin.oracle.lm_eval_oracle import lm_eval as build_oracle
from rankadaptor_plugin.oracle.oracle import OracleSettings
from rankadaptor_plugin.pruning.calibration import calibration_samples
from rankadaptor_plugin.pruning.depth import prune_depth
from rankadaptor_plugin.pruning.width import prune_width
from rankadaptor_plugin.recovery.adapters import attach, trainable_parameters
from rankadaptor_plugin.tasks import task_dir

TASKS = {
    "tiny_boolq": "acc",
    "tiny_hellaswag": "acc_norm",
    "tiny_winogrande": "acc",
    "tiny_arc_challenge": "acc_norm",
}
DOCUMENTS = 16  # per task
MODELS = ("base", "width", "depth", "adapter", "merged")
STOCK_BATCHES = (1, 16, 64)
BATCHES = (
    {},
    {"batch_tokens": 1},
    {"batch_tokens": 60},
    {"batch_tokens": 300},
)
RANKS = (2, 12, 4, 8, 6, 10, 2, 4)
PRUNE = {"keep_first": 0, "keep_last": 0}


@pytest.fixture(scope="module")
def folder():
    return model_folder(EMBEDDED)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def base(folder):
    return load_model(folder, device=torch.device("cpu"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def samples(tokenizer):
    corpus = load_corpus(
        corpus_file(EMBEDDED),
        tokenizer,
        CorpusConfig(template="plain", max_length=32, max_train_samples=200),
    )
    return calibration_samples([s.tokens for s in corpus.sequences], 8, 7, 0)


def with_adapter(base):
    """An adapter of uneven ranks that changes answers."""
    model = attach(copy.deepcopy(base), RankAllocation(RANKS), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable_parameters(model):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def model(request, base, tokenizer, samples):
    if request.param == "width":
        config = PruneConfig(global_pruning=True, pruning_ratio=0.4, **PRUNE)
        pruned = prune_width(copy.deepcopy(base), tokenizer, samples, config)
        assert len(set(pruned.widths)) > 2
        return pruned.model.eval()
    if request.param == "depth":
        config = PruneConfig(method="depth", blocks=3, **PRUNE)
        pruned = prune_depth(copy.deepcopy(base), tokenizer, samples, config)
        assert len(pruned.widths) == 5
        return pruned.model.eval()
    if request.param == "adapter":
        return with_adapter(base)
    if request.param == "merged":
        return with_adapter(base).merge_and_unload()
    return base


@pytest.fixture(scope="module")
def oracles(tokenizer):
    return [
        build_oracle(
            OracleSettings(
                config=OracleConfig(
                    tasks=tuple(TASKS), search_documents=20, report_documents=DOCUMENTS, **batches
                ),
                tokenizer=tokenizer,
                task_paths=(Path(task_dir()),),
                seed=0,
            )
        )
        for batches in BATCHES
    ]


@pytest.fixture(scope="module")
def ours(model, oracles):
    return [oracle.score(model, "report") for oracle in oracles]


@pytest.fixture(scope="module")
def stock(model, oracles, tokenizer):
    """What lm-eval returns, one result per batch size."""
    manager = TaskManager(include_path=str(task_dir()), include_defaults=False)
    documents = oracles[0].describe()["documents"]["report"]
    return [
        lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size),
            tasks=list(TASKS),
            task_manager=manager,
            samples=documents,
            log_samples=True,
            bootstrap_iters=0,
            **dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed")),
        )
        for size in STOCK_BATCHES
    ]


def test_accuracies_are_equal_to_the_last_digit_of_every_document_too(ours, stock, oracles):
    ids = oracles[0].describe()["documents"]["report"]
    for score, found in itertools.product(ours, stock):
        for name, metric in TASKS.items():
            task, logged = score.tasks[name], {s["doc_id"]: s for s in found["samples"][name]}
            assert (task.accuracy_metric, task.documents) == (metric, DOCUMENTS)
            assert task.values["accuracy"] == found["results"][name][f"{metric},none"]
            assert task.per_document["accuracy"] == [logged[i][metric] for i in ids[name]]


def test_choice_logprob_and_margin_follow_from_the_logged_log_likelihoods(ours, stock, oracles):
    ids = oracles[0].describe()["documents"]["report"]
    for task in TASKS:
        logged = {sample["doc_id"]: sample for sample in stock[0]["samples"][task]}
        choice_logprob, margin = [], []
        for number in ids[task]:
            likelihoods = np.array([r[0][0] for r in logged[number]["resps"]])
            gold = int(logged[number]["target"])
            if "acc_norm" in logged[number]:  # choices that differ in length
                likelihoods /= [len(r[1].strip().encode()) for r in logged[number]["arguments"]]
            choice_logprob.append(likelihoods[gold] - np.logaddexp.reduce(likelihoods))
            margin.append(likelihoods[gold] - np.delete(likelihoods, gold).max())
        for score in ours:
            per_document = score.tasks[task].per_document
            np.testing.assert_allclose(per_document["choice_logprob"], choice_logprob, atol=2e-4)
            np.testing.assert_allclose(per_document["margin"], margin, atol=2e-4)


def test_the_models_answer_differently(base, oracles):
    """Equal scores of equal models would say nothing."""
    first, second = (oracles[0].score(model, "report") for model in (base, with_adapter(base)))
    answers = [[s.tasks[t].per_document["accuracy"] for t in TASKS] for s in (first, second)]
    assert answers[0] != answers[1]
