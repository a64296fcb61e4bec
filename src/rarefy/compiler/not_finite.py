"""NaN and infinities in inputs of models in 8 bits with static scales, whose codes have none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import ExportedGraph, Node
from rarefy.compiler.operators.fake_quantize import rounds_values
from rarefy.runtime.packing import unpack


def has_static_scales(exported: ExportedGraph, kernels: Mapping[Node, Any]) -> bool:
    """Return whether a graph rounds values to codes with static scales, where NaN becomes a number."""
    return rounds_values(exported) or any(k.input_grid is not None for k in kernels.values())


def are_finite(leaves: Sequence[Any]) -> bool:
    """Return whether no input has a NaN or an infinity. Reads each input once; a sum that overflows is looked at
    again."""
    floats = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
    return all(math.isfinite(float(t.sum())) or bool(t.isfinite().all()) for t in floats)


def with_not_finite(compiled: Any, leaves: list[Any], outputs: list[Any]) -> list[Any]:
    """Return outputs with the NaNs and infinities that the graph gives without rounding of values.

    Torch runs the graph once more, with dense weights made from the packed ones: this takes their memory, and several
    times the time of a call.

    Args:
        compiled: the `Compiled`.
        leaves: its inputs, in the graph's order.
        outputs: its outputs for them.
    """
    dense = {n.args[1].name: unpack(k.held[0]) for n, k in compiled.kernels.items()}
    exported = replace(compiled.exported, constants={**dense, **compiled.constants})
    exact = type(compiled)(exported, {}, compiled.input_specs, lambda *_: None)
    exact.in_place = {n: _unrounded for n in exported.graph.nodes if n.target is ops.fake_quantize}
    return [_fill(t, e) for t, e in zip(outputs, exact.run_leaves(leaves))]


def _unrounded(x: Tensor, *_: Any) -> Tensor:
    return x.clone()


def _fill(output: Any, exact: Any) -> Any:
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.shape != exact.shape:
        return output
    return torch.where(exact.isfinite(), output, exact.to(output.dtype))
