"""Log-likelihoods: lm-eval's values, by fewer tokens, for every family and any budget."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM

from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.models.pruned_model import PrunedModel
from rankadaptor_plugin.models.structures import decoder_layers, layer_widths
from rankadaptor_plugin.oracle import loglikelihood, loglikelihood_plan
from rankadaptor_plugin.oracle.loglikelihood import loglikelihoods, plan
from rankadaptor_plugin.recovery.adapters import attach, trainable_parameters
from rankadaptor_plugin.testing.families import choose_cuts, remove_units, tiny_tokenizer

MAX_LENGTH = 48
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GQA = {**SIZES, "num_key_value_heads": 2}
GEMMA = {**GQA, "head_dim": 8}
WINDOW = {"sliding_window": 6}
FALCON = {**SIZES, "ffn_hidden_size": 24, "new_decoder_architecture": False}
FAMILIES = {
    "llama": ("Llama", SIZES),
    "llama-gqa": ("Llama", GQA),
    "llama-mqa": ("Llama", {**SIZES, "num_key_value_heads": 1}),
    "llama-biases-tied": (
        "Llama",
        {**GQA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("Mistral", {**GQA, **WINDOW}),
    "qwen2": ("Qwen2", GQA),
    "qwen2-window": (
        "Qwen2",
        {**GQA, **WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {**GQA, "head_dim": 8}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", {**GEMMA, **WINDOW, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", {**GEMMA, **WINDOW, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", SIZES),
    "phi3-gqa": ("Phi3", GQA),
    "opt": ("OPT", {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 32}),
    "gpt-neox": ("GPTNeoX", SIZES),
    "bloom": ("Bloom", {**SIZES, "n_layer": 4, "n_head": 4}),
    "falcon-multi-query": ("Falcon", FALCON),
    "falcon-gqa": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-classic": ("Falcon", {**FALCON, "multi_query": False}),
    "falcon-alibi": ("Falcon", {**FALCON, "multi_query": False, "alibi": True}),
    "gpt2": ("GPT2", {**SIZES, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 24}),
}


def family(name: str, attention: str):
    """A tiny model far from its initial weights, whose constants hide mistakes."""
    kind, sizes = FAMILIES[name]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(
            bos_token_id=1, eos_token_id=2, attn_implementation=attention, **sizes
        )
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def make_requests(model, documents: int = 8):
    """Choices of several lengths for contexts of several lengths, some of them too long."""
    rng = np.random.default_rng(0)

    def tokens(least, most):
        return rng.integers(3, 40, rng.integers(least, most)).tolist()

    requests = []
    for _ in range(documents):
        context = tokens(12, MAX_LENGTH)
        answers = [[3], [4], [3, *tokens(1, 4)], tokens(2, 8)]
        requests += [(context, answer) for answer in (*answers, greedy(model, context))]
    return [*requests, requests[1], ([5], tokens(3, 4)), (tokens(60, 61), tokens(2, 3))]


@torch.no_grad()
def greedy(model, context):
    tokens = list(context)
    for _ in range(2):
        tokens.append(model(torch.tensor([tokens[-MAX_LENGTH:]])).logits[0, -1].argmax().item())
    return tokens[len(context) :]


@torch.no_grad()
def one_by_one(model, requests, max_length=MAX_LENGTH):
    sums, hits = [], []
    for context, continuation in requests:
        whole = torch.tensor([*context, *continuation])[-max_length - 1 :]
        logits = model(whole[None, :-1], use_cache=False).logits[0, -len(continuation) :].float()
        target = whole[-len(continuation) :]
        sums.append(logits.log_softmax(1).gather(1, target[:, None]).sum().item())
        hits.append(torch.equal(logits.argmax(1), target))
    return np.array(sums), np.array(hits)


def planned(requests, **changes):
    return plan(requests, **{"max_length": MAX_LENGTH, "batch_tokens": 4096, **changes})


def check(model, requests, expected, tolerance=1e-4, **limits):
    sums, hits = loglikelihoods(model, planned(requests, **limits))
    np.testing.assert_allclose(sums, expected[0], rtol=0, atol=tolerance)
    np.testing.assert_array_equal(hits, expected[1])


@pytest.fixture
def model(make_llama):
    return make_llama()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_equals_lm_eval(model, make_tokenizer, batch_size):
    requests = make_requests(model)
    lm = HFLM(
        pretrained=model,
        tokenizer=make_tokenizer(),
        batch_size=batch_size,
        max_length=MAX_LENGTH,
    )
    answers = lm._loglikelihood_tokens([(None, *r) for r in requests], disable_tqdm=True)
    check(model, requests, tuple(map(np.array, zip(*answers, strict=True))), 2e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_single_unpadded_requests_in_every_family(name, attention):
    if attention == "sdpa" and name in ("bloom", "gemma2"):
        pytest.skip("the family has its own attention")
    model = family(name, attention)
    requests = make_requests(model)
    expected = one_by_one(model, requests)
    assert expected[1].sum() >= 8
    assert planned(requests).shared
    check(model, requests, expected)
    assert loglikelihood._shares[model]


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma3", "falcon-alibi", "gpt2", "opt"])
def test_an_uneven_model_with_an_adapter_is_scored_and_still_trains(name):
    model = family(name, "eager")
    remove_units(model, choose_cuts(model))
    model = PrunedModel.of(model, tiny_tokenizer()).model
    assert len(set(layer_widths(model))) > 1
    model.config.use_cache = False
    layers = len(decoder_layers(model))
    adapted = attach(model, RankAllocation((2,) * layers), seed=0)
    requests = make_requests(model)
    adapted.eval()
    before = loglikelihoods(adapted, planned(requests))[0]
    tokens = torch.arange(3, 33)[None]
    optimizer = torch.optim.SGD(trainable_parameters(adapted), lr=0.1)
    for _ in range(2):
        adapted.train()
        torch.autograd.backward(adapted(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        adapted.eval()
        check(adapted, requests, one_by_one(adapted, requests))
    assert not np.allclose(loglikelihoods(adapted, planned(requests))[0], before)
    assert model.config.use_cache is False


TOKENS = st.lists(st.integers(3, 8), min_size=1, max_size=12)


@settings(max_examples=60)
@given(
    requests=st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=12),
    contexts=st.lists(TOKENS, max_size=2),
    batch_tokens=st.integers(1, 200),
    max_length=st.integers(12, 40),
    cost=st.sampled_from([0, loglikelihood_plan.PASS]),  # at none, all is shared that can be
)
def test_any_budget_gives_the_same(make_llama, requests, contexts, batch_tokens, max_length, cost):
    model = make_llama()
    for context in contexts:
        requests = requests + [(context * 2, continuation) for _, continuation in requests]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loglikelihood_plan, "PASS", cost)
        made = plan(requests, max_length=max_length, batch_tokens=batch_tokens)
    sums, hits = loglikelihoods(model, made)
    expected = one_by_one(model, requests, max_length)
    np.testing.assert_allclose(sums, expected[0], rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(hits, expected[1])
    sizes = [forward.tokens.shape for forward in (*made.plain, *made.single)]
    sizes += [shared.suffix.mask.shape for shared in made.shared]
    for rows, length in sizes:
        assert rows == 1 or rows * length <= batch_tokens


def test_one_token_answers_cost_one_row():
    context = [5, 6, 7]
    assert planned([(context, [8]), (context, [9])]).tokens == 3


def test_the_beginning_of_another_input_costs_nothing():
    assert planned([([5, 6], [7, 8, 9]), ([5, 6], [7]), ([5], [6, 8])]).tokens == 4


def test_equal_requests_tie_exactly(model):
    requests = make_requests(model)
    sums, _ = loglikelihoods(model, planned([*requests, *requests]))
    np.testing.assert_array_equal(sums[: len(requests)], sums[len(requests) :])


def test_shared_contexts_are_computed_once(model):
    """Counted at the embeddings; four choices, none of which another row can answer."""
    rng = np.random.default_rng(0)
    requests = []
    for length in range(30, 40):
        context = rng.integers(3, 40, length).tolist()
        requests += [(context, [first, 3, 4]) for first in (10, 11, 12, 13)]
    made = planned(requests)
    loglikelihoods(model, made)  # compares both ways
    seen = []
    handle = model.model.embed_tokens.register_forward_hook(lambda _, i, __: seen.append(i[0]))
    loglikelihoods(model, made)
    handle.remove()
    assert sum(tokens.numel() for tokens in seen) == made.tokens
    assert made.tokens < 0.4 * made.plain_tokens
    assert len(seen) == 2


def test_a_beginning_within_the_context_is_shared(model):
    """As in Winogrande: another context, the same continuation; nothing is read off prefixes."""
    rng = np.random.default_rng(0)
    requests = []
    for length in range(25, 30):
        start, end = rng.integers(3, 40, length).tolist(), rng.integers(3, 40, 4).tolist()
        requests += [([*start, option], end) for option in (5, 6, 7)]
    made = planned(requests)
    assert made.shared
    assert not made.shared[0].prefix.places.numel()
    check(model, requests, one_by_one(model, requests))


def test_logits_are_made_only_where_one_is_read(model):
    requests = make_requests(model)
    made = planned(requests)
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda _, __, o: shapes.append(o.shape))
    loglikelihoods(model, made)
    handle.remove()
    most = sum(len(continuation) for _, continuation in requests)
    passes = [*made.single, *(f for s in made.shared for f in (s.prefix, s.suffix))]
    assert [s[1] for s in shapes[-len(passes) :]] == [f.places.numel() for f in passes]
    assert sum(f.places.numel() for f in passes) < most


def test_a_head_that_cannot_be_hooked_gives_the_same(model):
    requests = make_requests(model)
    expected = one_by_one(model, requests)
    model.get_output_embeddings = lambda: None
    check(model, requests, expected)


class Forgetful(LlamaForCausalLM):
    """Looks at the last tokens alone."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, **rest):
        past = rest.pop("past_key_values", None)
        output = super().forward(input_ids, use_cache=use_cache)
        output.past_key_values = past or output.past_key_values
        return output


