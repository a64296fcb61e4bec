"""What a step of a program, or a call of torch, computes and moves: operations and bytes, from shapes and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import Node, aten
from rarefy.compiler.operators.linear import input_precision
from rarefy.compiler.packed_program import PackedProgram
from rarefy.compiler.program import Program, Value
from rarefy.compiler.step_structs import NAMES, Attention, KVCache, Step
from rarefy.runtime.packed_formats import DTYPES, LANE, Bitmask, ConvTiles, Csr, Sell, Tiles

FORMAT_NAMES = {"QuantizedPanels": "panels"}  # where the class's name in lower case is not the format's name
PICKS_ROWS = (ops.embedding, aten.embedding.default, aten.index.Tensor, aten.index_select.default)


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of one run of a step.

    Attributes:
        sizes: the shapes, as text.
        weights: precision and format of the packed weight, as text.
        precision: in which products are computed: fp32, bf16, int16 or int8; "" without products.
        operations: 2 for each multiply-add of the dense product.
        executed: those that are left without zeros of the weight, hidden keys of attention, and what Winograd's
            algorithm saves.
        weight_bytes: bytes of weights.
        activation_bytes: bytes of inputs and outputs.
    """

    sizes: str = ""
    weights: str = ""
    precision: str = ""
    operations: int = 0
    executed: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0


def step_cost(p: Program, i: int, past: int = 0) -> Cost:
    """Return the cost of step i of a program. O(weights).

    Args:
        p: the program.
        i: the number of the step.
        past: tokens in the KV cache before the call.
    """
    step, operands, _ = p.steps[i]
    node, name = p.sources[i], NAMES[step.op]
    over = operands.get("out") or operands.get("out_codes") or operands["x"]
    tokens = round(p.used_share * over.tokens.batch * over.tokens.tokens)
    moved = round(p.used_share * sum(_value_bytes(v) for v in operands.values()))
    if name in ("linear", "conv", "nhwc_conv") and node in p.kernels:
        return _product(p, node, step, tokens, moved)
    if name == "attention":
        lengths = p.packing.bounds[:, 1].tolist() if isinstance(p, PackedProgram) and p.packing is not None else None
        return _attention(Attention.from_address(step.attention), past, moved, lengths)
    if name == "depthwise_conv":  # an average pool
        n = 2 * tokens * step.features * prod(node.args[1])
        return Cost(f"{_by(p.shape(node))}, {_by(node.args[1])}", "", "fp32", n, n, 0, moved)
    if name in ("nhwc_depthwise", "nhwc_conv"):  # in groups
        weight = p.constants[node.args[1].name]
        n = 2 * tokens * step.features * prod(weight.shape[1:])
        sizes = f"{_by(p.shape(node))}, {_by(weight.shape[2:])}"
        return Cost(sizes, "fp32", "fp32", n, n, 4 * weight.numel(), moved)
    if name in ("pack", "unpack", "kv_store"):  # the other side is no value of the program
        moved *= 2
    if name in ("pad_planes", "nhwc_quantize") and "x" not in operands:
        moved += 4 * prod(p.shape(node.args[0]))
    affine = 0
    if name == "norm":
        affine = sum(p.constants[c.name].numel() for c in node.args[1:3] if c is not None)
    return Cost(f"{tokens} x {step.features}", weight_bytes=4 * affine, activation_bytes=moved)


