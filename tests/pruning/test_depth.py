from __future__ import annotations

import copy
import logging
import math
import re

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from rankadaptor_plugin.config.tables import PruneConfig
from rankadaptor_plugin.core.errors import (
    ConfigError,
    CorpusError,
    RankAdaptorError,
    UnsupportedModelError,
)
from rankadaptor_plugin.models.pruned_model import load_pruned
from rankadaptor_plugin.pruning import calibration
from rankadaptor_plugin.pruning.depth import block_list, keep_layers, prune_depth, without_layer

VOCABULARY = 40
BLOCKS = 5
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
}
GEMMA = {"head_dim": 4, "sliding_window": 4}
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        {
            "head_dim": 4,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": [*MIXED, "full_attention"],
        },
    ),
    "gemma": ("GemmaForCausalLM", {"head_dim": 4}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", {**GEMMA, "layer_types": [*MIXED, "sliding_attention"]}),
    "phi3": ("Phi3ForCausalLM", {}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "bloom": ("BloomForCausalLM", {"n_head": 4}),
    "falcon": ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("FalconForCausalLM", {"alibi": True, "new_decoder_architecture": False}),
    "gpt2": ("GPT2LMHeadModel", {}),
}
STATIC = ("llama", "mistral", "qwen2-window", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt2")


def tiny(family: str = "llama", **changes):
    name, own = FAMILIES[family]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**{**SIZES, **own, **changes})).eval()


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def attributes_of(module):
    return {name: value for name, value in vars(module).items() if name[0] != "_"}


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCABULARY, (t,), generator=generator) for t in (12, 5, 9)]


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(2)
    return torch.randint(2, VOCABULARY, (2, 9), generator=generator)


def table(**changes) -> PruneConfig:
    return PruneConfig(**{"method": "depth", "keep_first": 0, "keep_last": 0, **changes})


# ------------------------------------------------------------------------------ blocks taken out


