"""Remove units from a model: zero them, slice parameters, verify the outputs, and undo everything where that fails."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy.common.errors import ModelError, RarefyError
from rarefy.dependency.graph import Graph, Group
from rarefy.dependency.symbolic_dims import Axis, kept_mask, leaves
from rarefy.dependency.tracer import clear_caches, decomposed_ops, tracking_module_names
from rarefy.model.batches import tensors_in
from rarefy.model.compare import relative_distance
from rarefy.model.forward import call, evaluating, on_device, temporary_hooks
from rarefy.model.mha import replace_mha_
from rarefy.model.rounding_noise import rounding_noise
from rarefy.structured.consumers import Consumer, all_consumers
from rarefy.structured.masked_reference import MaskedReference
from rarefy.structured.size_attributes import update_size_attributes
from rarefy.structured.structure_record import named_tensors, record_attention, record_cut, record_restorer

# allowed difference between outputs of the cut and the masked model, relative to the largest: sums round differently
NEAR = 1e-4
NOISES = 16  # times the noise of one rounding error of the inputs that outputs may differ too: each layer rounds
MOST = 1e-2  # that noise may excuse
NEAR_OF = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
FLIPS = 0.01  # share of integer outputs that may differ: an argmax of nearly equal numbers can flip
Undo = list[Callable[[], Any]]


class ForwardFailed(ModelError):
    """The cut model raises; `module` is the name of the module that was running."""

    def __init__(self, message: str, module: str = ""):
        super().__init__(message)
        self.module = module


class OutputMismatch(ModelError):
    """The outputs of the cut model differ from the masked reference."""


@dataclass(eq=False)
class Removal:
    """What a removal changed, and how to undo it.

    undo       functions that undo it, in order
    replaced   tensors that were replaced: old, new, indices kept by dimension
    constants  constant outputs of removed units that were added to biases, by the weight's name
    scaled     rows of weights that were multiplied: name -> (dimension, rows before the cut, factor)
    unseen     the example's outputs do not depend on the removed units, so nothing was verified
    repaired   names of layers with compensated weights
    """

    model: nn.Module | None = None
    undo: Undo = field(default_factory=list)
    replaced: list[tuple[Tensor, Tensor, dict[int, Tensor]]] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    scaled: dict[str, tuple[int, Tensor, float]] = field(default_factory=dict)
    unseen: bool = False
    repaired: list[str] = field(default_factory=list)

    def put_back(self, first: int = 0) -> None:
        """Undo what was done, from step `first` on."""
        for step in reversed(self.undo[first:]):
            step()
        del self.undo[first:]
        if self.model is not None:
            clear_caches(self.model)


def short_reason(error: ModelError) -> str:
    """Return the cause that an error names, in at most 160 characters."""
    reason = str(error).removeprefix("the cut model does not run, so the cut was undone: ").partition(" (it takes")[0]
    reason = re.sub(r"^\w+ cannot be called with a batch of .*?: (?=[^:]*$)", "", reason)
    return reason if len(reason) <= 160 else reason[:157] + "..."


def remove_units(
    model: nn.Module, example: Any, graph: Graph, masks: Mapping[Axis, Tensor], *, stay: bool = False
) -> Removal:
    """Remove the units that `masks` does not keep, and verify the outputs against the masked model.

    With `stay` the slices are put back, and the units only become zero. Raises ModelError; the model is then unchanged.
    Three calls.
    """
    removal = Removal(model)
    dense = outputs(model, example)
    removal.undo += zero_units_(graph, masks)
    zeroed = len(removal.undo)
    try:
        consumers = [c for c in all_consumers(graph) if not bool(kept_mask(c.inputs, masks.get).all())]
        with decomposed_ops(), MaskedReference(graph, masks), _constants(consumers, graph, masks, removal.constants):
            reference = outputs(model, example)
        removal.unseen = all(torch.equal(a, b) for a, b in zip(dense, reference))
        _remove_exactly(model, example, graph, masks, reference, removal)
    except BaseException:
        removal.put_back()
        raise
    if stay:
        removal.put_back(zeroed)
        removal.replaced.clear()
    return removal


def give_own_heads(model: nn.Module, names: Any = None) -> Removal:
    """Replace torch's attention modules by ones that can lose heads and width; the model records which."""
    removal = Removal(model, [record_restorer(model)])
    replaced = replace_mha_(model, names)
    removal.undo += [lambda slot=slot: setattr(slot[0], slot[1], slot[2]) for slot in replaced.values()]
    if replaced:
        record_attention(model, replaced)
    return removal


