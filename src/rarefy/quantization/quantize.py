"""`quantize_`: weights onto grids of few bits, by rounding or by second order, with or without zeros chosen at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import DataError, ModelError
from rarefy.common.progress import track
from rarefy.common.report import Report
from rarefy.formats.quantized_encodings import sizes
from rarefy.model.activation_quant import ActivationQuant, set_activation_quant_
from rarefy.model.forward import check_batches
from rarefy.model.layers import Layer, Selector, select_layers, unwrap
from rarefy.model.masks import check_maskable, get_mask, set_mask_
from rarefy.model.quant_grid import Grid, WeightGrid, attached_grid, get_grid, record_grid_, scale_shape, set_grid_
from rarefy.prune.prune import check_weights, chosen_layers
from rarefy.prune.solver_config import Solver
from rarefy.quantization.activation_observers import input_grids, matmul_modules
from rarefy.quantization.config import Ask, asked
from rarefy.quantization.grids import check_finite, fit_grid
from rarefy.quantization.smoothquant import smooth_


def quantize_(
    model: nn.Module,
    weights: str = "int8",
    *,
    group: int | str | None = None,
    symmetric: bool = True,
    fit: str | None = None,
    solver: str | Solver | dict[str, Any] = "rtn",
    activations: str | None = None,
    observer: str | None = None,
    smooth: float | None = None,
    pattern: str | None = None,
    sparsity: float | None = None,
    layers: Selector = None,
    ignore: Selector = None,
    data: Iterable[Any] | None = None,
    progress: bool = False,
) -> Report:
    """Put the selected weights of `model` on grids of few bits, in place; return a row a layer.

    weights    int2 to int8
    group      how many inputs share a scale; None: all of an output; "tensor": the whole weight
    symmetric  codes lie around 0; False: zero has a code of its own, for weights that lean to one side
    fit        minmax, mse or hqq: how a scale is found (`rarefy.quantization.scale_fitting`);
               by default mse, of 8 bits minmax
    solver     rtn: each weight to its nearest point; obs (GPTQ): rounding errors are spread over weights that are not
               yet rounded, so that the layer's outputs on `data` stay (`rarefy.Solver` sets its options); round
               (AutoRound): blocks learn in `steps` which way each weight goes
    activations  round what Linear and Conv layers are given to 8 bits too: int8 (a scale for each row, found in each
               call) or int8-static (one scale and zero, found on `data` by `observer`: minmax, percentile or mse)
    smooth     0..1, with activations: first move that power of the largest inputs of Linear layers out of them, into
               the norm or layer that makes them (`rarefy.quantization.smoothquant`)
    pattern    obs: choose zeros in the same pass, with `sparsity` as in `rarefy.prune_`

    What is zero stays zero. Weights stay on their grid through training, whose gradients go straight through (QAT);
    `rarefy.fold_` writes them into plain weights and remembers the grid, `save` then stores the codes.
    Raises the ValueErrors of `rarefy.common.errors`, and then the model is unchanged (obs that fails half way
    leaves the
    layers before rounded). O(weights) besides the pass.

    >>> net = nn.Sequential(nn.Linear(64, 8))
    >>> report = quantize_(net, "int4", group=32)
    >>> report.rows[0]["grid"], len(net[0].weight[0, :32].unique()) <= 16
    ('int4 by 32', True)
    """
    ask = asked(weights, group, symmetric, fit, solver, activations, observer, smooth, pattern, sparsity)
    check_data(ask, data)
    data = data if data is None or isinstance(data, list | tuple) else list(data)
    chosen = chosen_layers(model, layers, ignore, ask.pattern) if ask.pattern else select_layers(model, layers, ignore)
    shapes = check_layers(chosen, ask)
    moved: dict[str, str] = {}
    undo: Callable[[], None] = _nothing
    if ask.smooth is not None:
        assert data is not None
        moved, undo = smooth_(unwrap(model), chosen, data, ask.smooth, progress)
    try:
        rows, made, reach, left = _found(model, chosen, shapes, ask, data, progress)
    except BaseException:
        undo()
        raise
    told = []
    for layer, (grid, values, mask) in zip(chosen, made):
        before = layer.weight.detach()
        error = {} if rows[layer.full_name] else {"error": relative_error(before, values)}
        told.append(_row(layer, grid, values, ask) | error | rows[layer.full_name])
        put_(layer, grid, values, mask)
        rounded = reach.get(layer.full_name)
        if rounded is not None:
            told[-1]["inputs"] = "dynamic" if rounded.scale is None else f"by {rounded.scale:.4g}"
        for module in matmul_modules(layer):
            set_activation_quant_(module, rounded)
    model.__dict__.pop("rarefy_receipt", None)  # what it measured is no longer so
    stored, dense = (sum(r[k] for r in told) for k in ("bytes", "dense bytes"))
    summary = {"layers": len(told), "bytes": stored, "dense bytes": dense, "ratio": stored / max(dense, 1)}
    smoothed = (f"smoothed: {len(moved)} of {len(chosen)} layers",) if ask.smooth is not None else ()
    notes = (f"inputs left as they are: {', '.join(left)}",) if left else ()
    return Report("quantized", tuple(told), summary, (*smoothed, *notes))


def _nothing() -> None:
    pass


def _found(
    model: nn.Module,
    chosen: Sequence[Layer],
    shapes: dict[str, tuple[int, ...]],
    ask: Ask,
    data: Any,
    progress: bool,
) -> tuple[dict[str, dict[str, Any]], list[Any], dict[str, ActivationQuant], list[str]]:
    """What is to be told of each layer; its grid, weights and mask; how inputs are rounded, and whose are not."""
    reach, left = {}, []
    if ask.activations is not None:
        reach, left = input_grids(unwrap(model), chosen, ask.activations, ask.observer, data, progress)
    if ask.solver is None:
        layers = track(chosen, "rounding", progress, len(chosen))
        made: list[Any] = [_nearest(l, shapes[l.full_name], ask) for l in layers]
        return {l.full_name: {} for l in chosen}, made, reach, left
    from rarefy.quantization.adaround import learn_rounding_
    from rarefy.quantization.gptq import gptq_

    assert data is not None
    run = learn_rounding_ if ask.solver.name == "round" else gptq_
    rows, made = run(unwrap(model), chosen, ask, shapes, data, progress)
    return rows, made, reach, left


def check_data(ask: Ask, data: Any) -> None:
    """Raise DataError for data that is missing, or has no effect."""
    if data is not None:
        check_batches(data)
    if ask.solver is not None and data is None:
        raise DataError(f"solver {ask.solver.name} works on a layer's inputs: give data=batches")
    calibrated = "activations 'int8-static'" if ask.activations == "int8-static" else "smooth"
    if (ask.activations == "int8-static" or ask.smooth is not None) and data is None:
        raise DataError(f"{calibrated} reads data: give data=batches")
    idle = ask.solver is None and ask.activations != "int8-static" and ask.smooth is None
    if idle and data is not None:
        raise DataError("data has no effect: solver 'rtn' rounds each weight by itself; give solver='obs' or 'round'")


def check_layers(chosen: Sequence[Layer], ask: Ask) -> dict[str, tuple[int, ...]]:
    """Return the shape of each layer's scales; raise ModelError for what cannot lie on such grids."""
    check_weights(chosen)
    for layer in chosen:
        if layer.original.numel() == 0:
            raise ModelError(f"{layer.full_name} has no weights ({list(layer.original.shape)}): ignore it")
        check_maskable(layer)
        if attached_grid(layer.module, layer.param) is not None or get_grid(layer) is not None:
            raise ModelError(
                f"{layer.full_name} is quantized already, and its rounding errors would be rounded again: start from "
                "the weights before, or ignore it"
            )
    return {l.full_name: scale_shape(l, ask.group) for l in chosen}


