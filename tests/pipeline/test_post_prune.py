"""The script of docs/torch-pruning.md really runs, and goes on when it is run again."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoConfig

from rankadaptor_plugin.config.run_file import model_folder
from rankadaptor_plugin.core.errors import ConfigError, UnsupportedModelError
from rankadaptor_plugin.models.families import LLAMA
from rankadaptor_plugin.models.modeling_rankadaptor import PrunedLlamaForCausalLM
from rankadaptor_plugin.models.pruned_model import load_pruned
from rankadaptor_plugin.models.structures import layer_widths
from rankadaptor_plugin.pipeline import fine_tuning
from rankadaptor_plugin.post_prune import recover_after_pruning
from rankadaptor_plugin.pruning.cutting import describe_pruned

PAGE = Path(__file__).parents[2] / "docs" / "torch-pruning.md"
SCRIPT = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
BUILD, _, _ = SCRIPT.partition("recover_after_pruning(pruner")
BASE = LLAMA.from_config(AutoConfig.from_pretrained(model_folder("embedded")))
HALF = {type(BASE)(BASE.heads // 2, BASE.kv_heads // 2, BASE.channels // 2)}

pytestmark = [
    # What the page calls harmless: torch-pruning names the norms that are ignored.
    pytest.mark.filterwarnings("ignore:Unwrapped parameters detected:UserWarning"),
    # peft 0.21 asks transformers 5.23 by an outdated name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SMALLER = {
    "corpus": {"max_train_samples": 64},
    "oracle": {"tasks": ["tiny_boolq"], "search_documents": 4, "report_documents": 6},
    "performance_model": {"meta_epochs": 2, "epochs": 2},
    "search": {"n_startup_trials": 2, "n_trials": 3},
    "recovery": {"max_steps": 2},
}


def built(**replaced: str) -> dict[str, object]:
    """What the script has built before its added line, with some text replaced."""
    source = BUILD
    for old, new in replaced.items():
        assert old in source
        source = source.replace(old, new)
    names: dict[str, object] = {}
    exec(source, names)  # noqa: S102 - the documented script
    return names


def give_gradients(names) -> None:
    inputs = names["inputs"]
    names["model"](**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_run_file):
    """Where the script has run once, in a process of its own."""
    folder = tmp_path_factory.mktemp("script")
    write_run_file(folder / "RUN.toml", **SMALLER)
    (folder / "prune.py").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run([sys.executable, "prune.py"], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_script_is_short_and_the_added_line_is_one():
    assert len([line for line in SCRIPT.splitlines() if line.strip()]) <= 35
    assert SCRIPT.count("recover_after_pruning") == 2  # its import and its call


def test_the_script_leaves_a_report_a_pruned_model_and_an_adapter(folder):
    run = folder / "out"
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert set(report["scores"]) == {"base", "pruned", "uniform", "searched", "recovered"}
    assert len(report["trials"]) == 3
    pruned = load_pruned(run / "pruned")
    assert pruned.provenance == {"pruner": "custom"}
    assert set(pruned.widths) == HALF
    model = PeftModel.from_pretrained(pruned.model, run / "adapter")
    pattern = model.peft_config["default"].rank_pattern
    assert list(pattern.values()) == report["allocations"]["recovered"]
    assert " trial 3/3 (" in (run / "run.log").read_text(encoding="utf-8")


def test_the_script_run_again_goes_on_without_a_new_fine_tune(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("fine-tuned again")

    before = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    (folder / "out" / "report.json").unlink()
    monkeypatch.setattr(fine_tuning, "recover", refuse)
    monkeypatch.chdir(folder)
    runpy.run_path("prune.py", run_name="__main__")
    after = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    for report in (before, after):
        del report["cost"]
    assert after == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"search": {"method": "papper"}}, ConfigError, "Did you mean 'paper'"),
        ({"oracle": {"name": "lm_eval"}}, ConfigError, "Did you mean 'lm-eval'"),
        ({"recovery": {"step": 2}}, ConfigError, "Unknown key recovery.step"),
        (
            {"model": "no/such/folder", "corpus": {"path": "embedded"}},
            ConfigError,
            "does not exist",
        ),
        (None, ConfigError, "rankadaptor-plugin init"),
    ],
)
def test_a_wrong_run_file_is_refused_before_anything_is_pruned(
    changes, error, message, tmp_path, write_run_file
):
    pruner = built()["pruner"]
    before = sum(p.numel() for p in pruner.model.parameters())
    if changes is not None:
        write_run_file(tmp_path / "RUN.toml", **changes)
    with pytest.raises(error, match=re.escape(message)):
        recover_after_pruning(pruner, tmp_path / "RUN.toml")
    assert not (tmp_path / "out").exists()
    assert sum(p.numel() for p in pruner.model.parameters()) == before
    pruner.model.zero_grad()
    assert "step" not in vars(pruner), "the pruner was changed all the same"


def test_recovery_follows_the_last_group_of_the_last_interactive_step(tmp_path, write_run_file):
    names = built(**{"    prune_num_heads": "    iterative_steps=2,\n    prune_num_heads"})
    pruner, model, results = names["pruner"], names["model"], []
    path = write_run_file(tmp_path / "RUN.toml", **SMALLER)
    recover_after_pruning(pruner, path, results.append)
    for step in range(2):
        give_gradients(names)
        for group in pruner.step(interactive=True):
            assert not results
            group.prune()
        assert len(results) == step
    assert results[0].folder == tmp_path / "out"
    assert results[0].report["verdict"]["sentence"] in results[0].verdict
    assert (results[0].adapter / "adapter_config.json").is_file()
    assert type(model) is PrunedLlamaForCausalLM
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert not any(p.grad is not None for p in model.parameters())
    assert load_pruned(tmp_path / "out" / "pruned").widths == layer_widths(model)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\nwith traceable", "\nmodel.requires_grad_(False)\nwith traceable"),
        ("    pruning_ratio=0.5,", "    pruning_ratio=0,"),
    ],
)
def test_frozen_parameters_and_pruning_ratio_0_still_leave_heads_whole(old, new):
    names = built(**{old: new})
    names["model"].requires_grad_(True)
    give_gradients(names)
    names["pruner"].step()
    assert {width.heads for width in layer_widths(names["model"])} == {BASE.heads}


def test_a_hidden_size_that_was_pruned_as_well_is_described():
    names = built(
        **{
            "ignored_layers += ": "unused = ",
            '*(p for n, p in model.named_parameters() if "norm" in n)': "",
        }
    )
    give_gradients(names)
    names["pruner"].step()
    before = AutoConfig.from_pretrained(model_folder("embedded"))
    names["model"].config.num_attention_heads = 2  # as scripts in torch-pruning's style do
    pruned = describe_pruned(names["model"], None, base_config=before)
    assert pruned.shape.hidden == before.hidden_size // 2 == pruned.base_shape.hidden // 2
    assert set(pruned.widths) == HALF
    assert all(pruned.pruned_layers)
    assert names["model"](**names["inputs"]).logits.isfinite().all()


def test_a_hidden_size_that_was_pruned_in_part_is_refused():
    names = built(**{"ignored_layers += ": "unused = "})
    give_gradients(names)
    names["pruner"].step()
    with pytest.raises(UnsupportedModelError, match=r"layernorm has 48 weights.*leave the norms"):
        describe_pruned(names["model"], None)
