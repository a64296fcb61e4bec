"""Words of a graph as steps of one native call, for given sizes: where every value lies, and what is done to it.

A value [.., tokens, features] lies in tiles [tiles][features][64 tokens], fp32. Sequences begin at whole vectors, so
that attention never meets two in one. Where tokens are few, and weights packed for few, values lie row after row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import ModelError
from rarefy.compiler import ops
from rarefy.compiler.fx_utils import Node
from rarefy.runtime import bindings
from rarefy.runtime.bindings import FORMATS
from rarefy.runtime.huge_pages import fresh
from rarefy.runtime.packed_formats import SLAB, Bitmask, Panels, Sell, Tiles

NT = 64  # tokens of a tile
VECTOR = 16  # tokens that a sequence is filled up to, where several lie one after the other
MOST_FEW = 8  # tokens that are few
NAMES = (  # rarefy_op of csrc/rarefy.h, as are the structs below
    "pack", "unpack", "linear", "convert", "norm", "add", "mul", "attention", "rope", "kv_store", "pad_planes", "conv",
    "max_pool", "depthwise_conv", "global_avg_pool", "image_absmax",
)  # fmt: skip
OPS = {name: i for i, name in enumerate(NAMES)}
WRITTEN = ("out", "out_scales", "out_absmax")  # operands that a step writes
FOR_FEW = (Bitmask, Panels)
BESIDE = (ops.add, ops.mul, ops.activation)  # of images, what reads them pixel by pixel


class View(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64)]


class Step(Structure):
    _fields_ = [
        *[(n, c_int32) for n in ("op", "act", "decode", "format", "dtype", "channels_first", "per_image")],
        *[(n, c_int32) for n in ("subtract_mean", "winograd", "store_values")],
        *[(n, c_float) for n in ("eps", "pad_value")],
        *[(n, c_void_p) for n in ("weight", "attention", "indirection")],
        *[(n, View) for n in ("x", "out", "other", "residual", "in_scales", "in_absmax", "out_scales", "out_absmax")],
        *[(n, View) for n in ("cos", "sin")],
        *[(n, c_void_p) for n in ("gamma", "bias", "depthwise_weights", "row_sums")],
        *[(n, c_int64) for n in ("columns", "features", "batch", "tokens", "seq_stride")],
        *[(n, c_int64) for n in ("groups", "heads", "absmax_rows", "depends_on")],
    ]


class KVCache(Structure):
    _fields_ = [(n, c_void_p) for n in ("data", "starts")] + [(n, c_int64) for n in ("batch", "capacity", "length")]


class Attention(Structure):
    _fields_ = [
        *[(n, c_void_p) for n in ("q", "k", "v", "out")],
        *[(n, c_int64) for n in ("q_stride", "k_stride", "v_stride", "out_stride")],
        ("mask", c_void_p),
        *[(n, c_int64) for n in ("mask_batch_stride", "mask_head_stride", "mask_query_stride", "mask_key_stride")],
        *[(n, c_int64) for n in ("batch", "heads", "kv_heads", "head_dim", "queries", "keys", "seq_stride")],
        ("cache", c_void_p),
        *[(n, c_int64) for n in ("k_offset", "v_offset", "window")],
        ("scale", c_float),
        ("causal", c_int32),
    ]


@dataclass(frozen=True)
class Tokens:
    """How the tokens of values lie: `batch` sequences of `tokens`, each beginning `apart` columns after the last."""

    batch: int
    tokens: int
    apart: int

    @property
    def columns(self) -> int:
        return self.batch * self.apart

    @property
    def tiles(self) -> int:
        return -(-self.columns // NT)


@dataclass
class Value:
    """A tensor in tiles, or of few tokens in rows: floats of a tile or row, where it begins in the plan's memory, how
    long it is needed."""

    tokens: Tokens
    features: int
    made: int
    few: bool
    last: int = -1
    start: int = 0
    size: int | None = None  # floats, where it is neither

    @property
    def tile(self) -> int:
        return -(-self.features // 16) * 16 if self.few else -(-self.features // 4) * 4 * NT

    @property
    def floats(self) -> int:
        if self.size is not None:
            return -(-self.size // NT) * NT
        return -(-self.tokens.columns * self.tile // NT) * NT if self.few else self.tokens.tiles * self.tile


class Program:
    """The steps of some words for given sizes of their inputs.

    Holds memory of its own, so one thread runs it at a time.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        inputs: Sequence[Node],
        outputs: Sequence[Node],
        shapes: Mapping[Node, tuple[int, ...]],
        kernels: Mapping[Node, Any],
        constants: Mapping[str, Tensor],
        lower: Mapping[Any, Callable[[Program, Node], None]],
        images: Collection[Node] = (),
    ):
        self.shapes, self.kernels, self.constants = dict(shapes), kernels, constants
        self.images = images  # of what is [batch, features, rows, columns]
        self.values: dict[Node, Value] = {}
        self.every: list[Value] = []
        self.steps: list[tuple[Step, dict[str, Any], list[tuple[int, int, bool]]]] = []
        self.held: list[Any] = []  # whose addresses steps have
        self.attends: list[tuple[Attention, dict[str, Value]]] = []
        self.kept = KVCache()
        self.planes: dict[tuple[Any, ...], Value] = {}  # of images, by kernel
        self.masks: list[tuple[Node, Attention]] = []
        self.bytes: dict[tuple[Node, str], tuple[Value, Value]] = {}  # inputs in other numbers, and their scales
        self.few = self._few(nodes, inputs)
        attends = (ops.attention, ops.cached_attention)
        self.spread = set() if self.few else {self._lead(n) for n in nodes if n.target in attends}
        masks = {n.args[3] for n in nodes if n.target is ops.attention}
        self.inputs = [n for n in inputs if n not in masks]
        self.raw: dict[Node, list[int]] = {n: [] for n in self.inputs}  # the steps that read an input as it comes
        inner = set(nodes)
        for node in self.inputs:
            if node not in images or any(u in inner and self._by_pixel(node, u) for u in node.users):
                self._enter(node)
        for node in nodes:
            lower[node.target](self, node)
        self.exits = [self._leave(n) for n in outputs]
        self._settle()
        self.reads = {(a.batch, a.queries) for a, _ in self.attends if a.cache}  # sequences and tokens of a cache

    # ---- values

    def _few(self, nodes: Sequence[Node], inputs: Sequence[Node]) -> bool:
        """Whether tokens are few, and every step knows them so."""
        packed = [self.kernels[n].held[0] for n in nodes if n.target is ops.linear]
        tokens = max((prod(self.shape(n)[:-1]) for n in inputs), default=0)
        plain = any(n.target is ops.attention for n in nodes)
        return (
            tokens <= MOST_FEW
            and not self.images
            and not plain
            and all(isinstance(w, FOR_FEW) for w in packed)
            and bool(packed)
        )

    def _lead(self, node: Node) -> tuple[int, ...]:
        return self.shape(node)[:-1]

    def shape(self, node: Node) -> tuple[int, ...]:
        """Return the sizes of a value: of a word, its first input's, where the word's lowering has not said others."""
        if node not in self.shapes:
            s = self.shape(node.args[0])
            self.shapes[node] = (*s[:-1], self.kernels[node].shape[0]) if node.target is ops.linear else s
        return self.shapes[node]

    def _tokens(self, lead: tuple[int, ...]) -> Tokens:
        if lead in self.spread and lead[0] > 1:
            return Tokens(lead[0], lead[1], -(-lead[1] // VECTOR) * VECTOR)
        n = prod(lead[1:] if self.few else lead)
        return Tokens(lead[0] if self.few and lead else 1, n, max(n, 1))

    def _new(self, lead: tuple[int, ...], features: int) -> Value:
        v = Value(self._tokens(lead), features, len(self.steps), self.few)
        self.every.append(v)
        return v

    def over(self, node: Node) -> Value:
        """Return what an image would be in tiles, without a place."""
        batch, features, *sizes = self.shape(node)
        return Value(Tokens(batch, prod(sizes), prod(sizes)), features, len(self.steps), False)

    def beside(self, v: Value, features: int) -> Value:
        """Return a new value of the same tokens."""
        made = Value(v.tokens, features, len(self.steps), self.few)
        self.every.append(made)
        return made

    def make(self, node: Node) -> Value:
        """Return a new value for a node."""
        if node in self.images:
            v = self.over(node)
            self.every.append(v)
        else:
            *lead, features = self.shape(node)
            v = self._new(tuple(lead), features)
        self.values[node] = v
        return v

    def use(self, v: Value) -> Value:
        v.last = len(self.steps)
        return v

    def ranges(self, v: Value) -> Value | None:
        """Return the largest magnitudes of a value's columns, for each 128 features: where what makes it can tell."""
        i = next(i for i in reversed(range(len(self.steps))) if self.steps[i][1].get("out") is v)
        made, at, _ = self.steps[i]
        sorted_ = made.op == OPS["linear"] and FORMATS[made.format] in (Tiles, Sell)
        if not (sorted_ or (made.op == OPS["conv"] and not made.winograd)):
            return None
        if "out_absmax" not in at:
            at["out_absmax"] = Value(v.tokens, -(-v.features // SLAB), i, False)
            self.every.append(at["out_absmax"])
        return at["out_absmax"]

    def _by_pixel(self, image: Node, user: Node) -> bool:
        """Whether a word reads an image's tiles, not its planes."""
        if user.target is ops.conv2d:
            kernel = self.kernels.get(user)
            return user.args[3] is image or (kernel is not None and kernel.held[0].kind == "int8")
        return user.target in (*BESIDE, ops.global_avg_pool)

    # ---- steps

    def step(self, op: str, over: Value, /, kept: Any = (), **places: Any) -> Step:
        """Add a step over the tokens of `over`; `places` are values, or numbers of the step. `kept`: from where to
        where it reads, or writes, in a cache."""
        t = over.tokens
        s = Step(op=OPS[op], columns=t.columns, batch=t.batch, tokens=t.tokens, features=over.features)
        s.seq_stride, s.groups, s.decode = t.apart, 1, int(self.few)
        at = {n: p for n, p in places.items() if isinstance(p, Value)}
        for n, p in places.items():
            if not isinstance(p, Value):
                setattr(s, n, p)
        self.steps.append((s, at, list(kept)))
        return s

    def _enter(self, node: Node) -> None:
        v = self.make(node)
        self.raw[node].append(len(self.steps))
        self.step("pack", v, out=self.use(v), channels_first=int(node in self.images))

    def _leave(self, node: Node) -> tuple[Step, tuple[int, ...]]:
        v = self.use(self.values[node])
        return self.step("unpack", v, x=v, channels_first=int(node in self.images)), self.shape(node)

    def constant(self, node: Any) -> int | None:
        if node is None:
            return None
        t = self.constants[node.name].float().contiguous()
        self.held.append(t)
        return t.data_ptr()

    def _settle(self) -> None:
        """Give every value its place: what is not needed any more makes room."""
        free: list[tuple[int, int]] = []  # floats, start
        end, ends = 0, {}
        for i in range(len(self.steps) + 1):
            for v in ends.pop(i, ()):
                free.append((v.floats, v.start))
            for v in (v for v in self.every if v.made == i):
                fit = min((f for f in free if f[0] >= v.floats), default=None)
                if fit is not None and fit[0] <= 2 * v.floats:
                    free.remove(fit)
                    v.start = fit[1]
                    if fit[0] > v.floats:
                        free.append((fit[0] - v.floats, fit[1] + v.floats))
                else:
                    v.start, end = end, end + v.floats
                ends.setdefault(max(v.last, v.made) + 1, []).append(v)
        self.memory = fresh(4 * end).view(torch.float32).zero_()
        base = self.memory.data_ptr()
        self.array = (Step * len(self.steps))()
        touched = [self._touched(i) for i in range(len(self.steps))]
        for i, (s, places, _) in enumerate(self.steps):
            for name, v in places.items():
                if hasattr(s, name):  # an attention's lie in its own structure
                    setattr(s, name, View(base + 4 * v.start, v.tile))
            s.depends_on = _depends_on(touched, i)
            self.array[i] = s
        for a, places in self.attends:
            for name, v in places.items():
                setattr(a, name, base + 4 * v.start)
                setattr(a, f"{name}_stride", v.tile)
        self.final = [self.array[i] for i in range(len(self.steps) - len(self.exits), len(self.steps))]
        self.sizes = [shape for _, shape in self.exits]
        self.call = bindings.library().rarefy_run_program

    def _touched(self, i: int) -> list[tuple[int, int, bool]]:
        """From where to where a step reads, or writes (True)."""
        _, places, kept = self.steps[i]
        return [*((v.start, v.start + v.floats, n in WRITTEN) for n, v in places.items()), *kept]

    def run(self, given: Mapping[Node, Any], cache: Any = None) -> list[Tensor]:
        """Return the outputs, row after row. With a cache, the tokens are the next ones of it; ModelError for one that
        is not for so many."""
        for batch, tokens in self.reads:
            if cache is None or batch != cache.batch or cache.past + tokens > cache.capacity:
                raise ModelError(f"no cache for {batch} sequences of {tokens} tokens more: use rarefy.decoder's own")
        if cache is not None:
            k, starts = self.kept, cache.starts
            k.data, k.batch, k.capacity, k.length = cache.memory.data_ptr(), cache.batch, cache.capacity, cache.past
            k.starts = None if starts is None else starts.data_ptr()
        kept = []
        for node, steps in self.raw.items():
            x = given[node].contiguous()
            kept.append(x)
            for i in steps:
                self.array[i].x.data = x.data_ptr()
        for node, a in self.masks:
            m = given[node]
            m = m[(None,) * (4 - m.dim())]
            m = m.expand(a.batch, m.shape[1], a.queries, a.keys)
            kept.append(m)
            a.mask = m.data_ptr()
            a.mask_batch_stride, a.mask_head_stride, a.mask_query_stride, a.mask_key_stride = m.stride()
            if m.shape[1] == 1:
                a.mask_head_stride = 0
        out = [torch.empty(s) for s in self.sizes]
        for y, step in zip(out, self.final):
            step.out.data = y.data_ptr()
        if self.call(self.array, len(self.array)):
            raise MemoryError("no memory to run a compiled model")
        return out


def _depends_on(touched: Sequence[Sequence[tuple[int, int, bool]]], i: int) -> int:
    """How many of the steps before a step must be done: up to the last that touches what it does."""
    for j in range(i - 1, -1, -1):
        for a, b, writes in touched[j]:
            if any((writes or w) and a < end and start < b for start, end, w in touched[i]):
                return j + 1
    return 0
