"""Save and load compiled models: the graph as JSON, weights packed as kernels read them, all of it checked on loading.

Loading needs nothing of the model's own class.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.common.errors import ContainerError, FormatError
from rarefy.compiler import ops, shape_checks
from rarefy.compiler.executor import Compiled
from rarefy.compiler.fx_utils import ExportedGraph, Node
from rarefy.compiler.graph_json import GraphDef, from_json, to_json
from rarefy.compiler.input_checks import InputSpec
from rarefy.compiler.kernel_selection import EmbeddingKernel, reads_static_codes, repack
from rarefy.compiler.operators.attention import CACHED
from rarefy.compiler.operators.spec import Call
from rarefy.compiler.operators.table import BY_TARGET
from rarefy.formats import container
from rarefy.formats.sparse_encodings import encode
from rarefy.generation.decoder import Decoder
from rarefy.generation.kv_cache import check_cache_precision, slots_of
from rarefy.generation.options import checked_defaults
from rarefy.model.nesting import output_names
from rarefy.runtime import bindings
from rarefy.runtime.huge_pages import HugePageBuffer
from rarefy.runtime.kernel import Kernel, check_packed
from rarefy.runtime.packed_formats import (
    LANE,
    PANEL_BITS,
    ROW_KINDS,
    SLAB,
    Bitmask,
    ConvTiles,
    Dense,
    Packed,
    QuantizedPanels,
    Sell,
    from_tensors,
    to_tensors,
)
from rarefy.runtime.packing import nbytes, unpack

GRAPH = "graph.json"
META = "compiled"  # key of the index that marks such a folder
DECODER = "decoder"  # key of the index for a decoder's numbers
SCALARS: dict[str, tuple[str, ...]] = {  # fields of a packed weight that are not tensors
    "tiles": ("shape", "kind", "block"),
    "sell": ("shape", "kind", "block"),
    "convolution": ("shape", "kind", "block", "groups", "stride", "padding", "dilation"),
    "bitmask": ("shape", "kind"),
    "fours": ("shape", "kind"),
    "panels": ("shape", "kind", "exact", "parts"),
}
OPTIONAL = {"panels": {"two_terms", "zero_bits", "order"}}  # fields that are written where they say something
STEP_INPUTS = ((torch.int64, 2), (torch.int64, 2), (torch.int64, 1))  # types and dimensions of ids, positions, keep
DECODER_FIELDS = ("vocab_size", "max_tokens", "eos_tokens", "pad_token", "cache_features")
GENERATION = "generation_defaults"  # is written where a model has any
CACHE = "cache_precision"  # is written where it is not fp32
OLD_FIELDS = {  # of decoders saved by 0.1.0
    "vocabulary": "vocab_size",
    "most": "max_tokens",
    "ends": "eos_tokens",
    "pad": "pad_token",
    "kept": "cache_features",
}
MAX_VOCAB, MAX_EOS_TOKENS = 1 << 31, 1024
MAX_EXPANSION, EXPANSION_SLACK = 1024, 1 << 20  # bytes that a packed byte may become where there are no kernels


@dataclass(frozen=True)
class Parts:
    """What a folder holds, checked.

    Attributes:
        graph: the graph without its tensors.
        constants: tensors by name.
        packed: packed weights by name.
        numbers: a decoder's numbers, by DECODER_FIELDS; {} for other models.
    """

    graph: GraphDef
    constants: dict[str, Tensor]
    packed: dict[str, Packed]
    numbers: Mapping[str, Any]


# ---- saving ---------------------------------------------------------------------------------------------------------


def save(
    model: Compiled | Decoder,
    path: str | Path,
    meta: Mapping[str, Any],
    *,
    files: Mapping[str, bytes],
    file_of: Callable[[Packed], Path | None] = lambda _: None,
    **options: Any,
) -> None:
    """Write a compiled model or a decoder to a folder. O(weights).

    Args:
        model: what to save.
        path: the folder.
        meta: more entries of the index.
        files: more files, by name.
        file_of: returns the safetensors file that holds the tensors of a packed weight, by their names; None where
            there is none. It becomes a shard as it is.
        **options: those of `container.write`.

    Raises:
        ModelError: if the graph calls an operator that saved graphs may not call.
    """
    compiled = model.compiled if isinstance(model, Decoder) else model
    packed, kernels = _packed_weights(compiled)
    used = {n.name for n in compiled.exported.graph.nodes if n.op == "placeholder" and n.users}
    constants = {n: t for n, t in compiled.constants.items() if n in used}
    orders = {n: _dim_order(t) for n, t in constants.items()}
    if bindings.isa() == "amx":  # files have the formats of CPUs without it
        packed = {n: repack(p, amx=False) for n, p in packed.items()}
    split = {n: to_tensors(p) for n, p in packed.items()}
    graph = to_json(compiled, orders, kernels, {n: scalars for n, (scalars, _) in split.items()})
    text = json.dumps(graph, allow_nan=False, separators=(",", ":")).encode()
    entry = {GRAPH: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}}
    tensors = {f"constant.{n}": t if orders[n] is None else t.permute(orders[n]) for n, t in constants.items()}  # type: ignore[arg-type]
    tensors |= {f"packed.{n}.{p}": t for n, (_, parts) in split.items() for p, t in parts.items()}
    stored = {n: file for n, form in packed.items() if (file := file_of(form)) is not None}
    written = {f"packed.{n}.{p}": (file, p) for n, file in stored.items() for p in split[n][1]}
    dense = ((n, encode(t.detach().contiguous(), "dense")) for n, t in tensors.items())
    decoder = {DECODER: _numbers_of(model)} if isinstance(model, Decoder) else {}
    container.write(
        path,
        dense,
        meta={**meta, META: entry, **decoder},
        files={**files, GRAPH: text},
        aligned=True,
        written=written,
        **options,
    )


def _numbers_of(decoder: Decoder) -> dict[str, Any]:
    """Return the settings of a decoder that its graph does not contain, as JSON."""
    numbers = {n: getattr(decoder, n) for n in ("vocab_size", "max_tokens", "pad_token")}
    features = decoder.compiled.exported.cache_features
    numbers = {**numbers, "eos_tokens": list(decoder.eos_tokens), "cache_features": features}
    numbers |= {GENERATION: decoder.generation_defaults} if decoder.generation_defaults else {}
    return numbers | ({CACHE: decoder.cache_precision} if decoder.cache_precision != "fp32" else {})


def _packed_weights(compiled: Compiled) -> tuple[dict[str, Packed], dict[Node, str]]:
    """Return the packed weights by name, shared ones once, and the name of each node's weight."""
    packed: dict[str, Packed] = {}
    names: dict[Node, str] = {}
    of_weight: dict[str, list[str]] = {}  # names of the packed forms of a weight
    for node, kernel in compiled.kernels.items():
        form, weight = kernel.held[0], node.args[1].name
        known = of_weight.setdefault(weight, [])
        same = next((n for n in known if packed[n] is form or _equal(packed[n], form)), None)
        if same is None:
            same = node.name if weight in packed else weight
            packed[same] = form
            known.append(same)
        names[node] = same
    return packed, names


