"""transformers still has what is used beyond its documented interface."""

from __future__ import annotations

import inspect

import pytest
from transformers import LlamaForCausalLM, PreTrainedModel, core_model_loading
from transformers.models.auto import configuration_auto

USES = {
    "_keys_to_ignore_on_load_unexpected": "checks of checkpoints refuse harmless extra tensors",
    "_keys_to_ignore_on_load_missing": "checks of checkpoints miss harmless absent tensors",
    "_from_config": "no model is built on the meta device (footprint, inspect, checks)",
    "_can_set_attn_implementation": "pruned models fall back to eager attention",
}


@pytest.mark.parametrize("name", USES)
def test_every_model_has_what_is_used(name):
    assert hasattr(PreTrainedModel, name), f"Without {name}: {USES[name]}"


def test_the_names_of_the_file_are_kept_where_they_are_forgotten():
    source = inspect.getsource(core_model_loading)
    assert "_weight_conversions" in source, "pruned models may be saved under names of old files"


def test_a_class_builds_a_model_in_a_type():
    assert {"config", "kwargs"} <= inspect.signature(
        LlamaForCausalLM._from_config
    ).parameters.keys()


def test_the_table_of_model_types_is_where_it_is_watched_for():
    names = configuration_auto.CONFIG_MAPPING_NAMES
    assert isinstance(names, dict), "AutoModelForCausalLM does not know pruned models"
    assert "rankadaptor_llama" in names
