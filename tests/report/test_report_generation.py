"""Texts in the report: complete, side by side, and harmless whatever a model wrote."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from rankadaptor_plugin.report import tables as report_tables
from rankadaptor_plugin.report.report import rendered

EVIL = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</dd></dl></pre></table><b>bold</b>",
    "`code` ``` | a | b |\n| --- |",
    "a|b\\|c\\\\|",
    "![x](https://example.org/x) [y](javascript:z) <https://example.org>",
    "# title\n- item\n\n> quote\n***\n```\nfence",
    "*a* __b__ ~~c~~ $x^2$ &lt; &amp;lt; <br>",
    "x" * 5000,
    "\x00\x07\x1b[31mred\x7f\x85",
    "right\u202eto left\u2066 \ufeff\u00ad\u2028\u2029",
    "\ud83d alone",
    "one\r\ntwo\rthree\tfour",
)


def data(entries) -> dict:
    return {"generation": entries, "parameters": {"trainable": {}}}


def markdown(entries) -> str:
    return rendered("texts.md.j2", data(entries)).strip("\n")


def html(entries) -> str:
    return rendered("texts.html.j2", data(entries)).strip("\n")


def quality_table(entries):
    return report_tables.text_quality(data(entries))


def entry(**changes) -> dict:
    values = {
        "model": "base",
        "kind": "article",
        "prompt": "Once upon",
        "decoding": "greedy",
        "text": " a time",
        "perplexity": 4.0,
        "distinct_1": 0.5,
        "distinct_2": 1.0,
        "repetition": 0.0,
    }
    return {**values, **changes}


def several() -> list[dict]:
    """Two prompts, both decodings, four models, in an unusual order."""
    return [
        entry(model=model, kind=kind, prompt=prompt, decoding=decoding, text=f"{model} {decoding}")
        for model, (kind, prompt), decoding in product(
            ("searched", "pruned", "base", "uniform"),
            (("article", "Once upon"), ("steps", "How to:\n1.")),
            ("sampled", "greedy"),
        )
    ]


class Reader(HTMLParser):
    """Checks that tags nest, and collects tags, attributes and the text of each cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.cells = [], set(), set(), []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag in ("dt", "dd"):
            self.cells.append("")

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] in ("dt", "dd"):
            self.cells[-1] += data


