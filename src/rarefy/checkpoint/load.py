"""Models to folders and back: `save`, `load`, `export`, `inspect`."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.checkpoint import compiled_model, legacy_layouts
from rarefy.checkpoint.tensor_slots import Slots, _slots, aliases
from rarefy.common.atomic_io import INDEX
from rarefy.common.errors import ContainerError, ModelError, nearest
from rarefy.evaluation.receipt import Receipt
from rarefy.formats import container, quantized_encodings, sparse_encodings
from rarefy.lowrank import layer_tying
from rarefy.model import activation_quant, hf, lowrank_modules
from rarefy.model.layers import Layer
from rarefy.model.quant_grid import record_grid_
from rarefy.recipe import old_names
from rarefy.runtime.accelerate import AccelerateOptions, accelerate_each
from rarefy.structured.hf_config import shrink_config
from rarefy.structured.structure_record import check_record, restore


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    verify: bool = True,
    accelerate: bool | Mapping[str, Any] = False,
) -> Any:
    """Return the model of a saved folder, bit for bit; `model` receives the weights, or is built from a known config.
    What `compile` or `decoder` returned comes back as such, without the model's class.

    accelerate   True or arguments of `accelerate_`, such as {"batch": (1, 128)}: each Linear layer takes its fastest
                 form as soon as its weight is read, so the dense model is never in memory unless `model` is; with an
                 `example` the whole model is read first. What was chosen is `model.rarefy_accelerated`
    No code is run and no class imported by a name from the file: without `model` only Hugging Face configs are built.
    Raises ContainerError (damaged, hostile, names or shapes that differ) and ModelError. Memory: the model and one
    tensor more.
    """
    options = _accelerate_options(accelerate)
    stream = options is not None and options.example is None
    if model is not None and not isinstance(model, nn.Module):
        raise ModelError(f"model is a torch.nn.Module to load into, such as MyModule(), got {model!r}")
    if model is None and options is None and not (Path(path) / INDEX).is_file() and legacy_layouts.is_compressed(path):
        return legacy_layouts.load(path)
    saved = container.read(path, verify=verify)
    if compiled_model.is_compiled(saved):
        return compiled_model.load(saved, model=model, accelerate=options)
    structure = saved.meta.get("structure")
    structure = structure if isinstance(structure, dict) else {}
    given = model is not None
    if model is None:
        if structure.get("library") != "transformers":
            raise ModelError(
                f"{path} holds a {structure.get('class')}, which is built in Python: "
                f"rarefy.load({str(path)!r}, model={structure.get('class')}(...))"
            )
        model = hf.build(_before_cuts(saved, structure, path), empty=stream)
    if given and {"cut", "tied", "factors", "inputs"} & set(saved.meta):  # what does not fit leaves the model as it was
        _restructure(saved, _skeleton(model), structure, path)
    slots = _restructure(saved, model, structure, path)
    tied = aliases(model)
    for name, first in tied.items():
        if saved.aliases.get(name, name) != saved.aliases.get(first, first):
            raise ContainerError(f"{path}: {name} is tied to {first} in this {type(model).__name__}, but stored apart")
    done: dict[str, Tensor] = {}
    grids: dict[str, quantized_encodings.WeightGrid | None] = {}

    def bring(name: str) -> None:
        name = tied.get(name, name)  # the tensor it shares is put in under the other name
        (module, leaf), source = slots[name], saved.aliases.get(name, name)
        old, again = getattr(module, leaf), done.get(source)
        device = "cpu" if old.is_meta else old.device
        if again is None:
            fresh, grid = saved.weight(source, tuple(old.shape))
            grids[source] = grid
        else:
            fresh = again.clone()
        fresh = _put(module, leaf, fresh.to(device))
        record_grid_(module, leaf, grids[source])
        if source in shared:
            done[source] = fresh
        for other in (n for n, f in tied.items() if f == name):
            setattr(*slots[other], getattr(module, leaf))
            record_grid_(*slots[other], grids[source])

    shared = {s for s, n in Counter(saved.aliases.get(n, n) for n in slots if n not in tied).items() if n > 1}
    late = {n for n in slots if n.endswith(".weight") and isinstance(slots[n][0], nn.Linear)} if stream else set()
    late = {n for n in late if n not in tied and n not in tied.values()}
    for name in slots:
        if name not in tied and name not in late:
            bring(name)
    if options is not None:
        names = {id(slots[n][0]): n for n in late}

        def bring_late(layer: Layer) -> None:
            name = names.pop(id(layer.module), None)
            if name is not None and layer.param == "weight":
                bring(name)

        model.rarefy_accelerated = accelerate_each(model, options, bring_late if stream else None)  # type: ignore
        for name in names.values():  # what was not chosen to be accelerated
            bring(name)
    receipt = Path(path) / "receipt.json"
    if receipt.is_file() and not receipt.is_symlink() and receipt.stat().st_size < 1 << 26:
        _remember(model, receipt, saved.meta.get("recipe"))
    return model


def _restructure(saved: container.Container, model: nn.Module, structure: dict[str, Any], path: Any) -> Slots:
    """Give a model the structure that was saved, and return its slots; ContainerError where the tensors do not fit."""
    if saved.meta.get("cut") is not None:
        check_record(saved.meta["cut"], path)
        if _fits(saved, model):
            model.rarefy_cut = saved.meta["cut"]  # type: ignore[assignment]
        else:
            restore(model, saved.meta["cut"], path)
            shrink_config(model, structure.get("config"))
    layer_tying.restore_(model, saved.meta.get("tied", {}), path)
    told = saved.meta.get("factors", {})
    if told != lowrank_modules.factor_records(model):
        lowrank_modules.restore_factors_(model, told, path)
    activation_quant.restore_activation_quants_(model, saved.meta.get("inputs", {}), path)
    _check_names(saved, model, path)
    slots = _slots(model)
    for name, (module, leaf) in slots.items():
        _check_fit(saved, name, getattr(module, leaf), path)
    return slots


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model without the values of its tensors."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _accelerate_options(accelerate: Any) -> AccelerateOptions | None:
    """The options of `accelerate_`, or None; ModelError for what it does not take."""
    if accelerate is False:
        return None
    if accelerate is not True and not isinstance(accelerate, Mapping):
        raise ModelError(f"accelerate: expected True, False or a dict of accelerate_'s arguments, got {accelerate!r}")
    return AccelerateOptions.of({} if accelerate is True else accelerate)


def _before_cuts(saved: container.Container, structure: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The structure to build: what the config says, or where cuts have left what no config says, the config before."""
    cut = saved.meta.get("cut")
    if cut is None:
        return structure
    check_record(cut, path)
    return structure if cut["config"] or not cut["base"] else {**structure, "config": cut["base"]}