@pytest.mark.parametrize("kept", [(0, 3, 4), (1, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_is_a_stock_model_with_fewer_blocks(family, kept, tokens, tmp_path):
    model = tiny(family)
    stock, weights = type(model), copy.deepcopy(block_list(model).state_dict())
    keep_layers(model, kept)
    assert len(block_list(model)) == model.config.num_hidden_layers == len(kept)
    for key, value in block_list(model).state_dict().items():
        new, _, rest = key.partition(".")
        assert torch.equal(value, weights[f"{kept[int(new)]}.{rest}"])

    fresh = stock(stock.config_class(**model.config.to_dict())).eval()
    fresh.load_state_dict(model.state_dict())
    expected = logits_of(fresh, tokens)
    assert torch.equal(logits_of(model, tokens), expected)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is stock
    assert torch.equal(logits_of(loaded, tokens), expected)
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())

    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kept", [(0, 3, 4), (1, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_that_without(family, kept, tokens):
    model = tiny(family)
    keep_layers(model, kept)
    how = {
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": 6,
        "do_sample": False,
    }
    expected = model.generate(tokens, use_cache=False, **how)
    assert expected.shape == (2, 15)
    assert torch.equal(model.generate(tokens, use_cache=True, **how), expected)
    if family in STATIC:
        found = model.generate(tokens, cache_implementation="static", **how)
        assert torch.equal(found, expected)


def test_what_a_config_says_about_single_blocks_is_cut_with_them():
    model = tiny("qwen2-window", eos_token_id=[2, 3, 4, 5, 6])
    other = tiny("qwen2-window")
    other.config = config = model.config
    keep_layers(model, [0, 3, 4])
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert model.config.max_window_layers == 1
    assert model.config.eos_token_id == [2, 3, 4, 5, 6]
    assert all(part.config is model.config for part in model.modules() if hasattr(part, "config"))
    assert other.config is config
    assert (config.num_hidden_layers, config.max_window_layers) == (5, 3)
    keep_layers(model, [0])
    assert not model.model.has_sliding_layers
    assert [part.layer_idx for part in model.modules() if hasattr(part, "layer_idx")] == [0]


@pytest.mark.parametrize("kept", [[], [0, 5], [-1, 0], [1, 0], [0, 0, 1]])
def test_only_an_ascending_choice_of_blocks_can_be_kept(kept):
    with pytest.raises(ConfigError, match="ascending indices from 0 to 4"):
        keep_layers(tiny(), kept)


def test_blocks_that_would_not_work_elsewhere_are_refused():
    with pytest.raises(UnsupportedModelError, match="scale_attn_by_inverse_layer_idx is on"):
        keep_layers(tiny("gpt2", scale_attn_by_inverse_layer_idx=True), [0])
    model = tiny()
    model.config.model_type = "rankadaptor_llama"
    with pytest.raises(UnsupportedModelError, match="differ in width already"):
        keep_layers(model, [0])
    model = tiny()
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(UnsupportedModelError, match=r"no list of decoder blocks at model\.layers"):
        keep_layers(model, [0])


@pytest.mark.parametrize("index", [0, 2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "bloom", "gpt2"])
def test_a_block_left_out_comes_back(family, index, tokens):
    model, shorter = tiny(family), tiny(family)
    keep_layers(shorter, [i for i in range(BLOCKS) if i != index])
    blocks, config, text = list(block_list(model)), model.config, model.config.to_json_string()
    names, before = list(model.state_dict()), logits_of(model, tokens)
    state = [(part, attributes_of(part)) for part in model.modules()]
    with without_layer(model, index):
        assert torch.equal(logits_of(model, tokens), logits_of(shorter, tokens))
    with pytest.raises(KeyError), without_layer(model, index):
        raise KeyError
    assert list(block_list(model)) == blocks
    assert model.config is config
    assert model.config.to_json_string() == text
    assert list(model.state_dict()) == names
    assert all(attributes_of(part) == was for part, was in state)
    assert torch.equal(logits_of(model, tokens), before)


def test_a_block_that_is_not_there_cannot_be_left_out():
    for index in (-1, 5):
        with pytest.raises(ConfigError, match="from 0 to 4"), without_layer(tiny(), index):
            pass


# -------------------------------------------------------------------------------------- scores


def scores_of(model, samples, tokenizer, **changes):
    """Returns the scores and the numbers of the blocks that went."""
    pruned = prune_depth(model, tokenizer, samples, table(**changes))
    return pruned.provenance["scores"], pruned.provenance["removed_layers"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "opt", "bloom", "falcon", "gpt2"])
def test_taylor_scores_equal_a_naive_computation(family, samples, make_tokenizer):
    model = tiny(family)
    for sample in samples:
        logits = model(input_ids=sample[None]).logits[0]
        (cross_entropy(logits[:-1], sample[1:]) / len(samples)).backward()
    expected = [
        sum((p * p.grad).abs().sum().item() for p in block.parameters())
        for block in block_list(model)
    ]
    scores, removed = scores_of(tiny(family), samples, make_tokenizer(), blocks=2)
    assert scores == pytest.approx(expected, rel=1e-4)
    assert removed == sorted(sorted(range(BLOCKS), key=expected.__getitem__)[:2])


@pytest.mark.parametrize("sums", [1, 12000, 2**20])
def test_taylor_scores_are_the_same_in_several_passes(samples, make_tokenizer, sums, monkeypatch):
    expected = scores_of(tiny(), samples, make_tokenizer(), blocks=2)
    monkeypatch.setattr(calibration, "LIMITS", calibration.Limits(1, sums))
    scores, removed = scores_of(tiny(), samples, make_tokenizer(), blocks=2)
    assert scores == pytest.approx(expected[0], rel=1e-4)
    assert removed == expected[1]


def test_magnitude_scores_equal_a_naive_computation(samples, make_tokenizer):
    model = tiny("opt")
    expected = [sum(p.abs().sum().item() for p in b.parameters()) for b in block_list(model)]
    scores, _ = scores_of(model, samples, make_tokenizer(), importance="magnitude")
    assert scores == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_a_block_scores_by_the_perplexity_without_it(family, samples, make_tokenizer):
    expected = []
    for index in range(BLOCKS):
        model = tiny(family)
        keep_layers(model, [i for i in range(BLOCKS) if i != index])
        losses = [
            cross_entropy(logits_of(model, sample[None])[0, :-1], sample[1:], reduction="none")
            for sample in samples
        ]
        expected.append(math.exp(torch.cat(losses).mean()))
    scores, removed = scores_of(tiny(family), samples, make_tokenizer(), importance="ppl", blocks=1)
    assert scores == pytest.approx(expected, rel=1e-4)
    assert removed == [expected.index(min(expected))]


def test_a_perplexity_beyond_all_numbers_stays_a_number(samples, make_tokenizer):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    scores, _ = scores_of(model, samples, make_tokenizer(), importance="ppl")
    assert all(math.isfinite(score) for score in scores)


def test_random_scores_come_from_the_global_generator(samples, make_tokenizer):
    tokenizer, found = make_tokenizer(), []
    for seed in (1, 1, 2):
        model = tiny()
        torch.manual_seed(seed)
        found.append(scores_of(model, samples, tokenizer, importance="random")[0])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("importance", ["taylor", "magnitude", "ppl", "random"])
def test_the_model_is_left_as_it_was(importance, samples, make_tokenizer):
    model = tiny()
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(16)
    state = {
        id(p): (p.requires_grad, None if p.grad is None else p.grad.clone())
        for p in model.parameters()
    }
    modes = {id(part): part.training for part in model.modules()}
    prune_depth(model, make_tokenizer(), samples, table(importance=importance, keep_first=2))
    for parameter in model.parameters():
        requires_grad, grad = state[id(parameter)]
        assert parameter.requires_grad == requires_grad
        assert parameter.grad is grad is None or torch.equal(parameter.grad, grad)
        assert not parameter._post_accumulate_grad_hooks
    assert all(part.training == modes[id(part)] for part in model.modules() if id(part) in modes)


def test_taylor_holds_one_gradient_at_a_time(samples, make_tokenizer, monkeypatch):
    model, most = tiny(), 0
    detach = torch.Tensor.detach

    def count(tensor):
        nonlocal most
        most = max(most, sum(p.grad is not None for p in model.parameters()))
        return detach(tensor)

    monkeypatch.setattr(torch.Tensor, "detach", count)
    prune_depth(model, make_tokenizer(), samples, table())
    assert most == 1


def test_scores_that_are_not_finite_name_the_layer(samples, make_tokenizer):
    model, tokenizer = tiny(), make_tokenizer()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = math.nan
    for importance in ("taylor", "ppl", "magnitude"):
        with pytest.raises(RankAdaptorError, match=r"Layer 2: mlp\.up_proj has weights"):
            prune_depth(model, tokenizer, samples, table(importance=importance))
    assert len(block_list(model)) == BLOCKS
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)  # finite, but its products are not
    for importance in ("taylor", "ppl"):
        with pytest.raises(RankAdaptorError, match="Layer 3: the score is not finite in 3 of 3"):
            prune_depth(
                model,
                tokenizer,
                samples,
                table(importance=importance, keep_first=1, keep_last=1),
            )


