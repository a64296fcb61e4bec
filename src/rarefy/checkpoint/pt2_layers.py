"""Torch's layers for the operators of an exported program that have weights, with the names of their modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rarefy.checkpoint.pt2_graph import RANK

CONVS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
BATCH_NORM, GROUP_NORM = torch.ops.aten.batch_norm.default, torch.ops.aten.group_norm.default
TENSORS = ("weight", "bias", "running_mean", "running_var")  # arguments that a layer owns
NEEDED = {BATCH_NORM: TENSORS, GROUP_NORM: ("weight", "bias")}
PATH = re.compile(r"[A-Za-z0-9_]{1,200}(\.[A-Za-z0-9_]{1,200}){0,40}")


def _linear(values: Mapping[str, Any], weight: Tensor) -> nn.Module:
    return nn.Linear(weight.shape[1], weight.shape[0], values.get("bias") is not None, device="meta")


def _conv(values: Mapping[str, Any], weight: Tensor) -> nn.Module:
    dims, groups = weight.dim() - 2, values.get("groups", 1)
    stride, dilation = (_sizes(values.get(name, 1), dims) for name in ("stride", "dilation"))
    padding = values.get("padding", 0)
    padding = padding if isinstance(padding, str) else _sizes(padding, dims)
    sizes = weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:])
    bias = values.get("bias") is not None
    return CONVS[dims - 1](
        *sizes, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias, device="meta"
    )


def _sizes(value: Any, dims: int) -> tuple[int, ...]:
    sizes = (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)
    if len(sizes) != dims:
        raise ValueError(f"expected {dims} sizes, got {len(sizes)}")
    return sizes


def _embedding(values: Mapping[str, Any], weight: Tensor) -> nn.Module:
    padding = values.get("padding_idx", -1)
    return nn.Embedding(*weight.shape, padding_idx=None if padding == -1 else padding, device="meta")


def _layer_norm(values: Mapping[str, Any], weight: Tensor) -> nn.Module:
    bias = values.get("bias") is not None
    return nn.LayerNorm(list(values["normalized_shape"]), values.get("eps", 1e-5), bias=bias, device="meta")


def _batch_norm(values: Mapping[str, Any], weight: Tensor) -> nn.Module:
    layer = BATCH_NORMS[values["input"].meta[RANK]](
        len(weight), eps=values["eps"], momentum=values["momentum"], device="meta"
    )
    layer.num_batches_tracked = torch.tensor(0, dtype=torch.int64)
    return layer


def _group_norm(values: Mapping[str, Any], weight: Tensor) -> nn.Module:
    return nn.GroupNorm(values["num_groups"], len(weight), values.get("eps", 1e-5), device="meta")


# operator: (the layer, the argument that it is called with, dimensions of the weight)
LAYERS: dict[Any, tuple[Callable[[Mapping[str, Any], Tensor], nn.Module], str, tuple[int, ...]]] = {
    torch.ops.aten.linear.default: (_linear, "input", (2,)),
    torch.ops.aten.conv1d.default: (_conv, "input", (3,)),
    torch.ops.aten.conv2d.default: (_conv, "input", (4,)),
    torch.ops.aten.conv3d.default: (_conv, "input", (5,)),
    torch.ops.aten.conv1d.padding: (_conv, "input", (3,)),
    torch.ops.aten.conv2d.padding: (_conv, "input", (4,)),
    torch.ops.aten.conv3d.padding: (_conv, "input", (5,)),
    torch.ops.aten.embedding.default: (_embedding, "indices", (2,)),
    torch.ops.aten.layer_norm.default: (_layer_norm, "input", (1, 2, 3)),
    BATCH_NORM: (_batch_norm, "input", (1,)),
    GROUP_NORM: (_group_norm, "input", (1,)),
}


class Layers:
    """The modules of a program, which are created as its nodes are read."""

    def __init__(self, module: nn.Module, graph: fx.Graph, weights: Mapping[str, str]):
        self.module, self.graph = module, graph
        self.targets: dict[fx.Node, str] = {}  # of the nodes that read weights
        self.settings: dict[str, tuple[Any, ...]] = {}  # of each layer: its operator, tensors and arguments

    def add_weight(self, placeholder: str, target: str, tensor: Tensor) -> fx.Node:
        """Put a tensor in its place among the modules, and return a node that reads it."""
        if not PATH.fullmatch(target):
            raise ValueError(f"{target[:60]!r} is no name of a tensor")
        path, _, name = target.rpartition(".")
        owner = self._owner(path)
        if hasattr(owner, name):
            raise ValueError(f"{target[:60]!r} is the name of several things")
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(name, tensor)
        else:
            owner.register_buffer(name, tensor)
        node = self.graph.get_attr(target)
        self.targets[node] = target
        return node

    def _owner(self, path: str) -> nn.Module:
        """Return the module at a path, which is created where there is none."""
        module: Any = self.module
        for part in filter(None, path.split(".")):
            if part not in module._modules:
                if hasattr(module, part):
                    raise ValueError(f"{path[:60]!r} is the name of several things")
                module.add_module(part, nn.Module())
            module = module._modules[part]
        return module

    def call(self, function: Any, values: Mapping[str, Any], caller: tuple[str, str]) -> fx.Node | None:
        """Return the call of the layer that an operator with these arguments is; None where it is none.

        Args:
            function: the operator.
            values: its arguments by name.
            caller: the path and the class of the module that called it, which has tied weights of another layer.
        """
        create, first, dims = LAYERS.get(function, (None, "", ()))
        own = {n: self.targets.get(values[n]) for n in TENSORS if values.get(n) is not None}
        if create is None or not all(own.values()) or not set(NEEDED.get(function, ("weight",))) <= set(own):
            return None
        tensors = {n: self._tensor(str(target)) for n, target in own.items()}
        settings = {n: v for n, v in values.items() if n not in (first, *TENSORS)}
        if tensors["weight"].dim() not in dims or not isinstance(tensors["weight"], nn.Parameter):
            return None
        if any(isinstance(v, fx.Node) for v in pytree.tree_leaves(settings)):
            return None
        layer = create(values, tensors["weight"])
        path = str(own["weight"]).rpartition(".")[0]
        if caller[1] == type(layer).__name__ and PATH.fullmatch(caller[0]):
            path = caller[0]
        elif any(target != f"{path}.{n}" for n, target in own.items()) or not path:
            return None
        key = (function, tuple(own.items()), repr(settings))
        if self.settings.setdefault(path, key) != key:
            return None
        if type(self._owner(path)) is nn.Module:
            self._replace(path, layer, tensors)
        return self.graph.call_module(path, (values[first],))

    def _tensor(self, target: str) -> Tensor:
        path, _, name = target.rpartition(".")
        return getattr(self.module.get_submodule(path), name)

    def _replace(self, path: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Replace a module without code by a layer, which takes over the module's other tensors and children."""
        old = self.module.get_submodule(path)
        for name, tensor in tensors.items():
            if getattr(layer, name).shape != tensor.shape:
                raise ValueError(f"the {name} of {path} does not fit its operator")
        for name, tensor in {**old._parameters, **old._buffers, **tensors}.items():
            if isinstance(tensor, nn.Parameter):
                layer.register_parameter(name, tensor)
            else:
                layer.register_buffer(name, tensor)
        for name, child in old.named_children():
            layer.add_module(name, child)
        parent, _, leaf = path.rpartition(".")
        self.module.get_submodule(parent).add_module(leaf, layer)
