"""The oracle perplexity: the mean over all tokens, texts on one side as a whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rankadaptor_plugin.config.tables import OracleConfig
from rankadaptor_plugin.core.errors import ConfigError, OracleError
from rankadaptor_plugin.oracle.oracle import OracleSettings
from rankadaptor_plugin.oracle.perplexity import perplexity
from rankadaptor_plugin.testing.oracles import OracleConformance


def texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [
        " ".join(f"w{i}" for i in rng.integers(0, 37, rng.integers(3, 20))) for _ in range(count)
    ]


@pytest.fixture
def oracle(tmp_path, make_tokenizer):
    def make(rows, *, seed=0, tokenizer=None, **changes):
        path = tmp_path / "text.jsonl"
        path.write_text("".join(f'{{"text": "{row}"}}\n' for row in rows), encoding="utf-8")
        values = {"search_documents": 4, "report_documents": 0, "max_length": 8, **changes}
        config = OracleConfig(**{"name": "perplexity", "text": str(path), **values})
        settings = OracleSettings(
            config=config, tokenizer=tokenizer or make_tokenizer(), task_paths=(), seed=seed
        )
        return perplexity(settings)

    return make


class TestPerplexity(OracleConformance):
    @pytest.fixture(autouse=True)
    def _prepared(self, oracle, make_llama):
        self._oracle, self._make = oracle, make_llama

    def oracle(self, seed):
        return self._oracle(texts(9), seed=seed)

    def model(self):
        return self._make()


def test_the_score_is_the_mean_over_all_tokens(oracle, make_llama, make_tokenizer):
    # One window each: of longer texts the search may leave some windows unused.
    short = [" ".join(text.split()[:8]) for text in texts(9)]
    ours, model, tokenizer = oracle(short), make_llama(), make_tokenizer()
    total, count = 0.0, 0
    for purpose in ("search", "report"):
        score = ours.score(model, purpose).tasks["text"]
        total += score.values["log_likelihood"] * _tokens(ours, purpose)
        count += _tokens(ours, purpose)
    expected, tokens = 0.0, 0
    for text in short:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), 8):
            window = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + 8]]])
            with torch.no_grad():
                logs = model(window).logits[0, :-1].log_softmax(-1)
            expected += float(logs.gather(1, window[0, 1:, None]).sum())
            tokens += window.shape[1] - 1
    assert count == tokens
    assert total == pytest.approx(expected, rel=1e-4)


def _tokens(ours, purpose):
    return sum(len(scored) for _, scored in ours._windows[purpose])


def test_a_tokenizer_without_a_begin_token_leaves_the_first_token_out(oracle, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    ours = oracle(["w1 w2 w3", "w4 w5 w6", "w7 w8 w9"], tokenizer=tokenizer, search_documents=1)
    assert [_tokens(ours, p) for p in ("search", "report")] == [2, 4]


def test_one_long_text_is_cut_between_windows(oracle):
    ours = oracle([" ".join(texts(20))], search_documents=3)
    documents = ours.describe()["documents"]
    assert documents["search"] == {"text": [0, 1, 2]}
    assert documents["report"]["text"][0] == 3


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (["w1 w2"], {}, "gives 1 windows; 4 for the search leave none"),
        (texts(9), {"text": ""}, r"needs held-out text. Name a file in \[oracle\] text"),
        (texts(9), {"text": "none.txt"}, "none.txt"),
        (
            texts(9),
            {"target": "boolq"},
            "target names 'boolq', which is not among the tasks. Tasks: text",
        ),
        (texts(9), {"weights": {"boolq": 1.0}}, "weights names 'boolq', which .* Tasks: text"),
    ],
)
def test_what_cannot_be_scored_is_refused(oracle, rows, changes, message):
    with pytest.raises(ConfigError, match=message):
        oracle(rows, **changes)


def test_a_broken_model_is_an_oracle_error(oracle, make_llama):
    model = make_llama()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(OracleError, match=r"not a finite number. Lower \[recovery\] learning_rate"):
        oracle(texts(9)).score(model, "search")


def test_windows_fit_into_the_model(tmp_path, make_tokenizer):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(texts(20)), encoding="utf-8")

    def made(**changes):
        config = OracleConfig(name="perplexity", text=str(path), search_documents=1, **changes)
        settings = OracleSettings(
            config=config, tokenizer=make_tokenizer(), task_paths=(), seed=0, window=16
        )
        return max(len(scored) for _, scored in perplexity(settings)._windows["search"])

    assert made() == 16
    assert made(max_length=8) == 8
    with pytest.raises(ConfigError, match=r"max_length 17 is more than .* 16 tokens. Lower it"):
        made(max_length=17)


def test_no_window_is_on_both_sides_although_texts_share_some(oracle):
    shared = "w1 w2 w3 w4 w5 w6 w7 w8"  # the first window of every text
    ours = oracle([f"{shared} {text}" for text in texts(9)], search_documents=4)
    search, report = ({repr(w) for w in ours._windows[p]} for p in ("search", "report"))
    assert search.isdisjoint(report)
    assert len(report) > 4


@pytest.mark.parametrize("seed", range(4))
def test_texts_of_very_unlike_length_leave_enough_for_the_report(oracle, seed):
    long = " ".join(f"w{i % 37} w{i * i % 37} w{i // 37}" for i in range(400))
    ours = oracle(["w1 w2", long], search_documents=50, seed=seed)
    windows = {p: len(ids["text"]) for p, ids in ours.describe()["documents"].items()}
    assert windows["search"] == 50
    assert windows["report"] >= 2


def test_for_the_search_alone_all_text_is_the_searchs(tmp_path, make_tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("w1 w2 w3", encoding="utf-8")
    config = OracleConfig(name="lm-eval", text=str(path), weights={"boolq": 2.0}, target="boolq")
    settings = OracleSettings(
        config=config, tokenizer=make_tokenizer(), task_paths=(), seed=0, purposes=("search",)
    )
    assert perplexity(settings).describe()["documents"] == {"search": {"text": [0]}}
