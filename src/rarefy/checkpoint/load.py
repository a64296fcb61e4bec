"""`load`: the model of a saved folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rarefy.checkpoint import compiled_model, legacy_layouts, pt2_load
from rarefy.checkpoint.fit_structure import RECORDS, restore_structure_, skeleton, structure_to_build
from rarefy.checkpoint.tensor_slots import Slots, aliases
from rarefy.common.atomic_io import INDEX
from rarefy.common.errors import ContainerError, ModelError
from rarefy.common.plain_file import usable_path
from rarefy.evaluation.receipt import receipt_from_dict
from rarefy.formats import container
from rarefy.model import embedding_modules, hf, vision
from rarefy.model.image_config import image_config_from_dict, set_image_config_
from rarefy.model.layers import Layer
from rarefy.model.quant_grid import WeightGrid, record_grid_
from rarefy.recipe import old_names
from rarefy.runtime.accelerate import AccelerateOptions, accelerate_each

MAX_RECEIPT_BYTES = 1 << 26


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    verify: bool = True,
    accelerate: bool | Mapping[str, Any] = False,
) -> Any:
    """Return the model of a saved folder, with the weights that were saved, bit for bit.

    What `compile` or `decoder` returned needs no `model`: it loads without the model's class. No code from the folder
    is run, and no class is imported by a name from it. Memory: the model and one more tensor; weights of decoders are
    read in the mapped files. Do not overwrite these in place while the decoder is used; `save(overwrite=True)` writes
    new files, and what was loaded keeps the old ones.

    Args:
        path: a folder that `save` wrote, a compressed-tensors folder, or a .pt2 file of `torch.export.save`.
        model: a module of the saved class, which receives the weights; not needed for Hugging Face models, which are
            built from their config, and models of timm and torchvision by name.
        verify: check the hashes of all files; False saves one pass over them.
        accelerate: True, or arguments of `accelerate_` such as {"batch": (1, 128)}: each Linear layer gets its fastest
            kernel as soon as its weight is read, so the dense model is never in memory as a whole, unless it was
            passed as `model` or the arguments have an `example`. The report is `model.rarefy_accelerated`.

    Returns:
        The module (in evaluation mode, if it was built here), or the compiled model or decoder that was saved.

    Raises:
        ContainerError: the folder is damaged or is no saved model, or its tensors do not fit `model`; `model` is then
            unchanged.
        ModelError: the model's class is needed, or an argument is wrong.

    Example:
        >>> import tempfile, torch
        >>> from rarefy.checkpoint.save import save
        >>> folder = tempfile.mkdtemp() + "/model"
        >>> _ = save(torch.nn.Linear(2, 2), folder)
        >>> load(folder, torch.nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    usable_path(path)
    if pt2_load.is_file(path):
        _check_file_options(path, model, accelerate, verify)
        return pt2_load.load_pt2(path)
    options = _accelerate_options(accelerate)
    if model is not None and not isinstance(model, nn.Module):
        raise ModelError(f"model: expected a torch.nn.Module to load into, such as MyModule(), got {model!r}")
    if model is None and options is None and not (Path(path) / INDEX).is_file() and legacy_layouts.is_compressed(path):
        return legacy_layouts.load(path)
    saved = container.read(path, verify=verify)
    if compiled_model.is_compiled(saved):
        compiled = compiled_model.load(saved, model=model, accelerate=options)
        if saved.meta.get("images") is not None:
            set_image_config_(compiled, image_config_from_dict(saved.meta["images"]))
        return compiled
    structure = saved.meta.get("structure")
    structure = structure if isinstance(structure, dict) else {}
    stream = options is not None and options.example is None
    if model is None:
        model = _build(saved, structure, path, empty=stream)
    elif RECORDS & set(saved.meta):  # on a copy first, so that a model that does not fit stays as it was
        restore_structure_(saved, skeleton(model), structure, path)
    slots = restore_structure_(saved, model, structure, path)
    _load_tensors_(saved, model, slots, options, path)
    attach_receipt_(model, saved)
    head = embedding_modules.head_of(Path(path)) if hf.is_model(model) else None
    if head is not None:
        check_current(saved)
        setattr(model, embedding_modules.HEAD, head)
    return model


def _check_file_options(path: Any, model: Any, accelerate: Any, verify: bool) -> None:
    """Raise ModelError for options that have no effect on a .pt2 file."""
    for name, unused in (("model", model is None), ("accelerate", accelerate is False), ("verify", verify is True)):
        if not unused:
            raise ModelError(f"{name}= has no effect: {path} is a .pt2 file, which holds its graph; leave it out")


def _accelerate_options(accelerate: Any) -> AccelerateOptions | None:
    """Return the options of `accelerate_`, or None; raise ModelError for unknown options."""
    if accelerate is False:
        return None
    if accelerate is not True and not isinstance(accelerate, Mapping):
        raise ModelError(f"accelerate: expected True, False or a dict of accelerate_'s arguments, got {accelerate!r}")
    return AccelerateOptions.of({} if accelerate is True else accelerate)


def _build(saved: container.Container, structure: dict[str, Any], path: Any, *, empty: bool) -> nn.Module:
    """Return the Hugging Face model of a config, or one of timm or torchvision by its name.

    With `empty`, weights of the former have no memory.
    """
    if structure.get("library") in vision.LIBRARIES:
        return vision.build(structure)
    if structure.get("library") != "transformers":
        name = structure.get("class")
        if name == "OnnxModel":
            call = f"rarefy.load({str(path)!r}, model=rarefy.from_onnx('FILE.onnx'))"
            raise ModelError(f"{path} holds the weights of an ONNX file, which has its code: {call}")
        if name == pt2_load.CLASS:
            call = f"rarefy.load({str(path)!r}, model=rarefy.load('FILE.pt2'))"
            raise ModelError(f"{path} holds the weights of a .pt2 file, which has its code: {call}")
        raise ModelError(
            f"{path} holds a {name}, which is built in Python: rarefy.load({str(path)!r}, model={name}(...))"
        )
    return hf.build(structure_to_build(saved, structure, path), saved.stored, empty=empty)


def _load_tensors_(
    saved: container.Container, model: nn.Module, slots: Slots, options: AccelerateOptions | None, path: Any
) -> None:
    """Read all tensors into the model, and accelerate it; weights of Linear layers are then read one after the other,
    just before each is replaced, unless there is an example."""
    loader = _TensorLoader(saved, model, slots, path)
    stream = options is not None and options.example is None
    linear = {n for n in slots if n.endswith(".weight") and isinstance(slots[n][0], nn.Linear)} if stream else set()
    later = {n for n in linear if n not in loader.tied and n not in loader.tied.values()}
    for name in slots:
        if name not in loader.tied and name not in later:
            loader.load_(name)
    if options is None:
        return
    waiting = {id(slots[n][0]): n for n in later}

    def load_weight(layer: Layer) -> None:
        name = waiting.pop(id(layer.module), None)
        if name is not None and layer.param == "weight":
            loader.load_(name)

    model.rarefy_accelerated = accelerate_each(model, options, load_weight if stream else None)  # type: ignore
    for name in waiting.values():  # of layers that `layers` and `ignore` leave out
        loader.load_(name)


class _TensorLoader:
    """Reads tensors of a container into a model's slots; a tensor that several slots hold is decoded once."""

    def __init__(self, saved: container.Container, model: nn.Module, slots: Slots, path: Any):
        self.saved, self.slots, self.tied = saved, slots, aliases(model)
        for name, first in self.tied.items():
            if self._stored(name) != self._stored(first):
                raise ContainerError(
                    f"{path}: {name} is tied to {first} in this {type(model).__name__}, but stored as another tensor"
                )
        uses = Counter(self._stored(n) for n in slots if n not in self.tied)
        self.shared = {stored for stored, count in uses.items() if count > 1}
        self.decoded: dict[str, Tensor] = {}  # shared tensors so far
        self.grids: dict[str, WeightGrid | None] = {}

    def _stored(self, name: str) -> str:
        return self.saved.aliases.get(name, name)

    def load_(self, name: str) -> None:
        """Read the tensor of a slot, and of all slots tied to it."""
        name = self.tied.get(name, name)
        (module, leaf), stored = self.slots[name], self._stored(name)
        old = getattr(module, leaf)
        if stored in self.decoded:
            tensor = self.decoded[stored].clone()
        else:
            tensor, self.grids[stored] = self.saved.weight(stored, tuple(old.shape))
        tensor = tensor.to("cpu" if old.is_meta else old.device)
        _set_tensor_(module, leaf, tensor)
        record_grid_(module, leaf, self.grids[stored])
        if stored in self.shared:
            self.decoded[stored] = tensor
        for other in (n for n, first in self.tied.items() if first == name):
            setattr(*self.slots[other], getattr(module, leaf))
            record_grid_(*self.slots[other], self.grids[stored])


def _set_tensor_(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Set a parameter or buffer; a parameter keeps its identity, so that ties and optimizers hold."""
    old = getattr(module, leaf)
    if isinstance(old, nn.Parameter) and old.is_meta:
        setattr(module, leaf, nn.Parameter(tensor, old.requires_grad))
    elif isinstance(old, nn.Parameter):
        old.data = tensor
    else:
        setattr(module, leaf, tensor)


def check_current(saved: container.Container) -> None:
    """Raise ContainerError if another folder is in the place of one whose files were read by their paths."""
    if not saved.files.is_current():
        raise ContainerError(f"{saved.path} was replaced while it was read: load it again")


def attach_receipt_(model: nn.Module, saved: container.Container) -> None:
    """Attach the receipt of a folder and its recipe to the model. A receipt that cannot be read is ignored: it is a
    record, not a part of the model."""
    try:
        file = saved.files.path("receipt.json")
        if file.stat().st_size >= MAX_RECEIPT_BYTES:
            return
        receipt = receipt_from_dict(json.loads(file.read_text(encoding="utf-8")))
        recipe = old_names.upgrade(saved.meta.get("recipe"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return
    model.rarefy_receipt, model.rarefy_recipe = receipt, recipe  # type: ignore[assignment]
