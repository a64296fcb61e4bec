"""The record of a cut: what changed in a model, in a form that is saved and applied to the original class again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ContainerError, unknown
from rarefy.model import hf
from rarefy.model.mha import replace_mha_

# attributes of torch's own layers that hold sizes
SIZES = frozenset({
    "in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_channels",
    "num_groups", "normalized_shape", "embedding_dim", "input_size", "hidden_size", "proj_size", "embed_dim", "kdim",
    "vdim", "num_heads", "head_dim",
})  # fmt: skip
NUMBERS = ("layer_idx", "layer_id", "layer_number", "block_idx")  # attributes that hold the index of a block
# numbers: size attributes of modules; shapes: of tensors; kept: indices kept of tensors that the class computes;
# blocks: original indices of blocks kept, by list; attention: modules replaced by OwnHeads; base: the config before any
# cut; config: whether the class builds the model from its present config
PARTS = {"numbers": dict, "shapes": dict, "kept": dict, "blocks": dict, "attention": list, "base": dict, "config": bool}


def cut_record(model: nn.Module) -> dict[str, Any]:
    """Return the record of a model's cuts so far."""
    empty = {name: kind() for name, kind in PARTS.items()}
    if hf.is_model(model):
        empty["base"] = hf.structure(model)["config"]
    return getattr(model, "rarefy_cut", None) or empty


