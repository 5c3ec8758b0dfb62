"""Models of this package inside lm-eval: by our command, and by lm-eval's own without us."""

from __future__ import annotations

import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint, distribution
from pathlib import Path
from types import SimpleNamespace

import lm_eval.utils
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.registry import get_model, model_registry
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Olmo2Config

from rankadaptor_plugin import hookimpl, lm_eval_model
from rankadaptor_plugin.config.run_file import EMBEDDED_FOLDER
from rankadaptor_plugin.core.errors import ArtifactError, ConfigError, UnsupportedModelError
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.lm_eval_model import RankAdaptorLM, check_adapter, locate
from rankadaptor_plugin.models import families
from rankadaptor_plugin.models.modeling_rankadaptor import Structure
from rankadaptor_plugin.models.pruned_model import PrunedModel, load_pruned
from rankadaptor_plugin.models.structures import layer_units
from rankadaptor_plugin.oracle.lm_eval_command import run
from rankadaptor_plugin.oracle.lm_eval_internals import with_tasks
from rankadaptor_plugin.pipeline import commands
from rankadaptor_plugin.pipeline.export import export
from rankadaptor_plugin.plugins import plugin_manager
from rankadaptor_plugin.pruning.cutting import remove
from rankadaptor_plugin.recovery.adapters import attach
from rankadaptor_plugin.tasks import task_dir

BASE = EMBEDDED_FOLDER / "model"
TASKS = [path.stem for path in sorted(task_dir().glob("tiny/tiny_*.yaml"))]
LIMIT = 8
SCRIPTS = Path(sys.executable).parent
TARGET = "rankadaptor_plugin.lm_eval_model:RankAdaptorLM"
TOKENS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
# peft 0.21 asks transformers 5.23 by an outdated name.
OLD_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
pytestmark = pytest.mark.filterwarnings(OLD_NAME)


def save_adapter(model, folder: Path, ranks, seed: int = 0):
    """Puts an adapter that changes much on a model, and saves it."""
    adapted = attach(model, RankAllocation(tuple(ranks)), seed=seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted.eval().save_pretrained(folder)
    return adapted


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """What a finished run leaves, with its exports."""
    folder = tmp_path_factory.mktemp("run") / "RUN"
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE).eval()
    units = layer_units(model)
    remove(units[1].attention, [0])
    remove(units[2].mlp, [3, 7, 11])
    pruned = PrunedModel.of(model, tokenizer, {"pruner": "test"})
    pruned.save(folder / "pruned")
    bare = logits(pruned.model)
    adapted = logits(save_adapter(pruned.model, folder / "adapter", range(1, 9)))
    for name in ("inputs.json", "report.json"):
        (folder / name).write_text("{}")
    for form in ("hf", "hf-remote-code", "merged"):
        export(folder, form)
    return SimpleNamespace(folder=folder, bare=bare, adapted=adapted)


# --------------------------------------------------------------------- the real command lines


def accuracies(results) -> dict[str, float]:
    return {task: results["results"][task]["acc,none"] for task in TASKS}


def in_process(model) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tasks = TaskManager(include_path=str(task_dir()), include_defaults=False).load(TASKS)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=32)
    return accuracies(evaluate(lm, tasks, limit=LIMIT, bootstrap_iters=1))


def call(folder: Path, script: str, *arguments: str, **environment: str):
    command = [str(SCRIPTS / script), *arguments]
    command += ["--tasks", ",".join(TASKS), "--limit", str(LIMIT), "--device", "cpu"]
    return subprocess.run(
        [*command, "--batch_size", "32", "--output_path", str(folder / "results")],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("TQDM_")},
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(folder / "modules"),
            **environment,
        },
    )


def written(folder: Path) -> dict[str, float]:
    (file,) = (folder / "results").glob("**/results_*.json")
    return accuracies(json.loads(file.read_text("utf-8")))


@pytest.fixture(scope="module")
def expected(finished_run):
    pruned = load_pruned(finished_run.folder / "pruned").model
    bare = in_process(pruned)
    found = in_process(PeftModel.from_pretrained(pruned, finished_run.folder / "adapter").eval())
    assert found != bare, "the adapter must matter"
    return found


