"""The seven benchmarks: lm-eval's own prompts, one accuracy for each, one mean for all."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import lm_eval.tasks
import numpy as np
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.oracle.commonsense7 import ACCURACY_METRICS, Commonsense7Task, task_config
from rankadaptor_plugin.oracle.lm_eval_internals import task_file
from rankadaptor_plugin.tasks import task_dir

STOCK = {
    "boolq": ("super_glue/boolq/default.yaml", "aps/super_glue", "boolq"),
    "piqa": ("piqa/piqa.yaml", "baber/piqa", None),
    "hellaswag": ("hellaswag/hellaswag.yaml", "Rowan/hellaswag", None),
    "winogrande": ("winogrande/default.yaml", "allenai/winogrande", "winogrande_xl"),
    "arc_easy": ("arc/arc_easy.yaml", "allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": ("arc/arc_challenge.yaml", "allenai/ai2_arc", "ARC-Challenge"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "allenai/openbookqa", "main"),
}
SPLITS = {
    **dict.fromkeys(STOCK, "validation"),
    **dict.fromkeys(("arc_easy", "arc_challenge", "openbookqa"), "test"),
}
GROUPS = {"report": "rankadaptor_commonsense7", "search": "rankadaptor_commonsense7_search"}
CASES = [(benchmark, documents) for benchmark in STOCK for documents in GROUPS]


def stock_config(benchmark):
    return task_file(Path(lm_eval.tasks.__file__).parent / STOCK[benchmark][0])


def own_config(benchmark, documents="report"):
    suffix = "_search" if documents == "search" else ""
    return task_file(task_dir() / "commonsense7" / f"rankadaptor_{benchmark}{suffix}.yaml")


def rows_of(benchmark, documents):
    """Random documents; each benchmark has another number of them."""
    number = list(STOCK).index(benchmark)
    rng = np.random.default_rng([number, documents == "search"])

    def words(count):
        return " ".join(f"w{i}" for i in rng.integers(0, 37, count))

    def choices():
        return [words(int(rng.integers(1, 4))) for _ in range(4)]

    def row():
        gold = int(rng.integers(0, 2))
        labeled = {"text": choices(), "label": ["A", "B", "C", "D"]}
        return {
            "boolq": {"question": words(3), "passage": words(9), "label": gold},
            "piqa": {"goal": words(4), "sol1": words(2), "sol2": words(3), "label": gold},
            "hellaswag": {
                "activity_label": words(1),
                "ctx_a": f"{words(4)} [title] {words(1)} [step] {words(1)}",
                "ctx_b": words(2),
                "endings": choices(),
                "label": str(gold),
            },
            "winogrande": {
                "sentence": f"{words(2)} _ {words(3)}.",
                "option1": words(1),
                "option2": words(1),
                "answer": str(gold + 1),
            },
            "openbookqa": {
                "question_stem": words(4),
                "choices": labeled,
                "answerKey": "ABCD"[gold],
            },
        }.get(benchmark, {"question": words(4), "choices": labeled, "answerKey": "ABCD"[gold]})

    return [row() for _ in range(4 + 3 * number)]


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Local copies of what the tasks evaluate, and of nothing else."""
    folder = tmp_path_factory.mktemp("copies")
    for benchmark, documents in CASES:
        split = "train" if documents == "search" else SPLITS[benchmark]
        lines = map(json.dumps, rows_of(benchmark, documents))
        (folder / f"{benchmark}_{split}.jsonl").write_text("\n".join(lines))
    return folder


def manager(copies):
    metadata = {"data_dir": str(copies)}
    return TaskManager(include_path=str(task_dir()), include_defaults=False, metadata=metadata)


@pytest.fixture(scope="module")
def loaded(copies):
    return manager(copies).load(list(GROUPS.values()))


def task_of(loaded, benchmark, documents):
    return loaded["tasks"][f"rankadaptor_{benchmark}{'_search' * (documents == 'search')}"]


def requests(task):
    task.build_all_requests()
    return [(i.doc_id, i.idx, i.request_type, i.arguments) for i in task.instances]


# --------------------------------------------------------------------------- lm-eval's definitions


@pytest.mark.parametrize(("benchmark", "documents"), CASES)
def test_requests_and_answers_are_those_of_the_stock_task(loaded, benchmark, documents):
    ours, rows = task_of(loaded, benchmark, documents), rows_of(benchmark, documents)
    config = stock_config(benchmark)
    config.pop("tag", None)
    split = config["training_split"] if documents == "search" else SPLITS[benchmark]
    if documents == "search":
        config["test_split"] = split
    data = {name: datasets.Dataset.from_list(rows) for name in {split, "train"}}
    stock = ConfigurableTask(config={**config, "custom_dataset": lambda **_: data})
    assert requests(ours) == requests(stock)
    assert len(ours.eval_docs) == len(stock.eval_docs) == len(rows)
    for doc in ours.eval_docs:
        assert ours.doc_to_target(doc) == stock.doc_to_target(doc)
        assert ours.doc_to_text(doc) == stock.doc_to_text(doc)
    assert ours.VERSION == stock.VERSION


@pytest.mark.parametrize("benchmark", STOCK)
def test_the_report_config_differs_from_the_stock_one_in_name_and_shots_alone(benchmark):
    stock, ours = stock_config(benchmark), task_config(own_config(benchmark))
    assert {key for key in stock | ours if stock.get(key) != ours.get(key)} <= {
        "task",
        "tag",
        "num_fewshot",
    }
    assert ours["task"] == f"rankadaptor_{benchmark}"
    assert ours["num_fewshot"] == 0


