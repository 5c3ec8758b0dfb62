"""Names of tasks: read as text, told before anything heavy is imported, indexed once."""

from __future__ import annotations

import subprocess
import sys

import pytest
from lm_eval.tasks._index import TaskIndex

from rankadaptor_plugin.config.tables import OracleConfig
from rankadaptor_plugin.core.errors import ConfigError
from rankadaptor_plugin.oracle.lm_eval_internals import _own_index, task_manager
from rankadaptor_plugin.oracle.task_names import check, lm_eval_folder, names
from rankadaptor_plugin.tasks import task_dir

TASK = """\
tag: &all
  - mine
  - "of a team"
'task': first  # the plain one
dataset_path: json
"""
GROUP = """\
group: both
task:
- first
- task: second
  num_fewshot: 1
- {group: inner, task: [third, fourth]}
"""


def test_names_are_read_as_text(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "task.yaml").write_text(TASK, encoding="utf-8")
    (tmp_path / "_template").write_text("tag: included\n", encoding="utf-8")
    (tmp_path / "group.yaml").write_text(GROUP, encoding="utf-8")
    (tmp_path / "readme.md").write_text("task: told\n", encoding="utf-8")
    found = set(names(tmp_path))
    assert found >= {"mine", "of a team", "first", "both", "second", "third", "included"}
    assert "told" not in found


@pytest.mark.parametrize("settings", [{"tasks": ("boolqq",)}, {"search_tasks": ("boolqq",)}])
def test_a_misspelled_task_is_refused_with_a_suggestion(settings):
    config = OracleConfig(**{"tasks": ("tiny_boolq", "hellaswag"), **settings})
    (key,) = settings
    with pytest.raises(ConfigError, match=f"'boolqq'. Did you mean 'boolq'.* {key}, or name the"):
        check(config, [task_dir()])


def test_tasks_of_a_folder_of_ones_own_and_of_other_oracles_are_taken(tmp_path):
    (tmp_path / "task.yaml").write_text(TASK, encoding="utf-8")
    check(OracleConfig(tasks=("first", "mine"), include_path=str(tmp_path)), [])
    check(OracleConfig(name="perplexity", tasks=("whatever",)), [])
    mixed = {"tasks": ("first",), "search_tasks": ("whatever",), "search_name": "perplexity"}
    check(OracleConfig(include_path=str(tmp_path), **mixed), [])


def test_the_index_is_kept_and_is_lm_evals_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "task.yaml").write_text(TASK.replace("first", "boolq"), encoding="utf-8")
    built = task_manager([tmp_path])
    monkeypatch.setattr(TaskIndex, "process_cfg", None)  # nothing is indexed any more
    kept = task_manager([])
    assert len(kept.all_tasks) > 10_000
    assert not set(kept.all_tasks) - set(names(lm_eval_folder()))
    assert kept.all_groups == built.all_groups
    assert set(built.all_tags) == {*kept.all_tags, "mine", "of a team"}
    assert built.task_index["boolq"].yaml_path == tmp_path / "task.yaml"
    for name, entry in kept.task_index.items():
        indexed = built.task_index[name]
        if name != "boolq":
            assert (entry.kind, entry.tags) == (indexed.kind, indexed.tags)
            assert entry.yaml_path == indexed.yaml_path


def test_what_has_changed_or_is_torn_is_indexed_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "task.yaml").write_text(TASK, encoding="utf-8")
    assert _own_index(folder, TaskIndex.build).keys() == {"first", "mine", "of a team"}
    (folder / "task.yaml").write_text(TASK.replace("first", "second"), encoding="utf-8")
    assert "second" in _own_index(folder, TaskIndex.build)
    assert "second" in _own_index(folder, lambda _: pytest.fail("kept"))
    (file,) = (tmp_path / "cache" / "rankadaptor-plugin").iterdir()
    file.write_text("torn", encoding="utf-8")
    assert "second" in _own_index(folder, TaskIndex.build)


def test_nothing_heavy_is_imported_before_a_misspelled_task_is_told(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[oracle]\ntasks = ["tiny_bolq"]\n', encoding="utf-8")
    script = (
        "import sys\n"
        "from rankadaptor_plugin.cli import main\n"
        f"sys.argv = ['rankadaptor-plugin', 'run', {str(path)!r}]\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print(sorted({'torch', 'lm_eval', 'transformers'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "Did you mean 'tiny_boolq'?" in done.stderr
    assert done.returncode == 2
    assert done.stdout.strip() == "[]"
    assert [p.name for p in tmp_path.iterdir()] == ["run.toml"]
