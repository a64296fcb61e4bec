"""The ways in which a layer can run, and how long each takes here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.evaluation.profiling import Times, compare
from rarefy.model.activation_quant import get_inputs
from rarefy.model.quant_grid import Grid, notes
from rarefy.runtime import tuning_cache
from rarefy.runtime.packed_formats import KINDS, MOST_COLUMNS, NEAR, Packed, Panels
from rarefy.runtime.packing import pack_bitmask, pack_conv, pack_csr, pack_panels, pack_sell, pack_tiles, shared
from rarefy.runtime.sparse_layers import Sparse, SparseConv, SparseLinear, geometry

GAIN = 1.03  # how much faster than dense a kernel must be
CLOSE = 1.1  # times that timing does not tell apart for certain
MOST_INPUTS = 32  # of a call that the ways for few inputs are tried for
FOR_FEW = ("bitmask", "csr")
FEW = 0.1  # zeros below which nothing is skipped
SCATTERED = 0.6  # zeros from which single values with their columns are tried
FLUSH = 64 << 20  # bytes that are read between two runs, so that weights come from memory as they do in a large model
CACHED = 16 << 20  # bytes of all weights up to which they stay in the cache
NUMBERS = {dtype: kind for kind, dtype in KINDS.items() if dtype.is_floating_point}  # that a layer may have


@dataclass
class Clock:
    """Finds what is fastest for a layer, or knows it: `file` keeps it where there is one.

    repeats  timings of each way, in turns
    flush    what is read between two runs, None for small models
    """

    repeats: int
    flush: Tensor | None
    file: Path | None
    known: dict[str, tuning_cache.Choice] = field(default_factory=dict)

    @classmethod
    def of(cls, repeats: int, model_bytes: int, file: Path | None = None) -> Clock:
        flush = torch.zeros(FLUSH // 4) if model_bytes > CACHED else None
        return cls(repeats, flush, file, {} if file is None else tuning_cache.read(file))

    def best(
        self, dense: Any, ways: Mapping[str, Packed], build: Callable[..., Sparse], inputs: Mapping[int, Tensor]
    ) -> tuning_cache.Choice:
        """Return the fastest way for each number of inputs, and how many times as fast as dense it is."""
        zeros, how = float((dense.weight == 0).float().mean()), geometry(dense) if not _linear(dense) else {}
        shapes = [(x.shape, x.stride()) for x in inputs.values()]
        about = (
            list(dense.weight.shape),
            dense.weight.dtype,
            [(n, w.kind, getattr(w, "exact", None)) for n, w in ways.items()],
            round(zeros, 2),
        )
        key = str((*about, _fill(ways), shapes, how, self.flush is None))
        if not _fits(self.known.get(key), ways, list(inputs)):
            self.known[key] = fastest(dense, {n: build({1: w}) for n, w in ways.items()}, inputs, self)
            if self.file is not None:
                tuning_cache.write(self.file, {key: self.known[key]})
        return self.known[key]

    def times(self, dense: nn.Module, layers: Mapping[str, Sparse], x: Tensor) -> dict[str, Times]:
        """Return the times of the dense layer and of each sparse one that fits so many inputs, in turns."""
        fitting = {n: l for n, l in layers.items() if n not in FOR_FEW or len(x) <= MOST_INPUTS}
        runs: dict[str, Callable[[], Any]] = {n: partial(l, x) for n, l in {"dense": dense, **fitting}.items()}
        before = self.flush.sum if self.flush is not None else lambda: None
        return compare(runs, repeats=self.repeats, warmup=1, before=before)


def fastest(
    dense: nn.Module, layers: Mapping[str, Sparse], inputs: Mapping[int, Tensor], clock: Clock
) -> tuning_cache.Choice:
    """Return the fastest way for each number of inputs; dense where none is faster by 3 %. Of those as fast to a tenth
    it is the one of fewest bytes: alone a layer finds the caches empty, in a model it shares them."""
    best = {}
    size_of = {n: sum(t.nbytes for t in (*l.parameters(), *l.buffers())) for n, l in layers.items()}
    for size, x in inputs.items():
        medians = {name: t.median for name, t in clock.times(dense, layers, x).items()}
        name = min(medians, key=lambda n: medians[n])
        if name != "dense":
            close = [n for n in layers if n in medians and medians[n] <= CLOSE * medians[name]]
            name = min(close, key=lambda n: size_of[n])
        gain = medians["dense"] / medians[name]
        best[size] = (name, gain) if gain >= GAIN else ("dense", 1.0)
    return best


def ways_of(module: Any, values: str | None = None) -> tuple[dict[str, Packed], Callable[..., Sparse]]:
    """Return the packed forms of a layer's weight, and what builds a layer of some of them."""
    weight = module.weight.detach()
    if _linear(module):
        rounds = get_inputs(module) is not None
        values = "int8" if rounds else values  # these kernels round inputs just so
        grid, zeros = grid_of(module), float((weight == 0).float().mean())
        kind = values or NUMBERS[weight.dtype]
        ways: dict[str, Packed] = {}
        if grid is not None and why_no_panels(weight, grid) is None:
            ways["panels"] = pack_panels(weight, grid, values is None)
        if zeros >= SCATTERED and weight.shape[1] <= MOST_COLUMNS and not rounds:
            ways["csr"] = pack_csr(weight, kind, grid)
        if grid is None or zeros >= FEW:
            ways["bitmask"] = pack_bitmask(weight, kind, grid)
        if grid is None or zeros >= FEW or values is not None:
            ways["sell"] = pack_sell(weight, kind, grid=grid)
            ways["tiles"] = pack_tiles(weight, kind, grid=grid)
        return ways, partial(SparseLinear, bias=module.bias, rounds=rounds)
    image, how = _as_images(weight), geometry(module)
    sell = {"convolution, sell": pack_conv(image, **how, block=NEAR, sell=True)} if module.groups == 1 else {}
    return {**sell, "convolution": pack_conv(image, **how)}, partial(SparseConv, like=module)


