"""Conversations: which turns are trained, whatever the chat template, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankadaptor_plugin.config.tables import CorpusConfig
from rankadaptor_plugin.core.errors import CorpusError
from rankadaptor_plugin.corpus.corpus import load_corpus
from rankadaptor_plugin.corpus.rows import prompt_and_response
from rankadaptor_plugin.corpus.sequences import IGNORED

EOS = 1
LLAMA = (
    "{% for m in messages %}{{ {'system': 'w0', 'user': 'w1', 'assistant': 'w2'}[m.role] }} "
    "{{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}w2{% endif %}"
)
"""A header before each turn, an end after it, as most templates have it."""
FORGETFUL = (
    "{% for m in messages %}{{ 'w1' if m.role == 'user' else 'w2' }} "
    "{% if loop.last and m.role == 'assistant' %}w9 {% endif %}{{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}w2{% endif %}"
)
"""Writes w9 in the last turn alone, as Qwen3 does with its thoughts."""
PROMPTED = (
    "{% for m in messages %}{{ 'w1' if m.role == 'user' else 'w2' }} {{ m.content }} </s> "
    "{% endfor %}{% if add_generation_prompt %}w2 w9{% endif %}"
)
"""Begins the answer with w9, which a turn that is there does not have, as DeepSeek-R1 does."""


def ids(*numbers: int) -> list[int]:
    return [n + 3 for n in numbers]  # w0 is token 3


def said(*turns: str, begin: str = "user") -> dict:
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    return {"messages": [{"role": "system", "content": "w5"}] * (begin == "system") + messages}


@pytest.fixture
def tokenizer(make_tokenizer):
    made = make_tokenizer("<s> $A")  # whose beginning is not added: templates write their own
    made.chat_template = LLAMA
    return made


def test_every_turn_of_the_assistant_is_trained_and_nothing_else(tokenizer):
    row = said("w10", "w11 w12", "w13", "w14", begin="system")
    (sequence,) = load_corpus([row], tokenizer).sequences
    rest = IGNORED
    assert sequence.tokens.tolist() == [
        *ids(0, 5), EOS, *ids(1, 10), EOS, *ids(2, 11, 12), EOS, *ids(1, 13), EOS, *ids(2, 14), EOS,
    ]  # fmt: skip
    assert sequence.labels.tolist() == [
        *[rest] * 7, *ids(11, 12), EOS, *[rest] * 4, *ids(14), EOS,
    ]  # fmt: skip


def test_the_form_of_sharegpt_reads_the_same(tokenizer):
    turns = [("system", "w5"), ("human", "w10"), ("gpt", "w11"), ("human", "w3")]
    shared = {"conversations": [{"from": who, "value": text} for who, text in turns], "id": "x"}
    (one,) = load_corpus([shared], tokenizer).sequences
    (other,) = load_corpus([said("w10", "w11", begin="system")], tokenizer).sequences
    assert one.tokens.equal(other.tokens)  # the last question, without an answer, is left out
    assert one.labels.equal(other.labels)


def test_a_template_that_changes_earlier_turns_gives_one_sequence_per_turn(tokenizer):
    tokenizer.chat_template = FORGETFUL
    first, second = load_corpus([said("w10", "w11", "w13", "w14")], tokenizer).sequences
    assert first.tokens.tolist() == [*ids(1, 10), EOS, *ids(2, 9, 11), EOS]
    assert first.labels.tolist() == [IGNORED] * 4 + [*ids(9, 11), EOS]
    before = [*ids(1, 10), EOS, *ids(2, 11), EOS, *ids(1, 13), EOS, *ids(2)]
    assert second.tokens.tolist() == [*before, *ids(9, 14), EOS]
    assert second.labels.tolist() == [IGNORED] * len(before) + [*ids(9, 14), EOS]


def test_a_prompt_that_begins_the_answer_does_not_hide_it(tokenizer):
    tokenizer.chat_template = PROMPTED
    (sequence,) = load_corpus([said("w10", "w11")], tokenizer).sequences
    assert sequence.labels.tolist() == [IGNORED] * 4 + [*ids(11), EOS]


def test_what_a_template_of_llama_says_of_today_is_the_same_every_day(tokenizer):
    today = "{{ 'w7' if date_string is defined and date_string == '26 Jul 2024' else 'w8' }} "
    tokenizer.chat_template = today + LLAMA
    (sequence,) = load_corpus([said("w10", "w11")], tokenizer).sequences
    assert sequence.tokens.tolist()[0] == ids(7)[0]


@pytest.mark.parametrize(
    ("row", "max_tokens"),
    [
        (said("w10"), 99),  # no answer
        (said("w10", "  "), 99),  # an empty one
        (said("w10 w10 w10", "w11"), 6),  # the question fills all
    ],
)
def test_rows_without_an_answer_are_dropped(tokenizer, row, max_tokens):
    rows = [row, said("w1", "w2")]
    corpus = load_corpus(rows, tokenizer, CorpusConfig(max_length=max_tokens))
    assert (len(corpus.sequences), corpus.dropped, corpus.rows) == (1, 1, 2)


WORDS = st.lists(st.sampled_from(["w10", "w11", "w12"]), min_size=1, max_size=4).map(" ".join)


@settings(max_examples=60)
@given(turns=st.lists(WORDS, min_size=2, max_size=7), max_tokens=st.integers(5, 40))
def test_trained_tokens_are_the_words_of_the_assistant_within_the_limit(
    make_tokenizer, turns, max_tokens
):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = LLAMA
    expected: list[int] = []
    for number, text in enumerate(turns):
        words = [*ids(*(int(word[1:]) for word in text.split())), EOS]
        header = [(IGNORED, ids(1 + number % 2)[0])]
        expected += header + [(word if number % 2 else IGNORED, word) for word in words]
    expected = expected[:max_tokens]
    trained = [label for label, _ in expected if label != IGNORED]
    if not trained:
        with pytest.raises(CorpusError, match="gives no training sequence"):
            load_corpus([said(*turns)], tokenizer, CorpusConfig(max_length=max_tokens))
        return
    (sequence,) = load_corpus(
        [said(*turns)], tokenizer, CorpusConfig(max_length=max_tokens)
    ).sequences
    labels = sequence.labels.tolist()
    assert [label for label in labels if label != IGNORED] == trained
    assert sequence.tokens.tolist() == [token for _, token in expected[: len(labels)]]


def test_a_tokenizer_without_a_template_is_said_once_and_clearly(make_tokenizer):
    with pytest.raises(CorpusError, match=r"row 1 is a conversation, but the tokenizer of the m"):
        load_corpus([said("w10", "w11")], make_tokenizer())


def test_a_row_that_the_template_refuses_is_named(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must\\nalternate') }}"
    with pytest.raises(CorpusError, match=r"row 1 is rejected by .*: roles must alternate\. Corr"):
        load_corpus([said("w10", "w11")], tokenizer)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "row 2 has the roles of no turn; a conversation is begun by the user"),
        ([("assistant", "a")], "row 2 has the roles assistant; a conversation is begun by"),
        ([("user", "a"), ("system", "b")], "row 2 has the roles user, system; a conversation"),
        ([("system", "a")] * 2, "row 2 has the roles system, system"),
        ([("asistant", "a")], "turn 1 has the role 'asistant'. Did you mean 'assistant'? Allowed"),
        ([("user", "a"), ("tool", "b")], "row 2, turn 2 has the role 'tool'."),
        ([("user", None)], "row 2, turn 1 is {'role': 'user', 'content': None}; a turn of mess"),
        ([(None, "a")], "row 2, turn 1 is {'role': None, 'content': 'a'}"),
    ],
)
def test_malformed_conversations_are_refused_with_their_row(tokenizer, turns, message):
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    with pytest.raises(CorpusError) as error:
        load_corpus([said("w10", "w11"), row], tokenizer)
    assert message in str(error.value)


def test_a_turn_that_is_no_table_is_refused(tokenizer):
    with pytest.raises(CorpusError, match=r"turn 1 is 'hi'; a turn of conversations needs the te"):
        load_corpus([{"conversations": ["hi"]}], tokenizer)


def test_as_text_a_conversation_reads_turn_by_turn():
    row = said("a", "b", "c", "d")
    assert prompt_and_response(row, "alpaca") == ("a\nb\nc\n", "d")
