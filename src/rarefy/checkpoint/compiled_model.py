"""Compiled models in folders: the graph as JSON, weights packed as kernels read them, everything looked at on the way
back. Nothing of the model's class is needed to load one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.common.errors import ContainerError, FormatError
from rarefy.compiler import ops, shape_checks
from rarefy.compiler.executor import Compiled, Expected, Lookup
from rarefy.compiler.fx_utils import ExportedGraph, Node
from rarefy.compiler.graph_json import GraphDef, from_json, to_json
from rarefy.formats import container
from rarefy.formats.sparse_encodings import encode
from rarefy.generation.decoder import Decoder
from rarefy.runtime import bindings
from rarefy.runtime.huge_pages import Pages
from rarefy.runtime.kernel import Kernel, _check
from rarefy.runtime.packed_formats import (
    SLAB,
    Bitmask,
    ConvTiles,
    Dense,
    Packed,
    Panels,
    Sell,
    from_tensors,
    to_tensors,
)
from rarefy.runtime.packing import nbytes, unpack

GRAPH = "graph.json"
META = "compiled"  # what marks such a folder in its index
NUMBERS = "decoder"  # and what a decoder knows besides its graph
FORMATS: dict[Any, tuple[str, ...]] = {
    ops.linear: ("tiles", "sell", "bitmask", "panels", "fours"),
    ops.conv2d: ("convolution",),
    ops.embedding: ("panels",),
}
PLAIN: dict[str, tuple[str, ...]] = {  # what of a packed weight is no tensor
    "tiles": ("shape", "kind", "block"),
    "sell": ("shape", "kind", "block"),
    "convolution": ("shape", "kind", "block", "groups", "stride", "padding", "dilation"),
    "bitmask": ("shape", "kind"),
    "fours": ("shape", "kind"),
    "panels": ("shape", "kind", "exact", "parts"),
}
KINDS = {"panels": ("int8", "int4")}  # that plans know, of other formats these:
USUAL = ("fp32", "int8")
ASKED = ((torch.int64, 2), (torch.int64, 2), (torch.int64, 1))  # of a decoder's step: types and dimensions of inputs
MOST_IDS, MOST_ENDS = 1 << 31, 1024
MOST_RATIO, SLACK = 1024, 1 << 20  # bytes that a packed byte may become where there are no kernels


@dataclass(frozen=True)
class Parts:
    """What a compiled model is made of: its graph, its constants, its packed weights by name, and of a decoder its
    numbers."""

    written: GraphDef
    constants: dict[str, Tensor]
    packed: dict[str, Packed]
    numbers: Mapping[str, Any]


def save(
    model: Compiled | Decoder, path: str | Path, meta: Mapping[str, Any], *, files: Mapping[str, bytes], **how: Any
) -> None:
    """Write a compiled model or a decoder to a folder; the rest is as for `container.write`. ModelError for a graph
    that calls what no saved one may. O(weights)."""
    made = model.compiled if isinstance(model, Decoder) else model
    packed, kernels = _packed(made)
    used = {n.name for n in made.exported.graph.nodes if n.op == "placeholder" and n.users}
    constants = {n: t for n, t in made.constants.items() if n in used}
    orders = {n: _order(t) for n, t in constants.items()}
    apart = {n: to_tensors(p) for n, p in packed.items()}
    told = to_json(made, orders, kernels, {n: about for n, (about, _) in apart.items()})
    text = json.dumps(told, allow_nan=False, separators=(",", ":")).encode()
    about = {GRAPH: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}}
    tensors = {f"constant.{n}": t if orders[n] is None else t.permute(orders[n]) for n, t in constants.items()}  # type: ignore[arg-type]
    tensors |= {f"packed.{n}.{p}": t for n, (_, parts) in apart.items() for p, t in parts.items()}
    dense = ((n, encode(t.detach().contiguous(), "dense")) for n, t in tensors.items())
    more = {NUMBERS: _numbers_of(model)} if isinstance(model, Decoder) else {}
    container.write(path, dense, meta={**meta, META: about, **more}, files={**files, GRAPH: text}, **how)


def _numbers_of(made: Decoder) -> dict[str, Any]:
    """What a decoder knows besides its graph, as JSON."""
    told = {n: getattr(made, n) for n in ("vocabulary", "most", "pad")}
    return {**told, "ends": list(made.ends), "kept": made.compiled.exported.kept}


def _packed(made: Compiled) -> tuple[dict[str, Packed], dict[Node, str]]:
    """The packed weights by name, once where words share one, and which word runs on which."""
    packed: dict[str, Packed] = {}
    names: dict[Node, str] = {}
    for node, kernel in made.kernels.items():
        form, name = kernel.held[0], node.args[1].name
        if name in packed and not _same(packed[name], form):
            name = node.name
        packed[name], names[node] = form, name
    return packed, names


def _same(a: Packed, b: Packed) -> bool:
    (one, parts), (other, others) = to_tensors(a), to_tensors(b)
    return one == other and parts.keys() == others.keys() and all(torch.equal(parts[n], others[n]) for n in parts)


def _order(t: Tensor) -> list[int] | None:
    """How the dimensions of a tensor follow in memory, where that is not row after row and without gaps."""
    if t.is_contiguous() or t.layout != torch.strided:
        return None
    order = sorted(range(t.dim()), key=lambda d: (-t.stride(d), d))
    return order if t.permute(order).is_contiguous() else None


def is_compiled(saved: container.Container) -> bool:
    """Return whether a folder holds a compiled model or a decoder."""
    return META in saved.meta


def load(saved: container.Container, **without: Any) -> Compiled | Decoder:
    """Return the compiled model or decoder of a folder: the same bits come out of it as of the one that was saved, on
    the same machine. Where there are no kernels its words run in torch. ContainerError for anything that no saved model
    has, and for options `without` effect that are not None. O(weights)."""
    for name, value in without.items():
        if value is not None:
            raise ContainerError(
                f"{saved.path} holds a compiled model, which is fast without its class: leave {name}= out"
            )
    parts = read(saved)
    w, constants, kernels = parts.written, dict(parts.constants), {}
    for node, name in w.kernels.items():
        form = parts.packed[name]
        if bindings.missing() is None:
            try:
                kernels[node] = _kernel(node, form, constants)
            except FormatError as error:
                raise ContainerError(f"{saved.path}: {node.name}: {error}") from error
        elif node.args[1].name not in constants:
            constants[node.args[1].name] = dense(form, f"{saved.path}: packed {name}")
    numbers = dict(parts.numbers)
    traced = ExportedGraph(w.graph, constants, w.inputs, w.in_spec, w.out_spec, w.ranges, w.notes)
    traced.kept = numbers.pop("kept", 0)
    made = Compiled(traced, kernels, w.expected, shape_checks.check)
    return Decoder(made, **{**numbers, "ends": tuple(numbers["ends"])}) if numbers else made


def _kernel(node: Node, form: Any, constants: Mapping[str, Tensor]) -> Any:
    """What runs a word on its packed weight; FormatError where that leads outside of itself."""
    if node.target is ops.embedding:
        return Lookup(Kernel(form))
    _, _, bias, _, act, *_ = node.args
    return Kernel(form, None if bias is None else constants[bias.name], act)


def read(saved: container.Container) -> Parts:
    """Return the parts of a compiled model; ContainerError where they do not belong together. O(weights)."""
    where = saved.path / GRAPH
    about = saved.meta[META]
    try:
        told = container.read_json(saved, GRAPH, about.get(GRAPH) if type(about) is dict else about)
    except OSError as error:
        raise ContainerError(f"{where} cannot be read: {error}") from error
    written = from_json(told, str(where))
    names = {f"constant.{n}" for n in written.constants}
    stored = {n for n in saved.names if not n.startswith("packed.")}
    if names != stored or saved.aliases:
        odd = sorted(names ^ stored) or sorted(saved.aliases)
        raise ContainerError(f"{where}: constants are not those of the shards: {odd[0][:80]!r}")
    pages = Pages()  # each on its own, so that what was read makes room for the next
    packed = {n: pages.hold(_form(saved, n, about, str(where))) for n, about in written.packed.items()}
    if len(saved.names) != len(stored) + sum(len(to_tensors(p)[1]) for p in packed.values()):
        raise ContainerError(f"{where}: the shards hold packed weights that no word runs on")
    constants = {n: _constant(saved, n, order) for n, order in written.constants.items()}
    for node in written.graph.nodes:
        try:
            _check_weights(node, written, constants, packed)
        except ValueError as error:
            raise ContainerError(f"{where}: node {node.name}: {error}") from error
    try:
        numbers = _numbers(saved.meta.get(NUMBERS), written)
    except ValueError as error:
        raise ContainerError(f"{saved.path}: {error}") from error
    return Parts(written, constants, packed, numbers)


def _numbers(told: Any, w: GraphDef) -> Mapping[str, Any]:
    """A decoder's numbers, {} of what is none; ValueError unless they and its graph belong together."""
    kept = _kept(w)
    if told is None:
        if kept:
            raise ValueError("the graph recalls what a cache keeps, but the index tells of no decoder")
        return {}
    if type(told) is not dict or set(told) != {"vocabulary", "most", "ends", "pad", "kept"}:
        raise ValueError(f"a decoder has vocabulary, most, ends, pad, kept, got {str(told)[:200]}")
    many, ends = told["vocabulary"], told["ends"]
    ids = [*(ends if type(ends) is list and len(ends) <= MOST_ENDS else [None]), told["pad"]]
    if not _whole(many, 1, MOST_IDS) or not all(_whole(i, 0, many) for i in ids):
        raise ValueError(f"a decoder's ends and pad are of its vocabulary, 1 to {MOST_IDS}: got {str(told)[:200]}")
    if told["most"] is not None and not _whole(told["most"], 1, 1 << 62):
        raise ValueError(f"a decoder's most is a number of tokens or null, got {str(told['most'])[:80]}")
    if type(told["kept"]) is not int or not 0 < kept == told["kept"]:
        raise ValueError(f"a decoder keeps {str(told['kept'])[:80]} numbers of a token, its graph {kept}")
    asked = tuple((e.dtype, len(e.sizes)) if isinstance(e, Expected) else None for e in w.expected)
    out = next(n for n in w.graph.nodes if n.op == "output").args[0]
    if asked != ASKED or len(out) != 1 or not isinstance(out[0], fx.Node):
        raise ValueError("a decoder's step takes ids, positions and places, and gives logits")
    return told


