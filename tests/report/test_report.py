from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.trials import Phase, Trial, TrialState
from rankadaptor_plugin.report import tables
from rankadaptor_plugin.report.report import markdown, page, write_report
from rankadaptor_plugin.report.words import gain_sentence, interval, recovered_line
from rankadaptor_plugin.verdict.race import baseline_label
from rankadaptor_plugin.verdict.statistics import Difference, Seeds

TASKS = ("tiny_boolq", "tiny_piqa", "arc_easy")


def comparison(estimate: float, half_width: float) -> Difference:
    low, high = estimate - half_width, estimate + half_width
    return Difference(
        estimate=estimate,
        low=low,
        high=high,
        half_width=half_width,
        confidence=0.95,
        comparisons=1,
        p=0.5,
        p_adjusted=0.5,
        seeds=Seeds(5, 5, paired=True, left_out=0),
        documents=600,
        left_out=0,
    )


def report_data(
    layers: int = 12,
    tasks: tuple[str, ...] = TASKS,
    *,
    trials: int = 30,
    delivered: str = "searched",
    predictions: bool = True,
    fail: tuple[int, ...] = (7, 19),
    objective: str = "choice_logprob",
) -> dict:
    rng = np.random.default_rng(layers)
    uniform = [8] * layers
    searched = [int(rank) for rank in rng.choice([2, 4, 6, 8, 10, 12], size=layers)]
    models = {"base": 0.70, "pruned": 0.45, "uniform": 0.61, "searched": 0.63}
    scores = {}
    for model, level in models.items():
        scores[model] = {
            task: {
                "accuracy": {
                    "mean": level + 0.05 * float(rng.normal()),
                    "half_width": 0.02 + 0.01 * float(rng.random()),
                },
                "choice_logprob": {"mean": float(level - 1.4), "half_width": 0.021},
            }
            for task in (*tasks, "mean")
        }
    scores["recovered"] = scores[delivered]
    listed = []
    for i in range(trials):
        ok = i not in fail
        value = -0.80 + 0.05 * float(rng.normal()) + 0.002 * i
        listed.append(
            Trial(
                position=i,
                phase=Phase.INITIALIZATION if i < 10 else Phase.ITERATION,
                allocation=RankAllocation(
                    tuple(int(r) for r in rng.choice([2, 4, 6, 8, 10, 12], size=layers))
                ),
                seed=0,
                state=TrialState.COMPLETE if ok else TrialState.FAILED,
                objective=value if ok else None,
                predicted=value + 0.04 * float(rng.normal()) if predictions and i >= 10 else None,
                train_loss=2.0 + float(rng.random()) if ok else None,
                seconds={"recovery": 40.0, "oracle": 11.5, "search": 0.4} if ok else {},
                reason=None if ok else "training loss is not finite",
            ).to_json()
        )
    found = comparison(0.0132, 0.0081)
    return {
        "verdict": {
            "headline": "recovered 12.0 of the 24.0 points that pruning cost",
            "sentence": gain_sentence(found, "the stack", "LoRA r=8 by the recipe"),
            "ranks": "ranks alone: no gain beyond noise",
            "costs": "at equal optimizer steps; it learned from the unpruned model's predictions",
            "method": "distill",
            "delivered": delivered,
            "baseline": baseline_label(uniform),
            "comparisons": {
                "accuracy": found.to_json(),
                "choice_logprob": comparison(0.0314, 0.0123).to_json(),
            },
            "comparisons_of_ranks": {"accuracy": comparison(0.001, 0.008).to_json()},
        },
        "tune": {
            "recipe": 1e-4,
            "learning_rate": 1e-3,
            "stack": "distill",
            "parts": ["distill"],
            "at_edge": True,
            "fine_tunes": 3,
            "seconds": 61.0,
            "curves": {
                "lora": [
                    {"learning_rate": 1e-4, "mean": -0.8, "values": [-0.8], "reason": ""},
                    {"learning_rate": 0.1, "mean": None, "values": [], "reason": "loss | is nan"},
                ]
            },
            "tried": [
                {
                    "part": "distill",
                    "difference": comparison(0.1, 0.05).to_json(),
                    "by_seed": [0.1],
                    "stays": True,
                    "reason": "",
                }
            ],
        },
        "compensation": {"sequences": 12, "text": ["recovery corpus", "c4"], "seconds": 3.0},
        "tasks": list(tasks),
        "metrics": ["accuracy", "choice_logprob", "margin"],
        "results": {},
        "noise": None,
        "generation": [],
        "scores": scores,
        "allocations": {
            "uniform": uniform,
            "searched": searched,
            "recovered": searched if delivered == "searched" else uniform,
        },
        "parameters": {
            "base": 1_200_000,
            "pruned": 800_000,
            "trainable": {"uniform": 40_000, "searched": 39_870, "recovered": 39_870},
        },
        "widths": [[4, 2, 352] if 3 < i < layers - 2 else [8, 4, 704] for i in range(layers)],
        "kept_layers": list(range(layers)),
        "layers": {"base": layers, "pruned": layers},
        "hidden_sizes": {"base": 128, "pruned": 128},
        "dtype": "float32",
        "footprints": {
            "base": {
                "parameters": 1_200_000,
                "macs": 80_000_000,
                "kv_cache_bytes": 512,
                "checkpoint_bytes": 4_800_000,
            },
            "pruned": {
                "parameters": 800_000,
                "macs": 50_000_000,
                "kv_cache_bytes": 384,
                "checkpoint_bytes": 3_200_000,
            },
        },
        "trials": listed,
        "objective": {"metric": objective, "target": "mean"},
        "search": {
            "stop_reason": "trial budget used",
            "n_startup_trials": 10,
            "complete": trials - len(fail),
            "failed": len(fail),
            "interrupted": 1,
            "method": "paper",
        },
        "front": [],
        "knowledge": [],
        "confirm": {
            "error_rate": 0.05,
            "confidence": 0.95,
            "metric": "accuracy",
            "seeds": [101, 102, 103],
            "comparisons": 2,
            "baselines": [],
            "fine_tunes": 8,
            "competitors": [
                {
                    "label": "finalist",
                    "ranks": searched,
                    "settings": {},
                    "baseline": uniform,
                    "chosen": True,
                    "search_objective": -0.71,
                    "per_seed": [0.01, 0.02, 0.015],
                    "reason": None,
                    "detail": "",
                    "comparison": None,
                },
                {
                    "label": "best random",
                    "ranks": uniform,
                    "settings": {"alpha_over_rank": 4.0},
                    "baseline": uniform,
                    "chosen": False,
                    "search_objective": -0.74,
                    "per_seed": [-0.02, -0.03],
                    "reason": "a fine-tune failed",
                    "detail": "",
                    "comparison": None,
                },
            ],
        },
        "cost": {
            "stages": {"prune": 3.2, "search": 1560.0, "confirm": 780.5, "report": 0.4},
            "fine_tuning": 1900.0,
            "evaluation": 400.0,
            "other": 44.1,
            "per_trial": 51.9,
            "peak_memory_bytes": 3 * 2**30,
        },
        "versions": {"torch": "2.13.0", "peft": "0.21.0"},
        "seeds": {"run": 0, "confirm": [101, 102, 103, 104, 105]},
        "documents": {
            "search": dict.fromkeys(tasks, 100),
            "report": dict.fromkeys(tasks, 200),
        },
        "config": {
            "model": "embedded",
            "seed": 0,
            "search": {"method": "paper", "n_trials": 30},
        },
        "device": "cuda:0 (NVIDIA H100)",
        "quantization": "Q4_1",
    }


