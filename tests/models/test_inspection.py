"""What inspect says is what the model has."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from rankadaptor_plugin.config.tables import PruneConfig
from rankadaptor_plugin.core.errors import ArtifactError, UnsupportedModelError
from rankadaptor_plugin.models.footprint import footprint, on_meta
from rankadaptor_plugin.models.inspection import inspect_folder
from rankadaptor_plugin.models.pruned_model import RECORD, PrunedModel
from rankadaptor_plugin.models.structures import decoder_layers, layer_units, layer_widths
from rankadaptor_plugin.pruning.channel import prune_channel
from rankadaptor_plugin.pruning.cutting import remove
from rankadaptor_plugin.pruning.depth import keep_layers
from rankadaptor_plugin.report.console import inspection_text


def layer_parameters(model) -> list[int]:
    return [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]


def cut(model) -> None:
    units = layer_units(model)
    remove(units[0].attention, [0])
    remove(units[1].mlp, [3, 7, 11, 12])


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_llama, make_tokenizer):
    """One folder of each kind, with the model before and after."""
    folder, tokenizer = tmp_path_factory.mktemp("made"), make_tokenizer()

    def stock(**changes):
        # A bias makes the rows of a matrix count once more.
        return make_llama(num_hidden_layers=4, attention_bias=True, mlp_bias=True, **changes)

    found = {}

    def keep(name, model, save, base=None):
        save(folder / name)
        before = base or stock()
        found[name] = SimpleNamespace(folder=folder / name, model=model, before=before)

    plain = stock()
    keep("plain", plain, plain.save_pretrained)
    uneven = stock()
    cut(uneven)
    keep("uneven", uneven, PrunedModel.of(uneven, tokenizer).save)
    keep("resaved", uneven, lambda f: uneven.save_pretrained(f, max_shard_size="6KB"))
    short, base_config = stock(), stock().config
    keep_layers(short, (0, 2))
    pruned = PrunedModel.of(short, tokenizer, base_config=base_config, kept_layers=(0, 2))
    keep("short", short, pruned.save)
    both = stock()
    keep_layers(both, (1, 3))
    cut(both)
    pruned = PrunedModel.of(both, tokenizer, base_config=base_config, kept_layers=(1, 3))
    keep("both", both, pruned.save)
    settings = PruneConfig(method="channel", importance="random", pruning_ratio=0.25)
    narrow = prune_channel(stock(), tokenizer, [torch.arange(3, 12)], settings)
    keep("narrow", narrow.model, narrow.save)
    gpt2 = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4)
    small = AutoModelForCausalLM.from_config(gpt2, dtype=torch.bfloat16)
    before = on_meta(type(small), small.config, torch.bfloat16)
    cut(small)
    keep("gpt2", small, PrunedModel.of(small, tokenizer).save, before)
    return found


KINDS = {
    "plain": (0, 1, 2, 3),
    "uneven": (0, 1, 2, 3),
    "resaved": (0, 1, 2, 3),
    "short": (0, 2),
    "both": (1, 3),
    "narrow": (0, 1, 2, 3),
    "gpt2": (0, 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_json_equals_the_model(kind, made, command):
    case = made[kind]
    done = command("inspect", case.folder, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    for figures, model in ((found["after"], case.model), (found["before"], case.before)):
        assert figures == {
            **footprint(model).with_bytes(case.model.dtype),
            "hidden_size": model.config.hidden_size,
            "layers": len(decoder_layers(model)),
        }
    base = layer_parameters(case.before)
    base_widths = layer_widths(case.before)
    assert [layer["before_pruning"] for layer in found["layers"]] == list(KINDS[kind])
    now, widths = layer_parameters(case.model), layer_widths(case.model)
    for i, layer in enumerate(found["layers"]):
        old = KINDS[kind][i]
        assert layer == {
            "layer": i,
            "before_pruning": old,
            **vars(widths[i]),
            "parameters": now[i],
            "base": {**vars(base_widths[old]), "parameters": base[old]},
            "kept": now[i] / base[old],
        }
    assert found["removed_layers"] == [i for i in range(len(base)) if i not in KINDS[kind]]
    assert found["architecture"] == type(case.model).__name__
    assert found["model_type"] == case.model.config.model_type
    assert f"torch.{found['dtype']}" == str(case.model.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_outside_of_the_layers_add_up(kind, made):
    case, found = made[kind], inspect_folder(made[kind].folder)
    for count, model in zip(found.other, (case.before, case.model), strict=True):
        assert count == model.num_parameters() - sum(layer_parameters(model))


def test_a_run_folder_and_all_exports(finished_copy, command):
    run = finished_copy.parent / "out"
    expected = json.loads(command("inspect", run, "--json").stdout)
    assert expected.pop("folder") == str(run / "pruned")
    assert expected["before"]["parameters"] > expected["after"]["parameters"]
    for form in ("hf", "hf-remote-code", "merged"):
        assert command("export", run, "--format", form).exit_code == 0
        found = json.loads(command("inspect", run / f"export-{form}", "--json").stdout)
        assert found.pop("folder") == str(run / f"export-{form}")
        assert found == expected


def test_the_table_is_for_people(made, command):
    done = command("inspect", made["both"].folder)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["layer", "before", "heads", "KV", "heads", "channels", "parameters", "kept"] in lines
    now, base = layer_parameters(made["both"].model), layer_parameters(made["both"].before)
    assert ["0", "1", "2", "1", "24", f"{now[0]:,}", f"{100 * now[0] / base[1]:.1f}", "%"] in lines
    assert ["1", "3", "4", "2", "20", f"{now[1]:,}", f"{100 * now[1] / base[3]:.1f}", "%"] in lines
    assert "Removed layers, by their number before: 0, 2" in done.stdout
    assert ["layers", "4", "2", "50.0", "%"] in lines


LARGE = {
    "vocab_size": 128256,
    "hidden_size": 16384,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "intermediate_size": 53248,
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("width", [20, 80])
def test_numbers_of_the_largest_models_are_not_cut(width, tmp_path, monkeypatch):
    model = on_meta(
        AutoModelForCausalLM._model_mapping[LlamaConfig], LlamaConfig(**LARGE), torch.bfloat16
    )
    monkeypatch.setattr(
        "rankadaptor_plugin.models.inspection.check_checkpoint", lambda folder: model
    )
    shown = inspection_text(inspect_folder(tmp_path), width)
    figures = footprint(model)
    for number in (figures.parameters, figures.macs, *layer_parameters(model)[:1], 53248 * 126):
        assert f"{number:,}" in shown
    assert "756.0 GiB" in shown
    assert "…" not in shown
    if width == 80:
        assert max(len(line) for line in shown.splitlines()[1:]) <= 80


def test_brackets_in_a_path_stay(made, tmp_path):
    folder = tmp_path / "a[bold]b"
    folder.mkdir()
    for file in made["plain"].folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert "a[bold]b: LlamaForCausalLM" in inspection_text(inspect_folder(folder), 80)


@pytest.fixture
def uneven(made, tmp_path):
    for file in made["uneven"].folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("base_shape"), f"{RECORD} cannot be read"),
        (lambda r: r["base_footprint"].pop("macs"), f"{RECORD} cannot be read"),
        (lambda r: r.update(kept_layers=[0, 1, 2, 9]), f"{RECORD} contradicts itself"),
        (lambda r: r["shape"]["layers"][0].update(heads=9), f"{RECORD} describes another model"),
    ],
)
def test_a_record_that_does_not_fit(change, message, uneven):
    record = json.loads((uneven / RECORD).read_text())
    change(record)
    (uneven / RECORD).write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=message) as caught:
        inspect_folder(uneven)
    assert "\n" not in str(caught.value)


def test_errors_are_one_line(uneven, tmp_path, command):
    nothing = command("inspect", tmp_path / "nothing")
    assert (nothing.exit_code, nothing.stderr.count("\n")) == (1, 1)
    os.truncate(uneven / "model.safetensors", 2000)
    torn = command("inspect", uneven)
    assert (torn.exit_code, torn.stderr.count("\n")) == (1, 1)
    assert "model.safetensors is corrupt" in torn.stderr
    (uneven / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UnsupportedModelError, match="mamba"):
        inspect_folder(uneven)
