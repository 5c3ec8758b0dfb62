"""Exports load: with the package, and in a process where it cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    Olmo2Config,
    Phi3Config,
)

from rankadaptor_plugin.config.tables import PruneConfig
from rankadaptor_plugin.core.errors import ArtifactError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.models import families
from rankadaptor_plugin.models.families import register_family
from rankadaptor_plugin.models.modeling_rankadaptor import Structure
from rankadaptor_plugin.models.pruned_model import RECORD, PrunedModel, load_pruned
from rankadaptor_plugin.models.structures import layer_units
from rankadaptor_plugin.pipeline import export as export_module
from rankadaptor_plugin.pipeline.export import MARK, export
from rankadaptor_plugin.pruning.cutting import remove
from rankadaptor_plugin.pruning.depth import prune_depth
from rankadaptor_plugin.recovery.adapters import attach
from rankadaptor_plugin.recovery.files import merged

TOKENS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
CODE = "modeling_rankadaptor.py"
# peft 0.21 asks transformers 5.23 by an outdated name.
OLD_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
pytestmark = pytest.mark.filterwarnings(OLD_NAME)

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.3,
}
GPT2 = {
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def cut(model, tokenizer) -> PrunedModel:
    """Cuts one KV group of layer 1, where heads can go, and channels of layer 2."""
    units = layer_units(model)
    if units[1].attention:
        remove(units[1].attention, [0])
    remove(units[2].mlp, [3, 7, 11])
    return PrunedModel.of(model, tokenizer, {"pruner": "test"})


def make_run(folder: Path, pruned: PrunedModel) -> SimpleNamespace:
    """Writes what a finished run leaves, and returns what its models compute."""
    bare = logits(pruned.model)
    pruned.save(folder / "pruned")
    ranks = RankAllocation(tuple(range(1, len(pruned.widths) + 1)))
    model = attach(pruned.model, ranks, seed=0)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.eval().save_pretrained(folder / "adapter")
    (folder / "inputs.json").write_text("{}")
    (folder / "report.json").write_text("{}")
    adapted = logits(model)
    model.unload()
    return SimpleNamespace(folder=folder, pruned=pruned, bare=bare, adapted=adapted)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_llama, make_tokenizer):
    tokenizer = make_tokenizer()

    def model(config):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config).eval()

    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    register_family(Structure(model_type="olmo2", norms=norms, prunable_heads=False))
    stock = make_llama(num_hidden_layers=4)
    settings = PruneConfig(
        method="depth", importance="magnitude", pruning_ratio=0.5, keep_first=1, keep_last=0
    )
    pruned = {
        "llama": cut(make_llama(num_hidden_layers=3), tokenizer),
        "phi3": cut(model(Phi3Config(**SIZES, num_key_value_heads=2)), tokenizer),
        "gpt2": cut(model(GPT2Config(**GPT2)), tokenizer),
        "olmo2": cut(model(Olmo2Config(**SIZES)), tokenizer),
        "depth": prune_depth(stock, tokenizer, [TOKENS[0]], settings),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield {
            name: make_run(tmp_path_factory.mktemp(name), found) for name, found in pruned.items()
        }
    families._FAMILIES.pop("olmo2")


# ------------------------------------------------------------- in a process without the package

ELSEWHERE = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "rankadaptor_plugin":
            raise ModuleNotFoundError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
try:
    import rankadaptor_plugin
except ModuleNotFoundError:
    pass
else:
    sys.exit("the package is not hidden")

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
tokens = torch.tensor(json.loads(sys.argv[1]))
jobs, found, classes = json.loads(sys.argv[2]), {}, {}
settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": False,
            "pad_token_id": 1, "eos_token_id": None}
for name, folder, trusted in jobs:
    extra = {"trust_remote_code": True} if trusted else {}
    model, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **extra)
    AutoTokenizer.from_pretrained(folder, **extra)
    classes[name] = [type(model).__name__, type(model).__module__, any(notes.values())]
    with torch.no_grad():
        found[name] = model(input_ids=tokens, use_cache=False).logits
    found[name + "-cached"] = model.generate(tokens, use_cache=True, **settings)
    found[name + "-uncached"] = model.generate(tokens, use_cache=False, **settings)
    if name == "llama-hf-remote-code":
        from peft import PeftModel
        adapted = PeftModel.from_pretrained(model, folder + "/adapter").eval()
        with torch.no_grad():
            found[name + "-adapted"] = adapted(input_ids=tokens, use_cache=False).logits
save_file(found, sys.argv[3])
if any(name.startswith("rankadaptor_plugin") for name in sys.modules):
    sys.exit("the package was loaded")
print(json.dumps(classes))
"""

