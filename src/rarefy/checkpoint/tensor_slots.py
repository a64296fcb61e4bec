"""TODO."""

from __future__ import annotations

from typing import Any

from torch import nn

from rarefy.checkpoint import compiled_model
from rarefy.common.atomic_io import INDEX
from rarefy.model.layers import all_layers, original
from rarefy.model.layout import Layout
from rarefy.model.masks import folded_state

Slots = dict[str, tuple[nn.Module, str]]


WEIGHTS = (".safetensors", ".xz", INDEX, compiled_model.GRAPH)  # the files that "bytes on disk" counts


def _layouts(model: nn.Module) -> dict[str, Layout]:
    return {f"{n}.{p}" if n else p: l.layout for l in all_layers(model) for n, _, p in l.owners}


def aliases(model: nn.Module) -> dict[str, str]:
    """{tied name: the name it is stored under}, in plain names."""
    first: dict[tuple[int, Any, Any], str] = {}
    tied: dict[str, str] = {}
    for name, (module, leaf) in _slots(model).items():
        tensor = original(module, leaf)
        if tensor.numel() == 0:
            continue
        key = (id(tensor) if tensor.is_meta else tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if key in first:
            tied[name] = first[key]
        first.setdefault(key, name)
    return tied


def _slots(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """{name as in `state_dict` of the folded model: (module, attribute)}."""
    slots: dict[str, tuple[nn.Module, str]] = {}
    for name, _ in folded_state(model):
        owner, _, leaf = name.rpartition(".")
        slots[name] = (model.get_submodule(owner), leaf)
    return slots
