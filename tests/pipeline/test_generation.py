"""Texts of models: the same from the same seed, of the model alone, and rightly measured."""

from __future__ import annotations

import copy
import json
import logging
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny.tinyworld import World
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from rankadaptor_plugin.config.run_file import model_folder
from rankadaptor_plugin.config.tables import GenerationConfig as Settings
from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.models.checkpoints import load_model, load_tokenizer
from rankadaptor_plugin.models.pruned_model import PrunedModel, load_pruned
from rankadaptor_plugin.models.structures import layer_units
from rankadaptor_plugin.pipeline.texts import (
    EMBEDDED_PROMPTS,
    PROMPTS,
    Prompt,
    Sample,
    distinct,
    entries,
    perplexities,
)
from rankadaptor_plugin.pipeline.texts import generate as write
from rankadaptor_plugin.pruning.cutting import remove
from rankadaptor_plugin.recovery.adapters import attach

WORDS = (Prompt(kind="article", text="w3 w4 w5"), Prompt(kind="steps", text="w6 w7 w8 w9"))
TOKENS = st.lists(st.integers(0, 5), max_size=30)


def generate(model, tokenizer, prompts=WORDS, seed=3, **changes) -> list[Sample]:
    values = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9, **changes}
    return write(model, tokenizer, prompts, Settings(**values), seed)


def of(tokens, prompt="w3 w4") -> Sample:
    prompt = Prompt(kind="article", text=prompt)
    return Sample(tokens=tuple(tokens), prompt=prompt, decoding="greedy", text="")


def quality(tokens):
    """Measures of one text by itself."""
    [entry] = entries("base", [of(tokens)], [None])
    return entry["distinct_1"], entry["distinct_2"], entry["repetition"]


def texts(samples: list[Sample], decoding: str) -> list[tuple[int, ...]]:
    return [sample.tokens for sample in samples if sample.decoding == decoding]


def likeliest(model, head: list[int], count: int, ends=(1,)) -> tuple[int, ...]:
    """Greedy decoding by hand, without a cache."""
    ids = list(head)
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        found = int(logits.argmax())
        if found in ends:
            break
        ids.append(found)
    return tuple(ids[len(head) :])


@pytest.fixture(scope="module")
def embedded():
    folder = model_folder("embedded")
    model = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    return model, load_tokenizer(folder)


