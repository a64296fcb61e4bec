"""Any change of a compiled model's graph is refused with a ContainerError, or gives a model that runs or raises."""

import json
import shutil
from pathlib import Path

import pytest

import rarefy
from fixtures.saved_by_0_1 import models
from helpers.compiled_folders import edit
from helpers.mutations import VALUES, mutate_json, seeded
from rarefy.checkpoint import compiled_model
from rarefy.common.errors import ContainerError, DataError, FormatError, ModelError

OLD = Path(__file__).parents[1] / "fixtures" / "saved_by_0_1"
RAISED = (DataError, ModelError, FormatError, RuntimeError, IndexError, TypeError)  # torch's words or ours
ROUNDS = 100


@pytest.mark.parametrize("name", ["compiled-self_attention-int8", "compiled-conv_net", "decoder", "decoder-int8"])
def test_a_changed_graph(tmp_path, name):
    folder = tmp_path / "m"
    shutil.copytree(OLD / name, folder)
    kind = json.loads((OLD / "expected.json").read_text())[name]["model"]
    rarefy.save(rarefy.load(folder), folder, overwrite=True)  # as it is written today
    graph = json.loads((folder / compiled_model.GRAPH).read_text())
    constants = [{"node": n[0]} for n in graph["nodes"][:3]]
    loaded = 0
    for rng in seeded(ROUNDS, name):
        changed = mutate_json(graph, rng, (*VALUES, *constants))
        edit(folder, lambda graph, changed=changed: graph.update(all=changed))
        try:
            model = rarefy.load(folder)
        except ContainerError:
            continue
        loaded += 1
        try:
            model(models.inputs(kind))
        except RAISED:
            continue
    assert loaded < ROUNDS / 2
