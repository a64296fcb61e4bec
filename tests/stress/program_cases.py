"""Random graphs of the engine's operators as native programs, compared with the operators' references in torch.

Every operator of the table is drawn, with random sizes, precisions, formats and zeros. Each value of a program gets
memory of its own, filled with NaN, so that sanitizers see a step that reads or writes beyond its operands, and wrong
outputs show one that relies on what memory held before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from helpers.quantized_weights import GRIDS, TWO_TERM_GRIDS, on_grid
from rarefy.common.errors import FormatError
from rarefy.compiler import ops
from rarefy.compiler.executor import Compiled
from rarefy.compiler.fx_utils import ExportedGraph, Node
from rarefy.compiler.kernel_selection import pack_conv_node
from rarefy.compiler.operators.spec import describe
from rarefy.compiler.operators.table import BY_NAME
from rarefy.compiler.program import VECTOR, Part, Program
from rarefy.compiler.shape_checks import check
from rarefy.compiler.step_structs import NAMES
from rarefy.compiler.subgraph import FusedSubgraph
from rarefy.generation.kv_cache import TILE, Cache, slots_of
from rarefy.model.activation_quant import ActivationQuant
from rarefy.runtime import bindings, packing
from rarefy.runtime.kernel import Kernel
from rarefy.runtime.pack_panels import pack_quantized
from rarefy.runtime.packed_formats import ROW_KINDS
from stress.kernel_cases import Case, close, geometry

MAX_NUMBERS = 300_000  # of a value
PRECISIONS = ("fp32", "fp32", "bf16", "int16", "int8", "int8 static")
TOLERANCE = {"fp32": 2e-4, "bf16": 0.06, "int16": 0.02, "int8": 0.2, "int8 static": 0.2}  # of the largest output
ROWS_OPS = ("linear", "add", "mul", "activation", "norm", "attention", "rope", "gather_tokens", "swap_features",
            "fake_quantize", "tokens_to_pixels")  # fmt: skip
IMAGE_OPS = ("conv2d", "max_pool2d", "max_pool2d_ceil", "avg_pool2d", "global_avg_pool", "image_mean", "channel_affine",
             "channel_scale", "channel_norm", "group_norm", "concat", "select_channels", "depth_to_pixels", "add", "mul",
             "activation", "gather_pixels", "pixels_to_tokens", "fake_quantize")  # fmt: skip
CACHED_OPS = ("cached_attention", "capped_cached_attention", "alibi_cached_attention")
HEAVY = ("linear", "conv2d", "attention")
UNBOUNDED = (None, "relu", "gelu", "silu", "hardswish")  # activations: relative errors stay as they are
AMPLIFYING = ("norm", "channel_norm", "group_norm")  # errors of rounding
HEAVY_TARGETS = tuple(BY_NAME[n].reference for n in HEAVY)


class Graph:
    """A graph as it grows, with the value of each node by the references."""

    def __init__(self, case: Case):
        self.case, self.graph = case, fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.values: dict[Node, Tensor] = {}
        self.inputs: list[Node] = []
        self.cache: Any = None  # the references' own

    def input(self, value: Tensor) -> Node:
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        self.inputs.append(node)
        self.values[node] = value
        return node

    def constant(self, value: Tensor | None) -> Node | None:
        if value is None:
            return None
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder(f"c{len(self.constants)}")
        self.constants[node.name] = value
        return node

    def call(self, name: str, *args: Any) -> Node | None:
        """Add a call if the operator fits these operands; return its node."""
        spec = BY_NAME[name]
        node = self.graph.call_function(spec.reference, args)
        shapes = [tuple(self.values[a].shape) for a in spec.tensors(node)]
        masks = {n: self.values[n] for n in self.inputs}
        if not spec.fits(describe(node, spec, shapes, {}, self.constants, masks)):
            self.graph.erase_node(node)
            return None

        def value(n: Node) -> Any:
            return self.cache if n.name == "cache" else self.values[n] if n in self.values else self.constants[n.name]

        result = spec.reference(*fx.map_arg(args, value))
        if result.numel() > MAX_NUMBERS or not result.isfinite().all():
            self.graph.erase_node(node)
            return None
        self.values[node] = result
        return node

    def evaluate(self, inputs: dict[Node, Tensor]) -> None:
        """Compute all values again by the references, for other inputs."""
        self.values = dict(inputs)
        known: dict[Node, Any] = {n: self.constants[n.name] for n in self.graph.nodes if n.name in self.constants}
        known |= {n: self.cache for n in self.graph.nodes if n.name == "cache"}
        for n in (n for n in self.graph.nodes if n.op == "call_function"):
            self.values[n] = n.target(*fx.map_arg(n.args, lambda a: known[a] if a in known else self.values[a]))  # type: ignore[operator]


def same_shape(g: Graph, x: Node, shape: Any = None) -> Node | None:
    """Return another value of a shape, at times None; a new input where there is none."""
    if g.case.chance(0.4):
        return None
    shape = g.values[x].shape if shape is None else torch.Size(shape)
    others = [n for n, v in g.values.items() if v.shape == shape and v.is_floating_point()]
    return g.case.rng.choice(others) if others else g.input(torch.randn(shape))


def operands(g: Graph, name: str, x: Node) -> tuple[Any, ...]:
    """Return random arguments of an operator, the first one given; the operator may not fit them."""
    case, shape = g.case, g.values[x].shape
    channels = shape[1] if len(shape) == 4 else shape[-1]
    if name == "linear":
        out = case.size(140)
        bias, residual = g.constant(case.bias(out)), same_shape(g, x, (*shape[:-1], out)) if case.chance(0.4) else None
        return x, g.constant(case.weight(out, shape[-1])), bias, residual, case.activation()
    if name == "conv2d":
        return conv_operands(g, x, shape)
    if name in ("add", "mul"):
        return x, same_shape(g, x) or x, case.activation()
    if name == "activation":
        return x, case.activation()
    if name == "norm":
        groups = case.rng.choice((1, 1, 1, 2, 3))
        gamma, bias = (g.constant(case.bias(shape[-1] // groups)) for _ in range(2))
        return x, gamma, bias, 1e-5, case.chance(0.5), groups
    if name in ("channel_norm", "group_norm"):
        gamma, bias = (g.constant(case.bias(channels)) for _ in range(2))
        return (
            x,
            gamma,
            bias,
            *((1e-5, case.chance(0.5)) if name == "channel_norm" else (case.rng.choice((1, 2, 3, 4)), 1e-5)),
        )
    if name == "channel_affine":
        return x, g.constant(torch.randn(channels)), g.constant(torch.randn(channels)), case.activation()
    if name == "channel_scale":
        return x, g.call("image_mean", x) or x
    if name in ("max_pool2d", "max_pool2d_ceil", "avg_pool2d"):
        pool = geometry(case)
        pool["padding"] = tuple(min(p, k // 2) for p, k in zip(pool["padding"], pool["kernel"]))  # type: ignore[assignment]
        return x, *list(pool.values())[: 3 if name == "avg_pool2d" else 4]
    if name == "concat":
        others = [
            n for n, v in g.values.items() if v.dim() == 4 and (v.shape[0], *v.shape[2:]) == (shape[0], *shape[2:])
        ]
        images = [x, *(case.rng.choice(others) for _ in range(case.rng.randint(1, 7)))]
        return *images, *[None] * (8 - len(images))
    if name == "select_channels":
        return x, g.constant(selection(case, channels))
    if name == "depth_to_pixels":
        return x, case.rng.choice((1, 2, 3)), case.rng.choice((1, 2))
    if name == "fake_quantize":
        return (
            x,
            float(g.values[x].abs().max().clamp(min=1e-6)) / case.rng.choice((127, 100, 300)),
            case.rng.choice((0, 128, 17, 255)),
        )
    if name == "rope":
        heads = case.rng.choice([h for h in (1, 2, 3, 4) if shape[-1] % (2 * h) == 0] or [1])
        angles = torch.rand(*shape[:-1], max(1, shape[-1] // heads)) * 6
        return x, g.input(angles.cos()), g.input(angles.sin()), heads
    if name in ("gather_tokens", "gather_pixels", "pixels_to_tokens", "tokens_to_pixels"):
        return gather_operands(g, name, x, shape)
    return (x,)  # swap_features, image_mean, global_avg_pool


def selection(case: Case, channels: int) -> Tensor:
    """Return channels in another order, or a range of them."""
    if case.chance(0.4):
        first = case.rng.randrange(channels)
        return torch.arange(first, case.rng.randint(first + 1, channels))
    return torch.randint(channels, (case.size(70),))


def conv_operands(g: Graph, x: Node, shape: Any) -> tuple[Any, ...]:
    """Return the arguments of a convolution: of one group, of several, or depthwise."""
    case, channels = g.case, shape[1]
    how = geometry(case)
    groups = case.rng.choice([n for n in (1, 1, 1, 2, 4, channels) if channels % n == 0])
    out = groups * (
        case.size(max(1, 96 // groups)) if groups < channels or channels == 1 else case.rng.choice((1, 1, 2))
    )
    options = tuple(how[n] for n in ("stride", "padding", "dilation"))
    W = g.constant(case.weight(out, channels // groups, *how["kernel"]))
    sizes = zip(shape[2:], *(how[n] for n in ("padding", "dilation", "kernel", "stride")))
    result = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes]
    fits = min(result) > 0 and case.chance(0.3)
    residual = same_shape(g, x, (shape[0], out, *result)) if fits else None
    return x, W, g.constant(case.bias(out)), residual, case.activation(), *options, groups


def gather_operands(g: Graph, name: str, x: Node, shape: Any) -> tuple[Any, ...]:
    """Return the arguments of an operator that moves tokens: an index with zeros, in runs or at random."""
    case = g.case
    parts = case.rng.choice([n for n in (1, 1, 2, 3) if shape[0] % n == 0])
    rows = name in ("gather_tokens", "tokens_to_pixels")
    channels = shape[-1] if rows else shape[1]
    tokens = shape.numel() // channels // (shape[0] // parts)
    to_image = name in ("gather_pixels", "tokens_to_pixels")
    sizes = (case.rng.randint(1, 6), case.rng.randint(1, 6)) if to_image else (case.size(70),)
    count = prod(sizes) * case.rng.choice((1, 1, 2))
    groups = case.rng.choice((1, 1, 1, 2, 4))
    index = torch.randint(-1, tokens, (groups, count))
    if case.chance(0.5):  # a run, as slices, rolls and windows have them
        index = (torch.arange(count) + torch.randint(tokens, (groups, 1))) % tokens
    if case.chance(0.1):
        index = torch.arange(count)[None].clamp(max=tokens - 1)
    return x, g.constant(index), parts, sizes


def attention_call(g: Graph, x: Node, precision: str) -> Node | None:
    """Add attention on projections of a value, with as many keys or others, and one of all kinds of masks."""
    case, shape = g.case, g.values[x].shape
    if len(shape) != 3:
        return None
    kv_heads, width = case.rng.choice((1, 2, 3)), case.rng.choice((1, 2, 3, 4, 7, 8, 12, 16, 17, 32, 48, 64))
    heads, causal = kv_heads * case.rng.choice((1, 1, 2, 3)), case.chance(0.2)
    source = x if causal or case.chance(0.7) else g.input(torch.randn(shape[0], case.size(140), shape[2]))
    keys = g.values[source].shape[1]

    def projection(of: Node, n: int) -> Node | None:
        size = shape[2] ** 0.5 * float(g.values[of].square().mean().sqrt().clamp(min=1e-3))
        W = torch.randn(n * width, shape[2]) / size * (torch.rand(n * width, shape[2]) >= case.rng.choice((0, 0.7)))
        return g.call("linear", of, g.constant(W), g.constant(case.bias(n * width)), None, None)

    q, k, v = projection(x, heads), projection(source, kv_heads), projection(source, kv_heads)
    if None in (q, k, v):
        return None
    mask = None
    if not causal and case.chance(0.5):
        sizes = [case.rng.choice((1, n)) for n in (shape[0], heads, shape[1])]
        visible = torch.rand(*sizes, keys) < case.rng.choice((0.3, 0.9))
        visible[..., case.rng.randrange(keys)] = True
        mask = g.input(ops.additive_mask(visible) if case.chance(0.7) else torch.randn(*sizes, keys))
    kind = None if precision == "fp32" else "int8" if precision.startswith("int8") else "bf16"
    return g.call("attention", q, k, v, mask, heads, kv_heads, width**-0.5, causal, kind)


def random_graph(case: Case, names: tuple[str, ...], precision: str) -> Graph:
    """Return a graph of a few operators on rows or images, at times on inputs without entries."""
    g, batch = Graph(case), case.rng.choice((1, 1, 2, 3, 5, 17))
    case.activations = bindings.ACTIVATIONS if precision == "fp32" else UNBOUNDED
    if names is IMAGE_OPS:
        shape: tuple[int, ...] = (batch, case.size(96), case.size(24), case.size(24))
    else:
        shape = (batch, *((case.size(130),) if case.chance(0.8) else ()), case.size(200))
    live = [g.input(torch.randn(shape) * 10 ** case.rng.uniform(-1, 1))]
    for _ in range(case.rng.randint(1, 7)):
        x = case.rng.choice(live[-3:])
        rows = g.values[x].dim() != 4
        name = case.rng.choice(ROWS_OPS if rows else IMAGE_OPS)
        if len(live) == 1 and case.chance(0.7):
            name = case.rng.choice(("linear", "linear", "attention")) if rows else "conv2d"
        if precision != "fp32" and name in AMPLIFYING:
            continue
        if name in HEAVY and precision != "fp32" and any(n.target in HEAVY_TARGETS for n in g.graph.nodes):
            continue  # errors of rounding add up
        if g.values[x].numel() > MAX_NUMBERS:
            continue
        node = attention_call(g, x, precision) if name == "attention" else g.call(name, *operands(g, name, x))
        live += [] if node is None else [node]
    return g


def pack_linear(case: Case, W: Tensor, precision: str) -> Any:
    """Return a packed weight in a random format; None where none has it."""
    kind = precision.split()[0]
    block = {} if case.chance(0.5) else {"block": case.rng.choice((1, 16, 32, 100, 128))}
    how = case.rng.choice(("dense", "tiles", "sell", "rows"))
    try:
        if how == "dense":
            return packing.pack_dense(W, kind)
        if how == "rows" and kind != "int16":
            return packing.pack_bitmask(W, kind)
        return packing.pack_tiles(W, kind, **block) if how == "tiles" else packing.pack_sell(W, kind, **block)
    except FormatError:
        return None


def kernels_of(g: Graph, precision: str) -> dict[Node, Any]:
    """Return a kernel for most of the linear layers and convolutions."""
    kernels: dict[Node, Any] = {}
    exported = exported_of(g, [])
    for node in list(g.graph.nodes):
        if node.target not in (ops.linear, ops.conv2d):
            continue
        W, bias, act = g.constants[node.args[1].name], node.args[2], node.args[4]
        kind = None if precision == "fp32" else precision.split()[0]
        form = pack_linear(g.case, W, precision) if node.target is ops.linear else pack_conv_node(exported, node, kind)
        if form is None:
            continue
        kernels[node] = Kernel(form, None if bias is None else g.constants[bias.name].clone(), act)
        if precision == "int8 static" and form.kind == "int8" and not isinstance(form, packing.Bitmask):
            kernels[node].input_grid = grid_of_values(g.values[node.args[0]])
            if node.args[3] is not None and node.target is ops.conv2d:
                kernels[node].residual_grid = grid_of_values(g.values[node.args[3]])
    return kernels


def grid_of_values(x: Tensor) -> ActivationQuant:
    low, high = float(x.min().clamp(max=0)), float(x.max().clamp(min=0))
    scale = max((high - low) / 255, 1e-6)
    return ActivationQuant(8, scale, min(255, max(0, round(-low / scale))))


def exported_of(g: Graph, outputs: list[Node]) -> ExportedGraph:
    _, in_spec = pytree.tree_flatten((tuple(range(len(g.inputs))), {}))
    _, out_spec = pytree.tree_flatten([0] * len(outputs))
    return ExportedGraph(g.graph, dict(g.constants), list(g.inputs), in_spec, out_spec, {})


def compiled_of(g: Graph, kernels: dict[Node, Any]) -> tuple[Compiled, list[Node]]:
    """Return a graph as a compiled model, whose outputs are what no node reads, and some other values."""
    calls = [n for n in g.graph.nodes if n.op == "call_function"]
    outputs = [n for n in calls if not n.users or g.case.chance(0.15)]
    g.graph.output(outputs)
    return Compiled(exported_of(g, outputs), kernels, [None] * len(g.inputs), check), outputs


@contextmanager
def separate_memory(fill: float) -> Iterator[None]:
    """Give each value of a program memory of its own, filled with a number, and check what follows it afterwards."""
    plan, run = Program._plan_memory, Program.run

    def plan_separately(p: Any) -> None:
        p.memory, p.separate = torch.zeros(VECTOR), []
        for v in p.every:
            if not isinstance(v, Part):
                t = torch.full((v.floats + VECTOR,), fill)  # segments are read in whole vectors
                v.start = (t.data_ptr() - p.memory.data_ptr()) // 4
                p.separate.append(t)

    def run_and_check(p: Any, *args: Any, **options: Any) -> list[Tensor]:
        for t in p.separate:
            t[-VECTOR:] = 321.0
        out = run(p, *args, **options)
        assert all(bool((t[-VECTOR:] == 321.0).all()) for t in p.separate), "a step has written past its value"
        return out

    Program._plan_memory, Program.run = plan_separately, run_and_check  # type: ignore[method-assign]
    try:
        yield
    finally:
        Program._plan_memory, Program.run = plan, run  # type: ignore[method-assign]


def compare(
    compiled: Compiled,
    outputs: list[Node],
    g: Graph,
    tolerance: float | Tensor,
    what: str,
    cache: Any = None,
) -> None:
    """Call a compiled graph and compare all outputs with the references'.

    Args:
        compiled: the graph.
        outputs: its nodes that are returned.
        g: with their values.
        tolerance: relative to the largest number of all values, or of each number.
        what: for messages.
        cache: the KV cache of the call.
    """
    for y, node in zip(compiled.run_leaves([g.values[n] for n in g.inputs], cache), outputs):
        want = g.values[node]
        assert y.shape == want.shape, f"{node.name}: {list(y.shape)}, expected {list(want.shape)}"
        largest = max(float(t.abs().max()) for n, t in g.values.items() if n.op == "call_function" and t.numel())
        most = tolerance if isinstance(tolerance, Tensor) else tolerance * largest + 1e-5
        calls = [n.name for n in g.graph.nodes if n.op == "call_function"]
        close(y, want, most, f"{what}: {node.name} of {calls}")


def program(case: Case, steps: Counter[str] | None = None) -> None:
    """Run a random graph of operators on rows or images."""
    names = case.rng.choice((ROWS_OPS, IMAGE_OPS))
    precision = case.rng.choice(PRECISIONS)
    g = random_graph(case, names, precision)
    kernels = kernels_of(g, precision)
    with separate_memory(case.rng.choice((float("nan"), 0.0, 1e30))), torch.no_grad():
        compiled, outputs = compiled_of(g, kernels)
        for _ in range(2):  # memory holds what the first call has left
            compare(compiled, outputs, g, TOLERANCE[precision], precision)
        if steps is not None:
            steps.update(steps_of(compiled))


def exact_program(case: Case, steps: Counter[str] | None = None) -> None:
    """Run a layer in 8 bits or bf16 on whole numbers, whose scales are 1: sums are exact."""
    precision, images = case.rng.choice(("bf16", "int8", "int8 static")), case.chance(0.5)
    g = Graph(case)
    sizes = (case.size(64), case.size(20), case.size(20)) if images else (case.size(400),)
    x = torch.randint(-127, 128, (case.rng.randint(1, 5) if images else case.size(200), *sizes)).float()
    x.view(len(x), -1)[:, 0] = 127
    node = g.input(x)
    name, found = ("conv2d", conv_operands(g, node, x.shape)) if images else ("linear", operands(g, "linear", node))
    made = g.call(name, *found[:3], None, None, *found[5:])
    if made is None or (images and made.args[8] != 1):
        return
    W = g.constants[made.args[1].name]
    W.copy_(torch.randint(-127, 128, W.shape).float() * (W != 0))
    W.view(len(W), -1)[:, 0] = -127
    product = (lambda a, b: torch.conv2d(a, b, None, *made.args[5:])) if images else (lambda a, b: a @ b.T)
    bias = None if made.args[2] is None else g.constants[made.args[2].name].double()
    exact = product(x.double(), W.double())
    g.values[made] = exact if bias is None else exact + (bias[:, None, None] if images else bias)
    size = 255 * W.abs().flatten(1).sum(1)  # at most, of what is summed: codes of static grids are numbers plus 128
    size = size[:, None, None] if images else size
    kernels = kernels_of(g, precision)
    for kernel in kernels.values():
        if kernel.input_grid is not None:
            kernel.input_grid = ActivationQuant(8, 1.0, 128)
    with separate_memory(float("nan")), torch.no_grad():
        compiled, outputs = compiled_of(g, kernels)
        compare(compiled, outputs, g, 2e-7 * size + 1e-6, f"exact {precision}")
        if steps is not None:
            steps.update(steps_of(compiled))


def decoder(case: Case, steps: Counter[str] | None = None) -> None:
    """Run steps of a decoder's layer: a prompt, then single tokens or a few, with a KV cache in fp32 or 8 bits."""
    kv_heads, width = case.rng.choice((1, 2, 3)), case.rng.choice((2, 4, 8, 16, 32, 34, 64))
    heads, name = kv_heads * case.rng.choice((1, 1, 2, 3, 4, 5)), case.rng.choice(CACHED_OPS)
    window, batch, capacity = (case.rng.choice(c) for c in ((0, 0, 1, 5, 64, 100), (1, 1, 2, 3), (64, 100, 200)))
    features, stored = case.rng.choice((64, 128, 192, 100)), 2 * kv_heads * width
    change = {"capped_cached_attention": (case.rng.choice((5.0, 50.0)),), "alibi_cached_attention": (8.0,)}.get(
        name, ()
    )
    precision = case.rng.choice(("fp32", "int8"))
    g = Graph(case)
    cache = g.graph.placeholder("cache")
    g.cache = Cache(stored, batch, TILE)
    g.cache.reserve(1)
    kernels: dict[Node, Any] = {}
    x = g.input(torch.randn(batch, 1, features))
    q, k, v = (decoder_layer(g, x, n * width, kernels) for n in (heads, kv_heads, kv_heads))
    g.call(name, q, k, v, cache, (0, kv_heads * width), heads, kv_heads, width**-0.5, window, *change)
    starts = torch.randint(0, 3, (batch,)) if case.chance(0.3) else None
    g.cache, native = (Cache(stored, batch, capacity, starts, slots_of(g.graph), precision) for _ in range(2))
    tolerance = 0.1 if precision == "int8" else 0.05
    size = max(float(w.square().mean()) * features for w in g.constants.values()) ** 0.5  # scores of about 1
    with separate_memory(case.rng.choice((float("nan"), 0.0))):
        compiled, outputs = compiled_of(g, kernels)
        tokens = case.rng.choice((1, 2, 5, 16, 33, 63, 64))
        for _ in range(case.rng.randint(1, 12)):
            if native.past + tokens > capacity:
                break
            native.reserve(tokens)
            g.cache.reserve(tokens)
            g.evaluate({x: torch.randn(batch, tokens, features) / size})
            compare(compiled, outputs, g, tolerance, f"{tokens} of {native.past} tokens, {precision}", native)
            native.past += tokens
            g.cache.past += tokens
            tokens = case.rng.choice((1, 1, 1, 2, 7, 12, 17))
        if steps is not None:
            steps.update(steps_of(compiled))


