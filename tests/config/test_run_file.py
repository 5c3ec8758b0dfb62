"""The run file: what is refused and how, and what overrides it."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.tables import RunConfig
from rankadaptor_plugin.core.errors import ConfigError

TASKS = '[oracle]\ntasks = ["a"]\n'
TABLES = {
    field.name: hint
    for field in dataclasses.fields(RunConfig)
    if dataclasses.is_dataclass(hint := typing.get_type_hints(RunConfig)[field.name])
}

REFUSED = [
    ("sed = 1", "Unknown key sed in the run file. Did you mean 'seed'? Allowed here: model, "),
    ("[serch]\nx = 1", "Unknown key serch in the run file. Did you mean 'search'?"),
    (
        "[recovery]\nsteps = 1",
        "Unknown key recovery.steps in the run file. Did you mean 'max_steps'?",
    ),
    ("[prune]\nzzz = 1", "Unknown key prune.zzz in the run file. Allowed here: method, "),
    (
        "[recovery]\nlr = 1",
        "Unknown key recovery.lr in the run file. Did you mean 'learning_rate'?",
    ),
    ("lr = 1", "Unknown key lr in the run file. Did you mean [recovery] learning_rate?"),
    ("[recovery]\nr = 4", "Did you mean [rank_space] default_rank?"),
    ("[recovery]\nload_in_4bit = true", "Did you mean quantize, above all tables?"),
    ("recovery = 3", "recovery is 3; it must be a table, written as [recovery]."),
    ("seed = true", "seed is True; it must be a whole number. Change it."),
    ("seed = 1.0", "seed is 1.0; it must be a whole number."),
    ("seed = -1", "seed is -1; it must be at least 0. Raise it."),
    ("seed = 4294967296", "seed is 4294967296; it must be at most 2147483647. Lower it."),
    ("model = 1", 'model is 1; it must be text in quotes, as in "text".'),
    ("trust_remote_code = 1", "trust_remote_code is 1; it must be true or false."),
    ("[prune]\npruning_ratio = true", "prune.pruning_ratio is True; it must be a number."),
    ('[prune]\npruning_ratio = "half"', "prune.pruning_ratio is 'half'; it must be a number."),
    (
        "[prune]\npruning_ratio = nan",
        "prune.pruning_ratio is nan; it must be a finite number. Change it.",
    ),
    ("[prune]\npruning_ratio = 1", "prune.pruning_ratio is 1.0; it must be less than 1. Lower it."),
    ("[prune]\npruning_ratio = 0", "prune.pruning_ratio is 0.0; it must be more than 0. Raise it."),
    ("[recovery]\nlearning_rate = inf", "recovery.learning_rate is inf; it must be a finite"),
    ("[rank_space]\ncandidates = 8", "rank_space.candidates is 8; it must be a list, as in [1, 2]"),
    ("[rank_space]\ncandidates = [2, -1]", "rank_space.candidates is -1; it must be at least 0."),
    (
        "[rank_space]\ncandidates = [2, true]",
        "rank_space.candidates[1] is True; it must be a whole",
    ),
    ("[rank_space]\ncandidates = [2, 4.5]", "rank_space.candidates[1] is 4.5; it must be a whole"),
    ("[oracle]\ntasks = [1]", "oracle.tasks[0] is 1; it must be text in quotes"),
    ("[oracle]\nweights = 1", "oracle.weights is 1; it must be a table, as in {name = 1.0}"),
    ('[oracle]\nweights = {a = "x"}', "oracle.weights.a is 'x'; it must be a number."),
    ("[oracle]\nweights = {a = -1}", "oracle.weights is -1.0; it must be at least 0. Raise it."),
    ("[oracle]\nweights = {a = nan}", "oracle.weights is nan; it must be a finite number."),
    (
        '[oracle]\noverlap = "dorp"',
        "oracle.overlap is 'dorp'. Did you mean 'drop'? Allowed: refuse",
    ),
    (
        TASKS + "[noise]\nseeds = 1",
        "noise.seeds is 1, which cannot show noise. Use at least 2, or 0",
    ),
    ('dtype = "int8"', "dtype is 'int8'. Allowed: auto, float32, bfloat16, float16."),
    ('[rank_space]\nsearch = "x"', "rank_space.search is 'x'. Allowed: pruned, all."),
    ("", "[oracle] tasks is empty. Name at least one lm-eval task"),
    (
        TASKS + "[search]\nn_startup_trials = 9\nn_trials = 8",
        "[search] n_startup_trials 9 is more than n_trials 8. Raise n_trials or lower",
    ),
    (
        TASKS + "[recovery]\nlora_alpha = 16\n[rank_space]\nalpha_over_rank = [1.0, 2.0]",
        "[rank_space] alpha_over_rank is searched, but [recovery] lora_alpha 16 overrides it.",
    ),
    ('model = ""', "model is empty or missing. Name a folder, a model on the Hub"),
    ('model = "m"\n[corpus]\npath = "c.txt"', "output is empty or missing. Name a folder of its"),
    ('output = ""', "output is empty or missing. Name a folder of its own for the run."),
    ('model = "m"\noutput = "o"', "corpus.path is empty or missing. Set it to a JSON, JSONL or"),
    ('model = "m"\noutput = "o"\n[corpus]\npath = ""', "corpus.path is empty or missing."),
    ('model = "m"\noutptu = "o"', "Unknown key outptu in the run file. Did you mean 'output'?"),
    ("seed = ", "is not valid TOML: Invalid value (at end of document). Correct it."),
    ("seed = 1\nseed = 2", "is not valid TOML: Cannot overwrite a value"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[message[:50] for _, message in REFUSED])
def test_each_error_says_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        run_file.load(path)
    assert message in str(error.value)
    assert error.value.exit_code == 2


def test_a_missing_file_is_answered_with_the_command_that_writes_one(tmp_path):
    with pytest.raises(
        ConfigError, match=r"does not exist\. Write one with: rankadaptor-plugin in"
    ):
        run_file.load(tmp_path / "run.toml")


def test_a_folder_is_no_run_file(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory\. Give the path of a"):
        run_file.load(tmp_path)


def test_a_file_that_is_not_utf_8_is_no_toml(tmp_path):
    (tmp_path / "run.toml").write_bytes(b'model = "\xff"')
    with pytest.raises(ConfigError, match="is not valid TOML: 'utf-8' codec can't decode"):
        run_file.load(tmp_path / "run.toml")


@given(
    table=st.sampled_from([None, *TABLES]),
    key=st.text(min_size=1),
    value=st.one_of(st.integers(), st.text(), st.booleans(), st.just({}), st.none()),
)
def test_any_unknown_key_is_refused(table, key, value):
    known = {f.name for f in dataclasses.fields(TABLES[table] if table else RunConfig)}
    if key in known:
        key += "_"
    data = {"oracle": {"tasks": ["a"]}}
    (data.setdefault(table, {}) if table else data)[key] = value
    with pytest.raises(ConfigError, match="Unknown key"):
        run_file.from_dict(data)


def values(hint, rule):
    low, high = rule.get("low", rule.get("above")), rule.get("high", rule.get("below"))
    limits = {"exclude_min": "above" in rule, "exclude_max": "below" in rule}
    if "word" in rule:
        listed = st.sets(st.floats(1e-6, 1e6), min_size=1, max_size=4)
        return st.one_of(st.just(rule["word"]), listed.map(lambda rates: tuple(sorted(rates))))
    if "choices" in rule:
        return st.sampled_from(rule["choices"])
    if typing.get_origin(hint) is tuple:
        items = values(typing.get_args(hint)[0], rule)
        return st.lists(items, min_size=1, max_size=4).map(tuple)
    if typing.get_origin(hint) is dict:
        return st.dictionaries(st.text(), values(float, rule), max_size=3)
    return {
        int: st.integers(low, high),
        float: st.floats(low, high, allow_nan=False, allow_infinity=False, **limits),
        str: st.text(),
        bool: st.booleans(),
    }[hint]


def configs(cls):
    hints = typing.get_type_hints(cls)
    fields = {}
    for field in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(hints[field.name])
        rule = field.metadata
        fields[field.name] = (
            configs(hints[field.name]) if nested else values(hints[field.name], rule)
        )
    if "n_startup_trials" in fields:
        fields["n_startup_trials"] = st.just(2)
    if "report_documents" in fields:
        fields["report_documents"] = fields["report_documents"].filter(lambda count: count != 1)
    if "gains" in fields:
        fields["seeds"] = fields["seeds"].filter(lambda count: count != 1)
    if "learning_rates" in fields:
        fields["methods"] = st.just(())
    elif "methods" in fields:
        fields["stack"] = st.just(("compensate", "distill"))
        further = st.lists(st.text(), max_size=3, unique=True).filter(
            lambda names: "rankadaptor" not in names
        )
        fields["methods"] = further.map(lambda names: ("rankadaptor", *names))
        fields["lora_alpha"] = st.just(0.0)  # beside a searched alpha_over_rank
        fields["learning_rate"] = st.floats(1e-6, 1.0)
    if "device_map" in fields:
        fields["device"] = st.just("auto")  # the only one beside a device map
    if "output" in fields:
        fields["output"] = fields["model"] = st.text(min_size=1)
    if "path" in fields:
        fields["path"] = st.text(min_size=1)
    if "method" in fields and "allocation" in fields:
        fields["method"], fields["allocation"] = st.sampled_from(["bayes", "paper"]), st.just("")
        fields["pareto"] = st.just(False)  # needs another budget
    if "candidates" in fields and "default_rank" in fields:
        several = st.sets(st.floats(1e-6, 1e6), max_size=3)
        fields["alpha_over_rank"] = several.map(lambda values: tuple(sorted(values)))
        fields["learning_rate"] = st.just(())  # not beside the tune stage
        distinct = st.sets(st.integers(1, 64), min_size=1, max_size=4)
        fields["candidates"] = distinct.map(lambda ranks: (*sorted(ranks), 100))
        fields["default_rank"] = st.integers(64, 99)
    return st.builds(cls, **fields)


@settings(max_examples=40)
@given(config=configs(RunConfig))
def test_any_config_comes_back_equal_from_plain_values(config):
    assert run_file.from_dict(run_file.to_dict(config)) == config


def test_relative_paths_are_seen_from_the_run_file(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    text = 'model = "m"\noutput = "../out"\n[corpus]\npath = "/c.txt"\n'
    text += '[search]\nmeta = "m.safetensors"\n'
    (tmp_path / "a" / "run.toml").write_text(text + TASKS + 'include_path = "t"\n')
    config = run_file.load(tmp_path / "a" / "run.toml")
    assert config == run_file.load((tmp_path / "a" / "run.toml").relative_to(tmp_path))
    assert config.model == str(tmp_path / "a" / "m")
    assert config.output == str(tmp_path / "a" / ".." / "out")
    assert config.corpus.path == "/c.txt"
    assert config.search.meta == str(tmp_path / "a" / "m.safetensors")
    assert config.oracle.include_path == str(tmp_path / "a" / "t")


def test_a_name_on_the_hub_is_no_path_unless_it_is_there(tmp_path):
    text = 'model = "owner/model"\noutput = "o"\n[corpus]\npath = "owner/rows"\n' + TASKS
    (tmp_path / "run.toml").write_text(text)
    config = run_file.load(tmp_path / "run.toml")
    assert (config.model, config.corpus.path) == ("owner/model", "owner/rows")
    (tmp_path / "owner" / "model").mkdir(parents=True)
    config = run_file.load(tmp_path / "run.toml")
    assert (config.model, config.corpus.path) == (str(tmp_path / "owner" / "model"), "owner/rows")
    (tmp_path / "run.toml").write_text(text.replace("owner/model", "models/m.gguf"))
    assert run_file.load(tmp_path / "run.toml").model == str(tmp_path / "models" / "m.gguf")


def test_what_is_embedded_is_no_path(tmp_path):
    (tmp_path / "run.toml").write_text(TASKS)
    config = run_file.load(tmp_path / "run.toml")
    assert (config.model, config.corpus.path, config.oracle.include_path) == (
        "embedded",
        "embedded",
        "",
    )


# ------------------------------------------------------------------ settings that override keys

FILE = """
recipe = "llm-pruner"
[prune]
blocks = 2
[recovery]
num_train_epochs = 3.0
lora_alpha = 16
[oracle]
tasks = ["a"]
weights = {a = 1.0, b = 2.0}
"""


@pytest.fixture
def loaded(tmp_path):
    (tmp_path / "run.toml").write_text(FILE)
    return lambda *settings: run_file.load(tmp_path / "run.toml", settings)


@pytest.mark.parametrize(
    ("setting", "table", "key", "value"),
    [
        ("seed=3", None, "seed", 3),
        (" seed = 3 ", None, "seed", 3),
        ("search.n_trials=10", "search", "n_trials", 10),
        ("search.max_hours=1", "search", "max_hours", 1.0),
        ("prune.global_pruning=true", "prune", "global_pruning", True),
        ('oracle.tasks=["b", "c"]', "oracle", "tasks", ("b", "c")),
        ("rank_space.candidates=[2,16]", "rank_space", "candidates", (2, 16)),
        ("dtype=bfloat16", None, "dtype", "bfloat16"),
        ("dtype='float16'", None, "dtype", "float16"),
        ("oracle.target=a=b # c", "oracle", "target", "a=b # c"),
        ("oracle.target=", "oracle", "target", ""),
        ("oracle.target=\U0001f600 \x7f", "oracle", "target", "\U0001f600 \x7f"),
        ("oracle.weights.b=3", "oracle", "weights", {"a": 1.0, "b": 3.0}),
        ("model=owner/name", None, "model", "owner/name"),
        # over the recipe, and over what the file says that would overrule it
        ("corpus.max_length=99", "corpus", "max_length", 99),
        ("recovery.max_steps=5", "recovery", "num_train_epochs", 0.0),
        ("recovery.alpha_over_rank=1", "recovery", "lora_alpha", 0.0),
        ("prune.pruning_ratio=0.2", "prune", "blocks", 0),
        ("recipe=quick", "recovery", "learning_rate", 3e-4),
    ],
)
def test_a_setting_overrides_the_file_and_its_recipe(loaded, setting, table, key, value):
    config = loaded("output=o", "corpus.path=c.txt", setting)
    assert getattr(getattr(config, table) if table else config, key) == value
    assert config.recovery.num_train_epochs == (0.0 if "max_steps" in setting else 3.0)


def test_the_last_setting_wins(loaded):
    assert loaded("seed=1", "seed=2").seed == 2
    assert loaded("recovery.num_train_epochs=1", "recovery.max_steps=5").recovery.steps_for(99) == 5
    weighted = loaded("oracle.weights.b=3", "oracle.weights.c=4")
    assert weighted.oracle.weights == {"a": 1.0, "b": 3.0, "c": 4.0}


def test_settings_may_need_each_other_and_mend_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('model = "m"\noutput = "o"\n[corpus]\npath = ""\n' + TASKS)
    config = run_file.load(path, ["corpus.path=/c.txt", "device_map=auto", "device=auto"])
    assert (config.corpus.path, config.device_map) == ("/c.txt", "auto")


def test_paths_in_settings_are_seen_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.toml").write_text('output = "out"\n' + TASKS + 'text = "t.txt"\n')
    monkeypatch.chdir(tmp_path)
    settings_ = ["output=here", "corpus.path=c.txt", "search.meta="]
    config = run_file.load(Path("a/run.toml"), settings_)
    assert config.output == str(tmp_path / "here")
    assert config.corpus.path == str(tmp_path / "c.txt")
    assert (config.oracle.text, config.search.meta) == (str(tmp_path / "a" / "t.txt"), "")


def test_a_model_of_its_own_does_not_take_what_is_embedded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_file.load(None).output == str(tmp_path / "runs" / "embedded")
    with pytest.raises(ConfigError, match="output is empty or missing"):
        run_file.load(None, ["model=m", "corpus.path=c.txt"])
    with pytest.raises(ConfigError, match=r"corpus\.path is empty or missing"):
        run_file.load(None, ["model=m", "output=o"])
    assert run_file.load(None, ["model=m", "output=o", "corpus.path=embedded"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sed=1", "--set sed=1: Unknown key sed in the run file. Did you mean 'seed'? Allowed"),
        (
            "search.n_trails=3",
            "--set search.n_trails=3: Unknown key search.n_trails in the run file. Did you mean "
            "'n_trials'?",
        ),
        ("serch.n_trials=3", "Unknown key serch in the run file. Did you mean 'search'?"),
        ("lr=1", "--set lr=1: Unknown key lr in the run file. Did you mean [recovery] learning_"),
        ("seed=x", "--set seed=x: seed is 'x'; it must be a whole number. Change it."),
        ("seed.x=1", "--set seed.x=1: seed is {'x': 1}; it must be a whole number."),
        ("search=1", "--set search=1: search is 1; it must be a table, written as [search]."),
        ("oracle.tasks=a", "oracle.tasks is 'a'; it must be a list, as in [\"a\"]. Change it."),
        ("oracle.tasks=[a]", "oracle.tasks is '[a]'; it must be a list, as in"),
        ("seed=-1", "--set seed=-1: seed is -1; it must be at least 0. Raise it."),
        ("dtype=int8", "--set dtype=int8: dtype is 'int8'. Allowed: auto, float32"),
        ("output=", "--set output=: output is empty or missing. Name a folder"),
        ("search.n_startup_trials=99", "[search] n_startup_trials 99 is more than n_trials 30."),
        *(
            (wrong, f"--set {wrong} is not KEY=VALUE. Name the table and the key, as in --set se")
            for wrong in ("seed", "", "=3", "a b=3", "# seed=3", "search.=3", "[search]")
        ),
    ],
)
def test_a_wrong_setting_is_named_in_the_words_of_the_run_file(loaded, setting, message):
    with pytest.raises(ConfigError) as error:
        loaded(setting)
    assert message in str(error.value)


@given(text=st.text(), key=st.sampled_from(["oracle.target", "prune.method", "device"]))
def test_text_that_is_no_toml_is_taken_as_it_is(text, key):
    try:
        tomllib.loads(f"x = {text}")
    except tomllib.TOMLDecodeError:
        config = run_file.load(None, [f"{key}={text}"])
        first, _, last = key.rpartition(".")
        assert getattr(getattr(config, first) if first else config, last) == text.strip()
