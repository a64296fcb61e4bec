"""Run a compiled graph: native programs for fused subgraphs, one ATen call for each other node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from rarefy.common.errors import DataError, first_line
from rarefy.compiler import conv_lowering, ops
from rarefy.compiler.export import MOST_SIZE
from rarefy.compiler.fx_utils import ExportedGraph, Node
from rarefy.compiler.lowering import LOWER
from rarefy.compiler.program import Program
from rarefy.runtime.huge_pages import last_cache
from rarefy.runtime.kernel import Kernel
from rarefy.runtime.packed_formats import Panels

MOST_SIZES = 16  # of inputs for which plans are kept


HEAVY = (ops.linear, ops.attention, ops.cached_attention, ops.conv2d)  # what a plan is worth its packing for


Check = Callable[[Sequence[Node], Mapping[Node, Tensor], Mapping[Node, Any], Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class Expected:
    """What a tensor of the call is: its type, and each size, or the symbol of one that is open."""

    dtype: torch.dtype
    sizes: tuple[int | str, ...]

    def __str__(self) -> str:
        sizes = ["any" if isinstance(s, str) else str(s) for s in self.sizes]
        return f"{str(self.dtype).removeprefix('torch.')} [{', '.join(sizes)}] on the CPU"


def expected(value: Any) -> Any:
    """Return what export recorded of an argument as `Expected`, or as it is where it is no tensor."""
    if not isinstance(value, Tensor):
        return value
    return Expected(value.dtype, tuple(int(s) if str(s).isdigit() else str(s) for s in value.shape))  # wrapped numbers


class SingleOp:
    """A word that has a kernel of its own and stands outside plans: a convolution."""

    def __init__(self, node: Node, kernel: Any):
        self.nodes, self.outputs, self.kernel = [node], [node], kernel

    def run(self, given: Callable[[Node], Any]) -> list[Tensor]:
        """Return the output."""
        x, _, *rest = self.nodes[0].args
        more = rest[1] if len(rest) > 1 else None
        return [self.kernel.run(given(x), None if more is None else given(more))]


class FusedSubgraph:
    """Words that one native call runs, and its plans for the sizes that it has met."""

    def __init__(
        self, nodes: Sequence[Node], kernels: Mapping[Node, Any], constants: Mapping[str, Tensor], check: Check | None
    ):
        inside = set(nodes)
        read = dict.fromkeys(a for n in nodes for a in _read(n) if a not in inside)
        self.nodes, self.kernels, self.constants = list(nodes), kernels, constants
        self.inputs = list(read)
        self.cache = next((n.args[3] for n in nodes if n.target is ops.cached_attention), None)
        self.images = conv_lowering.layouts(nodes) or ()
        self.outputs = [n for n in nodes if any(u not in inside for u in n.users)]
        self.programs: dict[tuple[Any, ...], list[Program]] = {}
        self.few: dict[tuple[Any, ...], int] = {}  # images at once, by their sizes
        self.lock, self.check = Lock(), check

    def run(self, given: Callable[[Node], Any]) -> list[Tensor]:
        """Return the outputs. Images go through all words a few at a time: what they are on the way stays near."""
        inputs = {n: given(n) for n in self.inputs}
        cache = None if self.cache is None else given(self.cache)
        many = len(next(iter(inputs.values()))) if self.images else 0
        if many <= 1 or any(len(t) != many for t in inputs.values()):
            return self._run(inputs, cache)
        few = self._at_once({n: t[:1] for n, t in inputs.items()})
        parts = [self._run({n: t[i : i + few] for n, t in inputs.items()}, cache) for i in range(0, many, few)]
        return [torch.cat(o) for o in zip(*parts)] if len(parts) > 1 else parts[0]

    def _at_once(self, one: Mapping[Node, Tensor]) -> int:
        """How many images: as a plan for one needs memory."""
        key = _shapes(one)
        if key not in self.few:
            plan = self._plan(one)
            kernels = [self.kernels[n] for n in self.nodes if n in self.kernels]
            weights = {t.data_ptr(): t.nbytes for k in kernels for t in k.tensors()}
            self.few[key] = conv_lowering.at_once(plan.memory.nbytes, sum(weights.values()), last_cache())
            self._give_back(key, plan)
        return self.few[key]

    def _run(self, inputs: Mapping[Node, Tensor], cache: Any) -> list[Tensor]:
        """Threads that come at the same time have a plan each."""
        shapes = _shapes(inputs)
        with self.lock:
            free = self.programs.get(shapes, [])
            plan = free.pop() if free else None
        plan = self._plan(inputs) if plan is None else plan
        out = plan.run(inputs, cache)
        self._give_back(shapes, plan)
        return out

    def _plan(self, inputs: Mapping[Node, Tensor]) -> Program:
        if self.check is not None:
            self.check(self.nodes, inputs, self.kernels, self.constants)
        sizes = {n: tuple(t.shape) for n, t in inputs.items()}
        return Program(self.nodes, self.inputs, self.outputs, sizes, self.kernels, self.constants, LOWER, self.images)

    def _give_back(self, shapes: tuple[Any, ...], plan: Program) -> None:
        with self.lock:
            self.programs.setdefault(shapes, []).append(plan)
            while len(self.programs) > MOST_SIZES:
                self.programs.pop(next(iter(self.programs)))


def _shapes(inputs: Mapping[Node, Tensor]) -> tuple[Any, ...]:
    return tuple((t.dtype, *t.shape) for t in inputs.values())


def _read(node: Node) -> list[Node]:
    """The tensors that a word is about, without its weights."""
    weights = {ops.linear: (1, 2), ops.norm: (1, 2), ops.cached_attention: (3,), ops.conv2d: (1, 2)}.get(
        node.target, ()
    )
    return [a for i, a in enumerate(node.args) if isinstance(a, fx.Node) and i not in weights]


class Compiled:
    """A compiled model; see `compile`.

    kernels   the packed weights of products and convolutions
    expected  what the call's tensors are, in the graph's order
    check     called with words and their inputs before these are run at sizes that are new: for graphs from a file
    """

    def __init__(
        self, traced: ExportedGraph, kernels: Mapping[Node, Any], expected: Sequence[Any], check: Check | None = None
    ):
        self.exported, self.constants, self.kernels, self.expected = traced, traced.constants, kernels, list(expected)
        self.schedule = _schedule(traced, kernels, check)
        for n in (n for n in traced.graph.nodes if n.op == "placeholder" and n.name in self.constants):
            if all(u in kernels and n is u.args[1] for u in n.users):  # packed, or read by nobody
                self.constants.pop(n.name)
        for n in traced.graph.nodes:
            n.meta.clear()  # holds weights, and what export knew
        if check is None:  # made of a model, whose own tensors may change
            self.constants.update({n: t.clone() for n, t in self.constants.items()})
        self.fixed_nodes = _fixed(traced)
        self.fixed: dict[tuple[Any, ...], dict[Node, Any]] = {}  # what sizes alone decide, for the last ones
        spec: Any = traced.in_spec
        keywords = spec.child(1) if hasattr(spec, "child") else spec.children_specs[1]
        self.keywords = dict.fromkeys(keywords.context)  # in the graph's order
        self.output = next(n for n in traced.graph.nodes if n.op == "output").args[0]
        self.ends = self._ends()

    def _ends(self) -> list[list[Node]]:
        """Of each call, what nobody reads behind it."""
        stay = {*self.fixed_nodes, *self.exported.inputs}
        fx.map_arg(self.output, stay.add)
        ends: list[list[Node]] = []
        for item in reversed(self.schedule):
            known = item.inputs if isinstance(item, FusedSubgraph) else _reads(item)
            made = item.outputs if isinstance(item, FusedSubgraph | SingleOp) else [item]
            reads = dict.fromkeys(n for n in [*known, *made] if n not in stay)
            stay |= reads.keys()
            ends.append(list(reads))
        return ends[::-1]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return pytree.tree_unflatten(self.run(self._leaves(args, kwargs)), self.exported.out_spec)

    def run(self, leaves: list[Any], cache: Any = None) -> list[Any]:
        """Return the outputs for tensors in the graph's order; a language model's tokens are the next of a `Cache`."""
        sizes = tuple(tuple(t.shape) if isinstance(t, Tensor) else t for t in leaves)
        known = self.fixed.get(sizes)
        env: dict[Node, Any] = {**dict(zip(self.exported.inputs, leaves)), **(known or {})}

        def given(node: Node) -> Any:
            if node in env:
                return env[node]
            return cache if node.name == "cache" else self.constants[node.name]

        with torch.no_grad():
            for item, ends in zip(self.schedule, self.ends):
                try:
                    if isinstance(item, FusedSubgraph | SingleOp):
                        env.update(zip(item.outputs, item.run(given)))
                    elif item not in env:
                        a, k = fx.map_arg((item.args, item.kwargs), given)
                        env[item] = item.target(*a, **k)
                except (RuntimeError, IndexError, TypeError) as error:  # torch's own
                    where = _name(item.nodes[0] if isinstance(item, FusedSubgraph | SingleOp) else item)
                    raise DataError(f"{where} does not take what was given: {first_line(error)}") from error
                for n in ends:
                    env.pop(n, None)
            out = fx.map_arg(self.output, given)
        if known is None:
            fixed = {**self.fixed, sizes: {n: env[n] for n in self.fixed_nodes}}
            self.fixed = dict(list(fixed.items())[-MOST_SIZES:])
        return list(out)

    def forget(self) -> None:
        """Drop what is kept for the sizes of earlier calls; the next call of each size makes it again."""
        for s in (i for i in self.schedule if isinstance(i, FusedSubgraph)):
            with s.lock:
                s.programs.clear()
        self.fixed = {}

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The call's tensors in the graph's order; DataError unless they are as the graph was made for."""
        spec, names = self.exported.in_spec, self.keywords
        if kwargs.keys() != names.keys():
            more, lacks = [n for n in kwargs if n not in names], [n for n in names if n not in kwargs]
            told = [f"leave out {', '.join(more)}, or compile with an example that has it"] if more else []
            told += [f"{', '.join(lacks)} is missing"] if lacks else []
            got = f"compiled for the keywords {', '.join(names) or 'none'}, got {', '.join(kwargs) or 'none'}"
            raise DataError(f"{got}: {'; '.join(told)}")
        leaves, got = pytree.tree_flatten((args, {n: kwargs[n] for n in names}))
        if got != spec:
            raise DataError(f"compiled for arguments of another structure: {spec}, got {got}")
        open_: dict[str, int] = {}
        for node, want, value in zip(self.exported.inputs, self.expected, leaves):
            if isinstance(want, Expected):
                _check(node.name, want, value, open_, self.exported.ranges)
            elif value != want:
                raise DataError(f"{node.name}: compiled for {want!r}, got {value!r}")
        return leaves

    def counts(self) -> tuple[int, Counter[str], Counter[str]]:
        """Return how many native calls there are, of which words they are made, and what runs in torch."""
        plans = [i for i in self.schedule if isinstance(i, FusedSubgraph | SingleOp)]
        rest = (i for i in self.schedule if not isinstance(i, FusedSubgraph | SingleOp) and i not in self.fixed_nodes)
        return len(plans), Counter(n.target.__name__ for s in plans for n in s.nodes), Counter(map(_name, rest))

    def __repr__(self) -> str:
        plans, ours, calls = self.counts()
        lines = [f"{plans} native calls: {', '.join(f'{n} {w}' for w, n in ours.most_common()) or 'none'}"]
        lines += [f"in torch: {', '.join(f'{n} {w}' for w, n in calls.most_common())}"] if calls else []
        return "\n".join([*lines, *self.exported.notes])