def test_unusable_sequences_are_refused(make_tokenizer):
    for importance in ("taylor", "ppl"):
        for sequences in ([], [torch.tensor([3])], [torch.tensor([3, VOCABULARY])]):
            with pytest.raises(CorpusError):
                prune_depth(tiny(), make_tokenizer(), sequences, table(importance=importance))


# ---------------------------------------------------------------------------------- how many go


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"blocks": 1}, 1),
        ({"blocks": 3}, 3),
        ({"pruning_ratio": 0.01}, 1),
        ({"pruning_ratio": 0.5}, 2),  # of 4 in the range
        ({"pruning_ratio": 0.6}, 2),
        ({"pruning_ratio": 0.7}, 3),
        ({"pruning_ratio": 0.99}, 4),
        ({"pruning_ratio": 0.01, "ratio_of": "parameters"}, 1),
        ({"pruning_ratio": 0.4, "ratio_of": "parameters"}, 2),
        ({"pruning_ratio": 0.5, "ratio_of": "parameters"}, 3),
    ],
)
def test_so_many_blocks_go(changes, count, samples, make_tokenizer):
    model = tiny()  # a block has 1,952 of 11,056 parameters
    config = table(importance="magnitude", keep_first=1, **changes)
    pruned = prune_depth(model, make_tokenizer(), samples, config)
    assert len(pruned.provenance["removed_layers"]) == count
    assert model.config.num_hidden_layers == BLOCKS - count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": 4}, "blocks 4 means 4 blocks, but only 3 of 5 may go"),
        (
            {"pruning_ratio": 0.99, "ratio_of": "parameters"},
            "means 6 blocks, but only 3 of 5 may go",
        ),
        ({"keep_first": 3, "keep_last": 2}, "leave none of the 5 layers"),
        ({"keep_first": 9}, "leave none of the 5 layers"),
        ({"importance": "wanda"}, 'unknown for method = "depth". Use one of: magnitude, ppl, rand'),
        ({"taylor": "second"}, 'taylor is "second", but method = "depth" uses the first-order'),
    ],
)
def test_what_depth_cannot_do_is_refused(changes, message, samples, make_tokenizer):
    model = tiny()
    config = table(**{"keep_first": 1, "keep_last": 1, **changes})
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        prune_depth(model, make_tokenizer(), samples, config)
    assert caught.value.exit_code == 2
    assert len(block_list(model)) == BLOCKS


