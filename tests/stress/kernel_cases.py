"""Random calls of each function of csrc/rarefy.h, compared with torch in double precision or with plain loops.

A case follows from the name of the function and a seed. Buffers have exactly the size that the header promises, so that
AddressSanitizer sees a read or write beyond them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.quantized_weights import GRIDS, TWO_TERM_GRIDS, on_grid
from rarefy.common.errors import FormatError
from rarefy.quantization.scale_fitting import _native_mse, _squared_error, mse_in_torch
from rarefy.runtime import bindings, packing, reference
from rarefy.runtime.kernel import MAX_GROUPED, GroupedKernels, Kernel, _conv_struct
from rarefy.runtime.pack_panels import pack_quantized
from rarefy.runtime.packed_formats import ROW_KINDS, ConvTiles, QuantizedPanels

HEADER = Path(__file__).parents[2] / "csrc" / "rarefy.h"
EDGES = (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 66, 96, 127, 128, 129, 130, 192,
         255, 256, 257)  # fmt: skip
DAMAGED = 0.15  # share of weights with a damaged tensor, which the check must refuse or the kernel survive
CANARY = 12345.0  # between rows of outputs
INVALID = 1  # RAREFY_INVALID


class Case:
    """What a case draws from: a seeded source of numbers, whole and random."""

    def __init__(self, name: str, seed: int):
        self.rng = random.Random(f"{name} {seed}")
        torch.manual_seed(self.rng.getrandbits(60))
        self.threads = torch.get_num_threads()
        self.activations: tuple[str | None, ...] = bindings.ACTIVATIONS  # to choose from

    def size(self, most: int = 257) -> int:
        """Return a size, most often one at the edge of a vector, a tile or a slab."""
        edges = [n for n in EDGES if n <= most]
        return self.rng.choice(edges) if self.rng.random() < 0.8 else self.rng.randint(1, most)

    def rows(self, most: int = 200) -> int:
        """Return a number of inputs, at times 0."""
        return 0 if self.rng.random() < 0.04 else self.size(most)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def weight(self, *shape: int) -> Tensor:
        """Return a weight with zeros in blocks, at times with whole rows or columns of zeros, or nothing else."""
        W = torch.randn(shape).mul_(10 ** self.rng.uniform(-2, 2))
        sparsity = self.rng.choice((0.0, 0.3, 0.5, 0.8, 0.95, 1.0))
        rows, columns = self.rng.choice(
            ((1, 1), (1, 1), (4, 1), (1, 2), (1, 4), (16, 1), (shape[0], 1), (1, W[0].numel()))
        )
        flat = W.view(shape[0], -1)
        keep = torch.rand(-(-shape[0] // rows), -(-flat.shape[1] // columns)) >= sparsity
        flat *= keep.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : flat.shape[1]]
        return W

    def bias(self, outputs: int) -> Tensor | None:
        return torch.randn(outputs) if self.chance(0.7) else None

    def activation(self) -> str | None:
        return self.rng.choice(self.activations)

    def damage(self, packed: Any) -> Any:
        """Return a packed weight with some changed bits."""
        names = [n for n, v in vars(packed).items() if isinstance(v, Tensor) and v.numel()]
        if not names:
            return packed
        name = self.rng.choice(names)
        tensor = getattr(packed, name)
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        octets = tensor.view(-1).view(torch.uint8)
        for _ in range(self.rng.randint(1, 3)):
            octets[self.rng.randrange(len(octets))] ^= 1 << self.rng.randrange(8)
        return replace(packed, **{name: tensor})


@dataclass
class Rows:
    """Rows of numbers in memory that ends with the last one; between them there are gaps that nobody may touch."""

    memory: Tensor
    count: int
    width: int
    stride: int

    @staticmethod
    def of(values: Tensor, gap: int) -> Rows:
        """Return a copy of rows [count, width]."""
        count, width = values.shape
        made = Rows(
            torch.full(((count - 1) * (width + gap) + width if count else 0,), CANARY), count, width, width + gap
        )
        made.values.copy_(values)
        return made

    @property
    def values(self) -> Tensor:
        """The rows as a view [count, width]."""
        return self.memory.as_strided((self.count, self.width), (self.stride, 1))

    def check_gaps(self) -> None:
        """Raise AssertionError where a number between rows has changed."""
        gaps = self.memory.clone()
        gaps.as_strided((self.count, self.width), (self.stride, 1)).fill_(CANARY)
        assert bool((gaps == CANARY).all()), "numbers between the rows of the output have changed"


def close(got: Tensor, want: Tensor, tolerance: Tensor | float, what: str) -> None:
    """Raise AssertionError unless each number is as near as it must be."""
    wrong = ~((got.double() - want.double()).abs() <= tolerance)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {float(got[at])} at {list(at)}, expected {float(want[at])}, {int(wrong.sum())} differ"
        )


def product(packed: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x W^T + bias in double precision, and what rounding may change of each number."""
    by_blocks = bindings.scales_blocks(rows=True)
    seen, W = reference.rounded(x, packed, by_blocks).double(), packing.unpack(packed).double()
    added = torch.zeros(len(W)) if bias is None else bias
    two_terms = isinstance(packed, QuantizedPanels) and packed.two_terms
    size = seen.abs() @ W.abs().T + added.abs().double()
    return seen @ W.T + added, size * (1e-4 if two_terms else 1e-5) + 1e-30


