"""Fine-tunes in one pass: each is what it would be by itself, and one that fails spoils none."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from rankadaptor_plugin.config.tables import RecoveryConfig
from rankadaptor_plugin.core.errors import RankSpaceError, RecoveryError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.corpus.sequences import IGNORED, TeacherTokens, TrainingSequence
from rankadaptor_plugin.recovery import adapters, candidate_passes
from rankadaptor_plugin.recovery import dropout as sequence_dropout
from rankadaptor_plugin.recovery.batches import batches
from rankadaptor_plugin.recovery.candidates import can_train_together, put, train_together
from rankadaptor_plugin.recovery.training import MicroBatch, train

CONFIG = RecoveryConfig(
    steps=6, batch_size=4, micro_batch_size=4, learning_rate=0.01, warmup_steps=2
)
UNEVEN = [(RankAllocation((4, 2)), 0), (RankAllocation((1, 7)), 5), (RankAllocation((3, 3)), 0)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sequences():
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in (3, 5, 6, 8, 4, 7, 5, 6, 9, 4):
        tokens = torch.randint(3, 40, (length,), generator=generator)
        labels = tokens.clone()
        labels[: length // 2] = IGNORED
        found.append(TrainingSequence(tokens, labels))
    return found


def taught(sequences, kept=3):
    """Gives sequences the predictions of some teacher."""
    generator, found = torch.Generator().manual_seed(1), []
    for sequence in sequences:
        count = int((sequence.labels[1:] != IGNORED).sum())
        logits = torch.randn(count, 40, generator=generator).log_softmax(-1)
        best = logits.topk(kept)
        rest = (1 - best.values.exp().sum(-1)).log()
        teacher = TeacherTokens(best.indices.to(torch.int32), best.values, rest)
        found.append(dataclasses.replace(sequence, teacher=teacher))
    return found


class Plain:
    """Plain LoRA as the training loop takes it."""

    def __init__(self, model):
        self.model = model

    def parameters(self):
        return adapters.trainable_parameters(self.model)

    def optimizer(self, learning_rate, weight_decay):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, weight_decay=weight_decay)

    def extra_loss(self):
        return None

    def after_step(self, step):
        pass


def attached(model, allocation, config, seed):
    config = dataclasses.replace(config, **dict(allocation.settings))
    names = ("alpha_over_rank", "alpha", "rslora", "targets", "dropout")
    model = adapters.attach(
        model, allocation, seed=seed, **{name: getattr(config, name) for name in names}
    )
    sequence_dropout.install(model, seed)
    return model


def separate(model, candidates, sequences, config, steps, teacher=None):
    """Fine-tunes one after the other; returns losses and weights of each."""
    found = []
    for allocation, seed in candidates:
        model = attached(model, allocation, config, seed)
        own = dataclasses.replace(config, **dict(allocation.settings))
        order = batches(sequences, config.batch_size, seed)
        micro = MicroBatch.of(config)
        losses = train(Plain(model), order, own, steps, micro=micro, teacher=teacher)
        found.append((losses, adapters.whole_adapter(model)))
    model.unload()
    return found


def assert_same(together, apart):
    for one, (losses, weights) in zip(together, apart, strict=True):
        assert one.failed is None
        assert one.losses == pytest.approx(losses, rel=1e-5)
        assert one.weights.keys() == weights.keys()
        # AdamW magnifies rounding where a gradient is nearly 0.
        for name, weight in weights.items():
            torch.testing.assert_close(one.weights[name], weight, atol=2e-3, rtol=0)
        apart_by = [(one.weights[name] - weight).abs().mean() for name, weight in weights.items()]
        assert max(apart_by) < 1e-4
        assert sum(apart_by) / len(apart_by) < 1e-5


def compare(make, sequences, candidates=UNEVEN, teacher=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    together = train_together(
        make(), candidates, sequences, config, steps=config.steps, teacher=teacher
    )
    apart = separate(make(), candidates, sequences, config, config.steps, teacher)
    assert_same(together, apart)
    return together


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": 8, "micro_batch_size": 3},
        {"layout": "padded", "micro_batch_size": 1},
        {"layout": "packed"},
        {"weight_decay": 0.1, "max_grad_norm": 0.05},
        {"max_grad_norm": 0.0, "schedule": "constant"},
        {"rslora": True},
        {"alpha": 3.0},
        {"gradient_checkpointing": True},
        {"dropout": 0.3, "micro_batch_size": 3},
        {"dropout": 0.1, "layout": "padded", "gradient_checkpointing": True},
        {"targets": ("q_proj", "down_proj")},
    ],
    ids=str,
)
def test_candidates_together_become_what_each_does_alone(make_llama, sequences, changes):
    compare(make_llama, sequences, **changes)


@given(
    ranks=st.lists(
        st.lists(st.integers(0, 5), min_size=2, max_size=2).filter(any), min_size=1, max_size=3
    ),
    seed=st.integers(0, 99),
)
@settings(max_examples=8)
def test_any_ranks_do(make_llama, sequences, ranks, seed):
    candidates = [(RankAllocation(tuple(own)), seed + i) for i, own in enumerate(ranks)]
    compare(make_llama, sequences, candidates, steps=2)


@pytest.mark.parametrize(
    "ranks", [(1, 2, 3, 4), (*range(7), *range(7))], ids=["groups", "projections"]
)
def test_ranks_of_groups_and_projections_do(make_llama, sequences, ranks):
    candidates = [(RankAllocation(ranks), 0), (RankAllocation(ranks[::-1]), 0)]
    compare(make_llama, sequences, candidates, steps=3)


def test_searched_settings_are_each_candidates_own(make_llama, sequences):
    candidates = [
        (RankAllocation((2, 4), (("learning_rate", rate), ("alpha_over_rank", scale))), 0)
        for rate, scale in ((1e-2, 2.0), (1e-3, 0.5), (3e-2, 2.0))
    ]
    results = compare(make_llama, sequences, candidates)
    assert len({tuple(one.losses) for one in results}) == 3


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_kept_predictions_of_a_teacher_are_each_candidates_own(make_llama, sequences, weight):
    compare(make_llama, taught(sequences), distill_weight=weight, micro_batch_size=3)


def test_a_teacher_at_hand_is_asked_for_all_candidates(make_llama, sequences):
    other = make_llama(seed=3)

    @torch.no_grad()
    def teacher(given):
        return other(**given.inputs).logits.flatten(0, 1)[given.positions]

    compare(make_llama, sequences, teacher=teacher, distill_weight=0.5)


def test_transposed_matrices_do(sequences):
    def make():
        drop = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = GPT2Config(**sizes, **drop, bos_token_id=0, eos_token_id=1)
            return GPT2LMHeadModel(config)

    compare(make, sequences)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_number_types_do(make_llama, sequences, dtype):
    config, steps = dataclasses.replace(CONFIG, learning_rate=1e-3), 3
    together = train_together(make_llama().to(dtype), UNEVEN, sequences, config, steps=steps)
    apart = separate(make_llama().to(dtype), UNEVEN, sequences, config, steps)
    for one, (losses, weights) in zip(together, apart, strict=True):
        assert one.losses == pytest.approx(losses, rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
        assert {n: (w.shape, w.dtype) for n, w in one.weights.items()} == {
            n: (w.shape, w.dtype) for n, w in weights.items()
        }


# --------------------------------------------------------------------------------- what is left


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_base_is_left_as_it_was(make_llama, sequences, wrapped):
    base = make_llama()
    if wrapped:
        base = attached(base, RankAllocation((2, 2)), CONFIG, seed=9)
    modules = dict(base.named_modules())
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    modes = {name: module.training for name, module in modules.items()}
    random = torch.get_rng_state()
    train_together(base, UNEVEN, sequences, CONFIG, steps=2)
    assert torch.get_rng_state().equal(random)
    assert {n: id(m) for n, m in base.named_modules()} == {n: id(m) for n, m in modules.items()}
    after = base.state_dict()
    assert after.keys() == state.keys()
    assert all(after[name].equal(state[name]) for name in state)
    assert {name: p.requires_grad for name, p in base.named_parameters()} == flags
    assert {name: module.training for name, module in base.named_modules()} == modes
    assert all(p.grad is None for p in base.parameters())


def test_the_base_is_put_back_after_an_error(make_llama, sequences):
    base = make_llama()
    modules = {name: id(module) for name, module in base.named_modules()}

    def stop(done, losses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_together(base, UNEVEN, sequences, CONFIG, steps=2, on_step=stop)
    assert {name: id(module) for name, module in base.named_modules()} == modules
    assert all(p.requires_grad for p in base.parameters())


def test_an_adapter_on_the_base_has_no_part_in_it(make_llama, sequences):
    bare = train_together(make_llama(), UNEVEN, sequences, CONFIG, steps=2)
    resident = attached(make_llama(), RankAllocation((5, 5)), CONFIG, seed=9)
    with torch.no_grad():
        for parameter in adapters.trainable_parameters(resident):
            parameter.fill_(1.0)
    wrapped = train_together(resident, UNEVEN, sequences, CONFIG, steps=2)
    assert [one.losses for one in bare] == [one.losses for one in wrapped]


def test_the_same_call_gives_the_same_bits(make_llama, sequences):
    runs = [train_together(make_llama(), UNEVEN, sequences, CONFIG, steps=3) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert one.losses == other.losses
        assert all(one.weights[name].equal(other.weights[name]) for name in one.weights)


def test_weights_are_put_on_an_adapter(make_llama, sequences):
    base = make_llama()
    trained = train_together(base, UNEVEN, sequences, CONFIG, steps=2)[1]
    model = attached(base, UNEVEN[1][0], CONFIG, seed=5)
    put(model, trained)
    whole = adapters.whole_adapter(model)
    assert all(whole[name].equal(weight) for name, weight in trained.weights.items())


def test_weights_of_another_allocation_are_refused(make_llama, sequences):
    base = make_llama()
    trained = train_together(base, UNEVEN, sequences, CONFIG, steps=1)[1]
    with pytest.raises(RecoveryError, match="do not fit the adapter"):
        put(attached(base, UNEVEN[0][0], CONFIG, seed=0), trained)


def test_the_end_may_be_told(make_llama, sequences):
    told = []

    def on_step(done, losses):
        told.append((done, len(losses)))
        return done < 2

    trained = train_together(make_llama(), UNEVEN, sequences, CONFIG, steps=6, on_step=on_step)
    assert told == [(1, 3), (2, 3)]
    assert [len(one.losses) for one in trained] == [2, 2, 2]


# ------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_candidate_that_diverges_spoils_no_other(make_llama, sequences, failing):
    candidates = list(UNEVEN)
    allocation, seed = candidates[failing]
    wild = RankAllocation(allocation.ranks, (("learning_rate", 1e30),))
    candidates[failing] = (wild, seed)
    trained = train_together(make_llama(), candidates, sequences, CONFIG, steps=6)
    lost = trained.pop(failing)
    del candidates[failing]
    assert lost.failed is not None
    assert "at step 2 of 6. Lower [recovery] learning_rate (now 1e+30)" in lost.failed
    assert lost.weights == {}
    assert len(lost.losses) == 1
    assert_same(trained, separate(make_llama(), candidates, sequences, CONFIG, 6))


def test_all_candidates_may_fail(make_llama, sequences):
    candidates = [(RankAllocation((2, 2), (("learning_rate", 1e30),)), seed) for seed in (0, 1)]
    trained = train_together(make_llama(), candidates, sequences, CONFIG, steps=6)
    assert all(one.failed is not None for one in trained)
    with pytest.raises(RecoveryError, match="Lower"):
        put(attached(make_llama(), RankAllocation((2, 2)), CONFIG, 0), trained[0])


def test_memory_that_does_not_suffice_halves_the_passes(make_llama, sequences, monkeypatch, caplog):
    rows = []

    def forward(model, given):
        rows.append(len(given.inputs["input_ids"]))
        if rows[-1] > 3:
            raise torch.OutOfMemoryError("out of memory")
        return forward_logits(model, given)

    forward_logits = candidate_passes.forward_logits
    monkeypatch.setattr(candidate_passes, "forward_logits", forward)
    trained = train_together(make_llama(), UNEVEN, sequences, CONFIG, steps=2)
    monkeypatch.undo()
    assert rows == [12, 6, *[3] * 8]
    assert "from now on 1 sequences per pass" in caplog.text
    assert_same(trained, separate(make_llama(), UNEVEN, sequences, CONFIG, 2))


def test_memory_that_never_suffices_is_told_as_such(make_llama, sequences, monkeypatch):
    def forward(model, given):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(candidate_passes, "forward_logits", forward)
    with pytest.raises(torch.OutOfMemoryError):
        train_together(make_llama(), UNEVEN, sequences, CONFIG, steps=1)


def test_another_error_of_a_pass_is_not_taken_for_memory(make_llama, sequences, monkeypatch):
    calls = []

    def forward(model, given):
        calls.append(given)
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(candidate_passes, "forward_logits", forward)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train_together(make_llama(), UNEVEN, sequences, CONFIG, steps=1)
    assert len(calls) == 1


def test_an_allocation_that_does_not_fit_is_refused(make_llama, sequences):
    with pytest.raises(RankSpaceError):
        train_together(make_llama(), [(RankAllocation((1, 2, 3)), 0)], sequences, CONFIG, steps=1)


# ----------------------------------------------------------------------------- when it may be used


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"rslora": True, "layout": "packed", "distill_weight": 0.5}, ""),
        ({"dropout": 0.1, "gradient_checkpointing": True}, ""),
        ({"dora": True}, "[recovery] dora is true"),
        ({"pissa": True}, "[recovery] pissa is true"),
        ({"keep_best": True}, "[recovery] keep_best is true"),
        ({"validate_every": 5}, "[recovery] validate_every is 5"),
        ({"engine": "trainer"}, "[recovery] engine is trainer, not own"),
    ],
)
def test_the_reason_against_it_is_told(changes, reason):
    assert can_train_together(dataclasses.replace(CONFIG, **changes), CPU) == reason


def test_other_devices_are_refused():
    assert "mps" in can_train_together(CONFIG, torch.device("mps"))


@pytest.mark.parametrize("name", ["attention_dropout", "resid_pdrop"])
def test_dropout_of_the_model_itself_is_seen(make_llama, name):
    if name == "attention_dropout":
        model = make_llama(attention_dropout=0.1)
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    assert can_train_together(CONFIG, CPU, model) == "the model itself has dropout"
    assert can_train_together(CONFIG, CPU, make_llama()) == ""


def test_half_precision_without_range_is_refused(make_llama):
    assert "float16" in can_train_together(CONFIG, CPU, make_llama().half())


def test_training_refuses_for_the_same_reason(make_llama, sequences):
    config = dataclasses.replace(CONFIG, dora=True)
    with pytest.raises(RecoveryError, match=r"dora is true\. Set .* candidates_per_pass = 1"):
        train_together(make_llama(), UNEVEN, sequences, config, steps=1)


def test_a_method_beside_lora_is_refused(make_llama, sequences):
    candidates = [*UNEVEN, (RankAllocation((4, 4), method="adalora"), 0)]
    with pytest.raises(RecoveryError, match="the method adalora is not plain LoRA"):
        train_together(make_llama(), candidates, sequences, CONFIG, steps=1)


def test_epochs_give_the_steps_of_the_schedule(make_llama, sequences):
    by_steps = dataclasses.replace(CONFIG, steps=3)
    by_epochs = dataclasses.replace(CONFIG, epochs=1.0)
    runs = [
        train_together(make_llama(), UNEVEN, sequences, config, steps=3)
        for config in (by_steps, by_epochs)
    ]
    assert [one.losses for one in runs[0]] == [one.losses for one in runs[1]]


def test_no_candidates_are_no_work(make_llama, sequences):
    assert train_together(make_llama(), [], sequences, CONFIG, steps=1) == []


def test_a_model_with_dropout_is_not_trained_so(make_llama, sequences):
    with pytest.raises(RecoveryError, match="the model itself has dropout"):
        train_together(make_llama(attention_dropout=0.1), UNEVEN, sequences, CONFIG, steps=1)
