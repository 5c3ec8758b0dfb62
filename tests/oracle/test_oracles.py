"""The oracle: lm-eval's own accuracies, scores computed by hand, documents kept apart."""

from __future__ import annotations

import json
import logging

import lm_eval as stock
import numpy as np
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from rankadaptor_plugin.config.tables import OracleConfig
from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.oracle.lm_eval_oracle import choice_scores, lm_eval
from rankadaptor_plugin.oracle.oracle import OracleSettings
from rankadaptor_plugin.recovery.adapters import attach, trainable_parameters

# datasets leaves the file behind a table of its own open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


def documents(count: int, seed: int = 0) -> list[dict[str, object]]:
    rng = np.random.default_rng(seed)

    def text(words: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, 37, words))

    return [
        {
            "id": i,
            "question": text(int(rng.integers(2, 6))),
            "choices": [text(1), text(3), text(2)],
            "gold": int(rng.integers(0, 3)),
        }
        for i in range(count)
    ]


def metrics(*names):
    return [{"metric": n, "aggregation": "mean", "higher_is_better": True} for n in names]


@pytest.fixture
def tasks(tmp_path):
    """Writes a task of a given name; returns the task folder."""
    folder = tmp_path / "tasks"
    folder.mkdir()

    def write(name="toy", rows=None, data=None, **changes):
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, documents(12) if rows is None else rows)))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": data or str(path)},
                "cache_dir": str(tmp_path / "cache"),
            },
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "question",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": metrics("acc", "acc_norm"),
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task, **changes}))
        return folder

    return write


@pytest.fixture
def oracle(make_tokenizer):
    def make(folder, *, seed=0, **changes):
        values = {"tasks": ("toy",), "search_documents": 5, "report_documents": 0, **changes}
        config, tokenizer = OracleConfig(**values), make_tokenizer()
        return lm_eval(
            OracleSettings(config=config, tokenizer=tokenizer, task_paths=(folder,), seed=seed)
        )

    return make


@pytest.mark.parametrize("listed", [("acc",), ("acc", "acc_norm")], ids="+".join)
def test_scores_are_as_computed_by_hand(tasks, oracle, make_llama, make_tokenizer, listed):
    rows, model, tokenizer = documents(12), make_llama(), make_tokenizer()
    ours = oracle(tasks(rows=rows, metric_list=metrics(*listed)))
    task = ours.score(model, "search").tasks["toy"]
    expected = {"accuracy": [], "choice_logprob": [], "margin": [], "gold_logprob": []}
    for row in (rows[i] for i in ours.describe()["documents"]["search"]["toy"]):
        head = tokenizer(row["question"])["input_ids"]
        logs = []
        for choice in row["choices"]:
            ids = torch.tensor([head + tokenizer(choice)["input_ids"]])
            steps = model(ids).logits[0, :-1].log_softmax(-1)
            logs.append(sum(steps[i - 1, ids[0, i]].item() for i in range(len(head), ids.shape[1])))
        gold = row["gold"]
        expected["accuracy"].append(float(np.argmax(logs) == gold))
        sizes = [len(choice.encode()) for choice in row["choices"]]
        expected["gold_logprob"].append(logs[gold] / sizes[gold])
        if "acc_norm" in listed:  # choices that differ in length are compared per byte
            logs = [log / size for log, size in zip(logs, sizes, strict=True)]
        wrong = max(logs[:gold] + logs[gold + 1 :])
        expected["choice_logprob"].append(logs[gold] - float(np.log(np.sum(np.exp(logs)))))
        expected["margin"].append(logs[gold] - wrong)
    for metric, values in expected.items():
        assert task.per_document[metric] == pytest.approx(values, abs=1e-4)
        assert task.values[metric] == pytest.approx(np.mean(values), abs=1e-4)
        assert task.stderr[metric] == pytest.approx(np.std(values, ddof=1) / 5**0.5, abs=1e-4)