class Uncached(LlamaForCausalLM):
    """Knows no cache."""

    def forward(self, input_ids):
        return super().forward(input_ids, use_cache=False)


@pytest.mark.parametrize("kind", [Forgetful, Uncached])
def test_a_model_that_cannot_share_computes_whole_rows(model, caplog, kind):
    requests = make_requests(model)
    expected = one_by_one(model, requests)
    other = kind(model.config).eval()
    other.load_state_dict(model.state_dict())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            check(other, requests, expected)
    (message,) = caplog.messages
    assert message.startswith(f"{kind.__name__} computes something else behind a shared prefix.")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_shares_and_sums_in_float32(make_llama, dtype):
    model = make_llama().to(dtype)
    requests = make_requests(model)
    expected, _ = one_by_one(model, requests)
    sums, _ = loglikelihoods(model, planned(requests))
    assert loglikelihood._shares[model]
    np.testing.assert_allclose(sums, expected, atol=0.3)
    assert (sums != torch.tensor(sums).to(dtype).double().numpy()).any()


def test_logits_are_normalized_piece_by_piece(model, monkeypatch):
    requests = make_requests(model)
    expected = loglikelihoods(model, planned(requests))
    monkeypatch.setattr(loglikelihood, "_CHUNK", 3 * 40)
    check(model, requests, expected, 1e-6)


