"""`accelerate_`: replace layers by sparse or quantized kernels where those are faster on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rarefy.common.checks import check_int
from rarefy.common.errors import ModelError, RarefyError, unknown
from rarefy.common.progress import track
from rarefy.common.renamed import renamed_parameters
from rarefy.common.report import Report
from rarefy.evaluation.profiling import resident_bytes
from rarefy.model.activation_quant import ActivationQuant, get_activation_quant
from rarefy.model.batches import tensors_in
from rarefy.model.compare import relative_distance
from rarefy.model.forward import call, evaluating, on_device
from rarefy.model.layers import Layer, Selector, all_layers, select_layers
from rarefy.model.masks import fold_attached_
from rarefy.model.quant_grid import recorded_grids
from rarefy.runtime import bindings, tuning_cache
from rarefy.runtime.autotune import Autotuner, chosen_weights, example_inputs
from rarefy.runtime.candidates import build_layer, is_convolution, list_candidates, why_dense
from rarefy.runtime.fusion_analysis import Observed, activation, is_plain, observe
from rarefy.runtime.kernel import MAX_GROUPED
from rarefy.runtime.module_slots import ModuleSlots
from rarefy.runtime.sparse_layers import QuantizedEmbedding, Sparse, SparseLinear

WEIGHT_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # read the weights of the layers inside them
NOT_FUSED = "no layer is fused with what follows it: fused, the outputs of the example changed"


@dataclass(frozen=True, kw_only=True)
class AccelerateOptions:
    """The arguments of `accelerate_`, checked."""

    batch: Sequence[int] = (1, 16, 128)
    example: Any = None
    layers: Selector = None
    ignore: Selector = None
    fold: bool = True
    precision: str | None = None
    repeats: int = 11
    tuning_cache: str | Path | bool = True
    progress: bool = False

    def __post_init__(self) -> None:
        check_batches(self.batch, self.repeats)
        if self.precision not in (None, "int8"):
            raise ModelError(unknown("precision", str(self.precision), ["int8", "None"]))
        self.cache_file()

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> AccelerateOptions:
        """Return the options of a dict of arguments; ModelError for a name that `accelerate_` does not have."""
        names = [f.name for f in fields(cls)]
        wrong = next((n for n in options if n not in names), None)
        if wrong is not None:
            raise ModelError(unknown("argument of accelerate_", str(wrong), names))
        return cls(**options)

    def cache_file(self) -> Path | None:
        """Return the file of the tuning cache, None for none; ModelError for what is not a path."""
        cache = self.tuning_cache
        if not isinstance(cache, str | os.PathLike | bool) or cache == "" or "\0" in str(cache):
            raise ModelError(f"tuning_cache: expected the path of a file, True or False, got {cache!r}")
        if cache is False:
            return None
        try:
            return tuning_cache.default_file() if cache is True else Path(cache).expanduser()
        except RuntimeError as error:  # there is no such home
            if cache is True:
                return None
            raise ModelError(f"tuning_cache: {cache!r} is not a path on this machine: {error}") from None


@renamed_parameters(values="precision", choices="tuning_cache")
def accelerate_(
    model: nn.Module,
    batch: Sequence[int] = (1, 16, 128),
    example: Any = None,
    *,
    layers: Selector = None,
    ignore: Selector = None,
    fold: bool = True,
    precision: str | None = None,
    repeats: int = 11,
    tuning_cache: str | Path | bool = True,
    progress: bool = False,
) -> Report:
    """Replace layers in place by kernels that skip zeros or read quantized weights, where those are faster here.

    Every kernel that can run a layer is timed on this machine, and the fastest one replaces the layer if it beats dense
    by 3 %. Masks and quantization grids that are still attached are folded into the weights first, which the report
    says. Outputs stay the same up to rounding, unless `precision` is given. Costs the calls of all kernels, once for
    each distinct shape of layer.

    Args:
        model: the model, on the CPU.
        batch: numbers of inputs in a call of a Linear layer (samples x tokens) that are timed; a call between two of
            them is served by the nearer one.
        example: a batch: a tensor, a dict of keyword arguments, or a tuple (inputs, target), of which only the inputs
            are passed. Convolutions need it, because their choice depends on the image size; they are timed for one
            image and for the batch of the example.
        layers: selectors of the layers to try. By default all but embeddings and the output head, and every quantized
            layer.
        ignore: names or classes of the layers that stay as they are.
        fold: with an example, fuse a BatchNorm into the weights before it and an activation (ReLU, GELU, SiLU) into the
            kernel, leaving an Identity in their place; run Linear layers that have the same input in one call. Undone
            if the outputs of the example change. Branches that the example does not take are not seen.
        precision: "int8" runs sparse and quantized Linear layers in 8 bits, with one scale for each weight row and each
            input row, so outputs change slightly; None keeps the precision of the weights.
        repeats: timings of each kernel, alternating.
        tuning_cache: the file that remembers the choices; True: the default file (`rarefy.runtime.tuning_cache`);
            False: measure, and remember nothing.
        progress: show a progress bar.

    Returns:
        A report with a row for each layer: its name, shape, sparsity, the kernel and speedup for each batch, and why it
        stays dense if it does.

    Raises:
        ModelError: an argument is wrong, or a weight is computed by a parametrization that is not Rarefy's.
        SelectorError: `layers` or `ignore` matches no layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        >>> accelerate_(net).rows[0]["why"]
        'dense: 0.00% zeros'
    """
    chosen = {"batch": batch, "example": example, "layers": layers, "ignore": ignore, "fold": fold}
    more = {"precision": precision, "repeats": repeats, "tuning_cache": tuning_cache, "progress": progress}
    return accelerate_each(model, AccelerateOptions(**chosen, **more))


def accelerate_each(
    model: nn.Module, options: AccelerateOptions, load_weight: Callable[[Layer], None] | None = None
) -> Report:
    """`accelerate_` for weights that are loaded one after the other: `load_weight` is called before each layer is
    tried, and the dense weight of a replaced layer is freed."""
    folded = fold_attached_(model)
    chosen = _chosen_layers(model, options)
    check_plain(chosen, loaded=load_weight is None)
    bytes_before = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    observed = None if options.example is None else observe(model, [l.module for l in chosen], options.example)
    slots = ModuleSlots(model, observed, options.fold)
    tuner = Autotuner.for_model(options.repeats, bytes_before, options.cache_file())
    rows = []
    for layer in track(chosen, "choosing kernels", options.progress, len(chosen)):
        if load_weight is not None:
            load_weight(layer)
        rows.append(select_kernel_(layer, slots, tuner, options))
        if load_weight is not None and rows[-1]["why"] == "":
            layer.module._parameters.clear()  # the caller still holds the dense layer: free its weight
    notes = [] if folded is None else [folded]
    if options.example is not None:
        if options.fold and model.training:
            notes.append("the model is in training mode, so no BatchNorm is fused: call eval() first")
        rows, fused = _fuse_(rows, chosen, slots, tuner, options)
        notes += [] if fused else [NOT_FUSED]
    faster = sum(not r["why"] for r in rows)
    summary = {"layers that run sparse": f"{faster} of {len(rows)}", "instruction set": bindings.isa() or "none"}
    summary |= {"bytes in memory": bytes_before, "bytes in memory after": resident_bytes(model)}
    return Report("accelerated", tuple(rows), summary, tuple(notes))


def _chosen_layers(model: nn.Module, options: AccelerateOptions) -> list[Layer]:
    """Return the selected layers; by default also those, such as a language model's head, that were quantized."""
    chosen = select_layers(model, options.layers, options.ignore)
    if options.layers is None:
        ignored = select_layers(model, options.ignore) if options.ignore else ()
        known = {id(l.original) for l in [*chosen, *ignored]}
        chosen += [l for l in all_layers(model) if id(l.original) not in known and _is_quantized(l)]
    return chosen


