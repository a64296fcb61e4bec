"""Give a model the structure of a saved folder, and check that its tensors fit, before any tensor is changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.checkpoint.tensor_slots import Slots, tensor_slots
from rarefy.common.errors import ContainerError, nearest
from rarefy.formats import container, sparse_encodings
from rarefy.lowrank import layer_tying
from rarefy.model import activation_quant, lowrank_modules
from rarefy.structured.hf_config import shrink_config
from rarefy.structured.structure_record import check_record, restore

RECORDS = frozenset({"cut", "tied", "factors", "inputs"})  # fields of `meta` that change a model's structure


def restore_structure_(saved: container.Container, model: nn.Module, structure: dict[str, Any], path: Any) -> Slots:
    """Cut, tie and factorize a model as in the saved folder, and return the slots of its tensors.

    Raises:
        ContainerError: the tensors of the folder do not fit the model.
    """
    restore_records_(saved, model, structure, path)
    _check_names(saved, model, path)
    slots = tensor_slots(model)
    for name, (module, leaf) in slots.items():
        _check_tensor(saved, name, getattr(module, leaf), path)
    return slots


def restore_records_(saved: container.Container, model: nn.Module, structure: dict[str, Any], path: Any) -> None:
    """Cut, tie and factorize a model as the records of a folder say.

    Raises:
        ContainerError: a record does not fit the model.
    """
    if saved.meta.get("cut") is not None:
        check_record(saved.meta["cut"], path)
        if _is_cut_already(saved, model):
            model.rarefy_cut = saved.meta["cut"]  # type: ignore[assignment]
        else:
            restore(model, saved.meta["cut"], path)
            shrink_config(model, structure.get("config"))
    layer_tying.restore_(model, saved.meta.get("tied", {}), path)
    factors = saved.meta.get("factors", {})
    if factors != lowrank_modules.factor_records(model):
        lowrank_modules.restore_factors_(model, factors, path)
    activation_quant.restore_activation_quants_(model, saved.meta.get("inputs", {}), path)


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose tensors have no values."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def structure_to_build(saved: container.Container, structure: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the structure to build a model from: the saved config, or, if a cut left sizes that no config can express,
    the config before the cut."""
    cut = saved.meta.get("cut")
    if cut is None:
        return structure
    check_record(cut, path)
    return structure if cut["config"] or not cut["base"] else {**structure, "config": cut["base"]}


def _is_cut_already(saved: container.Container, model: nn.Module) -> bool:
    """Return whether a model already has the sizes after the cut, as one built from its saved config does."""
    cut = saved.meta["cut"]
    if not (cut["shapes"] or cut["blocks"]):
        return False  # sizes alone do not tell
    factorized = tuple(f"{n}." for n in saved.meta.get("factors") or ())
    stored = {n: tuple(saved.index["tensors"][n]["shape"]) for n in saved.names}
    shapes = {n: s for n, s in stored.items() if not n.startswith(factorized)}
    known = {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith(factorized)}
    return all(known.get(n) == s for n, s in shapes.items()) and set(known) <= {*shapes, *saved.aliases}


def _check_names(saved: container.Container, model: nn.Module, path: str | Path) -> None:
    have, need = set(saved.names) | set(saved.aliases), set(model.state_dict())
    for verb, names, others in (("lacks", need - have, have), ("has an unknown", have - need, need)):
        if names:
            first = min(names)
            near = nearest(first, others)
            hint = f"; nearest is {near[0]!r}" if near else ""
            raise ContainerError(
                f"{path} {verb} tensor {first!r} ({len(names)} in all) for a {type(model).__name__}{hint}"
            )


def _check_tensor(saved: container.Container, name: str, old: Tensor, path: str | Path) -> None:
    """Raise ContainerError if a stored tensor cannot replace `old`."""
    entry = saved.index["tensors"][saved.aliases.get(name, name)]
    if tuple(entry["shape"]) != tuple(old.shape):
        raise ContainerError(f"{path}: {name} is {entry['shape']} in the folder, and {list(old.shape)} in the model")
    if sparse_encodings.DTYPES[entry["dtype"]].is_floating_point != old.is_floating_point():
        raise ContainerError(f"{path}: {name} is {entry['dtype']} in the folder, and {old.dtype} in the model")