FORMATS = ("hf-remote-code", "merged")


@pytest.fixture(scope="module")
def elsewhere(runs, tmp_path_factory):
    """What every export computes in a process that cannot import the package."""
    folder, jobs = tmp_path_factory.mktemp("elsewhere"), []
    for name, run in runs.items():
        for form in ("hf", *FORMATS) if name == "depth" else FORMATS:
            export(run.folder, form, folder / f"{name}-{form}")
            jobs.append([f"{name}-{form}", str(folder / f"{name}-{form}"), name != "depth"])
    done = subprocess.run(
        [
            *(sys.executable, "-c", ELSEWHERE, json.dumps(TOKENS.tolist()), json.dumps(jobs)),
            str(folder / "found.safetensors"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_MODULES_CACHE": str(folder / "modules"),
            "HF_HUB_OFFLINE": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(
        folder=folder,
        found=load_file(folder / "found.safetensors"),
        classes=json.loads(done.stdout.splitlines()[-1]),
    )


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "olmo2", "depth"])
def test_without_the_package_logits_are_bit_equal(name, runs, elsewhere):
    key = f"{name}-hf-remote-code"
    assert torch.equal(elsewhere.found[key], runs[name].bare)
    assert torch.equal(elsewhere.found[f"{key}-cached"], elsewhere.found[f"{key}-uncached"])
    kind, module, noted = elsewhere.classes[key]
    assert kind == type(runs[name].pruned.model).__name__
    assert module.startswith("transformers_modules." if name != "depth" else "transformers.models.")
    assert not noted


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "olmo2", "depth"])
def test_merged_equals_the_model_with_its_adapter(name, runs, elsewhere):
    key, run = f"{name}-merged", runs[name]
    torch.testing.assert_close(elsewhere.found[key], run.adapted, rtol=0, atol=1e-5)
    assert (run.adapted - run.bare).abs().max() > 1e-2
    assert torch.equal(elsewhere.found[f"{key}-cached"], elsewhere.found[f"{key}-uncached"])
    folder = elsewhere.folder / key
    assert not (folder / "adapter").exists()
    found = load_pruned(folder)
    torch.testing.assert_close(logits(found.model), run.adapted, rtol=0, atol=1e-5)
    assert found.provenance == {**run.pruned.provenance, "merged_adapter": True}


def test_the_adapter_loads_without_the_package(runs, elsewhere):
    found = elsewhere.found["llama-hf-remote-code-adapted"]
    torch.testing.assert_close(found, runs["llama"].adapted, rtol=0, atol=1e-6)


def test_a_depth_pruned_model_needs_no_code(runs, elsewhere):
    assert torch.equal(elsewhere.found["depth-hf"], runs["depth"].bare)
    assert elsewhere.classes["depth-hf"][0] == "LlamaForCausalLM"
    for form in ("hf", *FORMATS):
        folder = elsewhere.folder / f"depth-{form}"
        assert not (folder / CODE).exists()
        assert "auto_map" not in json.loads((folder / "config.json").read_text())


# ---------------------------------------------------------------------------- with the package