def _remove_exactly(
    model: nn.Module,
    example: Any,
    graph: Graph,
    masks: Mapping[Axis, Tensor],
    reference: Sequence[Tensor],
    removal: Removal,
) -> None:
    """Remove the units and verify.

    Where attention divides by the square root of a dimension that shrinks, the query weights are scaled to compensate.
    """
    first = len(removal.undo)
    remove_slices(model, graph, masks, removal)
    try:
        return verify(model, example, reference)
    except OutputMismatch:
        scaled = [g for g in graph.groups if g.axis in masks and g.axis.scores]
        if not scaled:
            raise
    removal.put_back(first)
    removal.replaced.clear()
    for group in scaled:
        _scale_queries(graph, group, float(masks[group.axis].float().mean()) ** 0.5, removal)
    remove_slices(model, graph, masks, removal)
    verify(model, example, reference)


def _scale_queries(graph: Graph, group: Group, factor: float, removal: Removal) -> None:
    """Multiply the weights that produce queries.

    These are in the first parameter that produces the head dimensions, its first rows of each head.
    """
    axes = (a for m in group.members for a in leaves(graph.dims[m.name][m.dim]))
    heads = [a for a in axes if a.kind == "head"]
    num_rows = group.size * (heads[0].size if heads else 1)
    producers = [member for member in group.members if member.role == "out"]
    weight = next((member for member in producers if getattr(*graph.owners[member.name][0]).dim() > 1), None)
    if weight is None:
        return
    module = graph.owners[weight.name][0][0]
    for member in producers:
        if graph.owners[member.name][0][0] is module:
            W = getattr(*graph.owners[member.name][0])
            rows = (graph.unit_indices(member.name, member.dim)[group.axis] >= 0).nonzero()[:num_rows, 0].to(W.device)
            removal.undo.append(value_restorer(W))
            W.data.index_copy_(member.dim, rows, W.data.index_select(member.dim, rows) * factor)
            removal.scaled[member.name] = member.dim, rows, factor


def value_restorer(W: Tensor) -> Callable[[], Any]:
    """Return a function that restores the current values of a tensor."""
    old = W.detach().clone()
    return lambda: W.data.copy_(old)


def zero_units_(graph: Graph, masks: Mapping[Axis, Tensor]) -> Undo:
    """Set removed units to zero in the parameters that produce them; return what undoes it."""
    undo: Undo = []
    dims_of: dict[str, set[int]] = {}
    for member in (m for g in graph.groups if g.axis in masks for m in g.members if m.role == "out"):
        dims_of.setdefault(member.name, set()).add(member.dim)
    for name, dims in dims_of.items():
        W = getattr(*graph.owners[name][0])
        if not isinstance(W, nn.Parameter):
            continue
        undo.append(value_restorer(W))
        for d in dims:
            removed = ~kept_mask(graph.dims[name][d], masks.get)
            W.data.index_fill_(d, removed.nonzero()[:, 0].to(W.device), 0)
    return undo


def remove_slices(model: nn.Module, graph: Graph, masks: Mapping[Axis, Tensor], removal: Removal) -> None:
    """Slice parameters, buffers and size attributes of modules; the model records the cut."""
    removal.undo.append(record_restorer(model))
    undo, numbers = update_size_attributes(model, graph, masks)
    removal.undo += undo
    names = {(id(m), a): n for n, m, a in named_tensors(dict(model.named_modules()))}
    indices: dict[str, dict[int, Tensor]] = {}
    for name, dims in graph.dims.items():
        old = getattr(*graph.owners[name][0])
        new = old.detach()
        kept_indices: dict[int, Tensor] = {}
        for d, e in enumerate(dims):
            keep = kept_mask(e, masks.get)
            if not keep.all():
                kept_indices[d] = keep.nonzero()[:, 0]
                new = new.index_select(d, kept_indices[d].to(new.device))
        if not kept_indices:
            continue
        for module, attribute in graph.owners[name]:
            indices[names[id(module), attribute]] = kept_indices
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new.clone(), old.requires_grad)
        removal.replaced.append((old, new, kept_indices))
        for module, attribute in graph.owners[name]:
            setattr(module, attribute, new)  # by setattr: recurrent layers keep a list of their weights
            removal.undo.append(lambda m=module, a=attribute, o=old: setattr(m, a, o))
    for name, constant in removal.constants.items():
        bias: Any = graph.owners[name][0][0].bias
        removal.undo.append(value_restorer(bias))
        bias.data.add_(constant.to(bias))
    record_cut(model, numbers, indices)


