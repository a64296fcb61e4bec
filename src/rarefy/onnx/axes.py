"""Named sizes of a model's inputs that stay open in an ONNX file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import ModelError, unknown

Axes = dict[str, dict[int, str]]  # {input: {dimension: name}}
BATCH, LENGTH = "batch", "length"


def default_axes(inputs: Mapping[str, Tensor]) -> Axes:
    """Return the batch of all inputs, and the length of texts, which are matrices of integers.

    >>> default_axes({"ids": torch.zeros(2, 7, dtype=torch.int64), "image": torch.zeros(2, 3, 8, 8)})
    {'ids': {0: 'batch', 1: 'length'}, 'image': {0: 'batch'}}
    """
    sizes: dict[str, int] = {}
    axes: Axes = {}

    def name_for(axis: str, owner: str, size: int) -> str:
        """Return the name of an axis: the common one if the first input with it has that size too."""
        return axis if sizes.setdefault(axis, size) == size else f"{owner}_{axis}"

    for name, t in inputs.items():
        axes[name] = {0: name_for(BATCH, name, t.shape[0])} if t.dim() else {}
        if t.dim() == 2 and not t.is_floating_point():
            axes[name][1] = name_for(LENGTH, name, t.shape[1])
    return axes


def check_axes(dynamic: Any, inputs: Mapping[str, Tensor]) -> Axes:
    """Return the axes that a user names; ModelError for those that do not fit the inputs."""
    expected = "expected {input: {dimension: name}}, such as {'x': {0: 'batch', 2: 'height'}}"
    if not isinstance(dynamic, Mapping) or not all(isinstance(a, Mapping) for a in dynamic.values()):
        raise ModelError(f"dynamic: {expected}, got {dynamic!r:.80}")
    sizes: dict[str, tuple[str, int]] = {}
    for name, axes in dynamic.items():
        if name not in inputs:
            raise ModelError(f"dynamic: {unknown('input', name, inputs)}")
        rank = inputs[name].dim()
        for d, axis in axes.items():
            if type(d) is not int or not 0 <= d < rank or not isinstance(axis, str) or not axis.isidentifier():
                raise ModelError(
                    f"dynamic: {expected}; {name} has dimensions 0 to {rank - 1} and a name is made of letters, "
                    f"digits and _, got {{{d!r}: {axis!r}}}"
                )
            first, size = sizes.setdefault(axis, (name, inputs[name].shape[d]))
            if inputs[name].shape[d] != size:
                raise ModelError(
                    f"dynamic: {axis!r} is {size} in {first} and {inputs[name].shape[d]} in {name}: "
                    "give different sizes different names"
                )
    return {name: dict(dynamic.get(name, {})) for name in inputs}


def shapes_for_export(arguments: Mapping[str, Any], axes: Axes, names: Mapping[str, str]) -> dict[str, Any]:
    """Return which sizes torch.export leaves open if it can, in the form of the arguments.

    Args:
        arguments: those of a call.
        axes: the sizes, by the names of inputs.
        names: of arguments, where the inputs have others.
    """
    auto = torch.export.Dim.AUTO
    shapes: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, tuple):
            shapes[name] = tuple(dict.fromkeys(axes[f"{name}_{i}"], auto) for i in range(len(value)))
        else:
            shapes[name] = dict.fromkeys(axes[names.get(name, name)], auto)
    return shapes


def only_these(axes: Axes, keep: Callable[[str], bool]) -> Axes:
    """Return the axes whose name is kept."""
    return {name: {d: axis for d, axis in named.items() if keep(axis)} for name, named in axes.items()}


def texts_of(axes: Axes, inputs: Mapping[str, Tensor]) -> list[str]:
    """Return the axes and their sizes as messages name them.

    >>> texts_of({"x": {0: "batch"}}, {"x": torch.zeros(2, 3)})
    ['dimension 0 of x (batch) at 2']
    """
    return [
        f"dimension {d} of {name} ({axis}) at {inputs[name].shape[d]}"
        for name, named in axes.items()
        for d, axis in named.items()
    ]


def name_axes_(model: Any, axes: Axes) -> Axes:
    """Give the open sizes of an exported model their names.

    Args:
        model: a model of onnx_ir.
        axes: the names.

    Returns:
        The axes that the export fixed.
    """
    names: dict[str, str] = {}
    fixed: Axes = {}
    for value in model.graph.inputs:
        for d, axis in axes.get(value.name, {}).items():
            size = value.shape[d]
            if isinstance(size, int):
                fixed.setdefault(value.name, {})[d] = axis
            elif size.value is not None:
                names.setdefault(size.value, axis)
    values = [*model.graph.inputs, *(v for node in model.graph.all_nodes() for v in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = type(value.shape)([_renamed(n, names) for n in value.shape])
    return fixed


def _renamed(size: Any, names: Mapping[str, str]) -> Any:
    """Return a size with the symbols in it renamed."""
    if isinstance(size, int) or size.value is None:
        return size
    return re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), str(size.value))