def test_every_way_to_load_that_the_page_names(runs, tmp_path):
    run = runs["llama"]
    export(run.folder, "hf", tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "moved")  # the adapter must not name a folder
    folder = tmp_path / "moved"
    model = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    assert torch.equal(logits(model), run.bare)
    wrapped = PeftModel.from_pretrained(model, folder / "adapter").eval()
    assert torch.equal(logits(wrapped), run.adapted)
    at_once = AutoModelForCausalLM.from_pretrained(folder, adapter_kwargs={"subfolder": "adapter"})
    assert torch.equal(logits(at_once), run.adapted)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert load_pruned(folder).record() == run.pruned.record()
    text = "".join(p.read_text("utf-8") for p in folder.rglob("*.json"))
    assert str(run.folder) not in text
    assert sorted(p.name for p in (folder / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("form", ["hf", "hf-remote-code", "merged"])
def test_a_finished_run_is_exported_by_the_command_line(form, finished_copy, finished, command):
    done = command("export", finished_copy, "--format", form)
    assert done.exit_code == 0, done.stderr
    folder = finished_copy.parent / "out" / f"export-{form}"
    lines = done.stdout.splitlines()
    assert len(lines) == (2 if form == "merged" else 3)
    assert str(folder) in lines[0]
    assert ("trust_remote_code=True" in done.stdout) == (form != "hf")
    assert (folder / CODE).exists() == (form != "hf")
    assert (folder / "adapter").exists() == (form != "merged")
    assert (folder / "generation_config.json").exists()
    again = command("export", folder.parent, "--format", form)  # replaces it
    assert again.exit_code == 0, again.stderr
    assert not list(folder.parent.glob(".export*"))
    if form != "hf":
        source = Path(export_module.modeling_rankadaptor.__file__)
        assert (folder / CODE).read_bytes() == source.read_bytes()
    if form != "merged":
        assert (folder / "model.safetensors").read_bytes() == (
            finished.folder / "pruned" / "model.safetensors"
        ).read_bytes()


def test_the_command_says_where_no_code_is_needed(runs, tmp_path, command):
    words = ("--format", "hf-remote-code", "--output", tmp_path / "new")
    done = command("export", runs["depth"].folder, *words)
    assert "needs no code" in done.stdout
    assert "trust_remote_code" not in done.stdout


def test_the_lines_say_that_a_family_of_a_plugin_must_be_registered(runs, tmp_path):
    assert "first register_family" in export(runs["olmo2"].folder, "hf", tmp_path / "new")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "new")), runs["olmo2"].bare
    )
    assert "register_family" not in export(runs["gpt2"].folder, "hf", tmp_path / "other")


