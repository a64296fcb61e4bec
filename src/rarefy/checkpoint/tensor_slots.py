"""Where the tensors of a model are, by the names under which they are saved, and which of them are tied."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from rarefy.checkpoint import compiled_model
from rarefy.common.atomic_io import INDEX
from rarefy.formats import container
from rarefy.model.layers import all_layers, original
from rarefy.model.layout import Layout
from rarefy.model.masks import folded_state

Slots = dict[str, tuple[nn.Module, str]]  # name -> (module, attribute)

WEIGHT_FILES = (".safetensors", ".xz", INDEX, compiled_model.GRAPH)  # counted as bytes on disk


def tensor_slots(model: nn.Module) -> Slots:
    """Return the module and attribute of each tensor, by its name in the `state_dict` of the folded model."""
    slots: Slots = {}
    for name, _ in folded_state(model):
        owner, _, leaf = name.rpartition(".")
        slots[name] = (model.get_submodule(owner), leaf)
    return slots


def aliases(model: nn.Module) -> dict[str, str]:
    """Return {tied name: the name that the tensor is stored under}, of the folded model."""
    first: dict[tuple[int, Any, Any], str] = {}
    tied: dict[str, str] = {}
    for name, (module, leaf) in tensor_slots(model).items():
        tensor = original(module, leaf)
        if tensor.numel() == 0:
            continue
        key = (id(tensor) if tensor.is_meta else tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if key in first:
            tied[name] = first[key]
        first.setdefault(key, name)
    return tied


def layouts(model: nn.Module) -> dict[str, Layout]:
    """Return the layout of each layer's weight by its tensor name."""
    return {f"{n}.{p}" if n else p: l.layout for l in all_layers(model) for n, _, p in l.owners}


def trusted_shape(saved: container.Container, name: str) -> tuple[int, ...] | None:
    """Return the shape that the index states if a tensor of that size cannot exhaust memory; None lets the container
    judge by the stored bytes."""
    shape = tuple(saved.index["tensors"][saved.aliases.get(name, name)]["shape"])
    return shape if 8 * math.prod(shape) <= 64 << 20 else None