def test_several_right_choices_share_their_probability():
    logs, sizes = np.log([0.1, 0.2, 0.3]), np.array([1.0, 2.0, 4.0])
    assert choice_scores(logs, (0, 2), sizes) == pytest.approx(
        {
            "choice_logprob": np.log(0.4 / 0.6),
            "margin": np.log(0.3 / 0.2),
            "gold_logprob": np.log(0.3) / 4,
        }
    )
    every = choice_scores(logs, (0, 1, 2), sizes)
    assert (every["choice_logprob"], every["margin"]) == pytest.approx((0.0, 0.0))


def test_search_and_report_documents_are_disjoint_also_with_duplicates(tasks, oracle):
    rows = documents(10) * 3
    ours = oracle(tasks(rows=rows), search_documents=4)
    ids = ours.describe()["documents"]
    assert (len(ids["search"]["toy"]), len(ids["report"]["toy"])) == (4, 6)
    assert {rows[i]["id"] for kind in ids.values() for i in kind["toy"]} == set(range(10))


def test_documents_follow_the_seed_and_the_digest_follows_the_documents(tasks, oracle):
    folder = tasks(rows=documents(20))
    first = oracle(folder).describe()
    assert oracle(folder).describe() == first
    assert oracle(folder, seed=1).describe()["documents"] != first["documents"]
    tasks(rows=documents(20, seed=1))
    other = oracle(folder).describe()
    assert other["digest"] != first["digest"]


def test_tasks_that_share_questions_cut_them_alike(tasks, oracle):
    rows = documents(20)
    tasks("toy", rows)
    folder = tasks("twin", rows + documents(10, seed=1))
    ids = oracle(folder, tasks=("toy", "twin"), search_documents=6).describe()["documents"]
    searched = {json.dumps(rows[i]) for i in ids["search"]["toy"]}
    twin = rows + documents(10, seed=1)
    searched |= {json.dumps(twin[i]) for i in ids["search"]["twin"]}
    reported = {json.dumps(rows[i]) for i in ids["report"]["toy"]}
    reported |= {json.dumps(twin[i]) for i in ids["report"]["twin"]}
    assert searched.isdisjoint(reported)
    assert len(ids["report"]["toy"]) >= 8


def test_the_report_takes_what_it_asks_for_or_says_what_is_left(tasks, oracle, caplog):
    folder = tasks()

    def sizes(**changes):
        ids = oracle(folder, **changes).describe()["documents"]
        return len(ids["search"]["toy"]), len(ids["report"]["toy"])

    assert sizes(search_documents=5, report_documents=3) == (5, 3)
    assert sizes(search_documents=11, report_documents=0) == (11, 1)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert sizes(search_documents=5, report_documents=100) == (5, 7)
    assert "toy has 7 documents left for the report, not 100" in caplog.text


GENERATES = {"output_type": "generate_until", "doc_to_choice": None, "metric_list": None}


@pytest.mark.parametrize(
    ("task", "config", "error", "message"),
    [
        ({}, {"target": "tay"}, ConfigError, r"target names 'tay', .* Did you mean 'toy'"),
        ({}, {"weights": {"tay": 1.0}}, ConfigError, r"weights names 'tay', .* Tasks: toy"),
        ({}, {"weights": {"toy": 0.0}}, ConfigError, "weights of the search tasks are all 0"),
        # lm-eval's own thousands of names are indexed for this message: some seconds.
        ({}, {"tasks": ("toyy",)}, ConfigError, "Unknown lm-eval task 'toyy'.* mean 'toy'"),
        (GENERATES, {}, OracleError, "'toy' is of type 'generate_until'; .* multiple_choice"),
        (
            {"metric_list": [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}]},
            {},
            OracleError,
            "'toy' reports f1, but neither acc nor acc_norm",
        ),
        ({"data": "none.jsonl"}, {}, OracleError, r"task 'toy' cannot be loaded: .*none\.jsonl"),
        ({}, {"search_documents": 12}, ConfigError, "'toy' has 12 distinct documents; 12 for the"),
    ],
)
def test_what_cannot_guide_a_search_is_refused(tasks, oracle, task, config, error, message):
    with pytest.raises(error, match=message):
        oracle(tasks(**task), **config)


