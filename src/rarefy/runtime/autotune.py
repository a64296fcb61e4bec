"""`accelerate_`: every way to run a layer is timed on this machine, and the fastest takes its place."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rarefy.common.errors import ModelError, RarefyError, unknown
from rarefy.common.progress import track
from rarefy.common.report import Report
from rarefy.evaluation.profiling import resident_bytes
from rarefy.model.activation_quant import Inputs, get_inputs
from rarefy.model.batches import tensors_in
from rarefy.model.forward import call, evaluating, on_device
from rarefy.model.layers import Layer, Selector, all_layers, select
from rarefy.model.quant_grid import notes
from rarefy.runtime import bindings
from rarefy.runtime import tuning_cache as kept
from rarefy.runtime.candidates import FEW, NUMBERS, Clock, forms_of, grid_of, inputs_of, ways_of, why_no_panels
from rarefy.runtime.fusion_analysis import Observed, activation, observe, plain
from rarefy.runtime.kernel import MOST_TOGETHER
from rarefy.runtime.packed_formats import MOST_STRIDE
from rarefy.runtime.sparse_layers import PanelEmbedding, Sparse, SparseLinear

READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # take the weights of their layers themselves


def accelerate_(
    model: nn.Module,
    batch: Sequence[int] = (1, 16, 128),
    example: Any = None,
    *,
    layers: Selector = None,
    ignore: Selector = None,
    fold: bool = True,
    values: str | None = None,
    repeats: int = 11,
    choices: str | Path | bool = True,
    progress: bool = False,
) -> Report:
    """Replace Linear and Conv layers that have zeros by ones that skip them, and Linear layers on grids of few bits by
    ones that read those bits, where that is faster here; return what was chosen.

    batch    numbers of inputs in a call of a Linear (samples x tokens) for which a choice is made; those between go to
             the nearest
    example  what the model can be called with. Convolutions need it: the choice depends on the size of their images,
             and is made for one image and for as many as the example has
    fold     what alone reads a layer's outputs, as the example shows, goes into the layer: a BatchNorm into the weights
             before it, an activation (ReLU, GELU, SiLU) into the kernel; an Identity stays in their place. Linear
             layers given the same tensor one after the other (queries, keys, values) run in one call. Undone if the
             example's outputs then differ. What the example does not do is not seen: False leaves all be
    values   "int8": Linear layers that run sparse or on a grid do so in 8 bits, weights with a scale for each output or
             on their grid, and inputs with one for each row (as CSR, which may serve a few inputs, as they are), so
             outputs change a little; None: in the weight's own numbers
    repeats  timings of each way, in turns
    choices  the file that keeps what was fastest, so that it is measured once (`rarefy.runtime.tuning_cache` says where
             that file is); False = measure, and keep nothing
    Masks must have been folded. Outputs stay the same up to rounding, unless `values` is given. Raises ModelError,
    SelectorError. O(ways x calls), once for each distinct shape.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    >>> accelerate_(net).rows[0]["why"]
    'dense: 0.00% zeros'
    """
    how = {"batch": batch, "example": example, "layers": layers, "ignore": ignore, "fold": fold, "values": values}
    return accelerate_each(model, {**how, "repeats": repeats, "choices": choices, "progress": progress})


def accelerate_each(model: nn.Module, how: Mapping[str, Any], bring: Callable[[Layer], None] | None = None) -> Report:
    """`accelerate_` with weights that come one after the other: `bring` is called before a layer is looked at; `how`
    holds all its arguments."""
    example, fold, values, sizes = how["example"], how["fold"], how["values"], how["batch"]
    file = check_options(sizes, how["repeats"], values, how["choices"])
    chosen, sizes = select(model, how["layers"], how["ignore"]), sorted(set(sizes))
    if how["layers"] is None:  # what was put on a grid was meant, be it a head
        known = {id(l.original) for l in [*chosen, *(select(model, how["ignore"]) if how["ignore"] else ())]}
        chosen += [l for l in all_layers(model) if id(l.original) not in known and _gridded(l)]
    check_plain(chosen, bring is None)
    seen = None if example is None else observe(model, [l.module for l in chosen], example)
    places, before = Places(model, seen, fold), sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    clock = Clock.of(how["repeats"], before, file)
    rows = []
    for layer in track(chosen, "choosing kernels", how["progress"], len(chosen)):
        if bring is not None:
            bring(layer)
        rows.append(_settle(layer, places, sizes, values, clock))
        if bring is not None and rows[-1]["why"] == "":
            layer.module._parameters.clear()  # others still hold the dense layer, which must not hold its weight
    notes: tuple[str, ...] = ()
    if example is not None and fold and model.training:
        notes = ("the model is in training mode, so no BatchNorm went into a layer: call eval() first",)
    joined = fold and example is not None and _join(places, rows, chosen)
    folded = any(r.get("takes in") for r in rows)
    proved = (folded or joined) and _as_before(model, example, places.seen.outputs, values)
    if (folded or joined) and not proved:
        places.undo()
        places.seen = Observed(places.seen.images, {})
        joined = False
        rows = [_settle(layer, places, sizes, values, clock) for layer in chosen]
        notes = (
            "each layer runs alone, as it stood: with what follows it taken in, outputs of the example were others",
        )
    if example is not None:
        if not proved:  # the proof has called the model too
            with evaluating(model), torch.no_grad():
                call(model, on_device(model, example))
        rows = [_unless_read(row, layer, places) for row, layer in zip(rows, chosen)]
        if joined:
            _join(places, rows, chosen)  # but for those that have just gone back
    faster = sum(not r["why"] for r in rows)
    summary = {"layers that run sparse": f"{faster} of {len(rows)}", "instruction set": bindings.isa() or "none"}
    summary |= {"bytes in memory": before, "bytes in memory after": resident_bytes(model)}
    return Report("accelerated", tuple(rows), summary, notes)


def _join(places: Places, rows: Sequence[dict[str, Any]], chosen: Sequence[Layer]) -> bool:
    """Have layers that the example gives the same inputs run in one call, as their rows say; return whether any do."""
    row_of = {layer.name: row for layer, row in zip(chosen, rows)}
    for row in rows:
        row["in one call with"] = ""
    found = False
    for group in places.seen.groups:
        here = {n: places.model.get_submodule(n) for n in (places.names[id(m)] for m in group)}
        alike: dict[Any, list[tuple[str, SparseLinear]]] = {}
        for name, module in here.items():
            if isinstance(module, SparseLinear):
                module.join(())
                forms = tuple((at, how["format"], how.get("kind")) for at, how in module.about)
                alike.setdefault(forms, []).append((name, module))
        for same in alike.values():
            for start in range(0, len(same) - 1, MOST_TOGETHER):
                (leader, first), *others = same[start : start + MOST_TOGETHER]
                first.join([m for _, m in others])
                found = found or bool(others)
                for name, _ in others:
                    row_of[name]["in one call with"] = leader
    return found


def _unless_read(row: dict[str, Any], layer: Layer, places: Places) -> dict[str, Any]:
    """The row of a layer, which goes back if the model has just read its weight: unpacking costs more than it gains."""
    now = places.model.get_submodule(layer.name) if layer.name else None
    if not isinstance(now, Sparse) or not now.unpacked or row["takes in"]:
        return row
    places.put(layer.name, layer.module)
    dense = {k: "dense" for k, v in row.items() if k.startswith("batch ") and v}
    return {**row, **dense, "why": "dense: the model reads its weight at each call"}


def _as_before(model: nn.Module, example: Any, outputs: Sequence[torch.Tensor], values: str | None) -> bool:
    """Whether the model still returns what it did, in a first and in a second call, up to rounding."""
    for _ in range(2):
        try:
            with evaluating(model), torch.no_grad():
                now = tensors_in(call(model, on_device(model, example)))
        except (RarefyError, RuntimeError, AttributeError, TypeError):
            return False  # it misses something of what was taken in
        if len(now) != len(outputs):
            return False
        for a, b in zip(now, outputs):
            rounding = 0.2 if values else 1e-3 if b.dtype == torch.float32 else 0.1
            if a.shape != b.shape or not float((a.double() - b.double()).norm()) <= rounding * float(b.double().norm()):
                return False
    return True


def check_options(batch: Any, repeats: Any, values: Any, choices: Any) -> Path | None:
    """Raise ModelError for options that `accelerate_` does not take; return the file of choices, None for none."""
    check_sizes(batch, repeats)
    if values not in (None, "int8"):
        raise ModelError(unknown("values", str(values), ["int8", "None"]))
    if not isinstance(choices, str | os.PathLike | bool) or choices == "" or "\0" in str(choices):
        raise ModelError(f"choices is the path of a file, True or False, got {choices!r}")
    if choices is False:
        return None
    try:
        return kept.usual_file() if choices is True else Path(choices).expanduser()
    except RuntimeError as error:  # there is no such home
        if choices is True:
            return None
        raise ModelError(f"choices: {choices!r} is no path here: {error}") from None


def check_plain(chosen: Sequence[Layer], here: bool = True) -> None:
    """Raise ModelError for layers whose weight is no plain tensor, or, where it should be `here`, has no values."""
    made = [l.full_name for l in chosen if parametrize.is_parametrized(l.module)]
    if made:
        masked = f"masks or grids are still attached to {', '.join(made)}: fold_ the model first"
        raise ModelError(
            f"{masked} (parametrizations that are no masks: remove_parametrizations, or ignore= the layers)"
        )
    idle = next((l.full_name for l in chosen if l.weight.is_meta), None)
    if idle is not None and here:
        raise ModelError(f"{idle} is on the meta device: it has no values yet; load its weights first")


class Places:
    """Where a model's modules are as it was given, and what an example showed of them."""

    def __init__(self, model: nn.Module, seen: Observed | None, fold: bool):
        self.model, self.seen = model, seen or Observed({}, {})
        self.reached, self.fold = seen is not None, fold
        self.moved: list[tuple[str, nn.Module]] = []  # what stood where something else was put
        self.names = {id(m): name for name, m in model.named_modules()}
        self.uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
        self.parents = {f"{name}.{child}".lstrip("."): m for name, m in model.named_modules() for child in m._modules}

    def reader(self, module: nn.Module) -> Any:
        """Return the BatchNorm or activation that may go into the module before it, or None."""
        found = self.seen.readers.get(id(module))
        return found if self.fold and found is not None and self.uses[id(found)] == 1 else None

    def put(self, name: str, module: nn.Module) -> None:
        """Put a module in the place of that name."""
        parent, _, leaf = name.rpartition(".")
        self.moved.append((name, self.model.get_submodule(name)))
        setattr(self.model.get_submodule(parent), leaf, module)

    def undo(self) -> None:
        """Put everything back."""
        for name, module in reversed(self.moved.copy()):
            self.put(name, module)
        self.moved.clear()

    def take_out(self, module: nn.Module) -> str:
        """Leave an Identity in the module's place; return its name."""
        self.put(self.names[id(module)], nn.Identity())
        return self.names[id(module)]


