"""Models to folders and back: `save`, `load`, `export`, `inspect`."""

from __future__ import annotations

import copy
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rarefy.common.atomic_io import INDEX, blaming, check_target, whole_folder
from rarefy.common.errors import ContainerError, FormatError, ModelError, nearest, unknown
from rarefy.common.report import Report
from rarefy.compat import compressed_tensors, withdrawn
from rarefy.compiler.executor import Compiled
from rarefy.engine import stored
from rarefy.evaluation.profiling import folder_bytes, sparsity_of
from rarefy.evaluation.receipt import Receipt
from rarefy.formats import container, quantized_encodings, sparse_encodings
from rarefy.generation.decoder import Decoder
from rarefy.lowrank import layer_tying
from rarefy.model import activation_quant, hf, lowrank_modules
from rarefy.model.layers import Layer, all_layers, original, unwrap
from rarefy.model.layout import Layout
from rarefy.model.masks import plain_state
from rarefy.model.quant_grid import get_grid, note_
from rarefy.model.sparsity_pattern import fitting_pattern
from rarefy.runtime.autotune import accelerate_, accelerate_each, check_options
from rarefy.runtime.sparse_layers import Sparse
from rarefy.structured.hf_config import adopt_config
from rarefy.structured.structure_record import check_told, restore

EXPORTS = ("hf", "safetensors", "compressed-tensors")
EXPORTED = "rarefy-export.json"  # marks a folder that an export may be written over
Slots = dict[str, tuple[nn.Module, str]]
WEIGHTS = (".safetensors", ".xz", INDEX, stored.GRAPH)  # the files that "bytes on disk" counts


def save(
    model: nn.Module | Compiled | Decoder,
    path: str | Path,
    *,
    receipt: Receipt | None = None,
    recipe: Mapping[str, Any] | None = None,
    format: str = "smallest",
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    compress: bool = False,
) -> int:
    """Write `model` to a folder, each weight in its smallest format; return the bytes of weights and index.

    Masks are folded in on the way, tied weights stored once. The folder appears whole or not at all. The receipt and
    recipe of `compress_` are taken along by themselves. `format` other than `smallest` is used for every prunable
    weight that it fits. `compress` puts all of it through LZMA: smaller on disk, slower to read, not mapped from there.
    What `compile` or `decoder` returned is saved as it is, its weights packed already: ModelError where its graph calls
    what no saved one may. Raises ContainerError: folder exists, no space. O(weights), one shard in memory at a time.
    """
    if isinstance(model, Compiled | Decoder):
        if format != "smallest":
            raise FormatError(f"format {format!r}: a compiled model is saved as its kernels read it, leave format out")
        extra = {**(files or {}), **(receipt.files() if receipt else {})}
        meta = {"structure": {"library": None, "class": type(model).__name__}, "recipe": recipe, "rarefy": _version()}
        stored.save(model, path, meta, files=extra, overwrite=overwrite, compress=compress)
        return folder_bytes(os.path.realpath(path), WEIGHTS)
    model = unwrap(model)
    packed_layers = [n for n, m in model.named_modules() if isinstance(m, Sparse)]
    if packed_layers:
        raise ModelError(
            f"{packed_layers[0]} and {len(packed_layers) - 1} more run on kernels chosen for this machine: save before "
            "accelerate_, and accelerate_ what load returns"
        )
    if format != "smallest" and format not in sparse_encodings.FORMATS:
        raise FormatError(unknown("format", format, ["smallest", *sparse_encodings.FORMATS]))
    receipt = receipt or getattr(model, "rarefy_receipt", None)
    recipe = recipe or getattr(model, "rarefy_recipe", None)
    state = list(plain_state(model))
    tied = aliases(model)
    structure = hf.structure(model) if hf.is_model(model) else {"library": None, "class": type(model).__name__}
    meta = {"structure": structure, "recipe": recipe, "rarefy": _version()}
    if getattr(model, "rarefy_cut", None):
        meta["cut"] = model.rarefy_cut
    if lowrank_modules.noted(model):
        meta["factors"] = lowrank_modules.noted(model)
    if layer_tying.noted(model):
        meta["tied"] = layer_tying.noted(model)
    if activation_quant.noted(model):
        meta["inputs"] = activation_quant.noted(model)
    extra = {"config.json": json.dumps(structure["config"], indent=1).encode()} if structure["library"] else {}
    extra |= files or {}
    if receipt is not None:
        extra.update(receipt.files())
    packed = ((n, packed) for n, packed in pack(model, dict(state), format, compress) if n not in tied)
    container.write(path, packed, aliases=tied, meta=meta, files=extra, overwrite=overwrite, compress=compress)
    return folder_bytes(os.path.realpath(path), WEIGHTS)


