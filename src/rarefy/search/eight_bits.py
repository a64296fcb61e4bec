"""Which layers stay more exact where 8 bits lose too much: what each layer alone loses, and the time that it saves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from torch import nn

from rarefy.common.errors import RarefyError
from rarefy.compiler import ops
from rarefy.compiler.executor import Compiled
from rarefy.compiler.layer_precision import kinds_of_layers
from rarefy.model.activation_quant import get_activation_quant, set_activation_quant_
from rarefy.model.forward import call, without_targets
from rarefy.model.layers import Layer, all_layers
from rarefy.pipeline.sensitivity import replaced_weight
from rarefy.pipeline.speed import resize_batch
from rarefy.quantization.activation_observers import matmul_modules
from rarefy.quantization.config import QuantizeOptions
from rarefy.quantization.quantize import run_quantize
from rarefy.search.deploy import PLAIN, Variant, distance, has_static_scales, outputs_of
from rarefy.search.frontier import Point
from rarefy.search.journal import Journal
from rarefy.search.parts import measured_losses
from rarefy.search.space import EIGHT_BITS, Part, filled
from rarefy.search.targets import mean_speedup

REPEATS, WARMUP = 15, 3  # of profiled calls
LEAST = 1e-3  # of a call's time: below it a profile says nothing


def more_exact(within: Mapping[Variant, Point], counts_bytes: bool) -> Variant:
    """Return the precision for layers that lose most in 8 bits: the fastest other one, the smallest where bytes count.

    Args:
        within: the dense model in each precision that keeps the limit of loss.
        counts_bytes: whether sizes matter.
    """

    def worth(variant: Variant) -> tuple[float, float]:
        point = within[variant]
        return (-point.disk_bytes if counts_bytes else 0.0), mean_speedup(point.speedup)

    return max((v for v in within if v.precision != "int8"), key=worth, default=PLAIN)


def eight_bit_parts(
    dense: nn.Module,
    names: Collection[str],
    few: Sequence[Any],
    savings: Mapping[str, Mapping[str, float]],
    journal: Journal,
    fits: Callable[[str], bool],
    progress: bool,
) -> list[Part]:
    """Return a part for each layer that runs in 8 bits; none where the model's layers cannot be rounded.

    A loss is the squared relative distance of the outputs where this layer alone is rounded, with its inputs.

    Args:
        dense: the model.
        names: of the layers, from `layers_in_8_bits`.
        few: a few batches.
        savings: of each layer by name of what is timed, from `savings_of_layers`.
        journal: keeps what was measured.
        fits: whether a step of a kind fits into the time; layers that are not measured take the mean of others.
        progress: show a progress bar.
    """
    layers = [l for l in all_layers(dense) if l.name in names and matmul_modules(l)]
    in_8_bits = cache(lambda: _rounded(dense, layers, few))  # where losses are not known from the journal
    wanted = cache(lambda: outputs_of(dense, few))

    def loss(layer: Layer) -> float | None:
        if layer.full_name not in in_8_bits():
            return None
        with rounded_alone(layer, in_8_bits()[layer.full_name]):
            return distance(dense, wanted(), few)

    measures = {l.full_name: partial(loss, l) for l in layers}
    losses = filled(measured_losses(EIGHT_BITS, measures, journal, fits, progress), list(measures))
    return [
        Part(
            EIGHT_BITS, l.full_name, l.weight.numel(), (1.0,), (losses[l.full_name],),
            {n: (max(of_layer.get(l.name, 0.0), LEAST),) for n, of_layer in savings.items()},
        )
        for l in layers
        if l.full_name in losses
    ]  # fmt: skip


def _rounded(dense: nn.Module, layers: Sequence[Layer], few: Sequence[Any]) -> dict[str, Layer]:
    """Return the layers of a copy of the model in which these are rounded, by name; {} where they cannot be."""
    static = has_static_scales(dense, "int8", few)
    kind, solver = ("int8-static", "obs") if static else ("int8", "rtn")
    names = tuple(l.full_name for l in layers)
    options = QuantizeOptions(weights="int8", activations=kind, solver=solver, layers=names)
    rounded = copy.deepcopy(dense)
    try:
        run_quantize(rounded, options, few if static else None)
    except RarefyError:
        return {}
    return {l.full_name: l for l in all_layers(rounded)}


def layers_in(compiled: Compiled, precision: str) -> list[str]:
    """Return the linear layers and convolutions of a compiled model with a kernel in a precision."""
    kinds = kinds_of_layers(compiled.exported, compiled.kernels)
    return sorted(name for name, kind in kinds.items() if kind == precision)


def layers_in_8_bits(compiled: Compiled) -> list[str]:
    """Return the layers of a compiled model that run in 8 bits."""
    layers, nodes = compiled.exported.layers, compiled.exported.graph.nodes
    depthwise = [u for n in nodes if n.target is ops.fake_quantize for u in n.users if u.target is ops.conv2d]
    return sorted({*layers_in(compiled, "int8"), *(layers[n] for n in depthwise if n in layers)})


@contextmanager
def rounded_alone(layer: Layer, rounded: Layer) -> Iterator[None]:
    """Give a layer the weight of a rounded copy of it, and round its inputs as the copy's, for a while."""
    modules = [m for m in matmul_modules(layer) if get_activation_quant(m) is None]
    inputs = get_activation_quant(rounded.module)
    in_16_bits = getattr(layer.module, "groups", 1) > 1  # weights of depthwise convolutions
    with replaced_weight(layer, (layer if in_16_bits else rounded).weight.detach()):
        try:
            for module in modules:
                set_activation_quant_(module, inputs)
            yield
        finally:
            for module in modules:
                set_activation_quant_(module, None)


def savings_of_layers(
    plain: Compiled, in_8_bits: Compiled, example: Any, whole: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Return {what is timed: {layer: the part of a call's time in a more exact precision that it saves in 8 bits}}.

    Args:
        plain: the model compiled in the more exact precision.
        in_8_bits: the same in 8 bits.
        example: what they can be called with.
        whole: by batch size what all layers save together; the parts add up to it.
    """
    result: dict[str, dict[str, float]] = {}
    for name, saving in whole.items():
        batch = resize_batch(without_targets(example), int(name))
        before, after = (_milliseconds_of_layers(model, batch) for model in (plain, in_8_bits))
        less = {layer: before[layer] - after.get(layer, 0.0) for layer in before}
        total = sum(less.values())
        result[name] = {layer: saving * m / total for layer, m in less.items()} if total > 0 else {}
    return result


def _milliseconds_of_layers(model: Compiled, batch: Any) -> dict[str, float]:
    """Return the time of each layer in a call."""
    times: dict[str, float] = {}
    for row in call(partial(model.profile, repeats=REPEATS, warmup=WARMUP), batch).rows:
        if row.layer:
            times[row.layer] = times.get(row.layer, 0.0) + row.milliseconds
    return times
