"""The documents say what is so."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from rankadaptor_plugin.cli import build_cli
from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.plugins import plugin_manager

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
EXAMPLES = sorted([*ROOT.glob("examples/*.toml"), *ROOT.glob("benchmarks/run_files/*.toml")])


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def command_help() -> list[str]:
    """What ``--help`` prints on a terminal of 80 columns: of the program, then of each command.

    ``lm-eval --help`` is lm-eval's own.
    """
    cli = build_cli(plugin_manager(third_party=False))
    options = {"prog_name": "rankadaptor-plugin", "terminal_width": 78}  # what click uses there
    order = [[], ["run"], *([name] for name in sorted(set(cli.commands) - {"run", "lm-eval"}))]
    return [CliRunner().invoke(cli, [*name, "--help"], **options).output for name in order]


def test_the_help_blocks_of_the_readme_are_what_help_prints():
    section = README.split("\n## Commands\n")[1].split("\n## ")[0]
    expected = command_help()
    wanted = "\n\n".join(f"```text\n{text}```" for text in expected)
    assert fenced(section, "text") == expected, f"The section must read:\n\n{wanted}\n"


def test_the_test_command_of_the_readme_is_the_one_that_ci_runs():
    script = ROOT / ".ci" / "run"
    last = script.read_text(encoding="utf-8").splitlines()[-1]
    assert os.access(script, os.X_OK)
    for name in ("README.md", "CONTRIBUTING.md"):
        blocks = fenced((ROOT / name).read_text(encoding="utf-8"), "sh")
        assert f"{last}\n" in blocks, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_resolve(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    broken = [link for link in links if not (page.parent / link.split("#")[0]).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_parse(page):
    for block in fenced(page.read_text(encoding="utf-8"), "python"):
        ast.parse(block)


def test_the_changelog_has_a_section_for_what_is_not_released():
    sections = re.findall(
        r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sections[0] == "Unreleased"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_has_a_place_holder_left(page):
    assert not re.findall(r"^[A-Z]{4,}$", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_page_of_the_run_file_is_made_from_its_fields():
    expected = runpy.run_path(str(ROOT / "docs" / "run_file_page.py"))["page"]()
    written = (ROOT / "docs" / "run-file.md").read_text(encoding="utf-8")
    assert written == expected, "Run: python docs/run_file_page.py"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_run_files_of_the_examples_are_valid(path):
    run_file.load(path)


def test_no_text_file_names_a_folder_of_one_machine():
    git = shutil.which("git")
    listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run([git or "false", *listing], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    folders = re.compile(r"(?<![\w.~}*/-])/(?:work|root|tmp|home)(?=[/\s\"'`)]|$)", re.MULTILINE)
    found = []
    for name in filter(None, done.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # weights, a link to a folder, or a file that was just deleted
        found += [f"{name}: {match[0]}" for match in folders.finditer(text)]
    assert not found