def pack(
    model: nn.Module, state: Mapping[str, Tensor], format: str = "smallest", compress: bool = False
) -> Iterator[tuple[str, sparse_encodings.Packed]]:
    """Yield (name, packed) for each tensor of a plain state: prunable weights in `format`, all else dense. What is
    `smallest` counts after LZMA where the file is compressed."""
    layers = {f"{n}.{p}" if n else p: l for l in all_layers(model) for n, _, p in l.owners}
    patterns = {r["layer"]: r["pattern"] for r in _layer_rows(model)}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        layout = layers[name].layout if name in layers else None
        grid = get_grid(layers[name]) if name in layers else None
        if layout is None or (format == "dense" and grid is None):
            yield name, sparse_encodings.encode(tensor, "dense")
            continue
        pattern = patterns.get(name.removesuffix(".weight")) or fitting_pattern(tensor, layout.in_axis)
        pattern = pattern if pattern[:1].isdigit() else None
        if grid is not None:
            known = quantized_encodings.sizes(tensor, grid, pattern, axis=layout.in_axis)
            make = partial(quantized_encodings.encode, tensor, grid, pattern=pattern, axis=layout.in_axis)
            yield name, make(format) if format in known else container.least(make, known, compress)
            continue
        sizes = sparse_encodings.sizes(tensor, pattern, axis=layout.in_axis)
        if compress and format == "smallest":
            make = partial(sparse_encodings.encode, tensor, pattern=pattern, axis=layout.in_axis)
            yield name, container.least(make, sizes, True)
        elif format == "smallest" or format not in sizes:
            yield name, sparse_encodings.smallest(tensor, pattern, axis=layout.in_axis)
        else:
            yield name, sparse_encodings.encode(tensor, format, pattern, axis=layout.in_axis)


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
    how = _how_to_accelerate(accelerate)
    stream = how is not None and how["example"] is None
    if model is not None and not isinstance(model, nn.Module):
        raise ModelError(f"model is a torch.nn.Module to load into, such as MyModule(), got {model!r}")
    if model is None and not how and not (Path(path) / INDEX).is_file() and withdrawn.is_compressed(path):
        return withdrawn.load(path)
    saved = container.read(path, verify=verify)
    if stored.is_compiled(saved):
        return stored.load(saved, model=model, accelerate=how)
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
    grids: dict[str, quantized_encodings.Values | None] = {}

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
        note_(module, leaf, grids[source])
        if source in shared:
            done[source] = fresh
        for other in (n for n, f in tied.items() if f == name):
            setattr(*slots[other], getattr(module, leaf))
            note_(*slots[other], grids[source])

    shared = {s for s, n in Counter(saved.aliases.get(n, n) for n in slots if n not in tied).items() if n > 1}
    late = {n for n in slots if n.endswith(".weight") and isinstance(slots[n][0], nn.Linear)} if stream else set()
    late = {n for n in late if n not in tied and n not in tied.values()}
    for name in slots:
        if name not in tied and name not in late:
            bring(name)
    if how is not None:
        names = {id(slots[n][0]): n for n in late}

        def bring_late(layer: Layer) -> None:
            name = names.pop(id(layer.module), None)
            if name is not None and layer.param == "weight":
                bring(name)

        model.rarefy_accelerated = accelerate_each(model, how, bring_late if stream else None)  # type: ignore
        for name in names.values():  # what was not chosen to be accelerated
            bring(name)
    receipt = Path(path) / "receipt.json"
    if receipt.is_file() and not receipt.is_symlink() and receipt.stat().st_size < 1 << 26:
        _remember(model, receipt, saved.meta.get("recipe"))
    return model


