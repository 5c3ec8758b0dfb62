"""The teacher's predictions: what they are, and their file."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankadaptor_plugin.corpus.sequences import IGNORED, Corpus, TrainingSequence
from rankadaptor_plugin.recovery import teacher as teacher_module
from rankadaptor_plugin.recovery.batches import (
    LEAST,
    padded,
    pass_loss,
    token_loss,
    trained_tokens,
)
from rankadaptor_plugin.recovery.teacher import LiveTeacher, with_teacher

SIZE = 40  # tokens of the vocabulary


def sequence(length, masked):
    tokens = torch.randint(SIZE, (length,), generator=torch.Generator().manual_seed(length))
    return TrainingSequence(tokens, torch.where(torch.arange(length) < masked, IGNORED, tokens))


CORPUS = Corpus(
    sequences=[sequence(7, 2), sequence(12, 0), sequence(3, 0), sequence(9, 8)],
    dropped=5,
    validation=[sequence(6, 0)],
)


class Loads:
    """Loads the teacher, and counts how often."""

    def __init__(self, model):
        self.model, self.count = model, 0

    def __call__(self):
        self.count += 1
        return self.model.train()


@pytest.fixture
def loads(make_llama):
    return Loads(make_llama(seed=1))


def taught(loads, cache=None, corpus=CORPUS, **changes):
    options = {"fingerprint": "a", "top_k": 4, "temperature": 2.0, **changes}
    return with_teacher(corpus, loads, cache=cache, **options)


def tensors(corpus):
    return [
        t
        for s in corpus.sequences
        for t in (s.teacher.indices, s.teacher.log_probabilities, s.teacher.rest)
    ]


def same(one, other):
    return all(map(torch.equal, tensors(one), tensors(other)))


def test_predictions_are_the_likeliest_tokens_at_the_temperature(loads):
    found = taught(loads)
    for before, after in zip(CORPUS.sequences, found.sequences, strict=True):
        logits = loads.model(input_ids=before.tokens[None]).logits[0, :-1]
        scores = torch.log_softmax(logits / 2.0, dim=-1)[before.labels[1:] != IGNORED]
        best, indices = scores.topk(4)
        assert torch.equal(after.teacher.indices, indices.int())
        torch.testing.assert_close(
            after.teacher.log_probabilities.float(), best, rtol=2**-11, atol=1e-6
        )
        rest = (1 - best.double().exp().sum(1)).log().float()
        torch.testing.assert_close(after.teacher.rest, rest, rtol=1e-4, atol=1e-4)


def test_the_rest_of_the_corpus_stays_as_it_is(loads):
    found = taught(loads)
    assert found.validation is CORPUS.validation
    assert found.dropped == 5
    for before, after in zip(CORPUS.sequences, found.sequences, strict=True):
        assert after.tokens is before.tokens
        assert after.labels is before.labels
    assert all(s.teacher is None for s in CORPUS.sequences)


def test_small_passes_give_the_same(loads, monkeypatch):
    whole = taught(loads)
    monkeypatch.setattr(teacher_module, "_ROWS", 2)
    for tokens in (1, 13, 24):
        small = taught(loads, batch_tokens=tokens)
        for one, other in zip(tensors(whole), tensors(small), strict=True):
            torch.testing.assert_close(one, other, rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize("top_k", [SIZE, 500])
def test_with_all_tokens_kept_the_loss_is_that_of_a_live_teacher(loads, make_llama, top_k):
    found, student = taught(loads, top_k=top_k), make_llama(seed=2)
    assert tensors(found)[0].shape == (5, SIZE)
    given = padded(found.sequences)
    options = {"weight": 1.0, "temperature": 2.0}
    live = pass_loss(student, given, teacher=LiveTeacher(loads.model), **options)
    kept = pass_loss(student, given, **options)
    kept.backward()
    assert kept.item() == pytest.approx(live.item(), rel=1e-3)
    assert all(torch.isfinite(p.grad).all() for p in student.model.parameters())


def test_a_teacher_that_is_sure_gives_finite_predictions(loads):
    with torch.no_grad():
        loads.model.lm_head.weight.mul_(1e4)
    found = taught(loads, temperature=0.1)
    assert all(t.isfinite().all() for t in tensors(found))
    assert min(t.min() for t in tensors(found)[1::3]) == torch.tensor(LEAST).half()


def test_no_kept_tokens_are_refused(loads):
    with pytest.raises(ValueError, match="keep at least 1"):
        taught(loads, top_k=0)


# ------------------------------------------------------------------------------------------- file


def test_a_second_call_reads_the_file_and_loads_no_model(loads, tmp_path):
    first = taught(loads, tmp_path)
    second = taught(loads, tmp_path)
    assert loads.count == 1
    assert same(first, second)
    assert same(first, taught(loads))


def test_a_trained_token_takes_the_bytes_that_are_promised(loads, tmp_path):
    corpus = Corpus(sequences=CORPUS.sequences * 100, dropped=0)
    count = trained_tokens(corpus.sequences)
    taught(loads, tmp_path, corpus=corpus)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == pytest.approx(count * (6 * 4 + 4), rel=0.05)


@pytest.mark.parametrize("changes", [{"fingerprint": "b"}, {"top_k": 5}, {"temperature": 1.0}])
def test_another_teacher_or_setting_has_another_file(loads, tmp_path, changes):
    taught(loads, tmp_path)
    taught(loads, tmp_path, **changes)
    assert loads.count == len(list(tmp_path.iterdir())) == 2


def test_another_token_or_mask_has_another_file(loads, tmp_path):
    taught(loads, tmp_path)
    first, *others = CORPUS.sequences
    tokens, labels = first.tokens.clone(), first.labels.clone()
    tokens[0] += 1
    labels[2] = IGNORED
    for changed in (
        TrainingSequence(tokens, first.labels),
        TrainingSequence(first.tokens, labels),
    ):
        taught(loads, tmp_path, corpus=Corpus(sequences=[changed, *others], dropped=0))
    assert loads.count == len(list(tmp_path.iterdir())) == 3


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


def drop_the_checksum(file):
    save_file(load_file(file), file)


@pytest.mark.parametrize("harm", [cut_in_half, flip_a_bit, empty, drop_the_checksum])
def test_a_torn_file_is_made_anew(loads, tmp_path, caplog, harm):
    first = taught(loads, tmp_path)
    expected = [t.clone() for t in tensors(first)]
    (file,) = tmp_path.iterdir()
    del first  # it is mapped
    harm(file)
    with caplog.at_level(logging.WARNING):
        second = taught(loads, tmp_path)
    assert "are corrupt" in caplog.text
    assert all(map(torch.equal, expected, tensors(second)))
    assert same(second, taught(loads, tmp_path))
    assert loads.count == 2


def test_a_full_disk_is_a_warning_and_leaves_nothing_behind(loads, tmp_path, caplog, monkeypatch):
    def full(*args):
        args[1].write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher_module, "save_file", full)
    with caplog.at_level(logging.WARNING):
        found = taught(loads, tmp_path)
    assert "No space left on device" in caplog.text
    assert same(found, taught(loads))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- live


def test_a_live_teacher_predicts_without_gradients_what_it_would_alone(loads):
    teacher = LiveTeacher(loads())
    given = padded(CORPUS.sequences)
    with torch.autocast("cpu", torch.bfloat16):  # the student's
        found = teacher(given)(slice(None))
    assert not found.requires_grad
    assert not loads.model.training
    whole = loads.model(input_ids=given.input_ids, use_cache=False).logits.flatten(0, 1)
    torch.testing.assert_close(found, whole[given.positions])
    student = found.clone().requires_grad_()
    loss = token_loss(student, given.targets, weight=1.0, teacher_logits=found)
    loss.backward()  # what was made in inference mode could not be saved for it
