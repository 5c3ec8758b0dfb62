from __future__ import annotations

import weakref

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from rankadaptor_plugin.config.tables import PruneConfig
from rankadaptor_plugin.core.errors import (
    ConfigError,
    CorpusError,
    RankAdaptorError,
    UnsupportedModelError,
)
from rankadaptor_plugin.models.structures import Member, hidden_units, layer_units
from rankadaptor_plugin.pruning import calibration, importance
from rankadaptor_plugin.pruning.gradients import stream_gradients, stream_inputs
from rankadaptor_plugin.pruning.importance import unit_scores

TERMS = ("first", "second", "mix", "vectorize")


def seeded(cls, config, **changes):
    torch.manual_seed(0)
    return cls(config(**{"vocab_size": 96, "initializer_range": 0.3, **changes})).eval()


def tiny(**changes) -> LlamaForCausalLM:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
    }
    return seeded(LlamaForCausalLM, LlamaConfig, **{**sizes, **changes})


def shared() -> LlamaForCausalLM:
    model = tiny()
    model.model.layers[2].mlp = model.model.layers[0].mlp
    return model


def gpt2() -> GPT2LMHeadModel:
    return seeded(
        GPT2LMHeadModel, GPT2Config, n_embd=32, n_layer=2, n_head=4, n_inner=40, resid_pdrop=0.5
    )


def falcon() -> FalconForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return seeded(FalconForCausalLM, FalconConfig, **sizes, ffn_hidden_size=24)


def opt() -> OPTForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24}
    return seeded(OPTForCausalLM, OPTConfig, **sizes, word_embed_proj_dim=32, dropout=0.5)


def units_of(model):
    """Per layer the units of attention and MLP."""
    return [kind for layer in layer_units(model) for kind in layer]


@pytest.fixture
def samples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 96, (t,), generator=generator) for t in (12, 5, 9)]


def settings(importance="taylor", taylor="first", group_reduction="sum") -> PruneConfig:
    return PruneConfig(importance=importance, taylor=taylor, group_reduction=group_reduction)


def lines_of(member, elements):
    return elements.sum(1 if member.side == "out" else 0)


def naive(model, kinds, samples, measure, reduction="sum"):
    """What the definitions say, word by word; `measure` gives a member's row or column scores."""
    reduce = {
        "sum": sum,
        "mean": lambda scores: sum(scores) / len(scores),
        "max": lambda scores: torch.stack(scores).max(0).values,
        "first": lambda scores: scores[0],
    }[reduction]
    found = []
    for units in kinds:
        scores = []
        for m in units:
            lines = measure(m)
            scores.append(
                torch.stack([sum((lines[i] for i in own), torch.zeros(())) for own in m.indices])
            )
        found.append(reduce(scores))
    return found


def naive_taylor(model, kinds, samples, term, reduction="sum"):
    own = []  # by sequence, the gradients of its own mean loss
    for sample in samples:
        model.zero_grad()
        logits = model(input_ids=sample[None], use_cache=False).logits[0]
        cross_entropy(logits[:-1].float(), sample[1:]).backward()
        gradients = {}
        for module in {m.module for units in kinds for m in units}:
            g = module.weight.grad.float()
            gradients[module] = g.T if type(module).__name__ == "Conv1D" else g
        own.append(gradients)
    model.zero_grad()

    def measure(m):
        w = m.weight.detach().float()
        gs = [gradients[m.module] for gradients in own]
        g, second = sum(gs) / len(gs), sum((g_j * w) ** 2 for g_j in gs)
        elements = {
            "first": (g * w).abs(),
            "second": second,
            "mix": (g * w - 0.5 * second).abs(),
            "vectorize": g * w,
        }[term]
        lines = lines_of(m, elements)
        return lines.abs() if term == "vectorize" else lines

    return naive(model, kinds, samples, measure, reduction)


def same(found, expected, **tolerance):
    tolerance = tolerance or {"rtol": 2e-4, "atol": 1e-9}
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.dtype, ours.device.type) == (torch.float32, "cpu")
        torch.testing.assert_close(ours, theirs, **tolerance)


# ------------------------------------------------------------------------------------ Taylor


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4, "tie_word_embeddings": True}])
def test_taylor_equals_a_naive_computation(changes, term, samples):
    model = tiny(**changes)
    kinds = units_of(model)
    found = unit_scores(model, kinds, samples, settings(taylor=term))
    same(found, naive_taylor(model, kinds, samples, term))
    assert [len(scores) for scores in found] == [model.config.num_key_value_heads, 24] * 3


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("build", [gpt2, falcon, opt])
def test_other_linear_layers_and_dropout(build, term, samples):
    model = build()
    model.train()  # must not switch dropout on
    kinds = units_of(model)
    found = unit_scores(model, kinds, samples, settings(taylor=term))
    same(found, naive_taylor(model.eval(), kinds, samples, term))