def test_our_command_scores_a_pruned_model_with_its_adapter(finished_run, expected, tmp_path):
    folder = finished_run.folder
    arguments = f"pretrained={folder / 'pruned'},adapter={folder / 'adapter'}"
    program = ("rankadaptor-plugin", "lm-eval", "--model", "rankadaptor")
    done = call(tmp_path, *program, "--model_args", arguments)
    assert done.returncode == 0, done.stderr
    assert written(tmp_path) == expected
    assert "|tiny_boolq" in done.stdout.replace(" ", "")
    assert f"Model {folder / 'pruned'}, adapter {folder / 'adapter'}" in done.stderr
    assert "Running loglikelihood requests: 100%" in done.stderr  # lm-eval's own progress bar


HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "rankadaptor_plugin":
            raise ModuleNotFoundError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
"""


@pytest.mark.parametrize("form", ["hf-remote-code", "merged"])
def test_lm_eval_without_the_package_scores_an_export(form, finished_run, expected, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    folder = finished_run.folder / f"export-{form}"
    adapter = "" if form == "merged" else f",peft={folder / 'adapter'}"
    arguments = f"pretrained={folder}{adapter},trust_remote_code=True"
    program = ("lm_eval", "--include_path", str(task_dir()), "--model", "hf")
    done = call(tmp_path, *program, "--model_args", arguments, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert written(tmp_path) == expected


# ----------------------------------------------------------------------------- the model type


@pytest.mark.parametrize(
    "part", ["", "pruned", "export-hf", "export-hf-remote-code", "export-merged"]
)
def test_a_run_or_an_export_brings_its_adapter_and_a_pruned_folder_none(part, finished_run):
    lm = RankAdaptorLM(pretrained=str(finished_run.folder / part), device="cpu")
    expected = finished_run.bare if part == "pruned" else finished_run.adapted
    torch.testing.assert_close(logits(lm.model), expected, atol=1e-4, rtol=1e-4)
    assert not lm.model.training


def test_a_base_model_loads():
    lm = RankAdaptorLM(pretrained=str(BASE), device="cpu")
    torch.testing.assert_close(
        logits(lm.model), logits(AutoModelForCausalLM.from_pretrained(BASE).eval())
    )


@pytest.mark.parametrize("key", ["adapter", "peft"])
@pytest.mark.parametrize("part", ["", "pruned", "export-hf"])
def test_a_given_adapter_goes_before_the_one_that_a_folder_brings(
    key, part, finished_run, tmp_path
):
    pruned = load_pruned(finished_run.folder / "pruned").model
    other = logits(save_adapter(pruned, tmp_path, [2] * 8, seed=7))
    lm = RankAdaptorLM(finished_run.folder / part, **{key: str(tmp_path)}, device="cpu")
    torch.testing.assert_close(logits(lm.model), other)


def test_the_other_arguments_are_those_of_lm_eval(finished_run):
    options = {"device": "cpu", "dtype": "bfloat16", "batch_size": "4", "max_length": 32}
    arguments = {"pretrained": str(finished_run.folder / "pruned")}
    lm = RankAdaptorLM.create_from_arg_obj(arguments, options)
    assert (lm.model.dtype, lm.batch_size, lm.max_length) == (torch.bfloat16, 4, 32)


def test_a_tokenizer_of_another_size_leaves_the_vocabulary_of_the_model(finished_run, tmp_path):
    folder = shutil.copytree(finished_run.folder / "pruned", tmp_path / "pruned")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["added"])
    tokenizer.save_pretrained(folder)
    lm = RankAdaptorLM(folder, adapter=finished_run.folder / "adapter", device="cpu")
    torch.testing.assert_close(logits(lm.model), finished_run.adapted)


def test_a_family_of_a_plugin_is_known(make_tokenizer, tmp_path, monkeypatch):
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    olmo2 = Structure(model_type="olmo2", norms=norms, prunable_heads=False)

    class Plugin:
        @hookimpl
        def rankadaptor_register_families(self, register):
            register("olmo2", olmo2)

    families.register_family(olmo2)
    try:
        sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
        config = Olmo2Config(**sizes, num_hidden_layers=2, num_attention_heads=4, pad_token_id=1)
        model = AutoModelForCausalLM.from_config(config).eval()
        remove(layer_units(model)[1].mlp, [3])
        pruned = PrunedModel.of(model, make_tokenizer())
        pruned.save(tmp_path)
        wanted = logits(pruned.model)
        families._FAMILIES.pop("olmo2")
        manager = plugin_manager(third_party=False)
        manager.register(Plugin())
        monkeypatch.setattr(lm_eval_model, "plugin_manager", lambda: manager)
        lm = RankAdaptorLM(tmp_path, device="cpu")
        torch.testing.assert_close(logits(lm.model), wanted)
    finally:
        families._FAMILIES.pop("olmo2", None)


# ---------------------------------------------------------------------------------- its errors


def refused(error, text: str, *arguments, **options):
    with pytest.raises(error) as caught:
        RankAdaptorLM(*arguments, **options)
    message = str(caught.value)
    assert text in message
    assert "\n" not in message


def test_a_missing_folder_is_an_error(finished_run, tmp_path):
    text = (
        "The folder nowhere does not exist. Set pretrained to a model folder, an export or a run "
        "folder; a model of the Hub loads with --model hf."
    )
    refused(ArtifactError, text, "nowhere")
    missing = tmp_path / "none"
    text = f"There is no adapter folder {missing}"
    refused(ArtifactError, text, finished_run.folder, peft=missing)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("adapter_config.json", None, "adapter_config.json is missing"),
        ("adapter_model.safetensors", None, "adapter_model.safetensors is missing"),
        ("adapter_model.safetensors", b"\xff" * 100, "is corrupt"),
        ("adapter_config.json", b"{", "does not fit the model"),
    ],
)
def test_a_broken_adapter_is_an_error(name, content, text, finished_run, tmp_path):
    folder = shutil.copytree(finished_run.folder / "adapter", tmp_path / "adapter")
    (folder / name).unlink()
    if content:
        (folder / name).write_bytes(content)
    refused(ArtifactError, text, finished_run.folder, adapter=folder)


def test_an_adapter_of_the_pruned_model_does_not_fit_the_base_model(finished_run):
    text = "layers.1.self_attn.q_proj.lora_B.weight has shape (36, 2), the model takes (48, 2)"
    refused(ArtifactError, text, BASE, adapter=finished_run.folder / "adapter")


@pytest.mark.parametrize(
    ("has", "gets", "text"),
    [
        (4, 3, "the model has no place for base_model.model.model.layers.3."),
        (3, 4, "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight is missing"),
    ],
)
def test_an_adapter_for_another_number_of_layers_does_not_fit(
    has, gets, text, make_llama, tmp_path
):
    save_adapter(make_llama(num_hidden_layers=has), tmp_path, [2] * has)
    with pytest.raises(ArtifactError, match="does not fit") as caught:
        check_adapter(tmp_path, make_llama(num_hidden_layers=gets).to("meta"))
    assert text in str(caught.value)


def test_a_torn_pruned_model_is_an_error(finished_run, tmp_path):
    folder = shutil.copytree(finished_run.folder / "pruned", tmp_path / "pruned")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(ArtifactError, "has no valid model", folder)


@pytest.mark.parametrize("part", ["pruned", "adapter"])
def test_a_run_that_is_not_finished_is_an_error(part, finished_run, tmp_path):
    folder = shutil.copytree(finished_run.folder, tmp_path / "RUN")
    shutil.rmtree(folder / part)
    what = {"pruned": "pruned model", "adapter": "adapter"}[part]
    refused(ArtifactError, f"The run in {folder} has no {what} yet", folder)


def test_adapter_and_peft_together_are_an_error(finished_run):
    refused(ConfigError, "leave one out", finished_run.folder, adapter="a", peft="a")


def test_a_backend_with_an_encoder_is_an_error(finished_run):
    refused(ConfigError, 'The backend "seq2seq"', finished_run.folder, backend="seq2seq")


def test_a_model_with_an_encoder_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    refused(UnsupportedModelError, 'The model type "t5" is not supported', tmp_path)


def test_a_loaded_model_is_an_error(make_llama):
    refused(ConfigError, "pretrained is a LlamaForCausalLM", make_llama())


def test_a_folder_whose_name_is_a_number_is_found(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run.folder / "pruned", tmp_path / "7")
    assert locate(7, None) == (Path("7"), None)


# --------------------------------------------------------------------------- its registration


@pytest.mark.parametrize(
    "waiting",
    [None, RankAdaptorLM, TARGET, EntryPoint("rankadaptor", TARGET, "lm_eval.models")],
    ids=["nothing", "the class", "a lazy name", "an entry point"],
)
def test_the_module_can_be_imported_whatever_the_name_stands_for(waiting, monkeypatch):
    if waiting is None:
        monkeypatch.delitem(model_registry._objs, "rankadaptor")
    else:
        monkeypatch.setitem(model_registry._objs, "rankadaptor", waiting)
    runpy.run_path(lm_eval_model.__file__)
    found = get_model("rankadaptor")
    assert (found.__name__, found is RankAdaptorLM) == ("RankAdaptorLM", waiting is not None)


def test_the_installed_entry_point_names_the_model_type():
    points = distribution("rankadaptor-plugin").entry_points
    (point,) = points.select(group="lm_eval.models", name="rankadaptor")
    assert point.load() is RankAdaptorLM


# -------------------------------------------------------------------------------- the command


@given(
    st.lists(st.text() | st.sampled_from(["--", "--help", "-h", "-L8", "--limit=8", "-E", "[]"]))
)
def test_every_argument_reaches_lm_eval_as_it_stands(arguments):
    assert commands.lm_eval.make_context("lm-eval", list(arguments)).args == arguments


@pytest.fixture
def lm_eval_logging(monkeypatch):
    """Undoes what lm-eval's command line does to its logger, whose stream ends with the test."""
    logger = logging.getLogger("lm_eval")
    before = (logger.level, logger.propagate, logger.handlers[:])
    monkeypatch.setattr(lm_eval.utils, "_LOGGING_CONFIGURED", False)
    yield
    logger.level, logger.propagate, logger.handlers[:] = before


