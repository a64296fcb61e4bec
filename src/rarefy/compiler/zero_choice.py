"""Skip zeros where that is faster: time each layer with them skipped and multiplied, and keep the faster format.

The fractions of zeros in `kernel_selection` decide without timing. They are means over layers; sizes of images, other
layouts beside a layer and the CPU shift them. Choices are remembered in the tuning cache.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

from rarefy.compiler import ops, tuning
from rarefy.compiler.executor import Compiled
from rarefy.compiler.fx_utils import Node
from rarefy.compiler.kernel_selection import in_other_format, zero_lanes
from rarefy.compiler.profile import Recorder
from rarefy.runtime import bindings, tuning_cache
from rarefy.runtime.huge_pages import HugePageBuffer
from rarefy.runtime.kernel import Kernel
from rarefy.runtime.packed_formats import (
    INT16_COLUMNS,
    LANE,
    MAX_STRIDE,
    ConvTiles,
    Dense,
    Packed,
    Sell,
    Tiles,
    skips_zeros,
)
from rarefy.runtime.packing import unpack

# fraction of zero lanes from which skipping them is timed
MIN_TRIED = {"fp32": 0.3, "bf16": 0.15, "int16": 0.15, "int8": 0.1}
MAX_SECONDS = 3.0  # of timing layers, and again of timing the model
MIN_CALLS, MAX_CALLS = 3, 15  # of each format
CLEARLY_FASTER = 0.97  # time over that of skipped zeros from which they are multiplied
SKIPPED, MULTIPLIED = "zeros skipped", "zeros multiplied"

Formats = dict[Node, dict[str, Packed]]  # the packed weights of a layer: SKIPPED, MULTIPLIED


def formats_of(packed: Packed) -> dict[str, Packed]:
    """Return a weight with zeros skipped and multiplied; {} where its format is fixed, or zeros are too few to skip.

    O(weights log block).
    """
    matrix = packed.matrix if isinstance(packed, ConvTiles) else packed
    if not isinstance(matrix, Dense | Tiles | Sell) or packed.kind not in LANE:
        return {}
    if bindings.isa() == "amx" and packed.kind != "fp32":  # its files have other formats, and its fractions are clear
        return {}
    if isinstance(packed, ConvTiles) and (packed.groups > 1 or max(packed.stride) > MAX_STRIDE):
        return {}
    if packed.kind == "int16" and (isinstance(packed, ConvTiles) or packed.shape[1] > INT16_COLUMNS):
        return {}  # sparse kernels sum whole rows, for which codes of these are too large
    weight = unpack(packed)
    if zero_lanes(weight.movedim(1, -1), packed.kind) < MIN_TRIED[packed.kind]:
        return {}
    other = in_other_format(packed, weight)
    return {SKIPPED: packed, MULTIPLIED: other} if skips_zeros(packed) else {SKIPPED: other, MULTIPLIED: packed}


def choose_formats_(compiled: Compiled, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Give each layer with zeros the format that is faster on the example.

    Each layer is timed in both formats, inside the model. Then the model with all zeros skipped, with none, and with
    the faster format of each layer take turns, and the fastest stays.

    Returns:
        Whether any layer has enough zeros for a choice.

    Cost: packing each weight once more, and at most about 6 seconds, or 20 calls of the model. Memory: both formats
    until it ends.
    """
    formats = _all_formats(compiled)
    if not formats:
        return False
    file = tuning_cache.default_file()
    key = f"zeros {tuning.signature_of_calls(compiled, args, kwargs)}"
    known = tuning_cache.read(file).get(key, {})
    if known.keys() == set(range(len(formats))) and {name for name, _ in known.values()} <= {SKIPPED, MULTIPLIED}:
        choice = {node: known[i][0] for i, node in enumerate(formats)}
        compiled.kernels = _with_formats(compiled.kernels, formats, choice)
    else:
        choice, compiled.kernels = _fastest(compiled, formats, args, kwargs)
        tuning_cache.write(file, {key: {i: (name, 1.0) for i, name in enumerate(choice.values())}})
    compiled.reschedule()
    return True