def _equal(a: Packed, b: Packed) -> bool:
    (scalars, tensors), (others, other_tensors) = to_tensors(a), to_tensors(b)
    return (
        scalars == others
        and tensors.keys() == other_tensors.keys()
        and all(torch.equal(tensors[n], other_tensors[n]) for n in tensors)
    )


def _dim_order(t: Tensor) -> list[int] | None:
    """Return the dimensions of a tensor from the largest stride to the smallest; None if it is contiguous, or has
    gaps."""
    if t.is_contiguous() or t.layout != torch.strided:
        return None
    order = sorted(range(t.dim()), key=lambda d: (-t.stride(d), d))
    return order if t.permute(order).is_contiguous() else None


# ---- loading --------------------------------------------------------------------------------------------------------


def is_compiled(saved: container.Container) -> bool:
    """Return whether a folder holds a compiled model or a decoder."""
    return META in saved.meta


def load(saved: container.Container, **unsupported: Any) -> Compiled | Decoder:
    """Return the compiled model or decoder of a folder, with the same outputs bit for bit on the same machine.

    Torch runs its operators where there are no kernels. Packed weights of decoders stay in the mapped files where
    kernels can read them there. O(weights).

    Args:
        saved: the opened folder.
        **unsupported: options that have no effect on compiled models, by name; all must be None.

    Raises:
        ContainerError: if the folder holds anything that no saved model has.
    """
    for name, value in unsupported.items():
        if value is not None:
            raise ContainerError(f"{name}= has no effect: {saved.path} holds a compiled model; leave it out")
    parts = read(saved, mapped=DECODER in saved.meta)
    g, constants, kernels = parts.graph, dict(parts.constants), {}
    repacked: dict[str, Packed] = {}
    for node, name in g.kernels.items():
        form = parts.packed[name]
        if bindings.missing() is None:
            try:
                kernels[node] = _kernel(node, repacked.get(name, form), constants)
                if name not in repacked:  # only now, as the kernel has checked all indices
                    repacked[name] = repack(form, amx=True) if bindings.isa() == "amx" else form
                    if repacked[name] is not form:
                        kernels[node] = _kernel(node, repacked[name], constants)
            except FormatError as error:
                raise ContainerError(f"{saved.path}: {node.name}: {error}") from error
        elif node.args[1].name not in constants:
            constants[node.args[1].name] = dense(form, f"{saved.path}: packed {name}")
    for node in (n for n in g.grids if n in kernels):
        kernels[node].input_grid, kernels[node].residual_grid = g.grids[node]
    numbers = dict(parts.numbers)
    exported = ExportedGraph(g.graph, constants, g.inputs, g.in_spec, g.out_spec, g.ranges, g.guards, g.notes)
    exported.cache_features, exported.torch_nodes = numbers.pop("cache_features", 0), g.torch_nodes
    exported.input_names, exported.output_names = g.input_names, g.output_names
    compiled = Compiled(exported, kernels, g.input_specs, shape_checks.check)
    return Decoder(compiled, **{**numbers, "eos_tokens": tuple(numbers["eos_tokens"])}) if numbers else compiled