def decoder_layer(g: Graph, x: Node, outputs: int, kernels: dict[Node, Any]) -> Node | None:
    """Add a linear layer whose kernel reads single rows."""
    features, case = g.values[x].shape[-1], g.case
    if case.chance(0.5) and features % 64 == 0:
        two = case.chance(0.5)
        ways = [w for w in (TWO_TERM_GRIDS if two else GRIDS) if not isinstance(w[1], int) or features % w[1] == 0]
        W, grid = on_grid(outputs, features, *case.rng.choice(ways))
        form: Any = pack_quantized(W, grid, not two and case.chance(0.5), two)
    else:
        W = torch.randn(outputs, features) * (torch.rand(outputs, features) >= 0.5)
        form = packing.pack_bitmask(W, case.rng.choice(ROW_KINDS))
    node = g.call("linear", x, g.constant(W), None, None, None)
    assert node is not None
    kernels[node] = Kernel(form)
    return node


def steps_of(compiled: Compiled) -> list[str]:
    """Return the names of the steps of all programs."""
    calls = [c for c in compiled.schedule if isinstance(c, FusedSubgraph)]
    return [NAMES[s.op] for c in calls for kept in c.programs.values() for p in kept for s, _, _ in p.steps]


PROGRAMS: dict[str, Callable[..., None]] = {"program": program, "exact program": exact_program, "decoder": decoder}
