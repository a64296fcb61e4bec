"""Change the folders of compiled models in tests."""

import json

import pytest
from safetensors.torch import load_file, save_file

from helpers.folders import SHARD, seal
from rarefy.checkpoint import compiled_model
from rarefy.runtime import bindings

needs_kernels = pytest.mark.skipif(bindings.missing() is not None, reason=str(bindings.missing()))


def edit(folder, change):
    told = json.loads((folder / compiled_model.GRAPH).read_text())
    change(told)
    make = told.pop("text", str)
    (folder / compiled_model.GRAPH).write_text(make(json.dumps(told.get("all", told))))
    seal(folder)


def call(told, target):
    """The node that calls an operator."""
    return next(n for n in told["nodes"] if n[2] == target)


def set_arg(target, i, value):
    return lambda told: call(told, target)[3].__setitem__(i, value)


def without(*keys):
    def change(told):
        for key in keys[:-1]:
            told = told[key]
        told.pop(keys[-1])

    return change


def shard(folder, **changed):
    tensors = load_file(folder / SHARD)
    save_file({**tensors, **changed}, folder / SHARD)
    seal(folder)
