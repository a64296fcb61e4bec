"""`quantize_`: weights onto grids of few bits, by rounding or by second order, with or without zeros chosen at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rarefy.common.checks import as_dict
from rarefy.common.errors import DataError, ModelError
from rarefy.common.progress import track
from rarefy.common.report import Report
from rarefy.formats.quantized_encodings import sizes
from rarefy.model.activation_quant import ActivationQuant, set_activation_quant_
from rarefy.model.attached_receipt import forget_receipt
from rarefy.model.forward import check_batches
from rarefy.model.layers import Layer, Selector, select_layers, unwrap
from rarefy.model.masks import check_maskable, get_mask, set_mask_
from rarefy.model.quant_grid import Grid, WeightGrid, attached_grid, get_grid, record_grid_, scale_shape, set_grid_
from rarefy.prune.prune import check_weights, chosen_layers
from rarefy.prune.solver_config import Solver
from rarefy.quantization.activation_observers import input_grids, matmul_modules
from rarefy.quantization.config import QuantizeConfig, QuantizedWeight, QuantizeOptions, layer_configs, resolve_options
from rarefy.quantization.grids import check_finite, fit_grid
from rarefy.quantization.smoothquant import smooth_


def quantize_(
    model: nn.Module,
    weights: str = "int8",
    *,
    per_layer: Mapping[str, str] | None = None,
    group: int | Literal["tensor"] | None = None,
    symmetric: bool = True,
    fit: str | None = None,
    solver: str | Solver | Mapping[str, Any] = "rtn",
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
    """Quantize the selected weights of a model in place: round them to grids of few bits.

    Zeros stay zeros. Weights stay on their grid when the model is trained (straight-through gradients, QAT).
    `rarefy.fold_` writes them into plain weights and remembers the grid; `save` then stores the codes.
    Costs O(weights) and the pass over the data; obs O(outputs inputs^2 + inputs^3) a layer, round 200 steps a block.

    Args:
        model: any module with Linear, Conv or Embedding layers.
        weights: "int2" to "int8".
        per_layer: bits of single layers that differ from `weights`, by their full name: {"model.layers.0.mlp.up_proj":
            "int4"}. They are rounded in the same pass. Not for solver "round".
        group: how many inputs share a scale. None: all inputs of an output; "tensor": the whole weight.
        symmetric: codes are centred at 0. False: with a zero point, for weights that are not centred.
        fit: how a scale is found (`rarefy.quantization.scale_fitting`): minmax, mse or hqq. By default mse, of 8 bits
            minmax.
        solver: "rtn": round to nearest. "obs" (GPTQ, Frantar 2023): distribute rounding errors over weights that are
            not yet rounded, so that the layer's outputs on `data` are preserved. Below 8 bits targets also move towards
            the dense model's outputs (GPTAQ, Li 2025), which corrects errors of earlier layers. "round" (AutoRound,
            Cheng 2024): learn the direction of rounding, block by block. `rarefy.Solver` sets options.
        activations: quantize the inputs of Linear and Conv layers to 8 bits too: "int8" (a scale a row, found in each
            call) or "int8-static" (one scale and zero point, calibrated on `data`).
        observer: int8-static: how the range of inputs is found: mse (the default), minmax or percentile.
        smooth: 0 to 1, with activations: first move that power of the largest inputs of Linear layers into their
            weights (SmoothQuant, Xiao 2023).
        pattern: obs: prune in the same pass to this pattern, as in `rarefy.prune_`.
        sparsity: with pattern: fraction of zeros.
        layers: names, globs or other selectors of layers; by default all but embeddings and the output head.
        ignore: selectors of layers to leave as they are.
        data: batches that `model` can be called with: for obs, round, int8-static and smooth.
        progress: show progress bars.

    Returns:
        A `Report` with one row for each layer: its grid, fraction of zeros, bytes stored and dense, and the squared
        error, relative to the squared weights (obs: of the layer's outputs, from those that it aimed at).

    Raises:
        RarefyError: for options, layers or data that do not fit. The model is then unchanged; if obs fails halfway,
            the layers before stay rounded.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 8))
        >>> report = quantize_(net, "int4", group=32)
        >>> report.rows[0]["grid"], len(net[0].weight[0, :32].unique()) <= 16
        ('int4 by 32', True)
    """
    options = QuantizeOptions(
        weights=weights,
        per_layer=as_dict(per_layer),
        group=group, symmetric=symmetric, fit=fit, solver=solver, activations=activations, observer=observer,
        smooth=smooth, pattern=pattern, sparsity=sparsity, layers=layers, ignore=ignore,
    )  # fmt: skip
    return run_quantize(model, options, data, progress=progress)


def run_quantize(
    model: nn.Module, options: QuantizeOptions, data: Iterable[Any] | None = None, *, progress: bool = False
) -> Report:
    """Quantize a model by checked options. See `quantize_`."""
    config = resolve_options(options)
    check_data(config, data)
    data = data if data is None or isinstance(data, list | tuple) else list(data)
    layers = layers_to_quantize(model, options, config)
    configs = layer_configs(options, layers)
    shapes = check_layers(layers, config)
    smoothed: dict[str, str] = {}
    undo: Callable[[], None] = _nothing
    if config.smooth is not None:
        assert data is not None
        smoothed, undo = smooth_(unwrap(model), layers, data, config.smooth, progress)
    try:
        input_grid, unquantized = {}, []
        if config.activations is not None:
            input_grid, unquantized = input_grids(
                unwrap(model), layers, config.activations, config.observer, data, progress
            )
        measured, weights = _quantized_weights(model, layers, shapes, configs, data, progress)
    except BaseException:
        undo()
        raise
    rows = []
    for layer, quantized in zip(layers, weights):
        inputs = input_grid.get(layer.full_name)
        rows.append(_apply(layer, quantized, inputs, configs[layer.full_name], measured[layer.full_name]))
    forget_receipt(model)
    stored, dense = (sum(r[k] for r in rows) for k in ("bytes", "dense bytes"))
    summary = {"layers": len(rows), "bytes": stored, "dense bytes": dense, "ratio": stored / max(dense, 1)}
    notes = [f"smoothed: {len(smoothed)} of {len(layers)} layers"] if config.smooth is not None else []
    notes += [f"inputs not quantized: {', '.join(unquantized)}"] if unquantized else []
    return Report("quantized", tuple(rows), summary, tuple(notes))


def layers_to_quantize(model: nn.Module, options: QuantizeOptions, config: QuantizeConfig) -> list[Layer]:
    """Return the selected layers; PatternError where a pattern has nothing to prune in one."""
    if config.pattern is None:
        return select_layers(model, options.layers, options.ignore)
    return chosen_layers(model, options.layers, options.ignore, config.pattern)


def _nothing() -> None:
    pass


def _quantized_weights(
    model: nn.Module,
    layers: Sequence[Layer],
    shapes: dict[str, tuple[int, ...]],
    configs: Mapping[str, QuantizeConfig],
    data: Any,
    progress: bool,
) -> tuple[dict[str, dict[str, Any]], list[QuantizedWeight]]:
    """Return what a solver measured of each layer, and each layer's grid, weights and new mask."""
    config = configs[layers[0].full_name]  # the solver is the same for all layers
    if config.solver is None:
        tracked, names = track(layers, "rounding", progress, len(layers)), [l.full_name for l in layers]
        return {n: {} for n in names}, [_nearest(l, shapes[n], configs[n]) for n, l in zip(names, tracked)]
    from rarefy.quantization.adaround import learn_rounding_
    from rarefy.quantization.gptq import gptq_

    assert data is not None
    if config.solver.name == "round":
        return learn_rounding_(unwrap(model), layers, config, shapes, data, progress)
    return gptq_(unwrap(model), layers, configs, shapes, data, progress)


