"""Presets: what they hold, that own keys win, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankadaptor_plugin.config import run_file
from rankadaptor_plugin.config.recipes import RECIPES, recipe
from rankadaptor_plugin.config.tables import CorpusConfig, RecoveryConfig, RunConfig
from rankadaptor_plugin.core.errors import ConfigError

TABLES = {"corpus": CorpusConfig, "recovery": RecoveryConfig}
PUBLIC = {
    "template": "alpaca",
    "max_length": 256,
    "val_set_size": 2000,
    "num_train_epochs": 2.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 16,
    "learning_rate": 1e-4,
    "warmup_steps": 100,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "alpha_over_rank": 2.0,
    "lora_dropout": 0.05,
    "target_modules": (),
    "eval_steps": 100,
    "load_best_model_at_end": True,
}


def flat(config):
    return {**dataclasses.asdict(config.corpus), **dataclasses.asdict(config.recovery)}


def run(data):
    return run_file.from_dict({"oracle": {"tasks": ["a"]}, **data})


def test_the_run_file_allows_every_preset_and_none():
    (field,) = (f for f in dataclasses.fields(RunConfig) if f.name == "recipe")
    assert field.metadata["choices"] == ("", *RECIPES)


def test_no_key_is_in_both_tables():
    names = [f.name for cls in TABLES.values() for f in dataclasses.fields(cls)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["llm-pruner", "shortened"])
def test_the_public_recipes_are_the_published_ones(name):
    made = flat(recipe(name))
    assert {key: made[key] for key in PUBLIC} == PUBLIC
    # 51,760 cleaned Alpaca rows, 2000 of them held out
    assert recipe(name).recovery.steps_for(49_760) == 1555


def test_the_quick_recipe_is_short():
    made = recipe("quick")
    assert (made.recovery.steps_for(10**6), made.recovery.batch_size) == (200, 16)
    assert (made.corpus.max_length, made.recovery.lora_dropout) == (128, 0.0)


@pytest.mark.parametrize("name", RECIPES)
def test_the_run_file_and_python_mean_the_same_by_a_name(name):
    config = run({"recipe": name})
    made = recipe(name)
    assert (config.corpus, config.recovery) == (made.corpus, made.recovery)


@given(
    name=st.sampled_from(list(RECIPES)),
    own=st.fixed_dictionaries(
        {},
        optional={
            "max_length": st.integers(2, 999),
            "val_set_size": st.integers(0, 9),
            "template": st.sampled_from(["alpaca", "plain"]),
            "num_train_epochs": st.floats(0, 9),
            "max_steps": st.integers(1, 9),
            "lora_dropout": st.floats(0, 0.9),
            "load_best_model_at_end": st.booleans(),
        },
    ),
)
def test_own_keys_win_and_the_rest_is_the_preset(name, own):
    made = flat(recipe(name, **own))
    preset = flat(recipe(name))
    if "max_steps" in own:
        preset["num_train_epochs"] = 0.0
    assert made == {**preset, **own}
    tables = {
        table: {k: v for k, v in own.items() if k in {f.name for f in dataclasses.fields(cls)}}
        for table, cls in TABLES.items()
    }
    config = run({"recipe": name, **tables})
    assert flat(config) == made
    assert run_file.from_dict(run_file.to_dict(config)) == config


def test_own_steps_are_not_overruled_by_the_epochs_of_a_preset():
    assert recipe("llm-pruner", max_steps=7).recovery.steps_for(10**6) == 7
    assert recipe("llm-pruner", max_steps=7, num_train_epochs=1.0).recovery.steps_for(64) == 1


def test_a_tuple_is_as_good_as_a_list():
    assert recipe("quick", target_modules=("q_proj",)).recovery.target_modules == ("q_proj",)


def test_changes_leave_the_presets_alone():
    recipe("shortened", gradient_accumulation_steps=1, template="plain")
    run({"recipe": "shortened", "recovery": {"gradient_accumulation_steps": 1}})
    assert recipe("llm-pruner") == recipe("shortened")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("quik", {}, "Unknown recipe 'quik'. Did you mean 'quick'? Allowed: llm-pruner, shortened"),
        ("", {}, "Unknown recipe ''. Allowed: llm-pruner"),
        (
            "quick",
            {"steps": 3},
            "Unknown key steps of a recipe. Did you mean 'max_steps'? Allowed: path",
        ),
        ("quick", {"keep_best": True}, "Did you mean 'load_best_model_at_end'?"),
        ("quick", {"limit": 9}, "Did you mean 'max_train_samples'?"),
        ("quick", {"max_steps": 0}, "recovery.max_steps is 0; it must be at least 1. Raise it."),
        ("quick", {"max_length": 1.5}, "corpus.max_length is 1.5; it must be a whole number."),
        (
            "quick",
            {"lr_scheduler_type": "liner"},
            "recovery.lr_scheduler_type is 'liner'. Did you mean 'linear'?",
        ),
    ],
)
def test_what_is_wrong_is_said(name, changes, message):
    with pytest.raises(ConfigError) as error:
        recipe(name, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"recipe": "quik"}, "recipe is 'quik'. Did you mean 'quick'? Allowed: "),
        ({"recipe": 3}, 'recipe is 3; it must be text in quotes, as in "text".'),
        ({"recipe": "quick", "corpus": 3}, "corpus is 3; it must be a table"),
        ({"recipe": "quick", "recovery": {"step": 3}}, "Unknown key recovery.step in the run file"),
    ],
)
def test_a_wrong_run_file_is_refused_as_without_a_recipe(data, message):
    with pytest.raises(ConfigError) as error:
        run(data)
    assert message in str(error.value)