def record_restorer(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores the present record of a model."""
    before = getattr(model, "rarefy_cut", None)

    def put_back() -> None:
        if before is None:
            vars(model).pop("rarefy_cut", None)
        else:
            model.rarefy_cut = before  # type: ignore[assignment]

    return put_back


def record_kept_blocks(
    model: nn.Module, name: str, keys: Sequence[str], kept_blocks: list[int], numbers: Mapping[str, Any]
) -> None:
    """Record which blocks of a list were kept, by their indices, and which block indices in modules changed.

    `keys` are the names that all blocks had in the list.
    """
    record = cut_record(model)
    before = record["blocks"].get(name)
    prefix = f"{name}." if name else ""

    def renumbered(key: str) -> str | None:
        """Return the new name of a module or tensor; None in a removed block."""
        own, dot, rest = key.removeprefix(prefix).partition(".")
        if not key.startswith(prefix) or own not in keys:
            return key
        index = keys.index(own)
        return f"{prefix}{keys[kept_blocks.index(index)]}{dot}{rest}" if index in kept_blocks else None

    renamed = {
        part: {new: v for k, v in record[part].items() if (new := renumbered(k))}
        for part in ("numbers", "shapes", "kept")
    }
    blocks = {new: v for k, v in record["blocks"].items() if (new := renumbered(k))}
    blocks[name] = kept_blocks if before is None else [before[i] for i in kept_blocks]
    renamed["numbers"] |= numbers
    attention = [new for k in record["attention"] if (new := renumbered(k))]
    model.rarefy_cut = {**record, **renamed, "blocks": blocks, "attention": attention, "config": False}  # type: ignore[assignment]


def record_attention(model: nn.Module, names: Iterable[str]) -> None:
    """Record the attention modules that were replaced by OwnHeads."""
    record = cut_record(model)
    model.rarefy_cut = {**record, "attention": [*record["attention"], *names], "config": False}  # type: ignore[assignment]


def record_cut(
    model: nn.Module, numbers: Mapping[str, Any], indices_by_name: Mapping[str, Mapping[int, Tensor]]
) -> None:
    """Record changed size attributes, and which indices of tensors were kept, by dimension."""
    record = cut_record(model)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    saved = set(model.state_dict(keep_vars=True))
    shapes, computed = dict(record["shapes"]), {n: dict(d) for n, d in record["kept"].items()}
    for name, dims in indices_by_name.items():
        if name in saved:
            shapes[name] = list(tensors[name].shape)
            continue
        for d, indices in dims.items():  # computed by the class: `restore` has to select from it
            before = computed.setdefault(name, {}).get(str(d))
            computed[name][str(d)] = (indices if before is None else torch.tensor(before)[indices]).tolist()
    numbers = {**record["numbers"], **numbers}
    model.rarefy_cut = {**record, "numbers": numbers, "shapes": shapes, "kept": computed, "config": False}  # type: ignore[assignment]


def check_record(record: Any, path: Any) -> None:
    """Raise ContainerError for a damaged record."""
    if (
        not isinstance(record, dict)
        or set(record) != set(PARTS)
        or any(type(record[p]) is not k for p, k in PARTS.items())
    ):
        raise ContainerError(f"{path}: the record of its cuts is damaged")


def restore(model: nn.Module, record: Any, path: Any) -> None:
    """Apply a record to a model of the original class: size attributes, and empty tensors in the right shapes.

    Raises ContainerError for a record that does not fit the class. Integer attributes can only become smaller, of
    torch's own layers only sizes, and tensors can only lose indices.
    """
    check_record(record, path)
    for name, kept_blocks in record["blocks"].items():
        _keep_blocks(model, name, kept_blocks, path)
    for name in record["attention"]:
        if not isinstance(name, str) or not replace_mha_(model, [name]):
            raise ContainerError(f"{path}: {type(model).__name__} has no attention {name!r} whose heads can be cut")
    modules = dict(model.named_modules())
    for name, value in record["numbers"].items():
        _set_number(model, modules, name, value, path)
    slots = {n: (m, a) for n, m, a in named_tensors(modules)}
    replacements = {**_resized(slots, record["shapes"], path), **_selected(slots, record["kept"], path)}
    parameters: dict[int, Any] = {}  # tied parameters stay tied
    for module, attribute in slots.values():
        old: Any = getattr(module, attribute)
        if id(old) in replacements:
            tensor = replacements[id(old)]
            if isinstance(old, nn.Parameter):
                tensor = parameters.setdefault(id(old), nn.Parameter(tensor, old.requires_grad))
            setattr(module, attribute, tensor)
    model.rarefy_cut = record  # type: ignore[assignment]


def _set_number(model: nn.Module, modules: Mapping[str, nn.Module], name: str, value: Any, path: Any) -> None:
    """Set a size attribute of a module. Raises ContainerError for one that a cut cannot have made."""
    prefix, _, attribute = name.rpartition(".")
    old = vars(modules[prefix]).get(attribute) if prefix in modules else None
    if old is not None and type(modules[prefix]).__module__.startswith("torch.nn.") and attribute not in SIZES:
        old = None
    minimum = 0 if attribute in NUMBERS else 1
    old_sizes, new_sizes = (old, value) if isinstance(old, tuple) and isinstance(value, list) else ((old,), [value])
    sizes = zip(old_sizes, new_sizes)
    if len(old_sizes) != len(new_sizes) or not all(
        type(o) is int and type(n) is int and minimum <= n <= o for o, n in sizes
    ):
        raise ContainerError(f"{path}: {type(model).__name__} has no size {name} that can be reduced to {value!r}")
    setattr(modules[prefix], attribute, tuple(value) if isinstance(value, list) else value)


def _resized(slots: Mapping[str, tuple[nn.Module, str]], shapes: Mapping[str, Any], path: Any) -> dict[int, Tensor]:
    """Return empty tensors of the recorded shapes, by the ids of the tensors they replace."""
    tensors: dict[int, Tensor] = {}
    for name, shape in shapes.items():
        old = _tensor(slots, name, path)
        fits = isinstance(shape, list) and len(shape) == old.dim()
        if not fits or any(type(n) is not int or not 1 <= n <= o for n, o in zip(shape, old.shape)):
            raise ContainerError(f"{path}: {name} is {list(old.shape)} in this class and cannot be cut to {shape!r}")
        if list(old.shape) != shape:
            tensors[id(old)] = torch.empty(shape, dtype=old.dtype, device=old.device)
    return tensors


def _selected(
    slots: Mapping[str, tuple[nn.Module, str]], kept_indices: Mapping[str, Any], path: Any
) -> dict[int, Tensor]:
    """Return the recorded indices of tensors that the class computes, by the ids of the tensors they replace."""
    tensors: dict[int, Tensor] = {}
    for name, dims in kept_indices.items():
        old = new = _tensor(slots, name, path)
        for d, indices in (dims if isinstance(dims, dict) else {"": []}).items():
            fits = d.isdecimal() and int(d) < old.dim() and isinstance(indices, list) and len(indices) >= 1
            sorted_indices = fits and all(type(i) is int for i in indices) and indices == sorted(set(indices))
            if not sorted_indices or not 0 <= indices[0] <= indices[-1] < old.shape[int(d)]:
                raise ContainerError(f"{path}: the kept indices of {name} do not fit its shape {list(old.shape)}")
            new = new.index_select(int(d), torch.tensor(indices, device=new.device))
        tensors[id(old)] = new
    return tensors


def _keep_blocks(model: nn.Module, name: str, indices: Any, path: Any) -> None:
    """Keep the recorded blocks of a list. Raises ContainerError where the class has no such list."""
    block_list = dict(model.named_modules()).get(name)
    fits = isinstance(block_list, nn.ModuleList | nn.Sequential) and isinstance(indices, list) and len(indices) > 0
    fits = fits and all(type(i) is int and 0 <= i < len(block_list) for i in indices)  # type: ignore[arg-type]
    if not fits or indices != sorted(set(indices)):
        raise ContainerError(
            f"{path}: {type(model).__name__} has no list of blocks {name} with the indices {indices!r}"
        )
    keep_blocks(block_list, indices)  # type: ignore[arg-type]


def keep_blocks(block_list: nn.ModuleList | nn.Sequential, kept_blocks: list[int]) -> Any:
    """Keep these blocks of a list under the names of its first ones; return what undoes it."""
    before = dict(block_list._modules)
    blocks = list(before.values())

    def set_modules(modules: Mapping[str, Any]) -> None:
        block_list._modules.clear()
        block_list._modules.update(modules)

    set_modules({key: blocks[i] for key, i in zip(before, kept_blocks)})
    return lambda: set_modules(before)


def named_tensors(modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module, str]]:
    """Return (name, module, attribute) of each parameter and buffer; shared ones once for each name."""
    return [
        (f"{n}.{a}" if n else a, m, a)
        for n, m in modules.items()
        for a, t in [*m._parameters.items(), *m._buffers.items()]
        if t is not None
    ]


def _tensor(slots: Mapping[str, tuple[nn.Module, str]], name: str, path: Any) -> Tensor:
    """Return a tensor by name. Raises ContainerError for an unknown name."""
    if name not in slots:
        raise ContainerError(f"{path}: " + unknown("tensor of a cut", name, list(slots)))
    return getattr(*slots[name])