def grid_of(module: Any) -> Grid | None:
    """Return the grid on which a layer's weight lies, as noted beside it."""
    grid = notes(module).get("weight")
    return grid if isinstance(grid, Grid) and grid.holds(module.weight.detach()) else None


def why_no_panels(weight: Tensor, grid: Grid) -> str | None:
    """Return why no kernel reads a weight's grid, or None."""
    if weight.dim() != 2:
        return "no kernel for grids of convolutions yet"
    many = weight.shape[1] // grid.scale.shape[1]
    if grid.scale.shape[0] not in (1, len(weight)):
        return f"no kernel for scales of {len(weight) // grid.scale.shape[0]} outputs"
    if grid.scale.shape[1] > 1 and many % 32:
        return f"no kernel for groups of {many} inputs"
    return "no kernel for asymmetric codes of more than 4 bits" if grid.zero is not None and grid.bits > 4 else None


def inputs_of(weight: Tensor, n: int, image: Tensor | None) -> Tensor:
    """Return what a layer is timed on; `image`: what the example gives it."""
    if image is None:
        return torch.randn(n, weight.shape[1]).to(weight.dtype)
    form = torch.channels_last if image.dim() == 4 and not image.is_contiguous() else torch.contiguous_format
    return torch.randn(n, *image.shape[1:], dtype=image.dtype).contiguous(memory_format=form)


def forms_of(module: Any, ways: Mapping[str, Packed], best: tuning_cache.Choice) -> dict[int, Packed | Tensor]:
    """Return the chosen form of a weight from each number of inputs on."""
    sizes, weight = sorted(best), _as_images(module.weight.detach())
    starts = [1, *(math.isqrt(a * b) + 1 for a, b in pairwise(sizes))]
    forms: dict[int, Packed | Tensor] = {}
    last = None
    for start, size in zip(starts, sizes):
        if best[size][0] != last:
            last = best[size][0]
            forms[start] = weight if last == "dense" else ways[last]
    if last in FOR_FEW:  # not tried beyond
        forms.setdefault(MOST_INPUTS + 1, weight)
    return forms


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _as_images(weight: Tensor) -> Tensor:
    return weight.unsqueeze(2) if weight.dim() == 3 else weight


def _fits(choice: tuning_cache.Choice | None, ways: Mapping[str, Packed], sizes: Sequence[int]) -> bool:
    """Whether a choice that was kept is one for these numbers of inputs, among these ways."""
    return choice is not None and list(choice) == list(sizes) and {n for n, _ in choice.values()} <= {*ways, "dense"}


def _fill(ways: Mapping[str, Packed]) -> float:
    """How many of four outputs share a column, in the mean: what blocks of zeros change in the time of tiles."""
    tiles: Any = list(ways.values())[-1]
    return 0.0 if isinstance(tiles, Panels) else round(shared(tiles), 1)