def test_what_is_not_a_number_passes_and_decides_nothing(make_llama, caplog):
    model = make_llama()
    requests = make_requests(model)
    weights = model.lm_head.weight.detach().clone()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    sums, _ = loglikelihoods(model, planned(requests))
    assert np.isnan(sums).all()
    model.lm_head.weight.data = weights
    check(model, requests, one_by_one(model, requests))
    assert loglikelihood._shares[model]
    assert not caplog.messages


def test_no_requests_give_no_values(model):
    sums, hits = loglikelihoods(model, planned([]))
    assert sums.shape == hits.shape == (0,)
    assert sums.dtype == np.float64
    assert hits.dtype == bool


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], [3]), "Request 1 has an empty context."),
        (([3], []), "Request 1 has an empty continuation."),
        (([3], [4] * 49), "The continuation of request 1 has 49 tokens; at most 48 are allowed."),
    ],
)
def test_an_impossible_request_is_named_in_one_line(request_, message):
    with pytest.raises(OracleError, match=message) as error:
        planned([([3], [4]), request_])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("limit", "value"), [("max_length", 0), ("batch_tokens", 0)])
def test_a_limit_too_small_is_refused(limit, value):
    with pytest.raises(ConfigError, match=f"{limit} is {value}. Allowed: at least"):
        planned([([3], [4])], **{limit: value})