def _restructure(saved: container.Container, model: nn.Module, structure: dict[str, Any], path: Any) -> Slots:
    """Give a model the structure that was saved, and return its slots; ContainerError where the tensors do not fit."""
    if saved.meta.get("cut") is not None:
        check_told(saved.meta["cut"], path)
        if _fits(saved, model):
            model.rarefy_cut = saved.meta["cut"]  # type: ignore[assignment]
        else:
            restore(model, saved.meta["cut"], path)
            adopt_config(model, structure.get("config"))
    layer_tying.restore_(model, saved.meta.get("tied", {}), path)
    told = saved.meta.get("factors", {})
    if told != lowrank_modules.noted(model):
        lowrank_modules.restore_(model, told, path)
    activation_quant.restore_(model, saved.meta.get("inputs", {}), path)
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


def _how_to_accelerate(asked: Any) -> dict[str, Any] | None:
    """Return all arguments of `accelerate_`, or None; ModelError for what it does not take."""
    if asked is False:
        return None
    asked = {} if asked is True else asked
    if not isinstance(asked, Mapping):
        raise ModelError(f"accelerate is True, False or a dict of accelerate_'s arguments, got {asked!r}")
    allowed = [n for n in signature(accelerate_).parameters if n != "model"]
    for name in asked:
        if name not in allowed:
            raise ModelError(unknown("argument of accelerate_", name, allowed))
    how = {n: p.default for n, p in signature(accelerate_).parameters.items() if n != "model"} | dict(asked)
    check_options(*(how[n] for n in ("batch", "repeats", "values", "choices")))
    return how


def export(path: str | Path, out: str | Path, *, to: str = "hf", overwrite: bool = False) -> Path:
    """Write a saved folder as a checkpoint that needs no Rarefy: `hf` (a dense folder that transformers loads),
    `safetensors` (one dense file under a folder, tensors by name) or `compressed-tensors` (a quantized folder that
    transformers loads with that package). In dense ones inputs are no longer rounded. Returns the folder."""
    if to not in EXPORTS:
        raise ContainerError(f"export --to {to!r}: choose from {', '.join(EXPORTS)}")
    if os.path.realpath(out) == os.path.realpath(path):
        raise ContainerError(f"{out} is the folder to export from; give another name")
    check_target(out, overwrite, EXPORTED)
    note = {"from": str(path), "rarefy": _version()}
    if to != "safetensors":
        model = load(path)
        if not hf.is_model(model):
            raise ModelError(f"{path} holds a {type(model).__name__}: only Hugging Face models export to {to}")
        if getattr(model, "rarefy_cut", None) and not model.rarefy_cut["config"]:  # type: ignore[index, operator]
            raise ContainerError(
                f"{path}: a cut left sizes that no config of {type(model).__name__} can tell (layers unlike each "
                "other, or heads that do not make up the width): load it with rarefy.load, or export --to safetensors"
            )
        if layer_tying.noted(model):
            raise ContainerError(
                f"{path}: blocks share their weights, which {type(model).__name__} knows nothing of: load it with "
                "rarefy.load, or export --to safetensors"
            )
        if lowrank_modules.noted(model):
            raise ContainerError(
                f"{path}: {next(iter(lowrank_modules.noted(model)))} is made of factors, which {type(model).__name__} knows "
                "nothing of: load it with rarefy.load, or export --to safetensors"
            )
    with whole_folder(out, overwrite=overwrite, marker=EXPORTED) as partial, blaming(Path(out)):
        if to != "safetensors":
            if to == "hf":
                model.save_pretrained(partial)  # type: ignore[possibly-unbound, operator]
            else:
                compressed_tensors.write(model, partial)  # type: ignore[possibly-unbound]
            for name, content in side_files(path).items():
                (partial / name).write_bytes(content)
        else:
            saved = container.read(path)
            if stored.is_compiled(saved):
                raise ModelError(f"{path} holds a compiled model: export what it was compiled from")
            names = [*saved.names, *saved.aliases]
            save_file({n: saved.tensor(n, _shape(saved, n)) for n in names}, partial / "model.safetensors")
        (partial / EXPORTED).write_text(json.dumps(note))
    return Path(out)


def side_files(path: str | Path) -> dict[str, bytes]:
    """Return tokenizer and generation files of a model folder, to go along with its weights."""
    return {n: (Path(path) / n).read_bytes() for n in hf.TOKENIZER_FILES if (Path(path) / n).is_file()}