def _product(p: Program, node: Node, step: Step, tokens: int, moved: int) -> Cost:
    """Return the cost of a linear layer or a convolution."""
    kernel = p.kernels[node]
    packed, _ = kernel.held
    outputs, *inputs = packed.shape
    dense = 2 * tokens * outputs * prod(inputs)
    matrix = packed.matrix if isinstance(packed, ConvTiles) else packed
    weights = _weights(packed)
    weight_bytes = sum(t.nbytes for t in kernel.tensors_read())
    executed = 2 * tokens * stored_products(matrix, bool(step.decode))
    if step.winograd:
        weights = f"{packed.kind} winograd"
        batch, _, height, width = p.shape(node)
        executed = 2 * 16 * batch * -(-height // 2) * -(-width // 2) * outputs * inputs[0]
    if isinstance(packed, ConvTiles):
        sizes = f"{_by(p.shape(node.args[0]))} -> {outputs}, {_by(inputs[1:])}"
        precision = packed.kind
    else:
        sizes = f"{tokens} x {inputs[0]} -> {outputs}"
        precision = input_precision(packed, bool(step.decode))
    return Cost(sizes, weights, precision, dense, min(executed, dense), weight_bytes, moved)


def stored_products(matrix: Any, decode: bool) -> int:
    """Return the products with one token that a packed weight [outputs, inputs] computes.

    Weights for few tokens are unpacked, zeros included, where there are many.
    """
    dense = prod(matrix.shape)
    if isinstance(matrix, Tiles):
        bits = torch.tensor([i.bit_count() for i in range(16)], dtype=torch.int64)  # rows of a pattern
        return int(((matrix.counts.long() & 0xFFFF) * bits).sum()) * LANE[matrix.kind]
    if isinstance(matrix, Sell):
        return 2 * int((matrix.counts.long() & 0xFFFF).sum()) * LANE[matrix.kind]
    if isinstance(matrix, Csr):
        return matrix.columns.numel()
    if isinstance(matrix, Bitmask) and decode:
        bits = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.int64)
        return int(bits[matrix.masks.view(torch.uint8).long()].sum())
    return dense


def _attention(a: Attention, past: int, moved: int, lengths: Sequence[int] | None) -> Cost:
    """Return the cost of attention; queries see the `past` tokens of a KV cache too.

    lengths are the tokens of each sequence where they differ.
    """
    cached = bool(a.cache)
    keys = past + a.queries if cached else a.keys
    visible = [keys] * a.queries
    if a.causal:
        visible = [min(keys, keys - a.queries + i + 1, a.window or keys) for i in range(a.queries)]
    each = 4 * a.batch * a.heads * a.head_dim  # of a query and a key
    if cached:
        coded = KVCache.from_address(a.cache).codes is not None  # of the last call
        moved += a.batch * keys * a.kv_heads * (2 * (a.head_dim + 4) if coded else 8 * a.head_dim)
    sizes = f"{a.batch} x {a.heads} heads x {a.queries} x {keys} x {a.head_dim}"
    precision = DTYPES[a.dtype]
    executed = each * sum(visible)
    if lengths is not None:
        executed = each // a.batch * sum(n * (n + 1) // 2 if a.causal else n * n for n in lengths)
    return Cost(sizes, "", precision, each * a.queries * keys, executed, 0, moved)


def call_cost(node: Node, arguments: Any, out: Any, operations: int, kernel: Any = None) -> Cost:
    """Return the cost of a call outside of programs.

    Args:
        node: the operator.
        arguments: its arguments, nested.
        out: its output, nested.
        operations: those that torch counts.
        kernel: its kernel where it is not torch that runs it.
    """
    inputs = [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
    outputs = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
    sizes = _by(outputs[0].shape) if outputs else ""
    memory = {t.untyped_storage().data_ptr() for t in inputs}
    new = [t for t in outputs if t.untyped_storage().data_ptr() not in memory]
    written = sum(t.nbytes for t in new)
    if node.target in PICKS_ROWS:
        weights = "" if kernel is None else _weights(kernel.held[0])
        return Cost(sizes, weights, activation_bytes=2 * written)
    if kernel is not None:
        packed = kernel.held[0]
        dense = 2 * outputs[0].numel() * prod(packed.shape[1:])
        positions = outputs[0].numel() // packed.shape[0]
        executed = min(dense, 2 * positions * stored_products(packed.matrix, False))
        weight_bytes = sum(t.nbytes for t in kernel.tensors())
        moved = written + sum(t.nbytes for t in inputs)
        return Cost(sizes, _weights(packed), packed.kind, dense, executed, weight_bytes, moved)
    read = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in inputs) if new else 0  # a view moves nothing
    return Cost(sizes, "", "fp32" if operations else "", operations, operations, 0, read + written)


def _weights(packed: Any) -> str:
    """Return precision and format of a packed weight."""
    name = type(packed.matrix if isinstance(packed, ConvTiles) else packed).__name__
    return f"{packed.kind} {FORMAT_NAMES.get(name, name.lower())}"


def _value_bytes(v: Value) -> int:
    return 4 * (v.size if v.size is not None else v.tokens.batch * v.tokens.tokens * v.features)


def _by(sizes: Any) -> str:
    return " x ".join(map(str, sizes))
