"""Every method trains, leaves the base alone, and ends as an adapter like all others."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from rankadaptor_plugin.config.tables import INITS, RankSpaceConfig, RecoveryConfig
from rankadaptor_plugin.core.errors import ConfigError, CorpusError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.corpus.sequences import TrainingSequence
from rankadaptor_plugin.models.structures import matrix_shape
from rankadaptor_plugin.pruning.depth import keep_layers
from rankadaptor_plugin.recovery.adapters import (
    ADAPTER,
    adapted_modules,
    adapter_ranks,
    attach,
    bare_model,
    weight_of,
)
from rankadaptor_plugin.recovery.batches import (
    batches,
    padded,
    pass_loss,
    passes,
    trained_tokens,
)
from rankadaptor_plugin.recovery.files import load
from rankadaptor_plugin.recovery.methods.methods import (
    METHODS,
    Method,
    begin,
    parse_method,
    pattern_allocation,
)
from rankadaptor_plugin.recovery.methods.pissa import principal
from rankadaptor_plugin.recovery.slots import module_ranks, nearest_allocation, rank_space
from rankadaptor_plugin.testing.families import choose_cuts, logits_of, remove_units

TRAINED = (
    "lora",
    "dora",
    "pissa+rslora",
    "eva",
    "eva+dora",
    "adalora",
    "lora-fa",
    "lora-fa+gradient",
    "pattern:2-4",
    "gradient",
    "dora+gradient",
    "lora+eva",
    "squeeze",
    "squeeze:9+gradient",
)
EVERY = (*TRAINED, "none")
CONFIG = RecoveryConfig(
    learning_rate=2e-2, per_device_train_batch_size=4, gradient_accumulation_steps=1
)
FEW = RecoveryConfig(
    learning_rate=2e-2,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    target_modules=("k_proj", "down_proj"),
)
"""Of few matrices, where more would show no more."""


def sequences(count: int = 12) -> list[TrainingSequence]:
    """Counting, which can be learned."""
    rows = [(torch.arange(6 + i % 5) + i) % 37 + 3 for i in range(count)]
    return [TrainingSequence(row, row) for row in rows]


@pytest.fixture(scope="module")
def make(make_llama):
    """Models by form: wide ones of uneven width, some shorter, one with transposed matrices."""

    def gpt2():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = {
                "n_embd": 16,
                "n_layer": 3,
                "n_head": 4,
                "n_positions": 64,
                "initializer_range": 0.3,
            }
            return GPT2LMHeadModel(GPT2Config(vocab_size=40, **sizes)).eval()

    def uneven():
        model = make_llama(num_hidden_layers=3)
        remove_units(model, choose_cuts(model))
        return model

    def short():
        model = make_llama(num_hidden_layers=5)
        keep_layers(model, [0, 2, 4])
        return model

    return {"uneven": uneven, "short": short, "gpt2": gpt2}


def start(base, name="lora", *, ranks=(4, 2, 3), config=CONFIG, seed=0, steps=12, data=None):
    return begin(
        base,
        parse_method(name),
        RankAllocation(ranks),
        config,
        seed=seed,
        steps=steps,
        sequences=sequences() if data is None else data,
    )


def train(tuned, steps=12, config=CONFIG):
    """The loop in its simplest form."""
    optimizer = tuned.optimizer(config.learning_rate, config.weight_decay)
    bare = tuned.model.get_base_model()
    tuned.model.train()
    stream = batches(sequences(), config.batch_size, 0)
    for step in range(steps):
        batch = next(stream)
        for part in passes(batch, config.per_device_train_batch_size):
            loss = pass_loss(bare, part) / trained_tokens(batch)
            loss.backward()
        extra = tuned.extra_loss()
        if extra is not None:
            extra.backward()
        optimizer.step()
        tuned.after_step(step)
        optimizer.zero_grad(set_to_none=True)
    tuned.model.eval()


@torch.no_grad()
def loss_of(model) -> float:
    """The loss on all sequences, in nats per token."""
    whole = padded(sequences())
    loss = pass_loss(model, whole)
    return loss.item() / trained_tokens(sequences())


def trained(base, name, **changes):
    tuned = start(base, name, **changes)
    if name != "none":
        train(tuned)
    return tuned.finish()


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(t.equal(second[n]) for n, t in first.items())


def is_final(model) -> bool:
    """Whether a model has a plain adapter of the usual name, and nothing else."""
    kinds = {type(module).__module__ for module in adapted_modules(model).values()}
    return (
        kinds == {"peft.tuners.lora.layer"}
        and list(model.peft_config) == [ADAPTER]
        and model.active_adapters == [ADAPTER]
        and not model.training
    )


# ------------------------------------------------------------------------------------- all methods


@pytest.mark.parametrize("form", ["uneven", "short", "gpt2"])
@pytest.mark.parametrize("name", EVERY)
def test_a_method_ends_as_an_adapter_that_is_saved_loaded_and_merged(name, form, make, tmp_path):
    base = make[form]()
    before = {n: t.clone() for n, t in base.state_dict().items()}
    tuned = start(base, name)
    torch.testing.assert_close(
        tuned.model.eval()(**inputs()).logits, make[form]()(**inputs()).logits
    )
    first = loss_of(tuned.model.get_base_model())
    if name == "none":
        assert tuned.parameters() == []
    else:
        train(tuned)
    model = tuned.finish()
    assert is_final(model)
    assert loss_of(base) == first if name == "none" else loss_of(base) < 0.99 * first
    logits = logits_of(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    loaded = load(make[form](), tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded), logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits_of(loaded.merge_and_unload()), logits, rtol=1e-4, atol=1e-5)
    assert same(bare_model(model).state_dict(), before)


def inputs():
    return {"input_ids": sequences()[0].tokens[None]}


def test_every_method_can_follow_every_other(make):
    base = make["uneven"]()
    before = {n: t.clone() for n, t in base.state_dict().items()}
    fresh = {name: weights(start(make["uneven"](), name, config=FEW).model) for name in EVERY}
    order = []  # a round in which each comes after each once, itself included
    for i, name in enumerate(EVERY):
        order += [name, *itertools.chain.from_iterable((name, other) for other in EVERY[i + 1 :])]
    assert len(set(itertools.pairwise([*order, order[0]]))) == len(EVERY) ** 2
    model, before_it = base, "nothing"
    for name in [*order, order[0]]:
        tuned = start(model, name, config=FEW)
        assert same(weights(tuned.model), fresh[name]), f"{name} after {before_it}"
        model, before_it = tuned.finish(), name
        assert is_final(model)
    assert same(bare_model(model).state_dict(), before)


@pytest.mark.parametrize("name", EVERY)
def test_a_fine_tune_that_broke_off_can_be_followed_by_another(name, make):
    base = make["uneven"]()
    before = {n: t.clone() for n, t in base.state_dict().items()}
    expected = weights(start(make["uneven"](), config=FEW).model)
    broken = start(base, name, config=FEW).model
    after = start(broken, config=FEW).model
    assert same(weights(after), expected)
    broken = start(after, name, config=FEW).model
    broken.unload()
    assert same(base.state_dict(), before)
    assert same(weights(start(broken, config=FEW).model), expected)
    broken.unload()
    assert same(weights(start(base, config=FEW).model), expected)


@pytest.mark.parametrize("name", EVERY)
def test_the_seed_alone_decides_the_weights(name, make):
    found = []
    for state, seed in ((1, 0), (2, 0), (1, 7)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        model = trained(make["uneven"](), name, seed=seed, config=FEW)
        assert torch.get_rng_state().equal(before)
        found.append(weights(model))
    assert same(found[0], found[1])
    assert same(found[0], found[2]) == ("pissa" in name)  # nothing is drawn for it


@pytest.mark.parametrize("name", EVERY)
def test_only_the_targets_get_an_adapter(name, make):
    config = RecoveryConfig(
        target_modules=("q_proj", "v_proj"), per_device_train_batch_size=4, learning_rate=1e-2
    )
    model = trained(make["uneven"](), name, config=config)
    assert {module.rpartition(".")[2] for module in adapter_ranks(model)} <= {"q_proj", "v_proj"}


@pytest.mark.parametrize("name", EVERY)
def test_layers_of_rank_0_are_left_out(name, make):
    ranks = (0, 3, 2)
    if name.startswith("pattern"):
        name = "pattern:0-3-2"
    model = trained(make["uneven"](), name, ranks=ranks)
    assert not any(".layers.0." in f".{module}" for module in adapter_ranks(model))


@pytest.mark.parametrize("name", TRAINED)
def test_dropout_is_of_training_only(name, make):
    config = replace(FEW, lora_dropout=0.5)
    base = make["uneven"]()
    before = logits_of(base)
    tuned = start(base, name, config=config, steps=4)
    torch.testing.assert_close(logits_of(tuned.model.eval()), before, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    train(tuned, steps=4)
    during = logits_of(tuned.model)
    model = tuned.finish()
    torch.testing.assert_close(logits_of(model), during, rtol=1e-5, atol=1e-5)
    assert model.peft_config[ADAPTER].lora_dropout == 0.5


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_keeps_float32_adapters(name, make):
    base = make["uneven"]().to(torch.bfloat16)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    tuned = start(base, name, steps=3)
    if name != "none":
        train(tuned, steps=3)
    during = logits_of(tuned.model)
    model = tuned.finish()
    assert {tensor.dtype for tensor in weights(model).values()} == {torch.float32}
    difference = logits_of(model).float() - during.float()
    assert difference.norm() < 0.03 * during.float().norm()
    assert same(bare_model(model).state_dict(), before)


@pytest.mark.parametrize(("alpha", "alpha_over_rank"), [(16.0, 2.0), (0.0, 0.5)])
@pytest.mark.parametrize("name", ["lora", "rslora", "eva", "eva+rslora", "adalora", "pissa"])
def test_the_scaling_is_that_of_the_config(name, alpha, alpha_over_rank, make):
    config = RecoveryConfig(
        lora_alpha=alpha, alpha_over_rank=alpha_over_rank, per_device_train_batch_size=4
    )
    ranks = (4, 4, 4)
    model = start(make["uneven"](), name, config=config, ranks=ranks).finish()
    for module in adapted_modules(model).values():
        rank = module.r[ADAPTER]
        if name in ("adalora", "pissa"):
            rank = 4
        expected = (alpha or alpha_over_rank * rank) / rank ** (0.5 if "rslora" in name else 1)
        assert module.scaling[ADAPTER] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["adalora", "lora-fa", "pissa"])
def test_a_method_that_divides_by_the_scaling_refuses_0(name, make):
    with pytest.raises(ConfigError, match="divides by LoRA's scaling, which is 0"):
        start(make["uneven"](), name, config=RecoveryConfig(alpha_over_rank=0.0))


def test_switches_of_the_run_reach_every_method(make):
    tuned = start(make["uneven"](), "lora", config=RecoveryConfig(use_dora=True))
    assert any("lora_magnitude_vector" in name for name in weights(tuned.model))
    with pytest.raises(ConfigError, match="adalora cannot be combined with dora"):
        start(make["uneven"](), "adalora", config=RecoveryConfig(use_dora=True))


# ------------------------------------------------------------------------------------------ LoRA-FA


def test_lora_fa_trains_up_alone(make):
    tuned = start(make["uneven"](), "lora-fa")
    before = weights(tuned.model)
    train(tuned, steps=3)
    for name, weight in weights(tuned.model).items():
        assert weight.equal(before[name]) == (".lora_A." in name)


def test_lora_fa_turns_gradients_as_the_paper_says(make):
    tuned = start(make["uneven"](), "lora-fa", config=RecoveryConfig(lora_alpha=6.0))
    optimizer = tuned.optimizer(1e-3, 0.0)
    generator = torch.Generator().manual_seed(0)
    expected = {}
    for name, module in adapted_modules(tuned.model).items():
        up, down = weight_of(module, "lora_B"), weight_of(module, "lora_A").detach()
        up.grad = torch.randn(up.shape, generator=generator)
        scaling = 6.0 / len(down)
        expected[name] = up.grad @ torch.linalg.inv(down @ down.T) / scaling**2
    optimizer.step()
    for name, module in adapted_modules(tuned.model).items():
        grad = weight_of(module, "lora_B").grad
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------------------- PiSSA


def test_pissa_starts_from_the_principal_part_of_the_weights(make):
    base = make["uneven"]()
    exact = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = start(base, "pissa", ranks=(3, 3, 3)).model
    for name, module in adapted_modules(model).items():
        left, values, right = torch.linalg.svd(exact[f"{name}.weight"], full_matrices=False)
        best = left[:, :3] * values[:3] @ right[:3]
        down, up = weight_of(module, "lora_A"), weight_of(module, "lora_B")
        torch.testing.assert_close(module.scaling[ADAPTER] * up @ down, best, atol=1e-5, rtol=1e-4)


def test_pissa_stores_twice_the_rank(make):
    model = trained(make["uneven"](), "pissa", ranks=(4, 2, 3))
    expected = module_ranks(make["uneven"](), RankAllocation((4, 2, 3)))
    assert adapter_ranks(model) == {name: 2 * rank for name, rank in expected.items()}


def test_large_matrices_are_decomposed_alike_whatever_the_random_state():
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(1100, 1100, generator=generator))
    matrix = left * 0.8 ** torch.arange(1100)
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        found.append(principal(matrix, 5, 0, "a"))
        assert torch.initial_seed() == state
    assert all(a.equal(b) for a, b in zip(*found, strict=True))
    up, values, down = found[0]
    torch.testing.assert_close(values, 0.8 ** torch.arange(5), rtol=1e-3, atol=0)
    torch.testing.assert_close((up * values @ down)[:, :3], matrix[:, :3], rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------ AdaLoRA


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12, 40])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 2, 3), (1, 1, 1)])
def test_the_ranks_of_adalora_add_up_to_the_budget(ranks, steps, make):
    tuned = start(make["uneven"](), "adalora", ranks=ranks, steps=steps)
    train(tuned, steps=steps)
    final = adapter_ranks(tuned.finish())
    assert sum(final.values()) == 7 * sum(ranks)
    assert min(final.values()) > 0


def test_adalora_moves_ranks_between_modules(make):
    tuned = start(make["uneven"](), "adalora", ranks=(4, 4, 4), steps=20)
    assert {module.r[ADAPTER] for module in adapted_modules(tuned.model).values()} == {6}
    train(tuned, steps=20)
    assert len(set(adapter_ranks(tuned.finish()).values())) > 2


def test_adalora_keeps_its_budget_where_all_ranks_matter_equally(make):
    """Without a gradient no rank is worth more than another."""
    tuned = start(make["uneven"](), "adalora", steps=4)
    for step in range(4):
        for parameter in tuned.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tuned.after_step(step)
    ranks = adapter_ranks(tuned.finish())
    assert sum(ranks.values()) == 7 * 9
    assert set(ranks.values()) == {3}


def test_the_loss_of_the_model_has_no_orthogonality_in_it(make):
    """PEFT adds it where its own forward makes a loss; the loop calls the model below."""
    base = make["uneven"]()
    tokens = sequences()[0].tokens[None]
    plain = base(input_ids=tokens, labels=tokens).loss
    tuned = start(base, "adalora")
    below = tuned.model.get_base_model()(input_ids=tokens, labels=tokens).loss
    above = tuned.model(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(below, plain)
    torch.testing.assert_close(above, plain + tuned.extra_loss())


# ---------------------------------------------------------------------------------------------- EVA


def test_eva_redistributes_ranks_at_a_constant_sum(make):
    base = make["uneven"]()
    uniform = module_ranks(base, RankAllocation((4, 4, 4)))
    ranks = adapter_ranks(start(base, "eva", ranks=(4, 4, 4)).model)
    assert sum(ranks.values()) == sum(uniform.values())
    assert max(ranks.values()) <= 8
    assert len(set(ranks.values())) > 1


def test_the_first_weights_of_eva_are_components_of_the_inputs(make):
    """The same batch twice shows exactly those of its inputs."""
    base = make["uneven"]()
    row = sequences()[0]
    config = RecoveryConfig(per_device_train_batch_size=8)
    inputs = {}
    name = "model.layers.1.mlp.down_proj"
    handle = base.get_submodule(name).register_forward_pre_hook(
        lambda _, given: inputs.update(x=given[0][0])
    )
    with torch.no_grad():
        base(input_ids=row.tokens[None])
    handle.remove()
    centered = inputs["x"] - inputs["x"].mean(0)
    right = torch.linalg.svd(centered, full_matrices=False)[2]
    model = start(base, "eva", ranks=(2, 2, 2), config=config, data=[row]).model
    down = weight_of(adapted_modules(model)[name], "lora_A").detach()
    likeness = (down * right[: len(down)]).sum(1).abs()
    torch.testing.assert_close(likeness, torch.ones(len(down)), rtol=0, atol=1e-3)


def test_eva_ends_where_data_are_few_and_ranks_high(make):
    row = TrainingSequence(torch.tensor([5, 6]), torch.tensor([5, 6]))
    config = RecoveryConfig(per_device_train_batch_size=1, target_modules=("q_proj",))
    model = start(make["uneven"](), "eva", ranks=(8, 8, 8), config=config, data=[row]).finish()
    assert sum(adapter_ranks(model).values()) == 24


def test_eva_needs_sequences(make):
    with pytest.raises(CorpusError, match="EVA reads the corpus, which is empty"):
        start(make["uneven"](), "eva", data=[])


# ---------------------------------------------------------------------------------- names, patterns


@st.composite
def methods(draw) -> Method:
    name = draw(st.sampled_from(sorted(METHODS)))
    on = draw(st.sets(st.sampled_from(METHODS[name])))
    inits = [switch for switch in sorted(on) if switch in INITS]
    if "dora" in on and "pissa" in inits:
        inits.remove("pissa")
    ranks = ()
    if name == "pattern":
        ranks = tuple(draw(st.lists(st.integers(0, 99), min_size=1).filter(any)))
    if name == "squeeze":
        ranks = draw(st.sampled_from([(), (16,)]))
    flags = dict.fromkeys(on - {*INITS}, True)
    return Method(name, ranks, init=inits[0] if inits else "random", **flags)


@given(methods())
def test_a_method_is_read_as_it_is_written(method):
    assert parse_method(str(method)) == method
    assert parse_method(f"  {str(method).upper().replace('+', ' + ')} ") == method


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("LoRA+DoRA", "dora"),
        ("rslora + dora", "dora+rslora"),
        ("rankadaptor+pissa", "rankadaptor+pissa"),
        ("pattern: 04-6", "pattern:4-6"),
        ("compensate+gradient+distill", "gradient+distill+compensate"),
        ("LoRA+EVA", "lora+eva"),
        ("distill+eva", "lora+eva+distill"),
        ("squeeze: 016", "squeeze:16"),
        ("lora", "lora"),
    ],
)
def test_a_method_has_one_written_form(text, written):
    assert str(parse_method(text)) == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Unknown recovery method ''. Give one of: lora, rankadaptor"),
        ("adlora", "Unknown recovery method 'adlora'. Did you mean 'adalora'?"),
        ("lora:4", "Unknown recovery method 'lora:4'"),
        ("gradient+pissa", "has two kinds of first weights, gradient and pissa"),
        ("squeeze:4-8", "trains at one rank"),
        ("squeeze:", "has no list of ranks"),
        ("none+distill", "none cannot be combined with distill: it takes only compensate"),
        ("lora+rslra", "Did you mean 'rslora'?"),
        ("eva+", "Unknown switch ''"),
        ("adalora+dora", "adalora cannot be combined with dora: it takes only distill or"),
        ("none+pissa", "none cannot be combined with pissa"),
        ("eva+pissa", "eva cannot be combined with pissa: it takes only dora or rslora or"),
        ("lora-fa+rslora", "lora-fa cannot be combined with rslora"),
        ("dora+pissa", "Choose one of the two"),
        ("pattern", "has no list of ranks"),
        ("pattern:", "has no list of ranks"),
        ("pattern:4-x", "has no list of ranks"),
        ("pattern:0-0", "has no list of ranks"),
        ("pattern:4--6", "has no list of ranks"),
        ("pattern:²", "has no list of ranks"),
    ],
)
def test_what_is_no_method_is_refused_in_one_line(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_method(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(
    ranks=st.lists(st.integers(0, 99), min_size=1, max_size=12).filter(any), more=st.integers(0, 40)
)
def test_a_pattern_is_spread_in_order_over_blocks_of_equal_size(ranks, more):
    layers = len(ranks) + more
    spread = [
        (rank, len(list(run)))
        for rank, run in itertools.groupby(i * len(ranks) // layers for i in range(layers))
    ]
    allocation = pattern_allocation(ranks, layers)
    assert allocation.ranks == tuple(ranks[block] for block, size in spread for _ in range(size))
    assert [block for block, _ in spread] == list(range(len(ranks)))
    assert max(size for _, size in spread) - min(size for _, size in spread) <= 1


def test_the_pattern_of_the_paper_has_a_rank_per_quarter():
    expected = (4,) * 8 + (6,) * 8 + (10,) * 8 + (12,) * 8
    assert pattern_allocation((4, 6, 10, 12), 32).ranks == expected


def test_a_pattern_has_its_own_ranks(make):
    model = start(make["uneven"](), "pattern:1-2-3", ranks=(4, 4, 4)).finish()
    expected = module_ranks(make["uneven"](), RankAllocation((1, 2, 3)))
    assert adapter_ranks(model) == expected


def test_lora_is_the_adapter_that_has_always_been(make):
    expected = attach(make["uneven"](), RankAllocation((4, 2, 3)), seed=5)
    for name in ("lora", "rankadaptor"):
        assert same(weights(start(make["uneven"](), name, seed=5).model), weights(expected))


# ------------------------------------------------------------------------------------------ squeeze


def test_squeeze_spends_its_budget_where_singular_values_are_worth_most(make):
    base = make["uneven"]()
    tuned = start(base, "squeeze:9", ranks=(4, 4, 4), steps=8)
    train(tuned, steps=8)
    model = tuned.finish()
    ranks = adapter_ranks(model)
    costs = {name: sum(matrix_shape(bare_model(model).get_submodule(name))) for name in ranks}
    budget = sum(4 * cost for cost in costs.values())
    spent = sum(ranks[name] * cost for name, cost in costs.items())
    assert budget - max(costs.values()) < spent <= budget
    assert len(set(ranks.values())) > 1


def test_the_ranks_of_modules_become_an_allocation_of_the_space(make):
    base = make["uneven"]()
    space = rank_space(base, [True] * 3, RankSpaceConfig(candidates=(1, 2, 3, 4), default_rank=2))
    names = list(module_ranks(base, RankAllocation((1, 1, 1))))
    ranks = {name: {"0": 4, "1": 2, "2": 1}[name.split(".")[2]] for name in names}
    found = nearest_allocation(base, ranks, space, 0)
    assert found.ranks[0] > found.ranks[2]
    assert space.contains(found)
    free = replace(space, budget=None)
    assert nearest_allocation(base, ranks, free, 0).ranks == (4, 2, 1)
