"""Update the sizes that modules store as attributes, after a cut."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rarefy.dependency.graph import Graph
from rarefy.dependency.symbolic_dims import Algebra, Axis, Expr, kept_mask, leaves, size
from rarefy.model.mha import PrunableMultiheadAttention

HEAD_DIMENSION = re.compile(r"head_?(dim|size|features)|(dim|size|features|per|d)_?(per_)?head|d_kv")
# numbers that are no sizes of weights, unless a word for such sizes is in the name too
OTHER_NUMBER = re.compile(
    r"(^|_)(idx|index|id|ids|number|top_?k|k|buckets?|window|windows|length|len|stride|strides|padding|dilation|kernel|"
    r"kernels|positions?|vocab|layers?|blocks?|depth|stages?|steps?|seed|eps|epoch|epochs|patch|patches|image|img|"
    r"resolution|tokens?|max|min|experts?|labels?|classes|iterations?|levels?|chunk|chunks)(_|$)"
)
SIZE_WORD = re.compile(r"head|channel|feature|hidden|width|embed|dim|unit|neuron|inner|ffn|mlp|intermediate")
# names of a model's width that other modules read; no view has this size
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
# class -> {attribute: (parameter, dimension)}: the attribute is the size of that dimension
SIZE_OF: dict[type, dict[str, tuple[str, int]]] = {
    nn.Linear: {"out_features": ("weight", 0), "in_features": ("weight", 1)},
    nn.Embedding: {"embedding_dim": ("weight", 1)},
    nn.modules.batchnorm._NormBase: {"num_features": ("weight", 0)},
    nn.RNNBase: {"input_size": ("weight_ih_l0", 1)},
    nn.GroupNorm: {"num_channels": ("weight", 0)},
    PrunableMultiheadAttention: {n: ("in_proj_weight", 1) for n in ("embed_dim", "kdim", "vdim")},
}


def update_size_attributes(
    model: nn.Module, graph: Graph, masks: Mapping[Axis, Tensor]
) -> tuple[list[Any], dict[str, Any]]:
    """Set the attributes that hold sizes of parameters and views; return what undoes it, and {name: new value}."""
    sizes = _Sizes(model, graph, masks)
    for prefix, module in model.named_modules():
        known = _update_known(module, sizes)
        for attribute, value in list(vars(module).items()):
            if attribute not in known and not attribute.startswith("_") and _may_be_size(attribute):
                _update_other(prefix, module, attribute, value, sizes)
    return sizes.undo, sizes.numbers


def _may_be_size(attribute: str) -> bool:
    """Return whether a number of this name may be a size that a cut changes, not one that is equal by chance.

    >>> [_may_be_size(n) for n in ("num_heads", "layer_idx", "top_k", "num_buckets", "window_size", "n")]
    [True, False, False, False, False, True]
    """
    return not OTHER_NUMBER.search(attribute) or bool(SIZE_WORD.search(attribute))


class _Sizes:
    """The sizes after a cut, and the attributes that were set."""

    def __init__(self, model: nn.Module, graph: Graph, masks: Mapping[Axis, Tensor]):
        self.graph, self.masks = graph, masks
        self.undo: list[Any] = []
        self.numbers: dict[str, Any] = {}
        self.prefixes = {id(m): n for n, m in model.named_modules()}
        self.names = {(id(m), a): n for n, owners in graph.owners.items() for m, a in owners}

    def set(self, module: nn.Module, attribute: str, value: Any) -> None:
        """Set an attribute, if it changes."""
        old = getattr(module, attribute)
        if old != value:
            setattr(module, attribute, value)
            name = f"{self.prefixes[id(module)]}.{attribute}".removeprefix(".")
            self.numbers[name] = list(value) if isinstance(value, tuple) else value
            self.undo.append(lambda: setattr(module, attribute, old))

    def after(self, module: nn.Module, parameter: str, dim: int) -> int | None:
        """Return the size of a parameter's dimension after the cut; None for one that the graph does not have."""
        dims = self.dims(module, parameter)
        return None if dims is None else self.size_of(dims[dim])

    def dims(self, module: nn.Module, parameter: str) -> list[Expr] | None:
        """Return the dimensions of a parameter, or of a weight that is computed in each call."""
        name = self.names.get((id(module), parameter))
        if name is None and parameter == "weight":
            return self.graph.derived_weights.get(self.prefixes[id(module)])
        return None if name is None else self.graph.dims[name]

    def size_of(self, expr: Expr) -> int:
        """Return the size of a dimension after the cut."""
        return int(kept_mask(expr, self.masks.get).sum())


