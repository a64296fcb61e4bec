"""The numbers that modules keep of their sizes, after a cut."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rarefy.dependency.graph import Graph
from rarefy.dependency.symbolic_dims import Algebra, Axis, Expr, kept, leaves, size
from rarefy.model.mha import OwnHeads

HEAD_DIMENSION = re.compile(r"head_?(dim|size|features)|(dim|size|features|per|d)_?(per_)?head|d_kv")
# what models call their width, for others to read: not named in a view
WIDTHS = (
    "embed_dim",
    "num_features",
    "in_features",
    "head_hidden_size",
    "hidden_size",
    "hidden_dim",
    "d_model",
    "dim",
    "width",
)
# class -> {attribute: (parameter, dimension)}: it is the size of that dimension
OF: dict[type, dict[str, tuple[str, int]]] = {
    nn.Linear: {"out_features": ("weight", 0), "in_features": ("weight", 1)},
    nn.Embedding: {"embedding_dim": ("weight", 1)},
    nn.modules.batchnorm._NormBase: {"num_features": ("weight", 0)},
    nn.RNNBase: {"input_size": ("weight_ih_l0", 1)},
    nn.GroupNorm: {"num_channels": ("weight", 0)},
    OwnHeads: {n: ("in_proj_weight", 1) for n in ("embed_dim", "kdim", "vdim")},
}


def update_size_attributes(
    model: nn.Module, graph: Graph, masks: Mapping[Axis, Tensor]
) -> tuple[list[Any], dict[str, Any]]:
    """Set what modules know of the sizes of their parameters and views; return what undoes it, and what was set."""
    undo: list[Any] = []
    numbers: dict[str, Any] = {}
    whose = {id(m): n for n, m in model.named_modules()}
    names = {(id(m), a): n for n, owners in graph.owners.items() for m, a in owners}

    def put(module: nn.Module, attribute: str, value: Any) -> None:
        old = getattr(module, attribute)
        if old != value:
            setattr(module, attribute, value)
            name = f"{whose[id(module)]}.{attribute}".removeprefix(".")
            numbers[name] = list(value) if isinstance(value, tuple) else value
            undo.append(lambda: setattr(module, attribute, old))

    def after(module: nn.Module, parameter: str, dim: int) -> int | None:
        name = names.get((id(module), parameter))
        return None if name is None else int(kept(graph.dims[name][dim], masks.get).sum())

    for prefix, module in model.named_modules():
        known: set[str] = set()
        for kind, attributes in OF.items():
            if isinstance(module, kind):
                for attribute, (parameter, dim) in attributes.items():
                    n = after(module, parameter, dim)
                    n = after(module, "running_mean", 0) if n is None and attribute == "num_features" else n
                    if n is not None:  # else it is like any other number, as of norms without parameters
                        put(module, attribute, n)
                        known.add(attribute)
        if isinstance(module, nn.modules.conv._ConvNd):
            _convolution(module, graph, names, masks, put)
            known |= {*module.__constants__, *vars(module)}
        if isinstance(module, nn.LayerNorm) and names.get((id(module), "weight")):
            dims = graph.dims[names[id(module), "weight"]]
            put(module, "normalized_shape", tuple(int(kept(e, masks.get).sum()) for e in dims))
            known.add("normalized_shape")
        for attribute, value in list(vars(module).items()):
            if attribute in known or attribute.startswith("_"):
                continue
            seen = graph.sizes.get(prefix, [])
            if type(value) is int:
                if isinstance(module, nn.modules.batchnorm._NormBase):  # not places, which may be as many
                    seen = [e for e in seen if int(kept(e, masks.get).sum()) != size(e)]
                new = _new_size(value, attribute, seen, masks)
                new = _new_width(value, prefix, graph, masks) if new is None and attribute in WIDTHS else new
                if new is not None:
                    put(module, attribute, new)
            elif type(value) is tuple and value and all(type(n) is int for n in value):
                news = [_new_size(n, attribute, seen, masks) for n in value]
                put(module, attribute, tuple(n if new is None else new for n, new in zip(value, news)))
    return undo, numbers


def _convolution(module: Any, graph: Graph, names: Mapping[Any, str], masks: Mapping[Axis, Tensor], put: Any) -> None:
    dims = graph.dims[names[id(module), "weight"]]
    turned = module.transposed
    outer, inner = Algebra().factor(dims[0], module.groups)
    groups, a, b = (int(kept(e, masks.get).sum()) for e in (outer, inner, dims[1]))
    put(module, "groups", groups)
    put(module, "in_channels", groups * (a if turned else b))
    put(module, "out_channels", groups * (b if turned else a))


def _new_size(value: int, attribute: str, seen: list[Expr], masks: Mapping[Axis, Tensor]) -> int | None:
    """What an int attribute becomes: it has the size of dimensions that the module names, all of which change alike."""
    if value < 2:
        return None
    wanted = "head_dim" if HEAD_DIMENSION.search(attribute) else "head" if "head" in attribute else None
    found = set()
    for e in seen:
        axes = list(leaves(e))
        kind = axes[0].kind if len(axes) == 1 and axes[0].kind in ("head", "head_dim") else None
        if size(e) == value and (wanted is None or kind == wanted):
            found.add(int(kept(e, masks.get).sum()))
    return found.pop() if len(found) == 1 else None


def _new_width(value: int, prefix: str, graph: Graph, masks: Mapping[Axis, Tensor]) -> int | None:
    """What a width becomes: that of all biases, scales and statistics of that size in the module, if they agree."""
    inside = f"{prefix}." if prefix else ""
    vectors = [dims[0] for name, dims in graph.dims.items() if len(dims) == 1 and name.startswith(inside)]
    found = {int(kept(e, masks.get).sum()) for e in vectors if size(e) == value}
    return found.pop() if len(found) == 1 else None