def run_matrix(case: Case, packed: Any, O: int, C: int) -> None:
    """Run a packed weight on rows with gaps between them, with a bias, a residual and an activation."""
    damaged = case.chance(DAMAGED)
    bias, act, N = case.bias(O), case.activation(), case.rows()
    try:
        kernel = Kernel(case.damage(packed) if damaged else packed, bias, act)
    except FormatError:
        assert damaged, "a valid weight was refused"
        return
    x = Rows.of(torch.randn(N, C) * 10 ** case.rng.uniform(-3, 3), case.rng.choice((0, 0, 1, 7)))
    y = Rows.of(torch.full((N, O), float("nan")), case.rng.choice((0, 0, 1, 5)))
    residual = Rows.of(torch.randn(N, O), y.stride - O) if case.chance(0.4) else None
    added = None if residual is None else residual.memory.data_ptr()
    code = kernel.call(kernel.at, x.memory.data_ptr(), x.stride, added, y.memory.data_ptr(), y.stride, N)
    assert not code, f"error code {code}"
    y.check_gaps()
    if damaged:
        return
    want, tolerance = product(packed, x.values, bias)
    if residual is not None:
        want, tolerance = want + residual.values, tolerance + 1e-6 * residual.values.abs()
    tolerance = tolerance + 1e-6 * want.abs().clamp(0.5, 100) if act else tolerance
    close(y.values, reference.ACTIVATIONS[act](want), 1.2 * tolerance, f"{packed.kind} {O}x{C}, {N} rows, {act}")


def sparse_case(pack: Callable[..., Any], kinds: tuple[str, ...], block: bool = False) -> Callable[[Case], None]:
    """Return the case of a sparse format."""

    def run(case: Case) -> None:
        kind, O, C = case.rng.choice(kinds), case.size(), case.size(600)
        W = case.weight(O, C)
        options = {"block": case.rng.choice((1, 3, 16, 32, 100, 128, 1000))} if block and case.chance(0.7) else {}
        packed = pack(W, kind, **options)
        if kind != "int4":
            V, scales = packing.stored(W, kind)
            assert torch.equal(packing.unpack(packed), V.float() if scales is None else V.float() * scales[:, None])
        run_matrix(case, packed, O, C)

    return run


def random_panels(case: Case, O: int, way: tuple[Any, ...] | None = None, two: bool | None = None) -> Any:
    """Return quantized panels of random bits, groups and zero points, and one of the ways to read inputs."""
    two_terms = case.chance(0.5) if two is None else two
    way = way or case.rng.choice(TWO_TERM_GRIDS if two_terms else GRIDS)
    group = way[1]
    C = group * case.size(12) if isinstance(group, int) else case.size(600)
    fp32_inputs = not two_terms and case.chance(0.5)
    return pack_quantized(*on_grid(O, C, *way), fp32_inputs, two_terms)


def quantized(case: Case) -> None:
    """Run quantized panels."""
    O = case.size()
    packed = random_panels(case, O)
    run_matrix(case, packed, O, packed.shape[1])


def dequantize_rows(case: Case) -> None:
    """Dequantize rows by their index, at times one that is out of range."""
    kernel = Kernel(random_panels(case, case.size()))
    O, C = kernel.shape
    ids = torch.randint(O, (case.rows(),))
    wrong = len(ids) > 0 and case.chance(0.2)
    if wrong:
        ids[case.rng.randrange(len(ids))] = case.rng.choice((-1, O, 1 << 40, -(1 << 62)))
    out = torch.full((len(ids), C), CANARY)
    code = bindings.library().rarefy_dequantize_rows(kernel.at, ids.data_ptr(), len(ids), out.data_ptr())
    assert code == (INVALID if wrong else 0)
    if wrong:
        assert bool((out == CANARY).all())
        return
    W = packing.unpack(kernel.held[0])[ids]
    close(out, W, 1e-6 * W.abs() + 1e-7, "rows")


