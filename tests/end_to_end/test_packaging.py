"""The wheel holds the package, all of it and nothing else, and works without the checkout."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGE = "rankadaptor_plugin"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"].values()
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]
ALL_REQUIREMENTS = REQUIREMENTS + [Requirement(line) for extra in EXTRAS for line in extra]
FOLDERS = {"rankadaptor_plugin": "", "hooks": "hooks/", "tasks": "tasks/"}

IMPORT_ALL = """
import importlib, json, pkgutil, sys, rankadaptor_plugin
names = [m.name for m in pkgutil.walk_packages(rankadaptor_plugin.__path__, "rankadaptor_plugin.")]
for name in names:
    if not name.endswith(".__main__"):
        importlib.import_module(name)
from rankadaptor_plugin.oracle.tasks import Tasks
from rankadaptor_plugin.tasks import task_dir
tiny = sorted(path.stem for path in (task_dir() / "tiny").glob("*.yaml"))
loaded = Tasks((task_dir(),)).load(tuple(tiny), "tasks")
sizes = {name: len(task.eval_docs) for name, task in loaded.items()}
for name in ("hooks", "tasks"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"import {name} works")
print(json.dumps([rankadaptor_plugin.__file__, names, sizes]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the tree so that no old build takes part."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "results", "*.egg-info", "__pycache__"
    )
    source = shutil.copytree(ROOT, folder / "source", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", folder]
    done = subprocess.run([*command, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def site(wheel):
    """The unpacked wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "site")
    return wheel.parent / "site"


def python(site: Path, *arguments: str) -> str:
    """Runs Python beside the checkout, with the unpacked wheel first on its path."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_only_top_level_package_is_ours(site, names):
    info = f"{PACKAGE}-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {PACKAGE, info}
    assert (site / info / "top_level.txt").read_text().split() == [PACKAGE]
    assert "rankadaptor-plugin = rankadaptor_plugin.cli:main" in (
        site / info / "entry_points.txt"
    ).read_text(encoding="utf-8")
    assert f"{info}/licenses/LICENSE" in names


def test_every_file_of_the_three_folders_is_in_the_wheel_and_no_other(names):
    expected = {
        f"{PACKAGE}/{target}{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name[0] != "."
    }
    assert {name for name in names if name.startswith(f"{PACKAGE}/")} == expected
    for name in ("py.typed", "embedded/run.toml", "embedded/model/model.safetensors"):
        assert f"{PACKAGE}/{name}" in names
    templates = ("report.html.j2", "report.md.j2", "texts.html.j2", "texts.md.j2", "style.css")
    assert {f"{PACKAGE}/report/templates/{name}" for name in templates} <= names
    assert sum(name.startswith(f"{PACKAGE}/tasks/commonsense7/") for name in names) == 16
    for pattern in (r"tasks/tiny/tiny_\w+\.yaml", r"tasks/tiny/data/tiny_\w+\.jsonl"):
        assert sum(bool(re.fullmatch(f"{PACKAGE}/{pattern}", name)) for name in names) == 7
    assert not [name for name in names if "test_" in name or "/tests/" in name]


def test_the_wheel_alone_imports_every_module_and_loads_the_tiny_tasks(site):
    file, modules, sizes = json.loads(python(site, "-c", IMPORT_ALL).splitlines()[-1])
    assert Path(file).is_relative_to(site)
    assert {f"{PACKAGE}.hooks.specs", f"{PACKAGE}.tasks", f"{PACKAGE}.cli"} <= set(modules)
    assert len(sizes) == 7
    assert all(sizes.values())


def test_the_wheel_alone_answers_help_plugins_and_task_path(site):
    module = ("-m", PACKAGE)
    assert "Recover pruned LLMs" in python(site, *module, "--help")
    assert f"rankadaptor-plugin {PROJECT['version']}, built in" in python(site, *module, "plugins")
    assert Path(python(site, *module, "task-path").strip()) == site / PACKAGE / "tasks"


def test_the_version_is_one():
    text = (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{PROJECT["version"]}"' in text


@pytest.mark.parametrize("requirement", ALL_REQUIREMENTS, ids=str)
def test_every_dependency_has_a_lower_bound_and_no_cap(requirement):
    assert [bound.operator for bound in requirement.specifier] == [">="]


def test_the_constraints_pin_every_dependency_within_its_bounds():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in pins:
        assert [bound.operator for bound in pin.specifier] == ["=="], str(pin)
    versions = {canonicalize_name(p.name): next(iter(p.specifier)).version for p in pins}
    assert len(versions) == len(pins)
    for requirement in ALL_REQUIREMENTS:
        pinned = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), f"{requirement}, but {pinned} is pinned"


def test_the_lower_bounds_are_the_versions_that_tox_lowest_installs():
    text = (ROOT / ".ci" / "constraints-lowest.txt").read_text(encoding="utf-8")
    tested = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    lowest = {canonicalize_name(t.name): next(iter(t.specifier)).version for t in tested}
    test_extra = map(Requirement, PROJECT["optional-dependencies"]["test"])
    for requirement in (*REQUIREMENTS, *test_extra):
        bound = next(iter(requirement.specifier)).version
        assert lowest[canonicalize_name(requirement.name)] == bound, str(requirement)


def test_every_imported_distribution_is_declared():
    imported = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    imported.add(node.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {PACKAGE}
    declared = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
    providers = packages_distributions()
    undeclared = {
        module
        for module in foreign
        if not declared & {canonicalize_name(name) for name in providers.get(module, ())}
    }
    assert undeclared == set()
