"""Plugins of other distributions: what goes wrong with them is one line that names the plugin."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from rankadaptor_plugin import plugins
from rankadaptor_plugin.cli import build_cli
from rankadaptor_plugin.core.errors import PluginError
from rankadaptor_plugin.pipeline import stage
from rankadaptor_plugin.pipeline.context import GROUP, registries

HOOK = "from rankadaptor_plugin import hookimpl\n\n\n@hookimpl\ndef rankadaptor_"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution that is one module, as pip would lay it out."""
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def install(distribution: str, source: str, point: str | None = None) -> None:
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        info = tmp_path / f"{module}-2.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.5\n", encoding="utf-8"
        )
        (info / "entry_points.txt").write_text(
            f"[{GROUP}]\n{point or distribution} = {module}\n", encoding="utf-8"
        )
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def fails(*parts: str) -> None:
    with pytest.raises(PluginError) as caught:
        plugins.plugin_manager()
    for part in parts:
        assert part in str(caught.value)


def test_an_installed_plugin_is_listed_with_its_distribution_version_and_hooks(install):
    install("blue-pruner", f'{HOOK}register_pruners(register):\n    register("blue", print)\n')
    manager = plugins.plugin_manager()
    found = json.loads(CliRunner().invoke(build_cli(manager), ["plugins", "--json"]).output)
    assert found["plugins"][-1] == {
        "name": "blue-pruner",
        "provider": "blue-pruner 2.5",
        "hooks": ["rankadaptor_register_pruners"],
    }
    assert found["registered"]["pruners"] == ["blue", "channel", "depth", "width"]
    text = CliRunner().invoke(build_cli(manager), ["plugins"]).output
    assert "blue-pruner (blue-pruner 2.5)\n    rankadaptor_register_pruners\n" in text
    assert "pruners: blue, channel, depth, width\n" in text


def test_installed_plugins_can_be_left_out(install):
    install("left-out", f"{HOOK}no_such_hook():\n    pass\n")
    assert plugins.plugin_manager(third_party=False).get_plugin("left-out") is None


def test_a_misspelt_hook_is_an_error_at_start_that_names_the_plugin(install, tmp_path):
    install("misspelt", f"{HOOK}register_pruner(register):\n    pass\n")
    fails("'misspelt'", "'rankadaptor_register_pruner'", "rankadaptor_register_pruners")
    done = subprocess.run(
        [sys.executable, "-m", "rankadaptor_plugin", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: The plugin 'misspelt' has a hook that does not exist")
    assert done.stderr.count("\n") == 1


def test_an_argument_that_the_hook_does_not_have_is_an_error_at_start(install):
    install("too-many", f"{HOOK}after_trial(trial, model):\n    pass\n")
    fails("'too-many' of too-many 2.5", "model", "Correct its arguments")


@pytest.mark.parametrize("source", ["import no_such_module_anywhere", "1 / 0", "not Python"])
def test_a_plugin_that_cannot_be_imported_is_an_error_at_start(install, source):
    install("broken", source)
    fails("'broken' of broken 2.5", "cannot be loaded", "uninstall")


def test_two_plugins_of_one_name_are_an_error_at_start(install):
    install("first", "", point="same")
    install("second", "", point="same")
    fails("The plugin 'same' of ", " 2.5", "another plugin", "Rename its entry point")


def test_a_plugin_cannot_take_the_name_of_a_built_in_plugin(install):
    install("thief", "", point="rankadaptor")
    fails("'rankadaptor' of thief 2.5", "Rename")


def test_a_module_that_is_named_twice_is_an_error_at_start(install, tmp_path):
    install("twice", "")
    (tmp_path / "twice-2.5.dist-info" / "entry_points.txt").write_text(
        f"[{GROUP}]\none = twice\ntwo = twice\n", encoding="utf-8"
    )
    fails("'two' of twice 2.5", "'one'")


def test_a_name_that_is_registered_twice_is_an_error(install):
    install("second-width", f'{HOOK}register_pruners(register):\n    register("width", print)\n')
    with pytest.raises(PluginError, match="The pruner 'width' is registered twice"):
        registries(plugins.plugin_manager())


@pytest.mark.parametrize("result", [None, "its own"])
def test_a_recovery_stage_that_returns_none_leaves_the_work_to_the_built_in_one(
    install, monkeypatch, result
):
    install("stage", f"{HOOK}post_prune(pruned):\n    return {result!r}\n")
    monkeypatch.setattr(stage, "recover_pruned", lambda pruned, context: "built in")
    found = plugins.plugin_manager().hook.rankadaptor_post_prune(pruned=None, context=None)
    assert found == (result or "built in")


def test_rankadaptor_trace_prints_hook_calls_to_standard_error(monkeypatch, capsys):
    registries(plugins.plugin_manager(third_party=False))
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANKADAPTOR_TRACE", "1")
    registries(plugins.plugin_manager(third_party=False))
    printed = capsys.readouterr()
    assert "rankadaptor_register_pruners" in printed.err
    assert "finish rankadaptor_register_samplers" in printed.err
    assert printed.out == ""