@pytest.mark.parametrize("term", TERMS)
def test_a_matrix_is_scored_in_pieces(term, samples, monkeypatch):
    monkeypatch.setattr(importance, "_CHUNK", 100)
    model = tiny()
    kinds = units_of(model)
    found = unit_scores(model, kinds, samples, settings(taylor=term))
    same(found, naive_taylor(model, kinds, samples, term))


@pytest.mark.parametrize("term", TERMS)
def test_bfloat16_gives_float32_scores_that_are_close(term, samples):
    model = tiny(initializer_range=0.05)
    kinds = units_of(model)
    expected = naive_taylor(model, kinds, samples, term)
    model.to(torch.bfloat16)
    found = unit_scores(model, kinds, samples, settings(taylor=term))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.1 * theirs.norm()


def test_units_through_all_layers_beside_units_of_one(samples):
    model = tiny()
    matrix = model.model.layers[2].mlp.down_proj
    none = Member(
        name="mlp.down_proj", module=matrix, side="out", indices=torch.empty(32, 0, dtype=int)
    )
    kinds = [*units_of(model), (*hidden_units(model), none), ()]
    *found, nothing = unit_scores(model, kinds, samples, settings(taylor="mix"))
    same(found, naive_taylor(model, kinds[:-1], samples, "mix"))
    assert nothing.shape == (0,)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("sums", [1, 3000, 2**20])
@pytest.mark.parametrize("build", [tiny, shared, gpt2])
def test_sequences_in_several_passes_score_the_same(build, sums, term, samples, monkeypatch):
    model = build()
    kinds = units_of(model)
    expected = naive_taylor(model, kinds, samples, term)
    for inputs in (1, 24 * model.config.num_hidden_layers * 32 * 4):
        monkeypatch.setattr(calibration, "LIMITS", calibration.Limits(inputs, sums))
        same(unit_scores(model, kinds, samples, settings(taylor=term)), expected)


def hungry(model, most):
    """Lets a model run out of memory with more than so many sequences."""

    def run_out(module, args, kwargs):
        if len(kwargs["input_ids"]) > most:
            raise RuntimeError("CUDA error: out of memory")

    model.model.register_forward_pre_hook(run_out, with_kwargs=True)
    return model


def test_too_little_memory_halves_the_pass(samples, caplog):
    model = tiny()
    expected = naive_taylor(model, units_of(model), samples, "mix")
    hungry(model, 1)
    before = snapshot(model)
    same(unit_scores(model, units_of(model), samples, settings(taylor="mix")), expected)
    assert "Out of memory: 3 calibration sequences in 3 passes" in caplog.text
    check_snapshot(model, before)
    with pytest.raises(RankAdaptorError, match="with one calibration sequence at a time"):
        unit_scores(hungry(model, 0), units_of(model), samples, settings())


@pytest.mark.parametrize("term", TERMS)
def test_a_matrix_that_is_used_twice_counts_whole(term, samples):
    model = shared()
    kinds = units_of(model)[:2]
    found = unit_scores(model, kinds, samples, settings(taylor=term))
    same(found, naive_taylor(model, kinds, samples, term))


def test_a_use_without_effect_on_the_loss_does_not_count(samples):
    model = tiny()
    kinds = units_of(model)
    expected = unit_scores(model, kinds, samples, settings())
    mlp = model.model.layers[1].mlp

    def use_in_vain(mlp, args, output):
        mlp.up_proj(args[0])

    mlp.register_forward_hook(use_in_vain)
    same(unit_scores(model, kinds, samples, settings()), expected)


@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "first"])
def test_reductions(reduction, samples):
    model = tiny()
    kinds = units_of(model)
    found = unit_scores(model, kinds, samples, settings(taylor="mix", group_reduction=reduction))
    same(found, naive_taylor(model, kinds, samples, "mix", reduction))


# ------------------------------------------------------------------------- the other importances


def test_magnitude_needs_no_sequences():
    model = tiny()
    kinds = units_of(model)
    found = unit_scores(model, kinds, [], settings("magnitude"))
    same(found, naive(model, kinds, [], lambda m: lines_of(m, m.weight.detach().abs())))