def grouped(case: Case) -> None:
    """Run several weights of one format on the same inputs."""
    how, kind, C, count = (
        case.rng.randrange(5),
        case.rng.choice(ROW_KINDS),
        case.size(300),
        case.rng.randint(1, MAX_GROUPED),
    )
    packs = (packing.pack_bitmask, packing.pack_csr, packing.pack_tiles, packing.pack_sell)
    two, way = case.chance(0.5), case.rng.choice(TWO_TERM_GRIDS[:4])
    weights = []
    for _ in range(count):
        if how < len(packs):
            weights.append(packs[how](case.weight(case.size(140), C), kind))
        else:
            W, grid = on_grid(case.size(140), 192, *way)
            weights.append(pack_quantized(W, grid, False, two))
    kernels = [Kernel(w, case.bias(w.shape[0]), case.activation()) for w in weights]
    x = torch.randn(case.rows(100), weights[0].shape[1])
    for y, kernel in zip(GroupedKernels(kernels).run(x), kernels):
        want, tolerance = product(kernel.held[0], x, kernel.held[1])
        act = bindings.ACTIVATIONS[kernel.struct.act]
        tolerance = tolerance + 1e-6 * want.abs().clamp(0.5, 100)
        close(y, reference.ACTIVATIONS[act](want), 1.2 * tolerance, f"one of {count} {type(kernel.held[0]).__name__}")


def geometry(case: Case, max_stride: int = 8) -> dict[str, tuple[int, int]]:
    """Return kernel, stride, padding and dilation of a convolution."""
    pick = case.rng.choice

    def pair(choices: tuple[int, ...]) -> tuple[int, int]:
        first = pick(choices)
        return (first, first) if case.chance(0.6) else (first, pick(choices))

    strides = tuple(s for s in (1, 1, 1, 2, 2, 3, 4, 8) if s <= max_stride)
    return {"kernel": pair((1, 1, 2, 3, 3, 5, 7)), "stride": pair(strides), "padding": pair((0, 0, 1, 2, 3)),
            "dilation": pair((1, 1, 1, 2, 3))}  # fmt: skip


def image_sizes(case: Case, shape: dict[str, tuple[int, int]], most: int = 24) -> list[int]:
    """Return height and width of an image over which a kernel runs."""
    least = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(shape["kernel"], shape["padding"], shape["dilation"])]
    return [max(1, low, case.size(most)) for low in least]