def test_relative_data_files_are_found_from_the_task_folder(tasks, oracle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    for data in ("toy.jsonl", "tasks/toy.jsonl"):
        folder = tasks(data=data)
        assert oracle(folder).describe() == oracle(folder.relative_to(tmp_path.parent)).describe()


def test_a_task_that_filters_all_documents_away_is_an_oracle_error(tasks, oracle):
    folder = tasks()
    (folder / "filters.py").write_text("def none(docs):\n    return docs.select([])\n")
    yaml_file = folder / "toy.yaml"
    yaml_file.write_text(yaml_file.read_text() + "process_docs: !function filters.none\n")
    with pytest.raises(OracleError, match="'toy' has no documents"):
        oracle(folder)


def with_search_task(tasks, rows, own):
    tasks("toy", rows)
    return tasks("toy_search", own)


def test_a_task_may_bring_search_documents_of_its_own(tasks, oracle, make_llama):
    rows, own = documents(12), documents(30, seed=1)
    ours = oracle(with_search_task(tasks, rows, own), search_documents=20, target="toy")
    ids = ours.describe()["documents"]
    assert ids["report"] == {"toy": list(range(12))}  # all of it, as lm-eval scores it
    assert len(ids["search"]["toy"]) == 20
    score = ours.score(make_llama(), "search").tasks["toy"]
    assert score.documents == 20
    assert set(score.keys).isdisjoint(ours.score(make_llama(), "report").tasks["toy"].keys)


def test_the_own_documents_of_a_task_are_cut_if_the_run_file_says_so(tasks, oracle):
    folder = with_search_task(tasks, documents(12), documents(30, seed=1))
    ids = oracle(folder, search_tasks=("toy",)).describe()["documents"]
    assert sorted(ids["search"]["toy"] + ids["report"]["toy"]) == list(range(12))


def test_a_search_task_may_be_another_one_than_those_of_the_report(tasks, oracle):
    tasks("other", documents(30, seed=1))
    ours = oracle(tasks(), search_tasks=("other",), weights={"other": 2.0}, target="other")
    ids = ours.describe()["documents"]
    assert (list(ids["search"]), list(ids["report"])) == (["other"], ["toy"])
    assert (ours.weights("search"), ours.weights("report")) == ({"other": 2.0}, {"toy": 1.0})


def test_documents_on_both_sides_are_counted_and_refused(tasks, oracle):
    rows, own = documents(12), documents(30, seed=1)
    folder = with_search_task(tasks, rows, [{**row, "id": 99} for row in rows[:3]] + own)
    with pytest.raises(OracleError, match="3 of the search documents of 'toy' are report docu"):
        oracle(folder, search_documents=100)
    kept = oracle(folder, search_documents=100, overlap="drop").describe()["documents"]["search"]
    assert kept["toy"] == list(range(3, 33))


def test_a_search_task_of_report_documents_alone_is_refused(tasks, oracle):
    folder = with_search_task(tasks, documents(12), documents(12))
    with pytest.raises(OracleError, match="No search document of 'toy' is left: all 12"):
        oracle(folder, overlap="drop")


def test_keys_name_documents_by_what_they_ask(tasks, oracle, make_llama):
    rows, model = documents(12), make_llama()
    first = oracle(tasks(rows=rows), search_documents=2, report_documents=0)
    other = oracle(tasks(rows=rows[::-1]), search_documents=2, report_documents=0)
    one, two = (o.score(model, "report").tasks["toy"] for o in (first, other))
    assert len(set(one.keys)) == 10
    by_key = dict(zip(two.keys, two.per_document["choice_logprob"], strict=True))
    assert [by_key[key] for key in one.keys] == pytest.approx(
        one.per_document["choice_logprob"], abs=1e-5
    )


def test_an_answer_that_is_no_choice_is_an_oracle_error(tasks, oracle):
    rows = [{**row, "gold": 3 if row["id"] else 0} for row in documents(6)]
    # lm-eval looks at the first document only; we look at all before any fine-tune.
    with pytest.raises(OracleError, match="The answer 3 of a document of 'toy' is not among its"):
        oracle(tasks(rows=rows))


def test_a_model_without_probabilities_is_an_oracle_error(tasks, oracle, make_llama):
    model = make_llama()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(
        OracleError, match=r"Scores of toy are not finite.*Lower \[recovery\] learning_rate"
    ):
        oracle(tasks()).score(model, "search")


def test_mutual_information_leaves_the_scores_as_they_are(tasks, oracle, make_llama):
    model, plain = make_llama(), oracle(tasks()).score(make_llama(), "search").tasks["toy"]
    folder = tasks(metric_list=metrics("acc", "acc_norm", "acc_mutual_info"))
    both = oracle(folder).score(model, "search").tasks["toy"]
    for metric, values in plain.per_document.items():
        assert both.per_document[metric] == pytest.approx(values, abs=1e-4)


def test_random_few_shot_examples_are_those_of_stock_lm_eval(
    tasks, oracle, make_llama, make_tokenizer
):
    folder = tasks(rows=documents(30), num_fewshot=2, fewshot_split="test")
    model, settings = make_llama(), {"search_documents": 1, "report_documents": 0}
    ours = oracle(folder, **settings)
    again = oracle(folder, **settings)
    assert again.describe() == ours.describe()
    theirs = stock.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=make_tokenizer()),
        tasks=["toy"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        samples=ours.describe()["documents"]["report"],
        bootstrap_iters=1,
    )
    expected = [sample["acc"] for sample in theirs["samples"]["toy"]]
    found = ours.score(model, "report").tasks["toy"]
    assert found.per_document["accuracy"] == expected
    assert again.score(model, "report").tasks["toy"] == found


