"""Sparse kernels beside torch's dense ones, timed alternately: milliseconds and speed-up.

    python runtime.py            all kernels, about 5 minutes on two idle cores
    python runtime.py --only bitmask
    python runtime.py --table    only print what was measured last

At batch 1, calls rotate over more weights than the last-level cache holds. Appends one JSON line per case to
results/runtime.jsonl.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.evaluation.profiling import compare
from rarefy.runtime import bindings
from rarefy.runtime.huge_pages import last_cache
from rarefy.runtime.kernel import Kernel
from rarefy.runtime.packed_formats import KINDS, ROW_KINDS
from rarefy.runtime.packing import nbytes, pack_bitmask, pack_conv, pack_csr, pack_tiles
from rarefy.runtime.sparse_layers import SparseLinear
from recording import append, start

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "runtime.jsonl"
WARMUP = 3  # rounds that are not timed
CACHE = max(100 << 20, last_cache())  # bytes of distinct weights at batch 1
SHAPES = [(4096, 1024), (768, 3072)]
# ResNet-50 at 224 x 224: output and input channels, kernel, stride, image size, number of such layers.
CONVOLUTIONS = [
    (64, 64, 1, 1, 56, 1), (64, 64, 3, 1, 56, 3), (256, 64, 1, 1, 56, 4), (64, 256, 1, 1, 56, 2),
    (128, 256, 1, 1, 56, 1), (128, 128, 3, 2, 56, 1), (512, 128, 1, 1, 28, 4), (512, 256, 1, 2, 56, 1),
    (128, 512, 1, 1, 28, 3), (128, 128, 3, 1, 28, 3), (256, 512, 1, 1, 28, 1), (256, 256, 3, 2, 28, 1),
    (1024, 256, 1, 1, 14, 6), (1024, 512, 1, 2, 28, 1), (256, 1024, 1, 1, 14, 5), (256, 256, 3, 1, 14, 5),
    (512, 1024, 1, 1, 14, 1), (512, 512, 3, 2, 14, 1), (2048, 512, 1, 1, 7, 3), (2048, 1024, 1, 2, 14, 1),
    (512, 2048, 1, 1, 7, 2), (512, 512, 3, 1, 7, 2),
]  # fmt: skip


def keep_memory() -> None:
    """Let glibc's malloc keep freed memory: otherwise each call waits for fresh pages, which can take most of its
    time and says nothing about a kernel."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 28)):  # mmap threshold, trim, top pad
            libc.mallopt(option, value)


