from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import tinymodel, tinyworld
from tiny.tinyworld import TASKS, World
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankadaptor_plugin
from rankadaptor_plugin.tasks import task_dir

EMBEDDED = Path(rankadaptor_plugin.__file__).parent / "embedded"
DATA = task_dir() / "tiny" / "data"


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small gain nothing from more, and waiting for a busy core costs minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def card() -> dict[str, object]:
    return json.loads((EMBEDDED / "card.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def world(card) -> World:
    return World(card["seed"])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED / "model")


def names(prompt: str) -> set[str]:
    """The "given family" pairs in a prompt."""
    return {
        f"{a} {b}"
        for a, b in pairwise(prompt.split())
        if a in tinyworld.GIVEN and b in tinyworld.FAMILY
    }


def test_shipped_files_are_what_the_seed_gives(world):
    assert read(EMBEDDED / "recovery.jsonl") == tinyworld.recovery_rows(world)
    for task in TASKS:
        assert read(DATA / f"{task}.jsonl") == tinyworld.task_documents(world, task)
    files = [*DATA.iterdir(), EMBEDDED / "recovery.jsonl"]
    assert sum(file.stat().st_size for file in files) < 1_500_000


def test_the_same_seed_gives_the_same_documents_and_another_seed_others():
    first, again, other = World(5), World(5), World(6)
    for make in (
        tinyworld.recovery_rows,
        lambda w: tinyworld.pretraining_documents(w, 100, tinymodel.SHARES),
        lambda w: tinyworld.task_documents(w, "tiny_hellaswag"),
    ):
        assert make(first) == make(again)
        assert make(first) != make(other)


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_documents_are_distinct_and_balanced(world, task):
    documents = tinyworld.task_documents(world, task)
    assert len(documents) == 320
    assert len({d["context"] for d in documents}) == 320
    size = tinyworld.CHOICES[task]
    assert all(len(set(d["choices"])) == size for d in documents)
    assert set(Counter(d["gold"] for d in documents).values()) == {320 // size}
    if task == "tiny_boolq":
        answers = Counter(d["choices"][d["gold"]] for d in documents)
        assert answers == {"yes": 160, "no": 160}


def test_training_documents_never_touch_the_evaluation_part(world):
    """Whatever training sees, in all its forms: the pools that every document is drawn from."""
    seen = [q.prompt for task in TASKS for q in world.questions(task, "train")]
    seen += [q.prompt for q in world.statements()]
    drawn = tinyworld.pretraining_documents(world, 20_000, tinymodel.SHARES)
    rows = tinyworld.recovery_rows(world)
    assert {d.prompt for d in drawn} <= set(seen)
    assert {row["instruction"] for row in rows} <= set(seen)
    assert len({row["instruction"] for row in rows}) == len(rows) == 4000

    asked = {t: [d["context"] for d in tinyworld.task_documents(world, t)] for t in TASKS}
    assert not set(seen) & {prompt for prompts in asked.values() for prompt in prompts}
    # Facts: a name, a goal, two people, or two neighboring events.
    evaluated = set().union(*(names(p) for p in asked["tiny_arc_easy"] + asked["tiny_boolq"]))
    assert evaluated
    assert not evaluated & set().union(*(names(prompt) for prompt in seen))
    for task, width in (("tiny_winogrande", (0, 2)), ("tiny_piqa", (1, 3))):
        seen_pairs = {
            frozenset(q.prompt.split()[i] for i in width) for q in world.questions(task, "train")
        }
        assert not seen_pairs & {frozenset(p.split()[i] for i in width) for p in asked[task]}


def test_no_event_follows_the_same_two_events_in_both_parts(world):
    parts = {
        part: [
            (*pair, script[place + 2])
            for script in world.scripts[part]
            for place, pair in enumerate(list(pairwise(script))[:-1])
        ]
        for part in ("train", "eval")
    }
    assert not set(parts["train"]) & set(parts["eval"])
    assert len(parts["eval"]) == len(set(parts["eval"]))
    told = [
        p.split(" then ")[-2:]
        for p in (
            d["context"].removeprefix("first ").removesuffix(" then")
            for d in tinyworld.task_documents(world, "tiny_hellaswag")
        )
    ]
    assert len({tuple(pair) for pair in told}) == len(told)


def test_weights_and_vocabulary_are_small(card, tokenizer, world):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "model")
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == card["parameters"]
    assert 100_000 <= parameters <= 300_000
    assert (EMBEDDED / "model" / "model.safetensors").stat().st_size < 2_000_000
    assert {f.suffix for f in (EMBEDDED / "model").iterdir()} == {".json", ".safetensors"}
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == world.vocabulary
    assert len(tokenizer) <= 500


def test_every_word_of_the_documents_is_known(tokenizer, world):
    texts = [f"{r['instruction']} {r['output']}" for r in tinyworld.recovery_rows(world)]
    for task in TASKS:
        for document in tinyworld.task_documents(world, task):
            texts += [f"{document['context']} {choice}" for choice in document["choices"]]
    encoded = tokenizer(texts)["input_ids"]
    assert [len(ids) for ids in encoded] == [len(text.split()) for text in texts]
    assert max(map(len, encoded)) < 32
    assert tokenizer.unk_token_id not in set().union(*encoded)


def test_training_is_reproducible_and_leaves_the_global_state_alone(world):
    training = tinymodel.Training(steps=3, documents=50, batch_size=4, warmup=1)
    documents = tinyworld.pretraining_documents(world, 50, tinymodel.SHARES)
    tokenizer = tinymodel.new_tokenizer(world)
    state = torch.random.get_rng_state()
    weights = []
    for seed in (0, 0, 1):
        model = tinymodel.new_model(tokenizer, seed)
        tinymodel.pretrain(model, tokenizer, documents, training, seed)
        assert len(model.model.layers) == 8
        weights.append(model.model.embed_tokens.weight.detach())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.filterwarnings("default")  # lm-eval's imports warn
def test_shipped_model_reaches_the_accuracies_of_its_card(card, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the packaged data are found from anywhere
    reached = tinymodel.accuracies(EMBEDDED / "model", DATA)
    assert set(reached) == set(TASKS)
    for task, metrics in card["accuracy"].items():
        assert reached[task] == pytest.approx(metrics, abs=card["tolerance"])
        assert metrics["acc"] >= 0.85


@pytest.mark.filterwarnings("default")
def test_lm_eval_splits_prompt_and_choice_cleanly(tokenizer):
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(EMBEDDED / "model"), device="cpu")
    context, choice = model._encode_pair("first wash cups then", " pour tea")
    assert tokenizer.convert_ids_to_tokens(context) == ["first", "wash", "cups", "then"]
    assert tokenizer.convert_ids_to_tokens(choice) == ["pour", "tea"]