@pytest.mark.parametrize("asked", [{"blocks": 5}, {"pruning_ratio": 0.95}])
def test_the_last_block_stays(asked, samples, make_tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        scores, removed = scores_of(tiny(), samples, make_tokenizer(), **asked)
    assert "the most important one is kept" in caplog.text
    assert set(range(BLOCKS)) - set(removed) == {scores.index(max(scores))}
    with pytest.raises(ConfigError, match="means all 1 blocks of the model"):
        scores_of(tiny(num_hidden_layers=1), samples, make_tokenizer(), blocks=1)


# --------------------------------------------------------------------------------------- whole


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_saved_and_loaded(family, samples, tokens, make_tokenizer, tmp_path):
    model, stock = tiny(family, num_hidden_layers=BLOCKS), type(tiny(family))
    whole = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in block_list(model)[0].parameters())
    config = table(blocks=2, keep_first=1, keep_last=1)
    pruned = prune_depth(model, make_tokenizer(), samples, config)
    removed = pruned.provenance["removed_layers"]
    assert len(removed) == 2
    assert {0, 4}.isdisjoint(removed)
    assert pruned.kept_layers == tuple(i for i in range(BLOCKS) if i not in removed)
    assert pruned.pruned_layers == (False, True, False)
    assert pruned.base_footprint.parameters == whole
    assert pruned.footprint.parameters == whole - 2 * block
    scores = pruned.provenance["scores"]
    assert [score is None for score in scores] == [True, False, False, False, True]
    assert pruned.provenance["calibration_tokens"] == [12, 5, 9]
    assert pruned.importance_lost == tuple(float(i in removed) for i in range(BLOCKS))

    pruned.save(tmp_path / "pruned")
    loaded = load_pruned(tmp_path / "pruned")
    assert type(loaded.model) is type(pruned.model) is stock
    assert loaded.record() == pruned.record()
    assert torch.equal(logits_of(loaded.model, tokens), logits_of(pruned.model, tokens))