def test_other_examples_are_another_oracle(tasks, oracle):
    shots = [{"sampler": "first_n", "samples": documents(4, seed=s)} for s in (1, 2)]
    first, second = (
        oracle(tasks(num_fewshot=1, fewshot_config=config)).describe() for config in shots
    )
    assert first["documents"] == second["documents"]
    assert first["digest"] != second["digest"]


def test_a_choice_beyond_the_window_is_named(tasks, oracle, make_llama):
    rows = documents(12)
    rows[3]["choices"][1] = " ".join(["w1"] * 70)
    ours = oracle(tasks(rows=rows), report_documents=0)
    purpose = next(p for p, ids in ours.describe()["documents"].items() if 3 in ids["toy"])
    with pytest.raises(OracleError, match=r"'w1 w1.* of a document of 'toy' has 70 tokens"):
        ours.score(make_llama(), purpose)


@pytest.mark.parametrize("change", [{"choices": ["", "w1", "w2"]}, {"gold": 7}])
def test_a_first_document_that_lm_eval_cannot_take_is_named(tasks, oracle, change):
    rows = documents(12)
    rows[0] |= change
    with pytest.raises(OracleError, match="'toy' has a first document with an empty choice, or an"):
        oracle(tasks(rows=rows))


def test_a_torn_data_file_is_named_by_its_cause(tasks, oracle, capfd):
    folder = tasks()
    (folder / "toy.jsonl").write_text('{"question": "w1"\n{', encoding="utf-8")
    with pytest.raises(OracleError, match="task 'toy' cannot be loaded: JSON parse error"):
        oracle(folder)


def test_an_adapter_counts_only_while_it_is_on(tasks, oracle, make_llama):
    ours, base = oracle(tasks()), make_llama()
    before = ours.score(base, "search")
    model = attach(base, RankAllocation((4, 2)), seed=0).train()
    for parameter in trainable_parameters(model):
        parameter.data.fill_(0.1)
    after = ours.score(model, "search")
    assert not model.training
    assert (
        after.tasks["toy"].values["choice_logprob"] != before.tasks["toy"].values["choice_logprob"]
    )
    with model.disable_adapter():
        assert ours.score(model, "search") == before
    assert ours.score(model, "search") == after
