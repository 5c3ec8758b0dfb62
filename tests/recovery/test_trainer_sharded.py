"""FSDP and DeepSpeed through Trainer: what they leave is what the own loop leaves."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankadaptor_plugin.config.tables import RecoveryConfig
from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.corpus.sequences import IGNORED, Corpus, TrainingSequence
from rankadaptor_plugin.recovery.batches import trained_tokens
from rankadaptor_plugin.recovery.methods import methods as recovery_methods
from rankadaptor_plugin.recovery.recover import recover
from rankadaptor_plugin.recovery.trainer.arguments import check_arguments, training_arguments
from rankadaptor_plugin.recovery.trainer.sharding import own_passes, sharded
from rankadaptor_plugin.recovery.training import MicroBatch

CONFIG = RecoveryConfig(
    steps=4,
    batch_size=4,
    learning_rate=0.02,
    warmup_steps=2,
    max_grad_norm=0.5,
    weight_decay=0.1,
    dropout=0.2,
)


def made_sequences():
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (3, 5, 6, 8, 4, 7, 5, 6, 9, 4):
        tokens = torch.randint(3, 40, (length,), generator=generator)
        labels = tokens.clone()
        labels[: length // 2] = IGNORED
        made.append(TrainingSequence(tokens, labels))
    return made


PROCESS = """
import dataclasses, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_trainer_sharded import CONFIG, made_sequences
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from rankadaptor_plugin.recovery.files import load
from rankadaptor_plugin.corpus.sequences import Corpus
from rankadaptor_plugin.recovery.recover import recover

def base():
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=24, initializer_range=0.3))

def adapter(model):
    return {n: p.detach() for n, p in model.named_parameters() if ".lora_" in n}

def run(method="lora", model=None, callbacks=(), **changes):
    # An odd batch, so that one process has a pass more than the other.
    config = dataclasses.replace(CONFIG, batch_size=5, micro_batch_size=1, **changes)
    model = base() if model is None else model
    options = dict(method=method, callbacks=callbacks)
    return recover(model, None, [4, 2], corpus, config, 0, **options)