def tables(text: str) -> list[list[list[str]]]:
    """Renders Markdown, and returns the cells of its tables' bodies as text."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    found: list[list[list[str]]] = []
    for place, token in enumerate(tokens):
        if token.type == "tbody_open":
            found.append([])
        elif token.type == "tr_open" and found and tokens[place + 1].type == "td_open":
            found[-1].append([])
        elif token.type == "td_open":
            found[-1][-1].append("".join(map(shown, tokens[place + 1].children)))
        assert token.type in ("inline", "paragraph_open", "paragraph_close") or re.match(
            "(table|thead|tbody|tr|th|td)_", token.type
        )
    return found


def shown(token) -> str:
    if token.type == "html_inline":
        assert token.content == "<br>"
        return "\n"
    assert token.type in ("text", "text_special"), token.type
    return token.content


def breakless(text: str) -> str:
    return re.sub(" ?↵\n", "\n", text)


# -------------------------------------------------------------------------------------- the texts


@pytest.mark.parametrize("render", [markdown, html])
def test_nothing_to_show_is_nothing(render):
    assert render([]) == ""


def test_markdown_has_a_table_per_prompt_and_decoding_with_the_models_in_order():
    found = tables(markdown(several()))
    names = ["base", "pruned", "uniform", "searched"]
    labels = ["base", "pruned", "uniform LoRA", "searched ranks"]
    assert found == [
        [[label, f"{name} {decoding}"] for label, name in zip(labels, names, strict=True)]
        for decoding in ("greedy", "sampled", "greedy", "sampled")
    ]


def test_markdown_names_kind_decoding_and_prompt():
    text = markdown(several())
    assert text.startswith("article, greedy, after: Once upon\n\n| model | continuation |\n")
    assert "steps, sampled, after: How to: ↵<br>1.\n\n" in text


def test_html_has_a_grid_per_prompt_and_decoding_with_the_models_in_order():
    text = html(several())
    found = Reader(text).cells
    labels = ["base", "pruned", "uniform LoRA", "searched ranks"]
    assert found[0::2] == labels * 4
    greedy = [f"{name} greedy" for name in ("base", "pruned", "uniform", "searched")]
    assert found[1:8:2] == greedy
    assert text.count('<dl class="texts">') == 4
    assert text.count('<p class="prompt"') == text.count("<h3>") == 2
    assert '<p class="prompt" dir="auto">How to:\n1.</p>' in text


def test_html_keeps_line_breaks_and_inner_spaces():
    assert Reader(html([entry(text=" one\n  two\n\nthree")])).cells[1] == "one\n  two\n\nthree"


def test_markdown_shows_line_breaks():
    assert "| base | one ↵<br> ↵<br>two |" in markdown([entry(text=" one\n\ntwo")])


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_text_is_called_so(text):
    assert tables(markdown([entry(text=text)])) == [[["base", "(nothing)"]]]
    assert Reader(html([entry(text=text)])).cells == ["base", "(nothing)"]


def test_unknown_models_kinds_and_decodings_are_shown_too():
    found = [entry(model="mine", kind="poem", decoding="beam"), entry(kind="poem")]
    text = markdown(found)
    assert "poem, greedy, after" in text
    assert "poem, beam, after" in text
    assert tables(text) == [[["base", "a time"]], [["mine", "a time"]]]
    assert "mine" in html(found)
    assert [row[0] for row in quality_table(found).rows] == ["base", "mine"]


def test_texts_from_several_seeds_all_show():
    found = [entry(decoding="sampled", text=str(seed)) for seed in range(3)]
    assert tables(markdown(found)) == [[["base", "0"], ["base", "1"], ["base", "2"]]]


# ------------------------------------------------------------------------------ whatever is written


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("place", ["text", "prompt", "kind", "model", "decoding"])
def test_markdown_stays_a_table(place, evil):
    text = markdown([entry(**{place: evil})])
    [[row]] = tables(text)
    assert len(row) == 2
    assert "<" not in text.replace("<br>", "")
    text.encode()


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("place", ["text", "prompt", "kind", "model", "decoding"])
def test_html_has_no_tags_but_its_own(place, evil):
    text = html([entry(**{place: evil})])
    reader = Reader(text)
    assert reader.tags == {"h3", "p", "dl", "div", "dt", "dd"}
    assert reader.attributes == {"class", "dir"}
    text.encode()


@pytest.mark.parametrize("render", [markdown, html])
@pytest.mark.parametrize("evil", EVIL)
def test_no_invisible_characters_are_left(render, evil):
    text = render([entry(text=evil)])
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u202a-\u202e\u2066-\u2069\ufeff]", text
    )


def test_invisible_characters_are_named():
    found = [entry(text="a\x1b\u202eb\r")]
    for cells in (tables(markdown(found))[0][0], Reader(html(found)).cells):
        assert cells[1] == "a⟨U+001B⟩⟨U+202E⟩b⟨U+000D⟩"


def test_joiners_of_scripts_and_emoji_stay():
    text = "क्\u200dष 👩\u200d💻 x\u200cy"
    assert text in markdown([entry(text=text)])
    assert text in html([entry(text=text)])


@pytest.mark.parametrize("address", ["https://example.org/x", "ftp://example.org"])
def test_addresses_do_not_become_links(address):
    assert address not in markdown([entry(text=address)])
    assert tables(markdown([entry(text=address)]))[0][0][1] == address


LETTERS = st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(" \n|`<&\\")


@given(st.text(LETTERS))
def test_what_is_shown_is_what_was_written(text):
    seen = breakless(tables(markdown([entry(text=text)]))[0][0][1])
    expected = text.strip(" ") or "(nothing)"
    assert seen.split() == expected.split()
    assert Reader(html([entry(text=text)])).cells[1] == expected


# --------------------------------------------------------------------------------------- the table


def test_no_texts_give_no_table():
    assert quality_table([]) is None


def test_the_table_has_models_in_rows_and_measures_by_decoding_in_columns():
    table = quality_table(several())
    assert table.header == (
        "model",
        *("perplexity, greedy", "distinct-1, greedy", "distinct-2, greedy", "repetition, greedy"),
        *("perplexity, sampled", "distinct-1, sampled", "distinct-2, sampled"),
        "repetition, sampled",
    )
    assert [row[0] for row in table.rows] == ["base", "pruned", "uniform LoRA", "searched ranks"]
    assert {row[1:] for row in table.rows} == {("4.00", "0.50", "1.00", "0.00") * 2}
    assert table.left == (0,)


def test_perplexities_have_a_geometric_mean_and_shares_an_arithmetic_one():
    found = [entry(perplexity=2.0, distinct_1=0.2), entry(perplexity=8.0, distinct_1=0.4)]
    assert quality_table(found).rows == (("base", "4.00", "0.30", "1.00", "0.00"),)
    assert "geometric mean" in quality_table(found).caption


def test_texts_without_a_value_are_left_out_and_counted():
    found = [
        entry(perplexity=None, repetition=None),
        entry(perplexity=3.0, repetition=None),
        entry(perplexity=float("inf"), repetition=None),
    ]
    assert quality_table(found).rows == (("base", "3.00 (1 of 3)", "0.50", "1.00", "n/a"),)


def test_a_model_without_texts_of_a_decoding_has_no_mean():
    found = [entry(), entry(decoding="sampled"), entry(model="pruned")]
    assert quality_table(found).rows[1][5:] == ("n/a",) * 4


@given(st.lists(st.floats(1, 1e30), min_size=1, max_size=6))
def test_the_mean_perplexity_lies_between_the_least_and_the_most(values):
    [row] = quality_table([entry(perplexity=value) for value in values]).rows
    assert min(values) * 0.99 <= float(row[1]) <= max(values) * 1.01