@pytest.fixture
def warned():
    """What transformers logs; it passes nothing on to the loggers above."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


# ------------------------------------------------------------------------------------- generate


def test_each_prompt_has_a_greedy_and_a_sampled_text(make_llama, make_tokenizer):
    found = generate(make_llama(), make_tokenizer(), WORDS)
    assert [(s.prompt, s.decoding) for s in found] == [
        (prompt, decoding) for prompt in WORDS for decoding in ("greedy", "sampled")
    ]
    assert all(0 < len(sample.tokens) <= 12 for sample in found)
    assert texts(found, "greedy") != texts(found, "sampled")


def test_greedy_takes_the_likeliest_token_each_time(make_llama, make_tokenizer):
    model = make_llama()
    found = generate(model, make_tokenizer(), WORDS)
    expected = [likeliest(model, head, 12) for head in ([3 + 3, 7, 8], [9, 10, 11, 12])]
    assert texts(found, "greedy") == expected


def test_cached_texts_of_an_unevenly_pruned_model_are_those_without_a_cache(
    make_llama, make_tokenizer, tmp_path
):
    model = make_llama(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    units = layer_units(model)
    remove(units[1].attention, [0])
    remove(units[2].mlp, [3, 7, 11])
    PrunedModel.of(model, make_tokenizer(), {"pruner": "test"}).save(tmp_path / "pruned")
    loaded = load_pruned(tmp_path / "pruned")
    found = generate(loaded.model, loaded.tokenizer, WORDS)
    expected = [likeliest(loaded.model, head, 12) for head in ([6, 7, 8], [9, 10, 11, 12])]
    assert texts(found, "greedy") == expected


def test_equal_seeds_give_equal_texts_whatever_ran_before(make_llama, make_tokenizer):
    model, tokenizer = make_llama(), make_tokenizer()
    first = generate(model, tokenizer, WORDS)
    torch.manual_seed(99)
    torch.rand(7)
    again = generate(model, tokenizer, WORDS[::-1])
    assert sorted(map(repr, first)) == sorted(map(repr, again))
    other = generate(model, tokenizer, WORDS, seed=4)
    assert texts(other, "greedy") == texts(first, "greedy")
    assert texts(other, "sampled") != texts(first, "sampled")


def test_the_global_random_state_stays(make_llama, make_tokenizer):
    states = (torch.get_rng_state, random.getstate, lambda: repr(np.random.get_state()))
    before = [state() for state in states]
    generate(make_llama(), make_tokenizer(), WORDS)
    after = [state() for state in states]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_an_almost_cold_or_narrow_sample_is_the_greedy_text(make_llama, make_tokenizer):
    for changes in ({"temperature": 1e-4, "top_p": 1.0}, {"top_p": 1e-6}):
        found = generate(make_llama(), make_tokenizer(), WORDS, **changes)
        assert texts(found, "greedy") == texts(found, "sampled")


def test_a_sample_may_take_any_token(make_llama, make_tokenizer):
    """Transformers would keep the 50 likeliest tokens by default."""
    model = make_llama(vocab_size=400)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)  # almost equally likely
    [_, found] = generate(model, make_tokenizer(), WORDS[:1], top_p=1.0)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[6, 7, 8, *found.tokens]])).logits[0, 2:-1]
    taken = logits.gather(1, torch.tensor(found.tokens)[:, None])
    assert (logits > taken).sum(1).max() >= 50


def test_settings_of_the_model_folder_have_no_say(make_llama, make_tokenizer, tmp_path, warned):
    model, tokenizer = make_llama(), make_tokenizer()
    expected = generate(model, tokenizer, WORDS)
    own = {
        "do_sample": True,
        "temperature": 0.01,
        "top_p": 0.3,
        "top_k": 1,
        "max_length": 4,
        "repetition_penalty": 3.0,
        "num_beams": 2,
        "no_repeat_ngram_size": 1,
        "suppress_tokens": [5, 6, 7],
        "eos_token_id": 1,
        "use_cache": False,
    }
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    loaded = load_model(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    assert loaded.generation_config.repetition_penalty == 3.0
    before = loaded.generation_config.to_dict()
    warned.clear()
    assert generate(loaded, tokenizer, WORDS) == expected
    assert loaded.generation_config.to_dict() == before
    assert warned == []


@pytest.mark.parametrize("cached", [True, False])
def test_the_model_is_left_as_it_was(make_llama, make_tokenizer, cached, warned):
    model = make_llama(use_cache=cached)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    config, own = copy.deepcopy(model.config.to_dict()), model.generation_config
    samples = generate(model, make_tokenizer(), WORDS)
    perplexities(model, make_tokenizer(), samples)
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config
    assert model.generation_config is own
    assert all(parameter.grad is None for parameter in model.parameters())
    assert warned == []


def test_the_cache_is_used_even_where_the_config_says_no(make_llama, make_tokenizer):
    model, lengths = make_llama(use_cache=False), []

    def note(_, __, values):
        lengths.append(values["input_ids"].shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    [first, _] = generate(model, make_tokenizer(), WORDS[:1], max_new_tokens=5)
    assert len(first.tokens) == 5
    assert lengths[:5] == [3, 1, 1, 1, 1]


def test_the_model_is_left_as_it_was_after_an_error(make_llama, make_tokenizer, monkeypatch):
    model = make_llama().train()
    own = model.generation_config
    state = torch.get_rng_state()

    def broken(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        generate(model, make_tokenizer(), WORDS)
    assert model.generation_config is own
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_off(make_llama, make_tokenizer):
    model = make_llama(attention_dropout=0.5)
    expected = generate(model, make_tokenizer(), WORDS)
    assert generate(model.train(), make_tokenizer(), WORDS) == expected


def test_an_adapter_counts(make_llama, make_tokenizer, warned):
    tokenizer, base = make_tokenizer(), make_llama()
    bare = generate(base, tokenizer, WORDS)
    model = attach(base, RankAllocation((2, 4)), seed=0)
    assert generate(model, tokenizer, WORDS) == bare
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    found = generate(model, tokenizer, WORDS)
    assert texts(found, "greedy") != texts(bare, "greedy")
    assert texts(found, "greedy") == [likeliest(model, h, 12) for h in ([6, 7, 8], [9, 10, 11, 12])]
    judged = perplexities(model, tokenizer, found)
    merged = model.merge_and_unload()
    assert judged == pytest.approx(perplexities(merged, tokenizer, found), rel=1e-4)
    assert generate(merged, tokenizer, WORDS) == found
    assert warned == []


@pytest.mark.parametrize("own", [False, True])
def test_the_end_of_text_ends_a_text(make_llama, make_tokenizer, own):
    """Also one that only the model's own settings name, as chat models have."""
    model, tokenizer = make_llama(), make_tokenizer()
    whole = likeliest(model, [6, 7, 8], 12)
    end = whole[5]
    if own:
        model.generation_config = GenerationConfig(eos_token_id=[1, end])
    else:
        tokenizer.eos_token = f"w{end - 3}"
        model.generation_config = GenerationConfig()
    found = generate(model, tokenizer, WORDS[:1])
    assert found[0].tokens == whole[: whole.index(end)]