def _reads(item: Any) -> list[Node]:
    """What a call of the program reads."""
    nodes = item.nodes if isinstance(item, FusedSubgraph | SingleOp) else [item]
    return [a for n in nodes for a in n.all_input_nodes]


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).removesuffix(".default")


def _check(name: str, want: Expected, value: Any, open_: dict[str, int], ranges: Mapping[str, tuple[int, int]]) -> None:
    """Raise DataError unless a tensor is of the type and the sizes that the graph takes."""
    if not isinstance(value, Tensor):
        raise DataError(f"{name}: {want} is expected, got {type(value).__name__}")
    if value.dtype != want.dtype or value.device.type != "cpu" or value.dim() != len(want.sizes):
        got = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
        raise DataError(f"{name}: {want} is expected, got {got}")
    for n, size in zip(value.shape, want.sizes):
        fixed = isinstance(size, int)
        least, most = (size, size) if fixed else ranges.get(size, (0, MOST_SIZE))
        if not least <= n <= most:
            limits = f"{least} or more" if most == MOST_SIZE else f"{least}" if fixed else f"{least} to {most}"
            raise DataError(f"{name}: {want} is expected, got {list(value.shape)}: {n} is not {limits}")
        if not fixed and open_.setdefault(size, n) != n:
            raise DataError(f"{name}: a size that is {open_[size]} in another input is {n} here: {list(value.shape)}")