@pytest.mark.parametrize("benchmark", STOCK)
def test_the_search_config_differs_from_the_report_config_in_splits_alone(benchmark):
    report, search = (task_config(own_config(benchmark, documents)) for documents in GROUPS)
    splits = {"task": search["task"], "test_split": "train", "validation_split": None}
    assert search == report | splits


@pytest.mark.parametrize(("benchmark", "documents"), CASES)
def test_without_data_dir_the_stock_data_set_is_asked_for(monkeypatch, benchmark, documents):
    asked = []

    def load_dataset(**wanted):
        asked.append(wanted)
        rows = datasets.Dataset.from_list(rows_of(benchmark, documents))
        return {"train" if documents == "search" else SPLITS[benchmark]: rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = Commonsense7Task(config=own_config(benchmark, documents))
    assert asked == [{"path": STOCK[benchmark][1], "name": STOCK[benchmark][2]}]
    assert len(task.eval_docs) == len(rows_of(benchmark, documents))


# ------------------------------------------------------------------------------------ evaluation


@pytest.fixture(scope="module")
def results(loaded, make_llama, make_tokenizer):
    lm = HFLM(pretrained=make_llama(), tokenizer=make_tokenizer(), batch_size=32)
    return evaluate(lm, loaded, bootstrap_iters=1, log_samples=True)


@pytest.mark.parametrize(("benchmark", "documents"), CASES)
def test_accuracy_repeats_the_fixed_metric(results, loaded, benchmark, documents):
    task = task_of(loaded, benchmark, documents)
    found, metric = results["results"][task.config.task], ACCURACY_METRICS[benchmark]
    assert task.accuracy_metric == metric
    assert found["accuracy,none"] == found[f"{metric},none"]
    assert found["accuracy_stderr,none"] == found[f"{metric}_stderr,none"] < 0.5
    assert results["higher_is_better"][task.config.task]["accuracy"] is True
    stock = {entry["metric"] for entry in stock_config(benchmark)["metric_list"]}
    assert {key.split(",")[0] for key in found if key.endswith(",none")} == {
        name + end for name in stock | {"accuracy"} for end in ("", "_stderr")
    }


@pytest.mark.parametrize("documents", GROUPS)
def test_the_group_is_the_unweighted_mean(results, loaded, documents):
    names = [task_of(loaded, benchmark, documents).config.task for benchmark in STOCK]
    values = [results["results"][name]["accuracy,none"] for name in names]
    group = results["groups"][GROUPS[documents]]
    assert group["accuracy,none"] == pytest.approx(np.mean(values))
    errors = [results["results"][name]["accuracy_stderr,none"] for name in names]
    assert group["accuracy_stderr,none"] == pytest.approx(np.sqrt(np.sum(np.square(errors))) / 7)
    sizes = [results["results"][name]["sample_len"] for name in names]
    assert np.mean(values) != pytest.approx(np.average(values, weights=sizes))


def test_long_choices_are_compared_by_length_normalized_likelihood():
    assert sorted(name for name, metric in ACCURACY_METRICS.items() if metric == "acc_norm") == [
        "arc_challenge",
        "hellaswag",
        "openbookqa",
    ]


def test_answers_alone_can_be_collected(copies):
    task = manager(copies).load(["rankadaptor_piqa"])["tasks"]["rankadaptor_piqa"]
    task.override_metric("bypass")
    assert "accuracy" not in task.process_results(task.eval_docs[0], [(-1.0, True), (-2.0, False)])


# ------------------------------------------------------------------------------------- documents


def test_documents_are_processed_once(loaded):
    task = task_of(loaded, "hellaswag", "report")
    assert task.eval_docs is task.eval_docs


def test_local_copies_leave_nothing_in_the_cache_and_ask_no_hub(copies, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    load = datasets.load_dataset

    def of_files(path, **options):
        return load(path, **options) if path == "json" else pytest.fail("asked the hub")

    monkeypatch.setattr(datasets, "load_dataset", of_files)
    manager(copies).load(["rankadaptor_commonsense7"])
    assert not (tmp_path / "cache").exists()


# ----------------------------------------------------------------------------------------- errors


def test_another_lm_eval_without_the_file_is_named():
    with pytest.raises(OracleError, match=r"lm-eval \S+ has no task file \S+gone\.yaml.* Install"):
        task_config(own_config("piqa") | {"stock": "piqa/gone.yaml"})


@pytest.mark.parametrize(("key", "value"), [("benchmark", "siqa"), ("documents", None)])
def test_a_wrong_key_is_named(key, value):
    with pytest.raises(ConfigError, match=rf"'rankadaptor_piqa' has {key} {value!r}\. Allowed are"):
        task_config(own_config("piqa") | {key: value})


def test_examples_are_refused(copies):
    config = own_config("piqa") | {"num_fewshot": 5, "metadata": {"data_dir": str(copies)}}
    with pytest.raises(ConfigError, match=r"num_fewshot 5\. It is zero-shot"):
        Commonsense7Task(config=config)


def test_a_missing_copy_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing: .*/openbookqa/train\.jsonl"):
        manager(tmp_path).load(["rankadaptor_openbookqa_search"])
