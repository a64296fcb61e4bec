"""Names of before: a call or a recipe that uses one is told the new one; files saved before still load."""

import json

import pytest
import torch
from torch import nn

import rarefy
from helpers.folders import read_index, write_index
from rarefy.common.errors import ModelError, RecipeError
from rarefy.recipe import parser as recipes


@pytest.mark.parametrize(
    ("verb", "old", "new"),
    [
        (rarefy.prune_, "work", "resume_dir"),
        (rarefy.compress_, "work", "resume_dir"),
        (rarefy.fit_, "work", "resume_dir"),
        (rarefy.fit_, "teach", "distill"),
        (rarefy.cut_, "least", "min_keep"),
    ],
)
def test_an_old_parameter_names_the_new_one(verb, old, new):
    with pytest.raises(TypeError, match=rf"{verb.__name__}\(\) has no parameter '{old}': it is called '{new}' now"):
        verb(nn.Linear(4, 4), **{old: 0.1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [{prune: {sparsity: 0.5}}]\nevaluate: {metric: accuracy, at_most_worse: 0.1}", "max_degradation"),
        ("stages: [{cut: {least: 0.1}}]", "min_keep"),
        ("stages: [{cut: {units: head dimension}}]", "'head_dim'"),
        ("stages: [{cut: {units: [channel, head of a group]}}]", "'query_head'"),
    ],
)
def test_an_old_name_in_a_recipe_names_the_new_one(text, message):
    with pytest.raises(RecipeError, match=f"is called {message} now"):
        recipes.from_yaml(text)


def test_an_old_unit_names_the_new_one():
    with pytest.raises(ModelError, match="units 'head dimension' is called 'head_dim' now"):
        rarefy.cut_(nn.Linear(4, 4), torch.zeros(1, 4), units="head dimension")


def test_the_recipe_of_a_file_saved_before_is_read(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    data = [(torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))]
    stages = [{"cut": {"units": ["neuron"], "keep": 0.5, "min_keep": 0.1}}]
    recipe = {"stages": stages, "evaluate": {"metric": "accuracy", "max_degradation": 1.0}}
    rarefy.compress_(model, recipe, {"evaluate": data, "calibrate": data})
    rarefy.save(model, tmp_path / "out")
    text = json.dumps(read_index(tmp_path / "out"))
    assert "min_keep" in text and "max_degradation" in text
    old = text.replace("min_keep", "least").replace("max_degradation", "at_most_worse")
    assert old != text
    write_index(tmp_path / "out", json.loads(old))
    twin = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    loaded = rarefy.load(tmp_path / "out", twin)
    assert recipes.from_dict(loaded.rarefy_recipe) == recipes.from_dict(model.rarefy_recipe)
