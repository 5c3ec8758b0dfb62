"""Training through transformers.Trainer: the same fine-tune as with the own loop."""

from __future__ import annotations

import dataclasses
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from rankadaptor_plugin.config.tables import RecoveryConfig
from rankadaptor_plugin.core.errors import ConfigError, RecoveryError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.corpus.sequences import IGNORED, TeacherTokens, TrainingSequence
from rankadaptor_plugin.recovery import adapters, training
from rankadaptor_plugin.recovery.batches import batches
from rankadaptor_plugin.recovery.methods import methods as recovery_methods
from rankadaptor_plugin.recovery.trainer import engine as trainer_engine
from rankadaptor_plugin.recovery.training import MicroBatch

STEPS = 6
CONFIG = RecoveryConfig(
    engine="trainer",
    steps=STEPS,
    batch_size=4,
    micro_batch_size=3,  # two passes of unequal size
    learning_rate=0.02,
    warmup_steps=2,
    max_grad_norm=0.5,
    weight_decay=0.1,
)


class Lora:
    """Plain LoRA, with what AdaLoRA adds: a term of the loss, and work after a step."""

    def __init__(self, base, extra: float = 0.0) -> None:
        self.model = adapters.attach(base, RankAllocation((4, 2)), seed=0, alpha_over_rank=2.0)
        self.extra, self.followed = extra, []

    def parameters(self):
        return adapters.trainable_parameters(self.model)

    def optimizer(self, learning_rate, weight_decay):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, weight_decay=weight_decay)

    def extra_loss(self):
        return self.extra * sum(p.square().sum() for p in self.parameters()) if self.extra else None

    def after_step(self, step):
        self.followed.append((step, all(p.grad is not None for p in self.parameters())))


