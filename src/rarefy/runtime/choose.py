"""`accelerate_`: every way to run a layer is timed on this machine, and the fastest takes its place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rarefy.errors import ModelError
from rarefy.model.select import Layer, Selector, select
from rarefy.progress import track
from rarefy.proof.measure import compare, resident_bytes
from rarefy.proof.report import Report
from rarefy.runtime import native
from rarefy.runtime.layers import SparseLinear
from rarefy.runtime.packed import KINDS, Packed, pack_bitmask, pack_tiles

FEW = 0.1  # zeros below which nothing is tried
GAIN = 1.03  # how much faster than dense a kernel must be
MOST_INPUTS = 64  # of a call that the bitmask is tried for
FLUSH = 64 << 20  # bytes that are read between two runs, so that weights come from memory as they do in a large model
CACHED = 16 << 20  # bytes of all weights up to which they stay in the cache
NAMES = {dtype: kind for kind, dtype in KINDS.items() if dtype.is_floating_point}  # of the numbers a layer may have
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # take the weights of their layers themselves


def accelerate_(
    model: nn.Module,
    batch: Sequence[int] = (1, 16, 128),
    *,
    layers: Selector = None,
    ignore: Selector = None,
    repeats: int = 11,
    progress: bool = False,
) -> Report:
    """Replace Linear layers that have zeros by ones that skip them, where that is faster here; return what was chosen.

    batch    numbers of inputs in a call (samples x tokens) for which a choice is made; those between go to the nearest
    repeats  timings of each way, in turns
    Masks must have been folded. Outputs stay the same up to rounding. Raises ModelError, SelectorError.
    O(ways x calls), once for each distinct shape.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    >>> accelerate_(net).rows[0]["why"]
    'dense: 0.00% zeros'
    """
    if (
        not isinstance(batch, Sequence)
        or not batch
        or any(not isinstance(b, int) or isinstance(b, bool) or b < 1 for b in batch)
    ):
        raise ModelError(f"batch is a list of whole numbers from 1 up, got {batch!r}")
    if not isinstance(repeats, int) or repeats < 1:
        raise ModelError(f"repeats is a whole number from 1 up, got {repeats!r}")
    sizes = sorted(set(batch))
    chosen = select(model, layers, ignore)
    masked = [l.full_name for l in chosen if parametrize.is_parametrized(l.module)]
    if masked:
        raise ModelError(f"masks are still attached to {', '.join(masked)}: fold_ the model first")
    idle = next((l.full_name for l in chosen if l.weight.is_meta), None)
    if idle is not None:
        raise ModelError(f"{idle} is on the meta device: it has no values yet; load its weights first")
    uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    parents = {
        f"{name}.{child}".lstrip("."): (m, uses[id(c)])
        for name, m in model.named_modules()
        for child, c in m.named_children()
    }
    before, rows = resident_bytes(model), []
    flush = torch.zeros(FLUSH // 4) if before > CACHED else None
    known: dict[Any, dict[int, tuple[str, float]]] = {}
    for layer in track(chosen, "choosing kernels", progress, len(chosen)):
        weight = layer.weight.detach()
        zeros = float((weight == 0).float().mean())
        row: dict[str, Any] = {"layer": layer.full_name, "shape": "x".join(map(str, weight.shape)), "sparsity": zeros}
        row |= {f"batch {b}": "dense" for b in sizes}
        why = _why_dense(layer, parents, zeros)
        if why is None:
            linear: Any = layer.module
            ways = _ways(weight)
            key = (tuple(weight.shape), weight.dtype, round(zeros, 2), _fill(ways))
            if key not in known:
                known[key] = _fastest(weight, linear.bias, ways, sizes, repeats, flush)
            best = known[key]
            row |= {
                f"batch {b}": name if name == "dense" else f"{name} {gain:.2f}x" for b, (name, gain) in best.items()
            }
            if any(name != "dense" for name, _ in best.values()):
                _replace(model, layer, ways, {b: name for b, (name, _) in best.items()})
            else:
                why = "dense is as fast"
        rows.append({**row, "why": "" if why is None else f"dense: {why}"})
    faster = sum(not r["why"] for r in rows)
    summary = {"layers that run sparse": f"{faster} of {len(rows)}", "instruction set": native.isa() or "none"}
    summary |= {"bytes in memory": before, "bytes in memory after": resident_bytes(model)}
    return Report("accelerated", tuple(rows), summary)


def _why_dense(layer: Layer, parents: dict[str, tuple[nn.Module, int]], zeros: float) -> str | None:
    """Why a layer is not even tried, or None; `parents`: of each layer, and how often it is used."""
    module = layer.module
    if native.missing() is not None:
        return native.missing()
    if not layer.name:
        return "it is the whole model: put it into a module"
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return "its hooks would be lost"
    if type(module).forward is not nn.Linear.forward or layer.param != "weight":
        return f"no kernel for {type(module).__name__} yet"
    if len(layer.owners) > 1 or layer.elsewhere or parents[layer.name][1] > 1:
        return "its weight is shared"
    if isinstance(parents[layer.name][0], READERS):
        return f"{type(parents[layer.name][0]).__name__} reads its weight itself"
    if layer.weight.dtype not in NAMES or layer.weight.device.type != "cpu":
        return f"{layer.weight.dtype} on {layer.weight.device.type}"
    return f"{zeros:.2%} zeros" if zeros < FEW else None


def _ways(weight: Tensor) -> dict[str, Packed]:
    kind = NAMES[weight.dtype]
    return {"bitmask": pack_bitmask(weight, kind), "tiles": pack_tiles(weight, kind)}


def _fill(ways: dict[str, Packed]) -> float:
    """How many of four outputs share a column, in the mean: what blocks of zeros change in the time of tiles."""
    tiles: Any = ways["tiles"]
    return round(len(tiles.values) / max(1, len(tiles.columns)), 1)


def _fastest(
    weight: Tensor,
    bias: Tensor | None,
    ways: dict[str, Packed],
    sizes: Sequence[int],
    repeats: int,
    flush: Tensor | None,
) -> dict[int, tuple[str, float]]:
    """The fastest way for each number of inputs, and how many times faster than dense it is."""
    layers = {name: SparseLinear({1: form}, bias) for name, form in ways.items()}
    best = {}
    for size in sizes:
        x = torch.randn(size, weight.shape[1]).to(weight.dtype)
        runs: dict[str, Callable[[], Any]] = {"dense": lambda x=x: F.linear(x, weight, bias)}
        runs |= {
            name: lambda x=x, layer=layer: layer(x)
            for name, layer in layers.items()
            if name != "bitmask" or size <= MOST_INPUTS
        }
        before = flush.sum if flush is not None else lambda: None
        times = compare(runs, repeats=repeats, warmup=1, before=before)
        medians = {name: t.median for name, t in times.items()}
        name = min(medians, key=lambda n: medians[n])
        gain = medians["dense"] / medians[name]
        best[size] = (name, gain) if gain >= GAIN else ("dense", 1.0)
    return best


def _replace(model: nn.Module, layer: Layer, ways: dict[str, Packed], best: dict[int, str]) -> None:
    """Put a layer with the chosen forms in the place of a dense one."""
    module: Any = layer.module
    sizes = sorted(best)
    starts = [1, *(math.isqrt(a * b) + 1 for a, b in pairwise(sizes))]
    forms: dict[int, Packed | Tensor] = {}
    last = None
    for start, size in zip(starts, sizes):
        if best[size] != last:
            last = best[size]
            forms[start] = module.weight.detach() if last == "dense" else ways[last]
    if last == "bitmask":  # not tried beyond
        forms.setdefault(MOST_INPUTS + 1, module.weight.detach())
    parent, _, leaf = layer.name.rpartition(".")
    sparse = SparseLinear(forms, module.bias).train(module.training)
    setattr(model.get_submodule(parent), leaf, sparse)
