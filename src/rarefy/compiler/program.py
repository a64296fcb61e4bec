"""Build and run a native program: the steps of a fused subgraph for given input shapes, and the memory of their values.

A value [.., tokens, features] is stored in tiles [tiles][features][64 tokens], fp32. Sequences that attention reads
begin at whole vectors, so that no vector holds tokens of two of them. Where there are few tokens and weights are packed
for that ("decode"), values are stored row by row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from ctypes import c_void_p
from dataclasses import dataclass
from math import prod
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import ModelError
from rarefy.compiler.fx_utils import Node
from rarefy.compiler.operators.spec import ELEMENTWISE, IMAGES_TO_ROWS, PIXELS, OpSpec, describe
from rarefy.compiler.row_layout import few_tokens
from rarefy.compiler.step_structs import OPS, Attention, KVCache, Step, View, data_pointer, set_mask
from rarefy.runtime import bindings
from rarefy.runtime.bindings import FORMATS, _Dense, _Sell, _Tiles
from rarefy.runtime.huge_pages import allocate
from rarefy.runtime.native_calls import address
from rarefy.runtime.packed_formats import DTYPES, LANE, SLAB, Bitmask, ConvTiles, Dense, QuantizedPanels, Sell, Tiles

NT = 64  # tokens of a tile
VECTOR = 16  # tokens of a vector; several sequences are padded to a multiple of it
DECODE_FORMATS = (Bitmask, QuantizedPanels)  # packed weights that read rows
LANE_STRUCTS: dict[Any, Any] = {Dense: _Dense, Tiles: _Tiles, Sell: _Sell}
WRITTEN_OPERANDS = ("out", "out_codes", "out_scales", "out_absmax")
MAX_TAPS = 256  # of a depthwise convolution on codes; more leave too few bits to its weights
MAX_IDLE = 0.15  # share of time that threads may wait where each runs whole tiles

Span = tuple[int, int, bool]  # start and end in memory, and whether it is written


@dataclass(frozen=True)
class Tokens:
    """How the tokens of a value are stored: `batch` sequences of `tokens`, each `seq_stride` columns after the last."""

    batch: int
    tokens: int
    seq_stride: int

    @property
    def columns(self) -> int:
        """Return the number of columns, those between sequences included."""
        return self.batch * self.seq_stride

    @property
    def tiles(self) -> int:
        return -(-self.columns // NT)


@dataclass(eq=False)  # two values of one size are two values
class Value:
    """A tensor in a program's memory, in tiles, or row by row for few tokens.

    Attributes:
        created: index of the step that writes it first.
        last: index of the last step that reads or writes it.
        start: where it begins in the program's memory, in floats.
        size: floats that it needs, where that does not follow from tokens and features.
        offset: floats from its start to its first feature.
    """

    tokens: Tokens
    features: int
    created: int
    decode: bool
    last: int = -1
    start: int = 0
    size: int | None = None
    offset: int = 0

    @property
    def stride(self) -> int:
        """Return the number of floats of a tile, or of a row."""
        return -(-self.features // 16) * 16 if self.decode else -(-self.features // 4) * 4 * NT

    @property
    def floats(self) -> int:
        if self.size is not None:
            return -(-self.size // NT) * NT
        if self.decode:
            return -(-self.tokens.columns * self.stride // NT) * NT
        return self.tokens.tiles * self.stride


class Part(Value):
    """Some features of a value that others write too."""

    def __init__(self, whole: Value, first: int, features: int):
        self.whole, self.tokens, self.features = whole, whole.tokens, features
        self.created, self.decode, self.size, self.offset = whole.created, whole.decode, None, whole.offset + first * NT

    @property
    def stride(self) -> int:
        """Return the number of floats of a tile of the whole value."""
        return self.whole.stride

    @property
    def floats(self) -> int:
        return self.whole.floats

    @property
    def start(self) -> int:  # type: ignore[override]
        """Return where the whole value begins."""
        return self.whole.start

    @property
    def last(self) -> int:  # type: ignore[override]
        """Return the index of the last step that reads or writes the whole value."""
        return self.whole.last

    @last.setter
    def last(self, step: int) -> None:
        self.whole.last = step


class Program:
    """The native steps of some nodes for given shapes of their inputs.

    It has memory of its own, so one thread at a time may run it.

    Attributes:
        used_share: share of its tokens that the last call had; less than 1 in a `PackedProgram`.
    """

    used_share = 1.0

    def __init__(
        self,
        nodes: Sequence[Node],
        inputs: Sequence[Node],
        outputs: Sequence[Node],
        shapes: Mapping[Node, tuple[int, ...]],
        kernels: Mapping[Node, Any],
        constants: Mapping[str, Tensor],
        operators: Mapping[Any, OpSpec],
        images: Collection[Node] = (),
    ):
        self.shapes, self.kernels, self.constants, self.operators = dict(shapes), kernels, constants, operators
        self.images = images  # values [batch, channels, height, width]
        self.values: dict[Node, Value] = {}
        self.every: list[Value] = []
        self.steps: list[tuple[Step, dict[str, Value], list[Span]]] = []
        self.held: list[Any] = []  # objects whose addresses are in steps
        self.attentions: list[tuple[Attention, dict[str, Value]]] = []
        self.cache = KVCache()
        self.planes: dict[tuple[Any, ...], Value] = {}  # padded images, by the kernel that reads them
        self.nhwc: dict[tuple[Node, Any], Any] = {}  # NHWC images: int8 codes on a static grid, or fp32
        self.formats: dict[Node, Any] = {}  # of NHWC images that pools and operators on pixels write
        self.order = tuple(nodes)
        self.masks: list[tuple[Node, Attention]] = []
        self.nodes = {*nodes}
        self.unrounded: dict[Value, Value] = {}  # what fake quantization has rounded, by its output
        self.quantized: dict[tuple[Node, str], tuple[Value, Value | None]] = {}  # inputs in a precision, their scales
        self.decode = self._few_tokens(nodes, inputs)
        whole = [n for n in nodes if operators[n.target].whole_sequences]
        sequences = [x for n in whole for x in (n, *operators[n.target].tensors(n))]
        self.aligned = set() if self.decode else {self.shape(x)[:-1] for x in sequences}
        masks = {operators[n.target].argument(n, "mask") for n in nodes}
        self.inputs = [n for n in inputs if n not in masks]
        self.raw: dict[Node, list[int]] = {n: [] for n in self.inputs}  # the steps that read an input as it comes
        self.sources: list[Node] = []  # the operator or input that each step belongs to
        for node in self.inputs:
            if node not in images or any(u in self.nodes and self._reads_pixels(node, u) for u in node.users):
                self._pack_input(node)
                self._note_source(node)
        for node in nodes:
            lower = operators[node.target].lower
            assert lower is not None
            lower(self, node)
            self._note_source(node)
        self.exits = [self._unpack_output(n) for n in outputs]
        self.sources += outputs
        self._drop_unread()
        self._plan_memory()
        self._fill_addresses()
        self.cache_reads = {(a.batch, a.queries) for a, _ in self.attentions if a.cache}  # sequences and new tokens

    # ---- values

    def _note_source(self, node: Node) -> None:
        """Note that the steps since the last call belong to a node."""
        self.sources += [node] * (len(self.steps) - len(self.sources))

    def _few_tokens(self, nodes: Sequence[Node], inputs: Sequence[Node]) -> bool:
        """Return whether there are few tokens, and every operator can read them row by row."""
        packed = [self.kernels[n].held[0] for n in nodes if n in self.kernels]
        return (
            all(few_tokens(self.shape(n)[:-1]) for n in inputs)
            and not self.images
            and all(self.operators[n.target].few_tokens for n in nodes)
            and all(isinstance(w, DECODE_FORMATS) for w in packed)
            and bool(packed)
        )

    def shape(self, node: Node) -> tuple[int, ...]:
        """Return the shape of a value."""
        if node not in self.shapes:
            spec = self.operators[node.target]
            shapes = [self.shape(t) for t in spec.tensors(node)]
            self.shapes[node] = spec.out_shape(describe(node, spec, shapes, self.kernels, self.constants, {}))
        return self.shapes[node]

    def _tokens(self, leading: tuple[int, ...]) -> Tokens:
        """Return how values of these leading dimensions are stored."""
        if leading in self.aligned and leading[0] > 1:
            return Tokens(leading[0], leading[1], -(-leading[1] // VECTOR) * VECTOR)
        n = prod(leading[1:] if self.decode else leading)
        return Tokens(leading[0] if self.decode and leading else 1, n, max(n, 1))

    def image_tokens(self, node: Node) -> Value:
        """Return the value that an image would be, a token for each pixel, without memory."""
        batch, features, *sizes = self.shape(node)
        return Value(Tokens(batch, prod(sizes), prod(sizes)), features, len(self.steps), False)

    def _add(self, v: Value) -> Value:
        self.every.append(v)
        return v

    def new_like(self, v: Value, features: int) -> Value:
        """Return a new value of the same tokens."""
        return self._add(Value(v.tokens, features, len(self.steps), self.decode))

    def tokens_of(self, node: Node) -> Tokens:
        """Return how the tokens of a node's output are stored."""
        return self.image_tokens(node).tokens if node in self.images else self._tokens(self.shape(node)[:-1])

    def make(self, node: Node) -> Value:
        """Return a new value for a node's output."""
        features = self.shape(node)[1 if node in self.images else -1]
        v = self.values[node] = self._add(Value(self.tokens_of(node), features, len(self.steps), self.decode))
        return v

    def use(self, v: Value) -> Value:
        """Note that the next step uses a value; return it."""
        v.last = len(self.steps)
        return v

    def absmax(self, v: Value) -> Value | None:
        """Return the largest magnitudes of each column for each 128 features, if the step that computes v can find them
        on the way."""
        if (i := self._producer(v)) is None:
            return None
        producer, operands, _ = self.steps[i]
        by_tiles = producer.op == OPS["linear"] and (FORMATS[producer.format] in (Tiles, Sell) or self._in_lanes(i))
        if not (by_tiles or producer.op == OPS["conv"]):
            return None
        if "out_absmax" not in operands:
            operands["out_absmax"] = self._add(Value(v.tokens, -(-v.features // SLAB), i, False))
        return operands["out_absmax"]

    def _producer(self, v: Value) -> int | None:
        """Return the step that writes a value; None for one that several steps write."""
        return next((i for i in reversed(range(len(self.steps))) if self.steps[i][1].get("out") is v), None)

    def _in_lanes(self, i: int) -> bool:
        """Return whether a step multiplies lanes of bf16, int16 or int8, so that it can write such lanes."""
        step = self.steps[i][0]
        struct = LANE_STRUCTS.get(FORMATS[step.format])
        return struct is not None and struct.from_address(step.weight).dtype != 0

    def codes(self, v: Value, precision: str) -> tuple[Value, Value | None] | None:
        """Return a value in another precision and its scales, written by the step that computes it.

        Returns:
            None where that step cannot: for int8 and int16 it must have all features of a token at once. bf16 has no
            scales.
        """
        if (i := self._producer(v)) is None:
            return None
        step, operands, _ = self.steps[i]
        rounds = -(-v.tokens.tiles // torch.get_num_threads())
        balanced = v.tokens.tiles / (rounds * torch.get_num_threads()) > 1 - MAX_IDLE
        scaled = precision != "bf16"
        linear = step.op == OPS["linear"] and (balanced or not scaled) and self._in_lanes(i)
        if self.decode or "out_codes" in operands or not (linear or step.op == OPS["norm"]):
            return None
        step.codes_dtype, step.whole_columns = DTYPES.index(precision), int(linear and scaled)
        operands["out_codes"] = self._add(Value(v.tokens, self.code_lanes(v, precision), i, False, last=i))
        if scaled:
            operands["out_scales"] = self._add(Value(v.tokens, 1, i, False, last=i))
        return operands["out_codes"], operands.get("out_scales")

    def static_codes(self, v: Value, scale: float, zero: int) -> Value | None:
        """Return a value in int8 with one scale for all, written by the step that computes it; None if it cannot."""
        if (i := self._producer(v)) is None:
            return None
        step, operands, _ = self.steps[i]
        dense = self._in_lanes(i) if step.op == OPS["linear"] else step.op == OPS["conv"] and _is_dense_int8(step)
        if self.decode or "out_codes" in operands or not dense:
            return None
        step.codes_dtype, step.codes_scale, step.codes_zero = DTYPES.index("int8"), scale, zero
        operands["out_codes"] = self._add(Value(v.tokens, self.code_lanes(v, "int8"), i, False, last=i))
        return operands["out_codes"]

    def code_lanes(self, v: Value, precision: str) -> int:
        """Return the lanes of a value's codes, in blocks of 16 as kernels read them."""
        return -(-v.features // (16 * LANE[precision])) * 16

    def _drop_unread(self) -> None:
        """Drop the fp32 outputs of steps whose codes alone are read."""
        for i, (_, operands, _) in enumerate(self.steps):
            if {"out", "out_codes"} <= operands.keys() and operands["out"].last <= i:
                self.every.remove(operands.pop("out"))

    def runs_on_nhwc(self, node: Node) -> bool:
        """Return whether a node is a convolution that reads its input, and writes its output, as NHWC images: one in
        int8 with a static scale, a dense one in fp32, or a depthwise one."""
        if node not in self.nodes or self.operators[node.target].name != "conv2d":
            return False
        kernel = self.kernels.get(node)
        if kernel is None:
            return True
        packed = kernel.held[0]
        if not isinstance(packed, ConvTiles):
            return False
        return kernel.input_grid is not None if packed.kind == "int8" else packed.counts is None

    def _reads_pixels(self, image: Node, user: Node) -> bool:
        """Return whether an operator reads an image's pixels as they are stored, not its padded planes."""
        if self.runs_on_nhwc(user) and user.args[3] is not image:
            return False
        spec, kernel = self.operators[user.target], self.kernels.get(user)
        if spec.layout in (ELEMENTWISE, PIXELS, IMAGES_TO_ROWS) or (spec.epilogue and user.args[3] is image):
            return True
        return kernel is not None and kernel.held[0].kind == "int8"

    # ---- steps

    def step(self, op: str, over: Value, cache_spans: Sequence[Span] = (), /, **fields: Any) -> Step:
        """Append a step over the tokens of a value.

        Args:
            op: one of NAMES.
            over: the value whose tokens and features the step runs over.
            cache_spans: what it reads or writes in a KV cache, to order steps.
            **fields: its operands, which are values, and its numbers.
        """
        t = over.tokens
        s = Step(op=OPS[op], columns=t.columns, batch=t.batch, tokens=t.tokens, features=over.features)
        s.seq_stride, s.groups, s.decode = t.seq_stride, 1, int(self.decode)
        operands = {n: f for n, f in fields.items() if isinstance(f, Value)}
        for n, f in fields.items():
            if not isinstance(f, Value):
                setattr(s, n, f)
        self.steps.append((s, operands, list(cache_spans)))
        return s

    def _pack_input(self, node: Node) -> None:
        v = self.make(node)
        self.raw[node].append(len(self.steps))
        self.step("pack", v, out=self.use(v), channels_first=int(node in self.images))

    def _unpack_output(self, node: Node) -> tuple[Step, tuple[int, ...]]:
        v = self.use(self.values[node])
        return self.step("unpack", v, x=v, channels_first=int(node in self.images)), self.shape(node)

    def constant(self, node: Any) -> int | None:
        """Return the address of a constant in fp32, None for None."""
        if node is None:
            return None
        t = self.constants[node.name].float().contiguous()
        self.held.append(t)
        return t.data_ptr()

    # ---- memory

    def _plan_memory(self) -> None:
        """Give every value its start: the smallest free gap that fits and is at most twice as large, else new memory.

        The memory of a value is free again after the last step that uses it.
        """
        free: list[tuple[int, int]] = []  # floats, start
        end = 0
        expiring: dict[int, list[Value]] = {}
        for i in range(len(self.steps) + 1):
            for v in expiring.pop(i, ()):
                free.append((v.floats, v.start))
            for v in (v for v in self.every if v.created == i):
                gap = min((f for f in free if f[0] >= v.floats), default=None)
                if gap is not None and gap[0] <= 2 * v.floats:
                    free.remove(gap)
                    v.start = gap[1]
                    if gap[0] > v.floats:
                        free.append((gap[0] - v.floats, gap[1] + v.floats))
                else:
                    v.start, end = end, end + v.floats
                expiring.setdefault(max(v.last, v.created) + 1, []).append(v)
        self.memory = allocate(4 * (end + VECTOR)).view(torch.float32).zero_()  # segments are read in whole vectors

    def _fill_addresses(self) -> None:
        """Write addresses and dependencies into the steps."""
        base = self.memory.data_ptr()
        self.array = (Step * len(self.steps))()
        spans = [self._spans(i) for i in range(len(self.steps))]
        for i, (s, operands, _) in enumerate(self.steps):
            for name, v in operands.items():
                if hasattr(s, name):  # q, k and v are in the attention's own struct
                    setattr(s, name, View(base + 4 * (v.start + v.offset), v.stride))
            s.depends_on = _depends_on(spans, i)
            self.array[i] = s
        for a, operands in self.attentions:
            for name, v in operands.items():
                setattr(a, name, base + 4 * v.start)
                setattr(a, f"{name}_stride", v.stride)
        self.final = range(len(self.steps) - len(self.exits), len(self.steps))
        self.read_at = {n: [data_pointer(self.array[i], Step.x) for i in steps] for n, steps in self.raw.items()}
        self.written_at = [data_pointer(self.array[i], Step.out) for i in self.final]
        self.out_shapes = [shape for _, shape in self.exits]
        self.call = bindings.library().rarefy_run_program

    def _spans(self, i: int) -> list[Span]:
        """Return the spans of memory and of the cache that a step reads or writes."""
        _, operands, cache_spans = self.steps[i]
        return [*((v.start, v.start + v.floats, n in WRITTEN_OPERANDS) for n, v in operands.items()), *cache_spans]

    # ---- running

    def run(self, inputs: Mapping[Node, Any], cache: Any = None, times: Tensor | None = None) -> list[Tensor]:
        """Return the outputs, contiguous.

        Args:
            inputs: a tensor for each of the subgraph's inputs.
            cache: the KV cache that the tokens are appended to, where the program has cached attention.
            times: int64 [threads, steps, 2]: receives the nanoseconds that each thread ran each step, and waited
                for it; `native_ns` is then the time of the native call.

        Raises:
            ModelError: if the cache is missing, or is for another batch, or has too little room.
            DataError: an input has no memory.
            MemoryError: if the native code finds no memory.
        """
        for batch, tokens in self.cache_reads:
            if cache is None or batch != cache.batch or cache.past + tokens > cache.reserved:
                raise ModelError(
                    f"expected a cache with room for {tokens} more tokens of {batch} sequences: use decoder.cache()"
                )
        if cache is not None:
            c = self.cache
            c.tiles, c.length, c.features, c.head_dim = len(cache.pages[0]), cache.past, cache.features, cache.head_dim
            c.data, c.codes, c.scales, c.starts, c.pages = cache.pointers()
        alive = []  # tensors whose addresses the steps hold during the call
        for node, pointers in self.read_at.items():
            x = inputs[node].resolve_neg().contiguous()
            alive.append(x)
            for pointer in pointers:
                pointer.value = address(x)
        for node, a in self.masks:
            alive.append(set_mask(a, inputs[node]))
        out = self._new_outputs()
        for y, pointer in zip(out, self.written_at):
            pointer.value = address(y)
        began = 0 if times is None else perf_counter_ns()
        if self.call(self.array, len(self.array), None if times is None else times.data_ptr()):
            raise MemoryError("not enough memory to run a compiled model")
        if times is not None:
            self.native_ns = perf_counter_ns() - began  # of the last call with times
        return out

    def _new_outputs(self) -> list[Tensor]:
        return [torch.empty(s, dtype=torch.float32) for s in self.out_shapes]


def _is_dense_int8(step: Step) -> bool:
    """Return whether a convolution's weight is dense in int8."""
    conv = bindings.Conv.from_address(c_void_p.from_address(step.indirection).value or 0)
    return bool(conv.dense) and conv.weight.dtype == DTYPES.index("int8")


def is_depthwise(conv: Node, constants: Mapping[str, Tensor]) -> bool:
    """Return whether a convolution is a depthwise one, a channel by itself, that could read codes."""
    weight = constants[conv.args[1].name]  # type: ignore[union-attr]
    return weight.shape[1] == 1 and conv.args[-1] == len(weight) and weight[0].numel() <= MAX_TAPS


def _depends_on(spans: Sequence[Sequence[Span]], i: int) -> int:
    """Return how many steps must be done before step i: all up to the last one with which it shares written memory."""
    for j in range(i - 1, -1, -1):
        for a, b, writes in spans[j]:
            if any((writes or w) and a < end and start < b for start, end, w in spans[i]):
                return j + 1
    return 0
