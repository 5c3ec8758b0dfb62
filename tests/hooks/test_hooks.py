"""Every hook has a built-in, a documented signature, and a documented example that runs."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
import tomllib
from copy import deepcopy
from pathlib import Path

import optuna
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from rankadaptor_plugin.cli import build_cli
from rankadaptor_plugin.config.tables import (
    CorpusConfig,
    OracleConfig,
    PruneConfig,
    RecoveryConfig,
    RunConfig,
)
from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.core.progress import advance, watched
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.trials import Phase, Trial, TrialState
from rankadaptor_plugin.corpus.corpus import load_corpus
from rankadaptor_plugin.hooks import specs
from rankadaptor_plugin.models.families import LLAMA
from rankadaptor_plugin.models.pruned_model import PrunedModel
from rankadaptor_plugin.models.structures import layer_units
from rankadaptor_plugin.oracle.oracle import OracleSettings
from rankadaptor_plugin.oracle.tasks import Tasks
from rankadaptor_plugin.pipeline.context import GROUP, RunContext, registries
from rankadaptor_plugin.plugins import plugin_manager
from rankadaptor_plugin.pruning.cutting import remove
from rankadaptor_plugin.report.progress import Progress
from rankadaptor_plugin.testing.oracles import OracleConformance
from rankadaptor_plugin.testing.search import PerformanceModelConformance, SamplerConformance

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
HOOKS = [name for name in vars(specs) if name.startswith("rankadaptor_")]

# peft 0.21 asks transformers 5.23 by an outdated name.
OLD_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
# Optuna marks arguments and samplers as experimental by warnings.
EXPERIMENTAL = "ignore::optuna.exceptions.ExperimentalWarning"


def blocks(heading: str) -> list[str]:
    """The Python blocks of a section of the page, which ends at the next heading."""
    section = PAGE.split(f"{heading}\n", 1)[1]
    return re.findall(r"```python\n(.*?)```", re.split(r"\n#+ ", section)[0], re.DOTALL)


def load(source: str, folder: Path, name: str = "documented_plugin"):
    file = folder / f"{name}.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def signature(hook: str) -> str:
    return f"`{hook}({', '.join(inspect.signature(getattr(specs, hook)).parameters)})`"


@pytest.fixture
def example(request, tmp_path):
    """A manager with the example of the hook that the test is named after."""
    hook = request.node.name.removeprefix("test_hook_")
    source = blocks(f"### {signature(hook)}")[0]
    manager = plugin_manager(third_party=False)
    manager.register(load(source, tmp_path), name="example")
    manager.check_pending()
    callers = manager.get_hookcallers(manager.get_plugin("example"))
    assert hook in {caller.name for caller in callers}
    return manager


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def model(make_llama):
    return make_llama()


@pytest.fixture
def context(tmp_path, tokenizer):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "w3 w4 w5 w6"}\n' * 4, encoding="utf-8")
    manager = plugin_manager(third_party=False)
    return RunContext(
        config=RunConfig(
            oracle=OracleConfig(tasks=("tiny_boolq",)),
            recovery=RecoveryConfig(
                max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=1
            ),
        ),
        folder=tmp_path,
        registries=registries(manager),
        hook=manager.hook,
        oracle=None,
        corpus=load_corpus(path, tokenizer, CorpusConfig(template="plain", max_length=8)),
    )


@pytest.fixture
def trial():
    return Trial(
        position=0,
        phase=Phase.ITERATION,
        allocation=RankAllocation((1, 2)),
        seed=0,
        state=TrialState.FAILED,
        reason="the loss is not a finite number",
    )


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_built_in_a_documented_signature_and_a_test(hook):
    manager = plugin_manager(third_party=False)
    config = RunConfig(oracle=OracleConfig(tasks=("tiny_boolq",)))
    manager.register(Progress(config, Console()), name="progress")
    assert getattr(manager.hook, hook).get_hookimpls(), "no built-in uses it"
    assert f"### {signature(hook)}" in PAGE.splitlines()
    assert callable(globals().get(f"test_hook_{hook}"))
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        assert implementation.function.__doc__, "a built-in without a docstring"


def test_the_page_documents_no_hook_that_does_not_exist():
    documented = re.findall(r"^### `(\w+)\(", PAGE, re.MULTILINE)
    assert documented == HOOKS


def test_the_page_names_the_types_of_all_registries():
    for hook in (name for name in HOOKS if "_register_" in name and "commands" not in name):
        kind = re.search(r"Registry\[(\w+)\]", str(getattr(specs, hook).__annotations__))[1]
        assert re.search(rf"^\| `{hook}` \| `{kind}`: ", PAGE, re.MULTILINE)


def test_hook_rankadaptor_register_pruners(example, model, tokenizer):
    prune = registries(example).pruners.get("every-second")
    kept = model.model.layers[0].mlp.down_proj.weight[:, ::2].clone()
    pruned = prune(model, tokenizer, [], PruneConfig())
    assert [(w.heads, w.kv_heads, w.channels) for w in pruned.widths] == [(2, 1, 12)] * 2
    assert torch.equal(pruned.model.model.layers[0].mlp.down_proj.weight, kept)


def test_hook_rankadaptor_register_families(example):
    structure = registries(example).families.get("olmo2")
    assert structure.model_type == "olmo2"
    assert structure.matrices == LLAMA.matrices


def test_hook_rankadaptor_register_oracles(example):
    assert "sentences" in registries(example).oracles.names()


class TestDocumentedOracle(OracleConformance):
    @pytest.fixture(autouse=True)
    def _prepared(self, tmp_path, make_llama, tokenizer):
        hook = "rankadaptor_register_oracles"
        self._module = load(blocks(f"### {signature(hook)}")[0], tmp_path)
        self._tokenizer, self._make = tokenizer, make_llama

    def oracle(self, seed):
        config = OracleConfig(name="sentences")
        return self._module.Sentences(
            OracleSettings(config=config, tokenizer=self._tokenizer, task_paths=(), seed=seed)
        )

    def model(self):
        return self._make()


def test_hook_rankadaptor_register_performance_models(example):
    assert "ridge" in registries(example).performance_models.names()


class TestDocumentedPerformanceModel(PerformanceModelConformance):
    @pytest.fixture(autouse=True)
    def from_the_page(self, tmp_path):
        hook = "rankadaptor_register_performance_models"
        self.module = load(blocks(f"### {signature(hook)}")[0], tmp_path)

    def performance_model(self, space, seed):
        return self.module.Ridge()


def test_hook_rankadaptor_register_samplers(example):
    assert "nsga2" in registries(example).samplers.names()


@pytest.mark.filterwarnings(EXPERIMENTAL)
class TestDocumentedSampler(SamplerConformance):
    @pytest.fixture(autouse=True)
    def from_the_page(self, tmp_path):
        hook = "rankadaptor_register_samplers"
        self.module = load(blocks(f"### {signature(hook)}")[0], tmp_path)
        optuna.logging.set_verbosity(optuna.logging.WARNING)

    def sampler(self, settings):
        return self.module.nsga2(settings)


def test_hook_rankadaptor_lm_eval_task_paths(example, tmp_path):
    (tmp_path / "tasks").mkdir()
    own, tiny = example.hook.rankadaptor_lm_eval_task_paths()
    assert own == tmp_path / "tasks"
    text = (tiny / "tiny" / "tiny_boolq.yaml").read_text(encoding="utf-8")
    (own / "mine.yaml").write_text(text.replace("tiny_boolq\n", "mine\n", 1), encoding="utf-8")
    (own / "tiny.py").write_bytes((tiny / "tiny" / "tiny.py").read_bytes())
    (own / "data").mkdir()
    (own / "data" / "tiny_boolq.jsonl").write_bytes(
        (tiny / "tiny" / "data" / "tiny_boolq.jsonl").read_bytes()
    )
    assert set(Tasks((tiny, own)).load(("mine", "tiny_piqa"), "tasks")) == {"mine", "tiny_piqa"}


def test_hook_rankadaptor_register_commands(example, tmp_path):
    report = {"allocations": {"recovered": [2, 4, 2]}}
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    cli = build_cli(example)
    assert "ranks" in CliRunner().invoke(cli, ["--help"]).output
    assert CliRunner().invoke(cli, ["ranks", str(tmp_path)]).output == "2-4-2\n"


@pytest.mark.filterwarnings(OLD_NAME)
def test_hook_rankadaptor_compensate(example, model, tokenizer):
    base = deepcopy(model)
    remove(layer_units(model)[1].mlp, range(12))  # half of them
    pruned = PrunedModel.of(model, tokenizer)
    words = {"base": base, "pruned": pruned, "sequences": [], "config": None}
    found = example.hook.rankadaptor_compensate(method="rescale", **words)
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(found.weights[name], 2 * pruned.model.get_parameter(name))
    assert example.hook.rankadaptor_compensate(method="other", **words) is None


def test_hook_rankadaptor_post_prune(example, model, tokenizer, context):
    pruned = PrunedModel.of(model, tokenizer)
    pruned.save(context.folder / "pruned")
    for _ in range(2):  # the second time as in a run that is continued
        found = example.hook.rankadaptor_post_prune(pruned=pruned, context=context)
    assert found.allocation == RankAllocation((1, 1))
    assert (found.adapter / "adapter_model.safetensors").is_file()
    assert not [name for name, _ in pruned.model.named_parameters() if "lora" in name]


def test_hook_rankadaptor_on_progress(example, caplog):
    example.hook.rankadaptor_on_progress(stage="search", done=1, total=3)
    assert caplog.messages == ["search: 1 of 3"]


def test_hook_rankadaptor_on_plan(example):
    example.hook.rankadaptor_on_plan(plan={"gpu_hours": 99.0})
    with pytest.raises(ConfigError, match="takes 120 GPU hours; 100 are allowed"):
        example.hook.rankadaptor_on_plan(plan={"gpu_hours": 120.0})


def test_hook_rankadaptor_on_step(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with watched(example.hook.rankadaptor_on_step):
        advance("steps", 0, 2)
        advance("requests", 4, 5)
        advance("steps", 1, 2, loss=2.5, tokens_per_second=40.0)
    line = {"step": 1, "loss": 2.5, "tokens_per_second": 40.0}
    assert json.loads((tmp_path / "losses.jsonl").read_text("utf-8")) == line


def test_hook_rankadaptor_on_resume(example, context, trial, caplog):
    example.hook.rankadaptor_on_resume(trials=[trial, trial], context=context)
    assert "2 trials were finished earlier" in caplog.text


def test_hook_rankadaptor_after_trial(example, context, trial):
    for _ in range(2):
        example.hook.rankadaptor_after_trial(trial=trial, context=context)
    lines = (context.folder / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    assert [Trial.from_json(json.loads(line)) for line in lines] == [trial, trial]


def test_the_documented_project_names_the_documented_module():
    project, chosen = map(tomllib.loads, re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL))
    assert project["project"]["entry-points"] == {GROUP: {"ends": "rankadaptor_ends"}}
    assert project["tool"]["setuptools"]["py-modules"] == ["rankadaptor_ends"]
    assert chosen == {"search": {"method": "ends"}}
    assert 'register("ends"' in blocks("## Write a plugin")[0]


def test_the_documented_plugin_passes_its_documented_test_file(tmp_path, monkeypatch):
    plugin = load(blocks("## Write a plugin")[0], tmp_path, "rankadaptor_ends")
    monkeypatch.setitem(sys.modules, "rankadaptor_ends", plugin)
    suite = load(blocks("## Test it")[0], tmp_path, "test_ends").TestEnds()
    tests = [name for name in dir(suite) if name.startswith("test_")]
    assert tests
    for name in tests:
        getattr(suite, name)()
