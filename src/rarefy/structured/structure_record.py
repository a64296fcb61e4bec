"""What a cut changed of a model, in a form that a file can hold and the original class can be given again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ContainerError, unknown
from rarefy.model import hf
from rarefy.model.mha import with_own_heads

# sizes that torch's own layers know of themselves
SIZES = frozenset({
    "in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_channels",
    "num_groups", "normalized_shape", "embedding_dim", "input_size", "hidden_size", "proj_size", "embed_dim", "kdim",
    "vdim", "num_heads", "head_dim",
})  # fmt: skip
NUMBERS = ("layer_idx", "layer_id", "layer_number", "block_idx")  # by which blocks know their place
# numbers of modules and shapes of tensors as they are now; indices kept of tensors that the class makes; blocks kept of
# lists, by their first numbers; attention modules that have heads of their own; the config before any cut; whether that
# of now says it all
PARTS = {"numbers": dict, "shapes": dict, "kept": dict, "blocks": dict, "attention": list, "base": dict, "config": bool}


def cut_record(model: nn.Module) -> dict[str, Any]:
    """Return what is remembered of the cuts of a model so far."""
    fresh = {name: kind() for name, kind in PARTS.items()}
    if hf.is_model(model):
        fresh["base"] = hf.structure(model)["config"]
    return getattr(model, "rarefy_cut", None) or fresh


def record_restorer(model: nn.Module) -> Callable[[], None]:
    """Return what gives a model the notes of its cuts that it has now, if it has any."""
    before = getattr(model, "rarefy_cut", None)

    def put_back() -> None:
        if before is None:
            vars(model).pop("rarefy_cut", None)
        else:
            model.rarefy_cut = before  # type: ignore[assignment]

    return put_back


def record_kept_blocks(model: nn.Module, name: str, kept: list[int], numbers: Mapping[str, Any]) -> None:
    """Note on the model that of a list of blocks those with these numbers were kept, and which numbers changed."""
    old = cut_record(model)
    before = old["blocks"].get(name)
    prefix = f"{name}." if name else ""

    def now(key: str) -> str | None:
        """The name of something in a block, which has a new number or is gone."""
        index, dot, rest = key.removeprefix(prefix).partition(".")
        if not key.startswith(prefix) or not index.isdecimal():
            return key
        return f"{prefix}{kept.index(int(index))}{dot}{rest}" if int(index) in kept else None

    renamed = {
        part: {new: v for k, v in old[part].items() if (new := now(k))} for part in ("numbers", "shapes", "kept")
    }
    blocks = {new: v for k, v in old["blocks"].items() if (new := now(k))}
    blocks[name] = kept if before is None else [before[i] for i in kept]
    renamed["numbers"] |= numbers
    attention = [new for k in old["attention"] if (new := now(k))]
    model.rarefy_cut = {**old, **renamed, "blocks": blocks, "attention": attention, "config": False}  # type: ignore[assignment]


def record_attention(model: nn.Module, names: Iterable[str]) -> None:
    """Note on the model that these attention modules have heads of their own."""
    old = cut_record(model)
    model.rarefy_cut = {**old, "attention": [*old["attention"], *names], "config": False}  # type: ignore[assignment]


def record_cut(model: nn.Module, numbers: Mapping[str, Any], kept: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Note on the model which numbers of modules changed, and which indices of its tensors were kept, by dimension."""
    old = cut_record(model)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    stored = set(model.state_dict(keep_vars=True))
    shapes, loose = dict(old["shapes"]), {n: dict(d) for n, d in old["kept"].items()}
    for name, dims in kept.items():
        if name in stored:
            shapes[name] = list(tensors[name].shape)
            continue
        for d, indices in dims.items():  # is made by the class: what to keep of it has to be told
            before = loose.setdefault(name, {}).get(str(d))
            loose[name][str(d)] = (indices if before is None else torch.tensor(before)[indices]).tolist()
    numbers = {**old["numbers"], **numbers}
    model.rarefy_cut = {**old, "numbers": numbers, "shapes": shapes, "kept": loose, "config": False}  # type: ignore[assignment]


def check_record(record: Any, path: Any) -> None:
    """Raise ContainerError for what are no notes of cuts."""
    if (
        not isinstance(record, dict)
        or set(record) != set(PARTS)
        or any(type(record[p]) is not k for p, k in PARTS.items())
    ):
        raise ContainerError(f"{path}: the structure that a cut left is damaged")


