"""The rules of the house that no tool checks (CONTRIBUTING.md, "The house")."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import rankadaptor_plugin

PACKAGE = Path(rankadaptor_plugin.__file__).parent
ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in (PACKAGE, ROOT / "hooks", ROOT / "tasks")
    for path in sorted(folder.rglob("*.py"))
]
ROOMS = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
DOORS = {"__init__.py", "__main__.py", "cli.py", "plugins.py", "post_prune.py", "lm_eval_model.py"}
MOST_MODULES, MOST_LINES, MOST_PARAMETERS, MOST_FRAMES = 25, 80, 8, 8


def test_only_doors_lie_at_the_root_of_the_package():
    assert {path.name for path in PACKAGE.glob("*.py")} == DOORS


def test_no_folder_holds_too_many_modules():
    folders = {path.parent for path in SOURCES}
    assert all(len(list(folder.glob("*.py"))) <= MOST_MODULES for folder in folders)


def test_tests_mirror_the_packages():
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders - ROOMS == {"end_to_end", "benchmarks", "hooks"} - ROOMS


def test_functions_are_short_and_take_few_parameters():
    offenders = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                names = [a.arg for a in arguments if a.arg not in ("self", "cls")]
                lines = node.end_lineno - node.lineno + 1
                if len(names) > MOST_PARAMETERS or lines > MOST_LINES:
                    offenders.append(f"{path.name}:{node.lineno} {node.name}")
    assert not offenders


def frames() -> list[str]:
    """Our functions on the call stack, outermost first."""
    here, names = sys._getframe(1), []
    while here is not None:
        code = here.f_code
        ours = Path(code.co_filename) in SOURCES
        if ours and not code.co_name.startswith("<"):
            names.append(f"{Path(code.co_filename).stem}.{code.co_name}")
        here = here.f_back
    return names[::-1]


def test_few_frames_lie_between_run_and_the_first_fine_tune(
    tmp_path, write_run_file, command, monkeypatch
):
    class Reached(Exception):
        pass

    def recover(*_, **__):
        raise Reached(frames())

    monkeypatch.setattr("rankadaptor_plugin.pipeline.fine_tuning.recover", recover)
    path = write_run_file(tmp_path / "run.toml", noise={"seeds": 2, "allocations": 2})
    with pytest.raises(Reached) as reached:
        command("run", path, "--quiet")
    stack = reached.value.args[0]
    between = stack[stack.index("commands.run") :]
    assert len(between) < MOST_FRAMES, between  # `recover` itself is one more