class Reader(HTMLParser):
    """Collects the text, checks that tags nest, and keeps all attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag != "meta":  # the only void element of the page
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def check(data: dict) -> tuple[str, str]:
    """Renders both ways, checks what always holds, and returns the texts."""
    text, html = markdown(data), page(data)
    reader = Reader(html)
    assert set(reader.tags).isdisjoint({"script", "link", "img", "iframe", "object", "b"})
    names = {name for name, _ in reader.attributes}
    assert names.isdisjoint({"src", "href", "xlink:href", "srcset", "style", "onload"})
    assert not re.search(r"url\(|@import", html)
    for name, value in reader.attributes:
        assert "nan" not in re.split(r"[^a-z]+", value.lower()) or name == "aria-label"
    assert "role" in names
    assert html.count("<svg") == html.count('role="img" aria-label="')
    seen = " ".join("".join(reader.text).split()).replace(" ± ", " +- ")
    for metric in ("accuracy", "choice_logprob"):
        table = tables.scores(data, metric)
        if table is not None:
            for row in table.rows:
                for cell in row[1:]:
                    assert cell in text
                    assert cell in seen
    return text, html


@pytest.mark.parametrize(
    ("estimate", "half_width", "sentence"),
    [
        (0.013, 0.008, "gain of 1.3 +- 0.8 points over LoRA r=8 at equal parameters, by it"),
        (
            -0.002,
            0.011,
            "no gain beyond noise: -0.2 +- 1.1 points over LoRA r=8 at equal parameters, by it",
        ),
        (
            -0.0002,
            0.011,
            "no gain beyond noise: 0.0 +- 1.1 points over LoRA r=8 at equal parameters, by it",
        ),
        (
            -0.02,
            0.005,
            "no gain: it is worse than LoRA r=8 by 2.0 +- 0.5 points at equal parameters",
        ),
        (
            0.00841,
            0.00838,
            "gain of 0.841 +- 0.838 points over LoRA r=8 at equal parameters, by it",
        ),
        (
            -0.0084,
            0.0082,
            "no gain: it is worse than LoRA r=8 by 0.84 +- 0.82 points at equal parameters",
        ),
        (
            0.01,
            float("inf"),
            "no gain beyond noise: 1.0 +- n/a points over LoRA r=8 at equal parameters, by it",
        ),
    ],
)
def test_a_gain_is_said_in_one_sentence(estimate: float, half_width: float, sentence: str) -> None:
    assert gain_sentence(comparison(estimate, half_width), "it", "LoRA r=8") == sentence


@pytest.mark.parametrize(
    ("base", "pruned", "recovered", "line"),
    [
        (0.9, 0.5, 0.7, "recovered 20.0 of the 40.0 points that pruning cost"),
        (0.9, 0.5, 0.5, "recovered none of the 40.0 points that pruning cost"),
        (0.9, 0.5, 0.92, "recovered all of the 40.0 points that pruning cost, and 2.0 more"),
        (0.5, 0.5, 0.6, "pruning cost nothing in accuracy; recovery adds 10.0 points"),
        (0.5, 0.6, 0.55, "pruning cost nothing in accuracy; recovery adds -5.0 points"),
    ],
)
def test_the_first_line_says_what_is_recovered(base, pruned, recovered, line) -> None:
    assert recovered_line(base, pruned, recovered) == line


def test_the_first_line_has_the_unit_of_its_metric_and_the_task() -> None:
    line = recovered_line(-1.0, -2.0, -1.5, metric="gold_logprob", task="piqa")
    assert line == "recovered 0.500 of the 1.000 nats per byte that pruning cost on piqa"


@given(st.floats(-1, 1), st.floats(0, 1))
def test_the_sentence_never_contradicts_the_interval(estimate: float, half_width: float) -> None:
    found = comparison(estimate, half_width)
    sentence = gain_sentence(found, "it", "LoRA r=8")
    assert sentence.startswith("gain of") == found.is_gain
    assert ("worse than" in sentence) == found.is_loss
    assert "-0.0 " not in sentence
    value, half = (float(x) for x in re.search(r"(-?[\d.]+) \+- ([\d.]+)", sentence).groups())
    if not found.is_gain and not found.is_loss:
        assert abs(value) <= half + 1e-9
    elif abs(estimate) - half_width > 1e-7:
        assert value > half


@pytest.mark.parametrize("delivered", ["uniform", "searched"])
def test_full_report(delivered: str) -> None:
    data = report_data(delivered=delivered)
    text, html = check(data)
    assert text.startswith("# recovered 12.0 of the 24.0 points that pruning cost")
    assert "- gain of 1.3 +- 0.8 points over LoRA r=8 by the recipe at equal parameters" in text
    assert "gain of 1.3 ± 0.8 points" in html
    header = tables.scores(data, "accuracy").header
    names = {"uniform": "uniform LoRA", "searched": "searched ranks"}
    assert [name for name in header if "(delivered)" in name] == [f"{names[delivered]} (delivered)"]
    assert "recovered" not in header
    for value in ("1.3 +- 0.8", "0.5 to 2.1", "0.031 +- 0.012"):
        assert value in text
    assert "█" in text
    for name in ("2.13.0", "101, 102", "method = ", "3.00 GiB", "51.9 s", "26 min 00 s"):
        assert name in text
        assert name in html.replace("&quot;", '"')
    assert html.count("<svg") == 5
    assert "training loss is not finite" in text


def test_mean_row_is_set_apart() -> None:
    assert '<tr class="total"><th scope="row" class="words">mean</th>' in page(report_data())


def test_best_so_far_shades_initialization_and_marks_failures() -> None:
    html = page(report_data())
    assert "initialization phase: trials 1 to 10" in html
    assert html.count('class="failed"') == 2
    assert html.count('class="diagonal"') == 1


def test_rank_bars_are_right() -> None:
    data = report_data(layers=3)
    data["allocations"]["searched"] = [2, 24, 1]
    text = markdown(data)
    assert f"    1  {'█' * 8} 8" in text
    assert "█" * 24 + " 24" in text
    assert "layer 1: searched rank 24" in page(data)
    data["allocations"]["searched"] = [64, 1, 8]
    assert "█" * 24 + " 64" in markdown(data)


@pytest.mark.parametrize("layers", [1, 2, 80])
def test_layer_counts(layers: int) -> None:
    data = report_data(layers=layers)
    _, html = check(data)
    assert html.count('<rect class="searched"') == layers
    assert html.count('<rect class="uniform"') == layers


def test_without_predictions() -> None:
    _, html = check(report_data(predictions=False))
    assert "No trial has both a prediction and a measured value." in html
    assert 'class="diagonal"' not in html


def test_all_trials_failed() -> None:
    data = report_data(trials=3, fail=(0, 1, 2), delivered="uniform")
    del data["scores"]["searched"], data["allocations"]["searched"]
    del data["parameters"]["trainable"]["searched"]
    data["verdict"] |= {"comparisons": {}, "comparisons_of_ranks": {}, "sentence": "nothing"}
    data["confirm"]["competitors"] = []
    data["cost"]["per_trial"] = data["cost"]["peak_memory_bytes"] = None
    text, html = check(data)
    assert "No trial is complete." in html
    assert "What was gained over the recipe" not in text + html
    assert "What the ranks alone gave" not in text + html
    assert "n/a" in text


def test_no_trials_and_one_trial() -> None:
    check(report_data(trials=0, fail=()))
    check(report_data(trials=1, fail=()))


def test_accuracy_as_objective_is_in_percent() -> None:
    data = report_data(objective="accuracy")
    for trial in data["trials"]:
        if trial["objective"] is not None:
            trial["objective"] = 0.5
    text, html = check(data)
    assert "| 50.0 |" in text
    assert "measured (accuracy in %)" in html


def test_unknown_half_width() -> None:
    data = report_data()
    data["scores"]["base"]["arc_easy"]["accuracy"]["half_width"] = None
    data["verdict"]["comparisons"]["accuracy"] |= {"half_width": None, "low": None, "high": None}
    text, html = check(data)
    assert "+- n/a" in text
    assert "± n/a" in html


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ({"mean": 0.5, "half_width": 0.2, "low": 0.3, "high": 0.7}, "50.0 +- 20.0"),
        ({"mean": 0.97, "half_width": 0.06, "low": 0.91, "high": 1.0}, "97.0 (91.0 to 100.0)"),
        ({"mean": 0.04, "half_width": 0.06, "low": 0.0, "high": 0.1}, "4.0 (0.0 to 10.0)"),
        ({"mean": 0.5, "half_width": None, "low": None, "high": None}, "50.0 +- n/a"),
        ({"mean": 0.5, "half_width": 0.2}, "50.0 +- 20.0"),  # of an earlier version
        (None, "n/a"),
    ],
)
def test_an_interval_ends_where_the_metric_does(cell, text) -> None:
    assert interval(cell, "accuracy") == text


def test_lora_is_called_by_its_ranks_and_its_size_where_two_are_shown() -> None:
    data = report_data(delivered="uniform")
    data["labels"] = {"uniform": "LoRA r=8"}
    header = tables.scores(data, "accuracy").header
    assert header == ("task", "base", "pruned", "LoRA r=8 (delivered)", "searched ranks")
    data["labels"] = {"uniform": "LoRA r=5 to 6", "lora": "LoRA r=8"}
    data["methods"] = ["lora"]
    data["scores"]["lora"] = data["scores"]["uniform"]
    data["parameters"]["trainable"] |= {"uniform": 29_952, "lora": 40_000}
    text, html = check(data)
    for shown in (text, html):
        assert "LoRA r=8, 40,000 parameters" in shown
        assert "LoRA r=5 to 6, 29,952 parameters" in shown
    assert text.count("Delivered: LoRA r=5 to 6, 29,952 parameters, an adapter of pruned/.") == 1
    assert "uniform" not in text


def test_a_metric_is_explained_where_it_is_shown() -> None:
    for shown in check(report_data()):
        assert "choice_logprob in nats (log-probability of the right choice" in shown
        assert shown.count("share of documents answered correctly") >= 3


def test_everything_is_escaped() -> None:
    evil = ("<b>", '"><script>alert(1)</script>', "a|b`c*_d_\n# e")
    data = report_data(tasks=evil)
    data["objective"]["target"] = "<b>"
    data["device"] = "<img src=https://example.org/x>"
    data["versions"] = {"<b>": "</table><script>"}
    data["search"]["stop_reason"] = "<b>now</b>"
    data["verdict"] |= dict.fromkeys(("headline", "sentence", "ranks", "costs"), "<b>gain</b>")
    data["tune"]["curves"] = {"<b>": data["tune"]["curves"]["lora"]}
    data["tune"]["tried"][0] |= {"part": "<b>", "stays": False, "reason": "<b>"}
    data["compensation"]["text"] = ["<b>"]
    data["verdict"]["baseline"] = "<b>"
    data["config"] = {"x": "</pre><script>", "y": {"z": "```\n<b>"}}
    data["trials"][7]["reason"] = "</td><b>|"
    data["cost"]["stages"] = {"<b>": 1.0}
    data["seeds"] = {"<b>": [1]}
    text, html = check(data)
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
    # In Markdown only code blocks, which show their text as it is, may hold the raw characters.
    outside = re.sub(r"(?ms)^(`{3,})text$.*?^\1$", "", text)
    assert "<b>" not in outside
    assert "<script>" not in outside
    assert "\n# e" not in outside
    assert "````text" in text
    width = len(tables.scores(data, "accuracy").header) + 1
    row = next(line for line in outside.splitlines() if "a\\|b" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == width


def test_a_base_model_that_was_quantized_is_told() -> None:
    assert "the base model had been quantized (Q4_1), which its scores" in markdown(report_data())
    assert "quantized" not in markdown(report_data() | {"quantization": ""})


def test_underscores_in_names_stay_readable() -> None:
    assert "| tiny_boolq |" in markdown(report_data())


def test_pictures_stay_inside_their_frame() -> None:
    for html in (page(report_data()), page(report_data(layers=80)), page(report_data(trials=1))):
        for box in re.findall(r'<svg viewBox="0 0 ([\d.]+) ([\d.]+)".*?</svg>', html):
            width, height = map(float, box)
            assert width > 0
            assert height > 0
        for x, y in re.findall(r'<circle cx="([^"]+)" cy="([^"]+)"', html):
            assert 0 <= float(x) <= 720
            assert 0 <= float(y) <= 330


def test_write_report(tmp_path) -> None:
    data = report_data()
    data["trials"][3]["train_loss"] = float("nan")
    data["cost"]["other"] = np.float64(44.1).item()
    paths = write_report(tmp_path / "run", data)
    assert [p.name for p in paths] == ["report.json", "report.md", "report.html"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(p.name for p in paths)
    plain = json.loads(paths[0].read_text(encoding="utf-8"))
    assert plain["trials"][3]["train_loss"] is None
    assert list(plain) == sorted(plain)
    assert markdown(plain) == paths[1].read_text(encoding="utf-8")
    assert page(plain) == paths[2].read_text(encoding="utf-8")
    before = [p.read_bytes() for p in paths]
    write_report(tmp_path / "run", dict(reversed(data.items())))
    assert [p.read_bytes() for p in paths] == before


def test_unwritable_folder(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_report(tmp_path / "file", report_data())
