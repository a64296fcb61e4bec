"""Check shapes before a native call runs operators of a graph that came from a file.

A graph that was exported is consistent by construction. One from a file may say anything, and programs rely on shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import ModelError
from rarefy.compiler.fx_utils import Node
from rarefy.compiler.operators.spec import Shape, describe
from rarefy.compiler.operators.table import BY_TARGET


def check(
    nodes: Sequence[Node], inputs: Mapping[Node, Tensor], kernels: Mapping[Node, Any], constants: Mapping[str, Tensor]
) -> None:
    """Raise ModelError unless inputs are fp32 and each operator fits the shapes that it meets. O(nodes)."""
    for node, t in inputs.items():
        if t.dtype != torch.float32 or not t.is_cpu or t.layout != torch.strided or not t.dim():
            got = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
            raise ModelError(f"the saved graph is inconsistent: expected fp32 rows, got {node.name} {got}")
    masks = {mask for n in nodes if (mask := BY_TARGET[n.target].argument(n, "mask")) is not None}
    shapes: dict[Node, Shape] = {n: tuple(t.shape) for n, t in inputs.items() if n not in masks}
    for node in nodes:
        spec = BY_TARGET[node.target]
        arguments = [shapes.get(a) for a in spec.tensors(node)]
        call = describe(node, spec, arguments, kernels, constants, inputs)
        if None in arguments or not spec.fits(call):
            raise ModelError(f"the saved graph is inconsistent: {node.name} cannot run on shapes {arguments}")
        shapes[node] = spec.out_shape(call)