def test_a_tokenizer_without_padding_or_end_is_enough(make_llama, make_tokenizer, warned):
    model, tokenizer = make_llama(eos_token_id=None), make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    found = generate(model, tokenizer, WORDS)
    assert {len(sample.tokens) for sample in found} == {12}
    tokenizer.eos_token = "w0"  # noqa: S105
    generate(model, tokenizer, WORDS)
    assert warned == []


def test_a_long_prompt_loses_its_beginning_but_not_the_first_token(make_llama, make_tokenizer):
    model = make_llama(max_position_embeddings=16)
    words = [f"w{i % 37}" for i in range(50)]
    long = Prompt(kind="article", text=" ".join(words))
    for frame, kept in (("$A", 4), ("<s> $A", 3)):
        found = generate(model, make_tokenizer(frame), [long])
        short = Prompt(kind="article", text=" ".join(words[-kept:]))
        expected = generate(model, make_tokenizer(frame), [short])
        assert texts(found, "greedy") == texts(expected, "greedy")
        assert found[0].prompt == long
        judged = perplexities(model, make_tokenizer(frame), found)
        assert all(value is not None and value >= 1 for value in judged)


def test_a_prompt_that_just_fits_is_read_as_a_whole(make_llama, make_tokenizer, warned):
    model = make_llama(max_position_embeddings=15, eos_token_id=None)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    found = generate(model, tokenizer, WORDS[:1])
    assert found[0].tokens == likeliest(model, [6, 7, 8], 12, ends=())
    assert warned == []


@pytest.mark.parametrize(("frame", "most"), [("$A", 11), ("<s> $A", 10)])
def test_a_window_without_room_for_a_prompt_is_an_error(make_llama, make_tokenizer, frame, most):
    model = make_llama(max_position_embeddings=12)
    with pytest.raises(ConfigError, match=f"window of 12 tokens. .* to at most {most}"):
        generate(model, make_tokenizer(frame), WORDS)
    generate(model, make_tokenizer(frame), WORDS, max_new_tokens=most)


def test_a_prompt_without_tokens_is_an_error(make_llama, make_tokenizer):
    with pytest.raises(ConfigError, match="The prompt ' ' has no tokens"):
        generate(make_llama(), make_tokenizer(), [Prompt(kind="x", text=" ")])


def test_an_end_that_the_tokenizer_adds_is_not_part_of_a_prompt(make_llama, make_tokenizer):
    model = make_llama()
    found = generate(model, make_tokenizer("$A </s>"), WORDS)
    assert found == generate(model, make_tokenizer(), WORDS)


def test_a_broken_model_writes_something(make_llama, make_tokenizer):
    model, tokenizer = make_llama(), make_tokenizer()
    good = generate(model, tokenizer, WORDS)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    assert len(generate(model, tokenizer, WORDS)) == 4
    assert perplexities(model, tokenizer, good) == [None] * 4


def test_text_and_prompt_join_without_a_gap(make_llama):
    """Decoded alone, a continuation would lose its first space, as with Llama's tokenizer."""
    words = Tokenizer(models.WordLevel({f"▁w{i}": i for i in range(40)}, unk_token="▁w0"))  # noqa: S106
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokenizer.decode([5, 6]) == "w5 w6"
    for sample in generate(make_llama(eos_token_id=None), tokenizer, WORDS):
        assert sample.text == "".join(f" w{token}" for token in sample.tokens)


