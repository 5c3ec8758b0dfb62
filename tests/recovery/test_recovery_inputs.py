"""What a fine-tune cannot be made of is said in one line, and nothing half done is left behind."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.config.recipes import recipe
from rankadaptor_plugin.config.tables import RecoveryConfig
from rankadaptor_plugin.core.errors import (
    ArtifactError,
    ConfigError,
    CorpusError,
    RankSpaceError,
    RecoveryError,
)
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.corpus.sequences import IGNORED, Corpus, TeacherTokens, TrainingSequence
from rankadaptor_plugin.lm_eval_model import RankAdaptorLM
from rankadaptor_plugin.pipeline.context import Recovered
from rankadaptor_plugin.recovery.fine_tune import recover
from rankadaptor_plugin.recovery.teacher import LiveTeacher

CONFIG = RecoveryConfig(
    max_steps=4,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=0.02,
    warmup_steps=1,
)
ALLOCATION = RankAllocation((4, 2))
ROWS = [{"instruction": f"w{i} w{i + 1}", "output": f"w{i + 2}"} for i in range(8)]


def sequence(length, masked, seed=0):
    generator = torch.Generator().manual_seed(seed + 100 * length)
    tokens = torch.randint(3, 40, (length,), generator=generator)
    return TrainingSequence(tokens, torch.where(torch.arange(length) < masked, IGNORED, tokens))


@pytest.fixture(scope="module")
def corpus():
    sequences = [sequence(length, length // 2) for length in (3, 5, 6, 8, 4, 7, 9)]
    return Corpus(sequences=sequences, dropped=0)


def assert_one_line(caught, *fragments):
    text = str(caught.value)
    assert "\n" not in text
    for fragment in fragments:
        assert fragment in text, text


@pytest.fixture
def refused(make_llama, corpus):
    """Tells that a fine-tune is refused in one line, and that the model is as before."""

    def check(kind, *fragments, model=None, allocation=ALLOCATION, data=None, **arguments):
        base = model or make_llama()
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        rows = corpus if data is None else data
        random = torch.get_rng_state()
        given = {"tokenizer": None, "recipe": CONFIG, **arguments}
        with pytest.raises(kind) as caught:
            recover(base, given.pop("tokenizer"), allocation, rows, **given)
        assert type(caught.value) is kind
        assert_one_line(caught, *fragments)
        after = base.state_dict()
        assert after.keys() == before.keys()
        assert all(after[name].equal(before[name]) for name in before)
        assert torch.get_rng_state().equal(random)
        assert all(parameter.grad is None for parameter in base.parameters())

    return check


# ---------------------------------------------------------------------------- ranks and matrices


REFUSED = {
    "a plain list for another depth": (
        {"allocation": [4, 2, 2]},
        *(RankSpaceError, "3 ranks for 2 layers"),
    ),
    "a pattern longer than the model": (
        {"method": "pattern:1-2-3"},
        *(RankSpaceError, "The pattern 1-2-3 has 3 ranks for 2 layers"),
    ),
    "several methods": (
        {"recipe": recipe("quick", methods=["adalora", "eva"])},
        *(ConfigError, "names the methods adalora, eva", "Name one, or give recover() a method"),
    ),
    "an empty corpus": (
        {"data": Corpus(sequences=[], dropped=0)},
        *(CorpusError, "has no training sequences", "Give at least one row"),
    ),
    "distillation without a teacher": (
        {"method": "distill"},
        *(ConfigError, "The method distills", "no predictions of a teacher"),
    ),
    "a method that starts from compensated weights": (
        {"method": "compensate"},
        *(ConfigError, "The method compensate trains a compensated model", "Compensate it first"),
    ),
    "a budget above the trained rank": (
        {"method": "squeeze:1"},
        *(ConfigError, "squeeze:1 trains", "fewer than the budget of", "Name a greater rank"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_line(refused, case):
    arguments, kind, *fragments = REFUSED[case]
    refused(kind, *fragments, **arguments)


# ---------------------------------------------------------------------------------- what is read


def test_tokens_of_another_vocabulary_are_refused_by_their_sequence(refused):
    strange = TrainingSequence(torch.tensor([3, 40, 5]), torch.tensor([3, 40, 5]))
    refused(
        *(CorpusError, "sequence 2 of 2 has token 40", "below 40", "tokenizer of the model"),
        data=Corpus(sequences=[sequence(4, 0), strange], dropped=0),
    )


def test_gradients_are_switched_on_and_inference_mode_is_refused(make_llama, corpus):
    def run():
        return recover(make_llama(), None, [2, 2], corpus, CONFIG, 0).losses

    expected = run()
    with torch.no_grad():
        assert run() == expected
    with torch.inference_mode(), pytest.raises(RecoveryError) as caught:
        run()
    assert_one_line(caught, "inference_mode() does not allow", "outside")


def test_rows_that_are_all_longer_than_allowed_are_refused(refused, make_tokenizer):
    small = recipe("quick", template="plain", max_length=2, max_steps=2)
    refused(
        *(CorpusError, "gives no training sequence (8 rows, 8 longer than 2 tokens", "max_length"),
        data=ROWS,
        tokenizer=make_tokenizer(),
        recipe=small,
    )


def test_a_tokenizer_without_padding_is_enough(make_llama, make_tokenizer):
    plain = recipe("quick", template="plain", max_steps=2)
    bare = make_tokenizer()
    bare.pad_token = None
    assert bare.pad_token_id is None
    one, other = (
        recover(make_llama(), tokenizer, ALLOCATION, ROWS, plain)
        for tokenizer in (bare, make_tokenizer())
    )
    assert one.losses == other.losses


# -------------------------------------------------------------------------- settings and methods


def test_methods_that_divide_by_the_scaling_are_refused_before_a_run_without_one(
    tmp_path, write_run_file, command
):
    table = {"alpha_over_rank": 0.0, "max_steps": 1, "methods": ["rankadaptor", "adalora"]}
    file = write_run_file(
        tmp_path / "r.toml",
        recovery=table,
        corpus={"max_train_samples": 32},
        prune={"importance": "magnitude"},
        search={"n_trials": 3},
    )
    assert_error(command("run", file), 2, "divides by LoRA's scaling, which is 0", "above 0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_quantized_weights_are_refused_on_a_cpu(tmp_path, write_run_file, command, quantize):
    file = write_run_file(tmp_path / "r.toml", quantize=quantize, device="cpu")
    assert_error(command("run", file), 2, f'quantize is "{quantize}"', "needs a CUDA GPU", "cpu")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------- distillation


def test_a_teacher_of_another_vocabulary_is_refused(refused, make_llama):
    teacher = LiveTeacher(make_llama(vocab_size=41))
    refused(
        *(ConfigError, "a vocabulary of 41 tokens", "one of 40", "leave distill out"),
        method="distill",
        teacher=teacher,
    )


def test_kept_predictions_of_another_vocabulary_are_refused(refused, corpus):
    taught = [
        dataclasses.replace(
            one,
            teacher=TeacherTokens(
                torch.full((count, 1), 40, dtype=torch.int32),
                torch.full((count, 1), -0.1),
                torch.full((count,), -2.3),
            ),
        )
        for one in corpus.sequences
        for count in [int((one.labels[1:] != IGNORED).sum())]
    ]
    refused(
        *(ConfigError, "vocabulary"),
        data=Corpus(sequences=taught, dropped=0),
        method="distill",
    )


# ------------------------------------------------------------------------- adapters of another base


def with_another_base(run, tmp_path):
    """Copies a run; other weights of the same shape lie in its pruned folder."""
    folder = tmp_path / "out"
    shutil.copytree(run, folder)
    weights = folder / "pruned" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = tensors[name] + 1
    save_file(tensors, weights, {"format": "pt"})
    return folder


def test_an_adapter_of_another_base_is_not_exported(finished, tmp_path, command):
    folder = with_another_base(finished.folder, tmp_path)
    result = command("export", folder, "--format", "merged")
    assert_error(result, 1, "was trained on another base model")
    assert not list(folder.glob("*export*"))
    assert not list(folder.glob(".*partial"))


class Foreign:
    """A recovery stage that hands back an adapter of another model."""

    def __init__(self, adapter):
        self.adapter = adapter

    @hookimpl
    def rankadaptor_post_prune(self, pruned, context):
        return Recovered(adapter=self.adapter, allocation=RankAllocation((8,) * 8))


def test_an_adapter_of_another_base_is_not_scored(finished, tmp_path, write_run_file, command):
    file = write_run_file(tmp_path / "r.toml", prune={"importance": "magnitude"})
    result = command("run", file, plugin=Foreign(finished.folder / "adapter"))
    assert_error(result, 1, "was trained on another base model")
    assert not (tmp_path / "out" / "report.json").exists()


def test_an_adapter_of_another_base_is_not_evaluated_in_lm_eval(finished, tmp_path):
    folder = with_another_base(finished.folder, tmp_path)
    with pytest.raises(ArtifactError) as caught:
        RankAdaptorLM(str(folder), device="cpu")
    assert_one_line(caught, "was trained on another base model")


# --------------------------------------------------------------------------------- the command line


def assert_error(result, code, *fragments):
    assert result.exit_code == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for fragment in fragments:
        assert fragment in lines[0], lines[0]


# ------------------------------------------------------------------------- the method of a recipe


def test_a_recipe_that_names_one_method_is_trained_by_it(make_llama, corpus):
    changes = {"max_steps": 2, "methods": ["lora-fa"]}
    found = recover(make_llama(), None, ALLOCATION, corpus, recipe("quick", **changes))
    assert found.method == "lora-fa"
