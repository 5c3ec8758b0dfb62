"""Trains the embedded model: a Llama of eight narrow layers that knows one `World`.

The idea: the embedded default has to behave like the real thing in miniature.  The model is
accurate on questions it never met, pruning half of every layer breaks it, and a short LoRA
fine-tune on other questions repairs a part.  It is trained from scratch in minutes on one core,
from a seed, so nothing has to be downloaded and everything can be built again:

    python -m tiny.tinymodel DIR --seed 0

writes ``DIR/embedded`` (model, recovery corpus and a card with the accuracies reached) and
``DIR/data`` (the documents of the seven tasks).
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankadaptor_plugin.tasks import task_dir
from tiny import tinyworld

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tiny.tinyworld import Question, World

logger = logging.getLogger(__name__)

SHARES = {
    "tiny_boolq": 0.34,
    "tiny_piqa": 0.08,
    "tiny_hellaswag": 0.16,
    "tiny_winogrande": 0.06,
    "tiny_arc_easy": 0.16,
    "tiny_arc_challenge": 0.08,
    "tiny_openbookqa": 0.08,
}
"""Frequency of each task in pretraining; yes or no teaches least and is needed most often."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of the pre-training.

    Attributes:
        steps: Optimizer steps.
        batch_size: Documents per step.
        documents: Size of the pool that batches are drawn from.
        learning_rate: Peak of AdamW's, after `warmup` steps; linear to 0 over the second half.
        warmup: Steps of linear warm-up.
        prompt_weight: Loss weight of prompt tokens, which are mostly drawn at random; answers
            weigh 1.
        skipped: Probability with which a step leaves out layer 0, layer 1 and so on; layers
            beyond the list are always used.  Otherwise layer 0 would carry the model nearly
            alone, and its rank alone would matter in a recovery.
        complete_steps: Share of the steps, at the end, that use all layers.
    """

    steps: int = 8000
    batch_size: int = 64
    documents: int = 80_000
    learning_rate: float = 3e-3
    warmup: int = 100
    prompt_weight: float = 0.1
    skipped: tuple[float, ...] = (0.15, 0.08)
    complete_steps: float = 0.1


def new_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Returns the tokenizer: one token per word, nothing added in front or behind.

    Without an automatic ``<bos>``, a document is the same tokens in pre-training, recovery and
    lm-eval, and the tokens of a prompt are those that its continuation begins with.
    """
    pad, bos, eos, unknown = tinyworld.SPECIAL
    ids = {word: index for index, word in enumerate(world.vocabulary)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Returns an untrained model; the global random state is left as it was found."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=24,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.08,  # at the usual 0.02, so narrow a model does not start to learn
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Question],
    training: Training,
    seed: int,
) -> None:
    """Trains a model in place.

    Args:
        model: The model of `new_model`.
        tokenizer: Its tokenizer.
        documents: What batches are drawn from, with repetition.
        training: Settings.
        seed: Seed of batches and of left-out layers.
    """
    tokens, weights = _tensors(tokenizer, documents, training.prompt_weight)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    layers = list(model.model.layers)
    skipped = torch.zeros(len(layers))
    skipped[: len(training.skipped)] = torch.tensor(training.skipped)
    model.train()
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _rate(step, training)
        kept = torch.rand(len(layers), generator=generator) >= skipped
        if step >= training.steps * (1 - training.complete_steps):
            kept[:] = True
        model.model.layers = torch.nn.ModuleList(
            layer for layer, keep in zip(layers, kept.tolist(), strict=True) if keep
        )
        drawn = torch.randint(len(tokens), (training.batch_size,), generator=generator)
        loss = _loss(model, tokens[drawn], weights[drawn])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 500 == 0:
            logger.info("step %d of %d: loss %.3f", step + 1, training.steps, loss.item())
    model.model.layers = torch.nn.ModuleList(layers)
    model.eval()


def _tensors(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Question], prompt_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids and loss weights, both of shape (documents, longest)."""
    tokens = tokenizer(
        [f"{d.prompt} {d.answer} {tokenizer.eos_token}" for d in documents],
        padding=True,
        return_tensors="pt",
    )["input_ids"]
    lengths = torch.tensor([len(d.prompt.split()) for d in documents])
    in_prompt = torch.arange(tokens.shape[1]) < lengths[:, None]
    weights = torch.where(in_prompt, prompt_weight, 1.0)
    return tokens, weights * (tokens != tokenizer.pad_token_id)


def _loss(model: LlamaForCausalLM, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    used = int((weights > 0).sum(1).max())
    tokens, weights = tokens[:, :used], weights[:, 1:used]
    logits = model(input_ids=tokens[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights.flatten()).sum() / weights.sum()


def _rate(step: int, training: Training) -> float:
    left = (training.steps - step) / training.steps
    return min(1.0, (step + 1) / training.warmup) * min(1.0, 2 * left)


def accuracies(folder: Path, data: Path) -> dict[str, dict[str, float]]:
    """Lets lm-eval judge a model on the seven tasks.

    Args:
        folder: Model folder.
        data: Folder with the tasks' documents.

    Returns:
        Per task the metrics ``acc`` and, where the task has it, ``acc_norm``.
    """
    # Imported here: lm-eval takes seconds to import, and training does not need it.
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=[str(task_dir() / "tiny")],
        include_defaults=False,
        metadata={"data": str(data)},
    )
    model = HFLM(pretrained=str(folder), device="cpu", batch_size=64)
    results = evaluate(model, manager.load(list(tinyworld.TASKS)), bootstrap_iters=0)["results"]
    return {
        task: {
            name.removesuffix(",none"): round(value, 4)
            for name, value in results[task].items()
            if name in ("acc,none", "acc_norm,none")
        }
        for task in tinyworld.TASKS
    }


def build(folder: Path, seed: int, training: Training | None = None) -> dict[str, Any]:
    """Makes everything that the package embeds, and returns its card.

    Args:
        folder: Receives ``embedded`` and ``data``.
        seed: Seed of world, initial weights and training.
        training: Settings, if not the default.
    """
    training = training or Training()
    world = tinyworld.World(seed)
    embedded, data = folder / "embedded", folder / "data"
    for task in tinyworld.TASKS:
        write_rows(data / f"{task}.jsonl", tinyworld.task_documents(world, task))
    write_rows(embedded / "recovery.jsonl", tinyworld.recovery_rows(world))
    tokenizer = new_tokenizer(world)
    model = new_model(tokenizer, seed)
    documents = tinyworld.pretraining_documents(world, training.documents, SHARES)
    began = time.process_time()
    pretrain(model, tokenizer, documents, training, seed)
    seconds = time.process_time() - began
    model.save_pretrained(embedded / "model")
    tokenizer.save_pretrained(embedded / "model")
    card = {
        "command": f"python -m tiny.tinymodel DIR --seed {seed}",
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training": asdict(training),
        "training_cpu_seconds": round(seconds),
        "accuracy": accuracies(embedded / "model", data),
        "tolerance": 0.01,
    }
    (embedded / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=0, show_default=True, help="Seed of everything.")
def main(folder: Path, seed: int) -> None:
    """Builds the embedded model, its corpus and its tasks in FOLDER."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # matrices this small gain nothing from a second core
    card = build(folder, seed)
    for task, reached in card["accuracy"].items():
        click.echo(f"{task:20} " + "  ".join(f"{name} {v:.3f}" for name, v in reached.items()))


if __name__ == "__main__":
    main()