def _fits(saved: container.Container, model: nn.Module) -> bool:
    """Whether a model has the structure that a cut left already, as one built from its config does."""
    cut = saved.meta["cut"]
    if not (cut["shapes"] or cut["blocks"]):
        return False  # nothing to tell it by
    apart = tuple(f"{n}." for n in saved.meta.get("factors") or ())
    stored = {n: tuple(saved.index["tensors"][n]["shape"]) for n in saved.names}
    shapes = {n: s for n, s in stored.items() if not n.startswith(apart)}
    known = {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith(apart)}
    return all(known.get(n) == s for n, s in shapes.items()) and set(known) <= {*shapes, *saved.aliases}


def _shape(saved: container.Container, name: str) -> tuple[int, ...] | None:
    """The shape that the index states, where decoding it is no danger to memory; None lets the container judge."""
    shape = tuple(saved.index["tensors"][saved.aliases.get(name, name)]["shape"])
    return shape if 8 * math.prod(shape) <= 64 << 20 else None


def _check_names(saved: container.Container, model: nn.Module, path: str | Path) -> None:
    have, want = set(saved.names) | set(saved.aliases), set(model.state_dict())
    for what, names, others in (("lacks", want - have, have), ("has an unknown", have - want, want)):
        if names:
            first = sorted(names)[0]
            near = nearest(first, others)
            hint = f"; nearest is {near[0]!r}" if near else ""
            raise ContainerError(
                f"{path} {what} tensor {first!r} ({len(names)} in all) for a {type(model).__name__}{hint}"
            )


def _check_fit(saved: container.Container, name: str, old: Tensor, path: str | Path) -> None:
    """Raise ContainerError where a stored tensor cannot take the place of `old`, before any has been."""
    entry = saved.index["tensors"][saved.aliases.get(name, name)]
    if tuple(entry["shape"]) != tuple(old.shape):
        raise ContainerError(f"{path}: {name} is {entry['shape']} in the folder, and {list(old.shape)} in the model")
    if sparse_encodings.DTYPES[entry["dtype"]].is_floating_point != old.is_floating_point():
        raise ContainerError(f"{path}: {name} is {entry['dtype']} in the folder, and {old.dtype} in the model")


def _put(module: nn.Module, leaf: str, tensor: Tensor) -> Tensor:
    """Put a tensor in a slot and return what is there; a parameter keeps its identity, so ties and optimizers hold."""
    old = getattr(module, leaf)
    if isinstance(old, nn.Parameter) and old.is_meta:
        setattr(module, leaf, nn.Parameter(tensor, old.requires_grad))
    elif isinstance(old, nn.Parameter):
        old.data = tensor
    else:
        setattr(module, leaf, tensor)
    return tensor


def _remember(model: nn.Module, receipt: Path, recipe: Any) -> None:
    try:
        values = json.loads(receipt.read_text(encoding="utf-8"))
        known = Receipt(
            **{
                **values,
                **{k: tuple(values.get(k, ())) for k in ("speed", "stages", "notes", "samples")},
            }
        )
        _ = str(known) + known.to_json()  # what cannot be printed cannot be kept
        if any(not isinstance(r["layer"] + r["pattern"], str) for r in known.sparsity.get("layers", ())):
            return
        recipe = old_names.upgrade(recipe)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return  # a receipt is a record, not a part of the model
    model.rarefy_receipt, model.rarefy_recipe = known, recipe  # type: ignore[assignment]
