"""Shapes by running: each new call of a torch graph is made on tensors without values, of one possible size.

ONNX's shape inference loses the number of dimensions where a shape is computed. A probe knows it, and the type, of all
values before the first operator whose output depends on values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.node import map_arg

KEY = "probe"  # of a node's metadata
FIRST, OTHERS = 2, 64  # sizes that are tried for open dimensions


def probe_input(node: fx.Node, dims: Any, dtype: torch.dtype, sizes: Mapping[int, int]) -> None:
    """Give an input a probe: of the sizes that are known, and of others where they are open."""
    shape = [sizes.get(d, FIRST if d == 0 else OTHERS) if n is None else n for d, n in enumerate(dims)]
    node.meta[KEY] = torch.empty(shape, dtype=dtype, device="meta")


def probe_constant(node: fx.Node, value: Tensor) -> None:
    """Give a constant a probe."""
    node.meta[KEY] = value.to("meta")


def probe_call(node: fx.Node, module: nn.Module | None) -> None:
    """Give a call a probe, if its arguments have one and it depends on no values."""
    if any(KEY not in n.meta for n in node.all_input_nodes):
        return
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta[KEY])
    try:
        if module is not None:
            tensors = {n: t.to("meta") for n, t in [*module.named_parameters(), *module.named_buffers()]}
            node.meta[KEY] = functional_call(module, tensors, args, kwargs)
        elif node.op == "call_method":
            node.meta[KEY] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            node.meta[KEY] = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # whatever torch raises for tensors without values, or sizes that do not fit
        return


def rank_of(value: Any) -> int | None:
    """Return the number of dimensions that a node's probe has, None without one."""
    probe = value.meta.get(KEY) if isinstance(value, fx.Node) else value
    return probe.dim() if isinstance(probe, Tensor) else None


def dtype_of_probe(value: Any) -> torch.dtype | None:
    """Return the type that a node's probe has, None without one."""
    probe = value.meta.get(KEY) if isinstance(value, fx.Node) else value
    return probe.dtype if isinstance(probe, Tensor) else None