def _update_known(module: nn.Module, sizes: _Sizes) -> set[str]:
    """Set the sizes of torch's own layers; return the names of attributes that are done."""
    known: set[str] = set()
    for kind, attributes in SIZE_OF.items():
        if isinstance(module, kind):
            for attribute, (parameter, dim) in attributes.items():
                n = sizes.after(module, parameter, dim)
                n = sizes.after(module, "running_mean", 0) if n is None and attribute == "num_features" else n
                if n is not None:  # otherwise an ordinary number, such as of norms without parameters
                    sizes.set(module, attribute, n)
                    known.add(attribute)
    if isinstance(module, nn.modules.conv._ConvNd):
        _update_convolution(module, sizes)
        known |= {*module.__constants__, *vars(module)}
    if isinstance(module, nn.LayerNorm) and sizes.names.get((id(module), "weight")):
        dims = sizes.graph.dims[sizes.names[id(module), "weight"]]
        sizes.set(module, "normalized_shape", tuple(sizes.size_of(e) for e in dims))
        known.add("normalized_shape")
    return known


def _update_other(prefix: str, module: nn.Module, attribute: str, value: Any, sizes: _Sizes) -> None:
    """Set an int, or a tuple of ints, that equals a size which changes."""
    dims = sizes.graph.sizes.get(prefix, [])
    if type(value) is int:
        if isinstance(module, nn.modules.batchnorm._NormBase):  # not pixel counts, which may be equal
            dims = [e for e in dims if sizes.size_of(e) != size(e)]
        new = _new_size(value, attribute, dims, sizes)
        new = _new_width(value, prefix, sizes) if new is None and attribute in WIDTHS else new
        if new is not None:
            sizes.set(module, attribute, new)
    elif type(value) is tuple and value and all(type(n) is int for n in value):
        news = [_new_size(n, attribute, dims, sizes) for n in value]
        sizes.set(module, attribute, tuple(n if new is None else new for n, new in zip(value, news)))


def _update_convolution(module: Any, sizes: _Sizes) -> None:
    """Set groups and channels of a convolution."""
    dims = sizes.dims(module, "weight")
    if dims is None:  # the example does not call it
        return
    outer, inner = Algebra().factor(dims[0], module.groups)
    groups, a, b = (sizes.size_of(e) for e in (outer, inner, dims[1]))
    sizes.set(module, "groups", groups)
    sizes.set(module, "in_channels", groups * (a if module.transposed else b))
    sizes.set(module, "out_channels", groups * (b if module.transposed else a))


def _new_size(value: int, attribute: str, dims: list[Expr], sizes: _Sizes) -> int | None:
    """Return what an int attribute becomes: it equals the size of dimensions of the module that all change alike."""
    if value < 2:
        return None
    named = "head_dim" if HEAD_DIMENSION.search(attribute) else "head" if "head" in attribute else None
    new_sizes = set()
    for e in dims:
        axes = list(leaves(e))
        kind = axes[0].kind if len(axes) == 1 and axes[0].kind in ("head", "head_dim") else None
        if size(e) == value and (named is None or kind == named):
            new_sizes.add(sizes.size_of(e))
    return new_sizes.pop() if len(new_sizes) == 1 else None


def _new_width(value: int, prefix: str, sizes: _Sizes) -> int | None:
    """Return what a width becomes: the size of all vectors of that size in the module, where they agree."""
    inside = f"{prefix}." if prefix else ""
    vectors = [dims[0] for name, dims in sizes.graph.dims.items() if len(dims) == 1 and name.startswith(inside)]
    new_sizes = {sizes.size_of(e) for e in vectors if size(e) == value}
    return new_sizes.pop() if len(new_sizes) == 1 else None