def inspect(what: str | Path | nn.Module) -> Report:
    """Return a row a tensor: shape, type, format, sparsity, the pattern its zeros fit, bytes stored and dense.

    `what`: a live model, a folder of ours, a Hugging Face folder, or a .safetensors file. O(weights).
    """
    rows, more = [], {}
    for name, tensor, format, size, axis in _tensors(what, more):
        zeros = sparsity_of(tensor)
        dense = tensor.numel() * tensor.element_size()
        rows.append(
            {
                "tensor": name,
                "shape": "x".join(map(str, tensor.shape)) or "scalar",
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "format": format,
                "sparsity": zeros,
                "pattern": fitting_pattern(tensor, axis) if zeros > 0.01 else "",
                "bytes": size,
                "dense_bytes": dense,
            }
        )
    if not rows:
        raise ContainerError(f"{what} holds no tensors")
    total, dense = sum(r["bytes"] for r in rows), sum(r["dense_bytes"] for r in rows)
    summary = {"tensors": len(rows), "bytes": total, "dense bytes": dense, "ratio": total / max(dense, 1)}
    title = type(what).__name__ if isinstance(what, nn.Module) else str(what)
    kind = f": {'a decoder' if stored.NUMBERS in more else 'a compiled model'}" if more else ""
    return Report(title + kind, tuple(rows), {**summary, **more})


def _tensors(what: str | Path | nn.Module, more: dict[str, Any]) -> Iterator[tuple[str, Tensor, str, int, int]]:
    """Name, values, format, bytes and axis of each tensor; what there is to say besides goes into `more`."""
    if isinstance(what, nn.Module):
        tied, layouts = aliases(what), _layouts(what)
        for name, tensor in plain_state(what):
            if name not in tied:
                axis = layouts[name].in_axis if name in layouts else -1
                yield name, tensor, "dense", tensor.numel() * tensor.element_size(), axis
        return
    if isinstance(what, Compiled | Decoder):
        raise ModelError("a compiled model: print it, or save it and inspect its folder")
    path = Path(what)
    if (path / INDEX).is_file():
        saved = container.read(path)
        if stored.is_compiled(saved):
            parts = stored.read(saved)
            yield from stored.tensors(parts)
            more.update(stored.summary(parts))
            return
        for name in saved.names:
            packed = saved.packed(name, _shape(saved, name))
            yield (
                name,
                quantized_encodings.decode(packed),
                quantized_encodings.label(packed),
                packed.nbytes,
                packed.extra.get("axis", -1),
            )
        return
    if withdrawn.is_compressed(path):
        yield from ((name, t, label, size, -1) for name, t, _, label, size in withdrawn.tensors(path))
        return
    files = [path] if path.suffix == ".safetensors" and path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise ContainerError(f"{what}: neither a folder of ours, nor a folder with .safetensors, nor such a file")
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():
                    tensor = opened.get_tensor(name)
                    yield name, tensor, "dense", tensor.numel() * tensor.element_size(), -1
        except SafetensorError as error:
            raise ContainerError(f"{file}: not a valid safetensors file: {error}") from None


def _before_cuts(saved: container.Container, structure: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The structure to build: what the config says, or where cuts have left what no config says, the config before."""
    cut = saved.meta.get("cut")
    if cut is None:
        return structure
    check_told(cut, path)
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


def _layouts(model: nn.Module) -> dict[str, Layout]:
    return {f"{n}.{p}" if n else p: l.layout for l in all_layers(model) for n, _, p in l.owners}


def _layer_rows(model: nn.Module) -> list[Mapping[str, Any]]:
    receipt = getattr(model, "rarefy_receipt", None)
    return receipt.sparsity.get("layers", []) if receipt else []


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
    for name, _ in plain_state(model):
        owner, _, leaf = name.rpartition(".")
        slots[name] = (model.get_submodule(owner), leaf)
    return slots


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
                **{k: tuple(values.get(k, ())) for k in ("speed", "stages", "notes")},
            }
        )
        _ = str(known) + known.to_json()  # what cannot be printed cannot be kept
        if any(not isinstance(r["layer"] + r["pattern"], str) for r in known.sparsity.get("layers", ())):
            return
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return  # a receipt is a record, not a part of the model
    model.rarefy_receipt, model.rarefy_recipe = known, recipe  # type: ignore[assignment]


def _version() -> str:
    from rarefy.common.version import __version__

    return __version__