@pytest.mark.parametrize("build", [tiny, shared, gpt2, opt])
def test_wanda_equals_a_naive_computation(build, samples):
    model = build()
    kinds = units_of(model)
    inputs = {m.module: [] for units in kinds for m in units}
    hooks = [
        module.register_forward_hook(lambda module, args, _: inputs[module].append(args[0]))
        for module in inputs
    ]
    with torch.no_grad():
        for sample in samples:
            model(input_ids=sample[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    norms = {
        module: torch.cat([x.flatten(0, -2) for x in xs]).norm(dim=0)
        for module, xs in inputs.items()
    }
    found = unit_scores(model, kinds, samples, settings("wanda"))
    same(
        found,
        naive(
            model,
            kinds,
            samples,
            lambda m: lines_of(m, m.weight.detach().abs() * norms[m.module]),
        ),
    )
    assert not any(module._forward_pre_hooks for module in inputs)


def test_random_scores_follow_the_seed_and_make_no_gradients(samples):
    model = tiny()
    kinds = units_of(model)
    torch.manual_seed(3)
    first, second = (unit_scores(model, kinds, samples, settings("random")) for _ in range(2))
    torch.manual_seed(3)
    again = unit_scores(model, kinds, samples, settings("random"))
    same(again, first, rtol=0, atol=0)
    assert not torch.equal(first[1], second[1])
    assert [len(scores) for scores in first] == [2, 24] * 3
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------ traces and memory


def snapshot(model):
    return (
        [m.training for m in model.modules()],
        [(p.requires_grad, p.grad, p.clone()) for p in model.parameters()],
        [set(vars(m)) for m in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [m.forward for m in model.modules()],
    )


def check_snapshot(model, before):
    modes, parameters, *rest = snapshot(model)
    assert [modes, *rest] == [before[0], *before[2:]]
    for (flag, grad, value), (flag_0, grad_0, value_0) in zip(parameters, before[1], strict=True):
        assert flag == flag_0
        assert grad is grad_0
        assert torch.equal(value, value_0)


def used(**changes):
    """A model in the midst of other work: mixed modes and flags, and a gradient of its own."""
    model = tiny(**changes)
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    return model


@pytest.mark.parametrize("name", ["taylor", "wanda", "magnitude", "random"])
def test_the_model_is_left_as_it_was(name, samples):
    model = used()
    before = snapshot(model)
    with torch.no_grad():
        unit_scores(model, units_of(model), samples, settings(name))
    check_snapshot(model, before)
    assert model.config.use_cache is True


class Trouble(BaseException):
    """Such as KeyboardInterrupt, which is no Exception either."""


@pytest.mark.parametrize("when", ["forward", "repeated forward", "backward", "wanda"])
def test_the_model_is_left_as_it_was_after_an_exception(when, samples):
    model = used()
    calls = []

    def trouble(*_):
        calls.append(1)
        if len(calls) == {"forward": 1, "wanda": 1, "repeated forward": 2}.get(when):
            raise Trouble

    def trouble_on_the_way_back(*_):
        raise Trouble

    norm = model.model.layers[1].input_layernorm
    norm.register_forward_hook(trouble)
    if when == "backward":
        norm.register_full_backward_hook(trouble_on_the_way_back)
    before = snapshot(model)
    with pytest.raises(Trouble):
        unit_scores(
            model, units_of(model), samples, settings("wanda" if when == "wanda" else "taylor")
        )
    check_snapshot(model, before)


def test_no_parameter_ever_has_a_gradient(samples):
    model = tiny()
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_full_backward_hook(
            lambda *_: seen.append([p.grad for p in model.parameters() if p.grad is not None])
        )
    unit_scores(model, units_of(model), samples, settings())
    assert seen == [[], [], []]


def test_inputs_come_without_gradients_sequence_by_sequence(samples):
    model = tiny()
    model.enable_input_require_grads()
    masks, inputs = [], []
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    matrices = units_of(model)[1]
    stream_inputs(model, matrices, samples, lambda _, x: inputs.append(x))
    assert [mask.sum().item() for mask in masks] == [12, 5, 9]
    assert not any(x.requires_grad for x in inputs)
    assert [x.shape[0] for x in inputs] == [12] * 3 + [5] * 3 + [9] * 3


def test_what_was_handed_over_is_given_up(samples):
    model = tiny(num_hidden_layers=6)
    matrices = list({m.module: m for units in units_of(model) for m in units}.values())
    handed, alive = [], []

    def receive(_, *tensors):
        handed.extend(weakref.ref(tensor.untyped_storage()) for tensor in tensors)
        alive.append(sum(ref() is not None for ref in handed))

    stream_gradients(model, matrices, samples, receive)
    assert len(alive) == len(matrices) == 42
    assert max(alive) <= 6  # of 84: inputs and gradient of this matrix, and what others share


def test_layers_are_recomputed_and_what_is_below_the_lowest_matrix_is_not(samples):
    model = tiny()
    calls = []
    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, i=index: calls.append(i))
    unit_scores(model, units_of(model)[2:], samples, settings())
    assert calls == [0, 1, 2, 2, 1]


def test_a_model_under_accelerate(samples, tmp_path):
    tiny().save_pretrained(tmp_path)
    plain = tiny()
    expected = unit_scores(plain, units_of(plain), samples, settings())
    model = LlamaForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    same(unit_scores(model, units_of(model), samples, settings()), expected)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    before = snapshot(model)
    assert "forward" in vars(model.model.layers[0].mlp.up_proj)
    same(unit_scores(model, units_of(model), samples, settings()), expected)
    check_snapshot(model, before)


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["taylor", "wanda", "magnitude", "random"])
def test_an_offloaded_matrix_is_an_error(name, samples):
    model = tiny()
    cpu_offload(model.model.layers[1], torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match=r"Layer 1: self_attn.q_proj is offloaded"):
        unit_scores(model, units_of(model), samples, settings(name))


@pytest.mark.parametrize("name", ["taylor", "wanda", "magnitude"])
def test_a_bad_weight_is_named(name, samples):
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(RankAdaptorError, match=r"Layer 1: mlp.up_proj has weights that are not"):
        unit_scores(model, units_of(model), samples, settings(name))
    assert all(p.grad is None for p in model.parameters())


def test_a_bad_weight_beside_the_scored_ones_is_named(samples):
    model = tiny()
    model.model.norm.weight.data[0] = torch.inf
    with pytest.raises(RankAdaptorError, match=r"model.norm has weights that are not finite"):
        unit_scores(model, units_of(model), samples, settings())


def test_a_bad_gradient_names_the_matrix_where_it_begins(samples):
    model = tiny()
    model.model.layers[1].mlp.up_proj.register_full_backward_hook(
        lambda _, grads_in, __: tuple(g * torch.inf for g in grads_in)
    )
    message = r"Layer 1: self_attn.o_proj has gradients .* first of 11 such .* the backward pass"
    with pytest.raises(RankAdaptorError, match=message):
        unit_scores(model, units_of(model), samples, settings())


def test_an_overflow_of_float16_is_named(samples):
    model = tiny().to(torch.float16)
    model.model.layers[1].mlp.down_proj.weight.data *= 1e4
    model.model.layers[1].mlp.up_proj.weight.data *= 1e4
    with pytest.raises(RankAdaptorError, match=r'gradients that are not finite.*dtype = "float32"'):
        unit_scores(model, units_of(model), samples, settings())
    with pytest.raises(RankAdaptorError, match=r"Layer 1: mlp.down_proj has inputs .* forward"):
        unit_scores(model, units_of(model), samples, settings("wanda"))


@pytest.mark.parametrize("name", ["taylor", "wanda"])
def test_a_matrix_that_the_loss_does_not_depend_on(name, samples):
    model = tiny()
    units = (
        Member(name="x", module=nn.Linear(4, 4), side="out", indices=torch.arange(4)[:, None]),
    )
    for kinds in ([units], [*units_of(model), units]):
        with pytest.raises(RankAdaptorError, match="The loss has no gradient for a matrix"):
            unit_scores(model, kinds, samples, settings(name))


def test_tokens_in_another_arrangement_are_an_error(samples):
    model = tiny()
    linear = model.model.layers[1].mlp.up_proj
    hook = linear.register_forward_pre_hook(lambda _, args: (args[0].transpose(0, 1),))
    linear.register_forward_hook(lambda _, __, out: out.transpose(0, 1))
    with pytest.raises(UnsupportedModelError, match=r"up_proj gets a tensor of shape \(12, 3,"):
        unit_scores(model, units_of(model), samples, settings())
    hook.remove()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"importance": "magic"}, r'importance "magic" is unknown. Use one of: magnitude, random,'),
        ({"importance": "ppl"}, r'"ppl" is unknown for other methods than "depth". Use one of: m'),
        ({"taylor": "third"}, r'taylor "third" is unknown. Use one of: first, mix, second, vec'),
        (
            {"group_reduction": "prod"},
            r'group_reduction "prod" is unknown. Use one of: first, max, mean, sum',
        ),
    ],
)
def test_unknown_names_are_errors(changes, message, samples):
    model = tiny()
    with pytest.raises(ConfigError, match=message):
        unit_scores(model, units_of(model), samples, settings(**changes))


@pytest.mark.parametrize("name", ["taylor", "wanda"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "no calibration sequences"),
        ([torch.tensor([3])], r"sequence 0 has shape \(1,\)"),
        ([torch.tensor([[3, 4]])], r"sequence 0 has shape \(1, 2\)"),
        ([torch.tensor([3, 4]), torch.tensor([3, 96])], "sequence 1 has tokens from 3 to 96"),
    ],
)
def test_unusable_sequences_are_errors(bad, message, name):
    model = tiny()
    with pytest.raises(CorpusError, match=message):
        unit_scores(model, units_of(model), bad, settings(name))