def random(O: int, C: int, sparsity: float, block: tuple[int, int] = (1, 1)) -> Tensor:
    """Return a random weight with a share of its blocks zero."""
    keep = torch.rand(O // block[0], C // block[1]) >= sparsity
    return torch.randn(O, C) * keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def alternate(runs: Mapping[str, Callable[[], Any]], repeats: int, pause: float = 0.0) -> dict[str, Any]:
    """Return quartiles in milliseconds of runs that take turns, after WARMUP rounds; `pause` as in `compare`."""
    times = compare(runs, repeats=repeats, warmup=WARMUP, pause=pause)
    return {name: [1000 * s for s in (t.low, t.median, t.high)] for name, t in times.items()}


def copy(packed: Any) -> Any:
    """Return a copy of a packed weight."""
    return type(packed)(**{n: v.clone() if isinstance(v, Tensor) else v for n, v in vars(packed).items()})


def few(format: str, kind: str, sparsity: float, n: int = 1) -> dict[str, Any]:
    """Time a 4096 x 4096 layer on few inputs, beside torch's dense product of the same precision."""
    x = torch.randn(n, 4096)
    copies = -(-CACHE // (4096 * 4096 * KINDS[kind].itemsize)) + 1 if kind != "int4" else CACHE // (4096 * 2048) + 1
    if kind == "int4":
        xs, by = x.bfloat16(), torch.rand(4096 // 64, 4096, 2).bfloat16()
        pack = lambda: torch.ops.aten._convert_weight_to_int4pack_for_cpu(  # noqa: E731
            torch.randint(0, 16, (4096, 4096), dtype=torch.int32), 1
        )
        weights = cycle([pack() for _ in range(copies)])
        dense = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(xs, next(weights), 64, by)  # noqa: E731
    elif kind == "int8":
        xs, scales = x.bfloat16(), torch.rand(4096).bfloat16()
        weights = cycle([torch.randint(-127, 128, (4096, 4096)).to(torch.int8) for _ in range(copies)])
        dense = lambda: torch.ops.aten._weight_int8pack_mm(xs, next(weights), scales)  # noqa: E731
    else:
        xs = x.to(KINDS[kind])
        weights = cycle([torch.randn(4096, 4096).to(KINDS[kind]) for _ in range(copies)])
        dense = lambda: F.linear(xs, next(weights))  # noqa: E731
    first = (pack_csr if format == "csr" else pack_bitmask)(random(4096, 4096, sparsity), kind)
    more = [copy(first) for _ in range(CACHE // nbytes(first) + 1)]
    kernels = cycle([Kernel(p) for p in [first, *more]])
    return {"bytes": nbytes(first), **alternate({"dense": dense, "ours": lambda: next(kernels).run(x)}, 40)}


def overhead() -> dict[str, Any]:
    """Time a thousand calls of a layer so small that only the call itself counts."""
    W = torch.zeros(8, 8)
    W[0, 0] = 1
    ours, dense, x = SparseLinear({1: pack_bitmask(W)}, torch.zeros(8)), torch.nn.Linear(8, 8), torch.randn(1, 8)

    def often(layer: torch.nn.Module) -> None:
        for _ in range(1000):
            layer(x)

    return {"bytes": 0, **alternate({"dense": lambda: often(dense), "ours": lambda: often(ours)}, 20)}


def tiles(kind: str, shape: tuple[int, int], n: int, sparsity: float, block: tuple[int, int]) -> dict[str, Any]:
    """Time larger batches. int8 includes the quantization of inputs, beside `_int_mm` alone."""
    O, C = shape
    x = torch.randn(n, C)
    if kind == "int8":
        xi, wi = (torch.randint(-127, 128, s).to(torch.int8) for s in ((n, C), (O, C)))
        dense = lambda: torch.ops.aten._int_mm(xi, wi.T)  # noqa: E731
    else:
        xs, w = x.to(KINDS[kind]), torch.randn(O, C).to(KINDS[kind])
        dense = lambda: F.linear(xs, w)  # noqa: E731
    packed = pack_tiles(random(O, C, sparsity, block), kind)
    kernel = Kernel(packed)
    return {"bytes": nbytes(packed), **alternate({"dense": dense, "ours": lambda: kernel.run(x)}, 25)}


def convolution(shape: tuple[int, ...], n: int, sparsity: float) -> dict[str, Any]:
    """Time one layer of ResNet-50 on n images, beside torch's dense convolution (oneDNN)."""
    O, I, k, stride, size, _ = shape
    x, W, pad = torch.randn(n, I, size, size), torch.randn(O, I, k, k), k // 2
    packed = pack_conv(random(O, I * k * k, sparsity).view(O, I, k, k), stride=(stride, stride), padding=(pad, pad))
    kernel = Kernel(packed)
    dense = lambda: F.conv2d(x, W, None, stride, pad)  # noqa: E731
    return {"bytes": nbytes(packed), **alternate({"dense": dense, "ours": lambda: kernel.run(x)}, 15 if n > 1 else 30)}


def cases() -> list[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]]:
    found: list[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = []
    found.append(("overhead", {"kind": "fp32", "shape": "8x8", "batch": 1, "pattern": "", "sparsity": 0.98}, overhead))
    for kind in (*ROW_KINDS, "int4"):
        for s in (0.5, 0.7, 0.9):
            about = {"kind": kind, "shape": "4096x4096", "batch": 1, "pattern": "unstructured", "sparsity": s}
            found.append(("bitmask", about, lambda kind=kind, s=s: few("bitmask", kind, s)))
    for kind, n, s in [("fp32", 1, 0.95), ("fp32", 8, 0.95), ("bf16", 1, 0.95), ("fp32", 1, 0.99)]:
        about = {"kind": kind, "shape": "4096x4096", "batch": n, "pattern": "unstructured", "sparsity": s}
        found.append(("csr", about, lambda kind=kind, n=n, s=s: few("csr", kind, s, n)))
    plan = [
        ("fp32", (1, 1), (64, 128, 512)),
        ("fp32", (4, 1), (128,)),
        ("bf16", (1, 2), (128,)),
        ("int8", (1, 4), (128,)),
    ]
    for kind, block, batches in plan:
        for shape in SHAPES:
            for n in batches:
                for s in (0.5, 0.7, 0.8, 0.9, 0.95):
                    pattern = "unstructured" if block == (1, 1) else "x".join(map(str, block))
                    about = {"kind": kind, "shape": "x".join(map(str, shape)), "batch": n}
                    about |= {"pattern": pattern, "sparsity": s}
                    run = lambda k=kind, sh=shape, n=n, s=s, b=block: tiles(k, sh, n, s, b)  # noqa: E731
                    found.append(("tiles", about, run))
    for n in (1, 16):
        for conv in CONVOLUTIONS:
            for s in (0.8, 0.9):
                O, I, k, stride, size, count = conv
                about = {"kind": "fp32", "shape": f"{O}x{I}x{k}x{k}/{stride} on {size}x{size}", "batch": n}
                about |= {"pattern": "unstructured", "sparsity": s, "layers": count}
                found.append(("convolution", about, lambda c=conv, n=n, s=s: convolution(c, n, s)))
    return found


def means(lines: list[dict[str, Any]]) -> str:
    """Return the geometric mean of the speed-ups of convolutions over shapes."""
    ratios: dict[tuple[Any, ...], dict[str, float]] = {}
    for line in lines:
        if line["format"] == "convolution":
            same = ratios.setdefault((line["batch"], line["sparsity"]), {})
            same[line["shape"]] = line["dense"][1] / line["ours"][1]
    told = {k: math.exp(sum(map(math.log, v.values())) / len(v)) for k, v in sorted(ratios.items())}
    return "\n".join(f"convolutions, batch {n}, {s:.0%}: {r:.2f} times as fast" for (n, s), r in told.items())


def table(lines: list[dict[str, Any]]) -> str:
    """Return one row per case: medians in milliseconds, and the speed-up."""
    names = ("format", "kind", "shape", "batch", "pattern", "sparsity")
    rows = [f"| {' | '.join([*names, 'dense, ms', 'ours, ms', 'times as fast'])} |", "|---" * 9 + "|"]
    for line in {tuple(l[n] for n in names): l for l in lines}.values():
        dense, ours = line["dense"][1], line["ours"][1]
        cells = [str(line[n]) for n in names] + [f"{dense:.3f}", f"{ours:.3f}", f"{dense / ours:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["overhead", "bitmask", "csr", "tiles", "convolution"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    keep_memory()
    if not args.table:
        start(args.out)
    for format, about, run in [] if args.table else cases():
        if args.only not in (None, format):
            continue
        line = {"format": format, **about, **run(), "isa": bindings.isa(), "threads": torch.get_num_threads()}
        append(args.out, line)
        print(table([line]).splitlines()[-1], flush=True)
    if args.table and args.out.is_file():
        lines = [json.loads(l) for l in args.out.read_text().splitlines()]
        lines = [l for l in lines if l["machine"]["cpu"] == lines[-1]["machine"]["cpu"]]
        print(table(lines), means(lines), sep="\n\n")


if __name__ == "__main__":
    main()
