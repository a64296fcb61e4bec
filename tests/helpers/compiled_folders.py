"""Change the folders of compiled models in tests."""

import copy
import json
import random

import pytest
from safetensors.torch import load_file, save_file

import rarefy
from helpers.folders import SHARD, seal
from rarefy.checkpoint import compiled_model
from rarefy.common.errors import ContainerError
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


def mutated(told, g):
    """JSON with one value of it replaced, dropped, doubled or exchanged."""
    places = []

    def walk(value):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            places.append((value, key))
            walk(inner)

    walk(told)
    odd = [None, True, -1, 0, 3, 1 << 40, 0.5, "", "x", "p_a_weight", [], {}, {"node": "x"}, {"node": "p_a_weight"}]
    at, key = g.choice(places)
    other, where = g.choice(places)
    if g.random() < 0.3:
        at[key] = copy.deepcopy(other[where])
    elif g.random() < 0.3 and isinstance(at, list):
        at.insert(key, copy.deepcopy(at[key]))
    elif g.random() < 0.3:
        del at[key]
    else:
        at[key] = g.choice(odd)


def read_of_random_changes(folder, many):
    """What loads of so many random changes of a graph."""
    told, g = json.loads((folder / compiled_model.GRAPH).read_text()), random.Random(0)
    for _ in range(many):
        changed = json.loads(json.dumps(told))
        mutated(changed, g)
        edit(folder, lambda told, new=changed: told.update(all=new))
        try:
            made = rarefy.load(folder)
        except ContainerError:
            continue
        yield made