@pytest.mark.usefixtures("lm_eval_logging")
def test_the_help_is_that_of_lm_eval_and_argv_is_as_before(capsys):
    before = sys.argv
    with pytest.raises(SystemExit) as end:
        run(["run", "--help"], [], "rankadaptor-plugin lm-eval")
    assert end.value.code == 0
    assert "--model_args" in capsys.readouterr().out
    assert sys.argv is before


@pytest.mark.usefixtures("lm_eval_logging")
def test_a_wrong_argument_ends_as_lm_eval_ends(capsys):
    with pytest.raises(SystemExit) as end:
        run(["--no_such_option", "1"], [], "rankadaptor-plugin lm-eval")
    assert end.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.fixture
def user_tasks(tmp_path):
    (tmp_path / "own.yaml").write_text("task: tiny_boolq\n")
    return tmp_path


def boolq_of(**options) -> str:
    found = TaskManager(include_defaults=False, **options).task_index["tiny_boolq"]
    return found.yaml_path.name


def test_our_tasks_are_known_while_the_command_runs():
    with with_tasks([task_dir()]):
        assert set(TASKS) <= set(TaskManager(include_defaults=False).all_tasks)
    assert not TaskManager(include_defaults=False).all_tasks


@pytest.mark.parametrize("several", [False, True], ids=["one path", "a list"])
def test_the_path_of_the_user_goes_before_ours(several, user_tasks):
    with with_tasks([task_dir()]):
        assert boolq_of() == "tiny_boolq.yaml"
        assert boolq_of(include_path=[user_tasks] if several else str(user_tasks)) == "own.yaml"


def test_the_folders_of_all_plugins_are_taken(user_tasks):
    with with_tasks([user_tasks, task_dir()]):
        found = TaskManager(None, None, include_defaults=False)
    assert found.include_path == [str(user_tasks), str(task_dir())]


def test_lm_eval_is_as_before_where_it_fails():
    before = TaskManager.__init__
    with pytest.raises(ValueError, match="inside"), with_tasks([task_dir()]):
        raise ValueError("inside")
    assert TaskManager.__init__ is before