def select_kernel_(layer: Layer, slots: ModuleSlots, tuner: Autotuner, options: AccelerateOptions) -> dict[str, Any]:
    """Replace a layer by its fastest kernel, fused with what follows it; return its row of the report."""
    row, batches = _new_row(layer, slots, options.batch)
    shared = _tied_embeddings(layer)
    if shared is not None:
        return _select_tied_kernel_(layer, shared, slots, row, tuner, options)
    image, module, fused = slots.observed.images.get(id(layer.module)), layer.module, []
    why, last = why_fixed(layer, slots), module
    if why is None:
        norm = slots.consumer(module)
        is_norm = isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        if is_convolution(module) and is_norm and image is not None and not module.training:
            module, last = fuse_conv_bn_eval(module, norm), norm  # type: ignore[type-var]
            slots.replace(layer.name, module)
            fused.append(slots.remove(norm))
        why = why_dense(layer, row["sparsity"], image is not None if slots.has_example else None)
    if why is None:
        candidates = list_candidates(module, options.precision)
        inputs = {n: example_inputs(layer.weight.detach(), n, image) for n in batches}
        choice = tuner.choose(module, candidates, inputs)
        row |= _choice_columns(choice)
        if any(name != "dense" for name, _ in choice.values()):
            next_module = slots.consumer(last)
            name = None if next_module is None else activation(next_module)
            sparse = build_layer(module, chosen_weights(module, candidates, choice), name)
            slots.replace(layer.name, sparse.train(module.training))
            fused += [] if next_module is None or name is None else [slots.remove(next_module)]
        else:
            why = "dense is as fast"
    row |= {"fused": ", ".join(fused), "grouped_with": ""} if slots.has_example else {}
    return {**row, "why": "" if why is None else f"dense: {why}"}