def put_(layer: Layer, grid: WeightGrid, values: Tensor, mask: Tensor | None) -> None:
    """Give a layer its rounded weights, its mask if it is new, and keep it on its grid."""
    if mask is not None:
        set_mask_(layer, mask)
    kept = get_mask(layer)
    with torch.no_grad():
        weight = layer.original
        weight.copy_(values if kept is None else torch.where(kept, values, weight))  # beneath a mask all stays
    for _, module, param in layer.owners:
        record_grid_(module, param, None)
    set_grid_(layer, grid)


def _nearest(layer: Layer, shape: tuple[int, ...], ask: Ask) -> tuple[Grid, Tensor, None]:
    weight = layer.weight.detach()
    grid = fit_grid(weight, shape, ask)
    return grid, check_finite(layer, grid, grid.snap(weight)), None


def relative_error(before: Tensor, after: Tensor) -> float:
    """Return the squared error of a weight, relative to its size."""
    was = before.float()
    return float((after.float() - was).square().sum() / was.square().sum().clamp(min=1e-30))


def _row(layer: Layer, grid: WeightGrid, values: Tensor, ask: Ask) -> dict[str, Any]:
    stored = min(sizes(values, grid, axis=layer.layout.in_axis).values())
    return {
        "layer": layer.full_name,
        "shape": "x".join(map(str, values.shape)),
        "grid": ask.words,
        "zeros": float((values == 0).float().mean()),
        "bytes": stored,
        "dense bytes": values.numel() * values.element_size(),
    }