@contextmanager
def _constants(
    consumers: Sequence[Consumer], graph: Graph, masks: Mapping[Axis, Tensor], constants: dict[str, Tensor]
) -> Any:
    """Record the constant outputs of removed units, by the weight's name.

    A unit that is zero where it is produced can still be a nonzero constant at its consumer, such as behind a sigmoid.
    """

    def record(consumer: Consumer) -> Any:
        removed = ~kept_mask(consumer.inputs, masks.get)

        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            x = consumer.rows((args or tuple(kwargs.values()))[0].detach()).float()
            x = x[:, removed.to(x.device)]
            if len(x) < 2 or not x.any() or module.bias is None or _pads(module):
                return  # a single row does not show whether it is constant
            low, high = x.amin(0), x.amax(0)
            constant = torch.where(high - low <= 1e-6 * high.abs().clamp(min=1), x.mean(0), torch.zeros_like(low))
            W = module.weight.detach().float().transpose(0, consumer.axis)[removed.to(x.device)]
            W = W.flatten(2).sum(2) if W.dim() > 2 else W
            rows = kept_mask(graph.dims[consumer.name][1 - consumer.axis], masks.get)
            constants[consumer.name] = (constant @ W)[rows.to(x.device)]

        return hook

    plain = [c for c in consumers if c.plain]
    with temporary_hooks([c.module.register_forward_pre_hook(record(c), with_kwargs=True) for c in plain]):
        yield


def _pads(module: Any) -> bool:
    """Return whether a convolution pads with zeros, where the constant is missing."""
    if not isinstance(module, nn.modules.conv._ConvNd) or module.padding_mode != "zeros":
        return False
    return module.padding == "same" or (module.padding != "valid" and any(module.padding))


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """Return all tensors that a call in evaluation mode returns."""
    clear_caches(model)
    with evaluating(model), torch.no_grad():
        return [t.detach().clone() for t in tensors_in(call(model, on_device(model, example)))]


@contextmanager
def _without_tracebacks(model: nn.Module) -> Iterator[None]:
    """Drop the traceback that torch.fx prints where a call of a graph module fails: the caller tells what failed."""
    if not any(isinstance(m, fx.GraphModule) for m in model.modules()):
        yield
        return
    printed = StringIO()
    with redirect_stderr(printed):
        yield
    sys.stderr.write(printed.getvalue())


def verify(model: nn.Module, example: Any, reference: Sequence[Tensor]) -> None:
    """Raise ModelError unless the cut model runs and returns what the masked model returned."""
    stack: list[str] = []
    try:
        with tracking_module_names(model, stack, unwind=False), _without_tracebacks(model):
            result = outputs(model, example)
    except RarefyError as error:
        raise ForwardFailed(
            f"the cut model does not run, so the cut was undone: {error}", (stack or [""])[-1]
        ) from error
    difference = output_difference(result, reference, "the masked model's")
    if difference and output_difference(result, reference, "", max(NEAR, NOISES * _noise(model, example, result))):
        raise OutputMismatch(f"the cut model {difference}, so the cut was undone")


def _noise(model: nn.Module, example: Any, result: Sequence[Tensor]) -> float:
    """Return how far outputs move, relative to their largest entry, by one rounding error; at most MOST / NOISES."""
    noise = rounding_noise(lambda x: outputs(model, x), example, result, norm=math.inf, floor=1e-6)
    return min(noise, MOST / NOISES)


def output_difference(result: Sequence[Tensor], expected: Sequence[Tensor], whose: str, near: float = NEAR) -> str:
    """Return how two lists of outputs differ, or "" where they agree.

    Floating-point outputs may differ by `near` of the largest entry (more in half precision). `whose` names the owner
    of the expected outputs.
    """
    if len(result) != len(expected):
        return f"returns {len(result)} tensors instead of {len(expected)}"
    for a, b in zip(result, expected):
        if a.shape != b.shape:
            return f"returns {list(a.shape)} instead of {list(b.shape)}"
        distance = relative_distance(a, b, norm=math.inf, floor=1e-6)
        if not b.is_floating_point():
            if distance > FLIPS:
                return f"returns integers of which {distance:.0%} differ from {whose}"
        elif not distance <= (allowed := NEAR_OF.get(b.dtype, near)):
            return f"returns outputs that differ from {whose} by {distance:.2g} (at most {allowed:g} is allowed)"
    return ""