def _kernel(node: Node, form: Any, constants: Mapping[str, Tensor]) -> Any:
    """Return a node's kernel; FormatError if the packed weight has an index outside of it."""
    if node.target is ops.embedding:
        return EmbeddingKernel(Kernel(form))
    _, _, bias, _, act, *_ = node.args
    return Kernel(form, None if bias is None else constants[bias.name], act)


def read(saved: container.Container, mapped: bool = False) -> Parts:
    """Return the parts of a compiled model; ContainerError unless they are consistent. O(weights).

    With `mapped`, packed weights stay in the mapped files where kernels can read them there.
    """
    where = saved.path / GRAPH
    entry = saved.meta[META]
    try:
        value = container.read_json(saved, GRAPH, entry.get(GRAPH) if type(entry) is dict else entry)
    except OSError as error:
        raise ContainerError(f"{where} cannot be read: {error}") from error
    graph = from_json(value, str(where))
    names = {f"constant.{n}" for n in graph.constants}
    stored = {n for n in saved.names if not n.startswith("packed.")}
    if names != stored or saved.aliases:
        unexpected = sorted(names ^ stored) or sorted(saved.aliases)
        raise ContainerError(f"{where}: constants are not those of the shards: {unexpected[0][:80]!r}")
    tensors = saved.mapped(n for n in saved.names if n.startswith("packed."))
    memory, packed = HugePageBuffer(), {}
    for name, scalars in graph.packed.items():
        packed[name] = memory.hold(_packed_weight(tensors, name, scalars, str(where)), mapped)
    if tensors:
        raise ContainerError(f"{where}: the shards hold packed weights that no operator uses")
    constants = {n: _constant(saved, n, order) for n, order in graph.constants.items()}
    for node in graph.graph.nodes:
        try:
            _check_weights(node, graph, constants, packed)
        except ValueError as error:
            raise ContainerError(f"{where}: node {node.name}: {error}") from error
    try:
        numbers = _decoder_numbers(saved.meta.get(DECODER), graph)
    except ValueError as error:
        raise ContainerError(f"{saved.path}: {error}") from error
    return Parts(graph, constants, packed, numbers)