def assert_equal(one, other):
    torch.testing.assert_close(other.losses, one.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(adapter(other.model), adapter(one.model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.validation_loss, one.validation_loss, rtol=1e-5, atol=1e-6)

class Look(TrainerCallback):
    def on_step_begin(self, args, state, control, model, **around):
        parts = list(model.parameters())
        self.whole = sum(p.numel() for p in parts)
        self.local = sum(p.to_local().numel() for p in parts if isinstance(p, DTensor))

sequences = made_sequences()
corpus = Corpus(sequences=sequences[:8], validation=sequences[8:], dropped=0)
best = dict(validate_every=2, keep_best=True)
fsdp = dict(engine="trainer", trainer_arguments={"fsdp": True})

own = run(engine="own", **best)
model, look = base(), Look()
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
many = run(model=model, callbacks=[look], **best, **fsdp)
assert_equal(own, many)
assert look.local < 0.6 * look.whole
assert dist.get_world_size() == 2
assert fsdp["trainer_arguments"] == {"fsdp": True}

folder = Path(sys.argv[2])
if dist.get_rank() == 0:
    many.save(folder)
dist.barrier()
read = adapter(load(base(), folder))
assert read.keys() == adapter(many.model).keys()
assert all(weight.equal(adapter(many.model)[name]) for name, weight in read.items())

plain = run(model=many.model, engine="trainer", **best)  # no part of FSDP is left
assert_equal(own, plain)
after = plain.model.unload().state_dict()
assert all(after[name].equal(before[name]) for name in before)

shape = dict(layout="packed", gradient_checkpointing=True)
assert_equal(run("rslora", engine="own", **shape), run("rslora", **shape, **fsdp))
dist.destroy_process_group()
"""


def test_fsdp_leaves_what_the_own_loop_leaves(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(script),
                str(Path(__file__).parents[1]),
                str(tmp_path / "adapter"),
            ],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


@pytest.fixture
def entered(make_llama, monkeypatch):
    """What `sharded` says to a fine-tune in one of two processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")

    def entered_(arguments, method="lora", model=None):
        tuned = recovery_methods.begin(
            model or make_llama(),
            recovery_methods.parse_method(method),
            RankAllocation((4, 2)),
            CONFIG,
            seed=0,
            steps=4,
            sequences=made_sequences(),
        )
        with sharded(tuned, arguments) as shards:
            return tuned, shards

    return entered_


def assert_one_line(caught) -> None:
    assert "\n" not in str(caught.value)
    assert "[recovery.trainer_arguments]" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fsdp": True, "deepspeed": {"a": 1}}, "exclude each other"),
        ({"fsdp": True, "save_strategy": "steps"}, "Leave out save_strategy"),
        ({"fsdp": "full_shard"}, "switched on by true"),
        ({"fsdp": True, "fsdp_config": "file.json"}, "table fsdp_config"),
        ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, "cpu_offload. Keep to version, "),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "Leave out version"),
        ({"fsdp": True, "learning_rate": 1}, r"set \[recovery\] learning_rate"),
    ],
)
def test_what_fsdp_cannot_do_is_refused_in_one_line(entered, arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        entered(arguments)
    assert_one_line(caught)


@pytest.mark.parametrize(
    ("is_there", "config", "message"),
    [
        (False, {"zero_optimization": {"stage": 2}}, "not installed"),
        (True, {"zero_optimization": {"stage": 3}}, "take fsdp to shard the model"),
        (True, {"bf16": {"enabled": True}}, "stages 1 and 2, not 0"),
        (True, {"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}, "gradient_clipping"),
        (True, {"zero_optimization": {"stage": 1}, "optimizer": {}}, "bring its own optimizer"),
        (True, "file.json", "set by a table"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_in_one_line(
    entered, monkeypatch, is_there, config, message
):
    found = object() if is_there else None
    monkeypatch.setattr(
        "rankadaptor_plugin.recovery.trainer.sharding.find_spec", lambda name: found
    )
    with pytest.raises(ConfigError, match=message) as caught:
        entered({"deepspeed": config})
    assert_one_line(caught)


@pytest.mark.parametrize("method", ["adalora", "lora-fa", "lora+pissa"])
def test_methods_that_change_their_adapter_are_refused(entered, method):
    with pytest.raises(ConfigError, match="changes its adapter by itself") as caught:
        entered({"fsdp": True}, method)
    assert_one_line(caught)


def test_float16_is_refused(entered, make_llama):
    with pytest.raises(ConfigError, match="float16"):
        entered({"fsdp": True}, model=make_llama().half())


def test_one_process_is_refused_and_the_model_left_bare(make_llama):
    base, corpus = make_llama(), Corpus(sequences=made_sequences(), dropped=0)
    config = dataclasses.replace(CONFIG, engine="trainer", trainer_arguments={"fsdp": True})
    with pytest.raises(ConfigError, match="processes that torchrun starts") as caught:
        recover(base, None, [4, 2], corpus, config)
    assert_one_line(caught)
    assert not any("lora" in name for name, _ in base.named_parameters())


@pytest.mark.parametrize("name", ["fsdp", "fsdp_config", "deepspeed"])
def test_a_run_of_many_fine_tunes_is_told_what_to_do_instead(name):
    with pytest.raises(ConfigError, match="in a script that torchrun") as caught:
        check_arguments({name: True})
    assert_one_line(caught)


def test_settings_of_accelerate_alone_are_refused(entered, monkeypatch):
    tuned, _ = entered({"fsdp": True})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="Start the script with torchrun"):
        training_arguments(CONFIG, 1, "out", tuned.model)


def test_the_copy_shares_no_parameter_and_the_environment_is_left_alone(entered):
    before = dict(os.environ)
    tuned, shards = entered({"fsdp": True})
    home, work = list(tuned.model.parameters()), list(shards.work.model.parameters())
    assert dict(os.environ) == before
    assert not {id(p) for p in home} & {id(p) for p in work}
    assert all(
        a.equal(b) and a.requires_grad is b.requires_grad for a, b in zip(home, work, strict=True)
    )
    assert len(shards.work.parameters()) == len(tuned.parameters())


@given(
    size=st.integers(1, 10),
    processes=st.integers(1, 4),
    micro=st.integers(1, 4),
    layout=st.sampled_from(["sorted", "packed"]),
)
def test_all_processes_make_as_many_passes_and_each_token_counts_once(
    size, processes, micro, layout
):
    batch = made_sequences()[:size]
    parts = [own_passes(batch, MicroBatch(micro, layout), i, processes) for i in range(processes)]
    assert len({len(part) for part in parts}) == 1
    counted = sum(int(weight) * len(one.targets) for part in parts for one, weight in part)
    assert counted == trained_tokens(batch)
