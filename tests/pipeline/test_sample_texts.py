"""The texts in a run's report: of every model, the same in every session, made once."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import LoraLayer

from rankadaptor_plugin import hookimpl
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.models.pruned_model import load_pruned
from rankadaptor_plugin.oracle.lm_eval_oracle import LmEvalOracle
from rankadaptor_plugin.pipeline.context import Recovered
from rankadaptor_plugin.pipeline.texts import EMBEDDED_PROMPTS
from rankadaptor_plugin.recovery.adapters import attach, trainable_parameters

QUICK = {
    "corpus": {"max_train_samples": 64},
    "prune": {"importance": "magnitude"},
    "recovery": {"max_steps": 2},
    "oracle": {"name": "counting", "tasks": ["tiny_boolq"], "search_documents": 8},
    "search": {"method": "random", "n_trials": 3},
    "generation": {"max_new_tokens": 5},
}
OWN = {"prompts": ["ada lives in the", "is it"], "max_new_tokens": 3}


class Watcher:
    """Counts fine-tunes, which are scored once each on search documents; keeps the model."""

    def __init__(self):
        self.scores, self.pruned = 0, None

    @hookimpl
    def rankadaptor_register_oracles(self, register):
        watcher = self

        class CountingOracle(LmEvalOracle):
            def score(self, model, documents):
                watcher.scores += 1
                return super().score(model, documents)

        register("counting", CountingOracle)

    @hookimpl(tryfirst=True)
    def rankadaptor_post_prune(self, pruned):
        self.pruned = pruned


class Foreign(Watcher):
    """A recovery stage of another package: one rank everywhere, no fine-tune."""

    def __init__(self, fill):
        super().__init__()
        self.fill = fill

    @hookimpl(tryfirst=True)
    def rankadaptor_post_prune(self, pruned, context):
        self.pruned = pruned
        allocation = RankAllocation((1,) * len(pruned.widths))
        model = attach(pruned.model, allocation, seed=0)
        for parameter in trainable_parameters(model):
            parameter.data.fill_(self.fill)
        model.save_pretrained(context.folder / "adapter")
        model.unload()
        return Recovered(adapter=context.folder / "adapter", allocation=allocation)


def report_of(folder):
    return json.loads((folder / "report.json").read_text("utf-8"))


def but_texts(report):
    """What the texts do not change, apart from costs."""
    return {k: v for k, v in report.items() if k not in ("generation", "cost", "config")}


@pytest.fixture(scope="module")
def written(tmp_path_factory, write_run_file, command):
    """A run with texts after the default prompts; for reading only."""
    folder, watcher = tmp_path_factory.mktemp("written"), Watcher()
    result = command("run", write_run_file(folder / "r.toml", **QUICK), plugin=watcher)
    assert result.exit_code == 0, result.stderr
    out = folder / "out"
    return SimpleNamespace(folder=out, watcher=watcher, report=report_of(out), result=result)


@pytest.fixture
def again(written, tmp_path, write_run_file, command):
    """Runs again in a copy, with other settings of the texts."""

    def call(change=lambda out: None, **generation):
        out = shutil.copytree(written.folder, tmp_path / "out")
        change(out)
        watcher = Watcher()
        table = {**QUICK["generation"], **generation}
        file = write_run_file(tmp_path / "r.toml", **{**QUICK, "generation": table})
        result = command("run", file, plugin=watcher)
        assert result.exit_code == 0, result.stderr
        return SimpleNamespace(folder=out, watcher=watcher, report=report_of(out), result=result)

    return call


def models(report):
    return list(dict.fromkeys(entry["model"] for entry in report["generation"]))


def test_every_model_writes_after_every_prompt_in_both_ways(written):
    entries = written.report["generation"]
    names = models(written.report)
    assert names == ["base", "pruned", "uniform", "searched"]
    assert set(names) == written.report["scores"].keys() - {"recovered"}
    expected = [
        (name, prompt.kind, prompt.text, decoding)
        for name in names
        for prompt in EMBEDDED_PROMPTS
        for decoding in ("greedy", "sampled")
    ]
    found = [tuple(e[key] for key in ("model", "kind", "prompt", "decoding")) for e in entries]
    assert found == expected
    assert all(len(entry["text"].split()) <= 5 for entry in entries)
    assert all(entry["perplexity"] is None or entry["perplexity"] >= 1 for entry in entries)


def test_recovery_changes_what_is_written(written):
    texts = {
        name: [e["text"] for e in written.report["generation"] if e["model"] == name]
        for name in models(written.report)
    }
    assert texts["base"] != texts["pruned"]
    assert texts["uniform"] != texts["pruned"]


def test_the_texts_stand_in_every_form_of_the_report(written):
    assert "\n## Texts\n" in (written.folder / "report.md").read_text("utf-8")
    longest = max((entry["text"].strip() for entry in written.report["generation"]), key=len)
    for suffix in ("md", "html"):
        text = (written.folder / f"report.{suffix}").read_text("utf-8")
        for prompt in EMBEDDED_PROMPTS:
            assert prompt.text in text
        assert longest.split("<")[0] in text
    assert "] texts" in written.result.stderr
    assert written.report["cost"]["stages"]["texts"] > 0


def test_the_pruned_model_comes_back_without_adapter(written):
    model, read = written.watcher.pruned.model, load_pruned(written.folder / "pruned").model
    assert not [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    state = model.state_dict()
    assert state.keys() == read.state_dict().keys()
    assert all(torch.equal(state[name], weight) for name, weight in read.state_dict().items())


def test_a_second_session_makes_none_anew(written, again):
    found = again()
    name = "generations.json"
    assert (found.folder / name).read_bytes() == (written.folder / name).read_bytes()
    assert found.report["generation"] == written.report["generation"]
    stages = (report["cost"]["stages"]["texts"] for report in (found.report, written.report))
    assert len(set(stages)) == 1


def test_other_settings_change_the_texts_alone(written, again):
    found = again(max_new_tokens=4, temperature=2.0, top_p=1.0)
    assert found.watcher.scores == 0
    assert but_texts(found.report) == but_texts(written.report)
    before, after = (report["generation"] for report in (written.report, found.report))
    assert len(before) == len(after)
    greedy = [(a["text"], b["text"]) for a, b in zip(before, after, strict=True)][::2]
    assert all(old.startswith(new) for old, new in greedy)
    assert before != after


def test_prompts_of_ones_own_appear(again):
    found = again(**OWN)
    entries = found.report["generation"]
    assert list(dict.fromkeys(entry["prompt"] for entry in entries)) == OWN["prompts"]
    assert {entry["kind"] for entry in entries} == {"prompt"}
    assert len(entries) == 4 * 2 * 2
    text = (found.folder / "report.md").read_text("utf-8")
    assert all(prompt in text for prompt in OWN["prompts"])


def test_more_tokens_than_the_window_has_are_cut(again):
    found = again(prompts=["first wash cups"], max_new_tokens=100_000)
    window = found.watcher.pruned.model.config.max_position_embeddings
    words = [len(entry["text"].split()) for entry in found.report["generation"]]
    assert max(words) <= window // 2


def test_no_tokens_leave_the_texts_out(finished, again):
    assert finished.report["generation"] == []
    assert not (finished.folder / "generations.json").exists()
    found = again(max_new_tokens=0)
    assert found.report["generation"] == []
    assert found.watcher.scores == 0
    for folder in (finished.folder, found.folder):
        assert "## Texts" not in (folder / "report.md").read_text("utf-8")


def test_a_prompt_without_tokens_is_one_line_before_any_work(tmp_path, write_run_file, command):
    watcher = Watcher()
    table = {**QUICK["generation"], "prompts": [""]}
    file = write_run_file(tmp_path / "r.toml", **{**QUICK, "generation": table})
    result = command("run", file, plugin=watcher)
    assert result.exit_code == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert "has no tokens" in result.stderr.splitlines()[-1]
    assert watcher.scores == 0


def test_a_foreign_stage_has_recovered_texts_of_the_adapter_at_hand(
    tmp_path, write_run_file, command
):
    file = write_run_file(tmp_path / "r.toml", **{**QUICK, "generation": OWN})
    texts = []
    for fill, output in ((0.05, "out"), (1.0, "out"), (1.0, "fresh")):
        stage = Foreign(fill)
        result = command("run", file, "--output", tmp_path / output, plugin=stage)
        assert result.exit_code == 0, result.stderr
        report = report_of(tmp_path / output)
        assert models(report) == ["base", "pruned", "recovered"]
        assert not any(isinstance(m, LoraLayer) for m in stage.pruned.model.modules())
        texts.append([e["text"] for e in report["generation"] if e["model"] == "recovered"])
    first, changed, fresh = texts
    assert first != fresh
    assert changed == fresh