def restore(model: nn.Module, record: Any, path: Any) -> None:
    """Give a model of the original class the structure that a cut left: its numbers, and empty tensors in the right
    shapes. Raises ContainerError for what does not fit the class: whole numbers of modules can become smaller, of
    torch's own layers only their sizes, and tensors can only lose indices."""
    check_record(record, path)
    for name, kept in record["blocks"].items():
        _keep_blocks(model, name, kept, path)
    for name in record["attention"]:
        if not isinstance(name, str) or not with_own_heads(model, [name]):
            raise ContainerError(f"{path}: {type(model).__name__} has no attention {name!r} that could have own heads")
    modules = dict(model.named_modules())
    for name, value in record["numbers"].items():
        _set_number(model, modules, name, value, path)
    slots = {n: (m, a) for n, m, a in named_tensors(modules)}
    fresh = {**_shaped(slots, record["shapes"], path), **_picked(slots, record["kept"], path)}
    made: dict[int, Any] = {}  # tied ones stay so
    for module, attribute in slots.values():
        old: Any = getattr(module, attribute)
        if id(old) in fresh:
            new = fresh[id(old)]
            if isinstance(old, nn.Parameter):
                new = made.setdefault(id(old), nn.Parameter(new, old.requires_grad))
            setattr(module, attribute, new)
    model.rarefy_cut = record  # type: ignore[assignment]


def _set_number(model: nn.Module, modules: Mapping[str, nn.Module], name: str, value: Any, path: Any) -> None:
    prefix, _, attribute = name.rpartition(".")
    old = vars(modules[prefix]).get(attribute) if prefix in modules else None
    if old is not None and type(modules[prefix]).__module__.startswith("torch.nn.") and attribute not in SIZES:
        old = None
    least = 0 if attribute in NUMBERS else 1
    olds, values = (old, value) if isinstance(old, tuple) and isinstance(value, list) else ((old,), [value])
    sizes = zip(olds, values)
    if len(olds) != len(values) or not all(type(o) is int and type(n) is int and least <= n <= o for o, n in sizes):
        raise ContainerError(f"{path}: {type(model).__name__} has no size {name} that a cut could make {value!r}")
    setattr(modules[prefix], attribute, tuple(value) if isinstance(value, list) else value)


def _shaped(slots: Mapping[str, tuple[nn.Module, str]], shapes: Mapping[str, Any], path: Any) -> dict[int, Tensor]:
    """Empty tensors of the shapes that a cut left, by the ids of those whose place they take."""
    fresh: dict[int, Tensor] = {}
    for name, shape in shapes.items():
        old = _slot(slots, name, path)
        fits = isinstance(shape, list) and len(shape) == old.dim()
        if not fits or any(type(n) is not int or not 1 <= n <= o for n, o in zip(shape, old.shape)):
            raise ContainerError(f"{path}: {name} is {list(old.shape)} in this class; no cut makes it {shape!r}")
        if list(old.shape) != shape:
            fresh[id(old)] = torch.empty(shape, dtype=old.dtype, device=old.device)
    return fresh


def _picked(slots: Mapping[str, tuple[nn.Module, str]], kept: Mapping[str, Any], path: Any) -> dict[int, Tensor]:
    """What a cut kept of tensors that the class makes itself, by their ids."""
    fresh: dict[int, Tensor] = {}
    for name, dims in kept.items():
        old = new = _slot(slots, name, path)
        for d, indices in (dims if isinstance(dims, dict) else {"": []}).items():
            fits = d.isdecimal() and int(d) < old.dim() and isinstance(indices, list) and len(indices) >= 1
            rising = fits and all(type(i) is int for i in indices) and indices == sorted(set(indices))
            if not rising or not 0 <= indices[0] <= indices[-1] < old.shape[int(d)]:
                raise ContainerError(f"{path}: what a cut kept of {name} does not fit its shape {list(old.shape)}")
            new = new.index_select(int(d), torch.tensor(indices, device=new.device))
        fresh[id(old)] = new
    return fresh


def _keep_blocks(model: nn.Module, name: str, kept: Any, path: Any) -> None:
    parts = dict(model.named_modules()).get(name)
    fits = isinstance(parts, nn.ModuleList | nn.Sequential) and isinstance(kept, list) and len(kept) > 0
    if not fits or any(type(i) is not int or not 0 <= i < len(parts) for i in kept) or kept != sorted(set(kept)):  # type: ignore[arg-type]
        raise ContainerError(
            f"{path}: {type(model).__name__} has no list of blocks {name} of which a cut could keep {kept!r}"
        )
    keep_blocks(parts, kept)  # type: ignore[arg-type]


def keep_blocks(parts: nn.ModuleList | nn.Sequential, kept: list[int]) -> Any:
    """Leave these blocks in a list, numbered anew; return what undoes it."""
    before = dict(parts._modules)
    blocks = list(before.values())

    def put(modules: Mapping[str, Any]) -> None:
        parts._modules.clear()
        parts._modules.update(modules)

    put({str(n): blocks[i] for n, i in enumerate(kept)})
    return lambda: put(before)


def named_tensors(modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module, str]]:
    """Return (name, module, attribute) of each parameter and buffer; shared ones at each of their places."""
    return [
        (f"{n}.{a}" if n else a, m, a)
        for n, m in modules.items()
        for a, t in [*m._parameters.items(), *m._buffers.items()]
        if t is not None
    ]


def _slot(slots: Mapping[str, tuple[nn.Module, str]], name: str, path: Any) -> Tensor:
    if name not in slots:
        raise ContainerError(f"{path}: " + unknown("tensor of a cut", name, list(slots)))
    return getattr(*slots[name])
