"""Any change of rarefy.json loads the same model or raises a RarefyError, never another exception."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import rarefy
from fixtures.saved_by_0_1 import models
from helpers.folders import read_index, write_index
from helpers.mutations import mutate_bytes, mutate_json, seeded
from rarefy.common.atomic_io import INDEX
from rarefy.common.errors import RarefyError

OLD = Path(__file__).parents[1] / "fixtures" / "saved_by_0_1"
EXPECTED = json.loads((OLD / "expected.json").read_text())
PLAIN = ("sparse-csr", "int4-asymmetric", "int8-static", "codebook", "lowrank", "cut", "tied-blocks", "tied")
ROUNDS = 60


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize("name", [*PLAIN, "compiled-mlp-int8"])
def test_a_change_is_noticed(tmp_path, name):
    factory = EXPECTED[name]["model"]
    build = getattr(models, factory)
    compiled = "digest" not in EXPECTED[name]
    old = rarefy.load(OLD / name) if compiled else rarefy.load(OLD / name, build())
    rarefy.save(old, tmp_path / "m")
    text, digest = (tmp_path / "m" / INDEX).read_bytes(), EXPECTED[name].get("digest")
    outputs = None if not compiled else old(models.inputs(factory))
    loaded = 0
    for i, rng in enumerate(seeded(2 * ROUNDS, name)):
        changed = mutate_bytes(text, rng) if i % 2 else json.dumps(mutate_json(json.loads(text), rng)).encode()
        (tmp_path / "m" / INDEX).write_bytes(changed)
        try:
            again = rarefy.load(tmp_path / "m") if compiled else rarefy.load(tmp_path / "m", build())
        except RarefyError:
            continue
        loaded += 1
        assert torch.equal(again(models.inputs(factory)), outputs) if compiled else models.digest(again) == digest
    assert loaded < 2 * ROUNDS / 2  # else the mutations change nothing


@pytest.mark.parametrize("name", [*PLAIN, "compiled-conv_net", "decoder-int8", "receipt-llama"])
@pytest.mark.parametrize("sealed", [False, True], ids=["schema 1, no hash", "right hash"])
def test_a_change_that_no_hash_shows(tmp_path, name, sealed):
    """Fields are checked too, not only hashes: an index can be wrong with a right hash."""
    folder, factory = copied(OLD / name, tmp_path / "m"), EXPECTED[name]["model"]
    if factory == "llama":
        pytest.importorskip("transformers")
    build = (lambda: None) if "digest" not in EXPECTED[name] else getattr(models, factory)
    if sealed:
        rarefy.save(rarefy.load(folder, build()), folder, overwrite=True)
    index, refused = read_index(folder), 0
    for rng in seeded(ROUNDS if factory != "llama" else ROUNDS // 3, f"{name} {sealed}"):
        changed = mutate_json(index, rng)
        if isinstance(changed, dict):
            write_index(folder, changed)
        try:
            model = rarefy.load(folder, build())
            assert not isinstance(model, nn.Module) or all(t.numel() >= 0 for t in model.state_dict().values())
            rarefy.inspect(folder)
        except RarefyError:
            refused += 1
    assert refused > 5