def _apply(
    layer: Layer,
    quantized: QuantizedWeight,
    inputs: ActivationQuant | None,
    config: QuantizeConfig,
    measured: dict[str, Any],
) -> dict[str, Any]:
    """Put a quantized weight and the grid of inputs in place; return the row of the layer."""
    grid, values, mask = quantized
    error = {} if measured else {"error": relative_error(layer.weight.detach(), values)}
    row = _row(layer, grid, values, config) | error | measured
    set_quantized_(layer, grid, values, mask)
    if inputs is not None:
        row["inputs"] = "dynamic" if inputs.scale is None else f"by {inputs.scale:.4g}"
    for module in matmul_modules(layer):
        set_activation_quant_(module, inputs)
    return row


def check_data(config: QuantizeConfig, data: Any) -> None:
    """Raise DataError for data that is missing, or has no effect."""
    if data is not None:
        check_batches(data)
    if config.solver is not None and data is None:
        raise DataError(f"solver {config.solver.name} needs the inputs of each layer: give data=batches")
    calibrated = "activations 'int8-static'" if config.activations == "int8-static" else "smooth"
    if (config.activations == "int8-static" or config.smooth is not None) and data is None:
        raise DataError(f"{calibrated} reads data: give data=batches")
    idle = config.solver is None and config.activations != "int8-static" and config.smooth is None
    if idle and data is not None:
        raise DataError("data has no effect: solver 'rtn' rounds each weight by itself; give solver='obs' or 'round'")


