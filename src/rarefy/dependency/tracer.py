"""The tracer: a dispatch mode that records the symbolic dimensions of every tensor in a run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from rarefy.dependency.symbolic_dims import Algebra, Axis, Expr, fixed, is_fixed, leaves, lock
from rarefy.model.batches import tensors_in
from rarefy.model.forward import temporary_hooks
from rarefy.model.mha import without_mha_fastpath

KERNEL = "a kernel has its size"  # spatial sizes of convolutions are no units


class Trace(TorchDispatchMode):
    """One run of a model, with the dimensions of all tensors that are alive."""

    def __init__(self, model: nn.Module, rules: Mapping[str, Any]):
        super().__init__()
        self.rules, self.algebra = rules, Algebra()
        self.known_dims: Any = WeakTensorKeyDictionary()  # tensor -> its dimensions
        self.source: Any = WeakTensorKeyDictionary()  # a view of a parameter -> its id
        self.roles: dict[tuple[int, int], str] = {}
        self.output_dims: set[tuple[int, int]] = set()
        self.unknown: dict[tuple[str, str], None] = {}
        self.sizes: dict[str, list[Expr]] = {}
        self.costs: list[tuple[int, list[Expr]]] = []
        self.products: list[tuple[str, list[Expr]]] = []
        self.derived_weights: dict[str, list[Expr]] = {}
        self.used: set[int] = set()  # ids of parameters and buffers that an operator has read
        self.stack = [""]
        self.param_dims: dict[int, list[Expr]] = {}
        for _, t in [*model.named_parameters(), *model.named_buffers()]:
            self.known_dims[t] = self.param_dims[id(t)] = [fixed(1) if n == 1 else Axis(n) for n in t.shape]
            self.source[t] = id(t)

    @property
    def module_name(self) -> str:
        """Return the name of the module that is running."""
        return self.stack[-1] or "the model itself"

    def dims(self, t: Tensor) -> list[Expr]:
        """Return the dimensions of a tensor; an unknown tensor keeps its sizes."""
        if t not in self.known_dims:
            self.known_dims[t] = [fixed(n, f"{self.module_name} is given it") for n in t.shape]
        return self.known_dims[t]

    def set_dims(self, t: Any, dims: list[Expr], source: Tensor | None = None) -> None:
        """Set the dimensions of an output; `source` is the tensor that it is a view of."""
        if isinstance(t, Tensor):
            assert len(dims) == t.dim(), f"{len(dims)} dimensions for {list(t.shape)}"
            self.known_dims[t] = dims
            if source is not None and source in self.source:
                self.source[t] = self.source[source]

    def record_sizes(self, dims: list[Expr]) -> None:
        """Record that the running module's code uses these sizes, so a cut must update its size attributes."""
        self.sizes.setdefault(self.stack[-1], []).extend(dims)

    def unify(self, a: Expr, b: Expr) -> None:
        """Make two dimensions the same."""
        self.algebra.unify(a, b)

    def mark_input(self, t: Tensor, e: Expr) -> None:
        """Record that a product sums over `e`, a dimension of `t`: if t is a parameter, it reads these units."""
        if t in self.source:
            axis_ids, dims = {id(a) for a in leaves(e)}, self.param_dims[self.source[t]]
            same_dims = [
                d for d, dim in enumerate(dims) if dim is e
            ]  # both dimensions may have the same units, as those of W in x + W x
            for d, dim in enumerate(dims):
                if d in same_dims or (not same_dims and any(id(a) in axis_ids for a in leaves(dim))):
                    self.roles[self.source[t], d] = "in"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.used |= {self.source[x] for x in tensors_in([list(args), kwargs]) if x in self.source}
        name = func.overloadpacket.__name__ if func.namespace == "aten" else str(func)
        self.algebra.where = f"{name} in {self.module_name}"
        rule = self.rules.get(name)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = self.rules["pointwise"]
        if rule is None or any(t.is_sparse for t in tensors_in([list(args), kwargs])):
            rule = unsupported_op
        rule(self, func, args, kwargs, out)
        return out


def unsupported_op(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Keep all units of an unsupported operator's inputs."""
    name = str(func.overloadpacket)
    for t in tensors_in([list(args), kwargs]):
        if not all(map(is_fixed, trace.dims(t))):
            trace.unknown[name, trace.module_name] = None
        for e in trace.dims(t):
            lock(e, f"no rule for {name} in {trace.module_name}")
    for t in tensors_in([out]):
        if not any(t is a for a in tensors_in([list(args)])):
            trace.set_dims(t, [fixed(n, f"made by {name}") for n in t.shape])


@contextmanager
def tracking_module_names(model: nn.Module, stack: list[str], *, unwind: bool = True) -> Any:
    """Keep the names of the running modules in `stack`; without `unwind` they stay there after an error."""

    def leave(*_: Any) -> None:
        stack.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda m, a, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(leave, always_call=unwind))
    with temporary_hooks(hooks):
        yield


@contextmanager
def decomposed_ops() -> Any:
    """Make torch run single operators instead of fused ones for a whole layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about TF32 on absent GPUs
        flags = torch.backends.mkldnn.flags(enabled=False)
        flags.__enter__()
    try:
        with without_mha_fastpath():
            yield
    finally:
        flags.__exit__(None, None, None)


def clear_caches(model: nn.Module) -> None:
    """Clear the caches of modules (such as `attention_bias_cache`), whose tensors have the sizes of an earlier call."""
    for module in model.modules():
        for name, value in vars(module).items():
            cached = type(value) is dict and "cache" in name and not name.startswith("_")
            if cached and all(isinstance(t, Tensor) for t in value.values()):
                value.clear()
