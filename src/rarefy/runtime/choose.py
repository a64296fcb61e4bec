"""`accelerate_`: every way to run a layer is timed on this machine, and the fastest takes its place."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rarefy.errors import ModelError
from rarefy.model.select import Layer, Selector, select
from rarefy.progress import track
from rarefy.proof.measure import compare, resident_bytes
from rarefy.proof.report import Report
from rarefy.runtime import choices as kept
from rarefy.runtime import native, ops  # noqa: F401 (torch.compile needs the operator)
from rarefy.runtime.layers import Sparse, SparseConv, SparseLinear, geometry
from rarefy.runtime.observe import Observed, activation, observe
from rarefy.runtime.packed import KINDS, Packed, pack_bitmask, pack_conv, pack_tiles

FEW = 0.1  # zeros below which nothing is tried
GAIN = 1.03  # how much faster than dense a kernel must be
MOST_STRIDE = 8  # of a convolution that has a kernel
MOST_INPUTS = 64  # of a call that the bitmask is tried for
FLUSH = 64 << 20  # bytes that are read between two runs, so that weights come from memory as they do in a large model
CACHED = 16 << 20  # bytes of all weights up to which they stay in the cache
NAMES = {dtype: kind for kind, dtype in KINDS.items() if dtype.is_floating_point}  # of the numbers a layer may have
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # take the weights of their layers themselves


def accelerate_(
    model: nn.Module,
    batch: Sequence[int] = (1, 16, 128),
    example: Any = None,
    *,
    layers: Selector = None,
    ignore: Selector = None,
    repeats: int = 11,
    choices: str | Path | bool = True,
    progress: bool = False,
) -> Report:
    """Replace Linear and Conv layers that have zeros by ones that skip them, where that is faster here; return what was
    chosen.

    batch    numbers of inputs in a call of a Linear (samples x tokens) for which a choice is made; those between go to
             the nearest
    example  what the model can be called with. Convolutions need it: the choice depends on the size of their images,
             and is made for one image and for as many as the example has. It also shows what alone reads a layer's
             outputs: a BatchNorm goes into the weights before it and an activation (ReLU, GELU, SiLU) into the kernel;
             an Identity stays in their place
    repeats  timings of each way, in turns
    choices  the file that keeps what was fastest, so that it is measured once (`rarefy.runtime.choices` says where
             that file is); False = measure, and keep nothing
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
    if not isinstance(choices, str | os.PathLike | bool):
        raise ModelError(f"choices is the path of a file, True or False, got {choices!r}")
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
    seen = Observed({}, {}) if example is None else observe(model, [l.module for l in chosen], example)
    images, places = seen.images, {id(m): name for name, m in model.named_modules()}

    def reader(module: nn.Module) -> Any:
        """What may go into the module: it alone reads its outputs, and has one name."""
        found = seen.readers.get(id(module))
        return found if found is not None and uses[id(found)] == 1 else None

    columns = sorted({*sizes, *(n for x in images.values() for n in (1, len(x)))})
    before, rows = resident_bytes(model), []
    flush = torch.zeros(FLUSH // 4) if before > CACHED else None
    file = None if choices is False else kept.usual_file() if choices is True else Path(choices).expanduser()
    known = {} if file is None else kept.read(file)
    for layer in track(chosen, "choosing kernels", progress, len(chosen)):
        weight = layer.weight.detach()
        zeros = float((weight == 0).float().mean())
        row: dict[str, Any] = {"layer": layer.full_name, "shape": "x".join(map(str, weight.shape)), "sparsity": zeros}
        image = images.get(id(layer.module))
        mine = sizes if image is None else sorted({1, len(image)})
        row |= {f"batch {b}": "dense" if b in mine else "" for b in columns} | ({} if example is None else {"takes in": ""})
        held, module, last = _why_held(layer, parents), layer.module, layer.module
        norm = reader(module)
        conv = isinstance(module, nn.Conv1d | nn.Conv2d) and isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        if held is None and conv and not module.training:
            module, last = fuse_conv_bn_eval(module, norm), norm
            _replace(model, layer.name, module)
            _replace(model, places[id(norm)], nn.Identity())
            row["takes in"] = places[id(norm)]
        why = held or _why_dense(layer, zeros, None if example is None else image is not None)
        if why is None:
            ways, build = _ways(module)
            inputs = {n: _inputs(weight, n, image) for n in mine}
            shapes = [(x.shape, x.stride()) for x in inputs.values()]
            how = () if image is None else tuple(geometry(module).items())
            key = str((list(weight.shape), weight.dtype, round(zeros, 2), _fill(ways), shapes, how, flush is None))
            if not _fits(known.get(key), ways, mine):
                layers_of = {n: build({1: w}) for n, w in ways.items()}
                known[key] = _fastest(layer.module, layers_of, inputs, repeats, flush)
                if file is not None:
                    kept.write(file, {key: known[key]})
            best = known[key]
            row |= {
                f"batch {b}": name if name == "dense" else f"{name} {gain:.2f}x" for b, (name, gain) in best.items()
            }
            if any(name != "dense" for name, _ in best.values()):
                act = reader(last)
                name = None if act is None else activation(act)
                forms = _forms(module, ways, {b: name for b, (name, _) in best.items()})
                sparse = build(forms, activation=name)
                _replace(model, layer.name, sparse.train(module.training))
                if name is not None:
                    _replace(model, places[id(act)], nn.Identity())
                    row["takes in"] = ", ".join(filter(None, (row["takes in"], places[id(act)])))
            else:
                why = "dense is as fast"
        rows.append({**row, "why": "" if why is None else f"dense: {why}"})
    faster = sum(not r["why"] for r in rows)
    summary = {"layers that run sparse": f"{faster} of {len(rows)}", "instruction set": native.isa() or "none"}
    summary |= {"bytes in memory": before, "bytes in memory after": resident_bytes(model)}
    return Report("accelerated", tuple(rows), summary)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _why_held(layer: Layer, parents: dict[str, tuple[nn.Module, int]]) -> str | None:
    """Why nothing may stand in a layer's place, or None; `parents`: of each layer, and how often it is used."""
    module: Any = layer.module
    if not layer.name:
        return "it is the whole model: put it into a module"
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return "its hooks would be lost"
    if len(layer.owners) > 1 or layer.elsewhere or parents[layer.name][1] > 1:
        return "its weight is shared"
    if isinstance(parents[layer.name][0], READERS):
        return f"{type(parents[layer.name][0]).__name__} reads its weight itself"
    return None


def _why_dense(layer: Layer, zeros: float, reached: bool | None) -> str | None:
    """Why a layer is not even tried, or None; `reached`: by the example, None where there is none."""
    module: Any = layer.module
    conv = type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward)
    if native.missing() is not None:
        return native.missing()
    if layer.param != "weight" or not (conv or type(module).forward is nn.Linear.forward):
        return f"no kernel for {type(module).__name__} yet"
    if layer.weight.dtype not in NAMES or layer.weight.device.type != "cpu":
        return f"{layer.weight.dtype} on {layer.weight.device.type}"
    if zeros < FEW:
        return f"{zeros:.2%} zeros"
    return _why_dense_conv(module, reached) if conv else None