def _whole(value: Any, least: int, end: int) -> bool:
    return type(value) is int and least <= value < end


def _kept(w: GraphDef) -> int:
    """How many numbers a graph's recalls keep of a token; ValueError unless they lie one after the other."""
    kept = 0
    for node in w.graph.nodes:
        if node.target is ops.cached_attention:
            (at, after), heads, kv_heads = node.args[4:7]
            each = after - at
            if at != kept or each <= 0 or each % kv_heads or heads % kv_heads:
                raise ValueError(
                    f"node {node.name}: {heads} heads of {kv_heads} cannot keep keys and values at {at} and {after}: "
                    f"{kept} numbers lie before them"
                )
            kept = after + each
    return kept


def _constant(saved: container.Container, name: str, order: list[int] | None) -> Tensor:
    t = saved.tensor(f"constant.{name}")
    if order is None:
        return t
    if len(order) != t.dim():
        raise ContainerError(
            f"{saved.path / GRAPH}: constants: {name}: {order} are not the dimensions of {list(t.shape)}"
        )
    return t.permute([order.index(d) for d in range(t.dim())])


def _form(saved: container.Container, name: str, about: dict[str, Any], where: str) -> Packed:
    """A packed weight, of the sizes and types that its kernel reads; where its numbers lead the kernel looks at."""
    first = f"packed.{name}."
    try:
        format_: Any = about.get("format")
        plain = PLAIN.get(format_, ())
        if not plain or about.get("kind") not in KINDS.get(format_, USUAL) or set(about) != {"format", *plain}:
            raise FormatError(f"{str(about)[:200]} is no weight that a word runs on")
        parts = {n.removeprefix(first): saved.tensor(n) for n in saved.names if n.startswith(first)}
        form: Any = from_tensors(about, parts)
        _check(form, None)
        if isinstance(form, ConvTiles) and form.order is not None and form.groups > 1:
            raise FormatError(f"pairs of rows are for convolutions of one group, got {form.groups}")
        if isinstance(form, Panels) and (type(form.parts) is not int or (not form.parts and form.whole is None)):
            raise FormatError(f"panels have a scale for each row, or some for each word, got parts {form.parts!r}")
    except (FormatError, TypeError) as error:  # fields that the format has not
        raise ContainerError(f"{where}: packed {name[:80]!r}: {error}") from error
    return form