def _fixed(t: ExportedGraph) -> list[Node]:
    """What follows from sizes and constants alone."""
    found: dict[Node, None] = {}
    for n in t.graph.nodes:
        if n.op != "call_function" or n.target in LOWER:
            continue
        random = isinstance(n.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in n.target.tags
        alone = all(a in found or a.name in t.constants for a in n.all_input_nodes)
        if n.target is torch.ops.aten.sym_size.int or (alone and not random):
            found[n] = None
    return list(found)


@dataclass(frozen=True)
class Lookup:
    """An embedding as a kernel."""

    kernel: Kernel

    @property
    def held(self) -> tuple[Panels, None]:
        """The packed weight, and no bias, as kernels of products have them."""
        return self.kernel.held[0], None  # type: ignore[return-value]

    def tensors(self) -> list[Tensor]:
        """Return what it holds in memory. O(1)."""
        return self.kernel.tensors()

    def run(self, ids: Tensor, _: None = None) -> Tensor:
        """Return rows."""
        return self.kernel.rows(ids)


ALONE = (ops.conv2d, ops.embedding)  # words that stand outside plans


def _plans(t: ExportedGraph, node: Node, kernels: Mapping[Node, Any]) -> bool:
    """Whether a plan knows a call."""
    if node.target is ops.conv2d:
        if node in kernels:
            return node.args[8] == 1
        return bool(kernels) and conv_lowering.depthwise(node, t.constants[node.args[1].name])
    return node.target in LOWER and bool(kernels)


def _schedule(t: ExportedGraph, kernels: Mapping[Node, Any], check: Check | None) -> list[Any]:
    """Calls in an order that lets words come together: all ATen calls that can be made, then all words, and so on."""
    nodes = [n for n in t.graph.nodes if n.op == "call_function"]
    waits = {n: {a for a in n.all_input_nodes if a.op == "call_function"} for n in nodes}
    program: list[Any] = []
    in_words = False
    while waits:
        taken: dict[Node, None] = {}
        for n in nodes:
            if n in waits and _plans(t, n, kernels) == in_words and waits[n] <= taken.keys():
                taken[n] = None
                del waits[n]
        for left in waits.values():
            left.difference_update(taken)
        heavy = any(n.target in HEAVY for n in taken) and conv_lowering.layouts(list(taken)) is not None
        if in_words and heavy:
            program.append(FusedSubgraph(list(taken), kernels, t.constants, check))
        else:
            program += [_by_itself(n, t, kernels, check) for n in taken]
        in_words = not in_words
    return program


def _by_itself(node: Node, t: ExportedGraph, kernels: Mapping[Node, Any], check: Check | None) -> Any:
    """A call outside of plans; a convolution that knows no other place has a plan of its own."""
    if node.target not in ALONE or node not in kernels:
        return node
    if node.target is ops.conv2d and kernels[node].alone:
        return FusedSubgraph([node], kernels, t.constants, check)
    return SingleOp(node, kernels[node])