def random_conv(case: Case, shape: dict[str, tuple[int, int]]) -> Any:
    """Return the packed weight of a convolution in fp32."""
    groups = case.rng.choice((1, 1, 1, 2, 3, 4))
    O, I = groups * case.size(70 // groups), case.size(40)
    sell = groups == 1 and case.chance(0.5)
    options: Any = {n: shape[n] for n in ("stride", "padding", "dilation")}
    block = case.rng.choice((5, 16, 100, 128, 192, 256))
    return packing.pack_conv(case.weight(O, I, *shape["kernel"]), **options, groups=groups, block=block, sell=sell)


def conv(case: Case) -> None:
    """Run a sparse convolution on contiguous images."""
    shape = geometry(case)
    packed: ConvTiles = random_conv(case, shape)
    damaged = case.chance(DAMAGED)
    (O, I, *_), act, sizes = packed.shape, case.activation(), image_sizes(case, shape)
    bias, N = case.bias(O), 0 if case.chance(0.04) else case.rng.choice((1, 1, 2, 3, 5))
    try:
        kernel = Kernel(case.damage(packed) if damaged else packed, bias, act)
    except FormatError:
        assert damaged, "a valid weight was refused"
        return
    x = torch.randn(N, I * packed.groups, *sizes)
    W, options = packing.unpack(packed).double(), (packed.stride, packed.padding, packed.dilation, packed.groups)
    want = torch.nn.functional.conv2d(x.double(), W, None if bias is None else bias.double(), *options)
    size = torch.nn.functional.conv2d(x.abs().double(), W.abs(), None, *options) + (
        0 if bias is None else bias.abs().max()
    )
    y = torch.full(want.shape, float("nan"))
    residual = torch.randn(want.shape) if case.chance(0.4) else None
    added = None if residual is None else residual.data_ptr()
    code = kernel.call(kernel.at, x.data_ptr(), *sizes, added, y.data_ptr(), N)
    assert not code, f"error code {code}"
    if damaged:
        return
    want = want if residual is None else want + residual
    tolerance = 1e-5 * size + 2e-6 * want.abs().clamp(0.5, 100)
    close(y, reference.ACTIVATIONS[act](want), tolerance, f"{list(packed.shape)}, {shape}, images of {sizes}, {act}")


def planes(case: Case) -> None:
    """Find the memory of padded planes, and where each lane reads them, as plain loops do."""
    shape = geometry(case)
    packed, (height, width) = random_conv(case, shape), image_sizes(case, shape)
    kernel = Kernel(packed)
    struct = kernel.struct if isinstance(kernel.struct, bindings.Conv) else _conv_struct(packed, kernel.struct)
    (down, right), (up, left), (di, dj) = shape["stride"], shape["padding"], shape["dilation"]
    rows, columns = -(-(height + 2 * up) // down), -(-(width + 2 * left) // right)
    taps = [(i * di, j * dj) for i in range(shape["kernel"][0]) for j in range(shape["kernel"][1])]
    phases = list(dict.fromkeys((i % down, j % right) for i, j in taps))
    floats = bindings.library().rarefy_padded_image_floats(struct, height, width)
    assert floats == struct.inputs * len(phases) * rows * columns
    offsets = torch.full((struct.inputs * len(taps),), -1, dtype=torch.int32)
    bindings.library().rarefy_indirection_offsets(struct, height, width, offsets.data_ptr())
    want = [((c * len(phases) + phases.index((i % down, j % right))) * rows + i // down) * columns + j // right
            for c in range(struct.inputs) for i, j in taps]  # fmt: skip
    assert offsets.tolist() == want


def fit_scales(case: Case) -> None:
    """Fit scales of blocks of weights; the error is at most that of the same search in torch."""
    bits, symmetric = case.rng.randint(2, 8), case.chance(0.5)
    X = case.weight(case.size(140), case.size(400))
    weigh = torch.rand(X.shape) if case.chance(0.5) else None
    got, want = (fit(X, bits, symmetric, weigh) for fit in (_native_mse, mse_in_torch))
    errors = [_squared_error(X, bits, *grid, weigh).double() for grid in (got, want)]
    close(errors[0], errors[1], 1e-3 * errors[1] + 1e-9 * X.square().sum(1), f"squared errors of {bits} bits")


def ceiling(case: Case) -> None:
    """Measure a ceiling for an instant; 0 stands for a kind that there is not, or too little memory."""
    kind, nbytes = case.rng.randint(-1, 8), case.rng.choice((0, 1000, 1 << 16, 300_001, 1 << 20))
    memory = torch.ones(nbytes, dtype=torch.uint8)
    rate = bindings.library().rarefy_measure_ceiling(kind, 1e-4, memory.data_ptr() if nbytes else None, nbytes)
    enough = nbytes // case.threads >= 1 << 16
    assert (rate > 0) == (kind in (0, 1, 2, 6) or (kind == 3 and enough)), (kind, nbytes, rate)


def settings(case: Case) -> None:
    """Read and change what a process sets once."""
    library, before = bindings.library(), str(bindings.isa())
    assert library.rarefy_abi_version() == bindings.ABI_VERSION
    name = case.rng.choice((*bindings.ISAS, "", "avx", "avx5122", "x" * 300))
    refused = library.rarefy_set_isa(name.encode())
    assert refused == INVALID if name not in bindings.ISAS else refused in (0, INVALID)
    assert bindings.isa() == (before if refused else name)
    flags = [library.rarefy_scales_blocks(0), library.rarefy_scales_blocks(1), library.rarefy_multiplies_bf16()]
    assert set(flags) <= {0, 1}
    bindings.use(before)


CASES: dict[str, tuple[Callable[[Case], None], tuple[str, ...]]] = {  # and the functions of the header that each calls
    "bitmask": (sparse_case(packing.pack_bitmask, (*ROW_KINDS, "int4")), ("run_bitmask", "check_bitmask")),
    "csr": (sparse_case(packing.pack_csr, ROW_KINDS), ("run_csr", "check_csr")),
    "tiles": (sparse_case(packing.pack_tiles, ROW_KINDS, block=True), ("run_tiles", "check_tiles")),
    "sell": (sparse_case(packing.pack_sell, ROW_KINDS, block=True), ("run_sell", "check_sell")),
    "quantized": (quantized, ("run_quantized", "check_quantized")),
    "dequantize rows": (dequantize_rows, ("dequantize_rows",)),
    "grouped": (grouped, ("run_grouped",)),
    "conv": (conv, ("run_conv", "check_conv")),
    "planes": (planes, ("padded_image_floats", "indirection_offsets")),
    "fit scales": (fit_scales, ("fit_scales",)),
    "ceiling": (ceiling, ("measure_ceiling",)),
    "settings": (
        settings,
        ("abi_version", "isa", "set_isa", "scales_blocks", "multiplies_bf16", "set_parallel_for"),
    ),
}


def functions() -> set[str]:
    """Return the functions that the header declares, without their prefix."""
    text = re.sub(r"//[^\n]*", "", HEADER.read_text(encoding="utf-8"))
    return {n for n in re.findall(r"\brarefy_(\w+)\(", text) if not n.endswith("_fn")}