def test_weights_keep_their_type_and_shards_stay(make_llama, make_tokenizer, tmp_path):
    model = make_llama(num_hidden_layers=3).to(torch.bfloat16)
    run = make_run(tmp_path / "run", cut(model, make_tokenizer()))
    pruned = tmp_path / "run" / "pruned"
    AutoModelForCausalLM.from_pretrained(pruned).save_pretrained(pruned, max_shard_size="4KB")
    (pruned / "model.safetensors").unlink()
    export(tmp_path / "run", "hf-remote-code")
    folder = tmp_path / "run" / "export-hf-remote-code"
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), run.bare)
    export(tmp_path / "run", "merged")
    weights = load_file(tmp_path / "run" / "export-merged" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_an_auto_map_of_the_base_model_is_left_out(runs, tmp_path):
    run = make_copy(runs["llama"].folder, tmp_path / "run")
    path = run / "pruned" / "config.json"
    stale = {"AutoConfig": "configuration_other.OtherConfig"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": stale}))
    (run / "pruned" / "configuration_other.py").write_text("raise SystemExit")
    export(run, "hf", tmp_path / "new")
    assert "auto_map" not in json.loads((tmp_path / "new" / "config.json").read_text())
    assert not list((tmp_path / "new").glob("*.py"))


# ------------------------------------------------------------------------------------- errors


def make_copy(source: Path, target: Path) -> Path:
    for file in source.rglob("*"):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            place.write_bytes(file.read_bytes())
    return target


def _edit(name, **changes):
    def spoil(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def _without_adapter_weight(folder):
    path = folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    weights.popitem()
    save_file(weights, path)


def _rmtree(folder):
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    ("form", "spoil", "message"),
    [
        ("hf", lambda f: (f / "inputs.json").unlink(), "is not a run folder"),
        ("hf", lambda f: (f / "report.json").unlink(), "not finished: report.json is missing"),
        ("hf", lambda f: _rmtree(f / "pruned"), "not finished: pruned is missing"),
        ("hf", lambda f: _rmtree(f / "adapter"), "not finished: adapter.adapter_config.json is"),
        ("hf", lambda f: (f / "pruned" / RECORD).unlink(), f"{RECORD} is missing"),
        ("hf", _edit("pruned/config.json", hidden_size=32), "no valid model: "),
        ("hf", lambda f: os.truncate(f / "pruned" / "model.safetensors", 900), "is corrupt"),
        ("hf", lambda f: (f / "adapter" / "adapter_config.json").write_text("["), "cannot be read"),
        ("merged", lambda f: (f / "pruned" / "tokenizer.json").unlink(), "no valid pruned model"),
        (
            "merged",
            lambda f: os.truncate(f / "adapter" / "adapter_model.safetensors", 900),
            "adapter in .* cannot be merged",
        ),
        ("merged", _without_adapter_weight, "cannot be merged: .*missing adapter keys"),
        ("merged", _edit("adapter/adapter_config.json", r=7, rank_pattern={}), "cannot be merged"),
    ],
)
def test_what_is_missing_or_torn_gives_one_line(form, spoil, message, runs, tmp_path):
    run = make_copy(runs["llama"].folder, tmp_path / "run")
    spoil(run)
    with pytest.raises(ArtifactError, match=message) as caught:
        export(run, form)
    assert "\n" not in str(caught.value)
    assert not list(run.glob("*export*"))


def test_the_command_line_shows_one_line(tmp_path, command, runs):
    wrong = command("export", tmp_path / "nothing", "--format", "hf")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (2, 1)
    assert "does not exist. Give a run folder" in wrong.stderr
    empty = command("export", tmp_path, "--format", "hf")
    assert (empty.exit_code, empty.stderr.count("\n")) == (1, 1)
    (tmp_path / "thesis.tex").touch()
    full = command("export", runs["llama"].folder, "--format", "hf", "--output", tmp_path)
    assert (full.exit_code, full.stderr.count("\n")) == (1, 1)
    assert "something other than an export" in full.stderr
    assert command("export", tmp_path).exit_code == 2
    unknown = command("export", tmp_path, "--format", "gguf")
    assert unknown.exit_code == 2
    assert "'gguf' is not one of 'hf', 'hf-remote-code', 'merged'" in unknown.stderr


def test_a_pruned_folder_of_a_run_is_never_replaced(runs, tmp_path):
    run = make_copy(runs["llama"].folder, tmp_path / "run")
    for target in (run, run / "pruned", run / "adapter", run / "report.json"):
        with pytest.raises(ArtifactError, match="something other than an export"):
            export(run, "hf", target)


@pytest.mark.parametrize("form", ["hf", "merged"])
def test_a_failed_export_leaves_the_old_one(form, runs, tmp_path, monkeypatch):
    run, target = runs["llama"].folder, tmp_path / "new"
    export(run, form, target)
    before = (target / MARK).stat().st_mtime_ns

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "_write_code", fail)
    with pytest.raises(ArtifactError, match=r"cannot be written: No space left"):
        export(run, form, target)
    assert os.listdir(tmp_path) == ["new"]
    assert (target / MARK).stat().st_mtime_ns == before


def test_leftovers_of_a_killed_export_are_removed(runs, tmp_path):
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "torn").touch()
    export(runs["llama"].folder, "hf", tmp_path / "new")
    assert os.listdir(tmp_path) == ["new"]


def test_a_class_that_transformers_itself_lacks_gets_no_code(runs, tmp_path, monkeypatch):
    other = type("OtherForCausalLM", (), {})
    monkeypatch.setattr(export_module, "stock_class", lambda model: other)
    with pytest.raises(Exception, match="OtherForCausalLM is not a class of transformers"):
        export(runs["llama"].folder, "hf-remote-code", tmp_path / "new")
    export(runs["llama"].folder, "hf", tmp_path / "new")


def test_an_adapter_of_another_model_is_not_merged(runs):
    model = load_pruned(runs["gpt2"].folder / "pruned").model
    with pytest.raises(ArtifactError, match="trained on this model"):
        merged(model, runs["llama"].folder / "adapter")
