"""The loss of a fine-tune: against plain formulas, and what the kept tokens may lose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankadaptor_plugin.corpus.sequences import IGNORED, TeacherTokens, TrainingSequence
from rankadaptor_plugin.models import logits as logits_module
from rankadaptor_plugin.recovery.batches import LEAST, padded, pass_loss, token_loss
from rankadaptor_plugin.recovery.teacher import LiveTeacher


def kept(teacher_logits, k, temperature=1.0):
    scores = torch.log_softmax(teacher_logits / temperature, dim=-1)
    best, indices = scores.topk(k)
    rest = scores.scatter(1, indices, -torch.inf).logsumexp(1)
    return TeacherTokens(indices.int(), best, rest.clamp(min=LEAST))


def logits(n, v, seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, v, generator=generator)


def divergence(student, teacher, temperature):
    """The formula, in float64, with loops."""
    total = 0.0
    for s, t in zip(student.double() / temperature, teacher.double() / temperature, strict=True):
        p, q = t.softmax(0), s.softmax(0)
        total += sum(float(p[i] * (p[i].log() - q[i].log())) for i in range(len(p)))
    return total


def test_without_a_teacher_it_is_the_sum_of_the_cross_entropies():
    student, targets = logits(5, 7, 0), torch.tensor([0, 3, 6, 3, 1])
    plain = -sum(student.double().softmax(1).log()[i, t] for i, t in enumerate(targets))
    assert token_loss(student, targets).item() == pytest.approx(float(plain), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_a_live_teacher_adds_the_divergence_times_the_square_of_the_temperature(
    weight, temperature
):
    student, teacher, targets = logits(4, 9, 0), logits(4, 9, 1), torch.tensor([0, 8, 2, 2])
    found = token_loss(
        student, targets, weight=weight, temperature=temperature, teacher_logits=teacher
    )
    next_token = token_loss(student, targets).item()
    expected = (1 - weight) * next_token
    expected += weight * temperature**2 * divergence(student, teacher, temperature)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@settings(max_examples=60)
@given(
    k=st.integers(1, 12),
    scale=st.floats(0.01, 60),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 5.0]),
    seed=st.integers(0, 10**6),
)
def test_kept_tokens_give_no_more_than_all_and_all_kept_the_same(k, scale, temperature, seed):
    student, teacher = logits(3, 12, seed, scale), logits(3, 12, seed + 1, scale)
    student.requires_grad_()
    targets = torch.zeros(3, dtype=torch.int64)
    options = {"weight": 1.0, "temperature": temperature}
    whole = token_loss(student, targets, teacher_logits=teacher, **options)
    cut = token_loss(student, targets, kept(teacher, k, temperature), **options)
    (gradient,) = torch.autograd.grad(cut, student, retain_graph=True)
    assert torch.isfinite(gradient).all()
    slack = 1e-5 * temperature**2 + 1e-5 * whole.item()
    assert -slack <= cut.item() <= whole.item() + slack
    if k == 12:
        assert cut.item() == pytest.approx(whole.item(), abs=slack)
        (all_of_it,) = torch.autograd.grad(whole, student)
        torch.testing.assert_close(gradient, all_of_it, rtol=1e-4, atol=1e-5)


def test_a_student_that_is_sure_of_the_kept_tokens_still_learns_of_the_others():
    """The others have 1e-12 of the student's probability, less than float32 tells 1 from."""
    student = torch.zeros(1, 50)
    student[0, 0] = 27.6 + torch.tensor(49.0).log()
    exact = student.double().requires_grad_()
    student.requires_grad_()
    teacher = torch.zeros(1, 50)
    teacher[0, 0] = 3.0
    tokens = kept(teacher, 1)
    found = token_loss(student, torch.zeros(1, dtype=torch.int64), tokens, weight=1.0)
    scores = exact.log_softmax(1)
    p, rest = tokens.log_probabilities.double()[0, 0], tokens.rest.double()[0]
    expected = p.exp() * (p - scores[0, 0]) + rest.exp() * (rest - scores[0, 1:].logsumexp(0))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = (torch.autograd.grad(x, y)[0] for x, y in ((found, student), (expected, exact)))
    torch.testing.assert_close(*gradients, check_dtype=False, rtol=1e-4, atol=1e-9)


def test_half_precision_predictions_of_a_student_are_taken_in_float32():
    student, targets = logits(4, 9, 0).bfloat16(), torch.zeros(4, dtype=torch.int64)
    teacher = kept(logits(4, 9, 1), 3)
    found = token_loss(student, targets, teacher, weight=0.5)
    assert found.dtype == torch.float32
    assert torch.equal(found, token_loss(student.float(), targets, teacher, weight=0.5))


def test_predictions_kept_in_half_precision_serve_below_autocast():
    student, targets = logits(4, 9, 0), torch.zeros(4, dtype=torch.int64)
    tokens = kept(logits(4, 9, 1), 3)
    half = TeacherTokens(tokens.indices, tokens.log_probabilities.half(), tokens.rest.half())
    expected = token_loss(student, targets, half, weight=0.5)
    for precision in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", precision):
            assert torch.equal(token_loss(student, targets, half, weight=0.5), expected)


def test_distillation_without_predictions_is_refused():
    with pytest.raises(ValueError, match="needs the teacher's predictions"):
        token_loss(logits(1, 3, 0), torch.tensor([0]), weight=0.5)


def test_no_prediction_is_computed_that_is_not_trained(make_llama):
    model, seen = make_llama(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    sequences = []
    for length in (9, 4, 6):
        tokens = torch.randint(40, (length,), generator=torch.Generator().manual_seed(length))
        labels = torch.where(torch.arange(length) < 2, IGNORED, tokens)
        sequences.append(TrainingSequence(tokens, labels))
    given_ = padded(sequences)
    found = pass_loss(model, given_)
    whole = model(input_ids=given_.input_ids, use_cache=False).logits
    assert seen == [(1, 13, 40), whole.shape]
    expected = token_loss(whole.flatten(0, 1)[given_.positions], given_.targets)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["next token", "kept", "live"])
def test_some_predictions_at_a_time_give_the_loss_and_gradients_of_all(
    make_llama, monkeypatch, kind
):
    model, seen = make_llama().double(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    tokens = torch.arange(3, 22)
    teacher = kept(logits(18, 40, 1), 5) if kind == "kept" else None
    given_ = padded([TrainingSequence(tokens, tokens, teacher)])
    live = LiveTeacher(make_llama(seed=2)) if kind == "live" else None
    options = {"weight": 0.0 if kind == "next token" else 0.4, "temperature": 2.0}

    def whole():
        predictions = model(input_ids=given_.input_ids, use_cache=False).logits[0, :-1]
        theirs = live(given_)(slice(None)) if live else None
        return token_loss(predictions, given_.targets, teacher, teacher_logits=theirs, **options)

    def outcome(loss):
        model.zero_grad()
        (3 * loss).backward()
        gradients = {n: p.grad.clone() for n, p in model.model.named_parameters()}
        return {"loss": loss.detach()} | gradients

    expected = outcome(whole())
    monkeypatch.setattr(logits_module, "_CHUNK", 40 * 5 + 3)
    seen.clear()
    found = outcome(pass_loss(model, given_, teacher=live, **options))
    assert [shape[1] for shape in seen] == [5, 5, 5, 3]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        alone = pass_loss(model, given_, teacher=live, **options)
    torch.testing.assert_close(alone, expected["loss"])