def _gridded(layer: Layer) -> bool:
    return layer.param in notes(layer.module)


def _tied(layer: Layer) -> tuple[Any, list[tuple[str, Any]]] | None:
    """The one Linear layer, and the embeddings, that share a weight on a grid and do nothing else."""
    linears = [(n, m) for n, m, _ in layer.owners if isinstance(m, nn.Linear)]
    others = [(n, m) for n, m, _ in layer.owners if not isinstance(m, nn.Linear)]
    alone = all(type(m) is nn.Embedding and m.max_norm is None and plain(m) for _, m in others)
    if len(linears) != 1 or not others or not alone or layer.elsewhere or not _gridded(layer):
        return None
    return linears[0], others


def _settle_tied(
    layer: Layer, tied: Any, places: Places, row: dict[str, Any], clock: Clock, how: Any
) -> dict[str, Any]:
    """Put a head and its embeddings on the same bits, where those are the fastest for all numbers of inputs."""
    (name, head), others = tied
    sizes, values = how
    alone = Layer(name, "weight", ((name, head, "weight"),), layer.layout)
    why = _why_held(alone, places) or why_dense(alone, row["sparsity"], None)
    if why is not None:
        return {**row, "why": f"dense: {why}"}
    ways, build = ways_of(head, values)
    best = clock.best(head, ways, build, {n: inputs_of(layer.weight, n, None) for n in sizes})
    row |= {f"batch {b}": way if way == "dense" else f"{way} {gain:.2f}x" for b, (way, gain) in best.items()}
    if {way for way, _ in best.values()} != {"panels"}:
        return {**row, "why": "dense: its weight is shared, and panels are not the fastest"}
    packed: Any = ways["panels"]
    places.put(name, build({1: packed}).train(head.training))
    for at, module in others:
        places.put(at, PanelEmbedding(packed, module.weight.dtype, module.padding_idx))
    return {**row, "why": ""}


