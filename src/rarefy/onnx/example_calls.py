"""How an example calls a model that is exported, and what the model returns for it and for other sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.common.errors import ModelError
from rarefy.model.batches import distinct_tensors
from rarefy.model.forward import calling, describe_batch, evaluating, named_arguments, split_example
from rarefy.model.layers import unwrap
from rarefy.model.signature import get_signature
from rarefy.onnx.axes import Axes


@dataclass(frozen=True)
class ExampleCall:
    """A call of a model.

    Attributes:
        args: the arguments by position.
        kwargs: the arguments by keyword.
        arguments: all arguments by their names; those of `*args` are one tuple.
        inputs: tensors by the names that the file has for them.
        names: of arguments, where the file that the model came from had others.
        outputs: names of outputs in that file.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: dict[str, Any]
    inputs: dict[str, Tensor]
    names: dict[str, str]
    outputs: list[str]


def example_call(model: nn.Module, example: Any) -> ExampleCall:
    """Return how an example calls a model; ModelError for what is no tensor in it."""
    args, kwargs = distinct_tensors(split_example(example))
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.contiguous, (args, kwargs))  # a file has no strides
    other = [type(a).__name__ for a in (*args, *kwargs.values()) if not isinstance(a, Tensor)]
    if other:
        raise ModelError(f"example: expected a tensor, a tuple of tensors or a dict of tensors; it holds {other[0]}")
    arguments = named_arguments(unwrap(model), args, kwargs)
    in_file = get_signature(unwrap(model))
    names = {} if in_file is None else {i.parameter: i.name for i in in_file.inputs}
    outputs = [] if in_file is None else list(in_file.outputs)
    inputs: dict[str, Tensor] = {}
    for name, value in arguments.items():
        parts = {f"{name}_{i}": t for i, t in enumerate(value)} if isinstance(value, tuple) else {name: value}
        inputs |= {names.get(n, n): t for n, t in parts.items()}
    return ExampleCall(args, kwargs, arguments, inputs, names, outputs)


def calls_with_other_sizes(
    model: nn.Module, call: ExampleCall, axes: Axes
) -> tuple[list[tuple[str, dict[str, Tensor], list[Tensor]]], set[str]]:
    """Return what a model makes of the example, and of it with each open size changed.

    Returns:
        What the inputs are, the inputs by name, and the outputs; and the names of sizes that the model takes in no
        other value.
    """
    rigid: set[str] = set()
    with evaluating(model), torch.no_grad():
        with calling(model, f"an example of {describe_batch(call.kwargs or call.args)}"):
            calls = [("the example", call.inputs, outputs_of(model, call, {}))]
        for axis in dict.fromkeys(axis for named in axes.values() for axis in named.values()):
            for change in (_double, _extend, _shorten):
                inputs = {n: _changed(t, axes.get(n, {}), axis, change) for n, t in call.inputs.items()}
                if not all(t.numel() for t in inputs.values()):
                    continue
                try:
                    outputs = outputs_of(model, call, inputs)
                except Exception:  # the model does not take that size
                    continue
                size = next(inputs[n].shape[d] for n, named in axes.items() for d, a in named.items() if a == axis)
                calls.append((f"{axis} = {size}", inputs, outputs))
                break
            else:
                rigid.add(axis)
    return calls, rigid


def _changed(t: Tensor, named: Mapping[int, str], axis: str, change: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return a tensor with each of its sizes of that name changed."""
    for d, name in named.items():
        t = change(t, d) if name == axis else t
    return t


def _double(t: Tensor, d: int) -> Tensor:
    return torch.cat([t, t], d)


def _extend(t: Tensor, d: int) -> Tensor:
    return torch.cat([t, t.narrow(d, 0, 1)], d)


def _shorten(t: Tensor, d: int) -> Tensor:
    return t.narrow(d, 0, t.shape[d] - 1)


def outputs_of(model: nn.Module, call: ExampleCall, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return all tensors that the model returns for the example, or for other inputs by name."""
    by_id = {id(call.inputs[n]): t for n, t in inputs.items()}
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: by_id.get(id(t), t), (call.args, call.kwargs))
    return [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]