def _why_dense_conv(conv: Any, reached: bool | None) -> str | None:
    if conv.weight.dtype != torch.float32:
        return f"no kernel for convolutions in {str(conv.weight.dtype).removeprefix('torch.')} yet"
    if conv.weight.shape[1] == 1 and conv.groups > 1:
        return "it is depthwise"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or max(conv.stride) > MOST_STRIDE:
        return f"no kernel for padding {conv.padding} of {conv.padding_mode}, stride {conv.stride}"
    if not reached:
        return "the example does not reach it" if reached is False else "no example to tell the size of its images"
    return None


def _ways(module: Any) -> tuple[dict[str, Packed], Callable[..., Sparse]]:
    """The packed forms of a layer's weight, and what builds a layer of some of them."""
    weight = module.weight.detach()
    if isinstance(module, nn.Linear):
        kind = NAMES[weight.dtype]
        ways = {"bitmask": pack_bitmask(weight, kind), "tiles": pack_tiles(weight, kind)}
        return ways, partial(SparseLinear, bias=module.bias)
    return {"convolution": pack_conv(_as_images(weight), **geometry(module))}, partial(SparseConv, like=module)


def _as_images(weight: Tensor) -> Tensor:
    return weight.unsqueeze(2) if weight.dim() == 3 else weight


def _fits(choice: kept.Choice | None, ways: Mapping[str, Packed], sizes: Sequence[int]) -> bool:
    """Whether a choice that was kept is one for these numbers of inputs, among these ways."""
    return choice is not None and list(choice) == list(sizes) and {n for n, _ in choice.values()} <= {*ways, "dense"}


def _fill(ways: Mapping[str, Packed]) -> float:
    """How many of four outputs share a column, in the mean: what blocks of zeros change in the time of tiles."""
    tiles: Any = list(ways.values())[-1]
    return round(len(tiles.values) / max(1, len(tiles.columns)), 1)


def _inputs(weight: Tensor, n: int, image: Tensor | None) -> Tensor:
    """What a layer is timed on; `image`: what the example gives it."""
    if image is None:
        return torch.randn(n, weight.shape[1]).to(weight.dtype)
    form = torch.channels_last if image.dim() == 4 and not image.is_contiguous() else torch.contiguous_format
    return torch.randn(n, *image.shape[1:], dtype=image.dtype).contiguous(memory_format=form)


def _fastest(
    dense: nn.Module, layers: Mapping[str, Sparse], inputs: Mapping[int, Tensor], repeats: int, flush: Tensor | None
) -> dict[int, tuple[str, float]]:
    """The fastest way for each number of inputs, and how many times faster than dense it is."""
    best = {}
    for size, x in inputs.items():
        ways = {n: l for n, l in layers.items() if n != "bitmask" or size <= MOST_INPUTS}
        runs: dict[str, Callable[[], Any]] = {n: partial(way, x) for n, way in {"dense": dense, **ways}.items()}
        before = flush.sum if flush is not None else lambda: None
        times = compare(runs, repeats=repeats, warmup=1, before=before)
        medians = {name: t.median for name, t in times.items()}
        name = min(medians, key=lambda n: medians[n])
        gain = medians["dense"] / medians[name]
        best[size] = (name, gain) if gain >= GAIN else ("dense", 1.0)
    return best


def _forms(module: Any, ways: Mapping[str, Packed], best: Mapping[int, str]) -> dict[int, Packed | Tensor]:
    """The chosen form of a weight from each number of inputs on."""
    sizes, weight = sorted(best), _as_images(module.weight.detach())
    starts = [1, *(math.isqrt(a * b) + 1 for a, b in pairwise(sizes))]
    forms: dict[int, Packed | Tensor] = {}
    last = None
    for start, size in zip(starts, sizes):
        if best[size] != last:
            last = best[size]
            forms[start] = weight if last == "dense" else ways[last]
    if last == "bitmask":  # not tried beyond
        forms.setdefault(MOST_INPUTS + 1, weight)
    return forms