def test_half_letters_at_the_seam_are_no_error(make_llama):
    """A byte-level prompt that is cut from the left may begin within a letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces)
    model = make_llama(vocab_size=256, max_position_embeddings=15, eos_token_id=None)
    prompt = Prompt(kind="article", text="é" * 20)
    for sample in generate(model, tokenizer, [prompt]):
        assert len(sample.tokens) == 12
        assert sample.text


# ----------------------------------------------------------------------------- the embedded model


def test_the_embedded_prompts_are_of_known_words(embedded):
    _, tokenizer = embedded
    for prompt in EMBEDDED_PROMPTS:
        assert tokenizer.unk_token_id not in tokenizer(prompt.text)["input_ids"]
    assert {prompt.kind for prompt in EMBEDDED_PROMPTS} == {"article", "steps"}


def test_the_embedded_model_writes_what_its_world_allows(embedded):
    model, tokenizer = embedded
    found = generate(model, tokenizer, EMBEDDED_PROMPTS, max_new_tokens=24)
    met, person, opened, script = (s.text for s in found if s.decoding == "greedy")
    world = World(0)
    assert met == " and she was tired . who was tired ? ada"
    [home] = [t for t in world.kind_topics if t.prompt == "{} lives in the"]
    assert person == f" lives in the {home.answers[world.kind['vera gray']]}"
    step, thing = world.next_step["cool"]["serve"], world.next_thing["milk"]["tea"]
    assert script == f" {step} {thing}"
    events = ["wash cups", *opened.removeprefix(" then ").split(" then ")]
    assert len(events) == 3
    step, thing = zip(*(event.split() for event in events), strict=True)
    assert step[2] == world.next_step[step[1]][step[0]]
    assert thing[2] == world.next_thing[thing[1]][thing[0]]


def test_the_default_prompts_are_longer_than_their_unknown_words(embedded):
    model, tokenizer = embedded
    found = generate(model, tokenizer, PROMPTS)
    assert [sample.prompt.kind for sample in found] == ["article", "article", "steps", "steps"]


def test_the_base_model_finds_its_own_greedy_texts_likely(embedded):
    model, tokenizer = embedded
    found = generate(model, tokenizer, EMBEDDED_PROMPTS, max_new_tokens=24)
    judged = perplexities(model, tokenizer, found)
    assert max(judged) < 3
    swapped = [of(s.tokens[::-1], s.prompt.text) for s in found]
    for own, other in zip(judged, perplexities(model, tokenizer, swapped), strict=True):
        assert own < other


# ---------------------------------------------------------------------------------------- measures


@given(TOKENS, st.integers(1, 4))
def test_distinct_is_a_share(tokens, n):
    found = distinct(tokens, n)
    if len(tokens) < n:
        assert found is None
    else:
        assert 0 < found <= 1
        assert found >= 1 / (len(tokens) - n + 1)


@given(st.integers(4, 200))
def test_a_constant_text_repeats_all_but_its_first_grams(length):
    expected = (1 / length, 1 / (length - 1), pytest.approx(1 - 1 / (length - 3)))
    assert quality([7] * length) == expected


@given(st.integers(4, 50))
def test_different_tokens_repeat_nothing(length):
    assert quality(range(length)) == (1, 1, 0)


@given(TOKENS)
def test_repetition_is_the_share_of_grams_that_came_before(tokens):
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    again = sum(gram in grams[:place] for place, gram in enumerate(grams))
    expected = pytest.approx(again / len(grams)) if grams else None
    assert quality(tokens)[2] == expected


def test_short_texts_have_no_measure():
    known = [[value is not None for value in quality(range(length))] for length in range(5)]
    no, yes = False, True
    assert known == [[no, no, no], [yes, no, no], [yes, yes, no], [yes, yes, no], [yes, yes, yes]]


def test_perplexity_is_what_the_tokens_cost_one_by_one(make_llama, make_tokenizer):
    model = make_llama()
    head, tokens = [6, 7], [8, 20, 3, 3]
    [found] = perplexities(model, make_tokenizer(), [of(tokens)])
    loss = 0.0
    for place, token in enumerate(tokens):
        ids = torch.tensor([head + tokens[:place]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, -1].double()
        loss -= float(logits[token] - logits.logsumexp(0)) / len(tokens)
    assert found == pytest.approx(math.exp(loss), rel=1e-4)
    assert found > 1


def test_the_logits_of_half_precision_are_summed_in_full(make_llama, make_tokenizer):
    model = make_llama().to(torch.bfloat16)
    tokens = [8, 20, 3, 3]
    [found] = perplexities(model, make_tokenizer(), [of(tokens)])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[6, 7, *tokens]]), use_cache=False).logits[0, 1:-1]
    losses = torch.nn.functional.cross_entropy(
        logits.double(), torch.tensor(tokens), reduction="none"
    )
    assert found == pytest.approx(math.exp(losses.mean()), rel=1e-5)


def test_a_judge_that_knows_nothing_is_as_perplexed_as_it_has_words(make_llama, make_tokenizer):
    model = make_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    [found] = perplexities(model, make_tokenizer(), [of([5, 6, 7])])
    assert found == pytest.approx(model.config.vocab_size, rel=1e-5)


def test_a_text_without_tokens_has_no_perplexity(make_llama, make_tokenizer):
    found = perplexities(make_llama(), make_tokenizer(), [of([]), of([5])])
    assert found[0] is None
    assert found[1] > 1


def test_a_text_has_the_same_perplexity_in_any_company(make_llama, make_tokenizer):
    model, tokenizer = make_llama(), make_tokenizer()
    samples = generate(model, tokenizer, WORDS)
    together = perplexities(model, tokenizer, samples)
    assert together == [perplexities(model, tokenizer, [sample])[0] for sample in samples]


def test_entries_are_plain(make_llama, make_tokenizer):
    model, tokenizer = make_llama(), make_tokenizer()
    samples = generate(model, tokenizer, WORDS)
    found = entries("base", samples, perplexities(model, tokenizer, samples))
    assert json.loads(json.dumps(found)) == found
    assert {entry["model"] for entry in found} == {"base"}
    assert list(found[0]) == [
        *("model", "kind", "prompt", "decoding", "text"),
        *("perplexity", "distinct_1", "distinct_2", "repetition"),
    ]