def _decoder_numbers(value: Any, g: GraphDef) -> Mapping[str, Any]:
    """Return a decoder's numbers, {} for other models; ValueError unless they fit the graph."""
    features = _cache_features(g)
    if value is None:
        if features:
            raise ValueError("the graph has cached attention, but the index has no decoder")
        return {}
    if type(value) is dict and set(value) == set(OLD_FIELDS):
        value = {OLD_FIELDS[n]: v for n, v in value.items()}
    if type(value) is not dict or set(value) - {GENERATION, CACHE} != set(DECODER_FIELDS):
        raise ValueError(f"decoder: expected {', '.join(DECODER_FIELDS)}, got {str(value)[:200]}")
    vocab_size, eos = value["vocab_size"], value["eos_tokens"]
    ids = [*(eos if type(eos) is list and len(eos) <= MAX_EOS_TOKENS else [None]), value["pad_token"]]
    if not _is_int(vocab_size, 1, MAX_VOCAB) or not all(_is_int(i, 0, vocab_size) for i in ids):
        raise ValueError(
            f"decoder: expected eos_tokens and pad_token below vocab_size, which is 1 to {MAX_VOCAB}, got "
            f"{str(value)[:200]}"
        )
    if value["max_tokens"] is not None and not _is_int(value["max_tokens"], 1, 1 << 62):
        raise ValueError(
            f"decoder: expected max_tokens as a number of tokens or null, got {str(value['max_tokens'])[:80]}"
        )
    if type(value["cache_features"]) is not int or not 0 < features == value["cache_features"]:
        raise ValueError(
            f"decoder: cache_features is {str(value['cache_features'])[:80]}, but its graph stores {features}"
        )
    _check_defaults(value.get(GENERATION, {}), vocab_size)
    check_cache_precision(value.get(CACHE, "fp32"), slots_of(g.graph))
    inputs = tuple((e.dtype, len(e.sizes)) if isinstance(e, InputSpec) else None for e in g.input_specs)
    out = next(n for n in g.graph.nodes if n.op == "output").args[0]
    if inputs != STEP_INPUTS or len(out) != 1 or not isinstance(out[0], fx.Node):
        raise ValueError("decoder: expected a step from ids, positions and keep to logits")
    return value


def _check_defaults(value: Any, vocab_size: int) -> None:
    """Raise ValueError unless a decoder's defaults of text generation are options in their ranges."""
    if type(value) is not dict:
        raise ValueError(f"decoder: {GENERATION}: expected options by name, got {str(value)[:200]}")
    tokens = checked_defaults(value).get("suppress_tokens", ())
    if not all(_is_int(t, 0, vocab_size) for t in tokens):
        raise ValueError(f"decoder: suppress_tokens: expected ids below {vocab_size}, got {str(tokens)[:200]}")


def _is_int(value: Any, low: int, end: int) -> bool:
    return type(value) is int and low <= value < end


def _cache_features(g: GraphDef) -> int:
    """Return how many features a graph's cached attention stores of a token; ValueError unless slots are contiguous."""
    features = 0
    for node in g.graph.nodes:
        if node.target in CACHED:
            (keys_at, values_at), heads, kv_heads = node.args[4:7]
            width = values_at - keys_at
            if keys_at != features or width <= 0 or width % kv_heads or heads % kv_heads:
                raise ValueError(
                    f"node {node.name}: slots of {heads} heads and {kv_heads} heads of keys and values cannot begin at "
                    f"{keys_at} and {values_at}, after {features} features"
                )
            features = values_at + width
    return features


def _constant(saved: container.Container, name: str, order: list[int] | None) -> Tensor:
    t = saved.tensor(f"constant.{name}")
    if order is None:
        return t
    if len(order) != t.dim():
        raise ContainerError(
            f"{saved.path / GRAPH}: constants: {name}: {order} are not the dimensions of {list(t.shape)}"
        )
    return t.permute([order.index(d) for d in range(t.dim())])


def _packed_weight(tensors: dict[str, Tensor], name: str, scalars: dict[str, Any], where: str) -> Packed:
    """Return a packed weight with the sizes and types that its kernel reads, and remove its tensors from those of the
    files. The kernel checks the indices in it."""
    prefix = f"packed.{name}."
    parts = {n.removeprefix(prefix): tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}
    try:
        return checked_form(scalars, parts)
    except FormatError as error:
        raise ContainerError(f"{where}: packed {name[:80]!r}: {error}") from error