def made_sequences():
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (3, 5, 6, 8, 4, 7, 5, 6, 9, 4):
        tokens = torch.randint(3, 40, (length,), generator=generator)
        labels = tokens.clone()
        labels[: length // 2] = IGNORED
        made.append(TrainingSequence(tokens, labels))
    return made


@pytest.fixture(scope="module")
def sequences():
    return made_sequences()


@pytest.fixture
def run(make_llama, sequences):
    def run_(engine, config=CONFIG, *, base=None, sequences=sequences, extra=0.0, **options):
        tuned = Lora(base if base is not None else make_llama(), extra)
        order = batches(sequences, config.batch_size, seed=0)
        micro = options.pop("micro", MicroBatch.of(config))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses = engine.train(tuned, order, config, STEPS, micro=micro, **options)
        return losses, [p.detach().clone() for p in tuned.parameters()], tuned

    return run_


def assert_equal(own, trainer) -> None:
    torch.testing.assert_close(trainer[0], own[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trainer[1], own[1], rtol=1e-4, atol=1e-5)


CASES = {
    "sorted": {},
    "padded": {"layout": "padded"},
    "packed": {"layout": "packed"},
    "constant rate without clipping": {"schedule": "constant", "max_grad_norm": 0.0},
    "one pass per step": {"micro_batch_size": 4},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_losses_and_weights_are_those_of_the_own_loop(run, changes):
    config = dataclasses.replace(CONFIG, **changes)
    assert_equal(run(training, config), run(trainer_engine, config))


def test_dropout_is_that_of_the_own_loop(run, make_llama):
    own, trainer = (
        run(engine, base=make_llama(attention_dropout=0.2)) for engine in (training, trainer_engine)
    )
    assert_equal(own, trainer)
    assert own[0] != run(training)[0]


def test_distillation_is_that_of_the_own_loop(run, sequences):
    taught = []
    for sequence in sequences:
        n = int((sequence.labels[1:] != IGNORED).sum())
        probabilities = torch.tensor([0.6, 0.3]).log().expand(n, 2)
        indices = torch.tensor([[3, 4]], dtype=torch.int32).expand(n, 2)
        teacher = TeacherTokens(indices, probabilities, torch.tensor(0.1).log().expand(n))
        taught.append(dataclasses.replace(sequence, teacher=teacher))
    config = dataclasses.replace(CONFIG, distill_weight=0.5)
    own = run(training, config, sequences=taught)
    assert_equal(own, run(trainer_engine, config, sequences=taught))
    assert own[0] != run(training)[0]


def test_the_terms_and_the_work_of_a_method_are_done(run):
    own, trainer = (run(engine, extra=0.1) for engine in (training, trainer_engine))
    assert_equal(own, trainer)
    assert trainer[2].followed == own[2].followed == [(step, True) for step in range(STEPS)]
    assert not trainer[1][0].equal(run(trainer_engine)[1][0])


@pytest.mark.parametrize("method", ["adalora", "lora-fa", "dora", "rslora"])
def test_every_method_goes_the_same_way(make_llama, sequences, method):
    done = []
    for engine in (training, trainer_engine):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tuned = recovery_methods.begin(
                make_llama(),
                recovery_methods.parse_method(method),
                RankAllocation((4, 2)),
                CONFIG,
                seed=0,
                steps=STEPS,
                sequences=sequences,
            )
            order = batches(sequences, CONFIG.batch_size, seed=0)
            losses = engine.train(tuned, order, CONFIG, STEPS, micro=MicroBatch.of(CONFIG))
        done.append((losses, [p.detach().clone() for p in tuned.finish().parameters()]))
    assert_equal(*done)


def test_too_little_memory_halves_the_pass_and_changes_nothing(run, monkeypatch):
    whole, forward = run(training), trainer_engine.forward_logits

    def small(model, given, **called):
        if len(given.inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(model, given, **called)

    monkeypatch.setattr(trainer_engine, "forward_logits", small)
    micro = MicroBatch(3)
    assert_equal(whole, run(trainer_engine, micro=micro))
    assert micro.size == 1


def test_on_step_sees_each_step_and_ends_the_fine_tune(run):
    seen = []

    def on_step(done, loss):
        seen.append((done, loss))
        return done < 3

    losses, _, _ = run(trainer_engine, on_step=on_step)
    assert seen == list(enumerate(losses, start=1))
    assert len(losses) == 3


def test_callbacks_are_called(run):
    class Count(TrainerCallback):
        steps, ended = 0, False

        def on_step_end(self, args, state, control, **around):
            self.steps += 1

        def on_train_end(self, args, state, control, **around):
            self.ended = True

    count = Count()
    run(trainer_engine, callbacks=[count])
    assert (count.steps, count.ended) == (STEPS, True)


def test_a_loss_that_is_no_number_ends_the_fine_tune(run):
    config = dataclasses.replace(CONFIG, learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(RecoveryError, match=r"at step \d of 6.*learning_rate"):
        run(trainer_engine, config)


def test_the_resident_model_is_left_as_it_was(run, make_llama, capsys):
    base = make_llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    first = run(trainer_engine, base=base)
    model = first[2].model
    attributes, cache = set(vars(model)), model.config.use_cache
    again = run(trainer_engine, base=model)
    assert again[0] == first[0]
    assert again[2].model is model
    assert set(vars(model)) == attributes
    assert model.config.use_cache is cache is True
    assert type(model.get_base_model()) is type(base)
    assert all(p.grad is None for p in model.parameters())
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].equal(before[name]) for name in before)
    assert not any(capsys.readouterr())


def test_random_states_are_left_alone(make_llama, sequences):
    tuned = Lora(make_llama())
    order = batches(sequences, 4, seed=0)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    trainer_engine.train(tuned, order, CONFIG, 1, micro=MicroBatch(4))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == states


def test_mixed_precision_of_trainer_leaves_no_patch(run, make_llama):
    config = dataclasses.replace(CONFIG, trainer_arguments={"bf16": True})
    losses, _, tuned = run(trainer_engine, config)
    torch.testing.assert_close(losses, run(training)[0], rtol=0.05, atol=0.05)
    assert "forward" not in vars(tuned.model)


def test_files_go_where_the_user_says(run, tmp_path):
    arguments = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 3}
    run(trainer_engine, dataclasses.replace(CONFIG, trainer_arguments=arguments))
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rat": 1}, "Did you mean 'learning_rate'"),
        ({"learning_rate": 1}, r"set \[recovery\] learning_rate"),
        ({"gradient_accumulation_steps": 1}, r"set \[recovery\] batch_size"),
        ({"max_steps": 1}, r"set \[recovery\] steps"),
        ({"seed": 1}, "set seed"),
        ({"save_strategy": "often"}, "refuses .*often"),
        ({"use_liger_kernel": True}, "share. Leave it out"),
        ({"fp16": True, "bf16": True}, "refuses .*bf16"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(run, arguments, message):
    config = dataclasses.replace(CONFIG, trainer_arguments=arguments)
    with pytest.raises(ConfigError, match=message) as caught:
        run(trainer_engine, config)
    assert "\n" not in str(caught.value)


PROCESS = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from test_trainer_engine import Lora, CONFIG, STEPS, made_sequences
from transformers import LlamaConfig, LlamaForCausalLM
from rankadaptor_plugin.recovery.trainer import engine as trainer_engine
from rankadaptor_plugin.recovery import training
from rankadaptor_plugin.recovery.batches import batches
from rankadaptor_plugin.recovery.training import MicroBatch

def run(engine):
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    base = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=24, initializer_range=0.3))
    tuned = Lora(base, extra=0.1)
    order = batches(made_sequences(), CONFIG.batch_size, seed=0)
    losses = engine.train(tuned, order, CONFIG, STEPS, micro=MicroBatch(1))
    return losses, [p.detach() for p in tuned.parameters()]

one = run(training)  # before Trainer starts the processes' group
many = run(trainer_engine)
torch.testing.assert_close(many[0], one[0], rtol=1e-4, atol=1e-5)
torch.testing.assert_close(many[1], one[1], rtol=1e-3, atol=1e-4)
assert torch.distributed.get_world_size() == 2
torch.distributed.destroy_process_group()
"""


def test_two_processes_share_each_batch(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(Path(__file__).parents[1])],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