def _all_formats(compiled: Compiled) -> Formats:
    """Return the formats of all layers that have both; layers that share a weight share its formats."""
    known: dict[Any, dict[str, Packed]] = {}
    layers: Formats = {}
    for node, kernel in compiled.kernels.items():
        if node.target not in (ops.linear, ops.conv2d):
            continue
        packed = kernel.held[0]
        key = packed.values.data_ptr(), packed.shape, *(node.args[5:] if node.target is ops.conv2d else ())
        if key not in known:
            known[key] = formats_of(packed)
        if known[key]:
            layers[node] = known[key]
    return layers


def _with_formats(kernels: Mapping[Node, Any], formats: Formats, choice: Mapping[Node, str]) -> dict[Node, Any]:
    """Return kernels with weights in the chosen formats; these are copied to huge pages, shared ones once."""
    memory, held, new = HugePageBuffer(), {}, dict(kernels)
    for node, name in choice.items():
        old, form = kernels[node], formats[node][name]
        if id(form) not in held:
            held[id(form)] = memory.hold(form)
        new[node] = Kernel(held[id(form)], old.held[1], node.args[4])
        new[node].input_grid, new[node].residual_grid = old.input_grid, old.residual_grid
    return new


def _fastest(
    compiled: Compiled, formats: Formats, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[Node, str], Mapping[Node, Any]]:
    """Return for each layer SKIPPED or MULTIPLIED, and the kernels of the model so."""
    choices = {name: dict.fromkeys(formats, name) for name in (SKIPPED, MULTIPLIED)}

    def make(choice: Mapping[Node, str]) -> Compiled:
        return compiled.with_kernels(_with_formats(compiled.kernels, formats, choice))

    variants = {name: make(choice) for name, choice in choices.items()}
    leaves = compiled.leaves(args, dict(kwargs))
    seconds = _seconds_of_nodes(variants, leaves)
    costs = {name: _costs_of(formats, times, seconds) for name, times in seconds.items()}
    mixed = {n: MULTIPLIED if costs[MULTIPLIED][n] < CLEARLY_FASTER * costs[SKIPPED][n] else SKIPPED for n in formats}
    if mixed not in choices.values():
        choices["mixed"] = mixed
        variants["mixed"] = make(mixed)
    best = _fastest_variant(variants, leaves)
    return choices[best], variants[best].kernels


def _seconds_of_nodes(variants: Mapping[str, Compiled], leaves: list[Any]) -> dict[str, dict[Node, float]]:
    """Return for each variant the median seconds of each node of its graph, called in turns."""
    samples: dict[str, dict[Node, list[float]]] = {name: {} for name in variants}
    deadline = time.perf_counter() + MAX_SECONDS
    for i in range(1 + MAX_CALLS):
        for name, compiled in variants.items():
            recorder = Recorder()
            compiled.run_leaves(leaves, recorder=recorder)
            for node, spent in recorder.seconds_of_nodes().items() if i else ():
                samples[name].setdefault(node, []).append(spent)
        if i >= MIN_CALLS and time.perf_counter() > deadline:
            break
    return {name: {n: median(times) for n, times in nodes.items()} for name, nodes in samples.items()}


def _costs_of(
    formats: Formats, times: Mapping[Node, float], seconds: Mapping[str, Mapping[Node, float]]
) -> dict[Node, float]:
    """Return the seconds of layers, and of what their neighbours take longer than in the other formats, as where the
    layout of an image changes between them."""
    costs = {n: times.get(n, 0.0) for n in formats}
    for node, spent in times.items():
        longer = spent - min(nodes.get(node, 0.0) for nodes in seconds.values())
        beside = [n for n in {*node.all_input_nodes, *node.users} if n in formats]
        if node not in formats and beside:
            for n in beside:
                costs[n] += longer / len(beside)
    return costs


def _fastest_variant(variants: Mapping[str, Compiled], leaves: list[Any]) -> str:
    """Return which variant's fastest call is the fastest, called in turns."""
    runs = [partial(compiled.run_leaves, leaves) for compiled in variants.values()]
    seconds = dict(zip(variants, tuning.fewest_seconds(runs, MAX_SECONDS, MIN_CALLS, 2 * MAX_CALLS)))
    return min(seconds, key=lambda name: seconds[name])
