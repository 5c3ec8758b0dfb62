"""Registries: names to objects, loaded when asked for."""

from __future__ import annotations

import sys

import pytest

from rankadaptor_plugin.core.errors import ConfigError, PluginError, UnknownNameError
from rankadaptor_plugin.core.registry import Registry, suggestion


@pytest.fixture
def registry():
    registry = Registry("sampler")
    registry("paper", "fractions:Fraction")
    registry("random", len)
    return registry


def test_names_are_sorted(registry):
    registry("a", str)
    assert registry.names() == ["a", "paper", "random"]


def test_an_object_comes_back_as_it_is(registry):
    assert registry.get("random") is len


def test_a_string_target_is_imported_on_first_use_only(tmp_path, monkeypatch):
    (tmp_path / "lazy_target_of_test.py").write_text("made = object()\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("oracle")
    registry("lazy", "lazy_target_of_test:made")
    assert registry.names() == ["lazy"]
    assert "lazy_target_of_test" not in sys.modules
    first = registry.get("lazy")
    assert first is sys.modules["lazy_target_of_test"].made
    monkeypatch.delitem(sys.modules, "lazy_target_of_test")
    assert registry.get("lazy") is first


def test_an_unknown_name_gets_a_suggestion_and_the_list(registry):
    with pytest.raises(
        UnknownNameError, match=r"Unknown sampler 'papre'\. Did you mean 'paper'"
    ) as e:
        registry.get("papre")
    assert "Registered: paper, random." in str(e.value)
    assert isinstance(e.value, ConfigError)
    assert e.value.exit_code == 2


def test_an_empty_registry_says_so():
    with pytest.raises(UnknownNameError, match=r"Unknown pruner 'x'\. Registered: none\."):
        Registry("pruner").get("x")


def test_a_far_name_gets_no_suggestion():
    assert suggestion("zzz", ["paper", "random"]) == ""


def test_a_name_cannot_be_taken_twice(registry):
    with pytest.raises(PluginError, match="sampler 'paper' is registered twice"):
        registry("paper", len)
    assert registry.get("random") is len


@pytest.mark.parametrize(
    "target",
    ["no_such_module_at_all:x", "math:no_such_attribute", "math", "math:", ":x", ".relative:x", ""],
)
def test_a_target_that_cannot_be_imported_names_itself(registry, target):
    registry("broken", target)
    with pytest.raises(PluginError, match="The sampler 'broken' cannot be loaded from") as e:
        registry.get("broken")
    assert repr(target) in str(e.value)
    assert registry.get("random") is len


@pytest.mark.parametrize("body", ["import no_such_module_at_all", "1 / 0", "def ("])
def test_a_module_that_fails_while_it_is_imported_is_a_plugin_error(
    registry, tmp_path, monkeypatch, body
):
    (tmp_path / "failing_target_of_test.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    registry("broken", "failing_target_of_test:x")
    with pytest.raises(PluginError, match="failing_target_of_test:x"):
        registry.get("broken")
