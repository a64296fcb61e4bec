"""The native parts of a compiled model: fused subgraphs that one call runs, and single operators with a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import prod
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.compiler.fx_utils import Node
from rarefy.compiler.operators.spec import ELEMENTWISE, IMAGES, IMAGES_TO_ROWS, PIXELS, ROWS_TO_IMAGES
from rarefy.compiler.operators.table import BY_TARGET
from rarefy.compiler.packed_program import PackedProgram, capacity
from rarefy.compiler.padding import Packing, padding_rule
from rarefy.compiler.program import Program
from rarefy.runtime import bindings
from rarefy.runtime.huge_pages import last_cache
from rarefy.runtime.kernel import Kernel

MAX_SHAPES = 16  # shapes of inputs for which programs are kept
FIXED_SHAPES = 4  # of batches without padding have programs of their own; further ones share those for real tokens
MAX_IN_FLIGHT = 56 << 20  # bytes of activations of the images that go through a program together

# called with nodes, their inputs, kernels and constants before a program is built for new shapes
Check = Callable[[Sequence[Node], Mapping[Node, Tensor], Mapping[Node, Any], Mapping[str, Tensor]], None]


class SingleOp:
    """An operator that its kernel runs in a native call of its own."""

    def __init__(self, node: Node, kernel: Any):
        self.nodes, self.outputs, self.kernel = [node], [node], kernel

    def run(self, lookup: Callable[[Node], Any]) -> list[Tensor]:
        """Return the output; `lookup` gives the value of a node."""
        x, _, *rest = self.nodes[0].args
        residual = rest[1] if len(rest) > 1 else None
        return [self.kernel.run(lookup(x), None if residual is None else lookup(residual))]


class FusedSubgraph:
    """Operators that one native call runs, and the programs for the shapes that it has met.

    Attributes:
        nodes: the operators in the order in which they run.
        inputs: the values that come from outside, masks included.
        outputs: the operators whose outputs are read outside.
        padding: what must hold in a call so that padding may be left out; None if it never may.
        programs: for each shape of the inputs the programs that no thread runs now.
        fixed: shapes of batches without padding that were met first.
    """

    def __init__(
        self, nodes: Sequence[Node], kernels: Mapping[Node, Any], constants: Mapping[str, Tensor], check: Check | None
    ):
        inside = set(nodes)
        read = dict.fromkeys(a for n in nodes for a in _activations(n) if a not in inside)
        self.nodes, self.kernels, self.constants = list(nodes), kernels, constants
        self.inputs = list(read)
        caches = (BY_TARGET[n.target].argument(n, "cache") for n in nodes)
        self.cache = next((c for c in caches if c is not None), None)
        self.images = image_nodes(nodes) or ()
        self.splits = bool(self.images) and _splits_by_sample(nodes, constants)
        self.outputs = [n for n in nodes if any(u not in inside for u in n.users)]
        self.padding = padding_rule(self.nodes, self.outputs)
        self.programs: dict[tuple[Any, ...], list[Program]] = {}
        self.batch_sizes: dict[tuple[Any, ...], int] = {}  # images that go together, by their shapes
        self.fixed: set[tuple[Any, ...]] = set()
        self.lock, self.check = Lock(), check

    def run(self, lookup: Callable[[Node], Any], recorder: Any = None, skip_padding: bool = True) -> list[Tensor]:
        """Return the outputs.

        Images go through all operators a few at a time, so that activations stay in the CPU's cache.

        Args:
            lookup: gives the value of a node.
            recorder: a `Recorder` that runs the programs and keeps their times.
            skip_padding: leave out padding where `padding` allows it; outputs are zeros there.
        """
        inputs = {n: lookup(n) for n in self.inputs}
        cache = None if self.cache is None else lookup(self.cache)
        if self.padding is not None and skip_padding:
            packing = self.padding.packing(inputs, lookup, any_batch=not self._is_fixed(inputs))
            if packing is not None:
                return self._run(inputs, None, recorder, packing)
        batch = next(iter(inputs.values())).shape[0] if self.splits else 0
        if batch <= 1 or any(t.shape[0] != batch for t in inputs.values()):
            return self._run(inputs, cache, recorder)
        step = self._images_together({n: t[:1] for n, t in inputs.items()})
        chunks = [
            self._run({n: t[i : i + step] for n, t in inputs.items()}, cache, recorder) for i in range(0, batch, step)
        ]
        return [torch.cat(o) for o in zip(*chunks)] if len(chunks) > 1 else chunks[0]

    def _is_fixed(self, inputs: Mapping[Node, Tensor]) -> bool:
        """Return whether a batch without padding has a program for its very shape.

        A program takes milliseconds to build, as long as a short text takes to run: where lengths differ from call to
        call, they share the programs for real tokens.
        """
        shapes = _shapes(inputs)
        with self.lock:
            if len(self.fixed) < FIXED_SHAPES:
                self.fixed.add(shapes)
            return shapes in self.fixed

    def _images_together(self, one: Mapping[Node, Tensor]) -> int:
        """Return how many images go together, from the memory that a program needs for one."""
        key = _shapes(one)
        if key not in self.batch_sizes:
            program = self._build(one)
            kernels = [self.kernels[n] for n in self.nodes if n in self.kernels]
            read = [t for k in kernels for t in (k.tensors_read() if isinstance(k, Kernel) else k.tensors())]
            weights = {t.data_ptr(): t.nbytes for t in read}
            self.batch_sizes[key] = images_together(program.memory.nbytes, sum(weights.values()), last_cache())
            self._give_back(key, program)
        return self.batch_sizes[key]

    def _run(
        self, inputs: Mapping[Node, Tensor], cache: Any, recorder: Any, packing: Packing | None = None
    ) -> list[Tensor]:
        """Run a program; threads that call at the same time have one each."""
        shapes = _shapes(inputs) if packing is None else self._packed_shapes(inputs, packing)
        with self.lock:
            free = self.programs.get(shapes, [])
            program = free.pop() if free else None
        if packing is None:
            program = self._build(inputs) if program is None else program
        else:
            program = self._build_packed(inputs, packing) if program is None else program
            assert isinstance(program, PackedProgram)
            program.set_packing(packing)
        out = program.run(inputs, cache) if recorder is None else recorder.run_program(program, inputs, cache)
        self._give_back(shapes, program)
        return out

    def _build(self, inputs: Mapping[Node, Tensor]) -> Program:
        self._check_shapes(inputs)
        shapes = {n: tuple(t.shape) for n, t in inputs.items()}
        return Program(
            self.nodes, self.inputs, self.outputs, shapes, self.kernels, self.constants, BY_TARGET, self.images
        )

    def _build_packed(self, inputs: Mapping[Node, Tensor], packing: Packing) -> PackedProgram:
        self._check_shapes(inputs)
        features = {n: t.shape[-1] for n, t in self._without_mask(inputs).items()}
        tensors = self.kernels, self.constants, BY_TARGET
        return PackedProgram(capacity(packing.tiles), features, self.nodes, self.outputs, *tensors)

    def _check_shapes(self, inputs: Mapping[Node, Tensor]) -> None:
        if self.check is not None:
            self.check(self.nodes, inputs, self.kernels, self.constants)

    def _packed_shapes(self, inputs: Mapping[Node, Tensor], packing: Packing) -> tuple[Any, ...]:
        """Return what a program for real tokens depends on: not on the batch and its lengths."""
        sizes = ((t.dtype, t.shape[-1]) for t in self._without_mask(inputs).values())
        return "packed", bindings.isa(), capacity(packing.tiles), *sizes

    def _without_mask(self, inputs: Mapping[Node, Tensor]) -> dict[Node, Tensor]:
        return {n: t for n, t in inputs.items() if self.padding is None or n is not self.padding.mask}

    def _give_back(self, shapes: tuple[Any, ...], program: Program) -> None:
        with self.lock:
            self.programs.setdefault(shapes, []).append(program)
            while len(self.programs) > MAX_SHAPES:
                self.programs.pop(next(iter(self.programs)))


def _shapes(inputs: Mapping[Node, Tensor]) -> tuple[Any, ...]:
    """Return what a program depends on: types and sizes of the inputs, and the instruction set it is laid out for."""
    return *((t.dtype, *t.shape) for t in inputs.values()), bindings.isa()


def _activations(node: Node) -> list[Node]:
    """Return the arguments that are computed: no weights, no constants, no cache."""
    fixed = ("weight", "constant", "cache")
    kinds = (k.removesuffix("?") for k in BY_TARGET[node.target].arguments)
    return [a for kind, a in zip(kinds, node.args) if isinstance(a, fx.Node) and kind not in fixed]


def image_nodes(nodes: Sequence[Node]) -> set[Node] | None:
    """Return which values are images [batch, channels, height, width].

    Returns:
        The nodes; None where operators on rows read images too, so that no program can run all of them.
    """
    layout = {n: BY_TARGET[n.target].layout for n in nodes}
    images = {n for n in nodes if layout[n] in (IMAGES, PIXELS, ROWS_TO_IMAGES)}
    for n in (n for n in nodes if layout[n] in (IMAGES, PIXELS, IMAGES_TO_ROWS)):
        images |= set(BY_TARGET[n.target].tensors(n))
    before = -1
    while before != len(images):
        before = len(images)
        for n in (n for n in nodes if layout[n] == ELEMENTWISE):
            connected = {n, *n.all_input_nodes}
            if connected & images:
                images |= connected
    rows = {n for n in nodes if layout[n] == IMAGES_TO_ROWS}
    rows |= {n.args[0] for n in nodes if layout[n] == ROWS_TO_IMAGES}
    for n in nodes:
        if layout[n] not in (IMAGES, PIXELS, IMAGES_TO_ROWS, ROWS_TO_IMAGES, ELEMENTWISE):
            rows |= {n, *n.all_input_nodes}
    return None if images & rows else images


def _splits_by_sample(nodes: Sequence[Node], constants: Mapping[str, Tensor]) -> bool:
    """Return whether entries of the first dimension of the inputs can go through all operators one by one.

    They cannot where several entries make a sample, such as windows of an image or a whole batch of a fixed size, or
    where a mask is read, which may have another first dimension.
    """
    entries: dict[Node, Fraction] = {}  # of the first dimension, for each entry of an input
    for n in nodes:
        spec = BY_TARGET[n.target]
        if spec.argument(n, "mask") is not None:
            return False
        entries[n] = entries.get(n.args[0], Fraction(1))
        if spec.index("sizes") is not None:
            _, index, parts, sizes = n.args
            if (entries[n] / parts).denominator != 1:
                return False
            entries[n] *= Fraction(constants[index.name].shape[1], parts * prod(sizes))
        if entries[n].denominator != 1:
            return False
    return True


def images_together(memory: int, weights: int, cache: int) -> int:
    """Return how many images go through a program together.

    As many as half of the last cache holds; more where reading the weights again for each would be the larger part.

    Args:
        memory: bytes of activations of one image.
        weights: bytes of all weights.
        cache: bytes of the CPU's last cache, 0 where that is unknown.

    >>> images_together(10 << 20, 8 << 20, 32 << 20), images_together(10 << 20, 100 << 20, 32 << 20)
    (1, 5)
    """
    limit = MAX_IN_FLIGHT // memory
    in_cache = min(MAX_IN_FLIGHT, cache // 2 or MAX_IN_FLIGHT) // memory
    return max(1, in_cache, min(limit, weights // (2 * memory)))
