"""Time the candidates of a layer on this machine, choose the fastest, and remember it in the tuning cache."""

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
from rarefy.runtime import tuning_cache
from rarefy.runtime.candidates import Candidate, as_images, build_layer
from rarefy.runtime.packed_formats import ConvTiles, Packed, Tiles
from rarefy.runtime.packing import shared
from rarefy.runtime.sparse_layers import Sparse, geometry
from rarefy.runtime.tuning_cache import Choice

MIN_SPEEDUP = 1.03  # over dense, to be chosen
SAME_SPEED = 1.1  # ratio of two times below which timing does not tell them apart
FLUSH_BYTES = 64 << 20  # read between two runs, so that weights come from memory as they do in a large model
CACHED_BYTES = 16 << 20  # of all weights of a model, up to which they stay in the CPU's cache


@dataclass
class Autotuner:
    """Chooses kernels by timing.

    Attributes:
        repeats: timings of each kernel.
        flush: read between two runs; None for models whose weights fit the CPU's cache.
        file: the tuning cache; None: nothing is kept.
        known: choices by layer, from the file and from this run.
    """

    repeats: int
    flush: Tensor | None
    file: Path | None
    known: dict[str, Choice] = field(default_factory=dict)

    @classmethod
    def for_model(cls, repeats: int, model_bytes: int, file: Path | None = None) -> Autotuner:
        """Return a tuner for a model whose tensors have so many bytes."""
        flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32) if model_bytes > CACHED_BYTES else None
        return cls(repeats, flush, file, {} if file is None else tuning_cache.read(file))

    def choose(self, dense: Any, candidates: Sequence[Candidate], inputs: Mapping[int, Tensor]) -> Choice:
        """Return the fastest kernel for each batch and its speedup over dense; timed only if the cache lacks it."""
        key = self._key(dense, candidates, inputs)
        if not _is_choice(self.known.get(key), candidates, list(inputs)):
            layers = {c: build_layer(dense, {1: c.packed}) for c in candidates}
            self.known[key] = fastest(dense, layers, inputs, self)
            if self.file is not None:
                tuning_cache.write(self.file, {key: self.known[key]})
        return self.known[key]

    def _key(self, dense: Any, candidates: Sequence[Candidate], inputs: Mapping[int, Tensor]) -> str:
        """Return a text of what the times of a layer depend on."""
        zeros = round(float((dense.weight == 0).float().mean()), 2)
        kernels = [(c.name, c.packed.kind, getattr(c.packed, "exact", None)) for c in candidates]
        shapes = [(x.shape, x.stride()) for x in inputs.values()]
        options = {} if isinstance(dense, nn.Linear) else geometry(dense)
        weight = list(dense.weight.shape), dense.weight.dtype, zeros, _columns_shared(candidates)
        return str((*weight, kernels, shapes, options, self.flush is None))

    def time(self, dense: nn.Module, layers: Mapping[Candidate, Sparse], x: Tensor) -> dict[str, Times]:
        """Return the times of the dense layer and of each candidate for this batch, by name, measured alternately."""
        fitting = {c: l for c, l in layers.items() if c.max_batch is None or len(x) <= c.max_batch}
        runs: dict[str, Callable[[], Any]] = {"dense": partial(dense, x)}
        runs |= {c.name: partial(layer, x) for c, layer in fitting.items()}
        before = self.flush.sum if self.flush is not None else lambda: None
        return compare(runs, repeats=self.repeats, warmup=1, before=before)


def fastest(
    dense: nn.Module, layers: Mapping[Candidate, Sparse], inputs: Mapping[int, Tensor], tuner: Autotuner
) -> Choice:
    """Return the fastest kernel for each batch, dense where none gains 3 %. Among kernels within 10 % it is the one
    with the fewest bytes: timed alone a layer has the CPU's cache for itself, in a model it shares it."""
    choice = {}
    sizes = {c.name: sum(t.nbytes for t in (*l.parameters(), *l.buffers())) for c, l in layers.items()}
    for batch, x in inputs.items():
        medians = {name: times.median for name, times in tuner.time(dense, layers, x).items()}
        name = min(medians, key=lambda n: medians[n])
        if name != "dense":
            close = [n for n in sizes if n in medians and medians[n] <= SAME_SPEED * medians[name]]
            name = min(close, key=lambda n: sizes[n])
        speedup = medians["dense"] / medians[name]
        choice[batch] = (name, speedup) if speedup >= MIN_SPEEDUP else ("dense", 1.0)
    return choice


def example_inputs(weight: Tensor, batch: int, image: Tensor | None) -> Tensor:
    """Return random inputs to time a layer on; `image`: an empty tensor like what the example gives the layer."""
    if image is None:
        return torch.randn(batch, weight.shape[1], dtype=torch.float32).to(weight.dtype)
    layout = torch.channels_last if image.dim() == 4 and not image.is_contiguous() else torch.contiguous_format
    return torch.randn(batch, *image.shape[1:], dtype=image.dtype).contiguous(memory_format=layout)


def chosen_weights(module: Any, candidates: Sequence[Candidate], choice: Choice) -> dict[int, Packed | Tensor]:
    """Return the weights of a layer by the smallest batch that each serves: between two timed batches the geometric
    mean divides."""
    batches, dense = sorted(choice), as_images(module.weight.detach())
    by_name = {c.name: c for c in candidates}
    starts = [1, *(math.isqrt(a * b) + 1 for a, b in pairwise(batches))]
    weights: dict[int, Packed | Tensor] = {}
    last = None
    for start, batch in zip(starts, batches):
        name = choice[batch][0]
        if name != last:
            last, weights[start] = name, dense if name == "dense" else by_name[name].packed
    limit = None if last is None or last == "dense" else by_name[last].max_batch
    if limit is not None:
        weights.setdefault(limit + 1, dense)
    return weights


def _is_choice(choice: Choice | None, candidates: Sequence[Candidate], batches: Sequence[int]) -> bool:
    """Return whether a cached choice is one for these batches, among these candidates."""
    names = {"dense", *(c.name for c in candidates)}
    return choice is not None and list(choice) == list(batches) and {n for n, _ in choice.values()} <= names


def _columns_shared(candidates: Sequence[Candidate]) -> float:
    """Return how many of four outputs share a column on average: blocks of zeros change the time of tiles by it."""
    tiled = (c.packed for c in candidates if isinstance(c.packed, Tiles | ConvTiles) and c.name != "convolution, sell")
    tiles = next(tiled, None)
    return 0.0 if tiles is None else round(shared(tiles), 1)