def _check_weights(node: Node, w: GraphDef, constants: Mapping[str, Tensor], packed: Mapping[str, Packed]) -> None:
    """Raise ValueError unless a word's weights are of sizes that it can be called with."""
    if node.target is ops.norm:
        shapes = {tuple(constants[c.name].shape) for c in node.args[1:3] if c is not None}
        if len(shapes) > 1 or any(len(s) != 1 for s in shapes):
            raise ValueError(f"its gain and bias are of shapes {sorted(shapes)}")
    name = w.kernels.get(node)
    if node.target not in FORMATS or (node.target is ops.embedding and name is None):
        return
    form: Any = constants[node.args[1].name] if name is None else packed[name]
    shape = tuple(form.shape)
    kinds = FORMATS[node.target]
    if name is not None and w.packed[name]["format"] not in kinds:
        raise ValueError(f"runs on a weight packed as {w.packed[name]['format']}, must be {' or '.join(kinds)}")
    if name is None and (len(shape) != (2 if node.target is ops.linear else 4) or not form.is_floating_point()):
        raise ValueError(f"its weight is {form.dtype} {list(shape)}")
    bias = None if node.target is ops.embedding else node.args[2]
    if bias is not None and tuple(constants[bias.name].shape) != shape[:1]:
        raise ValueError(f"its bias is {list(constants[bias.name].shape)} for a weight of {list(shape)}")
    if node.target is ops.conv2d and name is not None:
        told = (form.stride, form.padding, form.dilation, form.groups)
        if told != tuple(node.args[5:9]):
            raise ValueError(f"is a convolution of {node.args[5:9]}, its packed weight one of {told}")