def check_layers(chosen: Sequence[Layer], config: QuantizeConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each layer's scales; raise ModelError for layers that cannot be quantized like this."""
    check_weights(chosen)
    for layer in chosen:
        if layer.original.numel() == 0:
            raise ModelError(f"{layer.full_name} has no weights ({list(layer.original.shape)}): ignore it")
        check_maskable(layer)
        if attached_grid(layer.module, layer.param) is not None or get_grid(layer) is not None:
            raise ModelError(
                f"{layer.full_name} is already quantized: start from the weights before quantization, or ignore "
                "the layer"
            )
    return {l.full_name: scale_shape(l, config.group) for l in chosen}


def set_quantized_(layer: Layer, grid: WeightGrid, values: Tensor, mask: Tensor | None) -> None:
    """Write rounded weights into a layer, with their mask if it is new, and attach the grid."""
    if mask is not None:
        set_mask_(layer, mask)
    present = get_mask(layer)
    with torch.no_grad():
        weight = layer.original
        weight.copy_(values if present is None else torch.where(present, values, weight))  # masked weights stay
    for _, module, param in layer.owners:
        record_grid_(module, param, None)
    set_grid_(layer, grid)


def _nearest(layer: Layer, shape: tuple[int, ...], config: QuantizeConfig) -> tuple[Grid, Tensor, None]:
    weight = layer.weight.detach()
    grid = fit_grid(weight, shape, config)
    return grid, check_finite(layer, grid, grid.snap(weight)), None


def relative_error(before: Tensor, after: Tensor) -> float:
    """Return the squared error of a weight, relative to its size."""
    largest = before.float().abs().max().clamp(min=1e-30)  # whose square may be too large
    was, now = before.float() / largest, after.float() / largest
    return float((now - was).square().sum() / was.square().sum().clamp(min=1e-30))


def _row(layer: Layer, grid: WeightGrid, values: Tensor, config: QuantizeConfig) -> dict[str, Any]:
    stored = min(sizes(values, grid, axis=layer.layout.in_axis).values())
    return {
        "layer": layer.full_name,
        "shape": "x".join(map(str, values.shape)),
        "grid": config.description,
        "zeros": float((values == 0).float().mean()),
        "bytes": stored,
        "dense bytes": values.numel() * values.element_size(),
    }