def checked_form(scalars: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Return the packed weight of a file's fields and tensors; FormatError unless it has the sizes and types that its
    kernel reads. The kernel checks the indices in it."""
    format_: Any = scalars.get("format")
    fields = SCALARS.get(format_, ()) if isinstance(format_, str) else ()
    precisions = tuple(PANEL_BITS) if format_ == "panels" else ROW_KINDS if format_ == "bitmask" else tuple(LANE)
    if (
        not fields
        or scalars.get("kind") not in precisions
        or set(scalars) - OPTIONAL.get(format_, set()) != {"format", *fields}
    ):
        raise FormatError(f"expected the fields of a packed weight, got {str(scalars)[:200]}")
    try:
        form: Any = from_tensors(scalars, tensors)
        check_packed(form, None)
    except TypeError as error:  # fields that the format has not
        raise FormatError(str(error)) from error
    if isinstance(form, ConvTiles) and form.order is not None and form.groups > 1:
        raise FormatError(f"expected one group for a convolution with permuted outputs, got {form.groups}")
    if isinstance(form, QuantizedPanels) and (
        type(form.scale_groups) is not int or (not form.scale_groups and form.row_scales is None)
    ):
        raise FormatError(
            f"expected panels with scales for rows or for groups of inputs, got parts {form.scale_groups!r}"
        )
    return form


def _check_weights(node: Node, g: GraphDef, constants: Mapping[str, Tensor], packed: Mapping[str, Packed]) -> None:
    """Raise ValueError unless a node's weights fit its arguments."""
    spec = BY_TARGET.get(node.target)
    if spec is None:
        return
    name = g.kernels.get(node)
    if name is not None and g.packed[name]["format"] not in spec.packed_formats:
        formats = " or ".join(spec.packed_formats)
        raise ValueError(f"expected a weight packed as {formats}, got {g.packed[name]['format']}")
    if node in g.grids and not (name is not None and reads_static_codes(packed[name])):
        raise ValueError("has grids, but its packed weight does not read int8 codes with one scale for all")
    weight = spec.argument(node, "weight")
    form: Any = packed[name] if name is not None else None if weight is None else constants[weight.name]
    if spec.check_weights is not None:
        shape = None if form is None else tuple(form.shape)
        spec.check_weights(Call(node, (), shape, None if name is None else form, constants, {}))


def dense(form: Packed, where: str) -> Tensor:
    """Return a packed weight from a file as a dense one; ContainerError if its size is implausible for the file."""
    if isinstance(form, Bitmask | QuantizedPanels):  # they store a bit or a code for each weight
        try:
            return unpack(form)
        except (IndexError, RuntimeError) as error:
            raise ContainerError(f"{where} is damaged: {error}") from error
    matrix: Any = form.matrix if isinstance(form, ConvTiles) else form
    if isinstance(matrix, Dense):
        return unpack(form)
    rows, blocks = matrix.starts.shape[:2]
    size = 4 * rows * (SLAB if isinstance(matrix, Sell) else 4) * blocks * matrix.block
    lanes = int((matrix.counts.long() & 0xFFFF).sum())
    try:
        if size > MAX_EXPANSION * nbytes(form) + EXPANSION_SLACK or lanes != len(matrix.columns):
            raise RuntimeError(f"{nbytes(form):,} bytes would become {size:,}, {lanes} of {len(matrix.columns)} lanes")
        return unpack(form)
    except (IndexError, RuntimeError) as error:
        raise ContainerError(f"{where} is damaged: {error}") from error


# ---- inspecting -----------------------------------------------------------------------------------------------------


def tensors(parts: Parts) -> Iterator[tuple[str, Tensor, str, int, int]]:
    """Yield what `inspect` shows of each weight: name, dense weight, format, bytes stored, the dimension of inputs."""
    for name, t in parts.constants.items():
        yield name, t, "dense", t.nbytes, 1 if t.dim() == 4 else -1
    for name, form in parts.packed.items():
        scalars = parts.graph.packed[name]
        label = scalars["format"] if scalars["kind"] == "fp32" else f"{scalars['kind']}:{scalars['format']}"
        yield name, dense(form, name), label, nbytes(form), 1 if isinstance(form, ConvTiles) else -1


def summary(parts: Parts) -> dict[str, Any]:
    """Return a summary of a graph, for `inspect`."""
    calls = [n for n in parts.graph.graph.nodes if n.op == "call_function"]
    native = Counter(BY_TARGET[n.target].name for n in calls if n.target in BY_TARGET)
    decoder = {DECODER: ", ".join(f"{n} {v}" for n, v in parts.numbers.items())} if parts.numbers else {}
    names = parts.graph.input_names or [n.name for n in parts.graph.inputs]
    outputs = parts.graph.output_names or output_names(None, parts.graph.out_spec)
    return {
        **decoder,
        "inputs": ", ".join(f"{n} {e}" for n, e in zip(names, parts.graph.input_specs)),
        "outputs": ", ".join(outputs),
        "operators": ", ".join(f"{n} {op}" for op, n in native.most_common()),
        "calls of torch": len(calls) - sum(native.values()),
    }
