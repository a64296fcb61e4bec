"""Any change of a container's files gives tensors or one of Rarefy's errors."""

from pathlib import Path

import torch

from helpers.folders import SHARD, seal, small_container
from helpers.mutations import mutate_bytes, seeded
from rarefy.common.atomic_io import INDEX
from rarefy.common.errors import ContainerError, FormatError
from rarefy.formats.container import read


def test_changed_bytes(tmp_path):
    """Of the index, of a shard's header or of its tensors; half of the shards with a hash that agrees."""
    folder = tmp_path / "m"
    small_container(folder)
    good: dict[Path, bytes] = {f: f.read_bytes() for f in folder.iterdir()}
    outcomes = {"tensors": 0, "refused": 0}
    for rng in seeded(300):
        target = folder / rng.choice([INDEX, SHARD, SHARD])
        data = good[target]
        header = 8 + int.from_bytes(data[:8], "little") if target.name == SHARD else 0
        for file, content in {**good, target: mutate_bytes(data, rng, rng.choice([0, header]))}.items():
            file.write_bytes(content)
        if target.name == SHARD and rng.random() < 0.5:
            seal(folder)
        try:
            saved = read(folder, verify=rng.random() < 0.7)
            tensors = [saved.tensor(name) for name in [*saved.names, *saved.aliases]]
            outcomes["tensors"] += all(isinstance(t, torch.Tensor) for t in tensors)
        except (ContainerError, FormatError):
            outcomes["refused"] += 1
    assert sum(outcomes.values()) == 300 and min(outcomes.values()) > 20, outcomes