def dense(form: Packed, where: str) -> Tensor:
    """Return a packed weight from a file as a dense one; ContainerError where that is no weight but a trap."""
    if isinstance(form, Bitmask | Panels):  # whose bits, or numbers, are as many as the weight's
        try:
            return unpack(form)
        except (IndexError, RuntimeError) as error:
            raise ContainerError(f"{where} is damaged: {error}") from error
    matrix: Any = form.matrix if isinstance(form, ConvTiles) else form
    if isinstance(matrix, Dense):
        return unpack(form)
    rows, blocks = matrix.starts.shape[:2]
    made = 4 * rows * (SLAB if isinstance(matrix, Sell) else 4) * blocks * matrix.block
    listed = int((matrix.counts.long() & 0xFFFF).sum())
    try:
        if made > MOST_RATIO * nbytes(form) + SLACK or listed != len(matrix.columns):
            raise RuntimeError(f"{nbytes(form):,} bytes would become {made:,}, {listed} of {len(matrix.columns)} lanes")
        return unpack(form)
    except (IndexError, RuntimeError) as error:
        raise ContainerError(f"{where} is damaged: {error}") from error


def tensors(parts: Parts) -> Iterator[tuple[str, Tensor, str, int, int]]:
    """Yield what `inspect` shows of each weight: name, dense, format, bytes stored, the dimension of inputs."""
    for name, t in parts.constants.items():
        yield name, t, "dense", t.nbytes, 1 if t.dim() == 4 else -1
    for name, form in parts.packed.items():
        about = parts.written.packed[name]
        label = about["format"] if about["kind"] == "fp32" else f"{about['kind']}:{about['format']}"
        yield name, dense(form, name), label, nbytes(form), 1 if isinstance(form, ConvTiles) else -1


def summary(parts: Parts) -> dict[str, Any]:
    """Return what a graph is made of, in a few words."""
    calls = [n for n in parts.written.graph.nodes if n.op == "call_function"]
    ours = Counter(n.target.__name__ for n in calls if n.target.__module__ == ops.__name__)
    kept = {NUMBERS: ", ".join(f"{n} {v}" for n, v in parts.numbers.items())} if parts.numbers else {}
    return {
        **kept,
        "inputs": ", ".join(f"{n.name} {e}" for n, e in zip(parts.written.inputs, parts.written.expected)),
        "operators": ", ".join(f"{n} {w}" for w, n in ours.most_common()),
        "calls of torch": len(calls) - sum(ours.values()),
    }