def _settle(layer: Layer, places: Places, sizes: Sequence[int], values: str | None, clock: Clock) -> dict[str, Any]:
    """Put what is fastest in a layer's place; return the row that tells of it."""
    weight, image = layer.weight.detach(), places.seen.images.get(id(layer.module))
    zeros, shape = float((weight == 0).float().mean()), "x".join(map(str, weight.shape))
    mine = sizes if image is None else sorted({1, len(image)})
    columns = sorted({*sizes, *(n for x in places.seen.images.values() for n in (1, len(x)))})
    row: dict[str, Any] = {"layer": layer.full_name, "shape": shape, "sparsity": zeros}
    row |= {f"batch {b}": "dense" if b in mine else "" for b in columns}
    module, last, taken = layer.module, layer.module, []
    tied = _tied(layer)
    if tied is not None:
        row |= {"takes in": "", "in one call with": ""} if places.reached else {}
        return _settle_tied(layer, tied, places, row, clock, (sizes, values))
    why = _why_held(layer, places)
    if why is None:
        norm = places.reader(module)
        conv = _convolves(module) and isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        if conv and image is not None and not module.training:
            module, last = fuse_conv_bn_eval(module, norm), norm  # type: ignore[type-var]
            places.put(layer.name, module)
            taken.append(places.take_out(norm))
        why = why_dense(layer, zeros, image is not None if places.reached else None)
    if why is None:
        ways, build = ways_of(module, values)
        best = clock.best(layer.module, ways, build, {n: inputs_of(weight, n, image) for n in mine})
        row |= {f"batch {b}": way if way == "dense" else f"{way} {gain:.2f}x" for b, (way, gain) in best.items()}
        if any(way != "dense" for way, _ in best.values()):
            act = places.reader(last)
            name = None if act is None else activation(act)
            sparse = build(forms_of(module, ways, best), activation=name)
            places.put(layer.name, sparse.train(module.training))
            if act is not None and name is not None:
                taken.append(places.take_out(act))
        else:
            why = "dense is as fast"
    row |= {"takes in": ", ".join(taken), "in one call with": ""} if places.reached else {}
    return {**row, "why": "" if why is None else f"dense: {why}"}