def _new_row(layer: Layer, slots: ModuleSlots, batch: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    """Return a report row of a layer with all columns, and the batches that it is timed for."""
    weight, images = layer.weight.detach(), slots.observed.images
    image = images.get(id(layer.module))
    batches = sorted(set(batch)) if image is None else sorted({1, len(image)})
    columns = sorted({*batch, *(n for x in images.values() for n in (1, len(x)))})
    zeros, shape = float((weight == 0).float().mean()), "x".join(map(str, weight.shape))
    row: dict[str, Any] = {"layer": layer.full_name, "shape": shape, "sparsity": zeros}
    return row | {f"batch {b}": "dense" if b in batches else "" for b in columns}, batches


def _choice_columns(choice: tuning_cache.Choice) -> dict[str, str]:
    return {f"batch {b}": n if n == "dense" else f"{n} {speedup:.2f}x" for b, (n, speedup) in choice.items()}


def _tied_embeddings(layer: Layer) -> tuple[Any, list[tuple[str, Any]]] | None:
    """Return the one Linear layer and the embeddings that share a quantized weight and do nothing else, else None."""
    linears = [(n, m) for n, m, _ in layer.owners if isinstance(m, nn.Linear)]
    others = [(n, m) for n, m, _ in layer.owners if not isinstance(m, nn.Linear)]
    plain = all(type(m) is nn.Embedding and m.max_norm is None and is_plain(m) for _, m in others)
    if len(linears) != 1 or not others or not plain or layer.tied_to or not _is_quantized(layer):
        return None
    return linears[0], others


def _select_tied_kernel_(
    layer: Layer, shared: Any, slots: ModuleSlots, row: dict[str, Any], tuner: Autotuner, options: AccelerateOptions
) -> dict[str, Any]:
    """Let an output layer and its embeddings read one quantized weight, if that is fastest for every batch."""
    (name, head), embeddings = shared
    row |= {"fused": "", "grouped_with": ""} if slots.has_example else {}
    untied = Layer(name, "weight", ((name, head, "weight"),), layer.layout)
    why = why_fixed(untied, slots) or why_dense(untied, row["sparsity"], None)
    if why is not None:
        return {**row, "why": f"dense: {why}"}
    candidates = list_candidates(head, options.precision)
    inputs = {n: example_inputs(layer.weight, n, None) for n in options.batch}
    choice = tuner.choose(head, candidates, inputs)
    row |= _choice_columns(choice)
    if {name for name, _ in choice.values()} != {"panels"}:
        return {**row, "why": "dense: its weight is shared, and panels are not the fastest"}
    packed: Any = next(c.packed for c in candidates if c.name == "panels")
    slots.replace(name, build_layer(head, {1: packed}).train(head.training))
    for path, module in embeddings:
        slots.replace(path, QuantizedEmbedding(packed, module.weight.dtype, module.padding_idx))
    return {**row, "why": ""}


def _fuse_(
    rows: list[dict[str, Any]],
    chosen: Sequence[Layer],
    slots: ModuleSlots,
    tuner: Autotuner,
    options: AccelerateOptions,
) -> tuple[list[dict[str, Any]], bool]:
    """Group layers with equal inputs and verify the outputs of the example, undoing all fusions where they changed;
    put back layers whose weight the model reads. Returns the rows, and False where fusions were undone."""
    model, example = slots.model, options.example
    grouped = options.fold and _group_layers_(slots, rows, chosen)
    changed = grouped or any(r.get("fused") for r in rows)
    same = changed and _same_outputs(model, example, slots.observed.outputs, options.precision)
    if changed and not same:
        slots.undo()
        slots.observed, grouped = Observed(slots.observed.images, {}), False
        rows = [select_kernel_(layer, slots, tuner, options) for layer in chosen]
    if not same:  # comparing outputs calls the model too
        with evaluating(model), torch.no_grad():
            call(model, on_device(model, example))
    rows = [_restore_if_read(row, layer, slots) for row, layer in zip(rows, chosen)]
    if grouped:
        _group_layers_(slots, rows, chosen)  # without those that were just put back
    return rows, same or not changed


def _group_layers_(slots: ModuleSlots, rows: Sequence[dict[str, Any]], chosen: Sequence[Layer]) -> bool:
    """Run layers that have the same input in one call, and note it in their rows; return whether any do."""
    row_of = {layer.name: row for layer, row in zip(chosen, rows)}
    for row in rows:
        row["grouped_with"] = ""
    any_grouped = False
    for group in slots.observed.groups:
        modules = {n: slots.model.get_submodule(n) for n in (slots.names[id(m)] for m in group)}
        alike: dict[Any, list[tuple[str, SparseLinear]]] = {}
        for name, module in modules.items():
            if isinstance(module, SparseLinear):
                module.group_with(())
                formats = tuple((start, f["format"], f.get("kind")) for start, f in module.formats)
                alike.setdefault(formats, []).append((name, module))
        for same in alike.values():
            for start in range(0, len(same) - 1, MAX_GROUPED):
                (leader, first), *others = same[start : start + MAX_GROUPED]
                first.group_with([m for _, m in others])
                any_grouped = any_grouped or bool(others)
                for name, _ in others:
                    row_of[name]["grouped_with"] = leader
    return any_grouped


def _restore_if_read(row: dict[str, Any], layer: Layer, slots: ModuleSlots) -> dict[str, Any]:
    """Return the row of a layer, which becomes dense again if the model has just read its weight.

    Unpacking it at each call costs more than the kernel gains.
    """
    module = slots.model.get_submodule(layer.name) if layer.name else None
    if not isinstance(module, Sparse) or not module.unpacked or row["fused"]:
        return row
    slots.replace(layer.name, layer.module)
    dense = {k: "dense" for k, v in row.items() if k.startswith("batch ") and v}
    return {**row, **dense, "why": "dense: the model reads its weight at each call"}


def _same_outputs(model: nn.Module, example: Any, expected: Sequence[torch.Tensor], precision: str | None) -> bool:
    """Return whether the model returns the expected outputs up to rounding, in a first and in a second call."""
    for _ in range(2):
        try:
            with evaluating(model), torch.no_grad():
                outputs = tensors_in(call(model, on_device(model, example)))
        except (RarefyError, RuntimeError, AttributeError, TypeError):
            return False  # the model uses something of a fused module
        if len(outputs) != len(expected):
            return False
        for a, b in zip(outputs, expected):
            tolerance = 0.2 if precision else 1e-3 if b.dtype == torch.float32 else 0.1
            if not relative_distance(a, b) <= tolerance:
                return False
    return True


def check_plain(chosen: Sequence[Layer], loaded: bool = True) -> None:
    """Raise ModelError for layers whose weight is computed by a parametrization, or, if it should be `loaded`, has no
    values."""
    computed = [l.full_name or "the model" for l in chosen if parametrize.is_parametrized(l.module)]
    if computed:
        raise ModelError(
            f"masks or grids are still attached to {', '.join(computed)}: fold_ the model first (parametrizations that "
            "are not Rarefy's: torch.nn.utils.parametrize.remove_parametrizations, or ignore= the layers)"
        )
    empty = next((l.full_name or "the model" for l in chosen if l.weight.is_meta), None)
    if empty is not None and loaded:
        raise ModelError(f"{empty} is on the meta device, so it has no values: load its weights first")


def check_batches(batch: Any, repeats: Any) -> None:
    """Raise ModelError unless `batch` are numbers of inputs and `repeats` is a number of timings."""
    whole = isinstance(batch, Sequence) and all(isinstance(b, int) and not isinstance(b, bool) for b in batch)
    if not whole or not batch or min(batch) < 1:
        raise ModelError(f"batch: expected whole numbers from 1 up, such as (1, 128), got {batch!r}")
    check_int("repeats", repeats, 1, ModelError)


def why_fixed(layer: Layer, slots: ModuleSlots) -> str | None:
    """Return why a layer cannot be replaced, or None."""
    module: Any = layer.module
    if not layer.name:
        return "it is the whole model: put it into a module"
    if not is_plain(module):
        return "its hooks would be lost"
    inputs = get_activation_quant(module)
    if inputs is not None and (inputs != ActivationQuant() or not isinstance(module, nn.Linear)):
        return "no kernel quantizes its inputs in this way"
    if len(layer.owners) > 1 or layer.tied_to or slots.uses[id(module)] > 1:
        return "its weight is shared"
    parent = slots.parents[layer.name]
    return f"{type(parent).__name__} reads its weight itself" if isinstance(parent, WEIGHT_READERS) else None


def _is_quantized(layer: Layer) -> bool:
    return layer.param in recorded_grids(layer.module)