def check_sizes(batch: Any, repeats: Any) -> None:
    """Raise ModelError unless these are numbers of inputs, and of timings."""
    if (
        not isinstance(batch, Sequence)
        or not batch
        or any(not isinstance(b, int) or isinstance(b, bool) or b < 1 for b in batch)
    ):
        raise ModelError(f"batch is a list of whole numbers from 1 up, such as (1, 128), got {batch!r}")
    if not isinstance(repeats, int) or repeats < 1:
        raise ModelError(f"repeats is a whole number from 1 up, got {repeats!r}")


def _why_held(layer: Layer, places: Places) -> str | None:
    """Why nothing may stand in a layer's place, or None."""
    module: Any = layer.module
    if not layer.name:
        return "it is the whole model: put it into a module"
    if not plain(module):
        return "its hooks would be lost"
    if (rounded := get_inputs(module)) is not None and (rounded != Inputs() or not isinstance(module, nn.Linear)):
        return "no kernel rounds its inputs so"
    if len(layer.owners) > 1 or layer.elsewhere or places.uses[id(module)] > 1:
        return "its weight is shared"
    parent = places.parents[layer.name]
    return f"{type(parent).__name__} reads its weight itself" if isinstance(parent, READERS) else None


def why_dense(layer: Layer, zeros: float, reached: bool | None) -> str | None:
    """Why a layer is not even tried, or None; `reached`: by the example, None where there is none."""
    module: Any = layer.module
    conv = _convolves(module)
    if bindings.missing() is not None:
        return bindings.missing()
    if layer.param != "weight" or not (conv or type(module).forward is nn.Linear.forward):
        return f"no kernel for {type(module).__name__} yet"
    if layer.weight.dtype not in NUMBERS or layer.weight.device.type != "cpu":
        return f"{layer.weight.dtype} on {layer.weight.device.type}"
    grid = grid_of(module) if layer.param == "weight" else None
    if zeros < FEW and (grid is None or (why := why_no_panels(layer.weight, grid)) is not None):
        return f"{zeros:.2%} zeros" + ("" if grid is None else f", {why}")
    return _why_dense_conv(module, reached) if conv else None


def _convolves(module: Any) -> bool:
    """Whether a module is a convolution and nothing more."""
    return any(
        isinstance(module, c) and type(module).forward is c.forward and type(module)._conv_forward is c._conv_forward
        for c in (nn.Conv1d, nn.Conv2d)
    )


def _why_dense_conv(conv: Any, reached: bool | None) -> str | None:
    if conv.weight.dtype != torch.float32:
        return f"no kernel for convolutions in {str(conv.weight.dtype).removeprefix('torch.')} yet"
    if conv.weight.shape[1] == 1 and conv.groups > 1:
        return "it is depthwise"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or max(conv.stride) > MOST_STRIDE:
        return f"no kernel for padding {conv.padding} of {conv.padding_mode}, stride {conv.stride}"
    if not reached:
        return "the example does not reach it" if reached is False else "give an example: its images have no size yet"
    return None
